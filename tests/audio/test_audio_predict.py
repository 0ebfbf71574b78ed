"""The command line on sounds: train, predict files and recordings, cross-validate, go on; several labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sound_data as made
import torch
from typer.testing import CliRunner, Result

from peft_suite.audio.crossval import table
from peft_suite.audio.features import Preprocess
from peft_suite.audio.frontend.logmel import LogMel
from peft_suite.audio.windows import cut, starts_of
from peft_suite.cli.app import build
from peft_suite.errors import ConfigError, DataError

TINY = (
    "--backbone",
    "ast-base",
    "--no-pretrained",
    "--device",
    "cpu",
    "backbone.options={hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48, "
    "num_mel_bins: 32, max_length: 40}",
)
QUICK = ("--epochs", "2", "recipe.warmup_epochs=0", "recipe.lr=1e-2", "recipe.batch_size=8")
GOAL = Preprocess(frames=40, mel_bins=32)  # hears 0.415 s


def call(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build(), [str(w) for w in words])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sounds")
    made.folder(root / "data", {"low": 12, "high": 12})
    for number in range(12):  # far apart: 300 and 2400 Hz
        made.put(root / "data" / "high" / f"{number:03d}.wav", made.tone(3, number))
    call("audio", "train", *TINY, "--data", root / "data", "--method", "full", "--out", root / "run", "--epochs", "12",
         "recipe.lr=3e-3", "recipe.batch_size=8", "recipe.warmup_epochs=0", "data.test_fraction=0.2")  # fmt: skip
    return root / "run"


# ---- windows


def test_windows_cover_everything() -> None:
    assert starts_of(1000, 400, 200) == [0, 200, 400, 600]
    assert starts_of(1001, 400, 200) == [0, 200, 400, 600, 601]
    assert starts_of(400, 400, 200) == starts_of(5, 400, 200) == [0]
    for length in range(401, 1200, 37):
        starts = starts_of(length, 400, 150)
        covered = np.zeros(length, bool)
        for start in starts:
            covered[start : start + 400] = True
        assert covered.all() and len(set(starts)) == len(starts) and starts[-1] + 400 == length


def test_windows_are_what_clips_of_these_samples_are(tmp_path: Path) -> None:
    wave = np.concatenate([made.tone(0, seconds=1.0), made.tone(2, seconds=1.03)])
    long = str(made.put(tmp_path / "long.wav", wave, subtype="FLOAT"))
    short = str(made.put(tmp_path / "short.wav", made.tone(seconds=0.5), subtype="FLOAT"))
    data, bad = cut([long, short], GOAL)
    assert not bad and [s.file for s in data.spans] == [long] * 9 + [short]
    assert data.spans[0][1:] == (0.0, 0.415) and data.spans[-2].end == 2.03 and data.spans[-1][1:] == (0.0, 0.415)
    front = LogMel(40, GOAL.mean, GOAL.std, num_mel_bins=32)
    for index, span in enumerate(data.spans):
        source = wave if span.file == long else made.tone(seconds=0.5)
        first = starts_of(len(wave), 6640, 3320)[index] if span.file == long else 0
        assert span.start == pytest.approx(first / 16_000, abs=6e-4)
        clip = torch.from_numpy(source[first : first + 6640])
        torch.testing.assert_close(data[index], front(clip[None])[0], atol=1e-5, rtol=0)
    fine, _ = cut([long, short], GOAL, window=0.2, hop=0.1)
    assert [round(s.end - s.start, 3) for s in fine.spans] == [0.2] * len(fine) and len(fine) == 20 + 4
    assert fine[0].shape == (40, 32)
    assert len(cut([long, short], GOAL, window=0)[0]) == 2
    data._clips = {}  # too much to keep: decoded again
    assert torch.equal(data[3], cut([long], GOAL)[0][3])


def test_windows_that_are_wrong(tmp_path: Path) -> None:
    sound = str(made.put(tmp_path / "a.wav"))
    with pytest.raises(ConfigError, match=r"--window 5: this network hears 0\.4[12] s at most"):
        cut([sound], GOAL, window=5)
    with pytest.raises(ConfigError, match=r"--hop 0\.3: between windows of 0\.2 s"):
        cut([sound], GOAL, window=0.2, hop=0.3)
    (tmp_path / "b.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 2 input sounds cannot be used: .*b\.wav' \(the file is empty"):
        cut([sound, str(tmp_path / "b.wav")], GOAL)
    data, bad = cut([sound, str(tmp_path / "b.wav")], GOAL, skip=True)
    assert len(data) == 1 and bad[0][0].endswith("b.wav")
    with pytest.raises(DataError, match="cannot be used"):
        cut([str(tmp_path / "b.wav")], GOAL, skip=True)


# ---- predict


def test_a_run_stores_what_predict_needs(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    goal = record["data"]["info"]["preprocessing"]
    assert goal["statistics"] == "data" and goal["frames"] == 40 and goal["mel_bins"] == 32
    assert record["final"]["test"]["accuracy"] == 1.0
    html = (trained / "report.html").read_text()
    assert html.count("<audio controls") == len(record["examples"]) > 0 and len(html) < 2_000_000
    told = json.loads(call("audio", "eval", trained / "adapter", "--json").stdout)
    assert told["metrics"]["accuracy"] == 1.0 and told["split"] == "test"


def test_predict_files_folders_and_recordings(trained: Path, tmp_path: Path) -> None:
    made.put(tmp_path / "in" / "one.flac", made.tone(0, 77))
    made.put(tmp_path / "in" / "more" / "two.ogg", made.tone(3, 78))
    (tmp_path / "in" / "notes.txt").write_text("x")
    wave = np.concatenate([made.tone(label, 80 + i, seconds=1.0) for i, label in enumerate((0, 3, 0))])
    made.put(tmp_path / "in" / "long.wav", wave)
    out = tmp_path / "out.json"
    call("audio", "predict", trained / "adapter", tmp_path / "in", "--out", out, "--top", "2")
    rows = json.loads(out.read_text())
    short = {Path(r["file"]).name: r["prediction"] for r in rows if "long" not in r["file"]}
    assert short == {"one.flac": "low", "two.ogg": "high"}
    windows = [r for r in rows if "long" in r["file"]]
    assert len(windows) == 14 and windows[0]["start"] == 0.0 and windows[-1]["end"] == 3.0
    for row in windows:
        inside = {int(row["start"]), int(row["end"] - 1e-6)}
        if len(inside) == 1:
            assert row["prediction"] == ("high" if inside == {1} else "low"), row
    assert [len(r["top"]) for r in rows] == [2] * len(rows)
    call("audio", "predict", trained / "adapter", tmp_path / "in" / "long.wav", "--out", tmp_path / "out.csv",
         "--window", "0.4", "--hop", "0.4", "--top", "2")  # fmt: skip
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["file", "start", "end", "prediction", "probability", "class_2", "probability_2"]
    assert len(lines) == 8 and float(lines[1]["start"]) == 0.4 and float(lines[-1]["end"]) == 3.0
    shown = json.loads(call("audio", "predict", trained / "adapter", tmp_path / "in", "--window", "0", "--json").stdout)
    assert len(shown) == 3 and {"file", "start", "end", "prediction", "probability", "top"} == set(shown[0])
    assert "prediction" in call("audio", "predict", trained / "adapter", tmp_path / "in").stdout


def test_predict_refuses_and_skips(trained: Path, tmp_path: Path) -> None:
    made.put(tmp_path / "a.wav", made.tone(0, 5))
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    out = tmp_path / "out.csv"
    assert "bad.wav" in call("audio", "predict", trained / "adapter", tmp_path, "--out", out, code=1).output
    assert not out.exists()
    skipped = call("audio", "predict", trained / "adapter", tmp_path, "--out", out, "--skip-bad")
    assert "1 of 2 files left out" in skipped.output and len(out.read_text().splitlines()) == 2
    assert "does not exist" in call("audio", "predict", trained / "adapter", tmp_path / "no", code=1).output
    assert "must end in" in call("audio", "predict", trained / "adapter", tmp_path, "--out", "x.txt", code=1).output
    (tmp_path / "e").mkdir()
    assert "No sound in" in call("audio", "predict", trained / "adapter", tmp_path / "e", code=1).output


# ---- several labels, cross-validation


def test_several_labels_are_trained_and_predicted(tmp_path: Path) -> None:
    rows = []
    for i in range(16):
        on = [name for bit, name in enumerate(("low", "high")) if (i >> bit) & 1]
        wave = sum((made.tone(3 * ("low", "high").index(n), i) for n in on), np.zeros(4800, np.float32))
        made.put(tmp_path / f"{i}.wav", wave + made.tone(1, i) * 0.01)
        rows.append(f"{i}.wav,{'|'.join(on)},{'train' if i < 12 else 'test'}")
    (tmp_path / "list.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    call("audio", "train", *TINY, *QUICK, "--data", tmp_path / "list.csv", "--method", "full", "--out",
         tmp_path / "run", "data.label_separator='|'", "data.augment=mixup", "data.val_fraction=0.3")  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metric"] == "map" and 0 <= record["final"]["test"]["map"] <= 1 and record["data"]["multi_label"]
    shown = call("audio", "predict", tmp_path / "run" / "adapter", tmp_path / "3.wav", "--json").stdout
    assert isinstance(json.loads(shown)[0]["prediction"], list)


def test_cross_validation_runs_every_fold_and_goes_on(tmp_path: Path) -> None:
    made.esc50(tmp_path / "esc", folds=3, each=2)
    words = ("audio", "crossval", *TINY, *QUICK, "--data", tmp_path / "esc", "--methods", "bitfit")
    out = tmp_path / "cv"
    first = json.loads(call(*words, "--out", out, "--folds", "2", "--json").stdout)
    assert first["folds"] == ["fold 2"] and [m["method"] for m in first["methods"]] == ["bitfit"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("adapter/*.safetensors")}
    table_text = call(*words, "--out", out).stdout
    assert before and all(p.stat().st_mtime_ns == t for p, t in before.items())  # finished runs are kept
    result = json.loads((out / "crossval.json").read_text())
    (row,) = result["methods"]
    scores = list(row["folds"].values())
    assert len(scores) == 3 and row["missing"] == []
    assert row["mean"] == pytest.approx(np.mean(scores)) and row["std"] == pytest.approx(np.std(scores, ddof=1))
    records = [json.loads(p.read_text()) for p in out.glob("*/bitfit/seed-0/run.json")]
    assert sorted(scores) == sorted(r["final"]["test"]["accuracy"] for r in records)
    assert sorted(r["data"]["info"]["test_fold"] for r in records) == [1, 2, 3]
    assert "mean over folds" in table_text and "bitfit" in table_text
    lines = (out / "crossval.csv").read_text().splitlines()
    assert lines[0] == "method,metric,mean,std,fold 1,fold 2,fold 3" and len(lines) == 2
    html = (out / "comparison.html").read_text()
    assert "standard deviation over folds" in html and "fold 3" in html


def test_cross_validation_over_speakers_and_its_errors(tmp_path: Path) -> None:
    made.fsdd(tmp_path / "digits", count=6)
    words = ("audio", "crossval", *TINY, *QUICK, "--data", tmp_path / "digits", "--out", tmp_path / "cv")
    words = (*words, "--shots", "2")
    result = json.loads(call(*words, "--folds", "theo", "--json").stdout)
    assert result["folds"] == ["without theo"] and result["methods"][0]["std"] is None
    assert "has no fold '7'. There are: lucas, nicolas, theo" in call(*words, "--folds", "7", code=1).output
    assert "chooses data.fold and data.speaker_out itself" in call(*words, "data.speaker_out=theo", code=1).output
    made.folder(tmp_path / "plain", {"a": 2, "b": 2})
    other = call("audio", "crossval", *TINY, "--data", tmp_path / "plain", "--out", tmp_path / "x", code=1)
    assert "cannot be cross-validated" in " ".join(other.output.split()) and not (tmp_path / "x").exists()


def test_the_table_leaves_out_what_failed() -> None:
    row: dict[str, Any] = {"method": "m", "metric": "accuracy", "trainable": 5, "error": None}
    rows = [{**row, "task": t, "seed": s, "score": v} for t, s, v in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.8))]
    rows += [{**row, "task": "c", "seed": 0, "score": None, "error": "DataError: no"}]
    (told,) = table(rows, ["a", "b", "c"])["methods"]
    assert told["folds"] == {"a": pytest.approx(0.6), "b": 0.8} and told["missing"] == ["c"]
    assert told["mean"] == pytest.approx(0.7) and told["std"] == pytest.approx(0.2 / 2**0.5)
    assert table(rows, ["a", "b", "c"])["errors"] == {"c, m, seed 0": "DataError: no"}
