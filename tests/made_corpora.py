"""Folders of exactly the form in which the owners ship IEMOCAP, MSP-Podcast, MSP-Improv, RAVDESS, CREMA-D and EmoDB.

The speech is tones whose labels can be heard (activation is loudness, valence is pitch, dominance is noise), so that a
recogniser has something to learn.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from cpcscale.emotion.protocol.splits import Split, SplitRow, make_folds

RNG = np.random.default_rng


def put_tone(path: Path, labels: tuple[float, float, float], seed: int, rate_hz: int = 16_000) -> None:
    """Between 0.3 and 0.5 s of a tone that holds activation, valence and dominance, each in [-1, 1]."""
    rng = RNG(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = int(rng.uniform(0.3, 0.5) * rate_hz)
    activation, valence, dominance = labels
    tone = np.sin(np.arange(samples) * (0.15 + 0.08 * valence) * 16_000 / rate_hz)
    wave = 0.1 * np.exp(activation) * (tone + 0.5 * (1 + dominance) * rng.normal(0, 1, samples))
    soundfile.write(path, wave.clip(-1, 1), rate_hz)


def unit(labels: np.ndarray, least: float, greatest: float) -> tuple[float, float, float]:
    activation, valence, dominance = (labels - least) / (greatest - least) * 2 - 1
    return activation, valence, dominance


# The classes come round in turn.
IEMOCAP_CODES = ("neu", "ang", "hap", "sad", "exc", "fru", "xxx", "sur", "fea", "dis", "oth")
IEMOCAP_HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


def put_iemocap(folder: Path, sessions: int = 2, turns: int = 3, audio: bool = True) -> Path:
    """Each session has an improvised and a scripted dialogue, each actor `turns` turns in both."""
    rng = RNG(0)
    count = 0
    for session in range(1, sessions + 1):
        root = folder / f"Session{session}"
        for dialogue in (f"Ses{session:02}F_impro01", f"Ses{session:02}M_script01_1"):
            blocks, transcript = [], []
            attribute: dict[str, list[str]] = {"e3": [], "e4": []}
            for number in range(turns):
                for gender in "FM":
                    turn = f"{dialogue}_{gender}{number:03}"
                    ratings_RP = rng.integers(1, 6, (2, 3))
                    mean_P = ratings_RP.mean(axis=0)
                    blocks.append(iemocap_block(turn, IEMOCAP_CODES[count % len(IEMOCAP_CODES)], ratings_RP))
                    for rater, (act, val, dom) in zip(attribute, ratings_RP, strict=True):
                        attribute[rater].append(f"{turn} :act {act}; :val {val}; :dom {dom}; ")
                    transcript.append(f"{turn} [{count:08.4f}-{count + 1:08.4f}]: Excuse me.")
                    if audio:
                        put_tone(root / "sentences" / "wav" / dialogue / f"{turn}.wav", unit(mean_P, 1, 5), count)
                    count += 1
            put_text(root / "dialog" / "EmoEvaluation" / f"{dialogue}.txt", IEMOCAP_HEAD + "\n".join(blocks))
            for rater, lines in attribute.items():
                place = root / "dialog" / "EmoEvaluation" / "Attribute" / f"{dialogue}_{rater}_atr.txt"
                put_text(place, "\n".join(lines) + "\n")
            put_text(root / "dialog" / "transcriptions" / f"{dialogue}.txt", "\n".join(transcript) + "\n")
    return folder


def iemocap_block(turn: str, code: str, ratings_RP: np.ndarray) -> str:
    """The lines of one turn: label, classes, two external raters E3 and E4, and the actor's own values."""
    act, val, dom = np.asarray(ratings_RP, float).mean(axis=0)
    own = f"{turn.rpartition('_')[2][0]}1"
    lines = [f"[6.2901 - 8.2357]\t{turn}\t{code}\t[{val:.4f}, {act:.4f}, {dom:.4f}]"]
    lines += ["C-E2:\tNeutral;\t()", "C-E3:\tNeutral; Anger;\t()", f"C-{own}:\tNeutral;\t(curious)"]
    for rater, (one_act, one_val, one_dom) in zip(("E3", "E4"), ratings_RP, strict=True):
        lines.append(f"A-{rater}:\tval {one_val}; act {one_act}; dom  {one_dom};\t(mildly aggravated, act 9)")
    lines.append(f"A-{own}:\tval 3; act 2; dom  1;\t()")
    return "\n".join(lines) + "\n"


MSP_CLASSES = {"A": "Angry", "S": "Sad", "H": "Happy", "U": "Surprise", "N": "Neutral", "X": "Other-tired, really; yes"}
MSP_COLUMNS = ("FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set")
# The partitions as releases up to 1.8 and from 1.10 on name them.
MSP_OLD = ("Train", "Train", "Validation", "Test1", "Test2")
MSP_NEW = ("Train", "Train", "Development", "Test1", "Test2")


def put_msp_podcast(
    folder: Path,
    podcasts: int = 10,
    segments: int = 3,
    consensus: str = "labels_consensus.csv",
    detailed: str = "labels_detailed.csv",
    splits: tuple[str, ...] = MSP_NEW,
    audio: str = "Audios",
) -> Path:
    """Podcasts take the partitions in turn and have a speaker each; the last segment of each is by Unknown.

    `detailed`: labels_detailed.csv, labels_detailed.json, labels.txt, or columns.csv for the table with a column a
    value; "" for none.
    """
    rows, ratings = msp_podcast_rows(podcasts, segments, splits)
    labels = folder / "Labels"
    labels.mkdir(parents=True, exist_ok=True)
    if consensus.endswith(".csv"):
        put_table(labels / consensus, [dict(zip(MSP_COLUMNS, row, strict=True)) for row in rows])
    else:
        tree = {row[0]: dict(zip(MSP_COLUMNS[1:], row[1:], strict=True)) for row in rows}
        put_text(labels / consensus, json.dumps(tree))
    put_msp_ratings(labels, detailed, rows, ratings)
    for at, row in enumerate(rows):
        if audio:
            put_tone(folder / audio / str(row[0]), unit(np.array(row[2:5], float), 1, 7), at)
    return folder


Row = tuple[str, str, float, float, float, str, str, str]
# A worker, the class and the values of activation, valence and dominance.
Worker = tuple[str, str, int, int, int]


def msp_podcast_rows(podcasts: int, segments: int, splits: tuple[str, ...]) -> tuple[list[Row], list[list[Worker]]]:
    rng = RNG(1)
    rows: list[Row] = []
    ratings: list[list[Worker]] = []
    for podcast in range(podcasts):
        for segment in range(segments):
            letter = list(MSP_CLASSES)[len(rows) % len(MSP_CLASSES)]
            values_RP = rng.integers(1, 8, (5, 3))
            workers = rng.permutation(8)[:5]
            ratings.append(
                [
                    (f"WORKER{worker:07}", letter, int(act), int(val), int(dom))
                    for worker, (act, val, dom) in zip(workers, values_RP, strict=True)
                ]
            )
            act, val, dom = (round(float(value), 6) for value in values_RP.mean(axis=0))
            known = segment < segments - 1
            speaker, gender = (str(podcast), ("Female", "Male")[podcast % 2]) if known else ("Unknown", "Unknown")
            name = f"MSP-PODCAST_{podcast + 1:04}_{segment:04}.wav"
            rows.append((name, letter, act, val, dom, speaker, gender, splits[podcast % len(splits)]))
    return rows, ratings


def put_msp_ratings(labels: Path, detailed: str, rows: list[Row], ratings: list[list[Worker]]) -> None:
    pairs = [(row, worker) for row, workers in zip(rows, ratings, strict=True) for worker in workers]
    match detailed:
        case "labels_detailed.csv":
            table = [{"FileName": row[0], "EmoDetail": msp_line(worker)} for row, worker in pairs]
            put_table(labels / "labels_detailed.csv", table)
        case "columns.csv":
            names = ("Workers", "EmoClass_Major", "EmoAct", "EmoVal", "EmoDom")
            table = [{"FileName": row[0]} | dict(zip(names, worker, strict=True)) for row, worker in pairs]
            put_table(labels / "labels_detailed.csv", table)
        case "labels_detailed.json":
            tree: dict[str, dict[str, dict[str, object]]] = {row[0]: {} for row in rows}
            for row, (worker, letter, act, val, dom) in pairs:
                values = {"EmoClass_Major": MSP_CLASSES[letter], "EmoAct": act, "EmoDom": dom, "EmoVal": val}
                tree[row[0]][worker] = values
            put_text(labels / "labels_detailed.json", json.dumps(tree))
        case "labels.txt":
            blocks = [
                "\n".join(
                    [f"{row[0]}; {row[1]}; A:{row[2]:.6f}; V:{row[3]:.6f}; D:{row[4]:.6f};", *map(msp_line, workers)]
                )
                for row, workers in zip(rows, ratings, strict=True)
            ]
            put_text(labels / "Labels.txt", "\n\n".join(blocks) + "\n")


def msp_line(worker: Worker) -> str:
    name, letter, act, val, dom = worker
    word = MSP_CLASSES[letter]
    return f"{name}; {word}; {word},Concerned; A:{act:.6f}; V:{val:.6f}; D:{dom:.6f};"


def put_msp_improv(
    folder: Path, sessions: int = 2, turns: int = 6, table: str = "Evalution.txt", falls: bool = True
) -> Path:
    """Each actor has `turns` turns in a scenario, every third of them angry, neutral and sad in turn.

    With `falls`, A is written as the release has it: 1 for the most active.
    """
    rng = RNG(2)
    blocks = []
    count = 0
    for session in range(1, sessions + 1):
        for gender in "FM":
            for number in range(turns):
                letter, style = "ANS"[number % 3], "STRP"[number % 4]
                active = {"A": (4, 6), "N": (2, 4), "S": (1, 3)}[letter]
                values_RP = np.stack([rng.integers(*active, 5), rng.integers(1, 6, 5), rng.integers(1, 6, 5)], axis=1)
                turn = f"S01A-{gender}{session:02}-{style}-FM{number + 1:02}"
                place = f"Audio/session{session}/S01A/{style}/MSP-IMPROV-{turn}.wav"
                put_tone(folder / place, unit(values_RP.mean(axis=0), 1, 5), count)
                written_RP = values_RP * [-1, 1, 1] + [6, 0, 0] if falls else values_RP
                blocks.append(msp_improv_block(turn, letter, written_RP))
                count += 1
    put_text(folder / table, "\n\n".join(blocks) + "\n")
    return folder


def msp_improv_block(turn: str, letter: str, values_RP: np.ndarray) -> str:
    act, val, dom = np.asarray(values_RP, float).mean(axis=0)
    lines = [f"UTD-IMPROV-{turn}.avi; {letter}; A:{act:.6f}; V:{val:.6f}; D:{dom:.6f} ; N:4.100000;"]
    lines += [
        f"rater-p{at}; Neutral; Concerned,Other-(I guess); A:{a:.6f}; V:{v:.6f}; D:{d:.6f}; N:NaN;"
        for at, (a, v, d) in enumerate(values_RP)
    ]
    return "\n".join(lines)


def put_ravdess(folder: Path, actors: int = 2, song: bool = False) -> Path:
    """All eight emotions by each actor, one of them sung where `song`."""
    for actor in range(1, actors + 1):
        for emotion in range(1, 9):
            name = f"03-01-{emotion:02}-01-02-01-{actor:02}.wav"
            put_tone(folder / f"Actor_{actor:02}" / name, (0.1 * emotion, 0.0, 0.0), actor * 10 + emotion, 48_000)
        if song:
            put_tone(folder / f"Actor_{actor:02}" / f"03-02-03-01-02-01-{actor:02}.wav", (0.0, 0.0, 0.0), actor, 48_000)
    return folder


def put_crema_d(folder: Path, actors: int = 2) -> Path:
    """All six emotions by each actor, as WAV, and the table of the actors."""
    people = []
    for actor in range(1001, 1001 + actors):
        for at, emotion in enumerate(("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")):
            put_tone(folder / "AudioWAV" / f"{actor}_DFA_{emotion}_XX.wav", (0.1 * at, 0.0, 0.0), actor + at)
        sex = ("Female", "Male")[actor % 2]
        people.append({"ActorID": actor, "Age": 51, "Sex": sex, "Race": "Caucasian", "Ethnicity": "Not Hispanic"})
    put_table(folder / "VideoDemographics.csv", people)
    return folder


def put_emodb(folder: Path, names: tuple[str, ...] = ("03a01Fa", "03b02Wc", "08a04Nb", "16a05Td")) -> Path:
    for at, name in enumerate(names):
        put_tone(folder / "wav" / f"{name}.wav", (0.1 * at, 0.0, 0.0), at)
    put_text(folder / "erkennung.txt", "Satz\n")
    return folder


def put_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def put_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def speaker_splits(speakers: Sequence[str], folds: int, dev_share: float, seed: int) -> list[Split]:
    """The folds of whole speakers, as `make_folds` gives them, from the speaker of each row alone."""
    rows = [SplitRow(key=str(number), speaker=speaker) for number, speaker in enumerate(speakers)]
    return list(make_folds(rows, f"speakers{folds}", dev_share=dev_share, seed=seed).splits)
