"""Decoded features on disk: one file per sound and setting, found by what is in the sound, not by its name.

The key is a sha256 of the file's bytes and of the settings, so a changed file, sample rate or filter bank never finds
an old entry. Entries are written atomically; one that cannot be read counts as missing and is written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.storage import atomic

__all__ = ["FeatureCache"]

VERSION = 1  # of what the entries hold

Array = np.ndarray[Any, Any]


class FeatureCache:
    """Arrays by file and settings.

    Args:
        folder: is created when the first entry is written; "" keeps nothing.
        settings: everything besides the file that the arrays depend on, JSON-ready.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder) if folder else None
        self.settings = json.dumps({"version": VERSION, **settings}, sort_keys=True)

    def get(
        self, path: str | Path, make: Callable[[], tuple[Array, Mapping[str, Any]]]
    ) -> tuple[Array, dict[str, Any]]:
        """The stored array and facts of a file, or what ``make`` gives, which is then stored."""
        if self.folder is None:
            values, facts = make()
            return values, dict(facts)
        entry = self.entry(path)
        found = _load(entry) if entry is not None else None
        if found is not None:
            return found
        values, facts = make()
        if entry is not None:
            with atomic(entry) as temporary, temporary.open("wb") as file:
                np.savez(file, values=values, facts=np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8))
        return values, dict(facts)

    def entry(self, path: str | Path) -> Path | None:
        """Where a file's array is or will be; None for a file that is not there."""
        try:
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError:
            return None
        digest.update(self.settings.encode())
        name = digest.hexdigest()
        assert self.folder is not None
        return self.folder / name[:2] / f"{name[2:]}.npz"


def _load(entry: Path) -> tuple[Array, dict[str, Any]] | None:
    try:
        with np.load(entry, allow_pickle=False) as stored:
            return stored["values"], json.loads(bytes(stored["facts"]))
    except Exception:  # missing, cut short, or something else of that name
        return None
