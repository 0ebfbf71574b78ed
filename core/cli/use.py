"""Verbs that use an adapter: ``eval``, ``predict``, ``merge``, ``export``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import console, note, show_json, show_mapping, show_table
from peft_suite.cli.root import Json
from peft_suite.cli.settings import overrides
from peft_suite.errors import ConfigError, DataError, MergeError
from peft_suite.plugins import Plugin, resolve
from peft_suite.storage import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from peft_suite.train.opening import Opened

__all__ = ["evaluate", "export", "merge", "predict", "prediction_rows", "write_rows"]

_Words = Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Any field, such as data.workers=2.")]
_Adapter = Annotated[
    Path, typer.Argument(help="Adapter directory of a run, or a merged model's directory.", show_default=False)
]
_Weights = Annotated[str, typer.Option("--checkpoint", help="The backbone's weights, if they moved since training.")]


def evaluate(
    ctx: typer.Context,
    adapter: _Adapter,
    words: _Words = None,
    data: Annotated[str | None, typer.Option(help="Other data than the adapter was trained with.")] = None,
    split: Annotated[str, typer.Option(help="test, val, train; auto takes the first there is.")] = "auto",
    checkpoint: _Weights = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Measure an adapter on data; without --data, on the data it was trained with."""
    plugin = plugin_of(ctx)
    changes = _data_words(words)
    ready(plugin, "data")
    from peft_suite.cli.models import aligned, pick_split, saved_data
    from peft_suite.train import Classification
    from peft_suite.train import evaluate as measure

    opened = _open(plugin, adapter, checkpoint)
    plugin = plugin.for_task(opened.task)
    source = resolve(plugin.data, plugin)
    splits = source.load(saved_data(opened, source, data, changes), opened.metadata["preprocessing"])
    name, dataset = pick_split(splits, split)
    task = splits.task or Classification(opened.classes, opened.multi_label)
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
    out: Annotated[Path | None, typer.Option(help="A .csv or .json instead of a table; a folder for maps.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes per file, the most probable first.")] = 1,
    checkpoint: _Weights = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Predict classes of files, or of every pixel or point where that is the task."""
    plugin = plugin_of(ctx)
    if lost := [p for p in paths if not Path(p).exists()]:
        raise DataError(f"{lost[0]} does not exist. Give files or folders.")
    ready(plugin, "data")
    from peft_suite.train import outputs
    from peft_suite.train import predict as infer

    opened = _open(plugin, adapter, checkpoint)
    plugin = plugin.for_task(opened.task)
    source = resolve(plugin.data, plugin)
    settings: dict[str, Any] = {"batch_size": batch_size, "device": device, "precision": precision}
    if opened.task:
        folder = _folder_for(opened, source, out)
        names, dataset = source.inputs(paths, opened.metadata["preprocessing"])
        found = source.write(names, outputs(opened.model, dataset, **settings), folder, opened.classes)
        write_json(folder / "predictions.json", found)
        if json:
            show_json(found)
        else:
            show_table(found[:50], {name: name for name in found[0]})
        note(f"{len(found)} predictions written to {folder}")
        return
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ConfigError(f"--out {out}: the name must end in .csv or .json.")
    names, dataset = source.inputs(paths, opened.metadata["preprocessing"])
    logits = infer(opened.model, dataset, **settings)
    rows = prediction_rows(names, logits, opened, top)
    if out is not None:
        write_rows(out, rows)
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
    plugin = plugin_of(ctx)
    ready(plugin, "backbones")
    from peft_suite.cli.export import merge_in_place, write_merged
    from peft_suite.train.opening import MERGED

    opened = _open(plugin, adapter, checkpoint)
    if opened.merged:
        raise ConfigError(f"{adapter} is a merged model already.")
    target = out or adapter.parent / "merged"
    try:
        merge_in_place(opened)
    except MergeError as error:
        raise MergeError(
            f"{error} As one file that runs without this package's training code: "
            f"peft-suite {plugin.name} export {adapter} exported --format torch-export"
        ) from error
    write = getattr(resolve(plugin.for_task(opened.task).backbones, plugin), "write_merged", write_merged)
    files = write(opened, target)
    _told(files)
    again = f"--backbone {target}" if (target / MERGED).is_file() else f"--checkpoint {files[0]} as weights"
    note(f"Next: peft-suite {plugin.name} eval {target}, or {again} of a new run")


def export(
    ctx: typer.Context,
    adapter: _Adapter,
    out: Annotated[Path, typer.Argument(help="Folder, or a .pt2 or .onnx file.", show_default=False)],
    format: Annotated[
        Literal["auto", "timm", "hf", "torch-export", "onnx", "peft"],
        typer.Option(
            help="auto: timm, hf or torch-export, what suits the model. torch-export and onnx hold adapters that do "
            "not fold as they are; peft is a LoRA directory for Hugging Face peft."
        ),
    ] = "auto",
    rank: Annotated[int, typer.Option(min=0, help="For peft: rank of approximations; 0 refuses them.")] = 0,
    checkpoint: _Weights = "",
) -> None:
    """Write the model for other tools, merged where it can be, and check that it loads with equal outputs."""
    plugin = plugin_of(ctx)
    ready(plugin, "backbones")
    from peft_suite.cli.export import export as write

    _told(write(_open(plugin, adapter, checkpoint), out, format, rank))


def _folder_for(opened: Opened, source: Any, out: Path | None) -> Path:
    """The folder for the maps of a dense task."""
    if not hasattr(source, "write"):
        raise ConfigError(f"predict cannot write what a model for {opened.task} says. Use peft_suite.train.outputs.")
    if out is None or out.suffix or out.is_file():
        raise ConfigError(
            f"{opened.task} gives one file per input: say --out FOLDER{'' if out is None else f', not {out}'}."
        )
    return out


def _open(plugin: Plugin, adapter: Path, checkpoint: str) -> Opened:
    from peft_suite.train.opening import open_adapter

    return open_adapter(adapter, plugin=plugin, checkpoint=checkpoint)


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


def prediction_rows(names: Sequence[str], logits: Tensor, opened: Opened, top: int) -> list[dict[str, Any]]:
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


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of :func:`prediction_rows` as CSV or JSON, by the name's ending; what else a row has comes first."""
    import json

    from peft_suite.storage import write_text

    csv_wanted = out.suffix.lower() == ".csv"
    write_text(out, _csv(rows) if csv_wanted else json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    note(f"{len(rows)} predictions written to {out}")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    first = rows[0] if rows else {"file": "", "top": [None]}
    lead = [key for key in first if key not in ("prediction", "probability", "top")]
    extra = [f"{what}_{i}" for i in range(2, len(first["top"]) + 1) for what in ("class", "probability")]
    writer.writerow([*lead, "prediction", "probability", *extra])
    for row in rows:
        said = row["prediction"] if isinstance(row["prediction"], str) else ";".join(row["prediction"])
        others = [x for t in row["top"][1:] for x in (t["class"], t["probability"])]
        writer.writerow([*(row[key] for key in lead), said, row["probability"], *others])
    return stream.getvalue()


def _told(files: Sequence[Path]) -> None:
    for file in files:
        console().print(f"{file}  {file.stat().st_size:,} bytes", markup=False, soft_wrap=True)
