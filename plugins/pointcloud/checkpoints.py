"""Weights of others: the layouts in which Point-MAE, Point-BERT, ACT, ReCon and PointGPT published theirs.

A file is a dictionary ``{"base_model": state dict, "optimizer": ..., ...}``; fully fine-tuned ones may use "model".
Every "module." goes, the prefix of the layout goes, what belongs to the pre-training task is left out, and every key
that is missing or not used is reported. Nothing in a file is executed.

============  ====================  ===========================================================================
layout        prefix                left out
============  ====================  ===========================================================================
Point-MAE     ``MAE_encoder.``      ``mask_token``, ``decoder_pos_embed``, ``MAE_decoder``, ``increase_dim``
Point-BERT    ``transformer_q.``    everything without the prefix, and ``cls_head``, ``lm_head``, ``mask_token``
ACT           ``ACT_encoder.``      the decoder and what else the teacher needs, ``lm_head``, ``cls_head``
ReCon         ``MAE_encoder.``      as Point-MAE, and projections and encoders of image and text
PointGPT      ``GPT_Transformer.``  ``generator_blocks``, ``increase_dim``, ``norm``, heads
fine-tuned    ``base_model.``       nothing; also files that this package wrote
============  ====================  ===========================================================================

PointGPT's attention is one module with bare parameters in the official code; here they are layers that methods can act
on, so ``attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.*`` become ``attn.qkv.weight, attn.qkv.bias,
attn.proj.*``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_suite.anatomy import anatomy_of
from peft_suite.errors import BackboneMismatchError
from peft_suite.weights import mismatch, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LoadReport", "convert", "load", "measure", "read"]

_log = logging.getLogger(__name__)
_PREFIXES = {
    "GPT_Transformer.": "PointGPT",
    "transformer_q.": "Point-BERT",
    "ACT_encoder.": "ACT",
    "MAE_encoder.": "Point-MAE or ReCon",
    "base_model.": "fine-tuned",
}
# Belongs to pre-training, to other modalities, or to ReCon's own blocks where plain ones are filled.
_LEFT = re.compile(
    r"^(mask_token|decoder_|MAE_decoder\.|ACT_decoder\.|increase_dim\.|blocks\.increase_dim\.|generator_blocks\.|lm_head\."
    r"|cls_head\.|cls_proj\.|img_|text_)|_contrast\."
)
_HEAD = "cls_head_finetune."
_WRAPPERS = ("base_model", "model", "state_dict")


class Converted(NamedTuple):
    """A state dict under this package's names, whose layout it had, and the keys that were left out at once."""

    state: dict[str, Tensor]
    layout: str
    left: tuple[str, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's keys, under the model's names.

    Attributes:
        layout: whose layout it was.
        missing: keys of the model that the file lacks; they keep their start values.
        unexpected: keys of the file that the model has no use for.
        reshaped: keys of a head with another number of classes, left fresh.
    """

    layout: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]


def load(model: nn.Module, path: str) -> LoadReport:
    """Load a file into a model of this package. Checked before the first tensor is copied.

    Keys may be missing where the model is fresh by design (head, and tokens that the pre-training did not have).

    Raises:
        FileFormatError: no such file, truncated, or it holds no tensors.
        BackboneMismatchError: another width or depth, or keys that a backbone cannot do without.
    """
    state, layout, left = convert(read(path))
    own = model.state_dict()
    if not _same_layers(state, own):  # half of another head would be of no use
        left += tuple(k for k in state if _HEAD in k)
        state = {k: v for k, v in state.items() if _HEAD not in k}
    fresh = set(anatomy_of(model).fresh)
    heads = {n.rpartition(".")[0] for n in fresh if "." in n}  # buffers of a fresh layer are fresh too
    lacking = [k for k in own if k not in state]
    missing = tuple(k for k in lacking if not k.endswith("num_batches_tracked"))
    unexpected = tuple(k for k in state if k not in own)
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    reshaped = tuple(k for k in shapes if k in fresh or k.rpartition(".")[0] in heads)
    lost = [k for k in missing if k not in fresh and k.rpartition(".")[0] not in heads]
    foreign = [k for k in unexpected if not _LEFT.search(k) and k.partition(".")[0] in _roots(own)]
    wrong = [k for k in shapes if k not in reshaped]
    if lost or foreign or wrong:
        told = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in wrong]
        sizes = measure(state), measure(own)
        raise BackboneMismatchError(
            mismatch(path, type(model).__name__, *sizes, lost=lost, foreign=foreign, shapes=told)
        )
    usable = {k: v for k, v in state.items() if k in own and k not in reshaped}
    if not usable:
        raise BackboneMismatchError(f"checkpoint = {path!r} shares no key with {type(model).__name__}.")
    model.load_state_dict(usable, strict=False)
    report = LoadReport(layout, missing, (*left, *unexpected), reshaped)
    _log.info(
        "%s: layout of %s; missing %s; not used %s; other number of classes %s",
        path,
        layout,
        list(report.missing),
        list(report.unexpected),
        list(report.reshaped),
    )
    return report


def read(path: str) -> dict[str, Tensor]:
    """The state dict of a torch or safetensors file, out of its wrapper.

    Raises:
        FileFormatError: missing, a folder, truncated, or without tensors.
    """
    return read_weights(path, _WRAPPERS)


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The state dict under this package's names. Keys without the layout's prefix keep theirs."""
    plain = {key.replace("module.", ""): value for key, value in state.items()}
    layout, prefix = "fine-tuned or plain", ""
    for candidate, name in _PREFIXES.items():
        if any(key.startswith(candidate) for key in plain):
            layout, prefix = name, candidate
            break
    found: dict[str, Tensor] = {}
    left: list[str] = []
    for key, value in plain.items():
        name = key.removeprefix(prefix)
        if (
            # Point-BERT: the momentum branch, the tokenizer and the queue are other networks
            (layout == "Point-BERT" and (name == key or name.startswith("cls_head")))
            or (layout == "PointGPT" and _HEAD in key)
            or (name == key and f"{prefix}{key}" in plain and bool(prefix))
        ):
            left.append(key)
        else:
            found[_attention(name)] = value
    return Converted(found, layout, tuple(left))


def _attention(key: str) -> str:
    """PointGPT's bare attention parameters as layers."""
    key = re.sub(r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1", key)
    return re.sub(r"\.attn\.out_proj\.", ".attn.proj.", key)


def measure(state: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that a state dict tells: options of a backbone, as far as its keys are known."""
    sizes: dict[str, Any] = {}
    indices = [m for m in (re.match(r"blocks\.(?:blocks|layers)\.(\d+)\.", k) for k in state) if m]
    if indices:
        sizes["depth"] = 1 + max(int(m.group(1)) for m in indices)
    for key, name, axis in (
        ("blocks.blocks.0.norm1.weight", "embed_dim", 0),
        ("blocks.layers.0.ln_1.weight", "embed_dim", 0),
        ("encoder.second_conv.3.weight", "encoder_dim", 0),
        ("encoder.first_conv.0.weight", "channels", 1),
    ):
        if key in state:
            sizes[name] = int(state[key].shape[axis])
    heads = {int(m.group(1)): k for k in state if (m := re.search(r"cls_head_finetune\.(\d+)\.weight$", k))}
    if heads:
        sizes["num_classes"] = int(state[heads[max(heads)]].shape[0])
    return sizes


def _same_layers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether the heads of both have the same layers."""
    theirs, mine = ({k for k in keys if _HEAD in k and not k.endswith("num_batches_tracked")} for keys in (state, own))
    return theirs == mine


def _roots(keys: Iterable[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}
