"""From waveforms to the network's input: log-mel frames of one length, normalised."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_suite.audio.frontend.fbank import FilterBank, FilterBankOptions
from peft_suite.errors import ConfigError, DataError, PluginError, UnknownNameError

__all__ = ["BACKENDS", "STATISTICS", "LogMel", "examine", "measure_statistics", "torchaudio_problem"]

BACKENDS = ("torch", "torchaudio")
STATISTICS = {  # (mean, std, frames) with which the published models were trained; Gong et al., Interspeech 2021
    "audioset": (-4.2677393, 4.5689974, 1024),
    "esc50": (-6.6268077, 5.358466, 512),
    "speech-commands": (-6.845978, 5.5654526, 128),
}


class LogMel(nn.Module):
    """Features ``[B, T, F]`` of an Audio Spectrogram Transformer: ``(x - mean) / (2 std)`` of T log-mel frames.

    Shorter clips get zeros at the end in the log domain, *before* the normalisation as the published models expect
    it, so that padding is ``-mean / (2 std)``; longer ones are cut at the end. Source: Gong et al., Interspeech 2021;
    with ``backend="torchaudio"`` the numbers of ``transformers.ASTFeatureExtractor``, with ours within 1e-5 of them.

    Args:
        frames: T; None takes the frames of the longest clip.
        mean, std: of the log-mel values; the defaults are AudioSet's.
        backend: "torch" (ours) or "torchaudio" (clip by clip on the CPU, for comparisons).
        options: fields of :class:`FilterBankOptions`.

    Raises:
        ConfigError: ``frames`` or ``std`` not above 0.
        PluginError: torchaudio is asked for and cannot be imported.
    """

    def __init__(
        self,
        frames: int | None = 1024,
        mean: float = STATISTICS["audioset"][0],
        std: float = STATISTICS["audioset"][1],
        *,
        backend: str = "torch",
        **options: Any,
    ) -> None:
        super().__init__()
        if (frames is not None and frames < 1) or not std > 0:
            raise ConfigError(f"frames={frames} and std={std:g}: both must be above 0.")
        if backend not in BACKENDS:
            raise UnknownNameError("backend", backend, BACKENDS)
        if backend == "torchaudio" and (problem := torchaudio_problem()):
            raise PluginError(
                f"backend='torchaudio' cannot be used: {problem}. Use 'torch', which equals it within 1e-5."
            )
        self.frames, self.mean, self.std, self.backend = frames, mean, std, backend
        self.bank = FilterBank(**options)

    def forward(self, waveforms: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Normalised features; arguments and shapes as in :meth:`features`."""
        x = self.features(waveforms, lengths)
        if x.requires_grad:
            return self.normalize(x)
        return x.sub_(self.mean).div_(2 * self.std)

    def normalize(self, features: Tensor) -> Tensor:
        """``(x - mean) / (2 std)``."""
        return (features - self.mean) / (2 * self.std)

    def features(self, waveforms: Tensor | Sequence[Tensor], lengths: Tensor | None = None) -> Tensor:
        """Log-mel frames, cut or padded with zeros, not normalised.

        Args:
            waveforms: ``[n]`` gives ``[T, F]``; ``[B, n]`` or a sequence of B clips ``[n_i]`` gives ``[B, T, F]``.
            lengths: ``[B]``, the valid samples of a padded batch ``[B, n]``.

        Raises:
            DataError: no clips, clips without samples, or lengths outside 1..n.
        """
        if not isinstance(waveforms, Tensor):
            if not waveforms:
                raise DataError("There are no clips to compute features of.")
            if waveforms[0].device.type == "cpu" and not any(w.requires_grad for w in waveforms):
                return self._each([w.unsqueeze(0) for w in waveforms])
            sizes = torch.tensor([len(w) for w in waveforms])
            return self.features(nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), sizes)
        if waveforms.dim() == 1:
            return self.features(waveforms.unsqueeze(0), lengths)[0]
        if waveforms.dim() != 2:
            raise DataError(f"Waveforms of shape {list(waveforms.shape)}: expected [n] or [B, n], one channel each.")
        if lengths is not None:
            _check(lengths, waveforms)
        if self.backend == "torchaudio" or (waveforms.device.type == "cpu" and not waveforms.requires_grad):
            if lengths is None:
                return self._each([waveforms])
            return self._each([w[: int(n)].unsqueeze(0) for w, n in zip(waveforms, lengths, strict=True)])
        return self._batched(waveforms, lengths)

    def _each(self, groups: Sequence[Tensor]) -> Tensor:
        """Clips ``[B_i, n_i]`` of one length per group, written straight into the result."""
        o = self.bank.options
        counts = [self.bank.num_frames(g.shape[-1]) for g in groups]
        total = max(counts) if self.frames is None else self.frames
        dtype = torch.float64 if groups[0].dtype == torch.float64 else torch.float32
        out = groups[0].new_empty(sum(len(g) for g in groups), total, o.num_mel_bins, dtype=dtype)
        row = 0
        for group, count in zip(groups, counts, strict=True):
            kept = min(count, total)
            seen = group if o.zero_mean or kept == count else group[:, : o.samples_of(kept)]
            here = out[row : row + len(group)]
            here[:, kept:].zero_()
            if self.backend == "torch":
                if o.zero_mean and kept < count:
                    here.copy_(self.bank(seen)[:, :kept])
                else:
                    self.bank.into(seen, here[:, :kept])
            else:
                for target, clip in zip(here, seen, strict=True):
                    target[:kept] = _theirs(clip, o)[:kept].to(target)
            row += len(group)
        return out

    def _batched(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """All clips at once; frames beyond a clip's own become 0."""
        o = self.bank.options
        if self.frames is not None and not o.zero_mean:
            x = x[:, : o.samples_of(self.frames)]
        features: Tensor = self.bank(x, lengths)
        if lengths is not None:
            own = 1 + (lengths.to(x.device).clamp_min(o.window_size) - o.window_size) // o.hop
            valid = torch.arange(features.shape[1], device=x.device) < own.unsqueeze(-1)
            features = torch.where(valid.unsqueeze(-1), features, 0)
        total = features.shape[1] if self.frames is None else self.frames
        return functional.pad(features[:, :total], (0, 0, 0, max(0, total - features.shape[1])))

    def extra_repr(self) -> str:
        return f"frames={self.frames}, mean={self.mean:g}, std={self.std:g}, backend={self.backend!r}"


def measure_statistics(batches: Iterable[Tensor], *, official: bool = False) -> tuple[float, float]:
    """Mean and standard deviation of features that are padded and not normalised, ``[B, T, F]`` a batch.

    Over all values; ``official=True`` averages the batches' own means and deviations as the AST repository's script
    does, which depends on the batch size.

    Raises:
        DataError: fewer than two values.
    """
    count, total, squares = 0, 0.0, 0.0
    pairs = []
    for batch in batches:
        x = batch.detach().double()
        if official:
            pairs.append((float(x.mean()), float(x.std())))
        elif count == 0:
            origin = float(x.mean())  # sums about it lose no digits
        if not official:
            total += float((x - origin).sum())
            squares += float((x - origin).square().sum())
        count += x.numel()
    if count < 2:
        raise DataError(f"Statistics of {count} values: give at least one batch of features.")
    if official:
        return sum(m for m, _ in pairs) / len(pairs), sum(s for _, s in pairs) / len(pairs)
    return origin + total / count, ((squares - total * total / count) / (count - 1)) ** 0.5


def torchaudio_problem() -> str:
    """Why torchaudio cannot be imported; "" if it can."""
    try:
        importlib.import_module("torchaudio.compliance.kaldi")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a build for another torch or CUDA raises what it likes
        return f"import torchaudio: {' '.join(str(error).split())}"
    return ""


def examine() -> list[dict[str, str]]:
    """The row of ``peft-suite doctor``: only ``backend="torchaudio"`` and ``ASTFeatureExtractor`` are concerned."""
    problem = torchaudio_problem()
    row = {"group": "plugin", "name": "audio: torchaudio", "status": "note" if problem else "ok", "fix": ""}
    if not problem:
        return [{**row, "detail": "imports; used by backend='torchaudio' only"}]
    if not problem.endswith("not installed"):
        row["fix"] = "pip uninstall torchaudio, or install the build that matches torch"
    return [{**row, "detail": f"{problem}; not needed, the audio plugin has its own front end"}]


def _check(lengths: Tensor, waveforms: Tensor) -> None:
    if lengths.shape != waveforms.shape[:1] or int(lengths.min()) < 1 or int(lengths.max()) > waveforms.shape[1]:
        raise DataError(
            f"lengths={lengths.tolist()} do not fit waveforms of shape {list(waveforms.shape)}: give one number from 1 "
            f"to {waveforms.shape[1]} per clip."
        )


def _theirs(clip: Tensor, o: FilterBankOptions) -> Tensor:
    """torchaudio's filter bank of one clip ``[n]``."""
    kaldi: Any = importlib.import_module("torchaudio.compliance.kaldi")
    x = clip - clip.mean() if o.zero_mean else clip
    x = functional.pad(x * o.scale, (0, max(0, o.window_size - len(x))))
    frames: Tensor = kaldi.fbank(
        x.unsqueeze(0),
        sample_frequency=o.sample_rate,
        num_mel_bins=o.num_mel_bins,
        low_freq=o.low_freq,
        high_freq=o.high_freq,
        window_type=o.window,
        frame_length=o.frame_length,
        frame_shift=o.frame_shift,
        preemphasis_coefficient=o.preemphasis,
    )
    return frames
