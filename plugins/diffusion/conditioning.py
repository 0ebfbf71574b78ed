"""What the denoiser is told besides sample and timestep: classes, captions, sizes, guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_suite.diffusion.conditions import Texts
from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.diffusion.drawing import Clean
from peft_suite.diffusion.listing import Listing, Sample
from peft_suite.errors import ConfigError, DataError

__all__ = ["EMPTY", "Condition", "check_condition", "labels_of", "one_of"]

Facts = Mapping[str, Any]
EMPTY = ""


class Condition:
    """Inputs of the denoiser besides sample and timestep; ``drop`` is the share of training samples without them."""

    def __init__(self, config: DiffusionDataConfig, facts: Facts, listing: Listing, texts: Texts | None) -> None:
        self.config, self.classes, self.texts = config, listing.classes, texts
        self.kind, self.null = str(facts["kind"]), facts.get("null")
        self.labels = labels_of(config, listing, facts)
        self.guidance = config.guidance if facts.get("guidance_embeds") else None
        self.sized = texts is not None and texts.family == "StableDiffusionXL"
        drops = self.kind == "class" and self.null is not None
        usual = 0.1 if drops else 0.0
        self.drop = usual if config.condition_dropout < 0 else config.condition_dropout
        if facts["model"] == "DiTTransformer2DModel":
            self.drop = 0.0
        elif self.drop and self.kind == "class" and not drops:
            raise ConfigError("data.condition_dropout: this model has no null class. Set it to 0.")

    def captions(self, sample: Sample) -> tuple[str, ...]:
        """Texts of a sample, of which each draw takes one."""
        name = self.classes[sample.label] if self.classes else ""
        return sample.captions or (self.config.instance_prompt.replace("{}", name),)

    def __call__(self, sample: Sample | None, clean: Clean, draw: torch.Generator | None) -> dict[str, Tensor]:
        """``sample`` None is no condition; ``draw`` None takes the first caption."""
        if self.kind == "unconditional":
            return {}
        if self.kind == "class":
            label = self.null if sample is None else self.labels[sample.label]
            return {"class_labels": torch.tensor(int(label))}  # type: ignore[arg-type]
        assert self.texts is not None
        found = dict(self.texts[one_of((EMPTY,) if sample is None else self.captions(sample), draw)])
        if self.sized:
            found["time_ids"] = torch.tensor(clean.size, dtype=torch.float32)
        if self.guidance is not None:
            found["guidance"] = torch.tensor(self.guidance)
        return found


def one_of(texts: Sequence[str], draw: torch.Generator | None) -> str:
    """A text at random; the first where ``draw`` is None."""
    several = draw is not None and len(texts) > 1
    return texts[int(torch.randint(len(texts), (), generator=draw)) if several else 0]


def labels_of(config: DiffusionDataConfig, listing: Listing, facts: Facts) -> tuple[int, ...]:
    """The model's label of each class: as configured, as in training, or counted from 0."""
    return config.labels or tuple(facts.get("labels") or range(len(listing.classes)))


def check_condition(config: DiffusionDataConfig, listing: Listing, facts: Facts) -> None:
    """The samples have what the model draws by; with ``skip_bad`` those without a caption go.

    Raises:
        ConfigError: ``data.labels`` does not fit the classes.
        DataError: no classes, labels that the model does not know, or no captions.
    """
    kind, classes = str(facts["kind"]), listing.classes
    if kind == "class":
        if not classes:
            raise DataError(
                f"{config.root!r} ({listing.layout}) has no classes, and this model draws by class. Put the images "
                "into a folder per class."
            )
        labels = labels_of(config, listing, facts)
        count = int(facts["classes"])
        if len(labels) != len(classes):
            raise ConfigError(f"data.labels has {len(labels)} entries for {len(classes)} classes.")
        if odd := [x for x in labels if not 0 <= x < count]:
            raise DataError(
                f"The data has {len(classes)} classes with labels up to {max(odd)}, and the model knows 0 to "
                f"{count - 1}. Choose some with data.only, and give their labels in data.labels."
            )
    elif kind == "text":
        every = [s for part in listing.splits.values() for s in part]
        mute = [s.name for s in every if not s.captions]
        if not mute or config.instance_prompt or str(facts["component"]).startswith("text_encoder"):
            return
        if not config.skip_bad or len(mute) == len(every):
            raise DataError(
                f"{len(mute)} of {len(every)} images have no caption, first {mute[0]!r}, and this model draws by text. "
                "Write a metadata.jsonl, or give one text for all: data.instance_prompt='a photo of sks dog'."
            )
        listing.notes["without_caption"] = len(mute)
        told = {split: [s for s in part if s.captions] for split, part in listing.splits.items()}
        listing.splits = {split: part for split, part in told.items() if part or split == "train"}
