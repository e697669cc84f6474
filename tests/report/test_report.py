"""Promises of the comparison: stable keys, three formats that agree, and a page that needs nothing but itself."""

from __future__ import annotations

import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpcscale.errors import UserError
from cpcscale.report.compare import compare_rows, format_csv, format_json, format_table
from cpcscale.report.html.compare_page import write_html
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker

FIGURES = ["activation", "valence", "dominance", "mean"]
CCC = dict(zip(FIGURES, (0.4124, -0.0216, 0.3, 0.2303), strict=True))
COMMON = {"run_id", "name", "kind", "status", "started", "seconds"}
SUBJECT = {"system", "corpus", "protocol", "marks"}


def start(config: TrackingConfig, kind: str, name: str, **tags: str) -> Tracker:
    named = {f"cpcscale.{key}": value for key, value in tags.items()} | {"cpcscale.config_hash": f"hash-of-{name}"}
    params = {"seed": 0, "objective.negatives": 50, "note": f"<b>{name}</b>"}
    return Tracker.start(config, kind=kind, name=name, run_dir=None, tags=named, params=params)


def add_pretraining(config: TrackingConfig) -> None:
    tracker = start(config, "pretrain", "quick", fingerprint="print-of-data")
    for step in range(1, 61):
        by_k = {f"accuracy_k{k:02}": 0.5 / k for k in range(1, 4)}
        tracker.log(step, {"loss": 4 - step / 60, "accuracy_mean": step / 400, **by_k})
    tracker.log(60, {"heldout_loss": 3.1, "heldout_accuracy_mean": 0.14, "heldout_accuracy_k01": 0.4})
    tracker.finish("FINISHED", {"audio_s_per_s": 118.0, "data_wait_share": 0.004, "unseen_accuracy_mean": 0.1})


def add_recogniser(
    config: TrackingConfig,
    system: str,
    mean: float,
    interval: bool = True,
    corpus: str = "made & <script>alert(1)</script>",
) -> None:
    subject = {"corpus": corpus, "protocol": "speakers3"}
    tracker = start(config, "finetune", f"{system} run", system=system, marks="MADE,PROXY", **subject)
    ccc = CCC | {"mean": mean}
    for fold in range(2):
        for epoch in range(1, 4):
            tracker.log(epoch, {f"fold{fold}_dev_ccc": epoch / 10, f"fold{fold}_train_loss": 1 - epoch / 10})
    folds = [
        {"fold": fold, "test_speakers": ["01", "02"], "dev_speakers": ["03"], "train_utterances": 70}
        | {"dev_utterances": 10, "test_utterances": 20, "chosen": {"epoch": 3, "dev_ccc": 0.3}, "updates": 90}
        | {"ccc": ccc}
        for fold in range(2)
    ]
    result = {"system": system, **subject, "marks": ["MADE", "PROXY"], "seed": 0, "utterances": 100, "speakers": 12}
    result |= {"ccc": ccc, "folds": folds, "curves": [], "seconds": 1.0}
    result["interval"] = {key: [value - 0.1, value + 0.1] for key, value in ccc.items()} if interval else None
    tracker.artifact("result.json", json.dumps(result))
    values = np.random.default_rng(0).normal(size=(20, 6)).round(3)
    columns = "utterance,speaker,fold,activation,valence,dominance,activation_hat,valence_hat,dominance_hat"
    lines = [f"u{place},01,0,{','.join(map(str, row))}" for place, row in enumerate(values)]
    tracker.artifact("predictions.csv", "\n".join([columns, *lines]))
    tracker.finish("FINISHED", {f"ccc_{key}": value for key, value in ccc.items()})


def add_sweep(config: TrackingConfig) -> None:
    sweep = start(config, "sweep", "search", system="precpc", corpus="made", protocol="speakers3", marks="MADE")
    for place in range(3):
        trial = Tracker.start(
            config, kind="trial", name=f"trial {place}", run_dir=None, tags={}, params={}, parent=sweep.run_id
        )
        trial.finish("FINISHED", {"inner_ccc": place / 10})
    sweep.finish("FINISHED", {"inner_ccc": 0.2})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[TrackedRun]:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    add_pretraining(config)
    add_recogniser(config, "precpc", 0.2303)
    add_recogniser(config, "mfcc", 0.31, interval=False)
    add_sweep(config)
    unfinished = start(config, "finetune", "cut short", system="raw", corpus="made", protocol="speakers3", marks="MADE")
    unfinished.log(1, {"fold0_train_loss": math.nan})
    unfinished.finish("FAILED")
    start(config, "pretrain", "just begun")
    return read_runs(config)


@pytest.fixture(scope="module")
def rows(runs: list[TrackedRun]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in compare_rows(runs)}


def test_each_kind_has_its_stable_keys(rows: dict[str, dict[str, Any]]) -> None:
    measured = {"accuracy_mean", "accuracy_chance", "heldout_accuracy_mean", "unseen_accuracy_mean"}
    assert set(rows["quick"]) == COMMON | {"steps", "loss", "audio_s_per_s", "data_wait_share"} | measured
    assert set(rows["precpc run"]) == COMMON | SUBJECT | {"ccc", "interval", "speakers", "utterances"}
    assert set(rows["search"]) == COMMON | SUBJECT | {"inner_ccc", "trials"}
    for name in ("just begun", "cut short"):
        whole = {"just begun": "quick", "cut short": "precpc run"}[name]
        assert set(rows[name]) == set(rows[whole])


def test_rows_carry_what_was_measured(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["precpc run"]["ccc"] == CCC
    assert rows["precpc run"]["interval"]["valence"] == pytest.approx([-0.1216, 0.0784])
    assert rows["precpc run"]["marks"] == ["MADE", "PROXY"]
    assert rows["mfcc run"]["interval"] is None
    assert (rows["quick"]["steps"], rows["quick"]["loss"]) == (60, 3.0)
    assert rows["quick"]["accuracy_chance"] == pytest.approx(1 / 51)
    assert rows["cut short"]["ccc"] == dict.fromkeys(FIGURES)
    assert rows["just begun"]["status"] == "RUNNING"


def test_a_sweep_shows_inner_ccc_and_never_ccc(runs: list[TrackedRun], rows: dict[str, dict[str, Any]]) -> None:
    assert rows["search"]["inner_ccc"] == 0.2
    assert rows["search"]["trials"] == 3
    (line,) = [line for line in csv.DictReader(io.StringIO(format_csv(compare_rows(runs)))) if line["kind"] == "sweep"]
    assert line["inner_ccc"] == "0.2"
    assert not any(value for key, value in line.items() if key.startswith("ccc_"))


def test_json_and_csv_parse_back_to_the_same_figures(runs: list[TrackedRun]) -> None:
    rows = compare_rows(runs)
    assert json.loads(format_json(rows)) == rows
    lines = {line["run_id"]: line for line in csv.DictReader(io.StringIO(format_csv(rows)))}
    assert len(lines) == len(rows)
    for row in rows:
        line = lines[row["run_id"]]
        assert (line["name"], line["kind"]) == (row["name"], row["kind"])
        for figure, value in (row.get("ccc") or {}).items():
            assert line[f"ccc_{figure}"] == ("" if value is None else str(value))
        assert line["marks"] == ",".join(row.get("marks", []))


def test_the_table_is_aligned_and_names_protocol_marks_and_interval(runs: list[TrackedRun]) -> None:
    text = format_table(compare_rows(runs))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    best, second = (next(line for line in lines if line.startswith(system)) for system in ("mfcc", "precpc"))
    assert lines.index(best) < lines.index(second)
    header = lines[lines.index(best) - 1]
    for word, shown in {"protocol": "speakers3", "marks": "MADE,PROXY", "mean": " .230 [.13, .33]".strip()}.items():
        assert second[header.index(word) :].startswith(shown)
    assert second[header.index("valence") :].startswith("-.022 [-.12, .08]")
    assert "95 % interval over speakers" in text
    assert "nothing about emotion" in text
    assert all(run.run_id[:8] in text for run in runs)


class Page(HTMLParser):
    """Every address the page refers to, its visible text, and its tags."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def markup(runs: list[TrackedRun], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "deep" / "runs.html"
    write_html(runs, str(path))
    return path.read_text()


def test_the_page_refers_to_nothing_outside_itself(markup: str) -> None:
    page = Page(markup)
    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "http://" not in markup
    assert "https://" not in markup
    assert "@import" not in markup
    assert len(markup) < 3_000_000


def test_the_page_has_every_run_with_its_origin_and_configuration(markup: str, runs: list[TrackedRun]) -> None:
    text = Page(markup).text
    for run in runs:
        for expected in (run.run_id, run.name, f"hash-of-{run.name}", f"<b>{run.name}</b>"):
            assert expected in text
    assert "print-of-data" in text
    assert "alert(1)" in text  # as text: no script element is made of it, see above


def test_the_page_draws_each_part_and_explains_the_marks(markup: str) -> None:
    page = Page(markup)
    # Two systems with four interval plots in all, three scatters and one curve each; one run's three pretraining plots.
    assert page.tags.count("svg") == 4 + 2 * 3 + 2 + 3
    assert len(page.ids) == len(set(page.ids))
    for phrase in ("chance, ln(N+1)", "Predicted against true", "Dev. CCC", "protocol speakers3", "nats", "epoch"):
        assert phrase in page.text
    for phrase in ("nothing about emotion", "not rated"):
        assert page.text.count(phrase) == 1


def test_the_newest_run_of_a_name_is_drawn_and_the_older_is_listed(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    add_recogniser(config, "mfcc", 0.1)
    add_recogniser(config, "mfcc", 0.2)
    add_recogniser(config, "mfcc", 0.25, corpus="another")
    runs = read_runs(config)
    write_html(runs, str(tmp_path / "runs.html"))
    text = Page((tmp_path / "runs.html").read_text()).text
    assert all(run.run_id in text for run in runs)
    assert ".200" in text
    assert ".250" in text
    assert ".100" not in text


def test_a_damaged_result_is_one_line_that_names_its_run(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = start(config, "finetune", "cut", system="mean")
    tracker.artifact("result.json", '{"ccc": {"mean"')
    tracker.finish("FINISHED")
    with pytest.raises(UserError, match=f"^result.json of run {tracker.run_id} is damaged"):
        compare_rows(read_runs(config))
