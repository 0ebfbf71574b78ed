"""Tensors on disk, found by what they were made of: latents by image and VAE, embeddings by text and encoders.

One safetensors file per entry, written atomically. An entry that cannot be read counts as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.storage import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TensorCache", "fingerprint"]

VERSION = 1  # of what the entries hold

Entry = Mapping[str, "Tensor"]


class TensorCache:
    """Mappings of tensors by key.

    Args:
        folder: is created with the first entry; "" keeps nothing.
        settings: all that the entries depend on besides their key, JSON-ready.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder) if folder else None
        self.settings = json.dumps({"version": VERSION, **settings}, sort_keys=True)
        self.made = 0  # entries that were not there

    def get(self, key: bytes, make: Callable[[], Entry]) -> dict[str, Tensor]:
        """The stored entry, or what ``make`` gives, which is then stored."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save

        place = self.place(key)
        if place is not None and place.is_file():
            try:
                return load_file(place)
            except (OSError, SafetensorError):
                pass
        self.made += 1
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        if place is not None:
            write_bytes(place, save(entry))
        return entry

    def place(self, key: bytes) -> Path | None:
        """The file of a key."""
        if self.folder is None:
            return None
        name = hashlib.sha256(self.settings.encode() + b"\0" + key).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def fingerprint(*modules: nn.Module) -> str:
    """sha256 over every parameter and buffer, by name: another VAE or text encoder never finds an old entry."""
    import torch

    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()
