"""Merged models as files that others load: timm and Hugging Face directories, torch.export, ONNX.

What is written for timm and torch.export is loaded again and compared with the model before it replaces anything; ONNX
files are checked, and compared where onnxruntime is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.errors import MergeError, MissingExtraError, StorageError, UnknownNameError, UnsupportedError
from peft_suite.storage import atomic, write_bytes, write_text
from peft_suite.train.opening import CONFIG, WEIGHTS, Opened

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FORMATS", "export", "suitable", "write_merged"]

TRACED = ("torch-export", "onnx")
TOLERANCE = 1e-4  # of a reloaded model's output, relative to its largest value


def export(opened: Opened, out: Path, format: str, rank: int = 0) -> list[Path]:
    """Write ``opened`` to ``out`` in one of :data:`FORMATS`, or the "auto" one that suits it, and return the files.

    Formats of a traced program (torch-export, onnx) hold adapters that do not fold as they are.

    Raises:
        UnknownNameError: no such format.
        MergeError: the adapter does not fold into the weights, and the format has no place for it; nothing is written.
        UnsupportedError: the format cannot hold this model.
    """
    if format == "auto":
        format = suitable(opened.model)
    if format not in FORMATS:
        raise UnknownNameError("export format", format, FORMATS)
    if format == "peft":
        return _peft(opened, out, rank)
    try:
        merge_in_place(opened)
    except MergeError as error:
        if format not in TRACED:  # a traced program holds what does not fold
            raise MergeError(f"{error} A file that holds it as it is: --format torch-export.") from error
    with warnings.catch_warnings():  # of the tracers about their own insides
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        return FORMATS[format](opened, out)


def suitable(model: nn.Module) -> str:
    """The format that holds a model best."""
    if _is_timm(model):
        return "timm"
    return "hf" if hasattr(model, "save_pretrained") else "torch-export"


def merge_in_place(opened: Opened) -> None:
    """Fold the adapter into the weights; a merged model stays as it is."""
    import peft_suite as ps

    if not opened.merged:
        ps.merge(opened.model)


def write_merged(opened: Opened, out: Path) -> list[Path]:
    """``model.safetensors`` with plain weights, ``config.json`` in timm's layout where the model is timm's."""
    config = (
        _timm_config(opened) if _is_timm(opened.model) else {"architecture": opened.metadata["backbone"].get("name")}
    )
    return _write_directory(opened, out, {**config, "peft_suite": _own(opened)})


def _write_directory(opened: Opened, out: Path, config: Mapping[str, Any]) -> list[Path]:
    weights = write_bytes(out / WEIGHTS, _weights(opened.model))
    return [weights, write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")]


def _own(opened: Opened) -> dict[str, Any]:
    """What eval, predict and export need to open the merged model again."""
    keys = ("plugin", "backbone", "classes", "multi_label", "preprocessing", "data_config")
    return {k: opened.metadata[k] for k in keys if k in opened.metadata}


def _weights(model: nn.Module) -> bytes:
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    return save(state, metadata={"format": "pt"})


def _is_timm(model: nn.Module) -> bool:
    return type(model).__module__.startswith("timm.")


def _timm(opened: Opened, out: Path) -> list[Path]:
    if not _is_timm(opened.model):
        raise UnsupportedError(_unfit(opened, "timm model"))
    config = {**_timm_config(opened), "peft_suite": _own(opened)}
    with _checked_directory(out) as folder:
        _write_directory(opened, folder, config)
        timm: Any = importlib.import_module("timm")
        _compare(opened, timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), "timm.create_model")
    return [out / WEIGHTS, out / CONFIG]


def _hf(opened: Opened, out: Path) -> list[Path]:
    if _is_timm(opened.model):  # transformers' TimmWrapper reads timm's own layout
        return _timm(opened, out)
    save = getattr(opened.model, "save_pretrained", None)
    if save is None:
        raise UnsupportedError(_unfit(opened, "Hugging Face model"))
    with _checked_directory(out) as folder:
        save(folder)
    return sorted(out.iterdir())


def _unfit(opened: Opened, kind: str) -> str:
    return (
        f"{type(opened.model).__qualname__} is no {kind}. Formats for it: {suitable(opened.model)}, peft (the adapter "
        "alone, where it has LoRA's form)."
    )


def _why(error: Exception) -> str:
    """The beginning of another library's message, without colours."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return text if len(text) <= 400 else f"{text[:400].rpartition(' ')[0]} ..."


def _timm_config(opened: Opened) -> dict[str, Any]:
    """timm's hub layout: architecture, its arguments, preprocessing and label names."""
    timm: Any = importlib.import_module("timm")
    backbone = opened.metadata["backbone"]
    name = str(backbone.get("name") or "").partition(".")[0]
    arguments = dict(backbone.get("options") or {})
    if not timm.is_model(name):
        name, arguments = _nearest_architecture(opened.model, arguments)
    facts = opened.metadata.get("preprocessing") or {}
    known = ("input_size", "mean", "std", "interpolation", "crop_pct")
    cfg = {k: facts[k] for k in known if k in facts}
    base = getattr(opened.model, "pretrained_cfg", None) or {}
    cfg.update({k: base[k] for k in ("first_conv", "classifier") if base.get(k)})
    config = {
        "architecture": name,
        "num_classes": len(opened.classes) or backbone["num_outputs"],
        "num_features": getattr(opened.model, "num_features", None),
        "pretrained_cfg": {"num_classes": backbone["num_outputs"], **cfg},
        "label_names": list(opened.classes),
    }
    return {**config, "model_args": arguments} if arguments else config


def _nearest_architecture(model: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A vision transformer that timm's registry lacks, as a registered one with other arguments."""
    needed = ("patch_embed", "blocks", "embed_dim")
    if type(model).__qualname__ != "VisionTransformer" or not all(hasattr(model, a) for a in needed):
        raise UnsupportedError(
            f"timm's registry has no {type(model).__qualname__} like this one. Choose another --format."
        )
    block = model.blocks[0]
    shape = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
    }
    return "vit_tiny_patch16_224", {**options, **shape}


def _torch_export(opened: Opened, out: Path) -> list[Path]:
    import torch

    target = out if out.suffix == ".pt2" else out / "model.pt2"
    program = _program(opened)
    with atomic(target) as temporary, tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.pt2"  # torch insists on the suffix
        torch.export.save(program, written)
        _compare(opened, torch.export.load(written).module(), "torch.export.load")
        shutil.copyfile(written, temporary)
    return [target]


def _program(opened: Opened) -> Any:
    """The model for batches of any size, without gradients."""
    import torch

    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad():
            return torch.export.export(opened.model, (_example(opened, 2),), dynamic_shapes=shapes)
    except Exception as error:
        raise UnsupportedError(f"torch.export cannot trace this model: {_why(error)}") from error


def _onnx(opened: Opened, out: Path) -> list[Path]:
    lost = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lost:
        raise MissingExtraError(f"The ONNX export needs {' and '.join(lost)}. Run: pip install 'peft-suite[export]'")
    import torch

    target = out if out.suffix == ".onnx" else out / "model.onnx"
    program = _program(opened)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if own := sorted(name.removeprefix("peft_suite.") for name in called if name.startswith("peft_suite.")):
        raise UnsupportedError(
            f"ONNX has no form of the kernels that this model calls ({', '.join(own)}). Choose --format torch-export; "
            "a program that loads the file imports peft_suite.kernels first."
        )
    try:
        done: Any = torch.onnx.export(
            program,
            (_example(opened, 2),),
            dynamo=True,
            input_names=["input"],
            output_names=["logits"],
            verbose=False,
        )
    except Exception as error:
        raise UnsupportedError(f"torch.onnx.export cannot convert this model: {_why(error)}") from error
    with atomic(target) as temporary:
        done.save(str(temporary), external_data=False)
        _check_onnx(opened, temporary)
    return [target]


def _check_onnx(opened: Opened, file: Path) -> None:
    onnx: Any = importlib.import_module("onnx")
    onnx.checker.check_model(onnx.load(file))
    if importlib.util.find_spec("onnxruntime") is not None:
        import torch

        runtime: Any = importlib.import_module("onnxruntime")
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        _compare(opened, lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), "onnxruntime")


def _peft(opened: Opened, out: Path, rank: int) -> list[Path]:
    import peft_suite as ps

    if opened.merged:
        raise UnsupportedError(f"{opened.path} is merged: there is no adapter left to export for Hugging Face peft.")
    done = ps.export_peft(
        opened.model, out, rank=rank, base_model_name=str(opened.metadata["backbone"].get("name") or "")
    )
    return sorted(Path(done.path).iterdir())


FORMATS: Mapping[str, Callable[..., list[Path]]] = {
    "hf": _hf,
    "onnx": _onnx,
    "peft": _peft,
    "timm": _timm,
    "torch-export": _torch_export,
}


@contextmanager
def _checked_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside ``out`` whose files move into ``out`` when the block ends without an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            yield Path(folder)
            out.mkdir(exist_ok=True)
            for file in sorted(Path(folder).iterdir()):
                file.replace(out / file.name)
    except OSError as error:
        raise StorageError(f"Cannot write {out}: {error.strerror or error}. Choose another folder.") from error


def _example(opened: Opened, batch: int) -> Tensor:
    """Random inputs of the size that the preprocessing makes."""
    import torch

    size = (opened.metadata.get("preprocessing") or {}).get("input_size")
    if not size:
        raise UnsupportedError(
            f"{opened.path} does not say how large its inputs are, so it cannot be traced or checked."
        )
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


def _compare(opened: Opened, other: Callable[[Tensor], Any], loader: str) -> None:
    """The file must give the outputs of the model."""
    import torch

    inputs = _example(opened, 3)
    with torch.no_grad():
        ours, theirs = opened.model(inputs), other(inputs)
    worst = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6))
    if not worst <= TOLERANCE:
        raise UnsupportedError(
            f"{loader} reads another model from the file than the one written (outputs differ by {worst:.1e} of the "
            "largest). Nothing was kept. Choose another --format."
        )
