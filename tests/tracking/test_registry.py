"""Models in MLflow, on a real store: logged, registered, loaded by name, served; and what may not be shared."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import checkpoints
import mlflow
import numpy as np
import pytest
import soundfile
from mlflow_server import free_port
from saved_recognisers import model_of, put_recogniser, support_vectors
from stores import store

import cpcscale
from cpcscale import config
from cpcscale.cli import main
from cpcscale.experiments.published import PACKAGES
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker
from cpcscale.tracking.wheel import own_wheel

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "registry.md"
RATE = 16_000


def voice(samples: int) -> np.ndarray:
    """A tone that comes and goes: a steady one is no speech."""
    t = np.arange(samples)
    return 0.1 * np.sin(t / 9) * np.sin(t / 900)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def register(url: str, *more: str) -> int:
    return main(["register", url, "--name", "emotion", "--alias", "champion", *more])


def test_an_alias_moves_to_a_model_that_is_as_good_and_to_any_other_only_by_force(place, capsys):
    good = put_recogniser(place / "good", 0.5)
    assert register(good) == 0
    assert "models:/emotion@champion is version 1" in capsys.readouterr().out
    assert register(good) == 0 and register(put_recogniser(place / "better", 0.6)) == 0
    assert "is version 2, before it version 1" in capsys.readouterr().out
    refused = {
        "mean CCC of 0.600": good,
        "differ in corpus": put_recogniser(place / "corpus", 0.9, digests={"config": "c", "corpus": "e" * 64}),
        "differ in protocol": put_recogniser(place / "protocol", 0.9, protocol="speakers5"),
        "differ in marks": put_recogniser(place / "marks", 0.9, marks=["LEAKY"]),
    }
    for message, url in refused.items():
        assert register(url) == 2
        assert message in capsys.readouterr().err
    for alias in ("latest", "v7"):
        assert main(["register", refused["differ in corpus"], "--name", "emotion", "--alias", alias]) == 2
        assert "keeps the alias" in capsys.readouterr().err
    # What was refused has left nothing.
    assert [each.version for each in client().search_model_versions("name = 'emotion'")] == [2, 1]
    assert cpcscale.load("models:/emotion@champion").scores["ccc"]["mean"] == 0.6
    assert register(refused["differ in corpus"], "--force") == 0
    assert cpcscale.load("models:/emotion@champion").scores["ccc"]["mean"] == 0.9
    assert cpcscale.load("models:/emotion/1").scores["ccc"]["mean"] == 0.5
    assert not (place / "mlruns").exists()


def test_rows_of_training_data_are_shared_only_when_a_person_says_so(place, capsys, monkeypatch):
    url = put_recogniser(place / "svr", 0.5, support_vectors())
    assert register(url) == 2
    assert "holds 3 rows of its training data" in capsys.readouterr().err
    assert client().search_registered_models() == []
    assert register(url, "--share-training-rows") == 0


def test_what_was_made_under_a_research_licence_is_registered_only_when_a_person_says_so(place, capsys, monkeypatch):
    url = put_recogniser(place / "limited", 0.5, marks=["RESEARCH-ONLY"])
    assert register(url) == 2
    assert "is marked RESEARCH-ONLY" in capsys.readouterr().err
    assert client().search_registered_models() == []
    assert register(url, "--accept-licence") == 0


def test_a_registered_recogniser_is_predicted_with_and_shown_by_its_address(place, capsys):
    url = put_recogniser(place / "one", 0.5)
    soundfile.write(place / "tone.wav", voice(RATE), RATE)
    register(url)
    capsys.readouterr()
    for address in (url, "models:/emotion@champion", "models:/emotion/1"):
        assert main(["predict", address, "tone.wav", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["activation"] == 3.2
    assert main(["recogniser", "verify", "models:/emotion@champion"]) == 0
    for wrong, message in (
        ("models:/emotion@gone", "has no model models:/emotion@gone: run `cpcscale register`"),
        ("models:/gone/1", "has no model"),
        ("models:/emotion", "names no version: write models:/emotion@ALIAS, such as models:/emotion@champion, or"),
        ("models:/", "is no address of a model: write models:/NAME@ALIAS"),
    ):
        assert main(["predict", wrong, "tone.wav"]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_model_of_a_run_holds_no_pickle_and_no_voice_and_names_what_it_needs(place, monkeypatch):
    tracker = Tracker.start(TrackingConfig(), kind="finetune", name="mean", run_dir="r", tags={}, params={})
    tracker.model(model_of(put_recogniser(place / "one", 0.5)))
    tracker.finish("FINISHED", {"ccc_mean": 0.5})
    (made,) = client().get_run(tracker.run_id).outputs.model_outputs
    logged = client().get_logged_model(made.model_id)
    assert (str(logged.status), logged.source_run_id) == ("READY", tracker.run_id)
    assert {metric.key: metric.value for metric in logged.metrics}["ccc_mean"] == 0.5
    folder = Path(logged.artifact_location)
    names = sorted(path.name for path in folder.iterdir())
    assert folder.is_relative_to(place / "runs" / "mlartifacts") and not (place / "mlruns").exists()
    assert not [name for name in names if "pkl" in name or "pickle" in name]
    wheel = f"./{own_wheel()[0]}"
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert needed[-1] == wheel and all("==" in line and "+" not in line for line in needed[:-1])
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    loaded = mlflow.pyfunc.load_model(str(folder))
    assert [(each.name, each.type.name) for each in loaded.metadata.signature.inputs] == [("audio", "binary")]
    (row,) = loaded.predict(loaded.input_example)
    assert row["activation"] == 3.2 and row["reason"] is None
    (row,) = loaded.predict({"audio": [b"no audio"]})
    assert row["activation"] is None and row["reason"] == "unreadable"


def test_an_encoder_of_mlflow_gives_the_frames_of_its_run_and_the_mean_of_them_when_served(place, monkeypatch):
    [url] = checkpoints.published("run", 3)
    assert main(["register", "run", "--name", "encoder", "--alias", "champion"]) == 0
    # Its run is not needed any more.
    frames = cpcscale.load("run").encode(voice(RATE), RATE).frames
    [digest, source] = [hashlib.sha256((url / "COMPLETE.json").read_bytes()).hexdigest(), cpcscale.load("run").source]
    shutil.rmtree("run")
    loaded = cpcscale.load("models:/encoder@champion")
    assert np.array_equal(loaded.encode(voice(RATE), RATE).frames, frames)
    kept = ("step", "fingerprint", "identity")
    assert {name: loaded.source[name] for name in kept} == {name: source[name] for name in kept}
    assert loaded.source["url"] == "models:/encoder@champion"
    version = client().get_model_version_by_alias("encoder", "champion")
    tags = {key.removeprefix("cpcscale."): value for key, value in version.tags.items()}
    assert (tags["kind"], tags["step"], tags["fingerprint"]) == ("encoder", "3", "f" * 64)
    assert (tags["digest"], tags["config_hash"]) == (digest, config.digest(checkpoints.RECIPE))
    # What only training needs stays where it was, and nothing is pickled.
    folder = Path(client().get_model_version_download_uri("encoder", version.version))
    assert {path.name for path in (folder / "encoder").iterdir()} == {
        "model.safetensors",
        "state.json",
        "COMPLETE.json",
    }
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    served = mlflow.pyfunc.load_model(str(folder))
    assert [(each.name, each.type.name) for each in served.metadata.signature.inputs] == [("audio", "binary")]
    soundfile.write("call.wav", voice(RATE), RATE, subtype="FLOAT")
    answers = served.predict({"audio": [Path("call.wav").read_bytes(), b"no audio"]})
    assert list(answers[0]) == [each.name for each in served.metadata.signature.outputs]
    assert np.allclose(answers[0]["vector"], frames.mean(axis=0)) and answers[0]["seconds"] == 1.0
    assert answers[1] == {"seconds": None, "vector": None, "reason": "unreadable"}
    (example,) = served.predict(served.input_example)
    assert example["reason"] is None


def test_an_alias_moves_to_another_encoder_only_by_force_and_never_unseen_between_kinds(place, capsys):
    for name, step in (("one", 1), ("two", 2)):
        checkpoints.published(name, step)
    named = ["--name", "encoder", "--alias", "champion"]
    assert main(["register", "one", *named]) == 0 and main(["register", "one", *named]) == 0
    for other in ("two", put_recogniser(place / "good", 0.5)):
        assert main(["register", other, *named]) == 2
        assert "--force to move the alias" in capsys.readouterr().err
    assert main(["register", "two", *named, "--force"]) == 0
    assert cpcscale.load("models:/encoder@champion").source["step"] == 2
    assert cpcscale.load("models:/encoder/1").source["step"] == 1
    assert main(["predict", "models:/encoder@champion", "tone.wav"]) == 2
    assert "is a pretrained encoder, no recogniser" in capsys.readouterr().err


def test_the_packages_that_a_model_names_are_those_that_a_prediction_imports(tmp_path):
    url = put_recogniser(tmp_path / "one", 0.5)
    checkpoints.published(tmp_path / "run", 1)
    code = (
        "import sys, numpy, cpcscale; cpcscale.load(sys.argv[1]).predict(numpy.sin(numpy.arange(9e3)), 16000)\n"
        "cpcscale.load(sys.argv[2]).encode(numpy.sin(numpy.arange(9e3)), 16000)\n"
        "print(*[m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'cpcscale'], sep='\\n')"
    )
    command = [sys.executable, "-c", code, url, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set[str]()
    for path in done.stdout.split():
        for node in ast.parse(Path(path).read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    known = packages_distributions()
    needed = {known[name][0].lower().replace("_", "-") for name in imported - {"cpcscale"} if name in known}
    assert needed <= {*PACKAGES}


def test_the_wheel_of_a_model_installs_every_file_of_the_package_as_it_is_but_no_released_weights(tmp_path):
    name, data = own_wheel()
    assert re.fullmatch(r"cpcscale-[\d.]+\+[0-9a-f]{12}-py3-none-any\.whl", name)
    (tmp_path / name).write_bytes(data)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(tmp_path / "made"), str(tmp_path / name)], check=True)
    here, there = (
        {
            path.relative_to(top): path.read_bytes()
            for path in top.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        for top in (Path(cpcscale.__file__).parent, tmp_path / "made" / "cpcscale")
    )
    assert here == there | {path: data for path, data in here.items() if path.match("released/*/*")}
    assert not any(path.match("released/*/*") for path in there)


@pytest.fixture
def served(place: Path) -> Iterator[list[str]]:
    """The page's commands, the first of them running: `mlflow models serve` of a registered recogniser."""
    put = put_recogniser(place / "one", 0.5)
    register(put)
    port = free_port()
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [text.replace("5001", str(port)) for text in blocks]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = place / "said.txt"
    with said.open("w") as out:
        server = subprocess.Popen(["bash", "-c", f"exec env {commands[0]}"], env=environment, stdout=out, stderr=out)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, said.read_text()
                time.sleep(0.25)
        yield commands
    finally:
        server.terminate()
        server.wait()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_a_served_recogniser_answers_the_request_of_the_page_as_the_page_shows(served, place):
    soundfile.write(place / "call.wav", voice(RATE // 2), RATE)
    said = subprocess.run(["bash", "-c", served[1]], capture_output=True, text=True, check=True, cwd=place).stdout
    (row,) = json.loads(said)["predictions"]
    assert (row["activation"], row["end_s"], row["reason"]) == (3.2, 0.5, None)
    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])["predictions"][0]
    assert list(shown) == list(row)
