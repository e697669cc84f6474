"""The command line: which verbs there are, and what each takes; a mistyped one is answered before any import."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from cpcscale import __version__

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command_line() -> argparse.ArgumentParser:
    """The parser of `cpcscale VERB ...`. Every verb takes overrides, and all but compare take --json."""
    parser = argparse.ArgumentParser(
        prog="cpcscale", description="CPC pretraining for speech emotion, from audio files to a comparison of runs."
    )
    parser.add_argument("--version", action="version", version=f"cpcscale {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _of_data(verbs)
    _of_runs(verbs)
    _of_figures(verbs)
    for verb, subparser in verbs.choices.items():
        subparser.add_argument(
            "overrides", nargs="*", metavar="key=value", default=[], help="overrides, such as train.steps=60"
        )
        if verb != "compare":
            subparser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    return parser


def _of_data(verbs: Verbs) -> None:
    pack = verbs.add_parser("pack", help="audio files -> WebDataset tar shards and their index")
    pack.add_argument("source", help="folder of audio, or s3://")
    pack.add_argument("target", help="folder or s3:// prefix for the shard sets")
    index = verbs.add_parser("index", help="tars that others made -> an index beside them, or a new version of it")
    index.add_argument("shards", help="folder of tars, or s3:// prefix")
    index.add_argument("--append", action="store_true", help="add the tars that the index lacks")
    index.add_argument(
        "--exclude", action="append", metavar="KEYS|@FILE", help="KEY or SHARD:KEY of utterances that count for nothing"
    )
    audit = verbs.add_parser("audit", help="shard set -> what is in it, and what is wrong with it")
    audit.add_argument("shards", help="folder of an indexed set, or s3:// prefix")
    audit.add_argument("--plot", metavar="PATH.png", help="also draw durations, hours and sizes")


def _of_runs(verbs: Verbs) -> None:
    for verb, text in (
        ("pretrain", "shards -> CPC encoder, on Ray Train"),
        ("finetune", "encoder and labelled corpus -> emotion recogniser, cross-validated"),
        ("sweep", "hyper-parameters of fine-tuning, on Ray Tune"),
        ("evaluate", "recognisers on degraded audio, with fewer labels, or on other corpora"),
    ):
        verbs.add_parser(verb, help=text).add_argument(
            "config",
            help=f"YAML file, such as configs/{verb}/{'robustness' if verb == 'evaluate' else 'quickstart'}.yaml",
        )
    verbs.choices["sweep"].add_argument(
        "--resume", action="store_true", help="only go on with an unfinished sweep (the same command does so anyway)"
    )
    verbs.choices["evaluate"].add_argument("--dry-run", action="store_true", help="only list the runs, done and to do")
    verbs.choices["pretrain"].add_argument(
        "--take-over", action="store_true", help="go on with a run that another driver holds, and stop that one"
    )
    _size(verbs)
    checkpoint = verbs.add_parser(
        "checkpoint", help="a pretraining's checkpoints -> which there are, and whether whole"
    )
    checkpoint.add_argument("what", choices=("ls", "show", "verify"))
    checkpoint.add_argument("path", help="run_dir of a pretraining, or one of its checkpoints/step-* folders")
    reproduce = verbs.add_parser("reproduce", help="labelled corpus -> the table of all systems over several seeds")
    reproduce.add_argument(
        "config", nargs="?", help="YAML file, such as configs/reproduce/emodb.yaml; without one, the paper's recogniser"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="only list the runs, done and to do")


def _size(verbs: Verbs) -> None:
    size = verbs.add_parser("size", help="a pretraining's config -> what it takes of a cluster, before it takes it")
    size.add_argument("config", help="YAML file, such as configs/pretrain/paper.yaml")
    size.add_argument("--nodes", type=int, default=1, help="machines of one kind")
    size.add_argument("--gpus-per-node", type=int, default=0, help="a worker each; 0: the config's workers on CPUs")
    size.add_argument("--cores-per-node", type=int, default=0, help="0: as many as this machine has")
    size.add_argument("--store-mb-s", type=float, default=0.0, help="that a node reads from the object store; 0: any")
    size.add_argument("--network-gbit-s", type=float, default=25.0, help="of a node's card")
    rate = "audio seconds a second, 0: measured here"
    size.add_argument("--update-rate", type=float, default=0.0, help=f"of one worker, as `bench train` has it: {rate}")
    size.add_argument("--decode-rate", type=float, default=0.0, help=f"of one core: {rate}")


def _of_figures(verbs: Verbs) -> None:
    corpus = verbs.add_parser("corpus", help="labelled corpus -> what it holds: labels, speakers, splits, durations")
    corpus.add_argument("what", choices=("describe",))
    corpus.add_argument("path", help="folder as its owners ship it, or a CSV file; local or s3://")
    compare = verbs.add_parser("compare", help="tracked runs -> table and one HTML page")
    compare.add_argument("--format", choices=("table", "json", "csv"), default="table")
    compare.add_argument("--html", metavar="PATH", help="also write one self-contained page with plots")
    bench = verbs.add_parser("bench", help="how fast: `feed CONFIG`, `train CONFIG`; `plan`, `scale` at any size")
    bench.add_argument("what", choices=("feed", "train", "plan", "scale"))
    bench.add_argument("config", nargs="?", help="of all but plan: YAML file, such as configs/bench/feed.yaml")
    bench.add_argument("--profile", default="", help="of train: a file for the trace of an update, for a browser")
    bench.add_argument("--peers", action="store_true", help="of feed: also the other loaders that are installed")
    bench.add_argument("--shards", type=int, default=1_000_000, help="of plan: shards of the made set")
    bench.add_argument("--lanes", type=int, default=1024, help="of plan: lanes of the run")
    bench.add_argument("--rows", type=int, default=24_000_000, help="of plan: utterances whose windows are counted")
