"""``peft-suite diffusion memcontrol``: search which places may train, against what the model memorises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import console, note, on_interrupt, show_json, show_table
from peft_suite.cli.root import Json
from peft_suite.cli.settings import assemble, dump
from peft_suite.cli.verbs import check_fields, with_default_backbone
from peft_suite.errors import ConfigError

__all__ = ["memcontrol"]


def memcontrol(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Any field of a trial, such as recipe.epochs=5.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with the same names as the flags' fields.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Name; `backbones` lists them. Field backbone.name.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Local weights. Field backbone.checkpoint.")] = None,
    data: Annotated[str | None, typer.Option(help="Images. Field data.root.")] = None,
    method: Annotated[str | None, typer.Option(help="The method that is masked, such as 'lora(rank=4)'.")] = None,
    objectives: Annotated[
        str,
        typer.Option(
            help="At least two, all minimised, separated by commas: max_norm, avg_norm, copies (memory), frechet, loss "
            "(quality)."
        ),
    ] = "avg_norm,loss",
    features: Annotated[
        str, typer.Option(help="Network of frechet: a judge's .safetensors, inception:FILE, clip:FOLDER, or pixels.")
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="In all, with those of earlier starts.")] = 20,
    share: Annotated[float, typer.Option(help="Of the training images, for every trial.")] = 1.0,
    lr_low: Annotated[float, typer.Option(help="Learning rates are drawn log-uniformly from here")] = 1e-5,
    lr_high: Annotated[float, typer.Option(help="to here.")] = 1e-3,
    sampler: Annotated[str, typer.Option(help="nsga2, tpe or random.")] = "nsga2",
    thirteen: Annotated[
        bool, typer.Option("--thirteen", help="No bit for the third stack of up blocks, which then always trains.")
    ] = False,
    containing: Annotated[
        str, typer.Option(help="Switch only parts whose key contains this, such as gamma for difffit.")
    ] = "",
    images: Annotated[int, typer.Option(min=2, help="Drawn after every trial, for frechet and copies.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of these.")] = 25,
    guidance: Annotated[float, typer.Option(help="Of these; 1 is the condition alone.")] = 1.0,
    threshold: Annotated[float, typer.Option(help="Tile distance below which an image is a copy.")] = 20.0,
    epochs: Annotated[int | None, typer.Option(help="Of a trial. Field recipe.epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Field recipe.batch_size.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search and of every trial.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the search.")] = Path("runs/memcontrol"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")] = False,
    best: Annotated[
        int | None,
        typer.Option(
            help="Trial whose settings best.yaml shall have; the suggested one by default.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Search masks over blocks and a learning rate; writes the Pareto front as JSON, CSV and PNG, and best.yaml."""
    plugin = plugin_of(ctx)
    ready(plugin, "data")
    named = [name.strip() for name in objectives.split(",") if name.strip()]
    if len(named) < 2:
        raise ConfigError(f"--objectives {objectives!r}: name at least two, separated by commas.")
    flags = {
        "backbone": backbone,
        "checkpoint": checkpoint,
        "data": data,
        "method": method,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "out": out,
    }
    base = with_default_backbone(plugin, assemble(plugin.name, config, flags, words or ()))
    check_fields(plugin, base)
    from peft_suite.diffusion.memcontrol import Search, SearchConfig
    from peft_suite.diffusion.memcontrol_trials import FineTuning
    from peft_suite.diffusion.networks import network_of

    space = SearchConfig.from_dict(
        {"trials": trials, "lr_low": lr_low, "lr_high": lr_high, "sampler": sampler, "seed": base.seed}
    )
    tuning = FineTuning(
        base,
        named,
        share=share,
        network=network_of(features) if features else None,
        thirteen=thirteen,
        containing=containing,
        images=images,
        steps=steps,
        guidance=guidance,
        threshold=threshold,
    )
    search = Search(tuning.groups, named, space, out, facts=tuning.facts(), resume=resume)
    with on_interrupt(f"Finished trials are kept. Go on with the same command and --resume (folder {out})."):
        _run(search, tuning, trials, quiet=json)
    chosen = search.best(best)
    file = None
    if tuning.trains(chosen):
        from peft_suite.storage import write_text

        final = base.replace(
            method=tuning.spec_of(chosen),
            recipe=tuning.recipe_of(chosen),
            out=str(out / f"trial-{chosen.number}"),
        )
        file = write_text(out / "best.yaml", dump(final))
    _tell(search, chosen.number, file, plugin.name, json)


def _run(search: Any, tuning: Any, trials: int, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*parts, console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("trials", total=trials, completed=len(search.rows()), note="")

        def show(number: int, row: Mapping[str, Any]) -> None:
            values = ", ".join(f"{k} {v:.4g}" for k, v in row["values"].items()) or row.get("error", "")
            bar.update(task, completed=number, note=values)

        search.run(tuning, progress=show)


def _tell(search: Any, number: int, file: Path | None, plugin: str, json: bool) -> None:
    from peft_suite.diffusion.pareto import front

    rows = search.rows()
    best = front(rows, search.objectives)
    if json:
        show_json(
            {"out": str(search.out), "best": file and str(file), "chosen": number, "pareto": best, "trials": len(rows)}
        )
        return
    shown = [
        {
            "number": f"{r['number']}{' *' * (r['number'] == number)}",
            **{name: f"{r['values'][name]:.4g}" for name in search.objectives},
            "lr": f"{r['learning_rate']:.2e}",
            "trained": f"{r['trained']:,}",
            "mask": "".join(map(str, r["mask"])),
        }
        for r in best
    ]
    columns = {"number": "trial", **{n: n for n in search.objectives}, "lr": "lr", "trained": "trained", "mask": "mask"}
    show_table(shown, columns, f"Pareto front of {len(rows)} trials; bits: {', '.join(g.name for g in search.groups)}")
    for row in rows:
        if "error" in row:
            note(f"Trial {row['number']} failed: {row['error']}")
    console().print(f"front  {search.out / 'pareto.json'}, .csv, .png", soft_wrap=True)
    if file is None:
        console().print(f"Trial {number} trains nothing: the frozen model itself. Choose another one.")
    else:
        console().print(f"next   peft-suite {plugin} train --config {file}", soft_wrap=True)
    console().print("Another trial: the same command with --resume --best NUMBER.", soft_wrap=True)
