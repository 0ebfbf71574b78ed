"""``peft-suite pointcloud vote``: measure an adapter by the mean of several random views of every cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import show_json, show_mapping
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError
from peft_suite.plugins import resolve

__all__ = ["vote"]


def vote(
    ctx: typer.Context,
    adapter: Annotated[
        Path, typer.Argument(help="Adapter directory of a run, or a merged model's directory.", show_default=False)
    ],
    data: Annotated[str | None, typer.Option(help="Other data than the adapter was trained with.")] = None,
    split: Annotated[str, typer.Option(help="test, val, train; auto takes the first there is.")] = "auto",
    passes: Annotated[int, typer.Option(min=1, help="Random views of every cloud.")] = 10,
    augment: Annotated[str, typer.Option(help="Change of the views, as data.augment.")] = "scale-translate",
    seed: Annotated[int, typer.Option(help="Seed of the views.")] = 0,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="The backbone's weights, if they moved.")] = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Measure an adapter by voting: one vote, whose protocol is printed with the numbers."""
    plugin = plugin_of(ctx)
    ready(plugin, "data")
    from peft_suite.cli.models import open_adapter, pick_split, saved_data
    from peft_suite.pointcloud.clouds import CloudDataset
    from peft_suite.pointcloud.voting import vote as measure
    from peft_suite.train import Classification

    opened = open_adapter(plugin, adapter, checkpoint)
    if opened.task:
        raise ConfigError(f"vote measures classification, and {adapter} was trained for {opened.task}. Use eval.")
    source = resolve(plugin.data, plugin)
    splits = source.load(saved_data(opened, source, data, {}), opened.metadata["preprocessing"])
    if tuple(splits.classes) != tuple(opened.classes):
        raise ConfigError("The data has other classes, or another order of them, than the adapter. Set data.classes.")
    name, dataset = pick_split(splits, split)
    assert isinstance(dataset, CloudDataset)
    result = measure(
        opened.model,
        dataset,
        Classification(opened.classes),
        passes=passes,
        augment=augment,
        seed=seed,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    facts = {"adapter": str(adapter), "split": name, "samples": len(result.target), **result.to_dict()}
    if json:
        show_json(facts)
    else:
        show_mapping({"split": f"{name}, {len(result.target):,} clouds", **result.metrics, "protocol": result.protocol})
