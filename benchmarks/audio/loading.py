"""Data loading: clips per second on one core from sound files to batches, our data source against plain loops.

    python benchmarks/audio/loading.py --clips 64 --rounds 7 --out benchmarks/audio/results
    python benchmarks/audio/loading.py --quick

Generated mono clips of 1 and 10 s in wav (16 bit), flac, ogg (Vorbis) and mp3, at 16 and 44.1 kHz, become batches of 32
normalised log-mel tensors at 16 kHz (T = 128 or 1024). Everything is decoding, resampling, features, padding and
collation; files are in the system's cache, one thread, no worker processes, processor time. Ours is the plugin's data
set behind the training loop's loader:

    decoding        every clip is decoded in every epoch, as with data.verify=none
    filling         the same into an empty feature cache on disk (data.cache)
    cached          from that cache
    in memory       what a run does by default from its second epoch on

Peers are what a training script usually does per clip, behind torch's DataLoader: soundfile and transformers'
ASTFeatureExtractor, and torchaudio.load with torchaudio's filter bank, where torchaudio can be imported and decode
(from 2.9 on it needs TorchCodec). Both resample with torchaudio; without it only 16 kHz is compared. First outputs are
compared, then rounds alternate; ratios are medians over the rounds with a 95 % interval, above 1 means that ours
decodes faster.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from peft_suite.audio.data import AudioDataConfig, source
from peft_suite.audio.frontend.logmel import STATISTICS
from peft_suite.train.loader import batches, epoch_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peers_cpu
from measure import interleaved, machine, markdown, ratio, show

RATE, BATCH = 16_000, 32
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
RATES = (16_000, 44_100)
FRAMES = {1: 128, 10: 1024}
PEERS = {"extractor": "ASTFeatureExtractor", "torchaudio": "torchaudio"}
OURS = ("decoding", "filling", "cached", "in memory")
MEAN, STD, _ = STATISTICS["audioset"]
TOLERANCE = 5e-3  # of normalised features; torchaudio's own rounding reaches a tenth of it in quiet filters


def write_clips(root: Path, count: int, seconds: int, kind: str, rate: int) -> None:
    """Noise and chirps of two classes."""
    rng = np.random.default_rng(0)
    t = np.arange(seconds * rate) / rate
    for i in range(count):
        chirp = np.sin(2 * np.pi * (rng.uniform(100, 800) + rng.uniform(100, 2000) / seconds * t) * t)
        file = root / f"class{i % 2}" / f"{i:04d}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.3 * chirp + 0.1 * rng.standard_normal(len(t))
        soundfile.write(file, samples.astype(np.float32), rate, format=kind.upper(), subtype=FORMATS[kind])


class Ours:
    """Epochs of the training loop's loader over the plugin's data."""

    def __init__(self, root: Path, frames: int, **fields: Any) -> None:
        config = AudioDataConfig(root=str(root), val_fraction=0.0, statistics="audioset", **fields)
        self.data: Any = source.load(config, {"frames": frames}).train
        self.plan = epoch_plan(len(self.data), BATCH, 1, seed=0, epoch=0)

    def __iter__(self) -> Iterator[Tensor]:
        return (step[0][0] for step in batches(self.data, self.plan))


class Filling(Ours):
    """With a feature cache that is empty at the start of every epoch."""

    def __init__(self, root: Path, frames: int, folder: Path, **fields: Any) -> None:
        super().__init__(root, frames, cache=str(folder), **fields)
        self.folders = (folder / str(i) for i in itertools.count())

    def __iter__(self) -> Iterator[Tensor]:
        self.data.reading.cache.folder = next(self.folders)
        return super().__iter__()


class Plain(Dataset[Tensor]):
    """``features`` of every file."""

    def __init__(self, files: Sequence[str], features: Callable[[str], Tensor]) -> None:
        self.files, self.features = files, features

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.features(self.files[index])


def extractor(frames: int, torchaudio: Any) -> Callable[[str], Tensor]:
    """soundfile and transformers."""
    extract = transformers.ASTFeatureExtractor(max_length=frames)

    def features(file: str) -> Tensor:
        samples, rate = soundfile.read(file, dtype="float32")
        if rate != RATE:
            samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()
        found: Tensor = extract(samples, sampling_rate=RATE, return_tensors="pt")["input_values"][0]
        return found

    return features


def all_torchaudio(frames: int, torchaudio: Any) -> Callable[[str], Tensor]:
    """torchaudio alone, as in the original AST code."""
    kaldi = importlib.import_module("torchaudio.compliance.kaldi")

    def features(file: str) -> Tensor:
        samples, rate = torchaudio.load(file)
        if rate != RATE:
            samples = torchaudio.functional.resample(samples, rate, RATE)
        x = kaldi.fbank(
            samples - samples.mean(),
            htk_compat=True,
            sample_frequency=RATE,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        x = nn.functional.pad(x, (0, 0, 0, max(0, frames - len(x))))[:frames]
        return (x - MEAN) / (2 * STD)

    return features


def usable(folder: Path) -> tuple[Any, dict[str, str]]:
    """(torchaudio or None, why a peer cannot run)."""
    try:
        import torchaudio
    except Exception as error:  # a build for another CUDA raises RuntimeError
        return None, {"torchaudio": f"cannot be imported: {error}", "resampling": "needs torchaudio"}
    write_clips(folder, 1, 1, "wav", RATE)
    try:
        torchaudio.load(str(next(folder.rglob("*.wav"))))
    except Exception as error:
        return torchaudio, {"torchaudio": f"cannot decode: {str(error).splitlines()[0]}"}
    return torchaudio, {}


def measure_case(
    folder: Path, clips: int, rounds: int, seconds: int, kind: str, rate: int, torchaudio: Any, missing: Any
) -> dict[str, Any]:
    """Clips per second of every contestant, and the ratios of ours to the peers."""
    root, frames = folder / "clips", FRAMES[seconds]
    write_clips(root, clips, seconds, kind, rate)
    loaders: dict[str, Any] = {
        "decoding": Ours(root, frames, verify="none"),
        "filling": Filling(root, frames, folder / "filling", verify="none"),
        "cached": Ours(root, frames, verify="none", cache=str(folder / "cache")),
        "in memory": Ours(root, frames),
    }
    data = loaders["decoding"].data
    order = [micro.indices for step in loaders["decoding"].plan for micro in step]
    files = [str(data.samples[i].path) for i in range(len(data))]
    if rate == RATE or torchaudio is not None:
        peers = {"extractor": extractor(frames, torchaudio)}
        if "torchaudio" not in missing:
            peers["torchaudio"] = all_torchaudio(frames, torchaudio)
        loaders |= {name: DataLoader(Plain(files, make), batch_sampler=order) for name, make in peers.items()}
    first = {name: next(iter(loader)) for name, loader in loaders.items()}
    errors = {name: float((x - first["decoding"]).abs().max()) for name, x in first.items() if name != "decoding"}
    assert max(errors.values()) < TOLERANCE, f"{kind} {rate} Hz {seconds} s: outputs differ by {errors}"

    calls = {name: lambda loader=loader: sum(len(x) for x in loader) for name, loader in loaders.items()}
    times = interleaved(calls, rounds, warmup=int(clips > BATCH), clock=time.process_time)  # every file was seen once
    row: dict[str, Any] = {"format": kind, "rate": rate, "seconds": seconds}
    row |= {f"{name}_per_s": round(clips / statistics.median(taken), 1) for name, taken in times.items()}
    for name in PEERS.keys() & loaders.keys():
        row[f"x_{name}"] = {key: round(value, 2) for key, value in ratio(times[name], times["decoding"]).items()}
        row[f"difference_{name}"] = errors[name]
    return row


def cells_of(row: dict[str, Any], missing: Any) -> dict[str, str]:
    """A row for people, without the peer that is missing."""
    made = {"clips": f"{row['seconds']} s, {row['rate'] / 1000:g} kHz, {row['format']}"}
    made |= {name: f"{row[f'{name}_per_s']:,.0f}" for name in OURS}
    for name in PEERS if "torchaudio" not in missing else ("extractor",):
        found = row.get(f"x_{name}")
        made[PEERS[name]] = f"{row[f'{name}_per_s']:,.0f}" if found else ""
        made[f"decoding / {PEERS[name]}"] = (
            f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""
        )
    errors = [value for key, value in row.items() if key.startswith("difference_")]
    return {**made, "differ by": f"{max(errors):.0e}" if errors else ""}


def main(argv: Sequence[str] | None = None) -> None:
    """Write clips, run every case, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, help="of a case: 64; with --quick 8")
    parser.add_argument("--rounds", type=int, help="7; with --quick 2")
    parser.add_argument("--formats", default=",".join(FORMATS), help="some of wav,flac,ogg,mp3")
    parser.add_argument("--quick", action="store_true", help="fewer clips and rounds: seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args(argv)
    peers_cpu.pin(1)
    clips, rounds = args.clips or (8 if args.quick else 64), args.rounds or (2 if args.quick else 7)
    formats = args.formats.split(",")
    if wrong := [kind for kind in formats if kind not in FORMATS]:
        parser.error(f"--formats: {wrong[0]!r} is none of {', '.join(FORMATS)}")
    with tempfile.TemporaryDirectory() as temporary:
        torchaudio, missing = usable(Path(temporary) / "probe")
        for name, reason in missing.items():
            print(f"left out: {name} {reason}", file=sys.stderr)
        rows = []
        for seconds, rate, kind in itertools.product(FRAMES, RATES, formats):
            with tempfile.TemporaryDirectory(dir=temporary) as folder:
                rows.append(measure_case(Path(folder), clips, rounds, seconds, kind, rate, torchaudio, missing))
            print(f"{seconds} s, {rate} Hz, {kind}: {rows[-1]['decoding_per_s']:.0f}/s", file=sys.stderr)
    modules = [torch, transformers, soundfile, *([] if torchaudio is None else [torchaudio])]
    versions = {m.__name__: m.__version__ for m in modules} | {"libsndfile": soundfile.__libsndfile_version__}
    facts = {"what": "clips per second of processor time, one core", "clips": clips, "rounds": rounds}
    result = {**facts, "machine": machine(), "versions": versions, "left_out": missing, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"loading{'-quick' if args.quick else ''}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    cells = [cells_of(row, missing) for row in rows]
    title = f"Clips per second on one core, {machine()}"
    show(title, cells)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    path.with_suffix(".md").write_text(f"{markdown(cells)}\n{title}, {rounds} rounds. {told}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
