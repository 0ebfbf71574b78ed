"""Recordings to walk through the guide with, made from the Free Spoken Digit Dataset.

    python audio_data.py FSDD --out .             # words/, long.flac and long.csv
    python audio_data.py FSDD --out . --broken    # two useless files more, in words/

``words/train/WORD/*.wav`` and ``words/test/WORD/*.wav`` stand for your folder per class: four words, the recordings of
index 0 to 4 test. ``long.flac`` is a minute of test recordings with pauses; ``long.csv`` says what is spoken when.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import soundfile

WORDS = {"0": "zero", "1": "one", "2": "two", "3": "three"}
SECONDS = 60
RATE = 8000


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
    test = []
    for file in files:
        digit, _, index = file.stem.split("_")
        split = "test" if int(index) < 5 else "train"
        place = options.out / "words" / split / WORDS[digit] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        test += [place] if split == "test" else []
    print(f"{len(files)} files of {len(WORDS)} words written to {options.out / 'words'}")
    if options.broken:
        broken = options.out / "words" / "train" / "zero"
        (broken / "empty.wav").write_bytes(b"")
        whole = test[0].read_bytes()
        (broken / "cut-off.wav").write_bytes(whole[: len(whole) // 2])
        print(f"2 broken files written to {broken}")
    spoken = concatenate(test, options.out / "long.flac", options.out / "long.csv")
    print(f"{SECONDS} s with {spoken} words written to {options.out / 'long.flac'}")


def concatenate(files: list[Path], sound: Path, table: Path) -> int:
    """Random recordings with pauses of 0.6 to 2 s on a little noise; returns how many."""
    rng = np.random.default_rng(0)
    long = 1e-3 * rng.standard_normal(SECONDS * RATE)
    at, rows = round(0.5 * RATE), []
    for number in rng.permutation(len(files)):
        samples, rate = soundfile.read(files[number])
        if rate != RATE:
            raise SystemExit(f"{files[number]} has {rate} samples a second, not {RATE}.")
        if at + len(samples) > len(long):
            break
        long[at : at + len(samples)] += samples
        rows.append([f"{at / RATE:.2f}", f"{(at + len(samples)) / RATE:.2f}", files[number].parent.name])
        at += len(samples) + round(rng.uniform(0.6, 2.0) * RATE)
    soundfile.write(sound, long, RATE)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["start", "end", "word"], *rows])
    return len(rows)


if __name__ == "__main__":
    main()
