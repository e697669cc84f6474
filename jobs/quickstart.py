"""The main job on the speech that the project carries, as the commands a user would type, in one Ray session.

`make quickstart` runs it. Each stage prints its command and one or two lines of its result; the same command, run by
hand, prints more. A stage that is done is not done twice, so an interrupted quickstart goes on where it was.
"""

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

from cpcscale.cli import main
from cpcscale.report.compare import format_table
from cpcscale.report.terminal.traits import with_interval

RUNS = "runs/quickstart"
REPRODUCE = "configs/reproduce/quickstart.yaml"
# To apply a recogniser to: what nobody labelled.
SPEECH = "tests/data/speech/asterisk_en/agent-alreadyon.opus"
# Each with about how long it takes on two cores.
SYSTEMS = {"mean": "5 s", "functionals": "5 s", "random": "20 s", "precpc": "20 s"}
SPLIT = ["shard_mb=16", "heldout_share=0.05", "heldout_by=utterance", "unseen_groups=[asterisk_it]"]


def _packed(result: dict[str, Any]) -> str:
    sets = (f"{name} {each['hours']:.2f} h ({each['utterances']} utterances)" for name, each in result["sets"].items())
    return f"  packed: {', '.join(sets)}"


def _pretrained(result: dict[str, Any]) -> str:
    means = ", ".join(f"{name} {result[name]['accuracy_mean']:.3f}" for name in ("heldout", "unseen"))
    return (
        f"  {result['steps']} updates on {result['audio_s'] / 3600:.2f} h of audio\n"
        f"  InfoNCE accuracy: {means} (chance {result['accuracy_chance']:.3f})"
    )


def _finetuned(result: dict[str, Any]) -> str:
    return f"  mean CCC {with_interval(result['ccc']['mean'], result['interval']['mean'])}"


def _compared(rows: list[dict[str, Any]]) -> str:
    """The table of the recognisers; the pretraining's figures stand in its own stage."""
    return format_table([row for row in rows if row["kind"] == "finetune"]).rstrip()


def _predicted(row: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {row[name]:.2f}" for name in ("activation", "valence", "dominance"))
    return f"  {row['end_s']:.1f} s: {values} on a scale from 1 to 5 [{row['marks']}]"


def _finetune(system: str) -> list[str]:
    return ["finetune", "configs/finetune/quickstart.yaml", f"system={system}", f"run_dir={RUNS}/{system}"]


# What is run, which flag has it print JSON, what is shown of that, about how long it takes.
STAGES: list[tuple[list[str], str, Callable[[Any], str], str]] = [
    (["pack", "tests/data/speech", f"{RUNS}/shards", *SPLIT], "--json", _packed, "20 s"),
    (["pretrain", "configs/pretrain/quickstart.yaml"], "--json", _pretrained, "2 min"),
    *((_finetune(system), "--json", _finetuned, budget) for system, budget in SYSTEMS.items()),
    (["compare", "--html", f"{RUNS}/report.html"], "--format=json", _compared, "10 s"),
    (["predict", f"{RUNS}/functionals/recogniser", SPEECH], "--json", _predicted, "5 s"),
]


def quickstart() -> int:
    """Runs the stages in order; the first that fails ends it with its status."""
    began = time.monotonic()
    for number, (command, flag, shown, budget) in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] $ cpcscale {shlex.join(command)}   (about {budget})", flush=True)
        stage_began = time.monotonic()
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = main([*command, flag])
        if status:
            return status
        print(f"{shown(json.loads(output.getvalue()))}\n  took {time.monotonic() - stage_began:.0f} s", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(
        f"\nDone in {minutes:.1f} minutes. The labelled corpus is made: these figures show that the parts work\n"
        "together, and nothing about emotion. The paper pretrained on 100 hours, 50 times over, on 8 GPUs.\n\n"
        f"  page with plots   {RUNS}/report.html\n"
        f"  encoder           {RUNS}/pretrain/checkpoints\n"
        f"  recognisers       {RUNS}/*/recogniser\n"
        "  tracked runs      .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db\n"
        f"  all nine systems  .venv/bin/cpcscale reproduce {REPRODUCE}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(quickstart())
