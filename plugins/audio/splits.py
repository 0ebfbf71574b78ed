"""Which samples train, validate and test: folds, speakers, held-out shares, and few shots."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_suite.audio.listing import Listing, Sample, expected, read_layout
from peft_suite.errors import ConfigError, DataError, closest
from peft_suite.train import splitting
from peft_suite.train.folders import some

if TYPE_CHECKING:
    from peft_suite.audio.data import AudioDataConfig

__all__ = ["arrange", "check_after_skipping", "draw", "first_shots", "folds_of"]


def arrange(config: AudioDataConfig) -> Listing:
    """The listing with its test and validation splits taken.

    Folds: ``data.fold`` tests (the first one if it is 0). Validation is the fold before it, as the PETL papers do on
    ESC-50, or with ``validation="fraction"`` a share of each training class; ``val_fraction=0`` trains on all other
    folds, as the original AST does.

    Raises:
        DataError: a fold or speaker that does not exist, or classes without a training sound.
    """
    listing = read_layout(config)
    if config.fold and not listing.folds:
        raise DataError(f"data.fold = {config.fold}: {config.root!r} ({listing.layout}) has no folds. Leave it 0.")
    if config.speaker_out:
        _leave_out(listing, config.speaker_out, config)
    elif listing.folds:
        _take_fold(listing, config)
    elif listing.test:
        samples = listing.splits["train"]
        listing.splits = {
            "train": [s for s in samples if s.name not in listing.test],
            "test": [s for s in samples if s.name in listing.test],
        }
    listing.splits = {split: part for split, part in listing.splits.items() if part}
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split not in listing.splits and fraction and listing.splits.get("train"):
            groups = _groups(listing.splits["train"], _class_of(listing.splits["train"]))
            seed = f"{split}/{config.split_seed}"
            held, train = splitting.hold_out(groups, fraction, seed, lambda sample: sample.labels)
            if held:
                listing.splits[split], listing.splits["train"] = held, train
    seen = {label for sample in listing.splits.get("train", ()) for label in sample.labels}
    empty = [name for index, name in enumerate(listing.classes) if index not in seen]
    if not seen or (empty and not config.allow_empty):
        raise DataError(
            f"{len(empty)} of {len(listing.classes)} classes have no training sound in {config.root!r}: {some(empty)}. "
            f"Add sounds, remove the class, or set allow_empty to true. {expected() if not seen else ''}".rstrip()
        )
    return listing


def folds_of(config: AudioDataConfig, over: str = "auto") -> list[tuple[str, dict[str, Any]]]:
    """(name, fields of the data configuration) of every part that is left out once.

    Args:
        over: "fold", "speaker", or "auto": folds where there are some, else speakers.

    Raises:
        DataError: the layout has none.
    """
    listing = read_layout(config)
    if over not in ("auto", "fold", "speaker"):
        raise ConfigError(f"Cross-validation over {over!r}: choose fold, speaker or auto.")
    if listing.folds and over != "speaker":
        return [(f"fold {number}", {"fold": number}) for number in listing.folds]
    if len(listing.speakers) > 1 and over != "fold" and "val" not in listing.splits:
        return [(f"without {name}", {"speaker_out": name}) for name in listing.speakers]
    what = {"fold": "folds", "speaker": "speakers to leave out"}.get(over, "folds and no speakers to leave out")
    raise DataError(
        f"{config.root!r} ({listing.layout}) has no {what}, so it cannot be cross-validated. Give a CSV table a column "
        "fold or speaker, or use bench with several seeds."
    )


def draw(samples: Sequence[Sample], split: str, config: AudioDataConfig) -> list[Sample]:
    """Samples in the order in which shots are taken: by seed, or as listed."""
    ordered = list(samples)
    if config.draw == "random":
        ordered.sort(key=lambda s: s.name)
        random.Random(f"shots/{split}/{config.split_seed}").shuffle(ordered)
    return ordered


def first_shots(samples: Sequence[Sample], split: str, listing: Listing, config: AudioDataConfig) -> list[Sample]:
    """The first ``shots`` (``eval_shots``) of every class, or of every class and speaker."""
    most = config.shots if split == "train" else config.eval_shots
    if not most:
        return list(samples)
    key: Callable[[Sample], Hashable] = _class_of(samples)
    per_speaker = config.shots_per == "class-speaker" or (config.shots_per == "auto" and listing.per_speaker)
    if per_speaker and split == "train":
        of_class = key
        key = lambda sample: (of_class(sample), sample.speaker)  # noqa: E731
    return [sample for group in _groups(samples, key).values() for sample in group[:most]]


def check_after_skipping(listing: Listing, config: AudioDataConfig) -> None:
    """Every class must still have a training sound; splits that lost all of theirs go."""
    left = {label for sample in listing.splits["train"] for label in sample.labels}
    lost = [name for i, name in enumerate(listing.classes) if i not in left]
    if not left or (lost and not config.allow_empty):
        raise DataError(f"After leaving out unusable sounds, no training sound is left of: {some(lost)}.")
    for split in [s for s, part in listing.splits.items() if not part]:
        del listing.splits[split]


def _take_fold(listing: Listing, config: AudioDataConfig) -> None:
    folds = listing.folds
    fold = config.fold or folds[0]
    if fold not in folds:
        raise DataError(
            f"data.fold = {fold} does not exist: {config.root!r} ({listing.layout}) has the folds "
            f"{', '.join(map(str, folds))}."
        )
    before = folds[folds.index(fold) - 1]
    by_fold = config.validation != "fraction" and config.val_fraction > 0 and len(folds) > 2
    samples = listing.splits["train"]
    listing.splits = {
        "train": [s for s in samples if s.fold != fold and not (by_fold and s.fold == before)],
        "val": [s for s in samples if by_fold and s.fold == before],
        "test": [s for s in samples if s.fold == fold],
    }
    listing.notes |= {"test_fold": fold, **({"val_fold": before} if by_fold else {})}


def _leave_out(listing: Listing, speaker: str, config: AudioDataConfig) -> None:
    """All recordings of a speaker test, those of the others train."""
    if "val" in listing.splits or "test" in listing.splits or (listing.folds and config.fold):
        raise DataError(f"data.speaker_out = {speaker!r}: {config.root!r} ({listing.layout}) says itself what tests.")
    if speaker not in listing.speakers:
        choices = closest(speaker, listing.speakers) if listing.speakers else "No speaker is known."
        raise DataError(f"data.speaker_out = {speaker!r}: nobody of that name speaks in {config.root!r}. {choices}")
    samples = listing.splits["train"]
    listing.splits = {
        "train": [s for s in samples if s.speaker != speaker],
        "test": [s for s in samples if s.speaker == speaker],
    }
    listing.notes["speaker_out"] = speaker


def _class_of(samples: Sequence[Sample]) -> Callable[[Sample], int]:
    """The class that decides where a sample goes: its only one, or its rarest (-1 for none)."""
    tally = Counter(label for sample in samples for label in sample.labels)
    return lambda sample: min(sample.labels, key=lambda v: (tally[v], v), default=-1)


def _groups(samples: Sequence[Sample], key: Callable[[Sample], Any]) -> Mapping[Any, list[Sample]]:
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return dict(sorted(groups.items()))
