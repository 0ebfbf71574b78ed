"""Resumable state in one file: atomic, free of pickle, readable by safetensors.

A checkpoint is any nesting of dicts, lists, numbers, strings and tensors. Tensors go into the safetensors body, the
rest as JSON into its header, where ``{"__tensor__": key}`` stands for a tensor.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_suite.errors import FileFormatError
from peft_suite.storage import atomic

__all__ = [
    "read_checkpoint",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "write_checkpoint",
]

_FORMAT = "peft-suite-checkpoint-1"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Random state of Python, numpy, torch and the current CUDA device."""
    kind, keys, position, has_gauss, gauss = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    version, values, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(values), spare],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, values, spare = state["python"]
    random.setstate((version, tuple(values), spare))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` atomically to one file."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(state, tensors))
    metadata = {"format": _FORMAT, "state": header}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote; tensors are on the CPU.

    Raises:
        FileFormatError: the file is damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise FileFormatError(f"{path} is not a checkpoint of this version. Start without --resume.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = _unpack(json.loads(metadata["state"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} is damaged ({error}). Start without --resume.") from error
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"t{len(tensors):06d}"
        tensors[key] = value.detach().cpu().clone().contiguous()  # a copy: safetensors refuses shared memory
        return {"__tensor__": key}
    if isinstance(value, Mapping):
        return {"__dict__": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {key: _unpack(item, tensors) for key, item in value["__dict__"]}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value
