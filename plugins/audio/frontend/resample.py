"""Change of sample rate by windowed-sinc interpolation, in plain torch: batched, differentiable, on any device.

With a, b = rates / gcd, ``base = 0.99 min(a, b)`` and ``t = clamp((i / a - j / b) base, -6, 6)``, sample j of every b
new ones is the sum over i of ``x[i] sinc(t) cos^2(pi t / 12) base / a``. It equals ``torchaudio.functional.resample``
within 2e-5 for tones and 5e-5 for noise: torchaudio computes that kernel in float32, this module in float64, and in
float64 they agree. Source: J. O. Smith, Digital Audio Resampling, 2002.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from peft_suite.errors import ConfigError, DataError

__all__ = ["resample", "resampled_length"]

_ZEROS = 6  # zero crossings on either side
_ROLLOFF = 0.99
_PHASES = 32  # new samples that share one matrix product: they look at nearly the same old ones


class _Part(NamedTuple):
    """Phases that are computed together, from the old samples ``low:high`` of a padded period."""

    low: int
    high: int
    weight: Tensor  # [high - low, phases]


class _Kernel(NamedTuple):
    width: int  # samples before a period that it looks at
    parts: tuple[_Part, ...]
    dense: Tensor | None  # [b, 1, 2 width + a] where the periods of one product would overlap


def resampled_length(samples: int, orig: int, new: int) -> int:
    """Samples after the change: ``ceil(new samples / orig)``."""
    return -(-samples * new // orig)


def resample(waveform: Tensor, orig: int, new: int) -> Tensor:
    """``waveform [..., n]`` at ``orig`` Hz to ``[..., ceil(n new / orig)]`` at ``new`` Hz.

    Computed in float32, or float64 for float64. Equal rates give the waveform itself.

    Raises:
        ConfigError: a rate that is no whole number above 0.
        DataError: samples that are no floating-point numbers.
    """
    if int(orig) != orig or int(new) != new or orig < 1 or new < 1:
        raise ConfigError(f"Cannot resample from {orig} Hz to {new} Hz: rates are whole numbers above 0.")
    if not waveform.is_floating_point():
        raise DataError(f"Cannot resample {waveform.dtype}. Convert it first: samples.float() / 32768.")
    if orig == new:
        return waveform
    common = math.gcd(int(orig), int(new))
    a, b = int(orig) // common, int(new) // common
    x = waveform if waveform.dtype in (torch.float32, torch.float64) else waveform.float()
    wanted = resampled_length(x.shape[-1], a, b)
    width, parts, dense = _kernel(a, b, x.device, x.dtype)
    rows = functional.pad(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), (width, width + a))
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or not len(rows):  # a GPU's convolutions round to TF32 unless told otherwise
            phases = _products(rows, width, a, parts)
        elif dense is not None:
            phases = functional.conv1d(rows.unsqueeze(1), dense, stride=a).mT
        else:  # one row at a time: the products read it in place
            phases = torch.stack([_products(row, width, a, parts) for row in rows])
    out = phases.flatten(1)[:, :wanted]  # phases [B, periods, b]
    return out.reshape(*waveform.shape[:-1], wanted)


def _products(x: Tensor, width: int, a: int, parts: tuple[_Part, ...]) -> Tensor:
    """``x [..., n]`` to ``[..., periods, b]``."""
    periods = x.unfold(-1, 2 * width + a, a)
    return torch.cat([periods[..., low:high] @ weight for low, high, weight in parts], -1)


@functools.lru_cache(maxsize=32)
def _kernel(a: int, b: int, device: torch.device, dtype: torch.dtype) -> _Kernel:
    base = _ROLLOFF * min(a, b)
    width = math.ceil(_ZEROS * a / base)
    parts = []
    with torch.inference_mode(False), torch.no_grad():
        for first in range(0, b, _PHASES):
            last = min(b, first + _PHASES) - 1
            low, high = first * a // b - width, min(last * a // b + width + 2, width + a)
            i = torch.arange(low, high, dtype=torch.float64).unsqueeze(1)
            phase = torch.arange(first, last + 1, dtype=torch.float64)
            t = ((i / a - phase / b) * base).clamp(-_ZEROS, _ZEROS)
            weight = torch.sinc(t) * torch.cos(t * (math.pi / (2 * _ZEROS))).square() * (base / a)
            parts.append(_Part(low + width, high + width, weight.to(device, dtype)))
        dense = None
        if max(high - low for low, high, _ in parts) > a:
            columns = [functional.pad(w, (0, 0, low, 2 * width + a - high)) for low, high, w in parts]
            dense = torch.cat(columns, 1).T.unsqueeze(1).contiguous()
    return _Kernel(width, tuple(parts), dense)
