"""From a directory on disk back to a model that runs: adapters by their metadata, merged models by their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import FileFormatError
from peft_suite.plugins import Plugin, find_plugin, resolve
from peft_suite.train.contracts import Backbones

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CONFIG", "MERGED", "WEIGHTS", "Opened", "open_adapter"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MERGED = "peft_suite.json"  # in a merged model's folder that the plugin wrote in a layout of its own


@dataclass
class Opened:
    """A model ready to run and what is known about it; ``metadata`` is what training stored."""

    model: nn.Module
    metadata: Mapping[str, Any]
    path: Path
    merged: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in index order."""
        return tuple(str(c) for c in self.metadata.get("classes") or ())

    @property
    def task(self) -> str:
        """The task it was trained for; "" for classification."""
        return str(self.metadata.get("task") or "")

    @property
    def multi_label(self) -> bool:
        """Several labels per sample?"""
        return bool(self.metadata.get("multi_label"))


def open_adapter(path: str | Path, *, plugin: Plugin | None = None, checkpoint: str = "") -> Opened:
    """The backbone named in an adapter's metadata with the adapter on it, or a merged model that ``merge`` wrote.

    Args:
        path: adapter directory of a run, or the directory of a merged model.
        plugin: an adapter of another plugin is refused; without it, the one that the adapter names is taken.
        checkpoint: weights of the backbone, where they lie elsewhere than when it was trained.

    Raises:
        FileFormatError: no adapter, or one without the facts that training stores.
        BackboneMismatchError: the backbone has other weights than the adapter was trained on.
    """
    path = Path(path)
    metadata, merged = _metadata(path)
    owner = str(metadata.get("plugin"))
    if plugin is None:
        plugin = find_plugin(owner)
    elif owner != plugin.name:
        raise FileFormatError(f"{path} belongs to the plugin {owner!r}. Run: peft-suite {owner} ... {path}")
    plugin.ensure()
    import torch

    import peft_suite as ps
    from peft_suite.files import read_config

    facts = metadata["backbone"]
    own = (path / MERGED).is_file()  # the folder itself is the backbone
    if own:
        facts = {**facts, "name": str(path), "pretrained": True}
    source = "" if merged else checkpoint or str(facts.get("checkpoint") or "")
    if source and not checkpoint and not Path(source).exists():
        raise FileFormatError(
            f"{path} was trained on the weights {source}, which are not there any more. "
            "Say where they are: --checkpoint FILE"
        )
    plugin = plugin.for_task(str(metadata.get("task") or ""))
    backbones: Backbones = resolve(plugin.backbones, plugin)
    torch.manual_seed(0)  # a backbone without weights is the same one each time; training seeds it by its own seed
    model = backbones.build(
        str(facts.get("name") or ""),
        int(facts["num_outputs"]),
        pretrained=bool(facts.get("pretrained")) and not source and (own or not merged),
        checkpoint=source,
        options=facts.get("options") or {},
    )
    if merged and not own:
        _fill(model, path)
    elif not merged:
        if hasattr(backbones, "prepare"):
            stored = read_config(path)
            backbones.prepare(model, {"name": stored["method"], **stored["method_config"]})
        ps.load(model, path)
    return Opened(model.eval(), metadata, path, merged)


def _metadata(path: Path) -> tuple[Mapping[str, Any], bool]:
    merged = (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
    if (path / MERGED).is_file():
        try:
            metadata, merged = json.loads((path / MERGED).read_text("utf-8")), True
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path / MERGED} cannot be read: {error}.") from error
    elif merged:
        try:
            metadata = json.loads((path / CONFIG).read_text("utf-8")).get("peft_suite")
        except (OSError, ValueError, AttributeError) as error:
            raise FileFormatError(f"{path / CONFIG} cannot be read: {error}.") from error
    else:
        from peft_suite.files import read_config

        metadata = read_config(path).get("metadata")
    if not isinstance(metadata, Mapping) or not {"plugin", "backbone"} <= set(metadata):
        raise FileFormatError(
            f"{path} does not say which backbone it belongs to (it was saved outside a training run). "
            "Use it from Python: build the model, then peft_suite.load(model, path)."
        )
    return metadata, merged


def _fill(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileFormatError(f"{path / WEIGHTS} cannot be read or does not fit its config: {reason}") from error
