"""LoRA files read: which tensors belong to a model, with the rank and alpha of every module."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from peft_suite.diffusion.lora_keys import COMPONENTS, Found, sort_keys
from peft_suite.diffusion.low_rank import Factors
from peft_suite.errors import BackboneMismatchError, FileFormatError, UnsupportedError

__all__ = ["FILE", "METADATA", "read_lora"]

FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def read_lora(model: nn.Module, path: Path, component: str, strict: bool = True) -> dict[str, Factors]:
    """Module path -> factors, of the part of a file that is meant for ``component`` or for none.

    Raises:
        FileFormatError, BackboneMismatchError, UnsupportedError: see ``interchange.load_lora``.
    """
    file = _file(path)
    tensors, metadata = _read(file)
    found = sort_keys(tensors, model, component)
    _check(file, found, model, component, strict)
    return _factors(file, found, tensors, _facts(metadata, component, found.prefixed), model)


def _file(path: Path) -> Path:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        inside = sorted(p.name for p in path.glob("*.safetensors")) if path.is_dir() else []
        more = f" The folder holds {', '.join(inside[:6])}: name one." if inside else ""
        raise FileFormatError(f"{file} does not exist.{more} Give a .safetensors file, or a folder with {FILE}.")
    if file.suffix != ".safetensors":
        raise FileFormatError(
            f"{file} is no .safetensors file, and other formats can run code when they are read. Convert it first."
        )
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{file} is truncated or no safetensors file ({error}). Get it again.") from error


def _facts(metadata: Mapping[str, str], component: str, prefixed: bool) -> dict[str, Any]:
    """The LoraConfig in a file's metadata; {} where there is none."""
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    if prefixed:
        return {k.removeprefix(f"{component}."): v for k, v in found.items() if k.startswith(f"{component}.")}
    return {str(k): v for k, v in found.items() if str(k).partition(".")[0] not in COMPONENTS}


def _check(file: Path, found: Found, model: nn.Module, component: str, strict: bool) -> None:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not found.modules:
        there = ", ".join(f"{c} ({n} keys)" for c, n in found.others.items())
        what = f"It is for {there}. " if there else ""
        what += f"Without a place: {found.nearest(names)}. " if found.unmatched else ""
        raise BackboneMismatchError(
            f"No key of {file} fits this {type(model).__name__} as {component!r}. {what}"
            "Give the model it was trained on, or component=... if the pipeline calls the model something else."
        )
    if not found.unmatched:
        return
    message = (
        f"{len(found.unmatched)} keys of {file} have no place on this {type(model).__name__}, while "
        f"{len(found.modules)} modules have one: {found.nearest(names)}."
    )
    if strict:
        raise BackboneMismatchError(f"{message} Give the model it was trained on, or leave them out with strict=False.")
    warnings.warn(f"{message} They are left out.", stacklevel=3)


def _factors(
    file: Path, found: Found, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], model: nn.Module
) -> dict[str, Factors]:
    for key in ("fan_in_fan_out", "use_qalora", "lora_bias"):
        if facts.get(key):
            raise UnsupportedError(f"{file}: peft's option {key}={facts[key]!r} has no counterpart here.")
    factors: dict[str, Factors] = {}
    for path, keys in found.modules.items():
        if "down" not in keys or "up" not in keys:
            raise FileFormatError(
                f"{file} has {sorted(keys.values())} for {path} and not both factors. Get the whole file."
            )
        down, up = tensors[keys["down"]], tensors[keys["up"]]
        weight = cast(Tensor, model.get_submodule(path).weight)
        out, fan_in, own = weight.shape[0], math.prod(weight.shape[1:]), down.shape[0]
        if down.flatten(1).shape != (own, fan_in) or up.flatten(1).shape != (out, own):
            raise BackboneMismatchError(
                f"{path}: the factors in {file} have the shapes {list(down.shape)} and {list(up.shape)}, and the "
                f"weight of this {type(model).__name__} is {list(weight.shape)}. Give the model it was trained on."
            )
        magnitude = tensors[keys["magnitude"]] if "magnitude" in keys else None
        columns = magnitude is not None and "dora_scale" in keys["magnitude"] and magnitude.shape[0] != out
        if magnitude is not None and (magnitude.numel() != out or columns):
            raise UnsupportedError(
                f"{keys['magnitude']} has the shape {list(magnitude.shape)}: lengths of the columns of {path}, where "
                f"DoRA here has those of its {out} rows."
            )
        alpha = _alpha(facts, path, own) if facts else float(tensors[keys["alpha"]]) if "alpha" in keys else float(own)
        factors[path] = Factors(down.view(own, *weight.shape[1:]), up.flatten(1), alpha, magnitude)
    return factors


def _alpha(facts: Mapping[str, Any], path: str, rank: int) -> float:
    """peft's rule: the first pattern that fits the end of the path; with rsLoRA as a plain alpha."""
    alpha = facts.get("lora_alpha", rank)
    for pattern, value in (facts.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return float(alpha) * (math.sqrt(rank) if facts.get("use_rslora") else 1.0)
