"""The one exception family of peft-suite.

Every message says what happened, the value, the valid choices (closest first) and the next action. Each class also
derives from the built-in exception that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "AdapterNameError",
    "BackboneError",
    "BackboneMismatchError",
    "ConfigError",
    "DataError",
    "FileFormatError",
    "KernelArgumentError",
    "KernelBackendError",
    "MergeError",
    "MissingExtraError",
    "PeftSuiteError",
    "PluginError",
    "StorageError",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedError",
    "VerificationError",
]


class PeftSuiteError(Exception):
    """Base class of every error that peft-suite raises on purpose."""


class UnknownNameError(PeftSuiteError, ValueError):
    """A name (method, backbone, data set, adapter, option) that nothing answers to."""

    def __init__(self, kind: str, name: str, choices: Iterable[str], action: str = "") -> None:
        self.kind, self.name, self.choices = kind, name, sorted(choices, key=str)
        super().__init__(f"Unknown {kind} {name!r}. {closest(name, self.choices)}{' ' + action if action else ''}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.__dict__))


class ConfigError(PeftSuiteError, ValueError):
    """A configuration with an unknown field, a wrong type or a value outside its range."""


class BackboneError(PeftSuiteError, TypeError):
    """A model that no anatomy describes."""


class UnsupportedError(PeftSuiteError, ValueError):
    """A method that this backbone cannot carry, or a state in which an operation has no meaning."""


class AdapterError(PeftSuiteError, RuntimeError):
    """An adapter operation that cannot be done on this model as it stands."""


class AdapterNameError(AdapterError, ValueError):
    """An adapter name that is taken, not present or not allowed."""


class BackboneMismatchError(PeftSuiteError, ValueError):
    """An adapter that was trained on other frozen weights, other shapes or another family."""


class FileFormatError(PeftSuiteError, ValueError):
    """An adapter directory that is missing, truncated, corrupted or written by something else."""


class KernelArgumentError(PeftSuiteError, ValueError):
    """A tensor or number that a kernel cannot take; names the argument, its shape and what was expected."""


class KernelBackendError(PeftSuiteError, RuntimeError):
    """A back end that was asked for by name and cannot run this call here; says why."""


class MergeError(AdapterError):
    """Something cannot be folded into the weights; the model is unchanged."""


class VerificationError(AdapterError):
    """An edit that never fired or a trainable parameter that received no gradient."""


class PluginError(PeftSuiteError, RuntimeError):
    """A plugin that is broken, declared twice or does not follow the contract."""


class MissingExtraError(PluginError, ImportError):
    """A plugin whose optional dependencies are not installed."""


class DataError(PeftSuiteError, ValueError):
    """Data that cannot be used: an empty folder, a class without samples, a broken file, a label out of range."""


class StorageError(PeftSuiteError, OSError):
    """A file that could not be written; what was there before is intact."""


class TrainingError(PeftSuiteError, RuntimeError):
    """Training that had to stop, for example on a loss that is not finite."""


def _rebuild(cls: type[Exception], message: str, state: dict[str, object]) -> Exception:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


def closest(name: str, choices: Iterable[str], limit: int = 12) -> str:
    """One sentence that lists ``choices``, the ones nearest to ``name`` first."""
    options = sorted({str(c) for c in choices})
    if not options:
        return "There is nothing to choose from."
    lowered = {o.lower(): o for o in reversed(options)}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
    rest = [o for o in options if o not in near]
    shown = (near + rest)[:limit]
    more = len(options) - len(shown)
    listing = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    return f"Did you mean {near[0]!r}? Valid choices: {listing}." if near else f"Valid choices: {listing}."
