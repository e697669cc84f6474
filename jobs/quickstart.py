"""The main job on the speech that the project carries, as the commands a user would type, in one Ray session.

`make quickstart` runs it. Every stage can be run again by hand from the line it prints; a stage that is done is not
done twice, so an interrupted quickstart goes on where it was.
"""

import shlex
import sys
import time

from cpcscale.cli import main

RUNS = "runs/quickstart"
# Each with about how long it takes on two cores.
SYSTEMS = {
    **{"mean": "5 s", "functionals": "5 s", "random": "20 s", "mfcc": "20 s"},
    **{"raw": "90 s", "minicpc": "2 min", "precpc": "20 s"},
}
SPLIT = ["shard_mb=16", "heldout_share=0.05", "heldout_by=utterance", "unseen_groups=[asterisk_it]"]


def _finetune(system: str) -> list[str]:
    run_dir, checkpoint = f"run_dir={RUNS}/{system}", f"encoder.checkpoint={RUNS}/pretrain"
    return ["finetune", "configs/finetune/quickstart.yaml", f"system={system}", run_dir, checkpoint]


STAGES = [
    (["pack", "tests/data/speech", f"{RUNS}/shards", *SPLIT], "20 s"),
    (["pretrain", "configs/pretrain/quickstart.yaml", f"run_dir={RUNS}/pretrain"], "2 min"),
    *((_finetune(system), budget) for system, budget in SYSTEMS.items()),
    (["compare", "--html", f"{RUNS}/report.html"], "10 s"),
]


def quickstart() -> int:
    """Runs the stages in order; the first that fails ends it with its status."""
    began = time.monotonic()
    for number, (command, budget) in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] $ cpcscale {shlex.join(command)}   (about {budget})", flush=True)
        stage_began = time.monotonic()
        status = main(command)
        if status:
            return status
        print(f"  took {time.monotonic() - stage_began:.0f} s", flush=True)
    print(
        f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. The labelled corpus is made: it shows the machinery,"
        " not emotion.\nMinutes of pretraining on a laptop are not the paper: its encoder heard 100 hours, 50 times, "
        "on 8 GPUs.\n"
        f"  the page with plots  {RUNS}/report.html\n"
        "  the tracked runs     .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db\n"
        f"  the encoder          {RUNS}/pretrain/checkpoints"
    )
    return 0


if __name__ == "__main__":
    sys.exit(quickstart())
