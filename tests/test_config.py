"""Promises of the config loader: strict, one line for every mistake, a hash of what matters, no secret let out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale import config
from cpcscale.errors import UserError, nearest
from cpcscale.shards.pack import PackConfig
from cpcscale.stream.feed import FeedConfig
from cpcscale.stream.window import WindowConfig


@dataclass(kw_only=True)
class Train:
    steps: int = 10
    rate: float = 1.0
    kind: Literal["fast", "exact"] = "exact"
    shuffle: bool = True
    log_window_ids: str = field(default="", metadata=config.PLACE)

    def __post_init__(self) -> None:
        config.at_least(0, **{"train.steps": self.steps, "train.rate": self.rate})


@dataclass(kw_only=True)
class Tracking:
    uri: str = ""
    experiment: str = "x"


@dataclass(kw_only=True)
class Run:
    seed: int = 0
    title: str = "run"
    note: str | None = None
    run_dir: str = field(default="runs/x", metadata=config.PLACE)
    shards: str = field(default="runs/shards", metadata=config.PLACE)
    workers: int = field(default=1, metadata=config.PLACE)
    speakers: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    feed: FeedConfig = field(default_factory=FeedConfig, metadata=config.PLACE)
    tracking: Tracking = field(default_factory=Tracking, metadata=config.PLACE)


def refusal(*overrides: str, path: Path | None = None) -> str:
    """The message of the UserError that loading ends in; every one is a single line."""
    with pytest.raises(UserError) as caught:
        config.load(Run, str(path) if path else None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_file(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(path=path)
    assert "run.yaml" in message
    return message


def test_defaults_then_the_file_then_overrides_the_last_one_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ntrain: {steps: 4, kind: fast}\nspeakers: [a]\n")
    loaded = config.load(Run, str(path), ["train.steps=5", "train.steps=6", "speakers=[b,c]", "note=a=b", "extra.k=v"])
    assert (loaded.seed, loaded.title, loaded.note, loaded.speakers) == (3, "run", "a=b", ["b", "c"])
    assert (loaded.train.steps, loaded.train.kind, loaded.extra) == (6, "fast", {"k": "v"})
    assert isinstance(loaded.train, Train)
    path.write_text("")
    assert config.load(Run, str(path)) == Run()


def test_what_a_file_puts_into_a_free_mapping_keeps_no_other_key_out(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("extra: {a: b}\n")
    assert config.load(Run, str(path), ["extra.c=d", "extra.a=e"]).extra == {"a": "e", "c": "d"}


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path):
    assert "unknown key train.stepz (did you mean train.steps?)" in refusal("train.stepz=3")
    assert "unknown key tain (did you mean train?)" in refusal("tain.steps=3")
    assert "(did you mean run_dir?)" in refusal("rundir=x")
    assert "unknown key zzzz; the top level has: seed, title" in refusal("zzzz=1")
    assert "(did you mean train.steps?)" in refused_file(tmp_path, "train:\n  step: 3\n")
    assert "in a file, nest it" in refused_file(tmp_path, "train.steps: 3\n")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=true", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.steps.more=1", "train.steps"),
        ("train.kind=slow", "train.kind"),
        ("train.shuffle=maybe", "train.shuffle"),
        ("train=3", "train"),
        ("seed=null", "seed"),
        ("seed=???", "seed"),
        ("seed.x=1", "seed"),
        ("speakers=a", "speakers"),
        ("speakers[0]=a", "speakers"),
        ("speakers=[a,{b: 1}]", "speakers"),
        ("extra=[1]", "extra"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_key(text, key):
    message = refusal(text)
    assert text in message
    assert key in message.removeprefix(f"override {text!r}")


@pytest.mark.parametrize(
    "text",
    ["seed", "=3", "seed={", "seed=${", "seed='", "seed=!!python/object/apply:os.getcwd []", "[0]=3", ".=3", "a\0=3"],
)
def test_an_override_that_cannot_be_read_is_refused(text):
    refusal(text)


@given(st.text(min_size=1, max_size=40))
def test_no_override_ends_in_anything_but_a_config_or_a_one_line_error(text):
    try:
        config.load(Run, None, [text])
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "holds a list"),
        ("train: [1\n", "line"),
        ("seed: 1\nseed: 2\n", "line 2: found duplicate key seed"),
        ("\tseed: 1\n", "line 1"),
        ("seed: 1\n---\nseed: 2\n", "another document"),
        ("seed: ${\n", "not YAML"),
        ("null: 3\n", "not YAML"),
        ("just words\n", "unknown key just words"),
        ("train:\n", "train is a group of keys (steps, rate"),
        ("speakers: {a: 1}\n", "speakers is a list"),
        ("note: !!python/object/apply:os.getcwd []\n", "constructor"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_one_line_that_says_why(tmp_path, text, expected):
    assert expected in refused_file(tmp_path, text)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path):
    assert "no config file" in refusal(path=tmp_path / "absent.yaml")
    assert "no config file" in refusal(path=tmp_path)


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf"])
def test_what_a_dataclass_refuses_reaches_the_user_in_its_own_words(value):
    assert refusal(f"train.rate={value}").startswith("train.rate=")
    with pytest.raises(UserError, match=r"^train\.rate="):
        config.build(Run, {"train": {"rate": float(value.lstrip("."))}})


def test_stored_values_are_built_as_strictly_as_files_are_read():
    run = Run(seed=3, train=Train(steps=4), speakers=["a"])
    assert config.build(Run, dataclasses.asdict(run)) == run
    for values in ({"sed": 3}, {"train": {"steps": "x"}}):
        with pytest.raises(UserError, match="cannot be made"):
            config.build(Run, values)


def test_the_hash_ignores_places_and_speed():
    elsewhere = Run(
        run_dir="s3://b/x", shards="/elsewhere", workers=7, tracking=Tracking(uri="http://x", experiment="y")
    )
    elsewhere.train.log_window_ids = "ids.jsonl"
    elsewhere.feed = FeedConfig(decode_threads=3, prefetch=9)
    assert config.digest(elsewhere) == config.digest(Run())


def test_the_hash_changes_with_every_other_key():
    places = {
        "run_dir",
        "shards",
        "workers",
        "threads",
        "log_window_ids",
        "log_every_steps",
    }
    changes: list[Any] = []
    for name, value in config.flat(Run()).items():
        if name.rpartition(".")[2] in places or name.startswith(("tracking.", "feed.")):
            continue
        values = {"exact": "fast", True: "false", None: "x"} if isinstance(value, str | bool | None) else {}
        text = {"speakers": "[a]", "extra": "{a: b}"}.get(name) or values.get(value) or f"{value}5"
        changes.append(config.digest(config.load(Run, None, [f"{name}={text}"])))
    assert len({config.digest(Run()), *changes}) == len(changes) + 1
    assert len(changes) >= 8


def test_the_hash_does_not_depend_on_how_a_value_was_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {rate: 2, steps: 7}\nseed: 1\n")
    loaded = config.load(Run, str(path))
    assert config.digest(loaded) == config.digest(config.load(Run, None, ["seed=1", "train.steps=7", "train.rate=2.0"]))
    # Frozen: runs are found again by this hash, in years and under other versions.
    assert config.digest(Train()) == "be8736a9ac6c3b20795ae0e522e17cb19df6a19706205cab7ad2cfb70d54e20c"


@dataclass(kw_only=True)
class Grown(Train):
    """`Train` in a later release: a key and a group of keys have come."""

    warmup: int = field(default=0, metadata=config.ADDED)
    tracking: Tracking = field(default_factory=Tracking, metadata=config.ADDED)


@dataclass(kw_only=True)
class Shrunk:
    """`Train` in a later release: two keys have gone."""

    REMOVED: ClassVar[dict[str, Any]] = {"rate": 1.0, "kind": "exact"}

    steps: int = 10
    shuffle: bool = True


@dataclass(kw_only=True)
class Outer:
    inner: Shrunk = field(default_factory=lambda: Shrunk(steps=3))


def test_a_key_that_came_later_counts_only_when_it_is_not_at_its_default():
    assert config.digest(Grown()) == config.digest(Train())
    assert config.identity(Grown()) == config.identity(Train())
    others = [Grown(warmup=5), Grown(tracking=Tracking(uri="x")), Grown(steps=5), Train()]
    assert len({config.digest(one) for one in others}) == len(others)


def test_a_key_that_went_goes_on_counting_at_its_old_default():
    assert config.digest(Shrunk()) == config.digest(Train())
    assert config.digest(Shrunk(steps=3)) == config.digest(Train(steps=3))
    assert config.digest(Shrunk()) != config.digest(Train(rate=2.0))


def test_a_key_that_went_is_ignored_at_its_old_default_and_refused_by_name_otherwise(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("inner: {steps: 7, rate: 1.0}\n")
    assert config.load(Outer, str(path), ["inner.kind=exact"]) == Outer(inner=Shrunk(steps=7))
    assert config.build(Outer, {"inner": {"rate": 1.0}}) == Outer()
    with pytest.raises(UserError, match=r"inner\.rate=2\.0 was removed"):
        config.load(Outer, None, ["inner.rate=2.0"])
    with pytest.raises(UserError, match=r"inner\.kind=fast was removed"):
        config.build(Outer, {"inner": {"kind": "fast"}})


def test_differences_name_keys_of_either_side():
    old, new = {"a": {"x": 1, "y": 2}, "z": 1}, {"a": {"x": 1, "y": 3}, "w": 0}
    assert config.differences(old, new) == [
        "a.y=2, this config says 3",
        "z=1, a key that this version of cpcscale does not have",
        "no w, this config says 0",
    ]
    assert config.differences(old, old) == []


def test_a_free_mapping_counts_whole_whatever_its_keys_are_called():
    assert config.digest(Run(extra={"shards": "a"})) != config.digest(Run(extra={"shards": "b"}))


plain = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=12)
odd = st.text(
    st.characters(codec="ascii", exclude_characters="/? \n\r\t&#", categories=["L", "N", "P", "S"]), min_size=1
)


@given(password=odd, host=plain)
def test_url_credentials_never_leave_a_config(password, host):
    url = f"https://Secret:Secret{password}Secret@{host}/path"
    run = Run(title=url, note=f"see {url}, please", speakers=[url], extra={"a": url}, tracking=Tracking(uri=url))
    for shown in (repr(config.to_dict(run)), repr(config.flat(run)), config.redact(url)):
        assert "Secret" not in shown
        assert host in shown


@pytest.mark.parametrize("key", ["secret", "db_password", "API_TOKEN", "aws_secret_access_key", "access_key_id"])
@pytest.mark.parametrize("value", ["hunter2", {"deep": "hunter2"}, ["hunter2"]])
def test_secrets_never_leave_a_config(key, value):
    @dataclass
    class Holder:
        extra: dict[str, Any]

    assert "hunter2" not in repr(config.to_dict(Holder({key: value})))
    assert "hunter2" not in repr(config.flat(Holder({key: value})))
    assert "hunter2" not in config.redact(f"https://host/x?{key}=hunter2&part=1")


def test_showing_a_config_leaves_what_is_not_secret_as_it_is():
    run = Run(title="s3://bucket/a@b/c", speakers=["a@b"], note="https://host/a?x=1")
    assert config.to_dict(run) == dataclasses.asdict(run)
    assert config.flat(run)["train.steps"] == 10
    assert config.flat(run)["feed.prefetch"] == 4


def test_a_choice_that_is_not_offered_names_the_nearest():
    with pytest.raises(UserError, match=r"codec='flacc' is not one of flac, wav \(did you mean flac\?\)"):
        config.check_choice("codec", "flacc", ("flac", "wav"))
    assert nearest("entirely else", ["flac"]) == ""


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (PackConfig, {"shard_mb": 0.0}),
        (PackConfig, {"shard_mb": float("nan")}),
        (PackConfig, {"min_s": -1.0}),
        (PackConfig, {"heldout_share": 1.0}),
        (PackConfig, {"heldout_share": -0.1}),
        (PackConfig, {"heldout_share": float("nan")}),
        (WindowConfig, {"seconds": 0.0}),
        (WindowConfig, {"seconds": float("inf")}),
        (FeedConfig, {"prefetch": 0}),
        (FeedConfig, {"decode_threads": -1}),
        (FeedConfig, {"bad_budget": float("nan")}),
    ],
)
def test_the_components_refuse_values_that_make_no_sense_in_one_line(kind, values):
    with pytest.raises(UserError) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)
    assert next(iter(values)) in str(caught.value)


TEXTS = ["20261129_222632", "007", "yes", "12:30:45", "null", "1e5", "0x1F", "~", "2026-11-29", "1_000", ".5", "off"]


@pytest.mark.parametrize("text", [*TEXTS, "exp #1", "a: b", "[x", "{x}", "- a", "&a", "*", "@home", "%x", "!x", "a,b"])
def test_a_text_key_takes_an_override_as_typed(text):
    loaded = config.load(Run, None, [f"run_dir={text}", f"title='{text}'", f"train.log_window_ids={text}"])
    assert (loaded.run_dir, loaded.title, loaded.train.log_window_ids) == (text, text, text)
    assert config.load(Run, None, [f"extra.a={text}"]).extra == {"a": text}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_takes_what_stands_in_a_file_or_a_list(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run_dir: {text}\ntitle: {text}  # not part of it\nspeakers: [{text}, b]\n"
        f"extra: {{a: {text}}}\ntrain:\n  log_window_ids: {text}\n"
    )
    loaded = config.load(Run, str(file))
    assert (loaded.run_dir, loaded.title, loaded.train.log_window_ids) == (text, text, text)
    assert loaded.speakers == [text, "b"] and loaded.extra == {"a": text}
    assert config.load(Run, None, [f"speakers=[{text}, b]"]).speakers == [text, "b"]
    assert config.load(Run, None, [f"train={{log_window_ids: {text}}}"]).train.log_window_ids == text


def test_a_text_key_that_may_be_missing_still_takes_null(tmp_path):
    (tmp_path / "run.yaml").write_text("note: null\n")
    assert config.load(Run, str(tmp_path / "run.yaml")).note is None
    assert config.load(Run, None, ["note=null"]).note is None and config.load(Run, None, ["note=007"]).note == "007"


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1))
def test_any_text_stays_as_typed(text):
    if text == text.strip() and text[0] not in "'\"" and "${" not in text and text != "???":
        assert config.load(Run, None, [f"run_dir={text}"]).run_dir == text
