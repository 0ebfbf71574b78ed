"""Names of LoRA tensors in the files of others: diffusers (old and new), Hugging Face peft, kohya's scripts.

====================================================================  =====================================
key                                                                   written by
====================================================================  =====================================
``unet.PATH.lora.down.weight``, ``text_encoder.PATH.lora_linear_...``  diffusers, Stable Diffusion
``transformer.PATH.lora_A.weight``                                    diffusers, SD3 and FLUX
``PATH.lora_A.weight``, ``base_model.model.PATH.lora_A.weight``       peft, ``save_lora_adapter``
``unet.BLOCK.attn1.processor.to_q_lora.down.weight``                  diffusers before peft
``lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight``, ``.alpha``      kohya's scripts, block names of diffusers
``lora_unet_input_blocks_4_1_...``                                    the same, block names of the original
====================================================================  =====================================

Modules are looked up by the names of the model at hand, so that nothing depends on lists of layers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

__all__ = ["COMPONENTS", "Found", "component_of", "flat_name", "original_names", "sort_keys"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
What = Literal["down", "up", "magnitude", "alpha"]
_FLAT = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
_SUFFIX = re.compile(
    r"(?:(?P<down>\.lora_A(?:\.[^.]+)?\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight|\.lora_down\.weight)"
    r"|(?P<up>\.lora_B(?:\.[^.]+)?\.weight|(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight|\.lora_up\.weight)"
    r"|(?P<magnitude>\.lora_magnitude_vector(?:\.[^.]+)*|\.dora_scale)"
    r"|(?P<alpha>\.alpha))$"
)
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class Found:
    """Keys of a file, sorted for one model.

    Attributes:
        modules: module path -> what -> key.
        unmatched: keys meant for this component, or for none, that name nothing in the model.
        others: component -> number of keys that are meant for it.
        prefixed: the keys begin with the component's name.
    """

    modules: dict[str, dict[What, str]] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    prefixed: bool = False

    def nearest(self, names: Iterable[str], limit: int = 4) -> str:
        """The unmatched keys with the module that is most like each, closest first."""
        names = list(names)
        rows = []
        for key in self.unmatched[:200]:
            stem = _SUFFIX.sub("", key)
            near = difflib.get_close_matches(stem, names, n=1, cutoff=0.5) if len(names) < 2000 else []
            score = difflib.SequenceMatcher(None, stem, near[0]).ratio() if near else 0.0
            rows.append((-score, key, near))
        shown = [f"{key} (nearest module: {near[0]})" if near else key for _, key, near in sorted(rows)[:limit]]
        more = len(self.unmatched) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def component_of(model: nn.Module) -> str:
    """The name under which pipelines hold a model: "unet", "transformer" or "text_encoder"."""
    name = type(model).__name__
    if name.startswith("UNet"):
        return "unet"
    return "transformer" if type(model).__module__.startswith("diffusers.") else "text_encoder"


def sort_keys(keys: Iterable[str], model: nn.Module, component: str) -> Found:
    """Which key of a file belongs to which module of ``model``, the pipeline's ``component``."""
    paths = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n}
    paths = {n for n in paths if not n.startswith("adapters.")}
    flat = {path.replace(".", "_"): path for path in paths}
    flat |= {name.replace(".", "_"): path for path, name in original_names(model).items() if path in paths}
    found = Found()
    for key in keys:
        match = _SUFFIX.search(key)
        stem = key if match is None else key[: match.start()]
        owners, rest = _owner(stem)
        if any(c in paths for c in _candidates(stem)):  # a child of the model may be called like a component
            owners, rest = (), stem
        elif owners and component not in owners:
            found.others[owners[0]] = found.others.get(owners[0], 0) + 1
            continue
        names = [c for c in _candidates(rest) if c in paths] or [
            flat[c] for c in (rest, rest.removeprefix("text_model_"), f"text_model_{rest}") if c in flat
        ]
        if match is None or not names:
            found.unmatched.append(key)
            continue
        found.prefixed |= bool(owners)
        what: Any = match.lastgroup
        found.modules.setdefault(names[0], {})[what] = key
    return found


def _owner(stem: str) -> tuple[tuple[str, ...], str]:
    """(components that a key may be meant for; none: any) and the rest of the key."""
    for prefix, components in _FLAT.items():
        if stem.startswith(prefix):
            return components, stem.removeprefix(prefix)
    head, _, rest = stem.partition(".")
    return ((head,), rest) if head in COMPONENTS and rest else ((), stem)


def _candidates(name: str) -> Iterator[str]:
    """Spellings of a dotted module path: of peft's wrapper, of transformers before 5, of diffusers' processors."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    yield name
    yield name.removeprefix("text_model.")
    yield f"text_model.{name}"
    if name.endswith(".to_out"):
        yield f"{name}.0"
    head, _, last = name.rpartition(".")
    if last in _OLD_TEXT:
        yield f"{head}.{_OLD_TEXT[last]}"
        yield f"{head}.{_OLD_TEXT[last]}".removeprefix("text_model.")


def flat_name(path: str, component: str, *, several: bool = False) -> str:
    """Kohya's name of a module: ``lora_unet_...``, ``lora_te_...``, with two text encoders ``lora_te1_``/``lora_te2_``.

    Text encoders always have the level ``text_model`` in it, also where transformers has dropped it.
    """
    if component.startswith("text_encoder"):
        number = component.rpartition("_")[2]
        which = number if number.isdigit() else "1" if several else ""
        path = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
        return f"lora_te{which}_{path.replace('.', '_')}"
    return f"lora_unet_{path.replace('.', '_')}"


def original_names(model: nn.Module) -> Mapping[str, str]:
    """Module path -> name in the original Stable Diffusion layout (``input_blocks.4.1...``), for UNets of that kind."""
    down, up = getattr(model, "down_blocks", None), getattr(model, "up_blocks", None)
    if down is None or up is None or not hasattr(model, "conv_in"):
        return {}
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    prefixes: list[tuple[str, str]] = []
    count = 1
    for i, block in enumerate(down):
        for j in range(len(block.resnets)):
            prefixes.append((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{count}.0."))
            prefixes.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{count}.1."))
            count += 1
        if getattr(block, "downsamplers", None) is not None:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    for j, place in enumerate((0, 2)):
        prefixes.append((f"mid_block.resnets.{j}.", f"middle_block.{place}."))
    prefixes.append(("mid_block.attentions.0.", "middle_block.1."))
    count = 0
    for i, block in enumerate(up):
        for j in range(len(block.resnets)):
            prefixes.append((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{count}.0."))
            prefixes.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{count}.1."))
            count += 1
        if getattr(block, "upsamplers", None) is not None:
            place = 2 if hasattr(block, "attentions") else 1
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{place}.conv"
    found: dict[str, str] = {}
    for path, _ in model.named_modules():
        if path in names:
            found[path] = names[path]
        for ours, theirs in prefixes:
            if path.startswith(ours):
                found[path] = theirs + _RESNET.get(path.removeprefix(ours), path.removeprefix(ours))
    return found


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
