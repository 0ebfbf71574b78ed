"""The page of one run: facts from ``run.json`` laid out by the templates beside this file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.plugins import plugins
from peft_suite.report import plots
from peft_suite.report.records import Run, number, numbers, primary_name, read_run, section
from peft_suite.report.rendering import (
    NONE,
    data_uri,
    facts,
    render,
    show,
    show_bytes,
    show_count,
    show_metric,
    show_mib,
    show_seconds,
)
from peft_suite.storage import write_bytes
from peft_suite.tables import lower_is_better

__all__ = ["pictures", "run_page"]

EXAMPLES = 24
_MIME = {b"\x89PNG": "image/png", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}


def run_page(run_dir: Path) -> Path:
    """Write ``curves.png`` and ``report.html`` for one run."""
    run = read_run(run_dir)
    data = run.data
    history = [h for h in data.get("history") or () if isinstance(h, Mapping)]
    name, _ = run.primary()
    best = number(section(data, "best").get("epoch"))
    curves = plots.curves(history, None if best is None else int(best), name) if history else None
    if curves:
        write_bytes(run.path / "curves.png", curves)
    classes = [str(c) for c in section(data, "data").get("classes") or ()]
    matrix = _matrix(data.get("confusion"))
    per_class = _per_class(section(data, "final").get("per_class"), classes, matrix)
    right, wrong = _examples(run)
    html = render(
        "run.html",
        title=f"{run.method} on {run.task}",
        run=run,
        data=data,
        cards=_cards(run),
        metrics=_metric_table(data),
        task=facts(_task_facts(run, classes)),
        info=facts(section(section(data, "data"), "info")),
        method=_method_facts(section(data, "method").get("config")),
        plan=_plan(section(section(data, "method"), "plan")),
        parameters=facts({k: v for k, v in section(data, "parameters").items() if not isinstance(v, list | Mapping)}),
        curves=data_uri(curves),
        pictures=pictures(run),
        confusion=data_uri(plots.confusion(matrix, classes)) if matrix else "",
        confused=_confused(matrix, classes),
        per_class=per_class[::-1] if lower_is_better(name) else per_class,
        metric=name,
        full=max((score for _, score, _ in per_class), default=1.0) if lower_is_better(name) else 1.0,
        right=right,
        wrong=wrong,
        costs=facts({**section(data, "time"), **section(data, "memory")}),
        config=json.dumps(data.get("config") or {}, indent=2, ensure_ascii=False),
        versions=facts({**section(data, "versions"), **section(data, "platform")}),
        commands=_commands(run),
    )
    return write_bytes(run.path / "report.html", html.encode())


def _cards(run: Run) -> list[tuple[str, str, str]]:
    split, _ = run.scores()
    name, value = run.primary()
    cost = run.measured()
    share = f"{100 * cost['trainable'] / cost['total']:.2f} % of all" if cost["trainable"] and cost["total"] else ""
    step = number(section(run.data, "time").get("per_step_ms"))
    best = section(run.data, "best")
    epoch = number(best.get("epoch"))  # stored from 0, shown from 1
    chosen = "" if epoch is None else f"epoch {epoch + 1:.0f}, chosen by {best.get('selected_by') or 'the loop'}"
    cards = [
        (f"{name} ({split})", show_metric(value, name), chosen),
        ("trainable parameters", show_count(cost["trainable"]), share),
        ("adapter file", show_bytes(cost["adapter_bytes"]), ""),
        ("time", show_seconds(cost["seconds"]), f"{step:.1f} ms per step" if step is not None else ""),
        ("peak memory", show_mib(cost["peak_mib"]), ""),
    ]
    return [card for card in cards if card[1] != NONE]


def _metric_table(data: Mapping[str, Any]) -> dict[str, Any]:
    final = section(data, "final")
    found = {"best epoch": numbers(section(section(data, "best"), "metrics"))}
    found.update({split: numbers(section(final, split)) for split in ("val", "test")})
    columns = {split: values for split, values in found.items() if values}
    names = list(dict.fromkeys(n for values in columns.values() for n in values))
    rows = [(n, [show_metric(v.get(n), n) for v in columns.values()]) for n in names]
    return {"columns": list(columns), "rows": rows}


def _task_facts(run: Run, classes: Sequence[str]) -> dict[str, Any]:
    config = section(run.data, "config")
    shown = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    backbone = section(config, "backbone")
    weights = backbone.get("checkpoint") or ("published" if backbone.get("pretrained") else "random")
    return {
        "plugin": run.data.get("plugin"),
        "backbone": run.backbone,
        "weights": weights if backbone else None,
        "data": section(config, "data").get("root"),
        "classes": f"{len(classes)}: {shown}" if classes else None,
        "seed": run.data.get("seed"),
        "data fingerprint": section(run.data, "data").get("fingerprint"),
    }


def _method_facts(config: Any) -> list[tuple[str, str]]:
    if isinstance(config, list):  # several adapters trained together
        return [fact for one in config for fact in _method_facts(one)]
    return facts(config) if isinstance(config, Mapping) else []


def _plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's single values, and its first list of records as a table."""
    single = {k: v for k, v in plan.items() if not isinstance(v, list | Mapping)}
    for records in plan.values():
        if isinstance(records, list) and records and all(isinstance(r, Mapping) for r in records):
            columns = list(dict.fromkeys(str(k) for r in records for k in r))
            rows = [[show(c, r.get(c)) if r.get(c) is not None else "" for c in columns] for r in records]
            numeric = [all(number(r.get(c)) is not None or r.get(c) is None for r in records) for c in columns]
            return {"facts": facts(single), "columns": columns, "rows": rows, "numeric": numeric}
    return {"facts": facts(single), "columns": [], "rows": [], "numeric": []}


def _matrix(value: Any) -> list[list[float]]:
    if not isinstance(value, list) or not value or not all(isinstance(r, list) and len(r) == len(value) for r in value):
        return []
    return [[number(v) or 0.0 for v in row] for row in value]


def _name(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else str(index)


def _confused(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> list[tuple[str, str, int, str]]:
    found = []
    for i, row in enumerate(matrix):
        found += [(count, i, j, sum(row)) for j, count in enumerate(row) if i != j and count > 0]
    found.sort(reverse=True)
    return [(_name(classes, i), _name(classes, j), int(n), f"{100 * n / total:.0f} %") for n, i, j, total in found[:8]]


def _per_class(
    values: Any, classes: Sequence[str], matrix: Sequence[Sequence[float]]
) -> list[tuple[str, float, int | None]]:
    """(class, score, samples or None), the lowest score first."""
    pairs: list[tuple[str, Any]]
    if isinstance(values, Mapping):
        pairs = [(str(k), v) for k, v in values.items()]
        if len(pairs) == 1 and isinstance(pairs[0][1], Mapping | list):
            return _per_class(pairs[0][1], classes, matrix)
    elif isinstance(values, list):
        pairs = [(_name(classes, i), v) for i, v in enumerate(values)]
    else:
        pairs = [(_name(classes, i), row[i] / sum(row)) for i, row in enumerate(matrix) if sum(row)]
    samples = {_name(classes, i): int(sum(row)) for i, row in enumerate(matrix)}
    rows = []
    for name, value in pairs:
        support: float | None = samples.get(name)
        if isinstance(value, Mapping):
            support = next(
                (n for k in ("count", "support", "samples", "n") if (n := number(value.get(k))) is not None), support
            )
            name = str(value.get("name", name))
            value = value.get(primary_name(k for k in value if k not in ("count", "support", "samples", "n", "name")))
        score = number(value)
        if score is not None:
            rows.append((name, score, None if support is None else int(support)))
    return sorted(rows, key=lambda r: r[1])


def _examples(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    classes = [str(c) for c in section(run.data, "data").get("classes") or ()]
    try:
        stored = json.loads((run.path / "examples.json").read_text("utf-8"))
        images, sounds = stored.get("png") or [], stored.get("audio") or []
    except (OSError, ValueError, AttributeError):
        images, sounds = [], []
    right: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for index, example in enumerate(run.data.get("examples") or ()):
        if not isinstance(example, Mapping):
            continue
        side = right if example.get("correct") else wrong
        side.append(
            {
                "image": _attached(images, index, "image"),
                "sound": _attached(sounds, index, "audio"),
                "name": str(example.get("name") or ""),
                "target": _label(example.get("target"), classes),
                "prediction": _label(example.get("prediction"), classes),
                "probability": show_metric(example.get("probability")),
            }
        )
    return right[:EXAMPLES], wrong[:EXAMPLES]


def pictures(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the task drew: (title, [(moment, picture)]), one row per title, in the order of the moments."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for entry in run.data.get("pictures") or ():
        try:
            content = (run.path / str(entry["file"])).read_bytes()
        except (OSError, KeyError, TypeError):
            continue
        if content[:4] == b"\x89PNG":
            rows.setdefault(str(entry.get("title")), []).append((str(entry.get("moment")), data_uri(content)))
    return list(rows.items())


def _attached(texts: Sequence[Any], index: int, kind: str) -> str:
    """A picture or sound stored as base64, as part of a page; "" where there is none or it is something else."""
    text = texts[index] if index < len(texts) else None
    try:
        magic = base64.b64decode(text, validate=True)[:4] if isinstance(text, str) else b""
    except ValueError:
        return ""
    mime = _MIME.get(magic, "")
    return f"data:{mime};base64,{text}" if mime.startswith(kind) else ""


def _label(value: Any, classes: Sequence[str]) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return ", ".join(_label(v, classes) for v in value) or "none" if isinstance(value, list) else str(value)
    return _name(classes, value)


def _commands(run: Run) -> list[tuple[str, str]]:
    plugin = str(run.data.get("plugin") or "vision")
    folder = str(section(run.data, "adapter").get("path") or "adapter")
    path = Path(folder)
    if not path.is_absolute() and (run.path / path).exists():
        path = run.path / path
    root = section(section(run.data, "config"), "data").get("root") or "DATA"
    if not run.finished:
        resume = f"peft-suite {plugin} train --config {_quote(run.path / 'config.yaml')} --resume"
        return [("Continue this run", resume)]
    target = _quote(path)
    use = next((found.plugin.use for found in plugins() if found.plugin and found.name == plugin), "")
    predicts = use.startswith("predict ") or not use
    first = f"predict {target} FILES... --out predictions.csv" if predicts else use.format(adapter=target)
    return [
        (first.split()[0].capitalize(), f"peft-suite {plugin} {first}"),
        ("Evaluate on other data", f"peft-suite {plugin} eval {target} --data {_quote(root)}"),
        ("Merge into plain weights", f"peft-suite {plugin} merge {target} merged"),
        ("In Python", f"import peft_suite as ps\n\nps.load(model, {str(path)!r})  # on a fresh backbone"),
    ]


def _quote(value: Any) -> str:
    text = str(value)
    plain = all(c.isalnum() or c in "/._-+=:@%," for c in text)
    return text if plain and text else "'" + text.replace("'", "'\\''") + "'"
