"""Weights of others: files and folders read without executing anything in them, and the hub where it can be reached."""

from __future__ import annotations

import json
import os
import pickle
import socket
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Shipped", "mismatch", "no_waiting_for_the_hub", "read_weights"]


@dataclass(frozen=True)
class Shipped:
    """Weights of the embedded backbone ``name``, in the safetensors file ``assets/<file>`` inside ``package``."""

    package: str
    file: str
    name: str

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in float32 where they are no counters."""
        from safetensors.torch import load

        found = load(self._bytes())
        return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}

    def metadata(self) -> dict[str, str]:
        """How they were made: data, seed, steps, results, licence."""
        raw = self._bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return dict(header.get("__metadata__", {}))

    def fill(
        self, model: nn.Module, options: Mapping[str, Any], belongs: Callable[[str], bool] = lambda key: True
    ) -> None:
        """Give ``model`` the tensors whose keys ``belongs`` says were pre-trained; ``options`` are told in the error.

        Raises:
            FileFormatError: keys or shapes differ, for example because an option changed them.
        """
        shipped, own = (
            {key: value for key, value in state.items() if belongs(key)}
            for state in (self.tensors(), model.state_dict())
        )
        wrong = sorted(
            k for k in {*shipped, *own} if k not in shipped or k not in own or shipped[k].shape != own[k].shape
        )
        if wrong:
            raise FileFormatError(
                f"The weights of {self.name} do not fit the options {options}: {', '.join(wrong[:6])}. "
                "Leave these options out, or build with pretrained=False."
            )
        model.load_state_dict(shipped, strict=False)

    def _bytes(self) -> bytes:
        return resources.files(self.package).joinpath("assets", self.file).read_bytes()


def read_weights(path: str, wrappers: Sequence[str]) -> dict[str, Tensor]:
    """The state dict of a torch or safetensors file, out of the first wrapper that it has.

    Raises:
        FileFormatError: missing, a folder, truncated, or without tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        inside = ", ".join(sorted(os.listdir(path))[:6]) if Path(path).is_dir() else ""
        hint = f" It is a folder: name the weights file in it ({inside})." if Path(path).is_dir() else ""
        raise FileFormatError(f"checkpoint = {path!r} is not a file.{hint}")
    problems = (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        OSError,
        ValueError,
    )
    try:
        if path.endswith(".safetensors"):
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_numbers()):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except problems as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(
            f"checkpoint = {path!r} cannot be read: {reason} It must be a whole torch file (*.pth, *.pt) that holds "
            "tensors only (numbers and text beside them), or a whole safetensors file (*.safetensors)."
        ) from error
    found = list(loaded) if isinstance(loaded, dict) else [type(loaded).__name__]
    for key in wrappers:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded or not all(torch.is_tensor(v) for v in loaded.values()):
        raise FileFormatError(
            f"checkpoint = {path!r} holds no state dict of tensors under {', '.join(wrappers)} or at its top; found: "
            f"{', '.join(map(str, found[:8]))}."
        )
    return dict(loaded)


def _numbers() -> list[Any]:
    """numpy's scalars, which epochs and accuracies in old files are made of; building one runs no code of a file."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(k)) for k in ("float64", "float32", "int64", "int32", "bool")]
    old = ("numpy.core.multiarray.scalar", scalar)  # the name under which numpy 1 wrote it
    return [scalar, (scalar, old[0]), np.dtype, *kinds]


@contextmanager
def no_waiting_for_the_hub() -> Iterator[None]:
    """Where the hub's name does not even resolve, use its cache only, instead of minutes of retries."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    before = constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def mismatch(
    path: str,
    model: str,
    held: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    lost: Sequence[str],
    foreign: Sequence[str],
    shapes: Sequence[str],
    advice: str = "Choose the backbone (and the options) that the file was made with.",
) -> str:
    """Why the weights of a file do not fit a model, and what to build instead.

    Args:
        held, asked: sizes that the file's and the model's tensors tell, under the names of the backbone's options.
        lost, foreign, shapes: keys that the file lacks, keys that the model does not know, and shapes that differ.
        advice: what to do where all known sizes agree.
    """
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"
        for what, keys in (
            ("keys missing in the file", lost),
            ("keys unknown to the model", foreign),
            ("other shapes", shapes),
        )
        if keys
    ]
    differ = [name for name in asked if name != "num_classes" and held.get(name, asked[name]) != asked[name]]
    if not differ:
        return f"checkpoint = {path!r} does not fit {model}. {'; '.join(parts)}. {advice}"
    theirs = ", ".join(f"{name} {held[name]}" for name in differ)
    ours = ", ".join(f"{name} {asked[name]}" for name in differ)
    options = " ".join(f"backbone.options.{name}={held[name]}" for name in differ)
    return (
        f"checkpoint = {path!r} holds a network of {theirs}, and this {model} has {ours}. Build the backbone with "
        f"{options} (and a number of heads that divides the width), or choose another. {'; '.join(parts)}."
    )
