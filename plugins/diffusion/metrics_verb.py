"""``peft-suite diffusion metrics``: a folder of generated images against real ones."""

from __future__ import annotations

import json as text_of
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_suite.cli.console import show_json, show_mapping
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["metrics", "read_folder"]

MADE = "images.json"  # what the verb sample writes beside its images


def metrics(
    generated: Annotated[Path, typer.Argument(help="Folder of generated images.", show_default=False)],
    real: Annotated[Path, typer.Argument(help="Folder of real images that were not trained on.", show_default=False)],
    features: Annotated[
        str, typer.Option(help="JUDGE.safetensors, inception:FILE, clip:FOLDER, or pixels.")
    ] = "pixels",
    train: Annotated[
        Path | None, typer.Option(help="Folder of the training images: adds memorisation.", show_default=False)
    ] = None,
    clip: Annotated[
        str, typer.Option(help="Folder of a CLIP model: adds the CLIP score of texts in images.json.")
    ] = "",
    prefix: Annotated[str, typer.Option(help="Put before every text for the CLIP score.")] = "",
    size: Annotated[int, typer.Option(min=0, help="Bring all images to this side first; 0: all have one size.")] = 0,
    resize: Annotated[
        str, typer.Option(help="Filter of --size: lanczos, bicubic, bilinear, box, nearest.")
    ] = "lanczos",
    threshold: Annotated[
        float, typer.Option(min=0, help="Of the tile rule, which needs --train; 0 leaves it out.")
    ] = 0.0,
    subsets: Annotated[int, typer.Option(min=1, help="Of the KID.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the KID's subsets.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A .json to write to as well.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Fréchet distance, KID, class accuracy, memorisation, CLIP score; with how each was measured."""
    if threshold and train is None:
        raise ConfigError("--threshold: the tile rule compares with the training images. Give --train FOLDER.")
    if out is not None and out.suffix.lower() != ".json":
        raise ConfigError(f"--out {out}: the name must end in .json.")
    from peft_suite.diffusion.metrics import copied, frechet, kid, memorisation
    from peft_suite.diffusion.networks import clip_score, network_of
    from peft_suite.storage import write_json

    network = network_of(features)
    made, facts = read_folder(generated, size, resize)
    known, _ = read_folder(real, size, resize, channels=made.shape[-1])
    ours, theirs = network.features(made), network.features(known)
    mean, deviation = kid(theirs, ours, subsets=subsets, seed=seed)
    result: dict[str, Any] = {
        "generated": len(made),
        "real": len(known),
        "frechet_distance": frechet(theirs, ours),
        "kid": mean,
        "kid_deviation": deviation,
        **network.facts(),
        "read_as": f"{made.shape[1]}x{made.shape[2]}" + (f", {resize} resize" if size else ", not resized"),
    }
    if network.name == "judge" and (labels := _labels(facts)) is not None:
        result["class_accuracy"] = _accuracy(features, made, labels)
    if train is not None:
        trained, _ = read_folder(train, size, resize, channels=made.shape[-1])
        found = memorisation(ours, network.features(trained), theirs, seed=seed)
        result |= {f"nearest_{k}": v for k, v in found.items()}
        if threshold:
            result["copied"] = copied(made, trained, threshold=threshold)
    if clip:
        texts = [prefix + str(row.get("text", "")) for row in facts]
        if not facts or not all(row.get("text") for row in facts):
            raise DataError(f"{generated / MADE} has no text for every image, and the CLIP score needs them.")
        score, how = clip_score(made, texts, clip)
        result |= {"clip_score": score, **{f"clip_{k}": v for k, v in how.items() if k != "network"}}
    if out is not None:
        write_json(out, result)
    if json:
        show_json(result)
    else:
        show_mapping(result)


def read_folder(folder: Path, size: int, resize: str, channels: int = 0) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """(uint8 ``[N, H, W, C]`` of a folder and those below it, what ``images.json`` says of each; [] without it).

    ``grid.png`` is left out.

    Raises:
        DataError: no images, damaged ones, or several sizes and no ``size``.
    """
    import numpy as np
    import torch
    from PIL import Image

    from peft_suite.diffusion.images import EXTENSIONS, INTERPOLATIONS, as_channels, open_image
    from peft_suite.errors import UnknownNameError

    if resize not in INTERPOLATIONS:
        raise UnknownNameError("filter", resize, INTERPOLATIONS)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder.")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.name != "grid.png")
    if not files:
        raise DataError(f"{str(folder)!r} has no images ({', '.join(EXTENSIONS)}).")
    facts: list[Mapping[str, Any]] = []
    if (folder / MADE).is_file():
        try:
            rows = {str(r["file"]): r for r in text_of.loads((folder / MADE).read_text("utf-8"))["images"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / MADE} cannot be read: {error}.") from error
        files = [f for f in files if f.name in rows] or files
        facts = [rows.get(f.name, {}) for f in files]
    found = []
    for file in files:
        try:
            image = open_image(file)
            image = as_channels(image, channels or (1 if image.mode in ("1", "L", "I;16", "I") else 3))
        except DataError as error:
            raise DataError(f"{str(file)!r} {error}") from None
        if size:
            image = image.resize((size, size), getattr(Image.Resampling, resize.upper()))
        array = np.asarray(image)
        found.append(array[..., None] if array.ndim == 2 else array)
    odd = next((i for i, a in enumerate(found) if a.shape != found[0].shape), None)
    if odd is not None:
        raise DataError(
            f"{str(files[odd])!r} is {list(found[odd].shape)} and {str(files[0])!r} is {list(found[0].shape)}. Bring "
            "all images to one size with --size."
        )
    return torch.from_numpy(np.stack(found)), facts


def _labels(facts: list[Mapping[str, Any]]) -> list[int] | None:
    labels = [row.get("class") for row in facts]
    return [int(v) for v in labels if v is not None] if labels and all(v is not None for v in labels) else None


def _accuracy(path: str, images: Tensor, labels: list[int]) -> float:
    import torch

    from peft_suite.diffusion.judge import accuracy, load_judge

    return accuracy(load_judge(Path(path)), images, torch.tensor(labels))
