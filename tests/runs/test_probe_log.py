"""What is probed stays until its figure is there, and the best of all figures is kept, whoever is the faster."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpcscale.errors import UserError
from cpcscale.experiments.published import tracked_encoder
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.runs.publisher import Publisher
from cpcscale.tracking.model_folder import write_model_folder
from cpcscale.train.checkpoint import checkpoint_files_of, collect_tensors, load_encoder

STEPS = 12


def probe_set(stride: int = 1) -> ProbeSet:
    return ProbeSet(
        corpus="tones", corpus_digest="d" * 64, speakers=["a", "b"], marks=[], settings={"split": "loso"}, stride=stride
    )


def scored(run: Path | str, folder: str, step: int, mean: float) -> None:
    Probes(str(run)).write(Probe(folder=folder, step=step, status="done", ccc={"mean": mean}))


def publishing(run: str, best_by: str) -> Callable[[], None]:
    """Publishes STEPS checkpoints, of which one stays but for those that are to be kept."""
    ledger = Ledger(run)
    publisher = Publisher(ledger, ledger.head(), 0, keep=1, best_by=best_by)

    def work() -> None:
        for step in range(1, STEPS + 1):
            publisher.publish(step, None, checkpoint_files_of({}, checkpoints.position(step), checkpoints.RECIPE))

    return work


@given(
    # A few operations of the prober, then several of whoever publishes: up to four checkpoints between two looks.
    turns_of_both=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=5, max_size=20),
    figures=st.permutations(range(STEPS)),
    stride=st.integers(1, 3),
    best_by=st.sampled_from(["loss", "probe"]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_every_order_of_both_a_claimed_checkpoint_stays_and_so_does_the_best(
    tmp_path_factory, turns_of_both, figures, stride, best_by
):
    run = str(tmp_path_factory.mktemp("run"))
    Probes(run).write_set(probe_set(stride))
    ledger, claimed, done = Ledger(run), list[str](), dict[str, float]()

    def probing() -> None:
        probes = Probes(run)
        while True:
            if chosen := probes.claim(ledger, probe_set(stride)):
                claimed.append(chosen.folder)
                mean = float(figures[chosen.step - 1])
                probes.write(Probe(folder=chosen.folder, step=chosen.step, status="done", ccc={"mean": mean}))
                done[claimed.pop()] = mean

    def look() -> None:
        state = ledger.head()
        kept = {each.folder for each in state.checkpoints}
        assert kept >= set(claimed), "what is being probed stays"
        if best_by == "probe" and done:
            assert max(done, key=lambda folder: done[folder]) in kept, "and so does the best"
        # The newest, the best, two that wait, the one being probed, and one whose figure came just now.
        assert len(kept) <= 6

    schedule = [turn for few, several in turns_of_both for turn in ((1, few), (0, several))]
    turns.play([publishing(run, best_by), probing], schedule, look)


def test_the_best_by_probe_outlives_newer_ones_and_is_what_loading_the_best_gives(tmp_path):
    ledger, step = Ledger(str(tmp_path)), checkpoints.trained(0)
    publisher = Publisher(ledger, ledger.head(), 0, keep=1, best_by="probe")
    for number, mean in ((4, 0.2), (8, 0.6), (12, 0.6), (16, 0.1), (20, float("nan"))):
        made = checkpoint_files_of(
            collect_tensors(step.contrast, step.optimizer), checkpoints.position(number), checkpoints.RECIPE
        )
        # The loss says otherwise, and is not asked.
        folder = Path(publisher.publish(number, number / 10, made)).name
        scored(tmp_path, folder, number, mean)
    assert checkpoints.steps(tmp_path) == [8, 20]
    source = load_encoder(str(tmp_path), "best")[1]
    assert (source["step"], source["chosen"]) == (8, "best by probe")
    assert load_encoder(source["url"])[1]["chosen"] == "best by probe", "by its own path it is the chosen one too"
    copied = tmp_path / "copied"
    copied.mkdir()
    write_model_folder(copied, tracked_encoder(source["url"]), run_id=None, model_id="m-0")
    assert load_encoder(str(copied / "encoder"))[1]["chosen"] == "best by probe", "its copy in MLflow knows it too"
    newest = load_encoder(str(tmp_path))[1]
    assert (newest["step"], newest["chosen"]) == (20, "newest")
    assert load_encoder(newest["url"])[1]["chosen"] == "by name"


def test_the_best_is_by_loss_unless_the_run_says_so_and_without_a_figure_it_is_refused(tmp_path):
    for number, loss in ((4, 2.0), (8, 1.0), (12, 3.0)):
        url = checkpoints.publish(tmp_path, checkpoints.position(number, metrics={"heldout_loss": loss}))
        scored(tmp_path, Path(url).name, number, number / 100)
    assert load_encoder(str(tmp_path), "best")[1]["step"] == 8
    assert load_encoder(str(tmp_path), "best")[1]["chosen"] == "best by loss"
    checkpoints.publish(tmp_path / "other", checkpoints.position(4))
    with pytest.raises(UserError, match=r"no checkpoint of .* has a held-out loss, so none is the best"):
        load_encoder(str(tmp_path / "other"), "best")


def test_a_checkpoint_carries_what_it_is_probed_on_out_of_its_run(tmp_path):
    Probes(str(tmp_path / "run")).write_set(probe_set())
    ledger, step = Ledger(str(tmp_path / "run")), checkpoints.trained(0)
    publisher = Publisher(ledger, ledger.head(), 0, keep=1)
    made = checkpoint_files_of(
        collect_tensors(step.contrast, step.optimizer), checkpoints.position(4), checkpoints.RECIPE, publisher.probe_set
    )
    copy = Path(publisher.publish(4, None, made)).rename(tmp_path / "copy")
    source = load_encoder(str(copy))[1]
    assert (source["chosen"], source["probe_set"]["speakers"]) == ("by name", ["a", "b"])


def test_a_run_that_is_not_probed_any_more_keeps_nothing_for_it(tmp_path):
    run = str(tmp_path)
    Probes(run).write_set(probe_set())
    Probes(run).retire_set()
    publishing(run, "loss")()
    assert checkpoints.steps(run) == [STEPS]
    assert Probes(run).probe_set().speakers == ["a", "b"], "but it is known still"


@pytest.mark.parametrize("how", ["empty", "truncated"])
def test_a_damaged_file_is_said_and_the_checkpoint_counts_as_not_probed(tmp_path, caplog, how):
    scored(tmp_path, "step-00000004-0001", 4, 0.5)
    checkpoints.damage(tmp_path / "probe" / "step-00000004-0001.json", how)
    assert Probes(str(tmp_path)).all() == []
    assert "counts as not probed" in caplog.text
