"""Every command in infra/: cpcscale's by its own command line and configs, other programs' flags by the programs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from documents import IN_IMAGE, INFRA, ROOT, cpcscale_commands, documents, leaves

from cpcscale import config
from cpcscale.arguments import command_line
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.shards.pack import PackConfig

_CONFIGS: dict[str, Any] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sweep": SweepConfig}
YAMLS = [*sorted(INFRA.glob("**/*.yaml"))]
TEXTS = [INFRA / "README.md", *INFRA.glob("**/*.sh"), *INFRA.glob("**/*.sbatch")]


def _texts(path: Path) -> list[str]:
    """Texts of a file in which commands stand; the words of a container's command become one."""
    if path.suffix == ".md":
        return ["\n".join(line for line in path.read_text().splitlines() if line.startswith("    "))]
    if path.suffix != ".yaml":
        return [path.read_text()]
    found = []
    for document in documents(path):
        found += list(leaves(document))
        found += [shlex.join(words) for words in _word_lists(document)]
    return found


def _word_lists(tree: Any) -> list[list[str]]:
    if isinstance(tree, dict):
        return [words for value in tree.values() for words in _word_lists(value)]
    if isinstance(tree, list):
        whole = [tree] if tree and all(isinstance(each, str) and " " not in each for each in tree) else []
        return whole + [words for value in tree for words in _word_lists(value)]
    return []


def _commands() -> list[Any]:
    return [
        pytest.param(words, id=f"{path.relative_to(INFRA)}-{words[0]}-{number}")
        for path in [*YAMLS, *TEXTS]
        for number, words in enumerate(words for text in _texts(path) for words in cpcscale_commands(text))
    ]


def _load(words: list[str]) -> Any:
    """The config that the command runs with, as the command line reads it."""
    options = command_line().parse_args(words)
    if options.verb == "pack":
        return config.load(PackConfig, None, options.overrides)
    path = options.config.replace(IN_IMAGE, "")
    return config.load(_CONFIGS[options.verb], str(ROOT / path), options.overrides)


def test_the_commands_are_found() -> None:
    found = [each.values[0][0] for each in _commands()]
    assert sorted(found) == ["finetune", "pack", *["pretrain"] * 5, "sweep"]


@pytest.mark.parametrize("words", _commands())
def test_every_command_is_one_that_cpcscale_takes(words: list[str]) -> None:
    loaded = _load(words)
    # What is on one node alone is lost with it.
    if words[0] != "pack":
        assert re.match(r"s3://|/scratch/", loaded.run_dir)
    with pytest.raises(UserError, match="unknown key no_such_key"):
        _load([*words, "no_such_key=1"])


def test_a_pretraining_on_gpus_says_so_and_its_feeders_find_their_nodes() -> None:
    (job,) = documents(INFRA / "kuberay" / "pretrain.yaml")
    (words,) = cpcscale_commands(job["spec"]["entrypoint"])
    spec = _load(words)
    # A cluster whose GPU nodes have not come up yet would train on its cores.
    assert spec.device == "cuda" and spec.elastic
    gpu, feeders = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert (spec.least_workers, spec.most_workers) == (gpu["minReplicas"] * gpus, gpu["maxReplicas"] * gpus)
    units = int(feeders["resources"][spec.feed.actor_resource])
    cores = int(feeders["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert units * spec.feed.actor_cpus <= cores
    assert feeders["maxReplicas"] * units >= spec.most_workers * spec.feed.actors
    assert feeders["minReplicas"] * units >= spec.least_workers * spec.feed.actors, "refused at the start"
    # The cache fits the volume, which is counted in GiB.
    (volume,) = [each["ephemeral"] for each in gpu["template"]["spec"]["volumes"] if "ephemeral" in each]
    size = volume["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]
    assert spec.feed.cache.max_gb * 1e9 < int(size.removesuffix("Gi")) * 2**30
    assert spec.feed.cache.folder == "/cache"


@pytest.mark.parametrize("path", [*YAMLS, *TEXTS], ids=lambda path: path.name)
def test_every_flag_of_ray_and_mlflow_is_one_that_they_have(path: Path) -> None:
    for text in _texts(path):
        for line in text.replace("\\\n", " ").splitlines():
            for program, command in re.findall(
                r"\b(ray|mlflow) ((?:start|drain-node|health-check|job|server) .*)", line
            ):
                # Up to the end of the command; what is submitted as a job is its own.
                words = shlex.split(re.split(r" && | > | -- |;", command)[0].partition("#")[0], posix=True)
                _parse(program, words)


def test_every_flag_of_the_store_is_one_that_it_has() -> None:
    (compose,) = documents(INFRA / "compose" / "compose.yaml")
    words = compose["services"]["store"]["command"].split()
    verb = words.index("mini")
    weed = [str(Path(sys.executable).parent / "weed"), "mini", "-h"]
    said = subprocess.run(weed, capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  -(\S+)", said.stdout + said.stderr, re.M))
    assert len(known) > 50
    assert {word[1:].partition("=")[0] for word in words[verb + 1 :]} <= known


def _parse(program: str, words: list[str]) -> None:
    if program == "mlflow":
        from mlflow.cli import cli
    elif words[0] == "job":
        from ray.dashboard.modules.job.cli import job_cli_group as cli

        words = words[1:]
    else:
        from ray.scripts.scripts import cli
    command = cli.commands[words[0]]
    # Variables stand for values of any kind: names of flags are what is looked at.
    context = click.Context(command, resilient_parsing=True)
    command.make_parser(context).parse_args(words[1:])
