"""Weights of others: the layouts in which AST, SSAST, transformers and the studies published theirs.

=============  ====================================================  ============================================
layout         recognised by                                         left out
=============  ====================================================  ============================================
original       ``v.`` (AST, SSAST; ``module.`` goes)                 ``v.head``, ``v.head_dist``, and SSAST's
                                                                     ``p_input_*``, ``mask_embed``, ``cpredlayer``,
                                                                     ``gpredlayer``
transformers   ``layers.{i}.`` (5) or ``encoder.layer.{i}.`` (4,     nothing
               also what 5 writes), with or without
               ``audio_spectrogram_transformer.``
study          transformers 4 below ``model.``, with                 nothing
               ``classification_head``
classifier     ``encoder.layers.{i}.``, ours                         nothing
DeiT           ``blocks.{i}.`` at the top                            ``head``, ``head_dist``
=============  ====================================================  ============================================

Original blocks keep q, k and v in one matrix; its rows are split. DeiT's kernels for red, green and blue are summed, as
AST did to start from it. Positions are fitted to the model's grid (see :mod:`peft_suite.audio.positions`). LayerNorms
get the eps that the weights were trained with: 1e-6 in original blocks and 1e-5 in their head, 1e-12 in transformers'.
Every key that is missing or not used is reported. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from peft_suite.audio.positions import adapt_positions, patch_grid
from peft_suite.errors import BackboneMismatchError, ConfigError, FileFormatError
from peft_suite.weights import mismatch, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Converted", "LoadReport", "convert", "load", "measure", "read", "to_transformers"]

_log = logging.getLogger(__name__)
_CHOOSE = "Choose the backbone (and the options) that the file was made with."
_ONE_TOKEN = "It was trained with a class token alone, and transformers' AST has a distillation token beside it."
_WRAPPERS = ("model", "state_dict")
FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder of transformers, in this order
_POSITIONS = "embeddings.position_embeddings"
_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_HEAD = "classifier."
_STRIDES = (10, 12, 14, 16)  # of the published models, both axes

# Patterns -> names in memory of transformers 5; heads become ``classifier.{layernorm,dense}``.
_ORIGINAL = {
    r"^v\.cls_token$": "embeddings.cls_token",
    r"^v\.dist_token$": "embeddings.distillation_token",
    r"^v\.pos_embed$": _POSITIONS,
    r"^v\.patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^v\.blocks\.(\d+)\.norm1\.": r"layers.\1.layernorm_before.",
    r"^v\.blocks\.(\d+)\.norm2\.": r"layers.\1.layernorm_after.",
    r"^v\.blocks\.(\d+)\.attn\.qkv\.": r"layers.\1.attention.qkv.",
    r"^v\.blocks\.(\d+)\.attn\.proj\.": r"layers.\1.attention.o_proj.",
    r"^v\.blocks\.(\d+)\.mlp\.": r"layers.\1.mlp.",
    r"^v\.norm\.": "layernorm.",
    r"^mlp_head\.0\.": "classifier.layernorm.",
    r"^mlp_head\.1\.": "classifier.dense.",
}
_OLDER = {
    r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.": r"layers.\1.attention.q_proj.",
    r"^encoder\.layer\.(\d+)\.attention\.attention\.key\.": r"layers.\1.attention.k_proj.",
    r"^encoder\.layer\.(\d+)\.attention\.attention\.value\.": r"layers.\1.attention.v_proj.",
    r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"layers.\1.attention.o_proj.",
    r"^encoder\.layer\.(\d+)\.intermediate\.dense\.": r"layers.\1.mlp.fc1.",
    r"^encoder\.layer\.(\d+)\.output\.dense\.": r"layers.\1.mlp.fc2.",
    r"^encoder\.layer\.(\d+)\.": r"layers.\1.",
    r"^classification_head\.": "classifier.dense.",
}
_OURS = {
    r"^encoder\.": "",
    r"^norm\.": "classifier.layernorm.",
    r"^head\.": "classifier.dense.",
}
_LEFT = re.compile(r"^(v\.head\.|v\.head_dist\.|p_input_[ft]dim$|mask_embed$|cpredlayer\.|gpredlayer\.)")


class Converted(NamedTuple):
    """A state dict under transformers 5's names, whose layout it had, and the keys that were left out at once."""

    state: dict[str, Tensor]
    layout: str
    left: tuple[str, ...]
    grid: tuple[int, int] | None = None  # of the positions, where the file tells it


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's keys.

    Attributes:
        layout: whose layout it was.
        missing: keys of the model that the file lacks; they keep their start values.
        unexpected: keys of the file that the model has no use for.
        reshaped: keys of a head with another number of classes, left fresh.
        positions: "as they are", "12 x 101 to 12 x 49", or "zeros".
    """

    layout: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    positions: str


def load(
    model: nn.Module,
    path: str,
    *,
    pos_embed: Literal["interpolate", "zeros"] = "interpolate",
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Load a file, or a folder of transformers, into ASTModel, its classifier, or an AudioClassifier on it.

    Checked before the first tensor is copied. Keys may be missing where the model is fresh by design: the head.

    Args:
        model: what to fill.
        path: file (torch or safetensors) or folder.
        pos_embed: fit the position table to the model's grid, or leave it at zero.
        grid: (rows, columns) of the file's positions, where nothing tells them.

    Raises:
        FileFormatError: no such file, truncated, or it holds no tensors.
        BackboneMismatchError: another width, depth or patch, or keys that a backbone cannot do without.
        ConfigError: ``pos_embed`` has no such value.
    """
    import torch

    if pos_embed not in ("interpolate", "zeros"):
        raise ConfigError(f"pos_embed = {pos_embed!r}: choose 'interpolate' or 'zeros'.")
    encoder, names = _names(model)
    config = settings(path)
    converted = convert(read(path))
    state = dict(converted.state)
    left = list(converted.left)
    own = {ours: model.state_dict()[theirs] for ours, theirs in names.items()}
    if {k for k in state if k.startswith(_HEAD)} != {k for k in own if k.startswith(_HEAD)}:
        left += [k for k in state if k.startswith(_HEAD)]  # half of another head would be of no use
        state = {k: v for k, v in state.items() if not k.startswith(_HEAD)}
    missing = tuple(k for k in own if k not in state)
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape and k != _POSITIONS]
    reshaped = tuple(k for k in shapes if k.startswith(_HEAD))
    if reshaped:
        state = {k: v for k, v in state.items() if not k.startswith(_HEAD)}
        missing = (*missing, *(k for k in own if k.startswith(_HEAD)))
    roots = {k.partition(".")[0] for k in own}
    lost = [k for k in missing if not k.startswith(_HEAD)]
    foreign = [k for k in unexpected if k.partition(".")[0] in roots]
    wrong = [k for k in shapes if k not in reshaped]
    if lost or foreign or wrong:
        other = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in wrong]
        alone = "embeddings.distillation_token" in lost and "embeddings.cls_token" in state
        advice = _ONE_TOKEN if alone else f"Its layout is that of {converted.layout}. {_CHOOSE}"
        sizes, name = (measure(converted.state), measure(own)), type(model).__name__
        raise BackboneMismatchError(
            mismatch(path, name, *sizes, lost=lost, foreign=foreign, shapes=other, advice=advice)
        )
    told = "zeros"
    if pos_embed == "zeros":
        state[_POSITIONS] = torch.zeros_like(own[_POSITIONS])
    else:
        source = grid or config.get("grid") or converted.grid
        state[_POSITIONS], told = _fitted(state[_POSITIONS], source, encoder, path, converted.layout)
    fits = {names[k]: v for k, v in state.items() if k in own}
    model.load_state_dict(fits, strict=False)
    _set_eps(model, encoder, converted.layout, config.get("eps"))
    report = LoadReport(converted.layout, missing, (*left, *unexpected), reshaped, told)
    _log.info(
        "%s: layout of %s; missing %s; not used %s; other number of classes %s; positions %s",
        path,
        report.layout,
        list(report.missing),
        list(report.unexpected),
        list(report.reshaped),
        report.positions,
    )
    return report


def read(path: str) -> dict[str, Tensor]:
    """The state dict of a file, or of the weights file in a folder of transformers.

    Raises:
        FileFormatError: missing, truncated, or without tensors.
    """
    folder = Path(path)
    if folder.is_dir():
        found = [name for name in FILES if (folder / name).is_file()]
        if not found:
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
            raise FileFormatError(f"checkpoint = {path!r} is a folder without {' or '.join(FILES)}; found: {inside}.")
        path = str(folder / found[0])
    return read_weights(path, _WRAPPERS)


def settings(path: str) -> dict[str, Any]:
    """What ``config.json`` beside the weights says: ``grid`` of the positions, ``eps``, and ``sizes`` of ASTConfig.

    Raises:
        FileFormatError: it is no configuration of an AST.
    """
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
    if not file.is_file() or (Path(path).is_file() and Path(path).name not in FILES):
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("model_type", "")
    except (ValueError, AttributeError, OSError) as error:
        raise FileFormatError(f"{str(file)!r} is no configuration of transformers: {error}.") from error
    if kind != "audio-spectrogram-transformer":
        raise FileFormatError(f"{str(file)!r} describes a model of type {kind!r}, not 'audio-spectrogram-transformer'.")
    patch, strides = found.get("patch_size", 16), (found.get("frequency_stride", 10), found.get("time_stride", 10))
    grid = patch_grid(found.get("num_mel_bins", 128), found.get("max_length", 1024), (patch, patch), strides)
    keys = (
        *SIZES,
        "num_attention_heads",
        "num_mel_bins",
        "max_length",
        "frequency_stride",
        "time_stride",
        "hidden_act",
    )
    sizes = {k: found[k] for k in (*keys, "layer_norm_eps", "qkv_bias") if k in found}
    return {"grid": grid, "eps": found.get("layer_norm_eps", 1e-12), "sizes": sizes}


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The state dict under the names that transformers 5 has in memory. Keys without a pattern keep theirs."""
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    layout, prefix, table = _layout(plain)
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for key, value in plain.items():
        name = key.removeprefix(prefix)
        if layout == "DeiT":
            name = f"v.{name}"
        if _LEFT.search(name):
            left.append(key)
            continue
        for pattern, replacement in table.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        if ".attention.qkv." in name:
            for role, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("attention.qkv", f"attention.{role}_proj")] = rows.clone()
        else:
            found[name] = value
    if _PROJECTION in found and layout == "DeiT":
        found[_PROJECTION] = found[_PROJECTION].sum(dim=1, keepdim=True)
    return Converted(found, layout, tuple(left), _told_grid(plain, found))


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any layout as the files of ``ASTForAudioClassification`` have it in memory of transformers 5."""
    return {
        key if key.startswith(_HEAD) else f"audio_spectrogram_transformer.{key}": value
        for key, value in convert(state).state.items()
    }


def _layout(keys: Iterable[str]) -> tuple[str, str, Mapping[str, str]]:
    """(name, prefix, renames)."""
    keys = list(keys)

    def some(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in keys)

    if some(r"v\."):
        return "AST or SSAST", "", _ORIGINAL
    if some(r"blocks\.\d+\.attn\.qkv\."):
        return "DeiT", "", _ORIGINAL
    if some(r"audio_spectrogram_transformer\."):
        return "transformers", "audio_spectrogram_transformer.", _OLDER
    if some(r"model\.encoder\.layer\.") or some(r"model\.embeddings\."):
        return "the study of parameter-efficient methods", "model.", _OLDER
    if some(r"encoder\.layer\."):
        return "transformers", "", _OLDER
    if some(r"encoder\.layers\."):
        return "AudioClassifier", "", _OURS
    return "transformers", "", {}


def _told_grid(plain: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """SSAST writes the size of its input; DeiT's patches lie in a square."""
    if "p_input_fdim" in plain and "p_input_tdim" in plain and _PROJECTION in found:
        patch: Any = tuple(found[_PROJECTION].shape[2:])
        return patch_grid(int(plain["p_input_fdim"]), int(plain["p_input_tdim"]), patch, patch)  # no overlap
    if "pos_embed" in plain:
        side = int((plain["pos_embed"].shape[1] - 2) ** 0.5)
        return (side, side) if side * side + 2 == plain["pos_embed"].shape[1] else None
    return None


def _names(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """(the encoder, canonical name -> key of the model)."""
    base = next((b for b in ("encoder", "audio_spectrogram_transformer") if hasattr(model, b)), "")
    encoder: nn.Module = model.get_submodule(base)
    if not hasattr(encoder, "layers") or not hasattr(getattr(encoder, "embeddings", None), "distillation_token"):
        raise BackboneMismatchError(f"{type(model).__name__} holds no ASTModel; files of other models do not fit it.")
    names: dict[str, str] = {}
    for key in model.state_dict():
        if key.startswith("adapters."):
            continue
        inner = key.removeprefix(f"{base}.") if base else key
        if inner == key and base:
            inner = re.sub(r"^head\.", "classifier.dense.", re.sub(r"^norm\.", "classifier.layernorm.", key))
        names[inner] = key
    return encoder, names


def _fitted(table: Tensor, source: tuple[int, int] | None, encoder: Any, path: str, layout: str) -> tuple[Tensor, str]:
    """The position table on the encoder's grid, and what was done."""
    projection, config = encoder.embeddings.patch_embeddings.projection, encoder.config
    bins, patch = int(config.num_mel_bins), projection.kernel_size
    target = patch_grid(bins, int(config.max_length), patch, projection.stride)
    count = table.shape[1] - 2
    if source is None and count == target[0] * target[1]:
        return table, "as they are"
    if source is None:
        rows = [target[0], *(patch_grid(bins, patch[1], patch, (s, s))[0] for s in _STRIDES)]
        fits = [r for r in dict.fromkeys(rows) if r and count % r == 0]
        if not fits or (fits[0] != target[0] and len(fits) > 1):
            raise BackboneMismatchError(
                f"checkpoint = {path!r} has positions of {count} patches, which may lie on "
                f"{' or '.join(map(str, fits)) or 'none of the known numbers of'} rows. Say how with "
                "position_grid=[rows, columns], or use pos_embed='zeros'."
            )
        source = (fits[0], count // fits[0])
    if source == target and count == target[0] * target[1]:
        return table, "as they are"
    told = f"{source[0]} x {source[1]} to {target[0]} x {target[1]}"
    if source[0] != target[0] and layout != "DeiT":  # the clip's length changes columns alone
        told += "; other rows mean other strides or mel bins than the weights were trained with"
    return adapt_positions(table, source, target), told


def _set_eps(model: nn.Module, encoder: Any, layout: str, eps: float | None) -> None:
    """The eps that the weights were trained with; the head's own 1e-5 in the original."""
    from torch import nn

    original = layout in ("AST or SSAST", "DeiT")
    eps = 1e-6 if original else eps
    if eps is None:
        return
    encoder.config.layer_norm_eps = eps
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    for head in (getattr(getattr(model, "classifier", None), "layernorm", None), getattr(model, "norm", None)):
        if isinstance(head, nn.LayerNorm):
            head.eps = 1e-5 if original else eps


SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size")


def measure(state: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that a converted state dict tells, under the names of ASTConfig, and ``num_classes``."""
    sizes: dict[str, Any] = {}
    if indices := [int(m.group(1)) for k in state if (m := re.match(r"layers\.(\d+)\.", k))]:
        sizes["num_hidden_layers"] = 1 + max(indices)
    for key, name, axis in (
        ("embeddings.cls_token", "hidden_size", 2),
        ("layers.0.mlp.fc1.weight", "intermediate_size", 0),
        ("classifier.dense.weight", "num_classes", 0),
    ):
        if key in state:
            sizes[name] = int(state[key].shape[axis])
    if _PROJECTION in state:
        rows, columns = (int(n) for n in state[_PROJECTION].shape[2:])
        sizes["patch_size"] = rows if rows == columns else (rows, columns)
    return sizes
