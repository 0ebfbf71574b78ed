"""The task: a denoiser that says what :mod:`peft_suite.diffusion.schedules` asks for, of every family of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.train.task import Outcome

__all__ = ["CALLS", "Denoising", "denoise", "pack", "unpack"]

Inputs = Mapping[str, Any]
_CAST = ("sample", "encoder_hidden_states", "text_embeds", "pooled_projections")
QUARTERS = ("t 0-25%", "t 25-50%", "t 50-75%", "t 75-100%")  # of the noise levels, the least noise first


@dataclass(frozen=True)
class Denoising:
    """Weighted squared error per image, ``mean over C, H, W of weight (output - target)^2``.

    Metrics of a split: ``loss``, which selects the best epoch (lower is better), and ``mse``, the same without weights.
    Targets are mappings ``{"target": [N, C, H, W], "weight": [N], "label": [N], "level": [N]}``; level is the place of
    the timestep between 0 (hardly any noise) and 1. With prior preservation there is one more dimension behind N, the
    pair of an instance and a class image, whose errors are added (DreamBooth, Ruiz et al., CVPR 2023).

    Attributes:
        classes: class names; () for captions and for models without condition.
        kind: class name of the denoiser, a key of :data:`CALLS`.
        steps: T of the schedule.
        frozen: the denoiser itself where the adapter sits on a text encoder, else None.
        encode: ``encode(model, input_ids) -> encoder_hidden_states`` of such a text encoder.
        artist: ``artist(model, folder) -> [{"title", "file"}]``, pictures for the report.
    """

    classes: tuple[str, ...] = ()
    kind: str = "UNet2DModel"
    steps: int = 1000
    frozen: nn.Module | None = field(default=None, compare=False)
    encode: Callable[[nn.Module, Inputs], Tensor] | None = field(default=None, compare=False)
    artist: Callable[[nn.Module, Path], Sequence[Mapping[str, Any]]] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in CALLS:
            raise UnknownNameError("denoiser", self.kind, CALLS, "Train one of these classes of diffusers.")

    @property
    def primary(self) -> str:
        return "loss"

    def predict(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The model's answer, ``[N, C, H, W]`` or, for pairs, ``[N, 2, C, H, W]``.

        Args:
            inputs: ``sample``, ``timestep`` and the condition, see :data:`CALLS`.
        """
        pairs = inputs["sample"].ndim == 5
        flat = _map(lambda t: t.flatten(0, 1), inputs) if pairs else inputs
        if self.frozen is not None and self.encode is not None:
            self.frozen.to(flat["sample"].device)
            flat = {**flat, "encoder_hidden_states": self.encode(model, flat)}
            model = self.frozen
        output = denoise(model, self.kind, flat)
        return output.reshape(*inputs["sample"].shape[:2], *output.shape[1:]) if pairs else output

    def loss(
        self, output: Tensor, target: Any, *, smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """``[N]``, float32."""
        if smoothing or class_weights is not None:
            raise ConfigError("recipe.label_smoothing and recipe.class_weights have no meaning for denoising.")
        return _per_sample(output, target, target["weight"])

    def mass(self, target: Any, class_weights: Tensor | None = None) -> Tensor:
        """Every image counts 1; a pair counts 1."""
        weights: Tensor = target["weight"]
        return torch.ones(len(weights), device=weights.device)

    def class_weights(self, targets: Tensor) -> Tensor:
        raise ConfigError("recipe.class_weights has no meaning for denoising; leave it at 'none'.")

    def check(self, targets: Tensor, split: str) -> None:
        """``targets`` are labels; whether the model has them was checked with the data."""
        if not len(targets):
            raise DataError(f"{split}: there is no image.")

    def reduce(self, output: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Per image: (weighted loss, plain squared error, noise level) ``[N, 3]`` and the label ``[N]``."""
        plain = _per_sample(output, target, torch.ones_like(target["weight"]))
        level, label = (target[k].reshape(len(plain), -1)[:, 0] for k in ("level", "label"))
        return torch.stack((self.loss(output, target), plain, level.float()), dim=1), label

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        return {"loss": _number(output[:, 0].double().mean()), "mse": _number(output[:, 1].double().mean())}

    def per_class(self, output: Tensor, target: Tensor) -> dict[str, float | None]:
        """Loss of each class; without classes, of each quarter of the noise levels."""
        if self.classes:
            return {name: _mean(output[target == i, 0]) for i, name in enumerate(self.classes)}
        quarter = (output[:, 2] * 4).long().clamp(0, 3)
        return {name: _mean(output[quarter == i, 0]) for i, name in enumerate(QUARTERS)}

    def confusion(self, output: Tensor, target: Tensor) -> list[list[int]] | None:
        return None

    def outcome(self, output: Tensor, target: Tensor) -> Outcome:
        """Nothing is right or wrong here: no examples; :meth:`illustrate` has the pictures."""
        return Outcome([], [], [], [])

    def illustrate(self, model: nn.Module, folder: Path) -> list[dict[str, Any]]:
        """Samples of the model as it is now, as PNG files in ``folder``."""
        return [dict(p) for p in self.artist(model, folder)] if self.artist else []


def denoise(model: nn.Module, kind: str, inputs: Inputs) -> Tensor:
    """Run a denoiser of class ``kind`` and take its sample; of predicted variances only the mean is kept.

    Latents and embeddings take the dtype of the frozen weights, as in diffusers' scripts; times and sizes keep theirs.
    """
    dtype = next(model.parameters()).dtype
    output: Tensor = CALLS[kind](model, {k: v.to(dtype) if k in _CAST else v for k, v in inputs.items()})
    channels = inputs["sample"].shape[1]
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def _unet(model: nn.Module, inputs: Inputs) -> Tensor:
    """``sample``, ``timestep``, optional ``class_labels``."""
    output: Tensor = model(inputs["sample"], inputs["timestep"], class_labels=inputs.get("class_labels")).sample
    return output


def _conditional_unet(model: nn.Module, inputs: Inputs) -> Tensor:
    """``encoder_hidden_states`` ``[N, L, D]``; SDXL adds ``text_embeds`` ``[N, P]`` and ``time_ids`` ``[N, 6]``."""
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    output: Tensor = model(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs=added or None,
    ).sample
    return output


def _dit(model: nn.Module, inputs: Inputs) -> Tensor:
    """``class_labels``; in train mode the model drops some for its null class itself."""
    output: Tensor = model(inputs["sample"], timestep=inputs["timestep"], class_labels=inputs["class_labels"]).sample
    return output


def _sd3(model: nn.Module, inputs: Inputs) -> Tensor:
    """``encoder_hidden_states`` ``[N, L, D]`` and ``pooled_projections`` ``[N, P]``."""
    output: Tensor = model(
        hidden_states=inputs["sample"],
        timestep=inputs["timestep"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        pooled_projections=inputs["pooled_projections"],
    ).sample
    return output


def _flux(model: nn.Module, inputs: Inputs) -> Tensor:
    """As SD3, on packed latents, with positions of image and text tokens; ``guidance`` ``[N]`` for distilled models."""
    sample = inputs["sample"]
    _, _, height, width = sample.shape
    states = inputs["encoder_hidden_states"]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    image_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)  # [H/2 * W/2, 3]
    output: Tensor = model(
        hidden_states=pack(sample),
        timestep=inputs["timestep"] / 1000,
        guidance=inputs.get("guidance"),
        pooled_projections=inputs["pooled_projections"],
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=states.device, dtype=states.dtype),
        img_ids=image_ids.to(sample.device, states.dtype),
    ).sample
    return unpack(output, height, width)


CALLS: Mapping[str, Callable[[nn.Module, Inputs], Tensor]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def pack(latents: Tensor) -> Tensor:
    """Blocks of 2 x 2 as tokens: ``[N, C, H, W] -> [N, H/2 * W/2, 4C]``."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(count, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    blocks = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(len(tokens), -1, height, width)


def _per_sample(output: Tensor, target: Any, weights: Tensor) -> Tensor:
    """``[N]``; the errors of a pair are added."""
    if output.shape != target["target"].shape:
        raise DataError(
            f"The model answers {list(output.shape)} where the target is {list(target['target'].shape)}: the data's "
            "size or channels do not suit it."
        )
    each = (output.float() - target["target"].float()).square().mean((-3, -2, -1)) * weights.float()
    found: Tensor = each.sum(1) if each.ndim == 2 else each
    return found


def _map(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return {k: _map(change, v) for k, v in tree.items()} if isinstance(tree, Mapping) else change(tree)


def _mean(values: Tensor) -> float | None:
    return _number(values.double().mean()) if len(values) else None


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else None
