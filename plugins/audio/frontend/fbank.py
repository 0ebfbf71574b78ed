"""Kaldi's log-mel filter bank in plain torch: batched, differentiable, on any device.

Per frame of 400 samples (hop 160, no padding): subtract its mean, pre-emphasise ``y[j] = x[j] - 0.97 x[j-1]``
(``x[-1] = x[0]``), multiply by the window, pad to 512, power of the real FFT, triangular mel filters,
``log(max(., eps))`` with eps = 1.1920929e-07. The order of operations is that of
``torchaudio.compliance.kaldi.fbank``, which it equals within 1e-5 on the CPU; another FFT (a GPU's) differs by up to
5e-3 in bins that hold almost nothing.

On the CPU, where no gradient is asked for, frames go through small buffers that stay in the cache, and the product with
the mel matrix skips the parts that are zero. Elsewhere the same operations run on all frames at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_suite.errors import ConfigError, DataError, UnknownNameError

__all__ = ["LOG_FLOOR", "WINDOWS", "FilterBank", "FilterBankOptions", "fbank", "mel_filters"]

LOG_FLOOR = float(torch.finfo(torch.float32).eps)  # also for float64 waveforms, as Kaldi's
WINDOWS = ("hanning", "hamming", "povey")
_CHUNK = 2**20  # bytes of padded frames at a time: two such buffers fill an L2 cache of 2 MB
_JOINED, _GROUP = 48, 16  # the lowest filters are narrow: one product for 48 of them, then one for every 16


@dataclass(frozen=True)
class FilterBankOptions:
    """What a filter bank computes.

    Attributes:
        sample_rate: of the waveform, in Hz.
        num_mel_bins: filters.
        low_freq, high_freq: edges of the lowest and the highest filter in Hz; a ``high_freq`` of 0 or below counts from
            half the sample rate.
        window: "hanning" (symmetric Hann, what AST uses), "hamming" or "povey" (Hann to the power of 0.85).
        frame_length, frame_shift: in milliseconds.
        preemphasis: coefficient, 0 for none.
        scale: factor of the waveform; 1 for AST, 32768 for models that were trained on 16-bit numbers.
        zero_mean: subtract the mean of the whole waveform first, as the original AST does (an effect of rounding only).
    """

    sample_rate: int = 16000
    num_mel_bins: int = 128
    low_freq: float = 20.0
    high_freq: float = 0.0
    window: str = "hanning"
    frame_length: float = 25.0
    frame_shift: float = 10.0
    preemphasis: float = 0.97
    scale: float = 1.0
    zero_mean: bool = False

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise UnknownNameError("window", self.window, WINDOWS)
        if not 0 <= self.low_freq < self.top <= self.sample_rate / 2:
            raise ConfigError(
                f"low_freq={self.low_freq:g} and high_freq={self.high_freq:g} are no band of a sample rate of "
                f"{self.sample_rate} Hz. Choose 0 <= low_freq < high_freq <= {self.sample_rate / 2:g}."
            )
        if self.num_mel_bins < 1 or self.window_size < 2 or self.hop < 1 or not 0 <= self.preemphasis <= 1:
            raise ConfigError(
                f"num_mel_bins={self.num_mel_bins}, frame_length={self.frame_length:g} ms, "
                f"frame_shift={self.frame_shift:g} ms, preemphasis={self.preemphasis:g} make no filter bank. Choose at "
                "least 1 filter, 2 samples per frame, 1 per shift, and a pre-emphasis from 0 to 1."
            )

    @property
    def top(self) -> float:
        """Upper edge of the highest filter in Hz."""
        return self.high_freq if self.high_freq > 0 else self.high_freq + self.sample_rate / 2

    @property
    def window_size(self) -> int:
        """Samples of a frame."""
        return int(self.sample_rate * self.frame_length * 0.001)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.frame_shift * 0.001)

    @property
    def fft_size(self) -> int:
        """The window's size as a power of two."""
        return 1 << (self.window_size - 1).bit_length()

    def num_frames(self, samples: int) -> int:
        """Frames of a clip; a clip shorter than one frame is padded to one."""
        return 1 + (max(samples, self.window_size) - self.window_size) // self.hop

    def samples_of(self, frames: int) -> int:
        """Samples that ``frames`` frames look at."""
        return self.window_size + (frames - 1) * self.hop


class _Block(NamedTuple):
    """A part of the mel matrix: FFT bins ``low:high`` to filters ``first:last``."""

    low: int
    high: int
    first: int
    last: int
    weight: Tensor


class _Tables(NamedTuple):
    window: Tensor  # [window_size]
    mel: Tensor  # [fft_size / 2 + 1, F]
    blocks: tuple[_Block, ...]


def mel_filters(options: FilterBankOptions) -> Tensor:
    """Triangles ``[F, fft_size / 2]``, equally wide in ``m(f) = 1127 ln(1 + f / 700)``, in float32 like Kaldi's.

    Filter j rises from ``m(low) + j D`` over one D and falls over the next, with ``D = (m(high) - m(low)) / (F + 1)``.
    """
    low, high = (1127.0 * math.log(1.0 + f / 700.0) for f in (options.low_freq, options.top))
    width = (high - low) / (options.num_mel_bins + 1)
    index = torch.arange(options.num_mel_bins).unsqueeze(1)
    left, center, right = (low + (index + k) * width for k in (0.0, 1.0, 2.0))  # [F, 1]
    step = options.sample_rate / options.fft_size
    mel = 1127.0 * (1.0 + step * torch.arange(options.fft_size / 2) / 700.0).log()
    return torch.minimum((mel - left) / (center - left), (right - mel) / (right - center)).clamp_min(0)


@functools.lru_cache(maxsize=32)
def _tables(options: FilterBankOptions, device: torch.device, dtype: torch.dtype) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        size = options.window_size
        if options.window == "hamming":
            window = torch.hamming_window(size, periodic=False, dtype=dtype)
        else:
            window = torch.hann_window(size, periodic=False, dtype=dtype)
            window = window.pow(0.85) if options.window == "povey" else window
        mel = functional.pad(mel_filters(options), (0, 1)).T.contiguous().to(dtype)  # the bin at sample_rate / 2: 0
        filters = options.num_mel_bins
        edges = [0, *range(_JOINED, filters, _GROUP), filters]
        blocks = []
        for first, last in itertools.pairwise(edges):
            used = mel[:, first:last].any(1).nonzero().flatten().tolist() or [0]
            low, high = used[0], used[-1] + 1
            blocks.append(_Block(low, high, first, last, mel[low:high, first:last].contiguous()))
        return _Tables(window.to(device), mel.to(device), tuple(blocks))


class FilterBank(nn.Module):
    """Log-mel energies ``[..., frames, F]`` of waveforms ``[..., n]`` in [-1, 1].

    It has no parameters and no state: window and filters follow the waveform's device and dtype (float32, or float64
    for float64; lower precision is computed in float32). Options: see :class:`FilterBankOptions`.

    Raises:
        ConfigError: options out of range; UnknownNameError: no such window.
    """

    def __init__(self, options: FilterBankOptions | None = None, /, **fields: Any) -> None:
        super().__init__()
        self.options = FilterBankOptions(**({**asdict(options), **fields} if options else fields))

    def num_frames(self, samples: int) -> int:
        """Frames of a clip of that many samples."""
        return self.options.num_frames(samples)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``waveform [..., n]`` to ``[..., 1 + (n - 400) // 160, F]``; clips shorter than a frame get zeros at the end.

        ``lengths`` (for ``[B, n]``): valid samples of each clip; what follows them counts as 0, and only the first
        ``num_frames(length)`` frames belong to the clip.

        Raises:
            DataError: integers, or no samples.
        """
        x = self._prepared(waveform, lengths)
        if _plain(x):
            out = x.new_empty(*x.shape[:-1], self.num_frames(x.shape[-1]), self.options.num_mel_bins)
            _chunked(x.reshape(-1, x.shape[-1]), out.view(-1, *out.shape[-2:]), self.options)
            return out
        return _whole(x, self.options)

    def into(self, waveform: Tensor, out: Tensor) -> None:
        """Write the frames of ``waveform [B, n]`` to ``out [B, frames, F]``, which may be a slice; no gradient."""
        with torch.no_grad():
            x = self._prepared(waveform, None)
            if _plain(x) and out.dtype == x.dtype:
                _chunked(x, out, self.options)
            else:
                out.copy_(_whole(x, self.options))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in asdict(self.options).items())

    def _prepared(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        o = self.options
        if not waveform.is_floating_point():
            raise DataError(
                f"A waveform of {waveform.dtype} is not in [-1, 1]. Convert it first: samples.float() / 32768 for "
                "16-bit numbers."
            )
        if waveform.dim() < 1 or not waveform.shape[-1]:
            raise DataError(f"A waveform of shape {list(waveform.shape)} has no samples. Leave the clip out.")
        x = waveform if waveform.dtype in (torch.float32, torch.float64) else waveform.float()
        if x.stride(-1) != 1:  # sums depend on the layout in their last digits, and so do nearly empty bins
            x = x.contiguous()
        if lengths is not None:
            valid = torch.arange(x.shape[-1], device=x.device) < lengths.to(x.device).unsqueeze(-1)
            x = torch.where(valid, x, 0)
            if o.zero_mean:
                mean = x.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp_min(1)
                x = torch.where(valid, x - mean, 0)
        elif o.zero_mean:
            x = x - x.mean(-1, keepdim=True)
        if o.scale != 1:
            x = x * o.scale
        padded: Tensor = functional.pad(x, (0, max(0, o.window_size - x.shape[-1])))
        return padded


def fbank(waveform: Tensor, **options: Any) -> Tensor:
    """Log-mel energies ``[..., frames, F]`` of ``waveform [..., n]``; options as in :class:`FilterBankOptions`."""
    frames: Tensor = FilterBank(**options)(waveform)
    return frames


def _plain(x: Tensor) -> bool:
    """Whether the buffered form applies: CPU, no gradient to record, no tracing."""
    recorded = x.requires_grad and torch.is_grad_enabled()
    return x.device.type == "cpu" and not recorded and not torch.compiler.is_compiling()


def _whole(x: Tensor, o: FilterBankOptions) -> Tensor:
    """All frames at once, differentiable: ``x [..., n]`` to ``[..., frames, F]``. This is the definition."""
    tables = _tables(o, x.device, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        frames = x.unfold(-1, o.window_size, o.hop)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat((frames[..., :1], frames[..., :-1]), -1)
        frames = (frames - o.preemphasis * before) * tables.window
        spectrum = torch.view_as_real(torch.fft.rfft(frames, n=o.fft_size)).square()
        power = spectrum[..., 0] + spectrum[..., 1]  # [..., frames, fft_size / 2 + 1]
        return (power @ tables.mel).clamp_min(LOG_FLOOR).log()


def _chunked(x: Tensor, out: Tensor, o: FilterBankOptions) -> None:
    """The same into ``out [B, frames, F]`` from ``x [B, n]``, a few frames (or a few short clips) at a time."""
    tables = _tables(o, x.device, x.dtype)
    x = x.detach()
    frames = x.unfold(-1, o.window_size, o.hop)  # a view [B, frames, window]
    clips, count, size = frames.shape
    most = max(1, _CHUNK // (o.fft_size * x.element_size()))
    per, step = (max(1, min(clips, most // count)), count) if count <= most else (1, most)
    padded = x.new_zeros(per * step, o.fft_size)
    spare = x.new_empty(per * step, o.fft_size)
    energies = x.new_empty(per * step, o.num_mel_bins)
    for clip in range(0, clips, per):
        for start in range(0, count, step):
            chunk = frames[clip : clip + per, start : start + step]
            b, c = chunk.shape[:2]
            rows = b * c
            y = padded[:rows].view(b, c, -1)[..., :size]
            torch.sub(chunk, chunk.mean(-1, keepdim=True), out=y)
            if o.preemphasis:
                before = spare[:rows].view(b, c, -1)[..., :size]
                torch.mul(y, o.preemphasis, out=before)
                y[..., 1:].sub_(before[..., :-1])
                y[..., :1].sub_(before[..., :1])
            y.mul_(tables.window)
            spectrum = torch.view_as_real(torch.fft.rfft(padded[:rows]))
            spectrum.mul_(spectrum)
            power = spare[:rows, : spectrum.shape[1]]
            torch.add(spectrum[..., 0], spectrum[..., 1], out=power)
            mel = energies[:rows]
            for low, high, first, last, weight in tables.blocks:
                torch.mm(power[:, low:high], weight, out=mel[:, first:last])
            mel.clamp_min_(LOG_FLOOR)
            torch.log(mel.view(b, c, -1), out=out[clip : clip + b, start : start + c])
