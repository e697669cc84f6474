"""`cpcscale checkpoint` as its user meets it: what there is, what is in one, and whether all is whole."""

import json
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import DAMAGES, FILES, damage, position, publish

from cpcscale import cli, storage
from cpcscale.runs import lease
from cpcscale.runs.checkpoint_files import MARKER
from cpcscale.runs.ledger import Ledger


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three checkpoints, the second the best by held-out loss, the third the newest."""
    for step, loss in ((4, 3.0), (8, 2.0), (12, 2.5)):
        publish(tmp_path / "run", position(step, audio_s=step * 900.0, metrics={"heldout_loss": loss, "loss": loss}))
    return tmp_path / "run"


def place(run: Path, number: int) -> Path:
    return run / "checkpoints" / Ledger(str(run)).head().checkpoints[number].folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert cli.main(["checkpoint", *map(str, arguments)]) == status
    return capsys.readouterr().out


def values(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict:
    [line] = said(capsys, *arguments, "--json", status=status).splitlines()
    return json.loads(line)


def test_ls_lists_step_hours_loss_size_and_age_and_marks_the_newest_and_the_best(run, capsys):
    head, *rows = said(capsys, "ls", run).splitlines()
    assert head.split() == ["checkpoint", "step", "audio", "h", "held-out", "MB", "age"]
    assert [row.split()[1:4] for row in rows] == [
        ["4", "1.00", "3.000"],
        ["8", "2.00", "2.000"],
        ["12", "3.00", "2.500"],
    ]
    assert [row.split("s  ")[-1].strip() for row in rows][1:] == ["best", "newest"]
    listed = values(capsys, "ls", run)["checkpoints"]
    sizes = [
        sum(file.stat().st_size for file in place(run, number).iterdir() if file.name != MARKER) for number in range(3)
    ]
    assert [row["bytes"] for row in listed] == sizes
    assert all(row["why"] is None and row["published"] and row["age_s"] >= 0 for row in listed)


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("name", FILES)
def test_ls_says_why_one_is_torn_and_which_a_run_would_go_on_from(run, capsys, name, how):
    damage(place(run, 2) / name, how)
    *_, row = said(capsys, "ls", run).splitlines()
    assert f"torn: {'it has no ' if (name, how) == (MARKER, 'missing') else ''}{name}" in row
    assert [row["newest"] for row in values(capsys, "ls", run)["checkpoints"]] == [False, True, False]


def test_ls_tells_a_save_that_was_cut_off_from_a_torn_checkpoint(run, capsys):
    (run / "checkpoints" / "step-00000016-0005").mkdir()
    (run / "checkpoints" / "step-00000016-0005" / "model.safetensors").write_bytes(b"half")
    *_, row = said(capsys, "ls", run).splitlines()
    assert row.endswith("not published: a save that was cut off, or is under way")
    assert said(capsys, "verify", run).splitlines() == [f"verified 3 checkpoint(s) at {run}, every byte: all whole"]


def test_ls_says_who_holds_the_run(run, capsys):
    assert values(capsys, "ls", run)["holder"] is None
    with lease.hold(str(run), lease.LeaseConfig(), take_over=False, say=print) as held:
        assert values(capsys, "ls", run)["holder"]["id"] == held.id


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_verify_finds_every_damage_names_it_and_exits_with_1(run, capsys, name, how):
    assert values(capsys, "verify", run)["ok"]
    damage(place(run, 1) / name, how)
    first, *rest = said(capsys, "verify", run, status=1).splitlines()
    assert first == f"verified 3 checkpoint(s) at {run}, every byte: 1 torn"
    [line] = rest
    assert line.startswith(f"  {place(run, 1).name}: ") and name in line
    assert not values(capsys, "verify", place(run, 1), status=1)["ok"]
    assert values(capsys, "verify", place(run, 0))["ok"]


def test_show_lists_identity_fingerprint_position_and_tensors(run, capsys):
    shown = values(capsys, "show", run)
    assert shown["checkpoint"] == str(place(run, 2))
    assert shown["position"]["identity"] == checkpoints.RECIPE.identity()
    there = checkpoints.newest(run)
    for part, tensors in there.tensors.items():
        listed = shown["tensors"][part]
        assert {name: tensor["shape"] for name, tensor in listed.items()} == {
            name: list(tensor.shape) for name, tensor in tensors.items()
        }
    assert {tensor["dtype"] for tensor in shown["tensors"]["model"].values()} == {"F32"}
    assert all(tensor.dtype == torch.float32 for tensor in there.tensors["model"].values())
    lines = said(capsys, "show", place(run, 0)).splitlines()
    assert lines[0] == f"{place(run, 0)}: step 4, 1.00 h of audio"
    assert f"  fingerprint  {'f' * 64}" in lines
    assert "    train.batch=16" in lines
    assert "    encoder.layers.0.weight  F32 [16, 1, 10]" in lines


def test_show_gives_the_newest_whole_one_and_refuses_a_torn_one(run, capsys):
    damage(place(run, 2) / "model.safetensors", "truncated")
    assert values(capsys, "show", run)["position"]["step"] == 8
    assert cli.main(["checkpoint", "show", str(place(run, 2))]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "model.safetensors has" in error


def test_a_checkpoint_that_was_copied_out_of_its_run_is_looked_at_by_itself(run, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(place(run, 0), tmp_path / "elsewhere" / place(run, 0).name))
    assert values(capsys, "show", copy)["position"]["step"] == 4
    monkeypatch.chdir(copy)
    [row] = values(capsys, "ls", ".")["checkpoints"]
    assert (row["folder"], row["step"], row["why"], row["newest"]) == (copy.name, 4, None, False)
    damage(copy / "model.safetensors", "truncated")
    assert "model.safetensors has" in values(capsys, "ls", ".")["checkpoints"][0]["why"]


def test_a_run_in_an_object_store_is_looked_at_alike(s3, capsys):
    base = f"{s3.base}/looked-at"
    last = [publish(base, position(step)) for step in (4, 8)][-1]
    assert [row["step"] for row in values(capsys, "ls", base)["checkpoints"]] == [4, 8]
    assert values(capsys, "show", base)["checkpoint"] == last
    assert values(capsys, "verify", base)["ok"]
    storage.remove(f"{last}/state.json")
    assert values(capsys, "verify", last, status=1)["checkpoints"] == {
        last.rpartition("/")[2]: ["state.json is missing"]
    }


@pytest.mark.parametrize("what", ["ls", "show", "verify"])
def test_a_path_without_checkpoints_and_a_setting_are_refused_in_one_line(tmp_path, capsys, what):
    refusals = {
        ("nowhere",): "there is nothing at",
        (str(tmp_path),): "no checkpoint at",
        (__file__,): "no checkpoint at",
        (str(tmp_path), "train.steps=5"): "takes a path and no settings such as train.steps=5",
    }
    for arguments, words in refusals.items():
        assert cli.main(["checkpoint", what, *arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert len(error.splitlines()) == 1 and words in error


def test_looking_brings_no_torch(run, run_python):
    text = "import sys; from cpcscale import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    for what in ("ls", "show", "verify"):
        status, lines = run_python(f"import sys; sys.argv[1:] = ['checkpoint', {what!r}, {str(run)!r}]; {text}")
        assert (status, lines[-1]) == (0, "False")


@pytest.mark.parametrize("what", ["the run", "a checkpoint", "a checkpoint, moved out", "a link"])
def test_what_was_renamed_is_found_as_long_as_it_loads(run, tmp_path, capsys, what):
    newest = place(run, 2)
    places = {"the run": tmp_path / "other", "a checkpoint, moved out": tmp_path / "mine"}
    where = places.get(what, newest.parent / "best")
    if what == "a link":
        where.symlink_to(newest.name)
    else:
        (run if what == "the run" else newest).rename(where)
    verified = values(capsys, "verify", where)
    assert verified["ok"]
    assert len(verified["checkpoints"]) == (3 if what == "the run" else 1)
    assert [row["step"] for row in values(capsys, "ls", where)["checkpoints"]][-1] == 12
    name = next(iter(values(capsys, "show", where)["tensors"]))
    torn = (place(where, 2) if what == "the run" else where) / f"{name}.safetensors"
    torn.write_bytes(b"torn")
    assert not values(capsys, "verify", where, status=1)["ok"]
