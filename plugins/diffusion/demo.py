"""The demo: the embedded UNet draws upright digits; every method teaches it digits that lie on their side.

Beside the loss on images that were not trained on, the table has what a judge says of 200 drawn digits (trained on
other digits, turned the same way), how far their features are from those of real ones, and what is left of the upright
digits. Sampling noise and 200 images make the last digits of distance and class accuracy uncertain.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_suite.config import parse_shorthand
from peft_suite.diffusion import micro, shifted
from peft_suite.errors import TrainingError
from peft_suite.plugins import methods

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DATA", "METHODS", "RECIPES", "base_config", "run"]

IMAGES = 200  # drawn of each adapter, as many of each digit
STEPS = 25
JUDGE_EPOCHS = 8
BASE = "not adapted"
_COMMON: Mapping[str, Any] = MappingProxyType(
    # 80 validation images are too few to choose an epoch by: the last one is taken
    {
        "epochs": 40,
        "batch_size": 48,
        "warmup_epochs": 2.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "eval_every": 40,
        "checkpoint_every": 0,
        "select": "last",
    }
)
_LR: Mapping[str, float] = MappingProxyType(
    # by validation images of other seeds: benchmarks/diffusion/choose_demo.py
    {"full": 3e-3, **dict.fromkeys(("bitfit", "difffit", "lora", "sara"), 3e-2)}
)

DATA: Mapping[str, Any] = MappingProxyType({"root": shifted.NAME, "shots": 24, "pictures": 20})
METHODS: Mapping[str, str] = MappingProxyType(  # the last two train a tenth of the weights
    {
        "full": "full",
        "bitfit": "bitfit",
        "difffit": "difffit",
        "lora": "lora(rank=4, targets=['conv1', 'conv2', 'q', 'k', 'v', 'o'])",
        "sara": "sara(quantile=0.1)",
    }
)
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType({**_COMMON, "lr": lr}) for name, lr in _LR.items()}
)


def base_config(data: Mapping[str, Any] = DATA) -> dict[str, Any]:
    """What all runs share."""
    return {"plugin": "diffusion", "backbone": {"name": micro.NAME}, "data": dict(data), "resample": True}


def run(out: str | Path = "runs/demo/diffusion", seeds: int = 1, progress: bool = True) -> dict[str, Any]:
    """Adapt by every method with ``seeds`` seeds, draw, judge, print the table, write the comparison page.

    Returns:
        ``{"rows": one row per method, "report": path, "best_adapter": path, "images": path, "runs": one row per run}``.

    Raises:
        TrainingError: no run finished.
    """
    from peft_suite.report import write_report
    from peft_suite.train.config import RunConfig
    from peft_suite.train.grid import bench

    out, here = Path(out), methods()
    chosen = {name: spec for name, spec in METHODS.items() if parse_shorthand(spec)[0] in here}
    base = RunConfig.from_dict(base_config())
    recipes = {spec: RECIPES[name] for name, spec in chosen.items()}
    specs = list(chosen.values())
    runs = bench(base, specs, [{"name": shifted.NAME}], range(seeds), out, recipes=recipes, progress=progress)
    done = [r for r in runs if r["score"] is not None]
    if not done:
        raise TrainingError(f"No run of the demo finished: {'; '.join(r['error'] for r in runs if r['error'])[:500]}")
    jury = _Jury()
    sheets = {BASE: jury.see(micro.build())}
    for one in done:
        one["seen"] = jury.see(_adapted(Path(one["out"])))
        write_report(one["out"])
        sheets.setdefault(next(n for n, s in chosen.items() if s == one["method"]), one["seen"])
    picture = _write_sheet(out / "images.png", [s.pop("images") for s in sheets.values()])
    for one in done:
        one["seen"].pop("images", None)
    rows = [_base_row(sheets[BASE])]
    rows += [_row(name, [r for r in runs if r["method"] == spec]) for name, spec in chosen.items()]
    best = min(done, key=lambda r: (r["method"] == chosen.get("full"), r["score"]))
    result = {
        "rows": rows,
        "report": str(out / "comparison.html"),
        "best_adapter": str(Path(best["out"]) / "adapter"),
        "images": str(picture),
        "real": jury.real,
        "runs": runs,
    }
    if progress:
        _show(seeds, rows, result, list(sheets))
    return result


class _Jury:
    """The judge and the images that it compares with; the same for every run."""

    def __init__(self) -> None:
        import torch

        from peft_suite.diffusion import judge
        from peft_suite.diffusion.metrics import frechet

        images, labels = shifted.source()
        turned = images.rot90(1, (1, 2)).contiguous()
        self.judge = judge.fit(turned, labels, classes=len(shifted.CLASSES), epochs=JUDGE_EPOCHS)
        real, names = shifted.target()
        tests = torch.tensor(shifted.rows()["test"])
        self.features = self.judge.features(real[tests])
        upright, _ = shifted.upright()
        self.upright, self.labels = upright[tests], names[tests]
        self.asked = torch.arange(IMAGES) % len(shifted.CLASSES)
        others = torch.randperm(len(turned), generator=torch.Generator().manual_seed(0))[:IMAGES]
        self.real = {
            "class_accuracy": judge.accuracy(self.judge, real[tests], self.labels),
            "distance": frechet(self.features, self.judge.features(turned[others])),
        }

    def see(self, model: nn.Module) -> dict[str, Any]:
        """Class accuracy and Fréchet distance of drawn digits, and the loss on upright ones."""
        from peft_suite.diffusion import judge, sampling
        from peft_suite.diffusion.metrics import frechet
        from peft_suite.diffusion.pretrain_micro import held_out_loss

        facts = micro.preprocessing()
        images = sampling.sample(model, facts, IMAGES, steps=STEPS, seed=0, batch_size=IMAGES)
        return {
            "class_accuracy": judge.accuracy(self.judge, images, self.asked),
            "distance": frechet(self.features, self.judge.features(images)),
            "source_loss": held_out_loss(model, self.upright, self.labels, draws=2),
            "images": images[:20],
        }


def _adapted(folder: Path) -> nn.Module:
    from peft_suite.train.opening import open_adapter

    return open_adapter(folder / "adapter").model


def _write_sheet(path: Path, rows: list[Tensor]) -> Path:
    """A line of 20 digits for the base and for each method."""
    import torch

    from peft_suite.diffusion.sampling import grid
    from peft_suite.storage import atomic

    with atomic(path) as temporary:
        grid(torch.cat(rows), columns=len(rows[0])).save(temporary, format="PNG")
    return path


def _base_row(seen: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from peft_suite.diffusion.pretrain_micro import held_out_loss

    images, labels = shifted.target()
    tests = torch.tensor(shifted.rows()["test"])
    loss = held_out_loss(micro.build(), images[tests], labels[tests])
    row = {"method": BASE, "trainable": 0, "share": 0.0, "loss": loss, "spread": 0.0, "seconds": None}
    return {**row, "adapter_bytes": None, "errors": [], **{k: v for k, v in seen.items() if k != "images"}}


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    done = [r for r in runs if r["score"] is not None]
    losses = [r["score"] for r in done]
    row: dict[str, Any] = {
        "method": name,
        "trainable": done[0]["trainable"] if done else None,
        "share": done[0]["trainable"] / done[0]["total"] if done else None,
        "loss": statistics.mean(losses) if done else None,
        "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "seconds": statistics.mean(r["seconds"] for r in done) if done else None,
        "adapter_bytes": done[0]["adapter_bytes"] if done else None,
        "errors": [r["error"] for r in runs if r["error"]],
    }
    for key in ("class_accuracy", "distance", "source_loss"):
        row[key] = statistics.mean(r["seen"][key] for r in done) if done else None
    return row


def _show(seeds: int, rows: list[dict[str, Any]], result: Mapping[str, Any], lines: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"Upright digits, then digits on their side: {DATA['shots']} a class, {seeds} seed{'s' * (seeds > 1)}"
    table = Table(title=title, title_justify="left")
    columns = ("method", "trained", "%", "test loss", "right", "distance", "upright", "s", "KiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in rows:
        if r["loss"] is None:
            table.add_row(r["method"], "", "", "failed")
            continue
        spread = f" ± {r['spread']:.3f}" if seeds > 1 and r["spread"] else ""
        table.add_row(
            r["method"],
            f"{r['trainable']:,}",
            f"{100 * r['share']:.1f}",
            f"{r['loss']:.3f}{spread}",
            f"{100 * r['class_accuracy']:.0f} %",
            f"{r['distance']:.1f}",
            f"{r['source_loss']:.3f}",
            f"{r['seconds']:.0f}" if r["seconds"] is not None else "",
            f"{r['adapter_bytes'] / 1024:.0f}" if r["adapter_bytes"] else "",
        )
    real = result["real"]
    table.add_row("real digits", "", "", "", f"{100 * real['class_accuracy']:.0f} %", f"{real['distance']:.1f}")
    console.print(table)
    for r in rows:
        for error in r["errors"]:
            console.print(f"{r['method']}: {error}", style="red")
    told = {
        "images": f"{result['images']}  (lines: {', '.join(lines)})",
        "comparison": result["report"],
        "its adapter": result["best_adapter"],
        "next": f"peft-suite diffusion sample {result['best_adapter']} -n 40 --columns 10 --out digits",
    }
    for name, value in told.items():
        console.print(f"{name:11s} {value}", soft_wrap=True, highlight=False)
