"""``peft-suite diffusion export-lora`` and ``import-lora``: LoRA files of other programs from and to adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import console, note, show_json, show_mapping
from peft_suite.cli.root import Json
from peft_suite.cli.settings import overrides
from peft_suite.errors import ConfigError, UnsupportedError

__all__ = ["export_lora", "import_lora"]


def export_lora(
    ctx: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of a run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder, or a .safetensors file.", show_default=False)],
    format: Annotated[Literal["diffusers", "kohya"], typer.Option(help="Keys of diffusers or of kohya.")] = "diffusers",
    naming: Annotated[
        Literal["diffusers", "original"],
        typer.Option(help="Block names in kohya's format; original: input_blocks_... as in single-file checkpoints."),
    ] = "diffusers",
    rank: Annotated[
        int, typer.Option(min=0, help="Approximate an adapter that is no LoRA by matrices of this rank; 0 refuses to.")
    ] = 0,
    bake: Annotated[
        bool, typer.Option("--bake", help="For programs that do not read each module's alpha: scale inside the values.")
    ] = False,
    second: Annotated[
        list[Path] | None, typer.Option("--with", help="Another adapter for the same file: the text encoder's.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="The pipeline, if it moved since training.")] = "",
    json: Json = False,
) -> None:
    """Write LoRA adapters as the file that pipe.load_lora_weights, or programs that know kohya's files, load."""
    plugin = plugin_of(ctx)
    ready(plugin)
    from peft_suite.diffusion.interchange import FILE, save_lora
    from peft_suite.diffusion.lora_keys import component_of
    from peft_suite.train.opening import open_adapter

    models: dict[str, Any] = {}
    for path in (adapter, *(second or ())):
        opened = open_adapter(path, plugin=plugin, checkpoint=checkpoint)
        if opened.merged:
            raise UnsupportedError(f"{path} is merged: there is no adapter left to write.")
        facts = opened.metadata.get("preprocessing") or {}
        component = str(facts.get("component") or component_of(opened.model))
        if component in models:
            raise ConfigError(f"{path} adapts {component} like another of the adapters: a file holds one for each.")
        models[component] = opened.model
    found = save_lora(models, out, format=format, naming=naming, bake=bake, rank=rank)
    file = out if out.suffix == ".safetensors" else out / FILE
    if json:
        rows = {c: {"retained": a.retained, "energy": a.energy, "lost": a.lost} for c, a in found.items()}
        show_json({"file": str(file), "components": sorted(models), "approximated": rows})
        return
    console().print(f"{file}  {file.stat().st_size:,} bytes", markup=False, soft_wrap=True)
    for component, how in found.items():
        note(f"{component}: {how}")
    note(f'Next: pipe.load_lora_weights("{out}")')


def import_lora(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="A .safetensors file of diffusers, peft or kohya, or its folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Adapter directory to write.", show_default=False)],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="backbone.options.component=text_encoder, ...")
    ] = None,
    backbone: Annotated[str, typer.Option(help="The pipeline's folder or single file.")] = "pipeline",
    checkpoint: Annotated[str, typer.Option(help="The pipeline, where --backbone is only a name.")] = "",
    loose: Annotated[bool, typer.Option("--loose", help="Leave keys without a place out, with a warning.")] = False,
    json: Json = False,
) -> None:
    """Turn a LoRA file of another program into an adapter directory for sample, merge, export and further training."""
    plugin = plugin_of(ctx)
    ready(plugin)
    options: dict[str, Any] = {}
    for name, value in overrides(words or ()):
        head, _, field = name.rpartition(".")
        if head != "backbone.options":
            raise ConfigError(f"Unknown field {name!r}. Only backbone.options.NAME can be set here.")
        options[field] = value
    import peft_suite as ps
    from peft_suite.adapter import adapters_of
    from peft_suite.diffusion.interchange import load_lora
    from peft_suite.plugins import resolve

    backbones = resolve(plugin.backbones, plugin)
    model = backbones.build(backbone, 0, pretrained=not checkpoint, checkpoint=checkpoint, options=options)
    preprocessing = backbones.preprocessing(backbone, model)
    load_lora(model, file, component=str(preprocessing.get("component") or ""), strict=not loose)
    facts = {"name": backbone, "pretrained": True, "checkpoint": checkpoint, "options": options, "num_outputs": 0}
    metadata = {"plugin": plugin.name, "task": "", "backbone": facts, "classes": [], "preprocessing": preprocessing}
    ps.save(model, out, metadata=metadata)
    config = adapters_of(model)["default"].method.config
    modules = len(config.targets)
    shown = {"adapter": str(out), "modules": modules, "rank": config.rank, "dora": config.dora, "from": str(file)}
    if json:
        show_json(shown)
    else:
        show_mapping(shown)
        note(f"Next: peft-suite {plugin.name} merge {out}, or peft_suite.load(model, {str(out)!r}) in Python")
