"""What every data source does alike: hold samples out, refuse unusable files, sum up what was used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from peft_suite.errors import DataError

__all__ = ["digest_of", "hold_out", "refuse_unusable"]

S = TypeVar("S")


def hold_out(
    groups: Mapping[int, Sequence[S]], fraction: float, seed: str, labels: Callable[[S], Sequence[int]] | None = None
) -> tuple[list[S], list[S]]:
    """(held, left): ``fraction`` of every class, drawn by ``seed``; at least one sample of a class stays.

    ``labels`` are all classes of a sample, where it may have several and is grouped by one of them.
    """
    held: list[S] = []
    left: list[S] = []
    for label, group in groups.items():
        shuffled = list(group)
        random.Random(f"{seed}/{label}").shuffle(shuffled)
        count = min(len(group) - 1, max(1, round(fraction * len(group))))
        held += shuffled[:count]
        left += shuffled[count:]
    if labels is None:
        return held, left
    seen = {label for sample in left for label in labels(sample)}
    kept: list[S] = []
    for sample in held:
        if seen.issuperset(labels(sample)):
            kept.append(sample)
        else:
            left.append(sample)
            seen.update(labels(sample))
    return kept, left


def refuse_unusable(bad: Sequence[tuple[str, str]], total: int, split: str, what: str) -> None:
    """Raise DataError for (name, reason) pairs; ``what``: "images cannot be read"."""
    listing = "; ".join(f"{name!r} ({reason})" for name, reason in bad[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    advice = "Repair or remove them." if split == "input" else "Repair or remove them, or set skip_bad (--skip-bad)."
    raise DataError(f"{len(bad)} of {total} {split} {what}: {listing}{more}. {advice}")


def digest_of(rows: Iterable[tuple[str, ...]]) -> str:
    """sha256 over sorted rows of text."""
    digest = hashlib.sha256()
    for row in sorted(rows):
        digest.update("\t".join(row).encode() + b"\n")
    return digest.hexdigest()
