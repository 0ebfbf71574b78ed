"""Progress on a terminal: one bar for epochs, one for steps; elsewhere one line per epoch."""

from __future__ import annotations

from typing import Any

__all__ = ["Display"]


class Display:
    """Writes to stderr, so that machine-readable output stays clean.

    Args:
        enabled: False says nothing at all (other processes than the main one, ``progress=False``).
        metric: the metric shown beside the loss.
    """

    def __init__(self, *, enabled: bool, epochs: int, steps: int, epoch: int, metric: str) -> None:
        self._enabled, self._metric, self._epochs = enabled, metric, epochs
        self._live: Any = None
        if not enabled:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._whole = self._live.add_task("epochs", total=epochs, completed=epoch, note="")
            self._part = self._live.add_task("steps", total=steps, note="")
            self._live.start()

    def step(self, position: int, loss: float) -> None:
        """One optimizer step is done."""
        if self._live:
            self._live.update(self._part, completed=position, note=f"loss {loss:.4f}")

    def epoch(self, entry: dict[str, Any]) -> None:
        """One epoch is done; ``entry`` is its line of the history."""
        if not self._enabled:
            return
        text = f"loss {entry['train_loss']:.4f}"
        for split in ("val", "test"):
            value = (entry[split] or {}).get(self._metric)
            text += f"  {split} {self._metric} {value:.4f}" if value is not None else ""
        if self._live:
            self._live.update(self._whole, completed=entry["epoch"] + 1, note=text)
        else:
            width = len(str(self._epochs))
            self.say(
                f"epoch {entry['epoch'] + 1:>{width}}/{self._epochs}  {text}  {entry['samples_per_s']:.0f} samples/s"
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._live:
            self._live.stop()
            self._live = None
