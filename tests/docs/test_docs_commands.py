"""Every command of README and docs/ is one: the real command line parses it, the real loader takes its config."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from docs_pages import PAGES, README, ROOT, TUTORIAL, Line, commands, lines, reference, to_run

from cpcscale import config, doctor
from cpcscale.arguments import command_line
from cpcscale.errors import UserError
from cpcscale.keys import config_classes

# A config that a run of the reader's own writes.
_MADE_BY_RUNS = re.compile(r"runs/.*\.yaml")


def check(words: list[str]) -> None:
    """Raises for a command that its program would refuse before it does anything."""
    match words:
        case ["cpcscale", *arguments]:
            _check_verb(arguments)
        case ["python", job, *arguments]:
            assert (ROOT / job).is_file(), f"no file {job}"
            _check_verb([job.removeprefix("jobs/").removesuffix(".py"), *arguments])
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert set(targets) <= set(known), f"the Makefile has {known}, not all of {targets}"
        case ["ray", *arguments]:
            _check_ray(arguments)
        case _:
            raise AssertionError(f"{words} is no command that this test knows")


def _check_verb(arguments: list[str]) -> None:
    options, rest = command_line().parse_known_args(arguments)
    # As cpcscale/cli.py: argparse takes no more overrides after a flag that stands among them.
    assert all("=" in text and not text.startswith("-") for text in rest), f"unrecognized arguments: {rest}"
    path, overrides = getattr(options, "config", None), [*options.overrides, *rest]
    if path and "=" in path:
        path, overrides = None, [path, *overrides]
    if options.verb == "corpus":
        overrides = [text.removeprefix("corpus.") for text in overrides]
    if options.verb == "recogniser":
        overrides = [text for text in overrides if not text.startswith("out=")]
    if options.verb == "doctor":
        doctor.load(path, overrides)
        return
    roots = list(config_classes(options.verb))
    if options.verb == "bench":
        feed, train, scale = roots
        roots = {"feed": [feed], "train": [train], "scale": [scale], "plan": []}[options.what]
    assert roots or not overrides, f"{options.verb} takes no {overrides}"
    for root in roots:
        config.load(root, None if path and _MADE_BY_RUNS.fullmatch(path) else path, overrides)


def _check_ray(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    command: click.Command = cli
    if "--" in arguments:
        border = arguments.index("--")
        check(arguments[border + 1 :])
    while isinstance(command, click.Group):
        name, *arguments = arguments
        assert name in command.commands, f"ray has no {name}"
        command = command.commands[name]
    command.make_context(str(command.name), list(arguments))


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("line", commands(), ids=str)
def test_every_command_in_readme_and_docs_is_taken_by_its_program(line: Line) -> None:
    check(line.words)


@pytest.mark.parametrize(
    "text",
    [
        "cpcscale pretrain configs/pretrain/paper.yaml train.stepz=60",
        "cpcscale pretrain configs/pretrain/gone.yaml",
        "cpcscale pretrain configs/pretrain/paper.yaml workers=[8,2]",
        "cpcscale pretend configs/pretrain/paper.yaml",
        "cpcscale size configs/pretrain/paper.yaml --nodez 8",
        "cpcscale checkpoint ls runs/mine train.steps=1",
        "python jobs/gone.py configs/pretrain/paper.yaml",
        "make gone",
        "ray start --heads",
        "ray job submit --working-dir . -- python jobs/pretrain.py configs/pretrain/paper.yaml data.shardz=x",
    ],
)
def test_a_command_with_a_mistake_is_found(text: str) -> None:
    (line,) = lines(README, f"    {text}")
    with pytest.raises((UserError, SystemExit, AssertionError, click.UsageError)):
        check(line.words)


def test_each_verb_has_its_config_in_the_reference() -> None:
    assert {verb for verb in reference().verbs() if not config_classes(verb)} == {
        *("register", "predict", "features"),
    }


def test_the_readme_has_each_verb_in_its_table_with_a_page() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    without = [verb for verb in reference().verbs() if not any(f"`{verb}`" in row and "](docs/" in row for row in rows)]
    assert without == []


def test_the_pages_have_commands_and_the_tutorials_are_run() -> None:
    assert {README, TUTORIAL} <= {line.page for line in commands()}
    assert [line for line in commands() if line.page == TUTORIAL] == [
        line for line in to_run() if line.page == TUTORIAL
    ]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_shell_block_of_docs_holds_nothing_but_commands_that_are_checked(page: Path) -> None:
    shell = [line for line in lines(page) if line.language == "sh" and not line.text.startswith("export ")]
    assert [str(line) for line in shell if not line.is_command] == []


def test_commands_of_docs_that_need_a_cluster_say_so() -> None:
    unmarked = [str(line) for line in commands() if line.page != README and line.words[0] == "ray"]
    marked = [str(line) for line in commands() if line.mark == "Needs a cluster"]
    assert set(unmarked) <= set(marked)
