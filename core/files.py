"""Adapter files: ``adapter_config.json`` for people, ``adapter_model.safetensors`` with tensors and all metadata.

The header of the tensor file alone is complete and decides; the JSON repeats what a reader wants to see. Both are
written atomically, the tensors first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from peft_suite.adapter import Adapter, Adapters, adapters_of
from peft_suite.anatomy import Anatomy
from peft_suite.edits import BatchStatistics
from peft_suite.errors import (
    AdapterNameError,
    BackboneMismatchError,
    FileFormatError,
    UnknownNameError,
    UnsupportedError,
)
from peft_suite.lifecycle import described, install, prepare
from peft_suite.method import make_method
from peft_suite.plugins import methods
from peft_suite.storage import write_bytes, write_text

__all__ = ["fingerprint", "load", "read_config", "save"]

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_FORMAT = 1
_KEYS = ("method_config", "provided_by", "adapter_name", "backbone", "batchnorm", "parts", "digest")
_SAMPLES = 64  # values per tensor that enter the fingerprint


def fingerprint(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Digests of the frozen weights: of names and shapes, and of 64 evenly spaced values of each tensor.

    Values are rounded to bfloat16 first, so a float32 model and its bfloat16 copy agree. The fresh parameters (the
    head) do not count: adapters bring their own.
    """
    skip = set(anatomy.fresh)
    named = [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in skip]
    named = sorted((n, t) for n, t in named if not n.startswith("adapters."))
    shapes = hashlib.blake2b(digest_size=12)
    for name, tensor in named:
        shapes.update(f"{name}{list(tensor.shape)};".encode())
    samples = [_sample(t) for _, t in named if t.numel()]
    if any(t.is_meta for t in samples):
        return {"shapes": shapes.hexdigest(), "weights": ""}
    values = (torch.cat(samples) if samples else torch.zeros(0)).to("cpu", torch.bfloat16)
    content = hashlib.blake2b(values.view(torch.int16).numpy().tobytes(), digest_size=12)
    return {"shapes": shapes.hexdigest(), "weights": content.hexdigest()}


def _whole(tensor: Tensor) -> Tensor:
    # A sharded tensor is gathered: every process must call save then.
    gathered = cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return cast(Tensor, gathered).detach()


def _digest(tensors: dict[str, Tensor]) -> str:
    check = 0
    for key in sorted(tensors):
        check = zlib.crc32(tensors[key].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, check)
    return f"{check:08x}"


def _sample(tensor: Tensor) -> Tensor:
    flat = _whole(tensor).reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES]


def save(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, metadata: dict[str, Any] | None = None
) -> Path:
    """Write one adapter to a directory: its tensors, its configuration, a fingerprint of the backbone, a model card.

    Args:
        model: the adapted model (not wrapped).
        path: directory; files of an earlier save in it are replaced one by one, atomically.
        name: which adapter; may be omitted when exactly one is active.
        metadata: JSON-ready facts to keep with it (classes, preprocessing, data).

    Raises:
        AdapterError, UnknownNameError: no such adapter, or the choice is not clear.
        StorageError: the disk refuses; older files are intact.
    """
    adapters = adapters_of(model)
    adapter = adapters[only_name(adapters, name)]
    tensors = {k: v.contiguous() for k, v in adapter.stored(_whole).items()}
    entry = methods().get(adapter.method.name)
    origin = entry[1].distribution if entry else "unknown"
    config = {
        "method": adapter.method.name,
        "method_config": adapter.method.config.to_dict(),
        "provided_by": origin,
        "adapter_name": adapter.name,
        "backbone": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "family": adapters.anatomy.family,
            "fingerprint": fingerprint(model, adapters.anatomy),
        },
        "parameters": sum(t.numel() for t in tensors.values()),
        "batchnorm": "train"
        if any(isinstance(p, BatchStatistics) and not p.fresh for _, p in adapter.parts())
        else "frozen",
        "versions": _versions(),
    }
    header = {
        "format": _FORMAT,
        **config,
        "parts": [key for key, _ in adapter.parts()],
        "digest": _digest(tensors),
        "metadata": metadata or {},
    }
    content = to_bytes(tensors, metadata={"peft_suite": json.dumps(header, separators=(",", ":"))})
    folder = Path(path)
    write_bytes(folder / TENSORS, content)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / CARD, _card(config, metadata or {}))
    return folder


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    check: Literal["weights", "shapes", "none"] = "weights",
    anatomy: Anatomy | None = None,
) -> nn.Module:
    """Attach a saved adapter to a fresh backbone (or beside other adapters) and make it the active one.

    Args:
        model: a backbone with the same frozen weights.
        path: directory that :func:`save` wrote.
        name: name on this model; by default the one it was saved under.
        trainable: let it train on; other adapters keep their flags.
        check: "weights" compares the fingerprint of the frozen weights, "shapes" names and shapes only.
        anatomy: description of the model, where no plugin has one.

    Raises:
        FileFormatError: missing, truncated, corrupted or foreign files.
        UnknownNameError: the method is not installed; the message names the package that provides it.
        BackboneMismatchError: other frozen weights, shapes or family. Nothing is changed before any error.
    """
    config, tensors = _read(Path(path))
    try:
        method = make_method({"name": config["method"]})
        method = type(method)(type(method.config).from_dict(config["method_config"], newer=True))
    except UnknownNameError as error:
        raise UnknownNameError(
            "method",
            config["method"],
            methods(),
            f"The adapter in {path} needs it; it is provided by the package {config['provided_by']!r}: "
            f"pip install {config['provided_by']}",
        ) from error
    chosen = name or config["adapter_name"]
    saved = config["backbone"]
    try:
        adapter = prepare(model, method, chosen, anatomy, torch.device("meta"), config["batchnorm"], stored=True)
    except UnsupportedError as error:
        raise BackboneMismatchError(
            f"The adapter in {path} was trained on {saved['class']} ({saved['family']}) and does not fit this "
            f"{type(model).__module__}.{type(model).__qualname__}: {error}"
        ) from error
    adapter = Adapter(chosen, method, [e for e in adapter.edits if e.key in set(config["parts"])])
    tensors = _restored(adapter, tensors)
    try:
        adapter.adopt(tensors)
    except FileFormatError as error:
        if fingerprint(model, anatomy or described(model))["shapes"] == saved["fingerprint"]["shapes"]:
            raise
        raise BackboneMismatchError(
            f"The adapter in {path} was trained on {saved['class']} ({saved['family']}) and does not fit this "
            f"{type(model).__module__}.{type(model).__qualname__}: {error}"
        ) from error
    _check_shapes(path, adapter, tensors, model, saved)
    if check != "none":
        _check_backbone(path, model, anatomy, saved["fingerprint"], saved["class"], check)
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    for edit in adapter.edits:
        for n in edit.part._parameters if edit.kind == "shadow" else ():  # the model reads them in its own dtype
            key, base = f"{edit.key}.{n}", model.get_submodule(edit.path)._parameters.get(n)
            tensors[key] = tensors[key] if base is None else tensors[key].to(base.dtype)
    adapter.load_state_dict({k: v.to(device, copy=True) for k, v in tensors.items()}, assign=True)
    adapter._apply(lambda t: t)  # type: ignore[no-untyped-call]  # parts note the dtype of what was loaded
    install(model, adapter, anatomy)
    adapter.requires_grad_(trainable)
    return model


def _restored(adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict behind the tensors of a file."""
    state = dict(tensors)
    for key, part in adapter.parts():
        own = {n.removeprefix(f"{key}."): state.pop(n) for n in list(state) if n.startswith(f"{key}.")}
        state |= {f"{key}.{n}": t for n, t in part.restore(own).items()}
    return state


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter directory says about itself: method, configuration, backbone, parameters, metadata, sizes.

    Raises:
        FileFormatError: missing, truncated, corrupted or foreign files.
    """
    folder = Path(path)
    config, _ = _read(folder, tensors=False)
    sizes = {f.name: f.stat().st_size for f in (folder / TENSORS, folder / CONFIG) if f.exists()}
    return {**config, "path": str(folder), "bytes": sizes}


def _read(folder: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / TENSORS
    if not folder.is_dir():
        raise FileFormatError(
            f"{folder} is no adapter directory. Give the directory that save() or a training run wrote."
        )
    if not file.exists():
        raise FileFormatError(f"{folder} holds no {TENSORS}. Give the directory that save() or a training run wrote.")
    _check_json(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("peft_suite", "null"))
            values = {k: opened.get_tensor(k) for k in opened.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{file} is truncated or corrupted ({error}). Restore it from a copy or train again."
        ) from error
    if not isinstance(header, dict) or "method" not in header:
        raise FileFormatError(
            f"{file} was not written by peft-suite. If it comes from Hugging Face peft, use import_peft(model, path)."
        )
    if lost := [key for key in _KEYS if key not in header]:
        raise FileFormatError(
            f"The header of {file} lacks {', '.join(lost)}. Restore the file from a copy or train again."
        )
    if tensors and _digest(values) != header["digest"]:
        raise FileFormatError(
            f"{file} is corrupted: its tensors do not match the digest that was saved with them. "
            "Restore it from a copy or train again."
        )
    if header.get("format", 0) > _FORMAT:
        warnings.warn(
            f"{file} has format {header['format']}, newer than this peft-suite's {_FORMAT}; update it.", stacklevel=3
        )
    return header, values


def _check_json(folder: Path) -> None:
    file = folder / CONFIG
    if not file.exists():
        raise FileFormatError(f"{folder} holds no {CONFIG}. Restore it from a copy; {TENSORS} alone is not accepted.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileFormatError(f"{file} is not readable JSON ({error}). Restore it from a copy.") from error
    if not isinstance(config, dict) or "method" not in config:
        if isinstance(config, dict) and "peft_type" in config:
            raise FileFormatError(
                f"{file} is a Hugging Face peft configuration (peft_type {config['peft_type']!r}). "
                "Use import_peft(model, path)."
            )
        raise FileFormatError(f"{file} has no key 'method': it is no peft-suite adapter configuration.")


def _check_shapes(
    path: str | os.PathLike[str], adapter: Adapter, tensors: dict[str, Tensor], model: nn.Module, saved: dict[str, Any]
) -> None:
    wanted = {k: tuple(v.shape) for k, v in adapter.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if wanted == found:
        return
    here = f"{type(model).__module__}.{type(model).__qualname__}"
    wrong = sorted(k for k in wanted.keys() & found.keys() if wanted[k] != found[k])
    if wrong:
        k = wrong[0]
        what = (
            f"{len(wrong)} tensors differ in shape, {k} is {list(found[k])} in the file, {list(wanted[k])} on the model"
        )
    else:
        extra, lost = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
        what = f"the file has {len(extra)} tensors without a place {extra[:3]} and lacks {len(lost)} {lost[:3]}"
    raise BackboneMismatchError(
        f"The adapter in {path} was trained on {saved['class']} ({saved['family']}) and does not fit this {here}: "
        f"{what}. "
        "Build the backbone with the same name, size and number of classes."
    )


def _check_backbone(
    path: str | os.PathLike[str],
    model: nn.Module,
    anatomy: Anatomy | None,
    saved: dict[str, str],
    cls: str,
    check: Literal["weights", "shapes"],
) -> None:
    here = fingerprint(model, anatomy or described(model))
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    for kind in ("shapes", "weights") if check == "weights" else ("shapes",):
        if here[kind] and saved[kind] and here[kind] != saved[kind]:
            raise BackboneMismatchError(
                f"The adapter in {path} was trained on a {cls} whose frozen {kind} have the fingerprint {saved[kind]}; "
                f"this {name} has {here[kind]}. Load the pre-trained checkpoint it was trained on"
                + (', or pass check="shapes" if you know that they agree.' if kind == "weights" else ".")
            )


def only_name(adapters: Adapters, name: str | None) -> str:
    """``name``, or the adapter that is meant when there is no doubt: the only active one, or the only one."""
    if name is not None:
        return name
    chosen = adapters.active if len(adapters.active) == 1 else tuple(adapters)
    if len(chosen) != 1:
        raise AdapterNameError(f"Several adapters are on this model ({', '.join(adapters)}). Say which with name=...")
    return chosen[0]


@functools.cache
def _versions() -> dict[str, str]:
    return {"peft_suite": version("peft-suite"), "torch": torch.__version__}


def _card(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    shown = {k: repr(v) for k, v in config["method_config"].items()}
    arguments = ", ".join(f"{k}={v if len(v) <= 80 else '...'}" for k, v in shown.items())  # plans are long
    lines = [
        f"# {config['method']} adapter",
        "",
        f"- method: `{config['method']}({arguments})`",
        f"- backbone: `{config['backbone']['class']}` ({config['backbone']['family']}), "
        f"frozen weights `{config['backbone']['fingerprint']['weights']}`",
        f"- values in the file: {config['parameters']:,}",
        f"- written by peft-suite {config['versions']['peft_suite']}, torch {config['versions']['torch']}",
    ]
    if classes := metadata.get("classes"):
        first = ", ".join(map(str, classes[:20])) + (" ..." if len(classes) > 20 else "")
        lines.append(f"- classes ({len(classes)}): {first}")
    lines += [
        "",
        "```python",
        "import peft_suite as ps",
        "",
        "ps.load(model, 'path/to/this/folder')  # model: the same pre-trained backbone",
        "```",
        "",
    ]
    return "\n".join(lines)
