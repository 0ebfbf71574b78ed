"""``peft-suite audio predict``: classes of files, folders and long recordings, with times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import note, show_json, show_table
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError, DataError

__all__ = ["predict"]


def predict(
    ctx: typer.Context,
    adapter: Annotated[
        Path, typer.Argument(help="Adapter directory of a run, or a merged model's directory.", show_default=False)
    ],
    paths: Annotated[list[str], typer.Argument(help="Files and folders (searched recursively).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="A .csv or .json instead of a table.")] = None,
    window: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Seconds of a sliding window; 0 takes one clip per file. Without it, only sounds more than twice as "
            "long as what the network hears are cut into windows of that length.",
        ),
    ] = None,
    hop: Annotated[float, typer.Option(min=0, help="Seconds from window to window; 0 is half a window.")] = 0.0,
    top: Annotated[int, typer.Option(min=1, help="Classes per window, the most probable first.")] = 1,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unusable files out, with a count.")] = False,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="The backbone's weights, if they moved since training.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    json: Json = False,
) -> None:
    """Predict classes of sounds. Long recordings get one row per window, with its start and end in seconds."""
    plugin = plugin_of(ctx)
    if lost := [p for p in paths if not Path(p).exists()]:
        raise DataError(f"{lost[0]} does not exist. Give files or folders.")
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise ConfigError(f"--out {out}: the name must end in .csv or .json.")
    ready(plugin, "data")
    from peft_suite.audio.data import sounds_of
    from peft_suite.audio.features import Preprocess
    from peft_suite.audio.windows import cut
    from peft_suite.cli.use import prediction_rows, write_rows
    from peft_suite.train import predict as infer
    from peft_suite.train.opening import open_adapter

    files, _ = sounds_of(paths)
    opened = open_adapter(adapter, plugin=plugin, checkpoint=checkpoint)
    goal = Preprocess.from_dict(opened.metadata["preprocessing"])
    dataset, bad = cut(files, goal, window=window, hop=hop, skip=skip_bad)
    logits = infer(opened.model, dataset, batch_size=batch_size, device=device, precision=precision)
    rows = [
        {"file": row["file"], "start": span.start, "end": span.end, **{k: v for k, v in row.items() if k != "file"}}
        for row, span in zip(
            prediction_rows([s.file for s in dataset.spans], logits, opened, top), dataset.spans, strict=True
        )
    ]
    if bad:
        note(f"{len(bad)} of {len(files)} files left out: " + "; ".join(f"{n} ({r})" for n, r in bad[:5]))
    if out is not None:
        write_rows(out, rows)
    if json:
        show_json(rows)
    elif out is None:
        others = [", ".join(f"{t['class']} {t['probability']:.3f}" for t in row["top"][1:]) for row in rows]
        columns = {k: k for k in ("file", "start", "end", "prediction", "probability")}
        shown = [{**row, "others": text} for row, text in zip(rows, others, strict=True)]
        show_table(shown, columns | ({"others": "next"} if top > 1 else {}))
