"""What a text model is told: embeddings of captions, made once per text by the pipeline's own encoders.

=================  ================================================================================================
pipeline           inputs of the denoiser
=================  ================================================================================================
StableDiffusion    ``encoder_hidden_states`` [L, D]
StableDiffusionXL  the same, ``text_embeds`` [P], and ``time_ids`` [6]: original size, crop corner, target size
StableDiffusion3   ``encoder_hidden_states`` [L, D], ``pooled_projections`` [P]
Flux               the same, and ``guidance`` where the model has it embedded
=================  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.diffusion.caching import TensorCache, fingerprint
from peft_suite.diffusion.pipelines import check_tokenizer
from peft_suite.errors import UnsupportedError

__all__ = ["Texts", "encoder_states", "encoders_of", "family_of"]

FAMILIES = ("StableDiffusion3", "StableDiffusionXL", "Flux", "StableDiffusion")


def family_of(pipeline: Any) -> str:
    """The first of :data:`FAMILIES` that the pipeline's class name begins with.

    Raises:
        UnsupportedError: another one.
    """
    name = type(pipeline).__name__
    found = next((f for f in FAMILIES if name.startswith(f)), None)
    if found is None:
        raise UnsupportedError(
            f"How {name} is trained on captions is not known here. Pipelines for captions: {', '.join(FAMILIES)}; "
            "class-conditional and unconditional models need none."
        )
    return found


def encoders_of(pipeline: Any) -> list[nn.Module]:
    """Its text encoders."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [m for m in (getattr(pipeline, n, None) for n in names) if isinstance(m, nn.Module)]


class Texts:
    """Embeddings of captions, kept in memory and, with a folder, on disk.

    Args:
        pipeline: with its tokenizers and text encoders; only they are used.
        cache: folder, "" for none.
        length: tokens of T5 (SD3, FLUX); 0 takes the pipeline's usual number.

    Raises:
        FileFormatError: a tokenizer without a vocabulary.
        UnsupportedError: a pipeline that is not known here.
    """

    def __init__(self, pipeline: Any, cache: str = "", length: int = 0) -> None:
        self.pipeline, self.family, self.length = pipeline, family_of(pipeline), length
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipeline, name, None)
            if tokenizer is not None:
                check_tokenizer(tokenizer, f"{type(pipeline).__name__}.{name}")
        made_by = fingerprint(*encoders_of(pipeline)) if cache else ""
        self.cache = TensorCache(cache, {"what": "text", "family": self.family, "length": length, "by": made_by})
        self.known: dict[str, Mapping[str, Tensor]] = {}

    def add(self, texts: list[str]) -> None:
        """Encode what is not known yet."""
        for text in dict.fromkeys(texts):
            if text not in self.known:
                self.known[text] = self.cache.get(text.encode(), lambda text=text: self._encode(text))  # type: ignore[misc]

    def __getitem__(self, text: str) -> Mapping[str, Tensor]:
        """Inputs of the denoiser for one caption, without a batch dimension."""
        self.add([text])
        return self.known[text]

    def release(self) -> None:
        """Let the encoders go; afterwards only known texts can be asked for."""
        self.pipeline = None

    @torch.no_grad()
    def _encode(self, text: str) -> dict[str, Tensor]:
        pipeline = self.pipeline
        long = {"max_sequence_length": self.length} if self.length else {}
        where: dict[str, Any] = {"device": encoders_of(pipeline)[0].device, "num_images_per_prompt": 1}
        plain = {"do_classifier_free_guidance": False}
        if self.family == "StableDiffusion":
            found = {"encoder_hidden_states": pipeline.encode_prompt(text, **where, **plain)[0]}
        elif self.family == "StableDiffusionXL":
            states, _, pooled, _ = pipeline.encode_prompt(text, **where, **plain)
            found = {"encoder_hidden_states": states, "text_embeds": pooled}
        elif self.family == "StableDiffusion3":
            states, _, pooled, _ = pipeline.encode_prompt(text, text, text, **where, **plain, **long)
            found = {"encoder_hidden_states": states, "pooled_projections": pooled}
        else:
            states, pooled, _ = pipeline.encode_prompt(text, text, **where, **long)
            found = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return {name: tensor[0].float().cpu() for name, tensor in found.items()}


def encoder_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """``[N, L, D]`` of a CLIP text encoder that trains itself (textual inversion), from ``input_ids`` ``[N, L]``."""
    states: Tensor = model(inputs["input_ids"]).last_hidden_state
    return states
