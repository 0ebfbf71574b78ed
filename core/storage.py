"""Atomic files: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_suite.errors import StorageError

__all__ = ["atomic", "write_bytes", "write_json", "write_text"]


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` when the block ends without an error.

    Before an existing file is replaced the new one is on the disk, so a power failure leaves one of the two.

    Raises:
        StorageError: the folder or the file cannot be written (disk full, no permission); ``path`` is untouched.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if target.exists():
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except Exception as error:
        # Other libraries wrap the system's refusal in errors of their own.
        if not isinstance(error, OSError) and "os error" not in str(error).lower():
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"Cannot write {target}: {reason}. What was there before is intact. Free space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write atomically; raises StorageError."""
    return _write(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write UTF-8 text atomically; raises StorageError."""
    return _write(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 1) -> Path:
    """Write JSON atomically; raises StorageError."""
    return write_text(path, json.dumps(value, indent=indent) + "\n")


def _write(path: str | os.PathLike[str], put: Callable[[Path], object]) -> Path:
    with atomic(path) as temporary:
        put(temporary)
    return Path(path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
