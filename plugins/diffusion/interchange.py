"""LoRA files in both directions: what diffusers, Hugging Face peft and kohya's scripts write and load.

    save_lora(pipe.unet, "out")                                 # pipe.load_lora_weights("out") in any program
    save_lora({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "out", format="kohya")
    load_lora(pipe.unet, "out/pytorch_lora_weights.safetensors")

Values are copied, never computed, in both directions: rank and alpha of every module are kept, so what is loaded gives
the outputs of what was saved. :func:`to_lora` approximates other adapters.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import adapters_of
from peft_suite.anatomy import Anatomy
from peft_suite.diffusion.lora_files import FILE, METADATA, read_lora
from peft_suite.diffusion.lora_keys import COMPONENTS, component_of, flat_name, original_names
from peft_suite.diffusion.low_rank import Approximation, Factors, changing, factors_of, to_lora
from peft_suite.errors import UnsupportedError, closest
from peft_suite.files import only_name
from peft_suite.lifecycle import install, prepare
from peft_suite.method import make_method
from peft_suite.methods.lora import LoRAConfig
from peft_suite.methods.lora_parts import LowRank
from peft_suite.storage import write_bytes

__all__ = ["FILE", "attach_lora", "load_lora", "save_lora", "to_lora"]


def save_lora(
    models: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: Literal["diffusers", "kohya"] = "diffusers",
    naming: Literal["diffusers", "original"] = "diffusers",
    bake: bool = False,
    rank: int = 0,
) -> dict[str, Approximation]:
    """Write the LoRA or DoRA adapters of one or several components into one file.

    Args:
        models: an adapted UNet, transformer or text encoder, or several by the names that the pipeline gives them.
        path: a folder, for ``pytorch_lora_weights.safetensors`` in it, or a file that ends in ``.safetensors``.
        name: which adapter of each; may be omitted where exactly one is active.
        format: "diffusers", keys and metadata of ``save_lora_weights``; "kohya", flat names with an alpha each.
        naming: block names in kohya's format, "original" for ``input_blocks_...`` of the first Stable Diffusion code.
        bake: for programs that do not read every module's alpha; values are the same to rounding then, not exactly.
            diffusers' format gets a scale of 1 everywhere, for readers without its metadata; kohya's one common alpha,
            without which diffusers misreads attention layers whose alphas differ.
        rank: for adapters that are no LoRA: approximate them by matrices of this rank, see :func:`to_lora`.

    Returns:
        Component -> how well it is approximated; empty where everything is exact.

    Raises:
        UnsupportedError: something has no place in such a file; it is named and nothing is written.
        StorageError: the disk refuses; an older file is intact.
    """
    if format not in ("diffusers", "kohya") or naming not in ("diffusers", "original"):
        raise UnsupportedError(
            f"format={format!r}, naming={naming!r}: a format is diffusers or kohya, a naming diffusers or original."
        )
    named = dict(models) if isinstance(models, Mapping) else {component_of(models): models}
    if unknown := [n for n in named if n not in COMPONENTS]:
        raise UnsupportedError(f"{unknown[0]!r} is no component that carries LoRA. {closest(unknown[0], COMPONENTS)}")
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    approximated: dict[str, Approximation] = {}
    for component, model in named.items():
        if rank and not _is_lora(model, name):
            approximated[component] = to_lora(model, rank, name)
            factors = approximated[component].factors
        else:
            factors = factors_of(model, name)
        if bake:
            common = Counter(f.alpha for f in factors.values()).most_common(1)[0][0]
            factors = {p: f.with_alpha(common if format == "kohya" else f.rank) for p, f in factors.items()}
        if format == "kohya":
            tensors |= _kohya(factors, component, model, naming, several="text_encoder_2" in named)
        else:
            tensors |= _diffusers(factors, component)
            facts |= {f"{component}.{k}": v for k, v in _peft_config(factors).items()}
    from safetensors.torch import save as to_bytes

    metadata = {"format": "pt"}
    if facts:
        metadata[METADATA] = json.dumps(facts, indent=2, sort_keys=True)
    target = Path(path)
    target = target if target.suffix == ".safetensors" else target / FILE
    write_bytes(target, to_bytes(tensors, metadata=metadata))
    return approximated


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    component: str = "",
    trainable: bool = False,
    strict: bool = True,
    anatomy: Anatomy | None = None,
) -> nn.Module:
    """Attach the part of a LoRA file that belongs to ``model`` and make it the active adapter.

    Args:
        model: a UNet, transformer or text encoder.
        path: a ``.safetensors`` file of diffusers, peft or kohya's scripts, or the folder of
            ``pytorch_lora_weights.safetensors``.
        name: name on this model.
        component: what the pipeline calls the model; told from its class where empty. The second text encoder of a
            pipeline is "text_encoder_2".
        trainable: let it train on; other adapters keep their flags.
        strict: False leaves keys without a place out, with a warning.
        anatomy: description of the model, where no plugin has one.

    Raises:
        FileFormatError: no readable safetensors file, or an incomplete one.
        BackboneMismatchError: no key fits the model, or some do not; the nearest modules are named.
        UnsupportedError: another kind of adapter. Nothing is changed before any error.
    """
    factors = read_lora(model, Path(path), component or component_of(model), strict)
    return attach_lora(model, factors, name, trainable=trainable, anatomy=anatomy)


def attach_lora(
    model: nn.Module,
    factors: Mapping[str, Factors],
    name: str = "default",
    *,
    trainable: bool = False,
    anatomy: Anatomy | None = None,
) -> nn.Module:
    """A LoRA adapter of these factors on ``model``, active. Modules may differ in rank and alpha.

    Raises:
        UnsupportedError: only some modules have DoRA's magnitudes.
        AdapterNameError, BackboneError: see :func:`peft_suite.adapt`; nothing is changed.
    """
    with_magnitude = [path for path, f in factors.items() if f.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(factors):
        plain = next(path for path, f in factors.items() if f.magnitude is None)
        raise UnsupportedError(
            f"{with_magnitude[0]} is a DoRA and {plain} a plain LoRA: one adapter is all one or the other. "
            "Merge the file into the weights with the program that made it."
        )
    rank = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in factors.values() if f.rank == rank).most_common(1)[0][0]
    config = LoRAConfig(
        rank=rank,
        alpha=None if alpha == rank else alpha,
        targets=tuple(factors),
        dora=bool(with_magnitude),
        ranks=tuple((p, f.rank) for p, f in factors.items() if f.rank != rank),
        alphas=tuple((p, f.alpha) for p, f in factors.items() if f.alpha != (alpha if alpha != rank else f.rank)),
    )
    adapter = prepare(model, make_method(config), name, anatomy, None)
    with torch.no_grad():
        for edit in adapter.edits:
            if isinstance(edit.part, LowRank):
                given = factors[edit.path]
                edit.part.lora_A.copy_(given.down.flatten(1))
                edit.part.lora_B.copy_(given.up.flatten(1))
                if given.magnitude is not None:
                    cast(Tensor, cast(Any, edit.part).magnitude).copy_(given.magnitude.flatten())
    install(model, adapter, anatomy)
    adapter.requires_grad_(trainable)
    return model


def _is_lora(model: nn.Module, name: str | None) -> bool:
    adapters = adapters_of(model)
    return all(isinstance(e.part, LowRank) for e in changing(adapters[only_name(adapters, name)]))


def _diffusers(factors: Mapping[str, Factors], component: str) -> dict[str, Tensor]:
    """Keys of ``save_lora_weights``; in one file one spelling, because it is told from the first key."""
    kinds = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B")}
    down, up = kinds.get(component, ("lora_linear_layer.down", "lora_linear_layer.up"))
    tensors: dict[str, Tensor] = {}
    for path, f in factors.items():
        tensors[f"{component}.{path}.{down}.weight"] = f.down.contiguous()
        tensors[f"{component}.{path}.{up}.weight"] = f.up.contiguous()
        if f.magnitude is not None:
            shape = (1, -1, 1, 1) if f.down.ndim == 4 else (-1,)
            last = ".weight" if component.startswith("text_encoder") else ""  # as transformers' loader wants it
            tensors[f"{component}.{path}.lora_magnitude_vector{last}"] = f.magnitude.view(shape).contiguous()
    return tensors


def _peft_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """What peft's LoraConfig needs to know; patterns are regular expressions for whole paths."""
    rank = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in factors.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {f"^{re.escape(p)}": f.rank for p, f in factors.items() if f.rank != rank},
        "alpha_pattern": {f"^{re.escape(p)}": f.alpha for p, f in factors.items() if f.alpha != alpha},
        "target_modules": sorted(factors),
        "use_dora": any(f.magnitude is not None for f in factors.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _kohya(
    factors: Mapping[str, Factors], component: str, model: nn.Module, naming: str, several: bool
) -> dict[str, Tensor]:
    if component == "transformer":
        raise UnsupportedError(
            f"kohya's files name fused matrices of the original code of a {type(model).__name__}, which a LoRA on q, k "
            "and v alone does not fill. Write diffusers' format; the other programs read it."
        )
    if any(f.magnitude is not None for f in factors.values()):
        raise UnsupportedError("Programs that read kohya's files disagree about DoRA. Write diffusers' format instead.")
    renamed = original_names(model) if naming == "original" and component == "unet" else {}
    if naming == "original" and component == "unet" and not set(factors) <= set(renamed):
        lost = next(p for p in factors if p not in renamed)
        raise UnsupportedError(f"{lost} has no name in the original Stable Diffusion code. Use naming=diffusers.")
    tensors: dict[str, Tensor] = {}
    for path, f in factors.items():
        flat = flat_name(renamed.get(path, path), component, several=several)
        tensors[f"{flat}.lora_down.weight"] = f.down.contiguous()
        tensors[f"{flat}.lora_up.weight"] = f.up.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(float(f.alpha))
    return tensors
