"""Audio data: from a layout on disk to checked, subsampled, normalised splits.

Everything is checked before training starts: the layout, the labels, and every sound that will be used (decoded once,
in threads). A split whose features fit into ``cache_mib`` stays in memory; with ``cache`` they are also kept on disk.
What a training epoch changes depends on (split_seed, epoch, index) alone: a resumed run hears the same sounds.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from peft_suite.audio.decode import EXTENSIONS
from peft_suite.audio.features import (
    AudioDataset,
    Preprocess,
    Read,
    Reading,
    changes_waveform,
    measured,
    spectrogram_png,
)
from peft_suite.audio.folders import sounds_below
from peft_suite.audio.frontend.augment import AUGMENTS, parse_augment
from peft_suite.audio.frontend.logmel import STATISTICS
from peft_suite.audio.listing import Listing, Sample, read_layout
from peft_suite.audio.splits import arrange, check_after_skipping, draw, first_shots
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.train import splitting
from peft_suite.train.contracts import DataConfig, DataSplits
from peft_suite.train.reading import read_all

__all__ = ["AudioDataConfig", "AudioDataset", "AudioSource", "source"]


@dataclass(frozen=True)
class AudioDataConfig(DataConfig):
    """Which sounds, which labels, and how they reach the backbone.

    Attributes:
        format: "auto", "folder", "csv", "esc50", "urbansound8k", "speech-commands", "fluent-speech",
            "fsdd" or "sounds-shifted".
        fold: that tests, of data with predefined folds; 0 is the first one.
        validation: of data with folds: "auto" and "fold" validate on the fold before the test fold, "fraction" on
            ``val_fraction`` of each training class. ``val_fraction=0`` trains on all other folds.
        speaker_out: train on everyone else and test on this speaker.
        train, val, test: folder, table or split names; "" looks for the usual ones. Without a validation split, one is
            held out of train by ``val_fraction``; without a test split, one by ``test_fraction``.
        shots_per: "class", or "class-speaker" for so many of every class and speaker; "auto" is that for fsdd.
        draw: shots "random" by ``split_seed``, or the "first" ones as listed, as the PETL code does.
        eval_shots: keep this many sounds per class of val and of test (0 keeps all), for quick looks.
        classes: class names in index order; () takes them from the layout.
        allow_empty: accept classes without a training sound.
        path_column, label_column, split_column, fold_column, speaker_column: of tables; "" looks for the usual names.
        audio_root: folder that paths in tables are relative to; "" is the folder of the table.
        multi_label: several labels per sound, separated by ``label_separator`` (";" when empty). A separator switches
            it on by itself.
        channel: of files with several; -1 takes their mean.
        seconds: of waveform input, to which sounds are padded or cut; 0 is the longest training sound, at most 10. The
            length of log-mel input is the backbone's.
        statistics: mean and standard deviation of the log-mel features: "data" measures the training sounds once and
            stores the numbers with the adapter; "backbone" takes what it was trained with; or those of "audioset",
            "esc50" or "speech-commands".
        mean_std: two numbers instead.
        augment: "none", changes such as "spec-augment(freq=24, time=96)+noise", or a recipe's name ("ast-esc50"); see
            :mod:`peft_suite.audio.frontend.augment`.
        cache: folder for decoded features; "" decodes in every run.
        cache_mib: a split whose features take at most this much stays in memory. 2,000 clips of ESC-50 take 488 MiB.
        verify: "full" decodes every used sound before training; "none" leaves errors to the run.
    """

    fold: int = 0
    validation: Literal["auto", "fold", "fraction"] = "auto"
    speaker_out: str = ""
    train: str = ""
    val: str = ""
    test: str = ""
    test_fraction: float = 0.0
    shots_per: Literal["auto", "class", "class-speaker"] = "auto"
    draw: Literal["random", "first"] = "random"
    eval_shots: int = 0
    classes: tuple[str, ...] = ()
    allow_empty: bool = False
    path_column: str = ""
    label_column: str = ""
    split_column: str = ""
    fold_column: str = ""
    speaker_column: str = ""
    audio_root: str = ""
    multi_label: bool = False
    label_separator: str = ""
    channel: int = -1
    seconds: float = 0.0
    statistics: str = "data"
    mean_std: tuple[float, ...] = ()
    cache: str = ""
    cache_mib: int = 1024
    verify: Literal["full", "none"] = "full"

    def validate(self) -> None:
        super().validate()
        self.require("test_fraction", 0 <= self.test_fraction < 1, "must be at least 0 and below 1")
        self.require("test_fraction", self.test_fraction + self.val_fraction < 1, "leaves nothing to train on")
        for name in ("fold", "eval_shots", "cache_mib", "seconds"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        self.require("fold", not (self.fold and self.speaker_out), "choose a fold or speaker_out, not both")
        self.require("channel", self.channel >= -1, "must be -1 (the mean) or the number of a channel from 0")
        self.require("classes", len(set(self.classes)) == len(self.classes), "names a class twice")
        self.require("mean_std", len(self.mean_std) in (0, 2), "must be two numbers or empty")
        self.require("mean_std", not self.mean_std or self.mean_std[1] > 0, "the standard deviation must be above 0")
        known = ("data", "backbone", *STATISTICS)
        if self.statistics not in known:
            raise UnknownNameError("statistics", self.statistics, known, "Or give two numbers: data.mean_std.")
        parse_augment(self.augment)

    @property
    def is_multi(self) -> bool:
        return self.multi_label or bool(self.label_separator)


class AudioSource:
    """The audio plugin's data source; see :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = AudioDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """Class names and whether a sound may have several; nothing is decoded."""
        listing = read_layout(own(config))
        return listing.classes, listing.multi_label

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """Checked splits; ``info["preprocessing"]`` is what :meth:`inputs` needs later.

        Statistics that an adapter was trained with are kept, whatever the data.

        Raises:
            DataError: nothing to train on, classes without sounds, unusable files, folds that do not exist.
        """
        config = own(config)
        listing = arrange(config)
        goal, measure = goal_of(config, preprocessing)
        augment = parse_augment(config.augment)
        if goal.input == "waveform" and (odd := [n for n, _ in augment.steps if AUGMENTS[n].stage != "waveform"]):
            raise ConfigError(f"data.augment: {odd[0]} changes spectrograms, and this backbone hears waveforms.")
        tally = _Tally()
        caches: dict[str, list[Any] | None] = {}
        facts: list[Mapping[str, Any]] = []
        readings = {}
        for split in list(listing.splits):
            readings[split] = Reading(
                goal,
                config.cache,
                waveforms=split == "train" and changes_waveform(augment),
                reader=listing.readers.get(split),
            )
            check = config.verify == "full" or (measure and split == "train")
            good, caches[split], told = _checked(listing, split, readings[split], config, tally, check)
            listing.splits[split] = good
            facts = told if split == "train" else facts
        if tally.skipped:
            check_after_skipping(listing, config)
        if measure:
            mean, std = measured(facts, goal)
            goal = replace(goal, mean=mean, std=std, statistics="data")
        if goal.input == "waveform" and not config.seconds and "samples" not in preprocessing and facts:
            goal = replace(goal, samples=max(int(f["samples"]) for f in facts))
        targets = len(listing.classes) if listing.multi_label else 0
        sets = {}
        for split, part in listing.splits.items():
            readings[split].goal = goal
            sets[split] = AudioDataset(
                part,
                readings[split],
                targets,
                cache=caches[split],
                augment=augment if split == "train" else None,
                classes=len(listing.classes),
                seed=config.split_seed,
            )
        tally.warn(goal)
        return DataSplits(
            train=sets["train"],
            val=sets.get("val"),
            test=sets.get("test"),
            classes=listing.classes,
            fingerprint=_fingerprint(listing),
            multi_label=listing.multi_label,
            info={**_facts(config, listing, goal), **tally.facts(), "in_memory": _kept(listing, caches)},
            thumbnail=lambda dataset, index: spectrogram_png(dataset.spectrogram(index)),
            sample_name=lambda dataset, index: str(dataset.samples[index].name),
            sound=lambda dataset, index: dataset.sound(index),
        )

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """Sounds of files and folders, one input each, cut as in training; see :mod:`peft_suite.audio.windows`.

        Raises:
            DataError: a path that does not exist, a file that is no sound, or nothing to do.
        """
        files, ignored = sounds_of(paths)
        reading = Reading(Preprocess.from_dict(preprocessing))
        samples = [Sample(name, (), name) for name in files]
        good, cache, _ = read_all(samples, reading.attempt, "input", "sounds", FAULT, keep=lambda read: read.values)
        dataset = AudioDataset(good, reading, None, cache=cache)
        dataset.ignored = ignored
        return files, dataset


source = AudioSource()
FAULT = "sounds cannot be used"


def own(config: DataConfig) -> AudioDataConfig:
    """The configuration as this plugin's own class."""
    return config if isinstance(config, AudioDataConfig) else AudioDataConfig.from_dict(config.to_dict())


def goal_of(config: AudioDataConfig, preprocessing: Mapping[str, Any]) -> tuple[Preprocess, bool]:
    """(what the backbone expects with what the configuration changes, are the statistics still to be measured?)."""
    goal = Preprocess.from_dict(preprocessing)
    if config.channel >= 0:
        goal = replace(goal, channel=config.channel)
    if goal.input == "waveform":
        return replace(goal, samples=round(config.seconds * goal.sample_rate) or goal.samples), False
    if config.mean_std:
        return replace(goal, mean=config.mean_std[0], std=config.mean_std[1], statistics="given"), False
    if config.statistics in STATISTICS:
        mean, std, _ = STATISTICS[config.statistics]
        return replace(goal, mean=mean, std=std, statistics=config.statistics), False
    return goal, config.statistics == "data" and goal.statistics == "backbone"


def sounds_of(paths: Sequence[str]) -> tuple[list[str], int]:
    """(files of paths, folders being searched recursively, in order; number of other files in the folders).

    Raises:
        DataError: a path that does not exist, or no sound at all.
    """
    files: list[str] = []
    ignored = 0
    for path in map(Path, paths):
        if path.is_dir():
            found = [str(p) for p in sounds_below(path)]
            ignored += sum(1 for p in path.rglob("*") if p.is_file()) - len(found)
            files += found
        elif path.is_file():
            files.append(str(path))
        else:
            raise DataError(f"{str(path)!r} does not exist.")
    if not files:
        where = ", ".join(map(repr, paths)) or "an empty list of paths"
        raise DataError(
            f"No sound in {where} ({ignored} other files). Sounds end in {', '.join(EXTENSIONS)}. "
            "Give files or folders."
        )
    return files, ignored


class _Tally:
    """What reading found out about the sounds."""

    def __init__(self) -> None:
        self.skipped: list[dict[str, str]] = []
        self.silent: list[str] = []
        self.short: list[str] = []
        self.longest = 0.0
        self.longer = 0

    def see(self, sample: Sample, read: Read, goal: Preprocess) -> None:
        self.silent += [sample.name] if read.facts["silent"] else []
        self.short += [sample.name] if read.facts["note"] else []
        seconds = float(read.facts["seconds"])
        self.longest = max(self.longest, seconds)
        self.longer += seconds > goal.seconds + 0.01

    def facts(self) -> dict[str, Any]:
        return {
            "skipped": len(self.skipped),
            "skipped_files": self.skipped[:100],
            "silent": len(self.silent),
            "silent_files": self.silent[:20],
            "shorter_than_a_frame": len(self.short),
            "longer_than_the_network_hears": self.longer,
            "longest_s": round(self.longest, 3),
        }

    def warn(self, goal: Preprocess) -> None:
        for names, what in (
            (self.silent, "silent"),
            (self.short, "shorter than one frame of 25 ms and padded"),
        ):
            if names:
                warnings.warn(f"Sounds that are {what}: {len(names)}, first {names[0]!r}.", stacklevel=4)


def _checked(
    listing: Listing, split: str, reading: Reading, config: AudioDataConfig, tally: _Tally, check: bool
) -> tuple[list[Sample], list[Any] | None, list[Mapping[str, Any]]]:
    """(the samples that are used, their arrays or None, facts of each).

    Few shots are drawn before reading, or, when bad sounds may be skipped, after it.
    """
    part = listing.splits[split]
    position = {sample: i for i, sample in enumerate(part)}
    part = draw(part, split, config) if (config.shots if split == "train" else config.eval_shots) else list(part)
    if not config.skip_bad:
        part = first_shots(part, split, listing, config)
    if not check:
        return sorted(first_shots(part, split, listing, config), key=position.__getitem__), None, []
    facts: list[Mapping[str, Any]] = []

    def keep(read: Read) -> Any:
        facts.append(read.facts)
        return read.values

    good, cache, bad = read_all(
        part,
        reading.attempt,
        split,
        "sounds",
        FAULT,
        skip=config.skip_bad,
        cache_bytes=config.cache_mib * 2**20,
        keep=keep,
    )
    tally.skipped += [{"split": split, "name": name, "reason": reason} for name, reason in bad]
    kept = set(first_shots(good, split, listing, config))
    order = sorted((i for i, s in enumerate(good) if s in kept), key=lambda i: position[good[i]])
    for i in order:
        tally.see(good[i], Read(good[i], facts[i]), reading.goal)  # type: ignore[arg-type]
    return [good[i] for i in order], [cache[i] for i in order] if cache is not None else None, [facts[i] for i in order]


def _facts(config: AudioDataConfig, listing: Listing, goal: Preprocess) -> dict[str, Any]:
    counts = {}
    for split, part in listing.splits.items():
        tally = Counter(label for sample in part for label in sample.labels)
        counts[split] = {name: tally[i] for i, name in enumerate(listing.classes)}
    return {
        "layout": listing.layout,
        "sizes": {split: len(part) for split, part in listing.splits.items()},
        "counts": counts,
        "preprocessing": goal.to_dict(),
        "augment": config.augment,
        **listing.notes,
    }


def _kept(listing: Listing, caches: Mapping[str, Any]) -> list[str]:
    return sorted(split for split in listing.splits if caches.get(split) is not None)


def _fingerprint(listing: Listing) -> str:
    """sha256 over sorted (split, name, labels, size of the file)."""
    return splitting.digest_of(
        (split, s.name, ",".join(map(str, s.labels)), str(os.path.getsize(s.path) if os.path.isfile(s.path) else -1))
        for split, part in listing.splits.items()
        for s in part
    )
