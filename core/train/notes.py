"""What parts of the library tell while a run is set up: shown to the user and kept in the run's record.

Anything logged at INFO or above below the logger ``peft_suite`` counts, for example which keys a checkpoint lacked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heard"]


class _Ear(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.lines.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """The list that messages are added to while the block runs."""
    lines: list[str] = []
    logger, ear = logging.getLogger("peft_suite"), _Ear(lines)
    level = logger.level
    logger.addHandler(ear)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield lines
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
