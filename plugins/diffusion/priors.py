"""Prior preservation (DreamBooth, Ruiz et al., CVPR 2023): images of the class as the base model draws them.

``class_data_dir`` may hold images already; the base pipeline draws what is missing, each from its own seed, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.diffusion.images import EXTENSIONS
from peft_suite.diffusion.listing import Sample
from peft_suite.diffusion.pipelines import load_rest
from peft_suite.errors import ConfigError
from peft_suite.storage import atomic

__all__ = ["prior_samples"]


def prior_samples(config: DiffusionDataConfig, facts: Mapping[str, Any], pipeline: Any) -> list[Sample]:
    """``num_class_images`` samples with the caption ``class_prompt``; missing images are drawn first.

    Args:
        pipeline: opened without its denoiser; a whole one is opened where images have to be drawn.

    Raises:
        ConfigError: the model does not draw by text.
    """
    if facts["kind"] != "text":
        raise ConfigError("data.class_prompt: prior preservation is for models that draw by text.")
    folder = Path(config.class_data_dir).expanduser()
    there = _images(folder)
    missing = config.num_class_images - len(there)
    if missing > 0:
        _draw(config, facts, folder, missing)
        there = _images(folder)
    captions = (config.class_prompt,)
    return [Sample(f"class/{p.name}", str(p), captions=captions) for p in there[: config.num_class_images]]


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS) if folder.is_dir() else []


def _draw(config: DiffusionDataConfig, facts: Mapping[str, Any], folder: Path, missing: int) -> None:
    import sys

    import torch

    from peft_suite.train.evaluation import pick_device

    print(f"Drawing {missing} class images for {config.class_prompt!r} into {folder}", file=sys.stderr)
    pipeline = load_rest(facts).to(pick_device(config.encode_device))
    pipeline.set_progress_bar_config(disable=True)
    side = config.resolution or int(facts["size"])
    number = 0
    while missing:
        name = folder / f"class-{number:05d}.png"
        if not name.exists():
            with torch.no_grad():
                image = pipeline(
                    config.class_prompt,
                    height=side,
                    width=side,
                    num_inference_steps=config.prior_steps,
                    guidance_scale=config.prior_guidance,
                    generator=torch.Generator().manual_seed(config.split_seed * 1_000_003 + number),
                ).images[0]
            with atomic(name) as file:
                image.save(file, format="PNG")
            missing -= 1
        number += 1
