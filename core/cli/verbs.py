"""The verbs that every plugin gets: ``peft-suite PLUGIN plan | train | eval | predict | merge | export | bench | ...``.

One function per verb; the group that it was called through says for which plugin.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peft_suite.cli.console import console, note, on_interrupt, show_json, show_mapping, show_table
from peft_suite.cli.root import Json, show_methods
from peft_suite.cli.settings import assemble, dump, overrides, split_methods
from peft_suite.errors import ConfigError, DataError, PluginError, UnknownNameError
from peft_suite.plugins import Plugin, find_plugin, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from peft_suite.cli.models import Opened
    from peft_suite.train.config import RunConfig

__all__ = ["add_to"]

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
_Precision = Annotated[str | None, typer.Option(help="no, bf16 or fp16. Field recipe.precision.")]
_Adapter = Annotated[
    Path, typer.Argument(help="Adapter directory of a run, or a merged model's directory.", show_default=False)
]
_Weights = Annotated[str, typer.Option("--checkpoint", help="The backbone's weights, if they moved since training.")]

_EXAMPLES = {
    "plan": "plan --method 'lora(rank=4)'",
    "train": "train --data photos --method ssf --epochs 20 --out runs/photos",
    "eval": "eval runs/photos/adapter --data photos",
    "predict": "predict runs/photos/adapter new_photos --out predictions.csv",
    "merge": "merge runs/photos/adapter merged",
    "export": "export runs/photos/adapter exported --format timm",
    "bench": "bench --data photos --methods linear,lora,ssf --seeds 3 --out runs/bench",
    "methods": "methods lora",
    "backbones": "backbones '*small*'",
    "datasets": "datasets --json",
}


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
    for (name, example), function in zip(_EXAMPLES.items(), functions, strict=True):
        app.command(name, epilog=f"Example: peft-suite {plugin.name} {example}")(function)


def plan(
    ctx: typer.Context,
    words: _Words = None,
    config: _Config = None,
    backbone: _Backbone = None,
    method: _Method = None,
    checkpoint: _Checkpoint = None,
    data: _Data = None,
    classes: Annotated[int, typer.Option(min=1, help="Width of the head where no --data is given.")] = 100,
    json: Json = False,
) -> None:
    """Show where a method acts and what it trains, without training. Weights are not loaded."""
    plugin = _plugin(ctx)
    flags = {"backbone": backbone, "method": method, "checkpoint": checkpoint, "data": data}
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
    epochs: _Epochs = None,
    lr: _Lr = None,
    batch_size: _Batch = None,
    seed: _Seed = None,
    seeds: _Seeds = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.")] = None,
    device: _Device = None,
    shots: _Shots = None,
    precision: _Precision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan and configuration, and stop.")] = False,
) -> None:
    """Adapt a backbone to data: writes the adapter, run.json, curves.png and report.html."""
    plugin = _plugin(ctx)
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
        "precision": precision,
    }
    if resume and config is None and out is not None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    chosen = _with_default_backbone(plugin, assemble(plugin.name, config, flags, words or ()))
    _check(plugin, chosen)
    if dry_run:
        _show_plan(_make_plan(plugin, chosen, None).to_dict())
        typer.echo(dump(chosen))
        return
    target = Path(chosen.out)
    _guard(chosen, resume=resume, overwrite=overwrite)
    from peft_suite.train import run

    if _main_process() and not (resume and (target / "config.yaml").exists()):
        from peft_suite.storage import write_text

        write_text(target / "config.yaml", dump(chosen))
    again = f"peft-suite {plugin.name} train --config {target / 'config.yaml'} --resume"
    with on_interrupt(f"Nothing is lost. Go on with: {again}"):
        run(chosen, resume=resume)


def evaluate(
    ctx: typer.Context,
    adapter: _Adapter,
    words: _Words = None,
    data: _Data = None,
    split: Annotated[str, typer.Option(help="test, val, train; auto takes the first there is.")] = "auto",
    checkpoint: _Weights = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Measure an adapter on data; without --data, on the data it was trained with."""
    plugin = _plugin(ctx)
    changes = _data_words(words)
    _ready(plugin, "data")
    from peft_suite.cli.models import aligned, pick_split, saved_data
    from peft_suite.train import Classification
    from peft_suite.train import evaluate as measure

    opened = _open(plugin, adapter, checkpoint)
    source = resolve(plugin.data, plugin)
    splits = source.load(saved_data(opened, source, data, changes), opened.metadata["preprocessing"])
    name, dataset = pick_split(splits, split)
    task = Classification(opened.classes, opened.multi_label)
    result = measure(
        opened.model,
        aligned(splits, dataset, opened),
        task,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    if json:
        keys = ("metrics", "per_class", "confusion", "samples")
        show_json({"adapter": str(adapter), "split": name, **{k: result[k] for k in keys}})
        return
    show_mapping({"split": f"{name}, {result['samples']:,} samples", **result["metrics"]})
    rows = [{"class": k, "score": v} for k, v in result["per_class"].items() if v is not None]
    show_table(sorted(rows, key=lambda r: r["score"])[:20], {"class": "class, weakest first", "score": "score"})


def predict(
    ctx: typer.Context,
    adapter: _Adapter,
    paths: Annotated[list[str], typer.Argument(help="Files and folders (searched recursively).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Write .csv or .json instead of a table.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes per file, the most probable first.")] = 1,
    checkpoint: _Weights = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Predict classes of files."""
    plugin = _plugin(ctx)
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ConfigError(f"--out {out}: the name must end in .csv or .json.")
    if lost := [p for p in paths if not Path(p).exists()]:
        raise DataError(f"{lost[0]} does not exist. Give files or folders.")
    _ready(plugin, "data")
    from peft_suite.train import predict as infer

    opened = _open(plugin, adapter, checkpoint)
    names, dataset = resolve(plugin.data, plugin).inputs(paths, opened.metadata["preprocessing"])
    logits = infer(opened.model, dataset, batch_size=batch_size, device=device, precision=precision)
    rows = _predictions(names, logits, opened, top)
    if out is not None:
        from peft_suite.storage import write_text

        write_text(out, _csv(rows, top) if out.suffix.lower() == ".csv" else _dumps(rows))
        note(f"{len(rows)} predictions written to {out}")
    if json:
        show_json(rows)
    elif out is None:
        flat = [
            {**row, "others": ", ".join(f"{t['class']} {t['probability']:.3f}" for t in row["top"][1:])} for row in rows
        ]
        columns = {"file": "file", "prediction": "prediction", "probability": "probability"}
        show_table(flat, columns | ({"others": "next"} if top > 1 else {}))


def merge(
    ctx: typer.Context,
    adapter: _Adapter,
    out: Annotated[Path | None, typer.Argument(help="Folder; by default `merged` beside the adapter.")] = None,
    checkpoint: _Weights = "",
) -> None:
    """Fold an adapter into the backbone: plain weights that run at the plain model's speed."""
    plugin = _plugin(ctx)
    _ready(plugin, "backbones")
    from peft_suite.cli.export import merge_in_place, write_merged

    opened = _open(plugin, adapter, checkpoint)
    if opened.merged:
        raise ConfigError(f"{adapter} is a merged model already.")
    target = out or adapter.parent / "merged"
    merge_in_place(opened)
    files = write_merged(opened, target)
    _told(files)
    note(f"Next: peft-suite {plugin.name} eval {target}, or --checkpoint {files[0]} as weights of a new run")


def export(
    ctx: typer.Context,
    adapter: _Adapter,
    out: Annotated[Path, typer.Argument(help="Folder, or a .pt2 or .onnx file.", show_default=False)],
    format: Annotated[
        Literal["timm", "hf", "torch-export", "onnx", "peft"],
        typer.Option(help="peft writes a LoRA directory for Hugging Face peft; the others hold the merged model."),
    ] = "timm",
    rank: Annotated[int, typer.Option(min=0, help="For peft: rank of approximations; 0 refuses them.")] = 0,
    checkpoint: _Weights = "",
) -> None:
    """Write the merged model for other tools, and check that it loads with equal outputs."""
    plugin = _plugin(ctx)
    _ready(plugin, "backbones")
    from peft_suite.cli.export import export as write

    _told(write(_open(plugin, adapter, checkpoint), out, format, rank))


def bench(
    ctx: typer.Context,
    methods: Annotated[str, typer.Option(help="Names or name(field=value), separated by commas.", show_default=False)],
    words: _Words = None,
    config: _Config = None,
    data: Annotated[list[str] | None, typer.Option(help="Task; may be given several times.")] = None,
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
    precision: _Precision = None,
    json: Json = False,
) -> None:
    """Compare methods over tasks and seeds. Start it again to go on; only what is missing runs."""
    plugin = _plugin(ctx)
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
        "precision": precision,
    }
    base = _with_default_backbone(plugin, assemble(plugin.name, config, flags, words or ()))
    chosen = split_methods(methods)
    roots = list(data or ()) or [str(base.data.get("root") or "")]
    tasks = _tasks(roots)
    for method in chosen:
        for root in roots:
            _check(plugin, base.replace(method=method, data={**base.data, "root": root}))
    from peft_suite.report import write_comparison, write_report
    from peft_suite.train import bench as grid

    again = "Finished runs are kept. Start the same command again to go on."
    with on_interrupt(again):
        rows = grid(base, chosen, tasks, list(range(base.seed, base.seed + seeds)), out, progress=not json)
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


def list_methods(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="One method, in detail.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """List the methods (every plugin's methods serve every backbone that can carry them)."""
    _plugin(ctx)
    show_methods(name, json)


def list_backbones(
    ctx: typer.Context,
    pattern: Annotated[str, typer.Argument(help="Glob on the name.")] = "*",
    json: Json = False,
) -> None:
    """List backbones."""
    plugin = _plugin(ctx)
    _ready(plugin, "backbones")
    found = resolve(plugin.backbones, plugin).list(pattern)
    if json:
        show_json([{k: getattr(b, k) for k in ("name", "family", "summary", "parameters")} for b in found])
        return
    if not found:
        every = [b.name for b in resolve(plugin.backbones, plugin).list()]
        raise UnknownNameError("backbone", pattern, every, "Patterns may hold * and ?.")
    show_table(
        [vars(b) for b in found], {"name": "backbone", "family": "family", "parameters": "parameters", "summary": ""}
    )


def list_datasets(ctx: typer.Context, json: Json = False) -> None:
    """List data layouts and built-in data sets, and the fields of data.*"""
    plugin = _plugin(ctx)
    rows = [{"name": d.name, "summary": d.summary} for d in plugin.datasets]
    if json:
        show_json(rows)
        return
    show_table(rows, {"name": "layout or data set", "summary": ""})
    if plugin.data and not plugin.missing():
        from peft_suite.config import field_table

        fields = field_table(resolve(plugin.data, plugin).config)
        show_table(
            [{**f, "name": f"data.{f['name']}"} for f in fields],
            {"name": "field", "type": "type", "default": "default"},
        )


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
    columns = {"task": "task", "method": "method", "score": record["metric"], "runs": "runs", "trainable": "trainable"}
    show_table(rows, {**columns, "share": "of all", "seconds": "seconds", "adapter_bytes": "adapter bytes"})
    for failure in record["failures"]:
        note(f"Not finished: {failure['run']}: {failure['reason']}")


def _plugin(ctx: typer.Context) -> Plugin:
    parent: Any = ctx.parent
    return find_plugin(str(parent.info_name))


def _ready(plugin: Plugin, *needs: str) -> None:
    """The plugin declares what the verb needs, and its libraries are installed."""
    for need in ("backbones", *needs):
        if not getattr(plugin, need):
            raise PluginError(f"The plugin {plugin.name!r} declares no {need}, so this verb does not work for it.")
    plugin.ensure()


def _default(plugin: Plugin) -> str:
    return str(getattr(resolve(plugin.backbones, plugin), "default", ""))


def _with_default_backbone(plugin: Plugin, config: RunConfig) -> RunConfig:
    _ready(plugin)
    name = config.backbone.name or _default(plugin)
    if not name:
        raise ConfigError(
            f"No backbone is given. Say --backbone NAME; list them with: peft-suite {plugin.name} backbones"
        )
    return config.replace(backbone=config.backbone.replace(name=name))


def _check(plugin: Plugin, config: RunConfig) -> None:
    """Method and data fields are right, before anything is written or loaded."""
    _ready(plugin, "data")
    from peft_suite.method import make_method

    make_method(config.method)
    if not config.data.get("root"):
        raise ConfigError(f"No data is given. Say --data PATH; list layouts with: peft-suite {plugin.name} datasets")
    resolve(plugin.data, plugin).config.from_dict(config.data)


def _make_plan(plugin: Plugin, config: RunConfig, classes: int | None) -> Any:
    config = _with_default_backbone(plugin, config)
    import peft_suite as ps

    if config.data.get("root"):
        _ready(plugin, "data")
        source = resolve(plugin.data, plugin)
        classes = len(source.classes(source.config.from_dict(config.data))[0])
    one = config.backbone
    model = resolve(plugin.backbones, plugin).build(
        one.name, classes or 100, pretrained=False, checkpoint="", options=one.options
    )
    return ps.plan(model, config.method if isinstance(config.method, str) else dict(config.method))


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


def _guard(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Never train over an earlier run unless told to."""
    if resume or not _main_process():
        return
    from peft_suite.report.records import read_run

    out = Path(config.out)
    seeds = range(config.seed, config.seed + config.seeds)
    folders = [out] if config.seeds == 1 else [out / f"seed-{s}" for s in seeds]
    for folder in [f for f in folders if (f / "run.json").exists()]:
        if overwrite:
            (folder / "run.json").unlink()
            with suppress(FileNotFoundError):
                shutil.rmtree(folder / "checkpoint")
            continue
        status = read_run(folder).data.get("status") or "unknown"
        raise ConfigError(
            f"{folder} already holds a run (status: {status}); nothing was changed. Choose another --out, go on with "
            "--resume, or replace it with --overwrite."
        )


def _main_process() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0


def _open(plugin: Plugin, adapter: Path, checkpoint: str) -> Opened:
    from peft_suite.cli.models import open_adapter

    return open_adapter(plugin, adapter, checkpoint)


def _data_words(words: Sequence[str] | None) -> dict[str, Any]:
    changes = {}
    for name, value in overrides(words or ()):
        head, _, field = name.partition(".")
        if head != "data" or not field:
            raise ConfigError(
                f"Unknown field {name!r}. Only fields of data can be set here, for example data.workers=2."
            )
        changes[field] = value
    return changes


def _predictions(names: Sequence[str], logits: Tensor, opened: Opened, top: int) -> list[dict[str, Any]]:
    """One row per file; probabilities are softmax, or a sigmoid for each label."""
    chances = logits.sigmoid() if opened.multi_label else logits.softmax(dim=1)  # [N, C]
    classes = opened.classes or tuple(str(i) for i in range(chances.shape[1]))
    values, indices = chances.topk(min(top, chances.shape[1]), dim=1)
    rows = []
    for name, chance, best, order in zip(names, chances.tolist(), values.tolist(), indices.tolist(), strict=True):
        listed = [{"class": classes[i], "probability": round(v, 6)} for i, v in zip(order, best, strict=True)]
        said: str | list[str] = [c for c, p in zip(classes, chance, strict=True) if p > 0.5]
        if not opened.multi_label:
            said = listed[0]["class"]
        rows.append({"file": name, "prediction": said, "probability": listed[0]["probability"], "top": listed})
    return rows


def _csv(rows: Sequence[Mapping[str, Any]], top: int) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    count = min(top, len(rows[0]["top"])) if rows else 1
    extra = [f"{what}_{i}" for i in range(2, count + 1) for what in ("class", "probability")]
    writer.writerow(["file", "prediction", "probability", *extra])
    for row in rows:
        said = row["prediction"] if isinstance(row["prediction"], str) else ";".join(row["prediction"])
        others = [x for t in row["top"][1:] for x in (t["class"], t["probability"])]
        writer.writerow([row["file"], said, row["probability"], *others])
    return stream.getvalue()


def _dumps(rows: Any) -> str:
    import json

    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


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


def _told(files: Sequence[Path]) -> None:
    for file in files:
        console().print(f"{file}  {file.stat().st_size:,} bytes", markup=False, soft_wrap=True)
