"""Reading every sample once before training: the unusable is told with its reason, the small stays in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

from peft_suite.train.splitting import refuse_unusable

__all__ = ["read_all"]

PROGRESS_FROM = 2000  # samples
CHUNK = 64


class _Named(Protocol):
    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=_Named)


def read_all(
    samples: Sequence[S],
    attempt: Callable[[S], Any],
    split: str,
    what: str,
    fault: str,
    *,
    skip: bool = False,
    threads: int = 0,
    cache_bytes: int = 2**28,
    keep: Callable[[Any], Any] = lambda result: result,
) -> tuple[list[S], list[Any] | None, list[tuple[str, str]]]:
    """(usable samples, what was read of them if that is little, [(name, reason)] of the others).

    Samples are read in threads, a chunk at a time, so that memory stays small.

    Args:
        attempt: what a sample holds, an array or a tuple of arrays; or the reason why it cannot be used, a string.
        split, what: for messages: "train", "images".
        fault: for the error: "images cannot be read".
        skip: count unusable samples instead of raising.
        threads: 0 chooses their number.
        cache_bytes: beyond this nothing is kept.
        keep: called with each result in order; returns what is kept of it.

    Raises:
        DataError: samples that cannot be used, with their reasons, unless ``skip``.
    """
    good: list[S] = []
    bad: list[tuple[str, str]] = []
    cache: list[Any] | None = []
    used = 0
    for sample, result in zip(samples, _results(samples, attempt, split, what, threads), strict=True):
        if isinstance(result, str):
            bad.append((sample.name, result))
            continue
        good.append(sample)
        result = keep(result)
        if cache is not None:
            used += sum(a.nbytes for a in result) if isinstance(result, tuple) else result.nbytes
            cache.append(result)
            cache = cache if used <= cache_bytes else None
    if bad and not skip:
        refuse_unusable(bad, len(samples), split, fault)
    return good, cache, bad


def _results(samples: Sequence[S], attempt: Callable[[S], Any], split: str, what: str, threads: int) -> Iterable[Any]:
    stream = iter(samples)
    if len(samples) >= PROGRESS_FROM and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        stream = iter(track(samples, f"Checking {len(samples)} {split} {what}", console=Console(stderr=True)))
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(stream, CHUNK)):
            yield from pool.map(attempt, chunk)
