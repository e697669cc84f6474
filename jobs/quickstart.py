"""The quickstart: all main verbs on the speech in tests/data, in one Ray session.

`make quickstart` runs it. Each stage prints its command, which can be run again by hand. Finished stages are not
repeated, so an interrupted quickstart continues where it stopped.
"""

import shlex
import sys
import time

from cpcscale.cli import main

RUNS = "runs/quickstart"
# Each with the approximate time on two cores.
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
    """Runs the stages in order. Returns 0, or the status of the first stage that fails, after which it stops."""
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
        " not emotion.\nMinutes of pretraining on a laptop are not the paper: its encoder saw 100 hours, 50 times, "
        "on 8 GPUs.\n"
        f"  the page with plots  {RUNS}/report.html\n"
        "  the tracked runs     .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db\n"
        f"  the encoder          {RUNS}/pretrain/checkpoints"
    )
    return 0


if __name__ == "__main__":
    sys.exit(quickstart())
