"""``peft-suite pointcloud vote``: measure an adapter by the mean of several random views of every cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import show_json, show_mapping
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError
from peft_suite.plugins import Plugin, resolve

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
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="One ending in -paper: its best of 299 votes by test labels.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Votes to take the best of, with such a --recipe.", show_default=False)
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="The backbone's weights, if they moved.")] = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Measure an adapter by voting: one vote, whose protocol is printed with the numbers."""
    plugin = plugin_of(ctx)
    times, reproduces = _repetitions(plugin, recipe, repetitions)
    ready(plugin, "data")
    from peft_suite.cli.models import pick_split, saved_data
    from peft_suite.pointcloud.clouds import CloudDataset
    from peft_suite.pointcloud.voting import vote as measure
    from peft_suite.train import Classification, open_adapter

    opened = open_adapter(adapter, plugin=plugin, checkpoint=checkpoint)
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
        repetitions=times,
        reproduces=reproduces,
        seed=seed,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    facts = {"adapter": str(adapter), "split": name, "samples": len(result.target), **result.to_dict()}
    if json:
        show_json(facts)
    else:
        chosen = {} if result.best is None else {"best": result.best}
        clouds = f"{name}, {len(result.target):,} clouds"
        show_mapping({"split": clouds, **result.metrics, **chosen, "protocol": result.protocol})


def _repetitions(plugin: Plugin, recipe: str | None, repetitions: int | None) -> tuple[int, str]:
    """(votes, what ``vote(reproduces=...)`` gets): more than one only for a recipe that reproduces a paper."""
    if recipe is None:
        if repetitions not in (None, 1):
            raise ConfigError(
                f"--repetitions {repetitions} reports the best of several votes, chosen by the test labels. Leave it "
                "out, or name the recipe whose paper did so: --recipe NAME-paper."
            )
        return 1, ""
    from peft_suite.cli.suite import book_of
    from peft_suite.pointcloud.voting import OFFICIAL_REPETITIONS

    found = book_of(plugin).recipe(recipe)
    if found.reproduces != "paper":
        raise ConfigError(
            f"The recipe {recipe!r} does not choose by test labels, so it has one vote. Leave --recipe out, or name "
            "one that reproduces a paper (its name ends in -paper)."
        )
    return repetitions or OFFICIAL_REPETITIONS, "paper"
