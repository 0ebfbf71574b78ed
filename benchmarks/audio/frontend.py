"""Front end: milliseconds per clip on one core, ours against torchaudio's filter bank and ASTFeatureExtractor.

    python benchmarks/audio/frontend.py [--rounds 60] [--quick] [--out benchmarks/audio/results]

Clips of 10 s and 1 s at 16 kHz, 128 mel filters. "filter bank" compares log-mel frames, "features" all from numpy
samples to the padded and normalised tensor (T = 1024 or 128), "gradient" forward and backward, "resampling" 5 s from
44.1 to 16 kHz. Outputs are compared first; then every round runs each contestant once, in alternating order, and the
speed-up is the median of the rounds' ratios with its 95 % interval. One thread does everything, so that its processor
time is taken, which other programs on the machine disturb less than the clock on the wall. With a GPU, rows of batch 64
follow (wall time), against torchaudio clip by clip on the same GPU and on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchaudio
import transformers
from torch import Tensor
from torchaudio.compliance import kaldi

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
import measure

from peft_suite.audio.frontend.fbank import FilterBank
from peft_suite.audio.frontend.logmel import LogMel
from peft_suite.audio.frontend.resample import resample

RATE, BINS = 16_000, 128
FRAMES = {10: 1024, 1: 128}


def clip(seconds: float, seed: int = 0, rate: int = RATE) -> Tensor:
    """Noise and a tone."""
    make = torch.Generator().manual_seed(seed)
    n = int(seconds * rate)
    return 0.1 * torch.randn(n, generator=make) + 0.3 * (0.05 * (seed + 1) * torch.arange(n)).sin()


def torchaudio_fbank(x: Tensor) -> Tensor:
    """Log-mel frames of one clip ``[n]``."""
    frames: Tensor = kaldi.fbank(x.unsqueeze(0), sample_frequency=RATE, window_type="hanning", num_mel_bins=BINS)
    return frames


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, times: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of ``times`` calls of each in every round, in alternating order."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            measure.synchronise()
            start = clock()
            for _ in range(times):
                calls[name]()
            measure.synchronise()
            taken[name].append(clock() - start)
    return {name: values[2:] for name, values in taken.items()}


def compare(
    case: str,
    against: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    rounds: int,
    *,
    clips: int = 1,
    times: int = 1,
    theirs_clips: int | None = None,
    tolerance: float = 1e-5,
    gpu: bool = False,
) -> dict[str, Any]:
    """Milliseconds per clip of both and the speed-up; ``times`` calls make one round."""
    mine, other = ours(), theirs()
    error = float((mine - other).abs().max()) if mine is not None and mine.shape == other.shape else None
    assert error is None or error <= tolerance, f"{case}: outputs differ by {error:.1e}"

    taken = interleaved({"ours": ours, "theirs": theirs}, rounds, times, time.perf_counter if gpu else time.thread_time)
    each = {"ours": times * clips, "theirs": times * (theirs_clips or clips)}
    ms = {name: [1e3 * t / each[name] for t in values] for name, values in taken.items()}
    row: dict[str, Any] = {"case": case, "against": against, "max_difference": error}
    row |= {f"{name}_ms": round(statistics.median(values), 4) for name, values in ms.items()}
    row |= {f"{name}_ms_best": round(min(values), 4) for name, values in ms.items()}
    return row | {
        k: round(v, 2) for k, v in zip(("speedup", "low", "high"), measure.ratio(ms["theirs"], ms["ours"]).values())
    }


def backward(call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of the sum; the gradient."""
    x = x.clone().requires_grad_()

    def run() -> Tensor:
        x.grad = None
        call(x).sum().backward()
        assert x.grad is not None
        return x.grad / x.grad.abs().max()

    return run


def cpu_rows(rounds: int) -> list[dict[str, Any]]:
    """One core."""
    bank, rows = FilterBank(num_mel_bins=BINS), []
    for seconds, frames in FRAMES.items():
        x, times = clip(seconds), 10 // seconds
        front = LogMel(frames)
        extractor = transformers.ASTFeatureExtractor(max_length=frames)
        samples = x.numpy()

        def extracted(batch: Any, extractor: Any = extractor) -> Tensor:
            made: Tensor = extractor(batch, sampling_rate=RATE, return_tensors="pt")["input_values"]
            return made

        name = f"{seconds} s"
        rows += [
            compare(
                f"filter bank, {name}",
                "torchaudio",
                lambda x=x: bank(x),
                lambda x=x: torchaudio_fbank(x),
                rounds,
                times=times,
            ),
            compare(
                f"features, {name}",
                "ASTFeatureExtractor",
                lambda s=samples, front=front: front(torch.from_numpy(s)).unsqueeze(0),
                lambda s=samples, get=extracted: get(s),
                rounds,
                times=times,
            ),
        ]
        batch = torch.stack([clip(seconds, i) for i in range(16)])
        rows.append(
            compare(
                f"features, {name}, batch 16",
                "ASTFeatureExtractor",
                lambda b=batch, front=front: front(b),
                lambda b=batch, get=extracted: get([row.numpy() for row in b]),
                max(5, rounds // 4),
                clips=16,
            )
        )
    x = clip(10)
    rows.append(
        compare(
            "gradient, 10 s",
            "torchaudio",
            backward(bank, x),
            backward(torchaudio_fbank, x),
            max(5, rounds // 4),
            tolerance=1e-4,
        )
    )
    high = clip(5, rate=44_100)
    rows.append(
        compare(
            "resampling 44.1 to 16 kHz, 5 s",
            "torchaudio",
            lambda: resample(high, 44_100, RATE),
            lambda: torchaudio.functional.resample(high, 44_100, RATE),
            rounds,
            tolerance=5e-5,
        )
    )
    return rows


def gpu_rows(rounds: int) -> list[dict[str, Any]]:
    """Batch 64 on the GPU; the peers take four clips per round, one after the other."""
    batch = torch.stack([clip(10, i) for i in range(64)])
    here, front = batch.cuda(), LogMel(1024)
    few = [("torchaudio on the GPU", here[:4]), ("torchaudio on one core", batch[:4])]
    return [
        compare(
            "features, 10 s, batch 64, GPU",
            against,
            lambda: front(here),
            lambda clips=clips: torch.stack([torchaudio_fbank(c) for c in clips]),
            rounds,
            clips=64,
            theirs_clips=4,
            gpu=True,
        )
        for against, clips in few
    ]


def main() -> None:
    """Run every case, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="15 rounds, nothing stored")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 15 if args.quick else args.rounds
    rows = cpu_rows(rounds) + (gpu_rows(rounds) if torch.cuda.is_available() else [])
    for row in rows:
        error = "" if row["max_difference"] is None else f"  max difference {row['max_difference']:.1e}"
        print(
            f"{row['case']:32s} ours {row['ours_ms']:8.3f} ms  {row['against']:22s} {row['theirs_ms']:8.3f} ms  "
            f"{row['speedup']:.2f}x faster ({row['low']:.2f} to {row['high']:.2f}){error}"
        )
    if not args.quick:
        versions = {m.__name__: m.__version__ for m in (torch, torchaudio, transformers)}
        facts = {
            "what": "milliseconds of processor time per clip, one thread; GPU rows wall time",
            "rounds": rounds,
            "machine": measure.machine(),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**facts, "versions": versions, "rows": rows}, indent=2)
        (args.out / "frontend.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
