"""The code of docs/extending.md is run as written: corpus and system serve the verbs, the rest keep their contracts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from docs_pages import ROOT, code_blocks, imported
from made_corpora import put_tone
from made_voices import put_corpus
from stores import store

from cpcscale.objective.objective import Features, Rows

PAGE = ROOT / "docs" / "extending.md"
ROWS = [
    ("take/1.wav", "ann", "6", "2", "5"),
    ("take/2.wav", "ben", "2", "5", "3"),
    ("take/3.wav", "ben", "4", "?", "4"),
]


def block(title: str) -> str:
    (text,) = [text for info, text in code_blocks(PAGE) if f'title="{title}"' in info]
    return text


def module(title: str, folder: Path) -> ModuleType:
    """The block of this title, imported."""
    (folder / "extending.py").write_text(block(title), encoding="utf-8")
    return imported("docs_extending", folder / "extending.py")


def apply(diff: str, root: Path) -> None:
    """Makes the edit that a diff block shows; what it takes away or stands beside must be there once."""
    head, *body = diff.rstrip("\n").split("\n")
    path = root / head.removeprefix("--- ")
    before = "\n".join(line[1:] for line in body if not line.startswith("+"))
    after = "\n".join(line[1:] for line in body if not line.startswith("-"))
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{head}: the page's edit fits {text.count(before)} places, not one:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to which everything was done that the page says."""
    root = tmp_path_factory.mktemp("edited")
    shutil.copytree(ROOT / "cpcscale", root / "cpcscale", ignore=shutil.ignore_patterns("__pycache__"))
    made = (
        "cpcscale/emotion/corpora/studio.py",
        "cpcscale/emotion/systems/energy.py",
        "cpcscale/objective/distance.py",
    )
    for path in made:
        (root / path).write_text(block(path), encoding="utf-8")
    for info, text in code_blocks(PAGE):
        if info == "diff":
            apply(text, root)
    return root


def described(package: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return verb(package, folder, "corpus", "describe", str(folder), "--json", *overrides)


def verb(package: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "cpcscale", *arguments], {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def put_studio(folder: Path, head: str = "file\ttalker\tarousal\tpleasure\tcontrol") -> Path:
    for name, *_ in ROWS:
        put_tone(folder / name, (0.0, 0.0, 0.0), 0)
    (folder / "ratings.tsv").write_text("\n".join([head, *map("\t".join, ROWS)]) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("overrides", [(), ("kind=studio",)], ids=["recognised", "named"])
def test_an_adapter_made_by_the_page_is_a_corpus_for_the_verbs(edited, tmp_path, overrides):
    done = described(edited, put_studio(tmp_path), *overrides)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["corpus"], found["utterances"], found["scale"]) == ("studio", 2, [1, 7])
    assert found["dropped"] == {"without three numbers": 1}
    assert (found["labels"]["activation"]["mean"], found["labels"]["valence"]["mean"]) == (4, 3.5)


def test_it_refuses_a_table_of_another_form_in_one_line(edited, tmp_path):
    done = described(edited, put_studio(tmp_path, "file,talker,arousal,pleasure,control"))
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("cpcscale: error:"), done.stderr


def test_a_system_made_by_the_page_is_fitted_published_and_applied(edited, tmp_path):
    put_corpus(tmp_path / "tones")
    (tmp_path / "own.yaml").write_text("system: energy\nprotocol: {split: speakers3}\nsvm_search: false\n")
    keys = ["corpus.path=tones", "run_dir=run", "publish=final", f"tracking.uri={store(tmp_path)}"]
    done = verb(edited, tmp_path, "finetune", "own.yaml", *keys)
    assert done.returncode == 0, done.stderr
    # Loudness is what activation is made of in this corpus.
    assert json.loads((tmp_path / "run" / "result.json").read_text())["ccc"]["activation"] > 0.5
    done = verb(edited, tmp_path, "predict", "run/recogniser", "tones/00.wav", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    said = next(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    assert 1 < row["activation"] < 5 and abs(row["activation"] - float(said["activation_hat"])) < 1


def test_the_context_is_causal_and_each_row_is_by_itself(tmp_path):
    torch.manual_seed(0)
    context = module("a context", tmp_path).GatedContext(channels=6, width=8, layers=3)
    z_BTC = torch.randn(2, 20, 6)
    changed = z_BTC.clone()
    changed[0, 12:] += 1.0
    c_BTD, other_BTD = context(z_BTC), context(changed)
    assert c_BTD.shape == (2, 20, 8)
    torch.testing.assert_close(other_BTD[0, :12], c_BTD[0, :12])
    torch.testing.assert_close(other_BTD[1], c_BTD[1])
    assert not torch.allclose(other_BTD[0, 12:], c_BTD[0, 12:])


def test_the_objective_is_a_sum_that_no_split_changes_and_padding_does_not_enter(tmp_path):
    torch.manual_seed(0)
    page, frames_B = module("cpcscale/objective/distance.py", tmp_path), torch.tensor([9, 5, 0, 9])
    objective, weight_K = page.Distance(page.DistanceConfig(weight=0.1), steps=2), torch.tensor([0.5, 2.0])
    z_BTC, p_BTKC = torch.randn(4, 9, 3), torch.randn(4, 9, 2, 3)
    key_B = torch.arange(4)

    def summed(piece: slice) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        rows = Rows(frames_B, key_B, key_B, key_B)[piece]
        outputs = objective.head(3, 3)(Features(z_BTC[piece], z_BTC[piece], p_BTKC[piece]), rows)
        return objective(outputs, rows, None, weight_K)

    sums_1K, gradients = summed(slice(None))
    parts = [summed(piece) for piece in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sums_1K, parts[0][0] + parts[1][0])
    for whole, *split in zip(gradients, *(gradients for _, gradients in parts), strict=True):
        torch.testing.assert_close(whole, torch.cat(split))
    by_hand = sum(
        ((p_BTKC[row, t, k - 1] - z_BTC[row, t + k]) ** 2).sum() * weight_K[k - 1]
        for row in range(4)
        for k in (1, 2)
        for t in range(int(frames_B[row]) - k)
    )
    torch.testing.assert_close((sums_1K[0] * weight_K).sum().float(), by_hand)
    assert not gradients[0][1, 5:].any() and not gradients[0][2].any()


def test_an_objective_made_by_the_page_is_a_key_of_the_config(edited, tmp_path):
    program = (
        "from cpcscale import config\n"
        "from cpcscale.objective.objectives import chosen\n"
        "from cpcscale.train.recipe import Recipe\n"
        "spec = config.load(Recipe, None, ['objective.distance.weight=.1']).objective\n"
        "print([each.name for each in chosen(spec, 12)], [each.name for each in chosen(Recipe().objective, 12)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(edited)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['infonce', 'distance'] ['infonce']", done.stderr
