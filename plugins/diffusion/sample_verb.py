"""``peft-suite diffusion sample``: images of an adapter, a merged model or a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import show_json, show_mapping
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError, DataError
from peft_suite.plugins import Plugin, resolve

if TYPE_CHECKING:
    from torch import nn

__all__ = ["opened", "sample"]


def sample(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER_OR_BACKBONE",
            help="Adapter directory of a run, a merged model's directory, a diffusers folder, or a backbone's name.",
            show_default=False,
        ),
    ],
    classes: Annotated[str, typer.Option(help="Names or indices, separated by commas; all classes by default.")] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text; give it again for more.", show_default=False)
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Images in all.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(help="1 is the condition alone; 7.5 for texts, else 1, by default.", show_default=False),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the adapter: 0 is the backbone, 1 as trained.")] = 1.0,
    sampler: Annotated[str, typer.Option(help="ddim, dpm or ddpm instead of the model's own.")] = "",
    size: Annotated[int, typer.Option(min=0, help="Side of the images, of pipelines; 0 is the model's own.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for one PNG an image, grid.png and images.json.")] = Path("samples"),
    columns: Annotated[int, typer.Option(min=0, help="Of grid.png; 0 is about a square.")] = 0,
    checkpoint: Annotated[str, typer.Option(help="The backbone's weights or pipeline, if elsewhere.")] = "",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: Json = False,
) -> None:
    """Draw images. Every image depends on the seed and its number alone."""
    plugin = plugin_of(ctx)
    ready(plugin)
    if not -1e6 < strength < 1e6:
        raise ConfigError(f"--strength {strength}: a finite number, 1 for as trained.")
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file. Give a folder.")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from peft_suite.diffusion.sampling import at_strength, grid
    from peft_suite.diffusion.sampling import sample as draw
    from peft_suite.train.evaluation import pick_device

    model, facts, names = opened(plugin, source, checkpoint)
    chosen = _chosen(classes, names, facts)
    if strength != 1:
        if "adapters" not in model._modules:
            raise ConfigError(f"--strength {strength:g}: {source} is no adapter. Leave it out.")
        model = at_strength(model, strength)
    model.to(pick_device(device))
    if guidance is None:
        guidance = 7.5 if facts.get("kind") == "text" else 1.0
    columns_shown = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns_shown, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=number)
        images = draw(
            model,
            facts,
            number,
            classes=chosen,
            prompts=prompt,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch_size=batch_size,
            sampler=sampler,
            size=size,
            each=lambda done, total: progress.update(task, completed=done, total=total),
        )
    asked = [_asked(i, chosen, prompt, names, facts) for i in range(number)]
    facts_of_run = {"source": source, "seed": seed, "steps": steps, "guidance": guidance, "strength": strength}
    write_images(images, out, asked, {**facts_of_run, "sampler": sampler or "default"})
    _write_png(grid(images, columns), out / "grid.png")
    result = {**facts_of_run, "images": number, "out": str(out), "grid": str(out / "grid.png")}
    show_json(result) if json else show_mapping(result)


def opened(plugin: Plugin, source: str, checkpoint: str = "") -> tuple[nn.Module, Mapping[str, Any], tuple[str, ...]]:
    """(model, facts, class names) of an adapter, a merged model, a pipeline's folder or file, or a backbone's name.

    Raises:
        PeftSuiteError: nothing of the kind; says what was looked for.
    """
    import torch

    from peft_suite.diffusion.writing import facts_of
    from peft_suite.train.opening import MERGED, open_adapter

    path = Path(source)
    if any((path / name).is_file() for name in ("adapter_model.safetensors", "adapter_config.json", MERGED)):
        found = open_adapter(path, plugin=plugin, checkpoint=checkpoint)
        return found.model, facts_of(found), found.classes
    backbones = resolve(plugin.backbones, plugin)
    torch.manual_seed(0)
    model = backbones.build(source, 0, pretrained=True, checkpoint=checkpoint, options={})
    return model.eval(), backbones.preprocessing(source, model), ()


def _chosen(text: str, names: tuple[str, ...], facts: Mapping[str, Any]) -> list[int] | None:
    found = []
    for part in (p.strip() for p in text.split(",") if p.strip()):
        if part in names:
            found.append(names.index(part))
        elif part.lstrip("-").isdigit():
            found.append(int(part))
        else:
            known = ", ".join(names) if names else f"0 to {int(facts.get('classes') or 1) - 1}"
            raise ConfigError(f"--classes {part!r}: no class. The classes are {known}.")
    return found or None


def _asked(
    i: int, chosen: list[int] | None, prompts: list[str] | None, names: tuple[str, ...], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What image i was asked to show."""
    if facts.get("kind") == "text" and prompts:
        return {"text": prompts[i % len(prompts)]}
    if facts.get("kind") != "class":
        return {}
    every = chosen or list(range(int(facts["classes"])))
    label = every[i % len(every)]
    return {"class": label, **({"name": names[label]} if label < len(names) else {})}


def write_images(images: Any, folder: Path, asked: list[dict[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """``0000.png`` .. in ``folder`` and ``images.json``, which says what each was asked to show; returns the names."""
    from PIL import Image

    from peft_suite.storage import write_json

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:04d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        _write_png(Image.fromarray(image.squeeze(-1).numpy()), folder / name)
    rows = [{"file": name, **row} for name, row in zip(names, asked, strict=True)]
    write_json(folder / "images.json", {**facts, "images": rows})
    return names


def _write_png(image: Any, path: Path) -> None:
    from peft_suite.storage import atomic

    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
