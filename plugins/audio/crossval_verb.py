"""``peft-suite audio crossval``: every fold tests once; mean and spread over the folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_suite.cli.common import plugin_of
from peft_suite.cli.console import note, on_interrupt, show_json, show_table
from peft_suite.cli.root import Json
from peft_suite.cli.settings import assemble, split_methods
from peft_suite.cli.verbs import check_fields, with_default_backbone

__all__ = ["crossval"]


def crossval(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Any field, such as recipe.lr=1e-3.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with the same names as the flags' fields.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data with folds or speakers. Field data.root.")] = None,
    methods: Annotated[str, typer.Option(help="Names or name(field=value), separated by commas.")] = "linear",
    over: Annotated[str, typer.Option(help="fold, speaker, or auto: folds where there are some.")] = "auto",
    folds: Annotated[str, typer.Option(help="Only these folds or speakers, separated by commas.")] = "",
    backbone: Annotated[str | None, typer.Option(help="Name; `backbones` lists them. Field backbone.name.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Local weights. Field backbone.checkpoint.")] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained/--no-pretrained", help="Published weights or random ones.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Field recipe.epochs.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate. Field recipe.lr.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per optimizer step. Field recipe.batch_size.")] = None,
    seed: Annotated[int | None, typer.Option(help="First seed.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method and fold.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are kept.")] = Path(
        "runs/crossval"
    ),
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    shots: Annotated[int | None, typer.Option(help="Training samples per class. Field data.shots.")] = None,
    skip_bad: Annotated[
        bool | None, typer.Option("--skip-bad", help="Leave unusable files out, with a count. Field data.skip_bad.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16. Field recipe.precision.")] = None,
    json: Json = False,
) -> None:
    """Train and test once per fold (or speaker). Start it again to go on; only what is missing runs."""
    plugin = plugin_of(ctx)
    flags = {
        "data": data,
        "backbone": backbone,
        "checkpoint": checkpoint,
        "pretrained": pretrained,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "shots": shots,
        "skip_bad": skip_bad,
        "precision": precision,
    }
    base = with_default_backbone(plugin, assemble(plugin.name, config, flags, words or ()))
    chosen = split_methods(methods)
    for method in chosen:
        check_fields(plugin, base.replace(method=method))
    from peft_suite.audio.crossval import cross_validate
    from peft_suite.report import write_report

    only = [part.strip() for part in folds.split(",") if part.strip()]
    run_seeds = range(base.seed, base.seed + seeds)
    with on_interrupt("Finished runs are kept. Start the same command again to go on."):
        result = cross_validate(base, chosen, list(run_seeds), out, over=over, only=only, progress=not json)
    for record in sorted(out.glob("*/*/seed-*/run.json")):
        if not (record.parent / "report.html").exists():
            write_report(record.parent)
    if json:
        show_json({"page": str(out / "comparison.html"), **result})
    else:
        rows = []
        for row in result["methods"]:
            spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
            mean = "failed" if row["mean"] is None else f"{100 * row['mean']:.1f}{spread} %"
            scores = {fold: f"{100 * score:.1f}" for fold, score in row["folds"].items()}
            rows.append({"method": row["method"], "mean": mean, "trainable": row["trainable"], **scores})
        columns = {"method": "method", "mean": f"{result['metric']}, mean over folds", "trainable": "trainable"}
        show_table(rows, columns | {fold: fold for fold in result["folds"]})
        for where, reason in result["errors"].items():
            note(f"Not finished: {where}: {reason}")
        typer.echo(f"comparison  {out / 'comparison.html'}")
    if all(row["mean"] is None for row in result["methods"]):
        raise typer.Exit(1)
