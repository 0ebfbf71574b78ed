"""From a directory on disk back to a model that runs: adapters by their metadata, merged models by their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import DataError, FileFormatError
from peft_suite.plugins import Plugin, resolve
from peft_suite.train.contracts import Backbones, DataConfig, DataSource, DataSplits

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

__all__ = ["Opened", "aligned", "open_adapter", "pick_split", "saved_data"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


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


def open_adapter(plugin: Plugin, path: Path, checkpoint: str = "") -> Opened:
    """The backbone named in an adapter's metadata with the adapter on it, or a merged model that ``merge`` wrote.

    Args:
        plugin: whose backbones and data to use; an adapter of another plugin is refused.
        path: adapter directory, or the directory of a merged model.
        checkpoint: weights of the backbone, where they lie elsewhere than when it was trained.

    Raises:
        FileFormatError: no adapter, or one without the facts that training stores.
        BackboneMismatchError: the backbone has other weights than the adapter was trained on.
    """
    metadata, merged = _metadata(path)
    owner = metadata.get("plugin")
    if owner != plugin.name:
        raise FileFormatError(f"{path} belongs to the plugin {owner!r}. Run: peft-suite {owner} ... {path}")
    plugin.ensure()
    import torch

    import peft_suite as ps

    facts = metadata["backbone"]
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
        pretrained=bool(facts.get("pretrained")) and not source and not merged,
        checkpoint=source,
        options=facts.get("options") or {},
    )
    if merged:
        _fill(model, path)
    else:
        ps.load(model, path)
    return Opened(model.eval(), metadata, path, merged)


def saved_data(opened: Opened, source: DataSource, root: str | None, changes: Mapping[str, Any]) -> DataConfig:
    """The data configuration that training stored, with another ``root`` and changed fields."""
    values = dict(opened.metadata.get("data_config") or {})
    if root is not None:
        kept = ("val_fraction", "split_seed", "multi_label", "label_separator", "skip_bad", "workers")
        values = {k: v for k, v in values.items() if k in kept} | {"root": root}
    return source.config.from_dict({**values, "augment": "none", **changes})


def pick_split(data: DataSplits, wanted: str) -> tuple[str, Dataset[Any]]:
    """The split to measure on: ``wanted``, or the first there is of test, val and train."""
    splits = {name: getattr(data, name) for name in ("test", "val", "train")}
    there = [name for name, split in splits.items() if split is not None and len(split)]
    if wanted == "auto" and there:
        return there[0], splits[there[0]]
    if wanted not in there:
        raise DataError(
            f"There is no {wanted} split with samples in this data. Choose one of: {', '.join(there) or 'none'}."
        )
    return wanted, splits[wanted]


def aligned(data: DataSplits, dataset: Dataset[Any], opened: Opened) -> Dataset[Any]:
    """``dataset`` with targets counted like the adapter's classes.

    Raises:
        DataError: the data has classes that the adapter does not know.
    """
    if tuple(data.classes) == opened.classes:
        return dataset
    unknown = [c for c in data.classes if c not in opened.classes]
    if unknown or data.multi_label or opened.multi_label:
        what = f"the classes {', '.join(unknown[:6])}" if unknown else "other classes or another order"
        raise DataError(
            f"The data has {what}, but {opened.path} was trained on {len(opened.classes)} classes: "
            f"{', '.join(opened.classes[:12])}{' ...' if len(opened.classes) > 12 else ''}. Rename them to match."
        )
    from peft_suite.cli.renumber import Renumbered

    return Renumbered(dataset, [opened.classes.index(c) for c in data.classes])


def _metadata(path: Path) -> tuple[Mapping[str, Any], bool]:
    merged = (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
    if merged:
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
