"""Tiny sounds and data sets in the layouts of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

Array = np.ndarray[Any, Any]


def tone(label: int = 0, number: int = 0, seconds: float = 0.3, rate: int = 16_000) -> Array:
    """A tone whose pitch tells the label, with a little noise, float32 [n]."""
    rng = np.random.default_rng([label, number])
    t = np.arange(round(seconds * rate)) / rate
    pitch = 300.0 * 2**label * (1 + 0.02 * rng.standard_normal())
    return (0.3 * np.sin(2 * np.pi * pitch * t) + 0.01 * rng.standard_normal(len(t))).astype(np.float32)


def put(path: Path, samples: Array | None = None, rate: int = 16_000, **more: Any) -> Path:
    """One file; its format is told by the name, or by ``format``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone() if samples is None else samples, rate, **more)
    return path


def folder(root: Path, classes: dict[str, int], suffix: str = ".wav", **more: Any) -> Path:
    for label, (name, size) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(size):
            put(root / name / f"{i:03d}{suffix}", tone(label, i, **more))
    return root


def table(path: Path, rows: Sequence[str], header: str = "path,label") -> Path:
    """A table and the sounds that its first column names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    for number, row in enumerate(rows):
        put(path.parent / row.split(",")[0], tone(number % 3, number))
    return path


def esc50(root: Path, classes: Sequence[str] = ("dog", "rooster"), folds: int = 5, each: int = 1) -> Path:
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, folds + 1):
        for target, name in enumerate(classes):
            for take in range(each):
                file = f"{fold}-10{fold}{take}-A-{target}.wav"
                rows.append(f"{file},{fold},{target},{name},False,10{fold}{take},A")
                put(root / "audio" / file, tone(target, fold * 10 + take))
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return root


def urbansound8k(root: Path, folds: int = 10) -> Path:
    rows = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, folds + 1):
        for number, name in enumerate(("air_conditioner", "car_horn", "siren")):
            file = f"{100 + fold}-{number}-0-0.wav"
            rows.append(f"{file},{100 + fold},0.0,0.3,1,{fold},{number},{name}")
            put(root / "audio" / f"fold{fold}" / file, tone(number, fold))
    (root / "metadata").mkdir(parents=True, exist_ok=True)
    (root / "metadata" / "UrbanSound8K.csv").write_text("\n".join(rows) + "\n")
    return root


def speech_commands(root: Path, words: Sequence[str] = ("yes", "bed", "no")) -> Path:
    for label, word in enumerate(words):
        for speaker in ("a1", "b2", "c3"):
            put(root / word / f"{speaker}_nohash_0.wav", tone(label, ord(speaker[0])))
    put(root / "_background_noise_" / "hum.wav")
    (root / "validation_list.txt").write_text("".join(f"{w}/b2_nohash_0.wav\n" for w in words))
    (root / "testing_list.txt").write_text("".join(f"{w}/c3_nohash_0.wav\n" for w in words))
    return root


def fluent_speech(root: Path, intents: Sequence[str]) -> Path:
    for split, count in (("train", 2), ("valid", 1), ("test", 1)):
        rows = [",path,speakerId,transcription,action,object,location"]
        for number, intent in enumerate(intents):
            for i in range(count):
                file = f"wavs/speakers/s{number}/{split}{i}.wav"
                rows.append(f'{len(rows)},{file},s{number},"Please, do it",{intent}')
                put(root / file, tone(number % 4, i))
        (root / "data").mkdir(parents=True, exist_ok=True)
        (root / "data" / f"{split}_data.csv").write_text("\n".join(rows) + "\n")
    return root


def fsdd(root: Path, digits: int = 2, speakers: Sequence[str] = ("theo", "lucas", "nicolas"), count: int = 8) -> Path:
    for digit in range(digits):
        for who, speaker in enumerate(speakers):
            for i in range(count):
                put(root / "recordings" / f"{digit}_{speaker}_{i}.wav", tone(digit, who * 50 + i, rate=8000), 8000)
    return root
