"""What ``plan`` and ``summary`` return: readable as text, complete as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Plan", "PlanRow", "Summary", "SummaryRow", "lower_is_better"]

_LOWER = frozenset({"loss", "error", "distance", "fid", "kid", "fd", "mse"})


def lower_is_better(metric: str) -> bool:
    """Is a smaller value of this metric the better one? True where a word of the name is a loss, error or distance."""
    return not _LOWER.isdisjoint(metric.lower().replace("-", "_").split("_"))


@dataclass(frozen=True)
class PlanRow:
    """One edit: module path, kind of edit, parameter shapes, their count, whether it folds."""

    point: str
    edit: str
    shapes: str
    parameters: int
    mergeable: bool


@dataclass(frozen=True)
class Plan:
    """What ``adapt`` would do. ``kept`` is the number of base parameters that stay in use beside the trained ones.

    ``pending`` values are placed by calibration, which no plan can foresee; they count as trained.
    """

    method: str
    config: str
    rows: tuple[PlanRow, ...]
    kept: int
    adapter_bytes: int
    mergeable: bool
    pending: int = 0

    @property
    def trainable(self) -> int:
        """Parameters that would be trained."""
        return sum(row.parameters for row in self.rows) + self.pending

    @property
    def total(self) -> int:
        """Parameters of the adapted model; trained copies of base parameters count once."""
        return self.kept + self.trainable

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "method": self.method,
            "config": self.config,
            "trainable": self.trainable,
            "total": self.total,
            "adapter_bytes": self.adapter_bytes,
            "mergeable": self.mergeable,
            "pending": self.pending,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        table = [("point", "edit", "parameters", "folds", "tensors")]
        table += [
            (r.point or "(root)", r.edit, f"{r.parameters:,}", "yes" if r.mergeable else "no", r.shapes)
            for r in self.rows
        ]
        head = f"{self.config}: {_counts(self.trainable, self.total, self.adapter_bytes)}"
        later = f"\n{self.pending:,} of them are placed by calibration, at the points listed" if self.pending else ""
        return f"{head}, {'mergeable' if self.mergeable else 'not mergeable'}{later}\n{_columns(table)}"


@dataclass(frozen=True)
class SummaryRow:
    """One part of one adapter on a model."""

    adapter: str
    method: str
    key: str
    parameters: int
    trainable: int
    active: bool


@dataclass(frozen=True)
class Summary:
    """Counts of an adapted model, as a whole and per part."""

    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    adapter_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "trainable": self.trainable,
            "total": self.total,
            "adapter_bytes": self.adapter_bytes,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [_counts(self.trainable, self.total, self.adapter_bytes)]
        for name in dict.fromkeys(row.adapter for row in self.rows):
            rows = [row for row in self.rows if row.adapter == name]
            count, moving = sum(r.parameters for r in rows), sum(r.trainable for r in rows)
            state = "active" if rows[0].active else "inactive"
            lines.append(
                f"  {name}: {rows[0].method}, {count:,} parameters, {moving:,} trainable, {state}, {len(rows)} parts"
            )
        return "\n".join(lines)


def _counts(trainable: int, total: int, size: int) -> str:
    share = 100 * trainable / total if total else 0.0
    return f"{trainable:,} of {total:,} parameters train ({share:.3f} %), {size / 1024:,.1f} KiB of adapter"


def _columns(table: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    lines = ["  ".join([c.ljust(w) for c, w in zip(row, widths, strict=False)] + [row[-1]]).rstrip() for row in table]
    return "\n".join(lines)
