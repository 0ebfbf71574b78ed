"""Training a text encoder through a frozen denoiser: textual inversion (Gal et al., ICLR 2023), and other adapters.

The encoder reads the sentence in every step, so nothing of it is cached. For textual inversion the sentences are
templates around the new word, whose tokens :func:`peft_suite.diffusion.inversion.prepare_tokens` has added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.diffusion.conditioning import EMPTY, one_of
from peft_suite.diffusion.conditions import family_of
from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.diffusion.drawing import Clean
from peft_suite.diffusion.inversion import tokens_of
from peft_suite.diffusion.listing import Sample
from peft_suite.diffusion.pipelines import check_tokenizer
from peft_suite.diffusion.templates import sentences
from peft_suite.errors import DataError, UnsupportedError

__all__ = ["Sentences"]


class Sentences:
    """The condition of :class:`peft_suite.diffusion.drawing.Draws` for a text encoder that trains: ``input_ids`` [L].

    Args:
        pipeline: whole; its tokenizer learns the word that ``facts`` names.

    Raises:
        UnsupportedError: a pipeline with several text encoders.
        FileFormatError: a tokenizer without a vocabulary.
    """

    drop = 0.0

    def __init__(self, config: DiffusionDataConfig, pipeline: Any, facts: Mapping[str, Any]) -> None:
        component = str(facts["component"])
        if family_of(pipeline) != "StableDiffusion" or component != "text_encoder":
            raise UnsupportedError(
                f"Text encoders train inside Stable Diffusion 1 and 2, and this is {component} of "
                f"{type(pipeline).__name__}. Adapt its {facts['denoiser']} instead."
            )
        self.config, self.whole, self.tokenizer = config, pipeline, pipeline.tokenizer
        check_tokenizer(self.tokenizer, f"{type(pipeline).__name__}.tokenizer")
        self.word = ""
        if placeholder := str(facts.get("placeholder") or ""):
            words = tokens_of(placeholder, int(facts["num_vectors"]))
            self.tokenizer.add_tokens(words)
            self.word = " ".join(words)
        self.denoiser: nn.Module = pipeline.unet

    def captions(self, sample: Sample) -> tuple[str, ...]:
        """Sentences with the new word; without one, what the data says.

        Raises:
            DataError: neither.
        """
        if self.word:
            return tuple(t.format(self.word) for t in sentences(self.config.concept))
        found = sample.captions or ((self.config.instance_prompt,) if self.config.instance_prompt else ())
        if not found:
            raise DataError(
                f"{sample.name!r} has no caption. Give data.instance_prompt, write a metadata.jsonl, or learn a word: "
                "--method \"textual-inversion(placeholder='<thing>', initializer='toy')\"."
            )
        return found

    def __call__(self, sample: Sample | None, clean: Clean, draw: torch.Generator | None) -> dict[str, Tensor]:
        ids: Tensor = self.tokenizer(
            one_of((EMPTY,) if sample is None else self.captions(sample), draw),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return {"input_ids": ids}

    def pipeline(self, model: nn.Module) -> Any:
        """The whole pipeline with the encoder that trains."""
        self.whole.register_modules(text_encoder=model)
        return self.whole.to(next(model.parameters()).device)
