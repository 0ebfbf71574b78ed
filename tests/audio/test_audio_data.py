"""Decoding, bad files, features and their statistics, the cache, augmentation, pictures and players."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sound_data as made
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_suite.audio.cache import FeatureCache
from peft_suite.audio.data import AudioDataConfig, source
from peft_suite.audio.decode import UnreadableError, decode, encode
from peft_suite.audio.features import Preprocess
from peft_suite.audio.frontend.logmel import LogMel
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.report import write_report
from peft_suite.train.record import write_thumbnails

SMALL = {"frames": 32, "mel_bins": 128}


def load(root: Path, preprocessing: Any = SMALL, **fields: Any) -> Any:
    return source.load(AudioDataConfig(root=str(root), **fields), preprocessing)


# ---- decoding


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff", ".opus"])
def test_formats_hold_the_same_sound(tmp_path: Path, suffix: str) -> None:
    wave = made.tone(1, seconds=1.0)
    more = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
    clip = decode(made.put(tmp_path / f"a{suffix}", wave, **more))
    assert clip.rate == 16_000 and clip.samples.dtype == np.float32 and not clip.silent and not clip.note
    assert abs(len(clip.samples) - 16_000) < 1300
    lag = np.argmax(np.correlate(clip.samples[:8000], wave[2000:4000], "valid")) - 2000  # encoders may delay
    a, b = clip.samples[3000 + lag : 7000 + lag], wave[3000:7000]
    exact = suffix in (".wav", ".flac", ".aiff")
    assert np.corrcoef(a, b)[0, 1] > (0.9999 if exact else 0.98)


def test_channels_rates_and_lengths(tmp_path: Path) -> None:
    left, right = made.tone(0, seconds=0.5, rate=96_000), made.tone(2, seconds=0.5, rate=96_000)
    file = made.put(tmp_path / "a.wav", np.stack([left, right], 1), 96_000, subtype="FLOAT")
    clip = decode(file)
    assert len(clip.samples) == 8000 and clip.seconds == 0.5
    first, second = (decode(file, channel=k).samples for k in (0, 1))
    np.testing.assert_allclose(clip.samples, (first + second) / 2, atol=1e-6)
    peaks = [np.abs(np.fft.rfft(x * np.hanning(len(x)))).argmax() * 2 for x in (first, second)]
    assert abs(peaks[0] - 300) < 30 and abs(peaks[1] - 1200) < 100
    with pytest.raises(UnreadableError, match="it has 2 channels, so there is no channel 2"):
        decode(file, channel=2)
    part = decode(file, seconds=0.1)
    assert len(part.samples) == 1600 and part.seconds == 0.5
    np.testing.assert_allclose(part.samples, clip.samples[:1600], atol=1e-6)


def test_short_and_silent_sounds_are_accepted(tmp_path: Path) -> None:
    short = decode(made.put(tmp_path / "a.wav", made.tone()[:100]))
    assert len(short.samples) == 400 and "100 samples, padded" in short.note and short.samples[100:].any() == 0
    assert decode(made.put(tmp_path / "b.wav", np.zeros(800, np.float32))).silent


def bad_files(root: Path) -> dict[str, str]:
    """Name -> what is said of it."""
    good = {
        s: made.put(root / f"good{s}", made.tone(seconds=1.0)).read_bytes()
        for s in (".wav", ".flac", ".ogg", ".mp3", ".aiff")
    }
    (root / "empty.wav").write_bytes(b"")
    for suffix, data in good.items():
        (root / f"cut{suffix}").write_bytes(data[: len(data) * 7 // 10])
    (root / "head.wav").write_bytes(good[".wav"][:30])
    (root / "text.wav").write_text("not a sound at all")
    (root / "flac.wav").write_bytes(good[".flac"])
    (root / "wav.mp3").write_bytes(good[".wav"])
    (root / "sound.m4a").write_bytes(good[".wav"])
    made.put(root / "none.wav", made.tone()[:0])
    broken = made.tone()
    broken[7] = np.nan
    made.put(root / "nan.wav", broken, subtype="FLOAT")
    return {
        "empty.wav": r"empty \(0 bytes\)",
        "cut.wav": r"truncated: 9\d\d\d bytes",
        "cut.flac": "truncated or damaged FLAC",
        "cut.ogg": "truncated",
        "cut.mp3": r"truncated: \d+ of 16000 samples",
        "cut.aiff": r"truncated: 9\d\d\d bytes",
        "head.wav": "truncated or damaged WAV",
        "text.wav": r"its name ends in \.wav and its content is no audio",
        "flac.wav": r"its name ends in \.wav and its content is FLAC; rename it",
        "wav.mp3": r"its name ends in \.mp3 and its content is WAV; rename it",
        "sound.m4a": r"unknown extension '\.m4a'.*\.wav",
        "none.wav": "it holds no samples",
        "nan.wav": "1 of 4800 samples are NaN or infinite",
        "missing.wav": "the file does not exist",
    }


def test_every_kind_of_bad_file_is_told(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(UnreadableError, match=reason):
            decode(tmp_path / name)


def test_bad_files_stop_the_run_or_are_counted(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 6, "b": 6})
    for name in bad_files(tmp_path / "bad"):
        if name not in ("missing.wav", "sound.m4a"):
            (tmp_path / "bad" / name).rename(tmp_path / "a" / name)
    for file in (tmp_path / "bad").iterdir():
        file.unlink()
    (tmp_path / "bad").rmdir()
    with pytest.raises(DataError, match=r"12 of 24 train sounds cannot be used: 'a/.*skip_bad \(--skip-bad\)") as told:
        load(tmp_path, val_fraction=0.0)
    assert "a/cut.aiff' (truncated" in str(told.value) and "and 7 more" in str(told.value)
    splits = load(tmp_path, val_fraction=0.0, skip_bad=True)
    assert splits.info["skipped"] == 12 and splits.info["sizes"] == {"train": 12}
    assert {r["name"] for r in splits.info["skipped_files"]} >= {"a/nan.wav", "a/empty.wav"}
    few = load(tmp_path, val_fraction=0.0, skip_bad=True, shots=3)
    assert few.info["counts"]["train"] == {"a": 3, "b": 3}  # shots are drawn from the good ones
    unread = load(tmp_path, val_fraction=0.0, verify="none", statistics="backbone").train
    index = next(i for i, s in enumerate(unread.samples) if s.name == "a/nan.wav")
    with pytest.raises(DataError, match=r"a/nan\.wav' became unreadable during the run: 1 of"):
        unread[index]
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    (tmp_path / "b" / "x.wav").write_bytes(b"")
    with pytest.raises(DataError, match="no training sound is left of: b"):
        load(tmp_path, val_fraction=0.0, skip_bad=True)


def test_listed_files_that_are_missing_are_skipped_when_asked(tmp_path: Path) -> None:
    file = made.table(tmp_path / "list.csv", ["0.wav,a", "1.wav,b", "2.wav,a"])
    (tmp_path / "2.wav").unlink()
    splits = load(file, val_fraction=0.0, skip_bad=True)
    assert splits.info["skipped_files"] == [{"split": "train", "name": "2.wav", "reason": "the file does not exist"}]


def test_silent_short_and_long_sounds_are_counted(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 2, "b": 2})
    made.put(tmp_path / "a" / "silent.wav", np.zeros(3000, np.float32))
    made.put(tmp_path / "a" / "short.wav", made.tone()[:50])
    made.put(tmp_path / "b" / "long.wav", made.tone(1, seconds=2.0))
    with (
        pytest.warns(UserWarning, match=r"Sounds that are silent: 1, first 'a/silent\.wav'"),
        pytest.warns(UserWarning, match="padded"),
    ):
        splits = load(tmp_path, val_fraction=0.0)
    told = splits.info
    assert (told["silent"], told["shorter_than_a_frame"], told["longer_than_the_network_hears"]) == (1, 1, 1)
    assert told["longest_s"] == 2.0 and splits.train[0][0].shape == (32, 128)
    assert all(torch.isfinite(splits.train[i][0]).all() for i in range(len(splits.train)))


# ---- features and statistics


def test_features_are_those_of_the_front_end(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 2, "b": 2}, seconds=0.2)
    made.put(tmp_path / "b" / "long.wav", made.tone(1, seconds=1.0))
    splits = load(tmp_path, val_fraction=0.0, mean_std=(-5.0, 3.0))
    front = LogMel(32, -5.0, 3.0)
    for index, sample in enumerate(splits.train.samples):
        wave = torch.from_numpy(decode(sample.path).samples)
        torch.testing.assert_close(splits.train[index][0], front(wave[None])[0], atol=1e-5, rtol=0)
    assert splits.train[0][0][-1].eq(5 / 6).all()  # padded before the normalisation
    assert splits.info["preprocessing"]["statistics"] == "given"


def test_statistics_are_measured_once_and_kept(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 4, "b": 4}, seconds=0.2)
    splits = load(tmp_path)
    goal = Preprocess.from_dict(splits.info["preprocessing"])
    plain = [torch.nn.functional.pad(torch.from_numpy(v), (0, 0, 0, 32 - len(v))).double() for v in splits.train.cache]
    cells = torch.stack(plain)
    assert goal.mean == pytest.approx(float(cells.mean()), rel=1e-5)
    assert goal.std == pytest.approx(float(cells.std(correction=0)), rel=1e-5)
    x = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 0.5) < 1e-3
    again = load(tmp_path, splits.info["preprocessing"], val_fraction=0.5)  # an adapter's own numbers stay
    assert (again.train.reading.goal.mean, again.train.reading.goal.std) == (goal.mean, goal.std)
    assert load(tmp_path, statistics="esc50").val.reading.goal.mean == -6.6268077
    backbone = load(tmp_path, {**SMALL, "mean": -3.0, "std": 2.0}, statistics="backbone", verify="none")
    assert backbone.info["preprocessing"]["mean"] == -3.0 and backbone.info["in_memory"] == []
    unread = load(tmp_path, verify="none")  # training sounds are read for the numbers all the same
    assert unread.info["preprocessing"]["mean"] == goal.mean and unread.info["in_memory"] == ["train"]


def test_waveforms_for_backbones_that_hear_them(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 3, "b": 3}, seconds=0.2)
    made.put(tmp_path / "b" / "long.wav", made.tone(1, seconds=0.5))
    splits = load(tmp_path, {"input": "waveform", "normalize": True}, val_fraction=0.0)
    index = next(i for i, s in enumerate(splits.train.samples) if s.name == "b/long.wav")
    x, _ = splits.train[index]
    assert x.shape == splits.train[0][0].shape == (8000,)
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3 and not splits.train[0][0][3200:].any()
    assert load(tmp_path, {"input": "waveform"}, seconds=0.1).train[0][0].shape == (1600,)
    names, data = source.inputs([str(tmp_path / "a")], splits.info["preprocessing"])
    assert len(names) == 3 and data[0].shape == (8000,)
    assert Image.open(io.BytesIO(splits.thumbnail(splits.train, 0))).size[1] == 128
    with pytest.raises(ConfigError, match="spec-augment changes spectrograms"):
        load(tmp_path, {"input": "waveform"}, augment="spec-augment")


# ---- cache


def test_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.folder(tmp_path / "data", {"a": 3, "b": 3}, ".flac")
    fields = {"cache": str(tmp_path / "cache")}
    first = load(tmp_path / "data", **fields)
    entries = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(entries) == 6 and not list((tmp_path / "cache").rglob("*.part"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("peft_suite.audio.features.decode", refuse)
        second = load(tmp_path / "data", **fields)
        (tmp_path / "data" / "a" / "000.flac").rename(tmp_path / "data" / "a" / "renamed.flac")
        load(tmp_path / "data", **fields)
    assert all(torch.equal(first.train[i][0], second.train[i][0]) for i in range(len(first.train)))
    assert second.info["preprocessing"] == first.info["preprocessing"]
    entries[0].write_bytes(entries[0].read_bytes()[:40])  # damaged: made again
    load(tmp_path / "data", **fields)
    assert np.load(sorted((tmp_path / "cache").rglob("*.npz"))[0])["values"].ndim == 2
    made.put(tmp_path / "data" / "b" / "000.flac", made.tone(1, 99))  # other content: another entry
    load(tmp_path / "data", **fields)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 7
    load(tmp_path / "data", {"frames": 40}, **fields)  # another length: other entries
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 13


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    sound = made.put(tmp_path / "a.wav")
    (tmp_path / "file").write_text("in the way")
    from peft_suite.errors import StorageError

    with pytest.raises(StorageError, match="Cannot write"):
        FeatureCache(tmp_path / "file", {}).get(sound, lambda: (np.zeros(3), {}))

    def fail() -> Any:
        raise UnreadableError("no")

    with pytest.raises(UnreadableError):
        FeatureCache(tmp_path / "cache", {}).get(sound, fail)
    assert not (tmp_path / "cache").exists()


# ---- augmentation


@pytest.mark.parametrize("augment", ["spec-augment", "ast-speech-commands", "noise+shift+roll"])
def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path: Path, augment: str) -> None:
    made.folder(tmp_path, {"a": 4, "b": 4})
    one, two = (load(tmp_path, augment=augment, val_fraction=0.0).train for _ in range(2))
    first = [one[i][0] for i in range(len(one))]
    one.set_epoch(3)
    third = [one[i][0] for i in reversed(range(len(one)))][::-1]
    two.set_epoch(3)
    assert sum(not torch.equal(a, b) for a, b in zip(first, third, strict=True)) >= 6
    batches = DataLoader(two, batch_size=3, num_workers=1)
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack(third))
    state = torch.get_rng_state()
    one[0]
    assert torch.equal(torch.get_rng_state(), state)
    plain = load(tmp_path, augment=augment, val_fraction=0.25)
    quiet = load(
        tmp_path, val_fraction=0.25, mean_std=(plain.info["preprocessing"]["mean"], plain.info["preprocessing"]["std"])
    )
    assert torch.equal(plain.val[0][0], quiet.val[0][0])  # validation sounds are never changed


def test_masks_lie_where_each_recipe_puts_them(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 2, "b": 2}, seconds=0.4)
    before = load(tmp_path, augment="spec-augment-ast(freq=60, time=0)", val_fraction=0.0, mean_std=(-5, 3)).train
    after = load(tmp_path, augment="spec-augment(freq=60, time=0)", val_fraction=0.0, mean_std=(-5, 3)).train
    plain = load(tmp_path, val_fraction=0.0, mean_std=(-5, 3)).train
    for changed, value in ((before, 5 / 6), (after, 0.0)):
        masked = 0
        for epoch in range(5):
            changed.set_epoch(epoch)
            x, y = changed[0][0], plain[0][0]
            columns = (x != y).any(0)
            masked += int(columns.sum())
            assert torch.allclose(x[:, columns], torch.tensor(value)) and torch.equal(x[:, ~columns], y[:, ~columns])
        assert masked > 0


def test_mixup_mixes_waveforms_and_labels(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 3, "b": 3, "c": 3})
    train = load(tmp_path, augment="mixup(alpha=1, rate=1)", val_fraction=0.0, mean_std=(-5, 3)).train
    mixed = 0
    for epoch in range(4):
        train.set_epoch(epoch)
        for index in range(len(train)):
            x, y = train[index]
            assert y.shape == (3,) and float(y.sum()) == pytest.approx(1) and x.shape == (32, 128)
            mixed += int((y > 0).sum() == 2)
    assert mixed > 10 and train.target(0) == 0  # checks and class weights see plain labels


def test_configuration_is_checked() -> None:
    for fields, match in (
        ({"channel": -2}, "channel"),
        ({"mean_std": (1.0,)}, "two numbers"),
        ({"mean_std": (1.0, 0.0)}, "above 0"),
        ({"test_fraction": 0.9}, "leaves nothing"),
        ({"fold": 1, "speaker_out": "theo"}, "not both"),
        ({"classes": ("a", "a")}, "twice"),
        ({"seconds": -1}, "negative"),
    ):
        with pytest.raises(ConfigError, match=match):
            AudioDataConfig.from_dict({"root": "x", **fields})
    with pytest.raises(UnknownNameError, match="'esc50'"):
        AudioDataConfig(root="x", statistics="esc")
    with pytest.raises(UnknownNameError, match="augmentation"):
        AudioDataConfig(root="x", augment="spec")
    with pytest.raises(DataError, match="choose fbank or waveform"):
        Preprocess.from_dict({"input": "mfcc"})
    again = AudioDataConfig.from_dict(AudioDataConfig(root="x", mean_std=(-4, 4)).to_dict())
    assert again.mean_std == (-4.0, 4.0)


def test_fingerprint_and_memory(tmp_path: Path) -> None:
    made.folder(tmp_path, {"a": 5, "b": 5})
    kept, reread = load(tmp_path), load(tmp_path, cache_mib=0)
    assert kept.info["in_memory"] == ["train", "val"] and reread.info["in_memory"] == []
    assert kept.fingerprint == reread.fingerprint
    assert all(torch.equal(kept.val[i][0], reread.val[i][0]) for i in range(len(kept.val)))
    made.put(tmp_path / "a" / "000.wav", made.tone(seconds=0.4))
    assert load(tmp_path).fingerprint != kept.fingerprint


# ---- pictures and players


def test_pictures_and_sounds_of_the_report(tmp_path: Path) -> None:
    made.folder(tmp_path / "data", {"a": 2, "b": 2}, seconds=0.3)
    made.put(tmp_path / "data" / "b" / "long.wav", made.tone(1, seconds=4.0))
    splits = load(tmp_path / "data", {"frames": 500}, val_fraction=0.0)
    index = next(i for i, s in enumerate(splits.train.samples) if s.name == "b/long.wav")
    picture = Image.open(io.BytesIO(splits.thumbnail(splits.train, index)))
    assert picture.size == (250, 128)
    rows = np.asarray(picture.convert("L")).mean(1)
    assert abs(int(rows.argmax()) - (127 - 25)) < 20  # the tone of 600 Hz lies low
    for number, kind in ((0, "WAV"), (index, "OGG")):
        with soundfile.SoundFile(io.BytesIO(splits.sound(splits.train, number))) as sound:
            assert sound.format == kind and sound.samplerate == 16_000
    assert len(splits.sound(splits.train, index)) < 40_000
    assert np.abs(soundfile.read(io.BytesIO(encode(np.full(800, 3.0, np.float32), 8000)))[0]).max() <= 1
    examples = [
        {
            "split": "train",
            "index": i,
            "correct": i > 0,
            "target": "a",
            "prediction": "b",
            "probability": 0.6,
            "name": "x",
        }
        for i in (0, index)
    ]
    write_thumbnails(tmp_path, splits, examples)
    stored = json.loads((tmp_path / "examples.json").read_text())
    assert len(stored["png"]) == len(stored["audio"]) == 2
    assert base64.b64decode(stored["audio"][0])[:4] == b"RIFF" and base64.b64decode(stored["audio"][1])[:4] == b"OggS"
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "config": {}, "examples": examples}))
    html = write_report(tmp_path).read_text()
    assert html.count("<audio controls") == 2 and 'src="data:audio/ogg;base64,' in html and "gallery sounds" in html
    stored["audio"] = ["%%%", base64.b64encode(b"<script>").decode()]
    (tmp_path / "examples.json").write_text(json.dumps(stored))
    assert "<audio" not in write_report(tmp_path).read_text()
