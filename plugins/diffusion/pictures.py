"""Pictures of a model in training, for the report: the same seeds before, between and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peft_suite.diffusion import sampling
from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.diffusion.listing import Listing
from peft_suite.storage import atomic

__all__ = ["sheet"]

PROMPTS = 4  # different captions on a sheet


def sheet(
    config: DiffusionDataConfig,
    facts: Mapping[str, Any],
    listing: Listing,
    condition: Any,
    model: nn.Module,
    folder: Path,
) -> list[dict[str, Any]]:
    """One PNG with ``config.pictures`` samples in a grid; ``[{"title", "file"}]``."""
    kind, count = str(facts["kind"]), config.pictures
    if count < 0:
        count = 4 if int(facts.get("factor") or 1) > 1 else 20
    guidance = config.picture_guidance or (7.5 if kind == "text" else 1.0)
    options: dict[str, Any] = {"steps": config.picture_steps, "seed": config.split_seed}
    columns, title = 0, "Samples"
    if kind == "class":
        labels = list(condition.labels)
        options |= {"classes": labels, "guidance": guidance}
        columns = len(labels) if 1 < len(labels) <= 20 else 0
        title = "Samples by class" if columns else title
        count = max(1, count // columns) * columns if columns else count
    elif kind == "text":
        prompts = list(config.validation_prompt) or _captions(listing, condition)
        side = config.resolution or int(facts["size"])
        options |= {"prompts": prompts, "guidance": guidance, "size": side, "batch_size": 4}
        options["pipeline"] = (
            condition.pipeline(model) if hasattr(condition, "pipeline") else sampling.open_pipeline(model, facts)
        )
        columns, title = len(prompts), " / ".join(prompts)
        count = max(1, count // columns) * columns
    images = sampling.sample(model, facts, count, **options)
    file = folder / "samples.png"
    with atomic(file) as place:
        sampling.grid(images, columns).save(place, format="PNG")
    return [{"title": title, "file": file}]


def _captions(listing: Listing, condition: Any) -> list[str]:
    """The first few different captions of the data."""
    said = (text for s in listing.splits["train"] for text in condition.captions(s)[:1])
    return list(dict.fromkeys(said))[:PROMPTS]
