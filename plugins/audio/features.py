"""From a sound file to what the backbone takes in, and the data set that hands it to the loader.

The network sees log-mel energies ``[T, F]`` of T frames: shorter clips are filled with zeros (in the log-mel domain),
longer ones cut at the end, then normalised to ``(x - mean) / (2 std)``. Backbones that take waveforms ``[n]`` (wav2vec
2.0) get them with mean 0 and variance 1.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from peft_suite.audio.cache import FeatureCache
from peft_suite.audio.decode import Clip, UnreadableError, decode, encode
from peft_suite.audio.frontend.augment import AUGMENTS, Augment
from peft_suite.audio.frontend.fbank import FilterBank
from peft_suite.audio.frontend.logmel import STATISTICS
from peft_suite.audio.frontend.resample import resample
from peft_suite.audio.listing import Sample
from peft_suite.errors import DataError
from peft_suite.train.epochs import EpochDataset

__all__ = ["AudioDataset", "Preprocess", "Read", "Reading", "changes_waveform", "measured", "spectrogram_png"]

SHOWN = 5.0  # seconds of a sound in the report

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Preprocess:
    """The backbone's input.

    Attributes:
        input: "fbank" (log-mel) or "waveform".
        frames, mel_bins: T and F of log-mel input.
        samples: of waveform input; ``normalize`` brings it to mean 0 and variance 1.
        mean, std: of log-mel input.
        statistics: where mean and std come from: "backbone", the name of published ones, "data" (measured on the
            training clips) or "given".
        channel: of files with several; -1 takes the mean.
    """

    input: str = "fbank"
    sample_rate: int = 16_000
    frames: int = 1024
    mel_bins: int = 128
    samples: int = 160_000
    normalize: bool = True
    mean: float = STATISTICS["audioset"][0]
    std: float = STATISTICS["audioset"][1]
    statistics: str = "backbone"
    channel: int = -1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read what :meth:`Backbones.preprocessing` or :meth:`to_dict` wrote; missing keys take defaults.

        Raises:
            DataError: a description that this plugin cannot serve.
        """
        default = cls()
        known = {k: type(v)(values[k]) for k, v in vars(default).items() if values.get(k) is not None}
        result = replace(default, **known)
        if result.input not in ("fbank", "waveform"):
            raise DataError(f"Preprocessing input = {result.input!r}: choose fbank or waveform.")
        if min(result.frames, result.mel_bins, result.samples, result.sample_rate) < 1 or result.std <= 0:
            raise DataError(f"Preprocessing {result.to_dict()}: sizes must be at least 1 and std above 0.")
        return result

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form that :meth:`from_dict` reads."""
        size = [self.frames, self.mel_bins] if self.input == "fbank" else [self.samples]
        return {**vars(self), "input_size": size}

    @property
    def seconds(self) -> float:
        """What the network hears of a clip."""
        count = self.bank.options.samples_of(self.frames) if self.input == "fbank" else self.samples
        return count / self.sample_rate

    @property
    def bank(self) -> FilterBank:
        """The filter bank of log-mel input."""
        return _bank(self.sample_rate, self.mel_bins)

    def features(self, waveform: Tensor) -> Tensor:
        """``[n] -> [at most T, F]`` before normalisation; waveforms are only cut."""
        if self.input == "waveform":
            return waveform[: self.samples]
        features: Tensor = self.bank(waveform)
        return features[: self.frames]

    def finish(
        self, features: Tensor, augment: Augment | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Fill to the network's length and normalise; random changes go before or after the latter, as they say."""
        if self.input == "waveform":
            x = features[: self.samples]
            if self.normalize:
                x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-7)
            return functional.pad(x, (0, self.samples - len(x)))
        x = functional.pad(features, (0, 0, 0, self.frames - len(features)))
        if augment is None:
            return (x - self.mean) / (2 * self.std)
        x = augment.features(x[None], generator)
        return augment.normalized((x - self.mean) / (2 * self.std), generator)[0]


@dataclass(frozen=True)
class Read:
    """What a sample holds, and facts of it: seconds, samples, silent, note; of log-mels also sum and square."""

    values: Array
    facts: Mapping[str, Any]


class Reading:
    """How a sample becomes an array, the same in every epoch.

    Args:
        goal: the backbone's input.
        cache: folder for what was decoded; "" for none.
        waveforms: keep waveforms instead of features, for changes of the sound itself.
        reader: gives the sound of a sample without a file.
    """

    def __init__(
        self,
        goal: Preprocess,
        cache: str = "",
        *,
        waveforms: bool = False,
        reader: Callable[[Sample], Clip] | None = None,
    ) -> None:
        self.reader = reader
        self.goal, self.waveforms = goal, waveforms or goal.input == "waveform"
        keep = "waveform" if self.waveforms else "log-mel"
        told = {k: v for k, v in goal.to_dict().items() if k not in ("mean", "std", "statistics")}
        self.cache = FeatureCache(cache, {"keep": keep, **told})

    def read(self, sample: Sample) -> Read:
        """Decoded, mono, cut to what the network hears: features ``[n, F]`` or the waveform ``[n]``.

        Raises:
            UnreadableError: the file cannot be used.
        """
        return Read(*self.cache.get(sample.path, functools.partial(self._make, sample)))

    def values(self, sample: Sample) -> Array:
        """The array alone."""
        return self.read(sample).values

    def attempt(self, sample: Sample) -> Read | str:
        """:meth:`read`, or the reason why not."""
        try:
            return self.read(sample)
        except UnreadableError as error:
            return str(error)

    def clip(self, sample: Sample, seconds: float) -> Clip:
        """The first seconds of a sample as a waveform."""
        rate = self.goal.sample_rate
        if self.reader is None:
            return decode(sample.path, rate=rate, channel=self.goal.channel, seconds=seconds)
        made = self.reader(sample)
        samples = made.samples.copy()  # the reader may keep its own
        if made.rate != rate:
            samples = resample(torch.from_numpy(samples), made.rate, rate).numpy()
        return replace(made, samples=samples[: max(1, round(seconds * rate))], rate=rate)

    def _make(self, sample: Sample) -> tuple[Array, dict[str, Any]]:
        goal = self.goal
        clip = self.clip(sample, goal.seconds)
        count = len(clip.samples)
        facts: dict[str, Any] = {
            "seconds": clip.seconds,
            "samples": count,
            "silent": clip.silent,
            "note": clip.note,
        }
        if goal.input == "waveform":
            return clip.samples, facts
        features = goal.features(torch.from_numpy(clip.samples)).numpy()
        exact = features.astype(np.float64)
        facts |= {"sum": float(exact.sum()), "square": float(np.square(exact).sum())}
        return clip.samples if self.waveforms else features, facts


class AudioDataset(EpochDataset):
    """Samples ``(log-mel [T, F] or waveform [n], target)``; with ``targets=None`` just the input.

    Args:
        samples: names, labels and places.
        reading: from a sample to its array.
        targets: number of classes for 0/1 vectors, 0 for an index, None for no target.
        cache: the arrays of :meth:`Reading.read`, or None to read them again and again.
        augment: random changes, by (seed, epoch, index) alone.
        classes: number of classes, for mixed labels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reading: Reading,
        targets: int | None,
        *,
        cache: Sequence[Array] | None = None,
        augment: Augment | None = None,
        classes: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.samples, self.reading, self.targets, self.cache = samples, reading, targets, cache
        self.augment, self.classes = augment, classes
        self.ignored = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        goal, augment = self.reading.goal, self.augment
        values = torch.from_numpy(self.values(index))
        if self.targets is None:
            return goal.finish(goal.features(values) if self.reading.waveforms else values)
        target = self.target(index)
        if augment is None or not augment.steps:
            return goal.finish(goal.features(values) if self.reading.waveforms else values), target
        generator = torch.Generator().manual_seed(self.sample_seed(index))
        if self.reading.waveforms:
            x, soft = values[None], None
            if augment.mixes:  # with one other clip, cut or padded to this one's length
                other = int(torch.randint(len(self), (1,), generator=generator))
                beside = torch.from_numpy(self.values(other))[: len(values)]
                x = torch.stack([values, functional.pad(beside, (0, len(values) - len(beside)))])
                soft = torch.stack([self._soft(index), self._soft(other)])
            x, soft = augment.waveform(x, soft, generator=generator)
            values, target = goal.features(x[0]), target if soft is None else soft[0]
        return goal.finish(values, augment, generator), target

    def values(self, index: int) -> Array:
        """The array of a sample before padding and normalisation."""
        if self.cache is not None:
            return self.cache[index]
        try:
            return self.reading.values(self.samples[index])
        except UnreadableError as error:
            raise DataError(f"{self.samples[index].name!r} became unreadable during the run: {error}.") from error

    def target(self, index: int) -> Any:
        """The label, without reading the sound."""
        labels = self.samples[index].labels
        if not self.targets:
            return labels[0]
        vector = torch.zeros(self.targets)
        vector[list(labels)] = 1.0
        return vector

    def _soft(self, index: int) -> Tensor:
        target = self.target(index)
        if isinstance(target, Tensor):
            return target
        return functional.one_hot(torch.tensor(target), self.classes).float()

    def spectrogram(self, index: int) -> Array:
        """Log-mel energies ``[n, F]`` of what the network hears, for pictures."""
        values = torch.from_numpy(self.values(index))
        if not self.reading.waveforms:
            return values.numpy()
        goal = self.reading.goal
        energies: Array = _bank(goal.sample_rate, goal.mel_bins)(values).numpy()
        return energies

    def sound(self, index: int) -> bytes:
        """The first seconds as a WAV or Ogg file."""
        clip = self.reading.clip(self.samples[index], min(SHOWN, self.reading.goal.seconds))
        return encode(clip.samples, clip.rate)


def changes_waveform(augment: Augment) -> bool:
    """Whether a change acts on the sound itself, so that features cannot be kept."""
    return any(AUGMENTS[name].stage == "waveform" for name, _ in augment.steps)


def measured(facts: Sequence[Mapping[str, Any]], goal: Preprocess) -> tuple[float, float]:
    """Mean and standard deviation of the padded features, as the original script measures them."""
    cells = len(facts) * goal.frames * goal.mel_bins
    mean = sum(f["sum"] for f in facts) / cells
    variance = sum(f["square"] for f in facts) / cells - mean**2
    return float(f"{mean:.7g}"), float(f"{max(variance, 1e-12) ** 0.5:.7g}")


def spectrogram_png(energies: Array, width: int = 250) -> bytes:
    """A picture of ``[n, F]``, low frequencies at the bottom, at most ``width`` columns."""
    from matplotlib import image

    parts = np.array_split(energies, min(width, len(energies)))
    columns = np.stack([part.mean(0) for part in parts], 1)[::-1]  # [F, columns]
    usual = columns[columns > -15.9]  # the empty lowest filter, and silence
    low, high = (float(usual.min()), float(usual.max())) if usual.size else (-16.0, 0.0)
    stream = io.BytesIO()
    image.imsave(stream, columns, vmin=low, vmax=max(high, low + 1e-3), cmap="magma", format="png")
    return stream.getvalue()


@functools.lru_cache(maxsize=8)
def _bank(sample_rate: int, mel_bins: int) -> FilterBank:
    return FilterBank(sample_rate=sample_rate, num_mel_bins=mel_bins)
