"""Make the weights of the embedded micro AST: ``python -m peft_suite.audio.pretrain_micro``.

Supervised training on sounds that are made as training goes: which classes of :data:`peft_suite.audio.synth.SOURCE` are
heard in a clip? Half of the clips hold two sounds, mixed in the domain of their mel energies:

    x = log(exp a + exp(b + g))          g: -10 to 10 dB
    loss = CE(head(mean of tokens), (class of a + class of b) / 2)

and all are moved in time. ``--minutes`` times the first steps and fixes their number; ``--steps`` with that number
gives the same weights on the same machine. What is interrupted goes on with ``--resume``. At the end, ridge classifiers
on frozen features tell what was learnt.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from peft_suite.audio import micro, shifted, synth
from peft_suite.audio.frontend.fbank import FilterBank
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.storage import write_bytes
from peft_suite.train import pretraining

BATCH = 128
ROUND = 50  # steps between lines, and between checkpoints
POOL = 4096  # sounds to draw from
RENEWED = 32  # of them in every step
MIXED = 0.5  # share of clips with two sounds
LOUDER = 10.0  # dB that the second one is louder or softer at most
MOVED = 24  # frames that a clip is moved at most
FRAMES, BINS = micro.ARCHITECTURE["max_length"], micro.ARCHITECTURE["num_mel_bins"]

Array = np.ndarray[Any, Any]


class Classes(nn.Module):
    """The backbone with a head for the source classes."""

    def __init__(self, backbone: AudioClassifier) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(micro.ARCHITECTURE["hidden_size"], len(synth.SOURCE))

    def forward(self, features: Tensor, goal: Tensor) -> Tensor:
        """The loss of features ``[B, 96, 64]`` whose classes have the shares ``[B, C]``."""
        return functional.cross_entropy(self.head(self.backbone(features)), goal)


class Stream:
    """Batches of sounds. The pool at a step is the sounds of a window of numbers, so a run can go on."""

    def __init__(self, seed: int, pool: int = POOL) -> None:
        self.seed, self.pool = seed, pool
        self.features = np.empty((pool, FRAMES, BINS), np.float32)
        self.made = 0  # sounds so far

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Features ``[B, 96, 64]``, normalised, and the shares of the classes ``[B, C]``."""
        self._renew(step)
        rng = np.random.default_rng([self.seed, step])
        one, two = rng.choice(self.pool, BATCH, replace=False), rng.choice(self.pool, BATCH, replace=False)
        gain = rng.uniform(-LOUDER, LOUDER, BATCH) * math.log(10) / 10
        gain[rng.random(BATCH) >= MIXED] = -np.inf  # one sound alone
        x = np.logaddexp(self.features[one], self.features[two] + gain[:, None, None].astype(np.float32))
        when = (np.arange(FRAMES) - rng.integers(-MOVED, MOVED + 1, BATCH)[:, None]) % FRAMES
        x = np.take_along_axis(x, when[:, :, None], axis=1)
        # the window of a pool starts at a multiple of RENEWED, and place p holds the number that is p modulo the pool
        first = step * RENEWED
        goal = np.zeros((BATCH, len(synth.SOURCE)), np.float32)
        for rows, share in ((one, np.where(np.isinf(gain), 1.0, 0.5)), (two, np.where(np.isinf(gain), 0.0, 0.5))):
            numbers = first + (rows - first) % self.pool
            goal[np.arange(BATCH), numbers % len(synth.SOURCE)] += share.astype(np.float32)
        return normalized(torch.from_numpy(x)), torch.from_numpy(goal)

    def _renew(self, step: int) -> None:
        last = step * RENEWED + self.pool
        for number in range(max(self.made, step * RENEWED), last):
            self.features[number % self.pool] = log_mel(source(self.seed, number))
        self.made = last


def source(seed: int, number: int) -> Array:
    """A sound of the source classes, which take turns: ``[16000]``."""
    names = tuple(synth.SOURCE)
    return synth.sound(names[number % len(names)], number // len(names), seed)


def log_mel(samples: Array) -> Array:
    """``[16000] -> [96, 64]``."""
    energies: Array = _bank()(torch.from_numpy(samples))[:FRAMES].numpy()
    return energies


@functools.cache
def _bank() -> FilterBank:
    return FilterBank(sample_rate=synth.RATE, num_mel_bins=BINS)


def normalized(features: Tensor) -> Tensor:
    """As the data loader does it."""
    mean, std = micro.STATISTICS
    return (features - mean) / (2 * std)


def steps_in(minutes: float, model: Classes, seed: int) -> int:
    """How many steps fit; see :func:`peft_suite.train.pretraining.steps_in`."""
    batch = Stream(seed, pool=BATCH).batch(0)
    return pretraining.steps_in(
        minutes, model, batch, lambda: [log_mel(source(seed, number)) for number in range(RENEWED)]
    )


@torch.no_grad()
def probe(
    model: AudioClassifier, make: Callable[[int, int], Array], classes: int, shots: int, tests: int = 20
) -> float:
    """Accuracy of a ridge classifier on features: ``make(label, number)`` gives a sound; the first ``shots`` train."""
    model.eval()
    numbers = [(label, i) for label in range(classes) for i in range(shots + tests)]
    x = normalized(torch.from_numpy(np.stack([log_mel(make(label, i)) for label, i in numbers])))
    features = torch.cat([model(part) for part in x.split(128)])  # type: ignore[no-untyped-call]
    known = torch.tensor([i < shots for _, i in numbers])
    return pretraining.ridge_accuracy(features, torch.tensor([label for label, _ in numbers]), known, classes)


def probes(model: AudioClassifier, shots: int = 20) -> dict[str, float]:
    """Accuracies on source classes, clean target sounds and shifted ones."""
    heard, unheard = tuple(synth.SOURCE), tuple(synth.TARGET)
    return {
        "source": probe(model, lambda c, i: synth.sound(heard[c], i, seed=1_000_003), len(heard), shots),
        "target_clean": probe(model, lambda c, i: synth.sound(unheard[c], i), len(unheard), shots),
        "target_shifted": probe(
            model, lambda c, i: shifted.shifted_sound("train", unheard[c], i).copy(), len(unheard), shots
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m peft_suite.audio.pretrain_micro", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true", help="go on from OUT's .partial.pt, if there is one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / micro.ASSET)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one summation order on every machine with the same instruction set
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    backbone = micro.build(0, pretrained=False)
    model = Classes(backbone)
    before = probes(backbone)
    partial = options.out.with_suffix(".partial.pt")
    state = pretraining.read_partial(partial, options.seed) if options.resume else None
    steps = state["steps"] if state else options.steps or steps_in(options.minutes, model, options.seed)
    batch = Stream(options.seed).batch
    pretraining.pretrain(model, batch, partial, seed=options.seed, steps=steps, lr=options.lr, state=state, every=ROUND)
    tensors = pretraining.half({k: v for k, v in backbone.state_dict().items() if micro.is_body(k)})
    backbone.load_state_dict({k: v.float() for k, v in tensors.items()})
    after = probes(backbone)
    metadata = {
        "format": "pt",
        "model": f"ASTModel {micro.ARCHITECTURE}",
        "made_by": f"python -m peft_suite.audio.pretrain_micro --seed {options.seed} --steps {steps}",
        "data": f"generated sounds of {len(synth.SOURCE)} classes: {', '.join(synth.SOURCE)}",
        "weights_licence": "Apache-2.0",
        "seed": str(options.seed),
        "steps": str(steps),
        "mean": str(micro.STATISTICS[0]),
        "std": str(micro.STATISTICS[1]),
        **{f"probe_{name}": f"{value:.4f}" for name, value in after.items()},
        **{f"probe_{name}_random_weights": f"{value:.4f}" for name, value in before.items()},
        "torch": torch.__version__,
    }
    write_bytes(options.out, save(tensors, metadata))
    partial.unlink(missing_ok=True)
    print(pretraining.probe_lines(after, before))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {steps} steps, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
