"""One line of history: whatever processes do in whatever order, the checkpoints of a run go on from one another."""

import itertools
import json
import logging
from pathlib import Path

import checkpoints
import pytest
import turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpcscale import storage
from cpcscale.train import checkpoint
from cpcscale.runs import checkpoint_files
from cpcscale.runs.ledger import RunHolder, Ledger, OvertakenError, CheckpointEntry, RunState
from cpcscale.runs.publisher import Publisher


def holder(name: str) -> RunHolder:
    return RunHolder(name, "node7", 12, "", "", 0.0, 30.0)


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder, once on disk and once in the store."""
    if request.param == "local":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("s3").base, tmp_path.name)


def drive(run: str, name: str, lives: int) -> None:
    """A driver and its worker: takes the run from whoever has it, goes on from the newest, and adds three.

    Each checkpoint carries the line it stands in. One that was overtaken tries again, `lives` times in all.
    """
    ledger = Ledger(run)
    for life in range(lives):
        me = holder(f"{name}{life}")
        taken = ledger.head().taken(me)
        if not (ledger.advance(taken) and ledger.is_head(taken)):
            continue
        seen = ledger.head()
        restored = checkpoint.load_newest(ledger, seen)
        line = restored.position.records if restored else []
        try:
            publisher = Publisher(ledger, seen, len(line), keep=1, holder=me.id)
            for _ in range(3):
                line = [*line, [len(line) + 1, me.id]]
                where = checkpoints.position(len(line), records=line)
                publisher.publish(where.step, None, checkpoint.checkpoint_files_of({}, where, checkpoints.RECIPE))
        except OvertakenError:
            continue


class Reader:
    """Looks at a run again and again, and fails when what it saw is taken back."""

    def __init__(self, run: str) -> None:
        self.ledger, self.line = Ledger(run), []

    def look(self) -> None:
        state = self.ledger.head()
        restored = checkpoint.load_newest(self.ledger, state)
        line = restored.position.records if restored else []
        assert len(line) == (state.checkpoints[-1].step if state.checkpoints else 0), "the newest is always whole"
        assert line[: len(self.line)] == self.line, "what was published stays in the line"
        self.line = line


@given(
    schedule=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=5, max_size=25),
    drivers=st.integers(2, 3),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_every_order_of_what_several_drivers_do_a_reader_sees_one_line_of_history(
    tmp_path_factory, schedule, drivers
):
    run = str(tmp_path_factory.mktemp("run"))
    reader = Reader(run)
    works = [lambda name=name: drive(run, name, lives=2) for name in "abc"[:drivers]]
    players = turns.play(works, schedule, reader.look)
    assert [player.error for player in players] == [None] * drivers
    # Whatever was left in the middle, the next one goes on from what readers have seen, and cleans up.
    drive(run, "last", lives=1)
    reader.look()
    assert [name for _, name in reader.line[-3:]] == ["last0"] * 3
    folders = {path.name for path in Path(run, "checkpoints").iterdir()}
    assert folders == {each.folder for each in reader.ledger.head().checkpoints}


def test_a_process_that_was_overtaken_publishes_nothing_and_names_who_has_the_run(base):
    ledger = Ledger(base)
    checkpoints.publish(base, checkpoints.position(4))
    stale = Publisher(ledger, ledger.head(), 4, keep=9)
    assert ledger.advance(ledger.head().taken(holder("new")))
    before = storage.list_files(base)
    with pytest.raises(OvertakenError, match=r"was taken over by pid 12 on node7 .*: this one stops") as refusal:
        stale.publish(8, None, {"state.json": b"{}"})
    assert "\n" not in str(refusal.value)
    assert storage.list_files(base) == before
    assert checkpoints.steps(base) == [4]


def test_whenever_a_process_is_overtaken_its_checkpoint_is_published_whole_or_leaves_nothing(tmp_path):
    """Stopped before each of its operations, as by SIGSTOP, while another driver takes the run."""
    outcomes = set()
    for stop in itertools.count():
        run = tmp_path / str(stop)
        checkpoints.published(run, 4)
        ledger = Ledger(str(run))
        stale = Publisher(ledger, ledger.head(), 4, keep=1)
        player = turns.Player(lambda stale=stale: stale.publish(8, None, {"state.json": b'{"position": {}}'}))
        with turns.at_the_storage():
            player.start()
            for _ in range(stop):
                player.step()
            if player.done:
                break
            ahead = ledger.head()
            assert ledger.advance(ahead.taken(holder("new")))
            while not player.done:
                player.step()
        outcomes.add(published := ahead.checkpoints[-1].step == 8)
        assert isinstance(player.error, OvertakenError) or published
        assert ledger.head().checkpoints == ahead.checkpoints
        named = {each.folder for each in ahead.checkpoints}
        for folder in {path.name for path in (run / "checkpoints").iterdir()} | named:
            assert not list(checkpoint_files.find_problems(str(run / "checkpoints" / folder), every_byte=True))
            # What the new one does not need is his to remove.
            assert folder in named or folder.startswith("step-00000004")
    assert outcomes == {True, False}


def test_of_two_processes_that_go_on_from_one_state_the_second_is_refused(base):
    ledger = Ledger(base)
    seen = ledger.head()
    Publisher(ledger, seen, 0, keep=9)
    with pytest.raises(OvertakenError):
        Publisher(ledger, seen, 0, keep=9)


def test_a_process_of_another_driver_than_the_holder_is_refused(base):
    ledger = Ledger(base)
    assert ledger.advance(ledger.head().taken(holder("new")))
    with pytest.raises(OvertakenError, match="node7"):
        Publisher(ledger, ledger.head(), 0, keep=9, holder="old")
    Publisher(ledger, ledger.head(), 0, keep=9, holder="new")
    assert ledger.head().is_of("new")


def test_workers_that_are_started_again_by_one_driver_go_on_and_those_before_them_stop(base):
    ledger = Ledger(base)
    assert ledger.advance(ledger.head().taken(holder("driver")))
    first = Publisher(ledger, ledger.head(), 0, keep=9, holder="driver")
    files = {"state.json": b'{"position": {}}'}
    first.publish(4, None, files)
    second = Publisher(ledger, ledger.head(), 4, keep=9, holder="driver")
    with pytest.raises(OvertakenError):
        first.publish(8, None, files)
    second.publish(8, None, files)
    assert checkpoints.steps(base) == [4, 8]


def test_an_entry_in_a_gap_that_others_have_left_is_not_the_head(base):
    ledger = Ledger(base)
    late = ledger.head().taken(holder("late"))
    for step in range(1, 12):
        checkpoints.publish(base, checkpoints.position(step), keep=2)
    assert ledger.advance(late), "the first entries are gone, or this shows nothing"
    assert not ledger.is_head(late)
    assert checkpoints.steps(base) == [10, 11]
    assert not ledger.head().held


def test_a_process_that_publishes_into_such_a_gap_removes_nothing(tmp_path):
    checkpoints.published(tmp_path, 1, 2)
    ledger = Ledger(str(tmp_path))
    stale = Publisher(ledger, ledger.head(), 2, keep=1)
    player = turns.Player(lambda: stale.publish(3, None, {"state.json": b'{"position": {}}'}))
    with turns.at_the_storage():
        player.start()
        player.step()
        player.step()
        for _ in range(12):
            assert ledger.advance(state := ledger.head().taken(holder("new")))
            assert ledger.is_head(state)
        while not player.done:
            player.step()
    assert isinstance(player.error, OvertakenError)
    assert [list(checkpoint_files.find_problems(ledger.url(each), every_byte=True)) for each in ledger.head().checkpoints] == [[], []]


def test_the_newest_k_and_the_first_best_by_heldout_loss_stay():
    state = RunState()
    for step, loss in {1: 5.0, 2: 3.0, 3: float("nan"), 4: None, 5: 3.0, 6: 4.5}.items():
        state = state.published(CheckpointEntry(f"step-{step}", step, loss), keep=2)
    assert [each.step for each in state.checkpoints] == [2, 5, 6]
    state = state.published(CheckpointEntry("step-7", 7, 2.0), keep=2)
    assert [each.step for each in state.checkpoints] == [6, 7]
    assert [each.step for each in state.started_from(6, "").checkpoints] == [6]


@given(
    losses=st.lists(st.none() | st.floats(0, 9) | st.just(float("inf")), min_size=1, max_size=30),
    keep=st.integers(1, 4),
)
def test_retention_keeps_the_newest_and_never_loses_the_best(losses, keep):
    state = RunState()
    for step, loss in enumerate(losses, start=1):
        state = state.published(CheckpointEntry(f"step-{step}", step, loss), keep)
    kept = {each.step for each in state.checkpoints}
    assert kept >= set(range(max(1, len(losses) - keep + 1), len(losses) + 1))
    finite = [loss for loss in losses if loss is not None and loss < float("inf")]
    best = losses.index(min(finite)) + 1 if finite else len(losses)
    assert kept == {*range(max(1, len(losses) - keep + 1), len(losses) + 1), best}


@pytest.mark.parametrize("how", ["empty", "truncated", "one bit flipped"])
def test_a_damaged_head_costs_a_line_and_no_checkpoint(tmp_path, caplog, how):
    checkpoints.published(tmp_path, 4, 8)
    number = Ledger(str(tmp_path)).highest()
    checkpoints.damage(tmp_path / "ledger" / f"{number:08d}.json", how)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(tmp_path).position.step == 8
    assert [f"{number:08d}.json is damaged" in record.getMessage() for record in caplog.records] == [True]
    checkpoints.publish(tmp_path, checkpoints.position(12))
    assert checkpoints.steps(tmp_path) == [4, 8, 12]


def test_every_flipped_bit_of_an_entry_is_seen(tmp_path):
    checkpoints.published(tmp_path, 4)
    ledger = Ledger(str(tmp_path))
    path = tmp_path / "ledger" / f"{ledger.highest():08d}.json"
    data, whole = path.read_bytes(), ledger.head()
    for place, bit in itertools.product(range(0, len(data), 7), range(0, 8, 3)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        assert ledger.head() == RunState(whole.number, checkpoints=whole.checkpoints)


def test_without_its_ledger_a_run_goes_on_from_its_folders_and_gives_no_name_twice(tmp_path):
    places = checkpoints.published(tmp_path, 4, 8)
    for path in (tmp_path / "ledger").iterdir():
        path.unlink()
    ledger = Ledger(str(tmp_path))
    assert checkpoints.steps(tmp_path) == [4, 8]
    again = checkpoints.publish(tmp_path, checkpoints.position(12))
    assert checkpoint_files.parse_folder_name(Path(again).name)[1] > max(checkpoint_files.parse_folder_name(path.name)[1] for path in places)
    assert [each.step for each in ledger.head().checkpoints] == [4, 8, 12]


def test_entries_do_not_pile_up(tmp_path):
    for step in range(1, 13):
        checkpoints.publish(tmp_path, checkpoints.position(step), keep=1)
    assert len(list((tmp_path / "ledger").iterdir())) <= 9
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_what_a_killed_process_left_half_written_goes_with_the_next_checkpoint(tmp_path):
    checkpoints.published(tmp_path, 4)
    for name in ("step-00000008-0001/model.safetensors", "step-00000008-0001/.state.json.0123abcd.tmp"):
        (tmp_path / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    (tmp_path / "checkpoints" / "step-00000009-0001").mkdir()
    (tmp_path / "checkpoints" / "step-00000009-0001" / ".model.safetensors.0123abcd.tmp").write_bytes(b"half")
    checkpoints.published(tmp_path, 12)
    assert sorted(each.step for each in Ledger(str(tmp_path)).head().checkpoints) == [4, 12]
    assert {path.name.split("-")[1] for path in (tmp_path / "checkpoints").iterdir()} == {"00000004", "00000012"}


def test_cleaning_up_leaves_alone_what_a_later_process_is_writing(tmp_path):
    checkpoints.published(tmp_path, 4, 8)
    ledger = Ledger(str(tmp_path))
    before = ledger.head()
    later = before.started_from(8, "")
    assert ledger.advance(later)
    half = tmp_path / "checkpoints" / checkpoint_files.folder_name(12, later.writer) / "state.json"
    storage.write(str(half), b"half")
    ledger.remove_unlisted(before)
    assert half.exists()


def test_an_entry_is_plain_json(tmp_path):
    checkpoints.published(tmp_path, 4)
    text = (tmp_path / "ledger" / f"{Ledger(str(tmp_path)).highest():08d}.json").read_text().splitlines()[0]
    assert json.loads(text)["state"]["checkpoints"][0]["step"] == 4
