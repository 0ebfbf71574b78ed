"""The pictures of the audio pages, from generated sounds and from what audio_walk.sh wrote.

python audio_figures.py FOLDER                # audio-input.png
python audio_figures.py FOLDER --walk walk    # audio-long.png too
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt
import soundfile
from PIL import Image

from peft_suite.audio.frontend.augment import spec_augment
from peft_suite.audio.frontend.fbank import FilterBank
from peft_suite.audio.frontend.logmel import LogMel, measure_statistics
from peft_suite.audio.micro import ARCHITECTURE
from peft_suite.audio.synth import sound

FRAMES, BINS, PATCH = ARCHITECTURE["max_length"], ARCHITECTURE["num_mel_bins"], 16
SHOWN = 12.0  # seconds of the long recording


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the pictures")
    parser.add_argument("--walk", type=Path, help="folder that audio_walk.sh was run in")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    save(network_input(), options.folder / "audio-input.png")
    if options.walk:
        save(long_recording(options.walk), options.folder / "audio-long.png")


def network_input() -> Any:
    """A short sound on its way into the network: log-mel, filled and normalised in patches, masked in training."""
    wave = torch.from_numpy(sound("bird", 3))[:9600]  # 0.6 s
    bank = FilterBank(num_mel_bins=BINS)
    raw = LogMel(FRAMES, num_mel_bins=BINS)
    mean, std = measure_statistics([raw.features([torch.from_numpy(sound("bird", n)) for n in range(8)])])
    x = LogMel(FRAMES, mean, std, num_mel_bins=BINS)(wave)
    masked = spec_augment(x[None], 16, 24, generator=torch.Generator().manual_seed(5))[0]
    pictures = (
        ("log-mel, 0.6 s of sound", bank(wave), None),
        ("filled to 0.975 s, normalised, 4 x 6 patches", x, PATCH),
        ("training: a band and a stretch masked", masked, None),
    )
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for axis, (title, values, grid) in zip(axes, pictures, strict=True):
        axis.imshow(values.T.numpy(), origin="lower", aspect="auto", cmap="magma", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("frame (10 ms)", fontsize=8)
        axis.set_xlim(-0.5, FRAMES - 0.5)
        axis.tick_params(labelsize=7)
        for line in range(grid or 0, FRAMES if grid else 0, grid or 1):
            axis.axvline(line - 0.5, color="white", linewidth=0.6)
        for line in range(grid or 0, BINS if grid else 0, grid or 1):
            axis.axhline(line - 0.5, color="white", linewidth=0.6)
    axes[0].set_ylabel("mel bin", fontsize=8)
    return figure


def long_recording(walk: Path) -> Any:
    """The beginning of ``long.flac``: what is spoken, and what the sliding window makes of it."""
    samples, rate = soundfile.read(walk / "long.flac", frames=int(SHOWN * 8000))
    wave = torch.from_numpy(np.asarray(samples, np.float32))
    values = FilterBank(sample_rate=rate, num_mel_bins=64, high_freq=rate / 2)(wave)
    spoken = [(float(r["start"]), float(r["end"]), r["word"]) for r in rows(walk / "long.csv")]
    heard = [
        (float(r["start"]), float(r["end"]), r["prediction"], float(r["probability"]))
        for r in rows(walk / "long-predicted.csv")
    ]
    words = sorted({word for *_, word in spoken})
    colors = dict(zip(words, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=False))
    others = {name: "0.6" for _, _, name, _ in heard if name not in colors}
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(10, 3.6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    extent = (0, SHOWN, 0, 64)
    top.imshow(values.T.numpy(), origin="lower", aspect="auto", cmap="magma", extent=extent)
    for start, end, word in spoken:
        if end < SHOWN:
            top.axvspan(start, end, 0.9, 1.0, color=colors[word])
            top.text((start + end) / 2, 56, word, ha="center", va="top", fontsize=8, color="white")
    top.set_ylabel("mel bin", fontsize=8)
    for word, color in {**colors, **others}.items():
        mine = [((s + e) / 2, p) for s, e, name, p in heard if name == word and (s + e) / 2 < SHOWN]
        below.scatter(*zip(*mine, strict=True), s=14, color=color, label=word) if mine else None
    for start, end, word in spoken:
        below.axvspan(start, min(end, SHOWN), color=colors[word], alpha=0.25, linewidth=0)
    below.set_xlim(0, SHOWN)
    below.set_ylim(0, 1.05)
    below.set_xlabel("seconds; a dot is the middle of a window, shaded is what is spoken", fontsize=8)
    below.set_ylabel("probability", fontsize=8)
    below.legend(fontsize=7, ncols=len(words) + len(others), loc="lower right")
    for axis in (top, below):
        axis.tick_params(labelsize=7)
    return figure


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=100)
    plt.close(figure)
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(file, optimize=True)
    size = file.stat().st_size
    if size > 150_000:
        raise SystemExit(f"{file} has {size:,} bytes, more than 150,000.")
    print(f"{file}  {size:,} bytes")


if __name__ == "__main__":
    main()
