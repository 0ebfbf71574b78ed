"""The verbs that every plugin gets. Here: ``plan``, ``train`` and ``bench``; the others are in ``use`` and ``listing``.

One function per verb; the group that it was called through says for which plugin.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import note, on_interrupt, show_json, show_mapping, show_table
from peft_suite.cli.flags import with_flags
from peft_suite.cli.listing import list_backbones, list_datasets, list_methods
from peft_suite.cli.root import Json
from peft_suite.cli.settings import assemble, dump, split_methods
from peft_suite.cli.suite import list_recipes, plan_suite, recipe_fields
from peft_suite.cli.use import evaluate, export, merge, predict
from peft_suite.errors import ConfigError
from peft_suite.plugins import Plugin, resolve

if TYPE_CHECKING:
    from peft_suite.train.config import RunConfig

__all__ = ["add_to", "check_fields", "show_comparison", "with_default_backbone"]

_Words = Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Any field, such as recipe.lr=1e-3.")]
_Config = Annotated[Path | None, typer.Option("--config", help="YAML file with the same names as the flags' fields.")]
_Backbone = Annotated[str | None, typer.Option(help="Name; `backbones` lists them. Field backbone.name.")]
_Checkpoint = Annotated[str | None, typer.Option(help="Local weights of the backbone. Field backbone.checkpoint.")]
_Pretrained = Annotated[
    bool | None, typer.Option("--pretrained/--no-pretrained", help="Published weights or random ones.")
]
_Data = Annotated[
    str | None, typer.Option(help="Folder, list file or name; `datasets` lists layouts. Field data.root.")
]
_Method = Annotated[str | None, typer.Option(help="Name, or name(field=value); `methods` lists them.")]
_Epochs = Annotated[int | None, typer.Option(help="Field recipe.epochs.")]
_Lr = Annotated[float | None, typer.Option("--lr", help="Peak learning rate. Field recipe.lr.")]
_Batch = Annotated[int | None, typer.Option(help="Samples per optimizer step. Field recipe.batch_size.")]
_Seed = Annotated[int | None, typer.Option(help="First seed.")]
_Seeds = Annotated[int | None, typer.Option(help="Number of runs with consecutive seeds.")]
_Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
_Shots = Annotated[int | None, typer.Option(help="Training samples per class. Field data.shots.")]
_SkipBad = Annotated[
    bool | None, typer.Option("--skip-bad", help="Leave unreadable files out, with a count. Field data.skip_bad.")
]
_Recipe = Annotated[str | None, typer.Option("--recipe", help="Published settings; `recipes` lists them.")]
_Task = Annotated[str | None, typer.Option("--task", help="Data set of a protocol, such as cifar. Field data.task.")]
_Precision = Annotated[str | None, typer.Option(help="no, bf16 or fp16. Field recipe.precision.")]
_EXAMPLES = {  # with the plugin's own backbone and data, so that they run as they stand
    "plan": "plan --backbone {backbone} --method 'lora(rank=4)'",
    "train": "train --backbone {backbone} --data {data} --method ssf --lr 0.01 --out runs/first",
    "eval": "eval runs/first/adapter",
    "predict": "predict runs/first/adapter FILES --out predictions.csv",
    "merge": "merge runs/first/adapter",
    "export": "export runs/first/adapter exported --format torch-export",
    "bench": "bench --backbone {backbone} --data {data} --methods linear,lora,ssf --seeds 3 --out runs/bench",
    "methods": "methods lora",
    "backbones": "backbones '*small*'",
    "datasets": "datasets --json",
}
_SUITE_EXAMPLES = {"recipes": "recipes --json"}


def add_to(app: typer.Typer, plugin: Plugin) -> None:
    """Add the shared verbs to the group of ``plugin``."""
    functions: tuple[Callable[..., None], ...] = (
        plan,
        train,
        evaluate,
        predict,
        merge,
        export,
        bench,
        list_methods,
        list_backbones,
        list_datasets,
    )
    examples = _EXAMPLES
    if plugin.recipes:
        examples, functions = {**_EXAMPLES, **_SUITE_EXAMPLES}, (*functions, list_recipes)
    for (name, example), function in zip(examples.items(), functions, strict=True):
        backbone, data = plugin.example[0] or "NAME", plugin.example[1] or "PATH"
        shown = example.format(backbone=backbone, data=data)
        chosen = with_flags(function, plugin.flags) if function is train and plugin.flags else function
        app.command(name, epilog=f"Example: peft-suite {plugin.name} {shown}")(chosen)


def plan(
    ctx: typer.Context,
    words: _Words = None,
    config: _Config = None,
    backbone: _Backbone = None,
    method: _Method = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = None,
    data: _Data = None,
    classes: Annotated[int, typer.Option(min=1, help="Width of the head where no --data is given.")] = 100,
    json: Json = False,
) -> None:
    """Show where a method acts and what it trains, without training. Weights are not loaded."""
    plugin = plugin_of(ctx)
    flags = {"backbone": backbone, "method": method, "checkpoint": checkpoint, "pretrained": pretrained, "data": data}
    chosen = assemble(plugin.name, config, flags, words or ())
    result = _make_plan(plugin, chosen, classes)
    if json:
        show_json({"backbone": chosen.backbone.name or _default(plugin), **result.to_dict()})
    else:
        _show_plan(result.to_dict())


def train(
    ctx: typer.Context,
    words: _Words = None,
    config: _Config = None,
    backbone: _Backbone = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = None,
    data: _Data = None,
    method: _Method = None,
    recipe: _Recipe = None,
    task: _Task = None,
    epochs: _Epochs = None,
    lr: _Lr = None,
    batch_size: _Batch = None,
    seed: _Seed = None,
    seeds: _Seeds = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.")] = None,
    device: _Device = None,
    shots: _Shots = None,
    skip_bad: _SkipBad = None,
    precision: _Precision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and configuration, and stop.")] = False,
) -> None:
    """Adapt a backbone to data: writes the adapter, run.json, curves.png and report.html."""
    plugin = plugin_of(ctx)
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other.")
    flags = {
        "backbone": backbone,
        "checkpoint": checkpoint,
        "pretrained": pretrained,
        "data": data,
        "method": method,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "seeds": seeds,
        "out": out,
        "device": device,
        "shots": shots,
        "skip_bad": skip_bad,
        "precision": precision,
    }
    if resume and config is None and out is not None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    start = recipe_fields(plugin, recipe, task)
    flags["task"] = None if recipe else task  # a recipe's task is spelled out by its suite
    chosen = with_default_backbone(plugin, assemble(plugin.name, config, flags, words or (), start))
    check_fields(plugin, chosen)
    if dry_run:
        _show_plan(_make_plan(plugin, chosen, None).to_dict())
        typer.echo(dump(chosen))
        return
    earlier = _earlier(chosen, resume=resume, overwrite=overwrite)
    kept = Path(chosen.out) / "config.yaml"
    from peft_suite.storage import write_text
    from peft_suite.train import run

    with ExitStack() as running:

        def begin() -> None:
            """What is refused before this leaves the folder as it was."""
            if _main_process() and not (resume and kept.exists()):
                while earlier:
                    _clear(earlier.pop())
                write_text(kept, dump(chosen))
            again = f"peft-suite {plugin.name} train --config {kept} --resume"
            running.enter_context(on_interrupt(f"Nothing is lost. Go on with: {again}"))

        run(chosen, resume=resume, begin=begin)


def bench(
    ctx: typer.Context,
    methods: Annotated[str, typer.Option(help="Names or name(field=value), separated by commas.", show_default=False)],
    words: _Words = None,
    config: _Config = None,
    data: Annotated[list[str] | None, typer.Option(help="Task; may be given several times.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Run each method by its recipe; --data is the suite's root.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Only these tasks of the suite, separated by commas.")] = "",
    available: Annotated[bool, typer.Option("--available", help="Leave out tasks of the suite without data.")] = False,
    backbone: _Backbone = None,
    checkpoint: _Checkpoint = None,
    pretrained: _Pretrained = None,
    epochs: _Epochs = None,
    lr: _Lr = None,
    batch_size: _Batch = None,
    seed: _Seed = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per method and task.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the grid; finished runs in it are kept.")] = Path("runs/bench"),
    device: _Device = None,
    shots: _Shots = None,
    skip_bad: _SkipBad = None,
    precision: _Precision = None,
    json: Json = False,
) -> None:
    """Compare methods over tasks and seeds. Start it again to go on; only what is missing runs."""
    plugin = plugin_of(ctx)
    flags = {
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
    again = "Finished runs are kept. Start the same command again to go on."
    chosen = split_methods(methods)
    if suite:
        if len(data or ()) > 1:
            raise typer.BadParameter("A suite has one --data, the folder that holds its tasks.")
        ready(plugin, "data")
        jobs = plan_suite(
            plugin,
            suite,
            chosen,
            out,
            config=config,
            flags={**flags, "data": data[0] if data else None},
            words=words or (),
            seeds=seeds,
            tasks=tasks,
            available=available,
        )
        for job in jobs:
            check_fields(plugin, with_default_backbone(plugin, job.config))
        from peft_suite.train.grid import run_jobs

        with on_interrupt(again):
            rows = run_jobs(jobs, out, progress=not json)
    else:
        if tasks or available:
            raise typer.BadParameter("--tasks and --available belong to --suite.")
        rows = _grid(plugin, assemble(plugin.name, config, flags, words or ()), chosen, data, seeds, out, again, json)
    from peft_suite.report import write_comparison, write_report

    for row in rows:
        folder = Path(row["out"])
        if row["status"] == "finished" and not (folder / "report.html").exists():
            write_report(folder)
    page = write_comparison(out)
    if json:
        show_json({"page": str(page), "runs": rows})
    else:
        show_comparison(out)
        typer.echo(f"comparison  {page}")
    if not any(row["status"] == "finished" for row in rows):
        raise typer.Exit(1)


def _grid(
    plugin: Plugin,
    base: RunConfig,
    chosen: Sequence[str],
    data: Sequence[str] | None,
    seeds: int,
    out: Path,
    again: str,
    quiet: bool,
) -> list[dict[str, Any]]:
    """The grid of methods and data that the flags spell out."""
    base = with_default_backbone(plugin, base)
    roots = list(data or ()) or [str(base.data.get("root") or "")]
    tasks = _tasks(roots)
    for method in chosen:
        for root in roots:
            check_fields(plugin, base.replace(method=method, data={**base.data, "root": root}))
    from peft_suite.train import bench as grid

    with on_interrupt(again):
        return grid(base, chosen, tasks, list(range(base.seed, base.seed + seeds)), out, progress=not quiet)


def show_comparison(out: Path) -> None:
    """The table of a grid, from the file that the comparison page wrote."""
    import json

    record = json.loads((out / "comparison.json").read_text("utf-8"))
    rows = []
    for row in record["rows"]:
        spread = f" ± {100 * row['std']:.1f}" if row["std"] is not None else ""
        share = f"{100 * row['share']:.2f} %" if row["share"] is not None else ""
        score = f"{100 * row['mean']:.1f}{spread} %" if row["mean"] is not None else "failed"
        counts = {k: None if row[k] is None else round(row[k]) for k in ("trainable", "adapter_bytes")}
        rows.append({**row, **counts, "score": score, "share": share, "runs": len(row["seeds"])})
    if "means" in record:
        _show_means(record)
    columns = {"task": "task", "method": "method", "score": record["metric"], "runs": "runs", "trainable": "trainable"}
    show_table(rows, {**columns, "share": "of all", "seconds": "seconds", "adapter_bytes": "adapter bytes"})
    for failure in record["failures"]:
        note(f"Not finished: {failure['run']}: {failure['reason']}")


def _show_means(record: Mapping[str, Any]) -> None:
    """Means of a suite with the published ones in brackets."""
    rows = []
    for row in record["means"]:
        cells = {}
        for name, value in row["means"].items():
            paper = row["published"].get(name)
            mean = "" if value["mean"] is None else f"{100 * value['mean']:.1f}"
            part = "groups not whole" if name == "mean of groups" else f"{value['done']} of {value['of']}"
            part = f" ({part})" if value["partial"] and mean else ""
            cells[name] = f"{mean}{part}" + ("" if paper is None else f" [{paper:.1f}]")
        rows.append({"method": row["label"], **cells})
    names = list(record["means"][0]["means"]) if record["means"] else []
    names = names if len(names) > 3 else ["mean of tasks"]  # of one group, all means are the same
    show_table(rows, {"method": "method", **{n: n for n in names}}, "Means in %, published ones in brackets")


def _default(plugin: Plugin) -> str:
    return str(getattr(resolve(plugin.backbones, plugin), "default", ""))


def with_default_backbone(plugin: Plugin, config: RunConfig) -> RunConfig:
    """The configuration with the plugin's default backbone where it names none; ConfigError without a default."""
    ready(plugin)
    name = config.backbone.name or _default(plugin)
    if not name:
        raise ConfigError(
            f"No backbone is given. Say --backbone NAME; list them with: peft-suite {plugin.name} backbones"
        )
    return config.replace(backbone=config.backbone.replace(name=name))


def check_fields(plugin: Plugin, config: RunConfig) -> None:
    """Method and data fields are right, before anything is written or loaded."""
    ready(plugin, "data")
    from peft_suite.method import make_method

    plugin = plugin.for_task(config.task)
    make_method(config.method)
    if not config.data.get("root"):
        raise ConfigError(f"No data is given. Say --data PATH; list layouts with: peft-suite {plugin.name} datasets")
    resolve(plugin.data, plugin).config.from_dict(config.data)


def _make_plan(plugin: Plugin, config: RunConfig, classes: int | None) -> Any:
    plugin = plugin.for_task(config.task)
    config = with_default_backbone(plugin, config)
    import peft_suite as ps

    if config.data.get("root"):
        ready(plugin, "data")
        source = resolve(plugin.data, plugin)
        classes = len(source.classes(source.config.from_dict(config.data))[0])
    one = config.backbone
    backbones = resolve(plugin.backbones, plugin)
    model = backbones.build(one.name, classes or 100, pretrained=False, checkpoint="", options=one.options)
    from peft_suite.train.running import prepared

    return ps.plan(model, prepared(backbones, model, config.spec))


def _show_plan(plan: Mapping[str, Any]) -> None:
    columns = {"point": "point", "edit": "edit", "shapes": "tensors", "parameters": "parameters", "mergeable": "folds"}
    show_table(plan["rows"], columns)
    share = 100 * plan["trainable"] / plan["total"] if plan["total"] else 0.0
    show_mapping(
        {
            "method": plan["config"],
            "trainable": f"{plan['trainable']:,} of {plan['total']:,} parameters ({share:.3f} %)",
            "adapter file": f"about {plan['adapter_bytes'] / 1024:,.1f} KiB",
            "merges into the weights": bool(plan["mergeable"]),
        }
    )


def _earlier(config: RunConfig, *, resume: bool, overwrite: bool) -> list[Path]:
    """Folders of earlier runs, to be replaced; ConfigError unless told to."""
    if resume or not _main_process():
        return []
    from peft_suite.report.records import read_run

    out = Path(config.out)
    seeds = range(config.seed, config.seed + config.seeds)
    folders = [out] if config.seeds == 1 else [out / f"seed-{s}" for s in seeds]
    found = [f for f in folders if (f / "run.json").exists()]
    if found and not overwrite:
        status = read_run(found[0]).data.get("status") or "unknown"
        raise ConfigError(
            f"{found[0]} already holds a run (status: {status}); nothing was changed. Choose another --out, go on with "
            "--resume, or replace it with --overwrite."
        )
    return found


def _clear(folder: Path) -> None:
    """Take away what an earlier run would be resumed from."""
    (folder / "run.json").unlink()
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / "checkpoint")


def _main_process() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0


def _tasks(roots: Sequence[str]) -> list[dict[str, Any]]:
    """Tasks of a grid, named by the last part of their path, numbered where two would be called alike."""
    tasks: list[dict[str, Any]] = []
    for root in roots:
        name = Path(root).name or root or "data"
        used = [t["name"] for t in tasks]
        number = 2
        unique = name
        while unique in used:
            unique, number = f"{name}-{number}", number + 1
        tasks.append({"name": unique, "data": {"root": root}})
    return tasks
