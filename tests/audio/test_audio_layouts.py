"""Every layout: classes, splits, folds, speakers, few shots; and what is wrong with a layout is said."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sound_data as made

from peft_suite.audio.data import AudioDataConfig, source
from peft_suite.audio.fluent_speech import INTENTS
from peft_suite.audio.listing import detect_format
from peft_suite.audio.splits import arrange, folds_of
from peft_suite.errors import ConfigError, DataError, UnknownNameError

SMALL = {"frames": 32, "mel_bins": 128}


def config(root: Path | str, **fields: Any) -> AudioDataConfig:
    return AudioDataConfig(root=str(root), **fields)


def sizes(listing: Any) -> dict[str, int]:
    return {split: len(part) for split, part in listing.splits.items()}


# ---- folders


def test_folder_per_class_with_and_without_splits(tmp_path: Path) -> None:
    made.folder(tmp_path / "plain", {"cat": 5, "ape": 5}, ".flac")
    made.put(tmp_path / "plain" / "cat" / "deeper" / "x.ogg")
    listing = arrange(config(tmp_path / "plain"))
    assert listing.classes == ("ape", "cat") and sizes(listing) == {"train": 9, "val": 2}
    again = arrange(config(tmp_path / "plain"))
    assert listing.splits == again.splits != arrange(config(tmp_path / "plain", split_seed=1)).splits
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        made.folder(tmp_path / "split" / split, {"a": count, "b": count})
    assert sizes(arrange(config(tmp_path / "split"))) == {"train": 6, "val": 4, "test": 2}
    for name in ("a", "b"):
        made.folder(tmp_path / "inside" / name, {"train": 3, "test": 2})
    assert sizes(arrange(config(tmp_path / "inside", val_fraction=0.0))) == {"train": 6, "test": 4}


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    with pytest.raises(DataError, match=r"soundz' does not exist.*'sounds'"):
        source.classes(config(tmp_path / "soundz"))
    with pytest.raises(DataError, match=r"no sub-folder.*ROOT/CLASS/sound\.wav"):
        source.classes(config(tmp_path / "sounds"))
    (tmp_path / "sounds" / "a").mkdir()
    (tmp_path / "sounds" / "a" / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"x\.txt': unknown extension '\.txt'"):
        source.classes(config(tmp_path / "sounds"))
    made.folder(tmp_path / "two" / "train", {"a": 1})
    made.folder(tmp_path / "two" / "test", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="Classes in test that train does not have: b"):
        source.classes(config(tmp_path / "two"))
    with pytest.raises(UnknownNameError, match="'esc50'"):
        source.classes(config(tmp_path / "two", format="esc-50"))
    with pytest.raises(DataError, match="is a file but no table"):
        source.classes(config(made.put(tmp_path / "one.wav")))


# ---- tables


def test_table_with_splits_folds_and_speakers(tmp_path: Path) -> None:
    rows = [f"{s}/{i}.wav,{'ab'[i % 2]},{s}" for s, n in (("train", 4), ("val", 2), ("test", 2)) for i in range(n)]
    file = made.table(tmp_path / "list.csv", rows, "path,label,split")
    listing = arrange(config(file))
    assert listing.classes == ("a", "b") and sizes(listing) == {"train": 4, "val": 2, "test": 2}
    rows = [f"{i}.wav,{i % 2},{1 + i // 4},{'xyz'[i // 4]}" for i in range(12)]
    folds = made.table(tmp_path / "folds" / "list.csv", rows, "path,label,fold,speaker")
    listing = arrange(config(folds, fold=3))
    assert sizes(listing) == {"train": 4, "val": 4, "test": 4} and listing.classes == ("0", "1")
    assert {s.fold for s in listing.splits["test"]} == {3} and {s.fold for s in listing.splits["val"]} == {2}
    assert [name for name, _ in folds_of(config(folds))] == ["fold 1", "fold 2", "fold 3"]
    assert folds_of(config(folds), "speaker")[0] == ("without x", {"speaker_out": "x"})
    with pytest.raises(DataError, match=r"data\.fold = 4 does not exist.*has the folds 1, 2, 3"):
        arrange(config(folds, fold=4))
    with pytest.raises(DataError, match="has no folds"):
        arrange(config(file, fold=1))
    made.table(tmp_path / "parts" / "train.tsv", [], "path\tlabel")
    (tmp_path / "parts" / "train.tsv").write_text("path\tlabel\na.wav\tx\nb.wav\ty\n")
    for name in ("a", "b", "c"):
        made.put(tmp_path / "parts" / f"{name}.wav")
    (tmp_path / "parts" / "dev.csv").write_text("path,label\nc.wav,y\n")
    assert sizes(arrange(config(tmp_path / "parts"))) == {"train": 2, "val": 1}


def test_several_labels(tmp_path: Path) -> None:
    rows = ["0.wav,rain;wind", "1.wav,rain", "2.wav,", "3.wav,wind;thunder", "4.wav,thunder"]
    file = made.table(tmp_path / "list.csv", rows)
    splits = source.load(config(file, multi_label=True, val_fraction=0.0), SMALL)
    assert splits.multi_label and splits.classes == ("rain", "thunder", "wind")
    assert splits.train[0][1].tolist() == [1, 0, 1] and splits.train[2][1].tolist() == [0, 0, 0]
    (tmp_path / "bar.csv").write_text("path,label\n0.wav,a|b\n1.wav,b\n")
    assert source.classes(config(tmp_path / "bar.csv", label_separator="|")) == (("a", "b"), True)
    with pytest.raises(
        DataError, match=r"line 2: the label 'rain;wind' looks like several. Set data\.multi_label=true"
    ):
        source.classes(config(file))
    (tmp_path / "empty.csv").write_text("path,label\n0.wav,rain\n1.wav,rain\n2.wav,\n")
    with pytest.raises(DataError, match=r"line 4: the column 'label' is empty"):
        source.classes(config(tmp_path / "empty.csv"))
    (tmp_path / "one.csv").write_text("path,label\n0.wav,a;b\n1.wav,c\n")
    assert source.classes(config(tmp_path / "one.csv", classes=("c", "a;b"))) == (("c", "a;b"), False)


@pytest.mark.parametrize("seed", [12, 14, 15])  # draws that hold out both sounds of rain
def test_the_last_sound_of_a_class_stays_in_train(tmp_path: Path, seed: int) -> None:
    rows = ["0.wav,rain;sea", "1.wav,sea", "2.wav,rain;tram", "3.wav,tram", "4.wav,rain;wind", "5.wav,wind"]
    file = made.table(tmp_path / "list.csv", rows)
    listing = arrange(config(file, multi_label=True, val_fraction=0.5, split_seed=seed))
    assert {label for s in listing.splits["train"] for label in s.labels} == {0, 1, 2, 3}
    assert sizes(listing) == {"train": 4, "val": 2}


@pytest.mark.parametrize(
    ("text", "fields", "match"),
    [
        ("sound,label\n0.wav,a\n", {}, r"no column 'path'. Columns there: sound, label. Set data.path_column"),
        ("path,kind\n0.wav,a\n", {}, r"no column 'label'. Columns there: path, kind. Set data.label_column"),
        ("path,label\n0.wav,a\n", {"fold_column": "part"}, r"no column 'part'. Columns there: path, label"),
        ("path,label\n", {}, "lists no sound"),
        ("path,label\n9.wav,a\n", {}, r"1 of 1 files .* do not exist: .*9\.wav.*skip_bad"),
        ("path,label,split\n0.wav,a,trian\n", {}, r"line 2: split 'trian'.*'train'"),
        ("path,label,fold\n0.wav,a,x\n", {}, "fold 'x' is no number from 1"),
        ('path,label\n"0.wav,a\n', {}, "cannot be read as a table"),
        ("path,label\n0.wav,a\n", {"classes": ("b",)}, r"not in data\.classes: a"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str, fields: dict[str, Any], match: str) -> None:
    made.put(tmp_path / "0.wav")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        arrange(config(tmp_path / "list.csv", **fields))


# ---- data sets of the field


@pytest.mark.parametrize("below", ["", "ESC-50-master"])
def test_esc50(tmp_path: Path, below: str) -> None:
    made.esc50(tmp_path / below, ("dog", "rooster", "pig"), each=2)
    assert detect_format(config(tmp_path)) == "esc50"
    listing = arrange(config(tmp_path, fold=5))  # PETL's first split: train on 1 2 3, validate on 4, test on 5
    assert listing.classes == ("dog", "rooster", "pig") and listing.folds == (1, 2, 3, 4, 5)
    assert {k: {s.fold for s in v} for k, v in listing.splits.items()} == {"train": {1, 2, 3}, "val": {4}, "test": {5}}
    assert {s.fold for s in arrange(config(tmp_path, fold=1)).splits["val"]} == {5}
    every = arrange(config(tmp_path, fold=1, val_fraction=0.0))  # the original AST: all four other folds
    assert sizes(every) == {"train": 24, "test": 6} and every.notes == {"test_fold": 1}
    shares = arrange(config(tmp_path, fold=1, validation="fraction", val_fraction=0.25))
    assert sizes(shares) == {"train": 18, "val": 6, "test": 6}
    with pytest.raises(DataError, match=r"data\.fold = 6 does not exist.*1, 2, 3, 4, 5"):
        arrange(config(tmp_path, fold=6))
    with pytest.raises(ConfigError, match="fold"):
        config(tmp_path, fold=-1)


def test_esc50_that_is_wrong(tmp_path: Path) -> None:
    made.esc50(tmp_path)
    meta = tmp_path / "meta" / "esc50.csv"
    text = meta.read_text()
    meta.write_text(text.replace("target", "class_id"))
    with pytest.raises(DataError, match=r"no column 'target'\. Columns there: filename, fold, class_id"):
        arrange(config(tmp_path))
    meta.write_text(text.replace("2,0,dog", "2,0,cat"))
    with pytest.raises(DataError, match="target 0 is 'dog' and 'cat'"):
        arrange(config(tmp_path))
    meta.write_text(text)
    (tmp_path / "audio" / "1-1010-A-0.wav").unlink(missing_ok=True)
    next((tmp_path / "audio").iterdir()).unlink()
    with pytest.raises(DataError, match=r"files that meta/esc50\.csv lists do not exist"):
        arrange(config(tmp_path))
    with pytest.raises(DataError, match="so it is not ESC-50"):
        arrange(config(tmp_path / "audio", format="esc50"))


def test_urbansound8k(tmp_path: Path) -> None:
    made.urbansound8k(tmp_path / "UrbanSound8K")
    listing = arrange(config(tmp_path, fold=10))
    assert listing.layout == "urbansound8k" and listing.classes == ("air_conditioner", "car_horn", "siren")
    assert {s.fold for s in listing.splits["test"]} == {10} and {s.fold for s in listing.splits["val"]} == {9}
    assert sizes(listing) == {"train": 24, "val": 3, "test": 3}
    assert len(folds_of(config(tmp_path))) == 10


def test_speech_commands(tmp_path: Path) -> None:
    made.speech_commands(tmp_path)
    listing = arrange(config(tmp_path))
    assert listing.layout == "speech-commands" and listing.classes == ("bed", "no", "yes")
    assert sizes(listing) == {"train": 3, "val": 3, "test": 3}
    assert {s.speaker for s in listing.splits["test"]} == {"c3"}
    other = arrange(config(tmp_path, classes=("yes", "no", "bed")))
    assert {(s.name.split("/")[0], other.classes[s.label]) for s in other.splits["train"]} == {
        (w, w) for w in listing.classes
    }
    with pytest.raises(DataError, match=r"differ in: nope, yes"):
        arrange(config(tmp_path, classes=("nope", "no", "bed")))
    (tmp_path / "testing_list.txt").write_text("yess/c3_nohash_0.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt .*'yess/c3.*'yes'"):
        arrange(config(tmp_path))
    (tmp_path / "testing_list.txt").write_text("yes/d4_nohash_0.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt lists do not exist"):
        arrange(config(tmp_path))
    (tmp_path / "validation_list.txt").unlink()
    with pytest.raises(DataError, match=r"validation_list\.txt"):
        arrange(config(tmp_path))


def test_fluent_speech(tmp_path: Path) -> None:
    assert len(INTENTS) == len(set(INTENTS)) == 31
    known = {0: "change language,none,none", 13: "activate,lights,washroom", 20: "decrease,heat,kitchen"}
    known |= {23: "bring,newspaper,none", 27: "change language,Korean,none", 30: "bring,shoes,none"}
    assert all(INTENTS[i] == name for i, name in known.items())
    made.fluent_speech(tmp_path, INTENTS)
    listing = arrange(config(tmp_path))
    assert listing.classes == INTENTS and sizes(listing) == {"train": 62, "val": 31, "test": 31}
    assert [s.label for s in listing.splits["test"]] == list(range(31))
    table = tmp_path / "data" / "test_data.csv"
    table.write_text(table.read_text().replace("bring,shoes", "bring,boots"))
    with pytest.raises(DataError, match=r"line 32: unknown intent 'bring,boots,none'.*bring,shoes,none"):
        arrange(config(tmp_path))


def test_fsdd_splits_speakers_and_shots(tmp_path: Path) -> None:
    made.fsdd(tmp_path)
    listing = arrange(config(tmp_path, val_fraction=0.0))
    assert listing.layout == "fsdd" and listing.classes == ("0", "1")
    assert sizes(listing) == {"train": 18, "test": 30}
    assert all(int(s.name.split("_")[2][:-4]) < 5 for s in listing.splits["test"])
    out = arrange(config(tmp_path / "recordings", val_fraction=0.0, speaker_out="theo"))
    assert sizes(out) == {"train": 32, "test": 16} and {s.speaker for s in out.splits["test"]} == {"theo"}
    assert "theo" not in {s.speaker for s in out.splits["train"]} and out.notes == {"speaker_out": "theo"}
    with pytest.raises(DataError, match=r"nobody of that name.*'theo'"):
        arrange(config(tmp_path, speaker_out="teo"))
    few = source.load(config(tmp_path, val_fraction=0.0, shots=2), SMALL)
    drawn = Counter((s.label, s.speaker) for s in few.train.samples)
    assert set(drawn.values()) == {2} and len(drawn) == 6 and len(few.test) == 30
    per_class = source.load(config(tmp_path, val_fraction=0.0, shots=2, shots_per="class"), SMALL)
    assert per_class.info["counts"]["train"] == {"0": 2, "1": 2}
    other = source.load(config(tmp_path, val_fraction=0.0, shots=2, split_seed=5), SMALL)
    assert [s.name for s in few.train.samples] != [s.name for s in other.train.samples]
    first = source.load(config(tmp_path, val_fraction=0.0, shots=1, shots_per="class", draw="first"), SMALL)
    assert [s.name for s in first.train.samples] == ["0_lucas_5.wav", "1_lucas_5.wav"]
    assert [name for name, _ in folds_of(config(tmp_path))] == ["without lucas", "without nicolas", "without theo"]
    made.put(tmp_path / "recordings" / "noise.wav")
    with pytest.raises(DataError, match=r"not named DIGIT_SPEAKER_INDEX: noise\.wav"):
        arrange(config(tmp_path, format="fsdd"))


def test_data_without_folds_is_not_cross_validated(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"has no folds and no speakers.*column fold or speaker"):
        folds_of(config(tmp_path))
    with pytest.raises(ConfigError, match="choose fold, speaker or auto"):
        folds_of(config(tmp_path), "folds")


@pytest.mark.skipif("PEFT_SUITE_FSDD" not in os.environ, reason="PEFT_SUITE_FSDD names no folder of spoken digits")
def test_the_real_spoken_digits() -> None:
    root = os.environ["PEFT_SUITE_FSDD"]
    listing = arrange(config(root, val_fraction=0.0))
    assert sizes(listing) == {"train": 2700, "test": 300} and len(listing.classes) == 10
    assert listing.speakers == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    few = source.load(config(root, val_fraction=0.0, shots=1, eval_shots=6), {"frames": 100})
    assert few.info["sizes"] == {"train": 60, "test": 60} and few.info["silent"] == 0
    assert few.train[0][0].shape == (100, 128) and -8 < few.info["preprocessing"]["mean"] < -1
