"""The command line: the verbs and their arguments. It imports little, so that a mistyped one is answered at once."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from cpcscale import __version__
from cpcscale.errors import nearest

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# An override of each verb that takes any, for its help.
_EXAMPLES = {
    "pack": "shard_mb=64",
    "index": "language=de",
    "audit": "share=0.1",
    "pretrain": "train.steps=60",
    "finetune": "fit.epochs=10",
    "recogniser": "out=FOLDER",
    "sweep": "trials=8",
    "evaluate": "seeds=[0,1]",
    "size": "train.batch=64",
    "checkpoint": "utterances=200",
    "reproduce": "seeds=[0,1]",
    "corpus": "kind=csv",
    "compare": "experiment=NAME",
    "bench": "runs=3",
    "doctor": "run_dir=s3://BUCKET/runs",
}


# Verbs that run in processes of this machine unless Ray is asked for.
_WITHOUT_RAY = ("pack", "index", "audit", "finetune", "evaluate", "reproduce")


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with the nearest word."""

    def error(self, message: str) -> NoReturn:
        if choice := re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", choice[3])
            message = f"{choice[2]!r} is not one of {', '.join(known)}{nearest(choice[2], known)}"
        self.exit(2, f"cpcscale: error: {message}; see `{self.prog} --help`\n")


class _ShowKeys(argparse.Action):
    """Prints the keys of a verb in place of running it; no other argument is needed."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from cpcscale import keys

        sys.stdout.writelines(f"{line}\n" for line in keys.lines(parser.prog.split()[-1]))
        parser.exit()


def command_line() -> argparse.ArgumentParser:
    """The parser of `cpcscale VERB ...`. Every verb takes overrides, and all but compare take --json."""
    parser: argparse.ArgumentParser = _Parser(
        prog="cpcscale", description="CPC pretraining for speech emotion, from audio files to a comparison of runs."
    )
    parser.add_argument("--version", action="version", version=f"cpcscale {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _of_data(verbs)
    _of_runs(verbs)
    _of_figures(verbs)
    parser.set_defaults(ray=False)
    for verb, subparser in verbs.choices.items():
        if verb in ("predict", "features"):
            continue
        text = f"overrides of config keys, such as {_EXAMPLES[verb]}" if verb in _EXAMPLES else argparse.SUPPRESS
        subparser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help=text)
        if verb in _EXAMPLES:
            subparser.add_argument("--keys", action=_ShowKeys, help="list the config keys, their defaults and meaning")
        if verb in _WITHOUT_RAY:
            subparser.add_argument("--ray", action="store_true", help="run on Ray, here if RAY_ADDRESS is unset")
        if verb != "compare":
            subparser.add_argument("--json", action="store_true", help="print one JSON object on stdout, not text")
    return parser


def _of_data(verbs: Verbs) -> None:
    pack = verbs.add_parser("pack", help="audio files -> WebDataset tar shards and their index")
    pack.add_argument("source", help="folder of audio, or s3://")
    pack.add_argument("target", help="folder or s3:// prefix for the shard sets")
    index = verbs.add_parser("index", help="existing tar shards -> an index beside them, or a new version of it")
    index.add_argument("shards", help="folder of tars, or s3:// prefix")
    index.add_argument("--append", action="store_true", help="add tars that are not in the index yet")
    index.add_argument(
        "--exclude",
        action="append",
        metavar="KEYS|@FILE",
        help="utterances that runs should not use: KEY or SHARD:KEY, with commas between, or a file with one a line",
    )
    audit = verbs.add_parser("audit", help="shard set -> what is in it, and what is wrong with it")
    audit.add_argument("shards", help="folder of an indexed set, or s3:// prefix")
    audit.add_argument("--plot", metavar="PATH.png", help="also draw durations, hours and sizes")


def _of_runs(verbs: Verbs) -> None:
    for verb, text in (
        ("pretrain", "shards -> CPC encoder, on Ray Train"),
        ("finetune", "encoder and labelled corpus -> emotion recogniser, cross-validated"),
        ("sweep", "search space -> best hyper-parameters of a fine-tuning, on Ray Tune"),
        ("evaluate", "recognisers on degraded audio, with fewer labels, or on other corpora"),
    ):
        verbs.add_parser(verb, help=text).add_argument(
            "config",
            help=f"YAML file, such as configs/{verb}/{'robustness' if verb == 'evaluate' else 'quickstart'}.yaml",
        )
    verbs.choices["sweep"].add_argument(
        "--resume", action="store_true", help="refuse to start a new sweep (an unfinished one is continued in any case)"
    )
    dry_run = "only list the runs that are done and that are left"
    verbs.choices["evaluate"].add_argument("--dry-run", action="store_true", help=dry_run)
    verbs.choices["pretrain"].add_argument(
        "--take-over", action="store_true", help="continue a run that another driver holds, and stop that driver"
    )
    _size(verbs)
    checkpoint = verbs.add_parser("checkpoint", help="pretraining -> its checkpoints: what is in them, what they know")
    checkpoint.add_argument(
        "what",
        choices=("ls", "show", "verify", "acoustics"),
        help="ls: list them; show: what is in one, or in the newest; verify: read every byte; acoustics: what they "
        "keep of speech, without labels (takes overrides)",
    )
    checkpoint.add_argument("path", help="run_dir of a pretraining, or one of its checkpoints/step-* folders")
    _recognisers(verbs)
    _features(verbs)
    reproduce = verbs.add_parser("reproduce", help="labelled corpus -> the table of all systems over several seeds")
    reproduce.add_argument(
        "config",
        nargs="?",
        help="YAML file, such as configs/reproduce/emodb.yaml; without one, the defaults (the paper's recogniser)",
    )
    reproduce.add_argument("--dry-run", action="store_true", help=dry_run)


def _recognisers(verbs: Verbs) -> None:
    recogniser = verbs.add_parser("recogniser", help="labelled corpus -> saved recogniser; what one is, if it is whole")
    recogniser.add_argument(
        "what",
        choices=("fit", "show", "verify"),
        help="fit: `finetune` with out=FOLDER for the recogniser; show: what it is; verify: read every byte",
    )
    address = "folder of a recogniser, such as RUN_DIR/recogniser; local, s3:// or models:/NAME@ALIAS; or emotion-small"
    recogniser.add_argument("path", help=f"fit: YAML file of `finetune`; else the {address}")
    register = verbs.add_parser("register", help="recogniser or encoder -> a version of a registered model of MLflow")
    register.add_argument(
        "model", help="folder of a recogniser, such as RUN_DIR/recogniser, or of a pretraining; local or s3://"
    )
    register.add_argument("--name", required=True, help="name of the registered model")
    register.add_argument("--alias", default="", help="also let this alias, such as champion, name it")
    register.add_argument("--force", action="store_true", help="even if the alias names a better or another one now")
    register.add_argument(
        "--share-training-rows", action="store_true", help="even if it holds rows of training data (support vectors)"
    )
    register.add_argument(
        "--accept-licence", action="store_true", help="even if what it was made from is for research or no commerce"
    )
    predict = verbs.add_parser("predict", help="saved recogniser and audio -> activation, valence and dominance")
    predict.add_argument("model", help=address)
    predict.add_argument(
        "audio", nargs="+", help="files, folders, shard sets, patterns in quotes, @LIST (a file a line), s3://"
    )
    predict.add_argument(
        "--out", metavar="FILE", default="", help="write there, not to stdout: .csv, .jsonl or .parquet; local or s3://"
    )
    predict.add_argument("--segments", metavar="10s", default="", help="a row for each segment of so long: 10s, 500ms")
    predict.add_argument("--strict", action="store_true", help="no values for audio with flags, such as clipped")
    predict.add_argument("--plot", metavar="PATH", default="", help="draw it: a PNG of one file, or a folder for many")
    predict.add_argument("--force", action="store_true", help="replace an output or plots that exist")
    predict.add_argument("--workers", type=int, default=0, metavar="N", help="work on N parts at a time")
    predict.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: networks run on GPUs, of this machine or of the cluster",
    )
    predict.add_argument("--ray", action="store_true", help="run on Ray, here if RAY_ADDRESS is unset")
    predict.set_defaults(overrides=[])
    predict.add_argument(
        "--json", action="store_true", help="one JSON object a line, not CSV; with --out, one on what was written"
    )


def _features(verbs: Verbs) -> None:
    features = verbs.add_parser("features", help="encoder and audio -> its frames, as arrays or one table")
    features.add_argument(
        "model",
        help="run_dir of a pretraining, a checkpoint, a recogniser, hf:NAME, models:/NAME@ALIAS or emotion-small",
    )
    features.add_argument("audio", nargs="+", help="files, folders, patterns in quotes, @LIST (a file a line), s3://")
    features.add_argument(
        "--out", required=True, metavar="FOLDER|FILE.parquet", help="an .npy for each file in a folder, or one table"
    )
    features.add_argument(
        "--layer",
        default="c",
        help="c: contexts, z: latents, both, or mix: all hidden states, of hf: only (default: c)",
    )
    features.add_argument("--force", action="store_true", help="replace what is there")
    features.set_defaults(overrides=[])


def _size(verbs: Verbs) -> None:
    size = verbs.add_parser("size", help="pretraining config -> its speed, bottleneck and memory on a cluster")
    size.add_argument("config", help="YAML file, such as configs/pretrain/paper.yaml")
    for name, kind, default, metavar, text in (
        ("nodes", int, 1, "N", "number of machines, all alike"),
        ("gpus-per-node", int, 0, "N", "GPUs of a node, one worker on each; 0: the config's workers, on CPUs"),
        ("cores-per-node", int, 0, "N", "CPU cores of a node; 0: as many as this machine has"),
        ("store-mb-s", float, 0.0, "MB/S", "rate at which a node reads from the object store; 0: unlimited"),
        ("network-gbit-s", float, 25.0, "GBIT/S", "rate of a node's network card"),
        ("update-rate", float, 0.0, "RATE", "seconds of audio that a worker trains on in a second (see `bench train`)"),
        ("decode-rate", float, 0.0, "RATE", "seconds of audio that a core decodes in a second"),
    ):
        measured = "; 0: measured here" if metavar == "RATE" else ""
        size.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text}{measured} (default: %(default)s)"
        )


def _of_figures(verbs: Verbs) -> None:
    corpus = verbs.add_parser("corpus", help="labelled corpus -> what it holds: labels, speakers, splits, durations")
    corpus.add_argument("what", choices=("describe",), help="print what the corpus holds")
    corpus.add_argument("path", help="folder as its owners publish it, or a CSV file; local or s3://")
    compare = verbs.add_parser("compare", help="tracked runs -> table and one HTML page")
    compare.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="how to print the runs (default: table)"
    )
    compare.add_argument("--html", metavar="PATH", help="also write one self-contained page with plots")
    bench = verbs.add_parser("bench", help="measure speed: of the feed, of updates, or of a run of any size")
    bench.add_argument(
        "what",
        choices=("feed", "train", "plan", "scale"),
        help="feed: reading and decoding; train: updates; plan: the order of windows; scale: a run without audio",
    )
    bench.add_argument("config", nargs="?", help="YAML file, such as configs/bench/feed.yaml (not for plan)")
    bench.add_argument("--profile", default="", metavar="FILE", help="train: write a trace of an update, for a browser")
    bench.add_argument("--peers", action="store_true", help="feed: also measure the other loaders that are installed")
    bench.add_argument("--shards", type=int, default=1_000_000, metavar="N", help="plan: shards of the made set")
    bench.add_argument("--lanes", type=int, default=1024, metavar="N", help="plan: lanes of the run")
    bench.add_argument(
        "--rows", type=int, default=24_000_000, metavar="N", help="plan: utterances whose windows are counted"
    )
    doctor = verbs.add_parser("doctor", help="this machine, cluster, store and tracker -> what works, and the way out")
    doctor.add_argument("config", nargs="?", help="YAML file of another verb, whose places are tried")
