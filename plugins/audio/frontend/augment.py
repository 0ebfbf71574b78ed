"""Random changes of sounds for training, drawn for every clip of a batch on its own from one ``torch.Generator``.

Three places: "waveform" ``[B, n]`` (mixup, noise, time shift), "features" (log-mel, before the normalisation) and
"normalized" (after it), both ``[B, T, F]``. The random numbers that decide are drawn on the generator's device, the
CPU if there is none, so that a seed means the same on every device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from peft_suite.config import parse_shorthand
from peft_suite.errors import ConfigError, DataError, UnknownNameError

__all__ = [
    "AUGMENTS",
    "PUBLISHED",
    "STAGES",
    "Augment",
    "SpecAugment",
    "add_noise",
    "feature_noise",
    "mix",
    "mixup",
    "parse_augment",
    "roll",
    "spec_augment",
    "time_shift",
]

STAGES = ("waveform", "features", "normalized")


def spec_augment(
    x: Tensor,
    freq: int = 24,
    time: int = 80,
    *,
    value: float = 0.0,
    masks: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """A band of mel bins, then a stretch of frames of ``x [B, T, F]`` set to ``value``, ``masks`` times each.

    Widths are uniform in ``0..freq - 1`` and ``0..time - 1`` (0 switches one off), starts uniform over what is left.
    Source: SpecAugment, Park et al., Interspeech 2019. Before the normalisation (original AST) a masked value becomes
    what padding is; after it (PETL_AST) 0 is the data set's mean.
    """
    _features(x)
    for _ in range(masks):
        for dim, most in ((2, freq), (1, time)):
            if most > 0:
                x = x.masked_fill(_stretch(x, dim, most, generator), value)
    return x


def _stretch(x: Tensor, dim: int, most: int, generator: Generator | None) -> Tensor:
    """Mask ``[B, T, 1]`` or ``[B, 1, F]`` of one stretch along ``dim`` for every clip."""
    size = x.shape[dim]
    u = _uniform((2, len(x), 1), generator)
    width = (u[0] * most).long().clamp_max(size)
    start = (u[1] * (size - width).clamp_min(1)).long()
    index = torch.arange(size, device=u.device)
    mask = (index >= start) & (index < start + width)  # [B, size]
    return mask.to(x.device).unsqueeze(2 if dim == 1 else 1)


def mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """``share first + (1 - share) second`` of two clips ``[n]``, ``[m]``; the second is padded or cut to n samples."""
    n = min(len(first), len(second))
    mixed = share * first
    mixed[:n] = mixed[:n] + (1 - share) * second[:n]
    return mixed


def mixup(
    waveforms: Tensor,
    targets: Tensor,
    *,
    alpha: float = 10.0,
    rate: float = 0.5,
    lengths: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Waveforms ``[B, n]`` and targets ``[B, C]`` (one per class) mixed with those of another clip of the batch.

    ``l x_i + (1 - l) x_j`` with l from Beta(alpha, alpha), for a share ``rate`` of the clips. What lies beyond a clip's
    ``lengths [B]`` stays 0. Source: Tokozume et al., ICLR 2018; Zhang et al., ICLR 2018; rates of the AST recipes: 0.5
    AudioSet, 0.6 Speech Commands. The original subtracts each clip's mean first, which the filter bank does anyway.

    Raises:
        DataError: targets that are no ``[B, C]`` numbers.
    """
    if targets.dim() != 2 or len(targets) != len(waveforms) or not targets.is_floating_point():
        raise DataError(
            f"mixup needs floating-point targets [B, C], one per class, and got {targets.dtype} "
            f"{list(targets.shape)}. Use torch.nn.functional.one_hot(labels, C).float()."
        )
    if not (alpha > 0 and 0 <= rate <= 1):
        raise ConfigError(f"mixup: alpha={alpha:g} must be above 0, rate={rate:g} from 0 to 1.")
    count = len(waveforms)
    device = generator.device if generator is not None else torch.device("cpu")
    gamma = torch._standard_gamma(torch.full((2, count), float(alpha), device=device), generator=generator)
    share = gamma[0] / gamma.sum(0)
    share = torch.where(_uniform((count,), generator) < rate, share, 1.0)
    # another clip: a random cyclic order of the batch, each clip meets the next
    order = torch.randperm(count, generator=generator, device=device)
    other = torch.empty_like(order).index_put_((order,), order.roll(-1))
    share, other = share.to(waveforms).unsqueeze(1), other.to(waveforms.device)
    mixed = share * waveforms + (1 - share) * waveforms[other]
    if lengths is not None:
        valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.to(waveforms.device).unsqueeze(1)
        mixed = torch.where(valid, mixed, 0)
    weight = share.to(targets)
    return mixed, weight * targets + (1 - weight) * targets[other.to(targets.device)]


def add_noise(
    waveforms: Tensor,
    low: float = 10.0,
    high: float = 40.0,
    *,
    lengths: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """White noise added to ``[B, n]`` at a signal-to-noise ratio of U[low, high] dB; a silent clip stays silent."""
    if not low <= high:
        raise ConfigError(f"noise: low={low:g} dB is above high={high:g} dB.")
    ratio = low + (high - low) * _uniform((len(waveforms), 1), generator).to(waveforms)
    noise = _normal(waveforms, generator)
    if lengths is None:
        power = waveforms.square().mean(1, keepdim=True)
    else:
        counts = lengths.to(waveforms.device).unsqueeze(1)
        valid = torch.arange(waveforms.shape[1], device=waveforms.device) < counts
        power = torch.where(valid, waveforms, 0).square().sum(1, keepdim=True) / counts.clamp_min(1)
        noise = torch.where(valid, noise, 0)
    return waveforms + noise * (power * 10 ** (-ratio / 10)).sqrt()


def time_shift(waveforms: Tensor, most: float = 0.1, *, generator: Generator | None = None) -> Tensor:
    """``[B, n]`` moved by U[-most, most] of its length; what leaves is lost, silence comes in."""
    if not 0 <= most <= 1:
        raise ConfigError(f"shift: most={most:g} must be from 0 to 1, a share of the length.")
    size = waveforms.shape[1]
    by = ((2 * _uniform((len(waveforms), 1), generator) - 1) * most * size).round().long().to(waveforms.device)
    source = torch.arange(size, device=waveforms.device) - by  # [B, n]
    moved = waveforms.gather(1, source.clamp(0, max(size - 1, 0)))
    return torch.where((source >= 0) & (source < size), moved, 0)


def feature_noise(x: Tensor, most: float = 0.1, *, generator: Generator | None = None) -> Tensor:
    """``U(0, 1)`` per value times one ``U(0, most)`` per clip added to normalised ``[B, T, F]``.

    Source: the Speech Commands recipe of Gong et al., Interspeech 2021.
    """
    _features(x)
    amount = most * _uniform((len(x), 1, 1), generator).to(x)
    device = generator.device if generator is not None else x.device
    return x + torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device) * amount


def roll(x: Tensor, most: int = 10, *, generator: Generator | None = None) -> Tensor:
    """Frames of ``[B, T, F]`` moved cyclically by a whole number from ``-most`` to ``most - 1``.

    Source: the Speech Commands recipe of Gong et al., Interspeech 2021.
    """
    _features(x)
    by = (_uniform((len(x), 1), generator) * 2 * most).floor().long() - most
    source = (torch.arange(x.shape[1], device=by.device) - by) % x.shape[1]  # [B, T]
    return x.gather(1, source.to(x.device).unsqueeze(2).expand_as(x))


@dataclass(frozen=True)
class SpecAugment:
    """:func:`spec_augment` as an object; ``stage`` says where it belongs: "features" (original AST) or "normalized"."""

    freq: int = 24
    time: int = 80
    stage: str = "normalized"

    def __post_init__(self) -> None:
        if self.stage not in STAGES[1:]:
            raise UnknownNameError("stage", self.stage, STAGES[1:])

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        return spec_augment(x, self.freq, self.time, generator=generator)


class _Entry(NamedTuple):
    stage: str
    change: Any
    ranges: Mapping[str, float]


AUGMENTS: Mapping[str, _Entry] = {
    "mixup": _Entry("waveform", mixup, {"alpha": 10.0, "rate": 0.5}),
    "noise": _Entry("waveform", add_noise, {"low": 10.0, "high": 40.0}),
    "shift": _Entry("waveform", time_shift, {"most": 0.1}),
    "spec-augment-ast": _Entry("features", spec_augment, {"freq": 24, "time": 96, "masks": 1}),
    "spec-augment": _Entry("normalized", spec_augment, {"freq": 24, "time": 80, "masks": 1}),
    "feature-noise": _Entry("normalized", feature_noise, {"most": 0.1}),
    "roll": _Entry("normalized", roll, {"most": 10}),
}
PUBLISHED: Mapping[str, str] = {  # recipes of the AST repository and of PETL_AST
    "ast-audioset": "mixup(rate=0.5)+spec-augment-ast(freq=48, time=192)",
    "ast-esc50": "spec-augment-ast(freq=24, time=96)",
    "ast-speech-commands": "mixup(rate=0.6)+spec-augment-ast(freq=48, time=48)+feature-noise+roll",
    "petl-ast": "spec-augment(freq=24, time=80)",
}


@dataclass(frozen=True)
class Augment:
    """Changes in the order given, each in its place: call the three methods where the data is in that state."""

    steps: tuple[tuple[str, Mapping[str, float]], ...] = ()

    @property
    def mixes(self) -> bool:
        """Whether targets are mixed, so that a loss over soft targets is needed."""
        return any(name == "mixup" for name, _ in self.steps)

    def waveform(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``x [B, n]`` and ``targets [B, C]``, which only mixup needs and changes.

        Raises:
            DataError: mixup without targets.
        """
        for name, ranges in self._of("waveform"):
            if name == "mixup":
                if targets is None:
                    raise DataError("mixup needs targets [B, C]: pass them, or leave mixup out.")
                x, targets = mixup(x, targets, lengths=lengths, generator=generator, **ranges)
            elif name == "noise":
                x = add_noise(x, lengths=lengths, generator=generator, **ranges)
            else:
                x = AUGMENTS[name].change(x, generator=generator, **ranges)
        return x, targets

    def features(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Log-mel ``[B, T, F]`` before its normalisation."""
        return self._applied("features", x, generator)

    def normalized(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Log-mel ``[B, T, F]`` after its normalisation."""
        return self._applied("normalized", x, generator)

    def _of(self, stage: str) -> list[tuple[str, Mapping[str, float]]]:
        return [step for step in self.steps if AUGMENTS[step[0]].stage == stage]

    def _applied(self, stage: str, x: Tensor, generator: Generator | None) -> Tensor:
        for name, ranges in self._of(stage):
            x = AUGMENTS[name].change(x, generator=generator, **ranges)
        return x


def parse_augment(text: str) -> Augment:
    """Changes from "spec-augment", "noise(low=0)+roll", a published recipe's name, or "none".

    Raises:
        UnknownNameError: no such change.
        ConfigError: a range that the change does not have, or that is no number of its kind.
    """
    text = PUBLISHED.get(text, text)
    if text in ("", "none"):
        return Augment()
    steps = []
    for part in re.split(r"[+,](?![^(]*\))", text):
        name = part.strip().partition("(")[0].strip()
        if name not in AUGMENTS:
            action = "Join several with '+'. Published recipes: " + ", ".join(PUBLISHED) + "."
            raise UnknownNameError("augmentation", name, ("none", *AUGMENTS), action)
        _, given = parse_shorthand(part)
        known = AUGMENTS[name].ranges
        for key, value in given.items():
            kind = int if isinstance(known.get(key), int) else int | float
            below = name != "noise" and isinstance(value, int | float) and value < 0  # decibels may be
            if key not in known or isinstance(value, bool) or not isinstance(value, kind) or below:
                have = ", ".join(f"{k}={v:g}" for k, v in known.items())
                raise ConfigError(f"augment: {name}({key}={value!r}) is not possible. {name} has {have}.")
        steps.append((name, {**known, **given}))
    return Augment(tuple(steps))


def _features(x: Tensor) -> None:
    if x.dim() != 3:
        raise DataError(f"Features of shape {list(x.shape)}: expected [B, T, F].")


def _uniform(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """U[0, 1) on the generator's device."""
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(shape, generator=generator, device=device)


def _normal(like: Tensor, generator: Generator | None) -> Tensor:
    """N(0, 1) of that shape; on the generator's device first, so that a seed gives the same everywhere."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
