"""Recordings to walk through the guide with, made from the Free Spoken Digit Dataset.

    python audio_data.py FSDD --out .             # words/, long.flac and long.csv
    python audio_data.py FSDD --out . --broken    # two useless files more, in words/

``words/train/WORD/*.wav`` and ``words/test/WORD/*.wav`` stand for your folder per class: seconds of a noisy room in
which one of four words is spoken, or nothing ("pause"); the recordings of index 0 to 4 test. ``long.flac`` is a minute
of test recordings in the same room; ``long.csv`` says what is spoken when.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

WORDS = {"0": "zero", "1": "one", "2": "two", "3": "three"}
PAUSES = {"train": 270, "test": 30}
SECONDS = 60
RATE = 8000
NOISE = 1e-3
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fsdd", type=Path, help="folder of the data set, or its recordings")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--broken", action="store_true", help="put an empty and a truncated file among the words")
    options = parser.parse_args()
    folder = options.fsdd / "recordings" if (options.fsdd / "recordings").is_dir() else options.fsdd
    files = sorted(p for digit in WORDS for p in folder.glob(f"{digit}_*_*.wav"))
    if not files:
        raise SystemExit(f"No recording such as 0_jackson_7.wav in {folder}.")
    rng = np.random.default_rng(1)
    test = []
    for file in files:
        digit, _, index = file.stem.split("_")
        split = "test" if int(index) < 5 else "train"
        write(options.out / "words" / split / WORDS[digit] / file.name, room(read(file), rng))
        test += [file] if split == "test" else []
    for split, count in PAUSES.items():
        for number in range(count):
            write(options.out / "words" / split / "pause" / f"{number:03d}.wav", room(np.zeros(0), rng))
    total = len(files) + sum(PAUSES.values())
    print(f"{total} seconds with one of {len(WORDS)} words or a pause written to {options.out / 'words'}")
    if options.broken:
        broken = options.out / "words" / "train" / "zero"
        (broken / "empty.wav").write_bytes(b"")
        whole = files[0].read_bytes()
        (broken / "cut-off.wav").write_bytes(whole[: len(whole) // 2])
        print(f"2 broken files written to {broken}")
    spoken = concatenate(test, options.out / "long.flac", options.out / "long.csv")
    print(f"{SECONDS} s with {spoken} words written to {options.out / 'long.flac'}")


def read(file: Path) -> Array:
    """Samples ``[n]``."""
    samples, rate = soundfile.read(file)
    if rate != RATE:
        raise SystemExit(f"{file} has {rate} samples a second, not {RATE}.")
    found: Array = samples
    return found


def write(file: Path, samples: Array) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, RATE)


def room(word: Array, rng: np.random.Generator) -> Array:
    """A second of noise with a word at any time, its ends possibly cut off."""
    second = NOISE * rng.standard_normal(RATE)
    word = word[:RATE]
    middle = rng.integers(0, RATE) if len(word) else 0
    start = middle - len(word) // 2
    first, last = max(start, 0), min(start + len(word), RATE)
    second[first:last] += word[first - start : last - start]
    return second


def concatenate(files: list[Path], sound: Path, table: Path) -> int:
    """Random recordings with pauses of 0.6 to 2 s on the same noise; returns how many."""
    rng = np.random.default_rng(0)
    long = NOISE * rng.standard_normal(SECONDS * RATE)
    at, rows = round(0.5 * RATE), []
    for number in rng.permutation(len(files)):
        samples = read(files[number])
        if at + len(samples) > len(long):
            break
        long[at : at + len(samples)] += samples
        word = WORDS[files[number].name[0]]
        rows.append([f"{at / RATE:.2f}", f"{(at + len(samples)) / RATE:.2f}", word])
        at += len(samples) + round(rng.uniform(0.6, 2.0) * RATE)
    soundfile.write(sound, long, RATE)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["start", "end", "word"], *rows])
    return len(rows)


if __name__ == "__main__":
    main()
