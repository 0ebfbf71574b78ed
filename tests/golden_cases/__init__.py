"""How each golden's configuration and key names translate, built from its JSON alone: one module a family of methods.

A module defines ``CASES``: golden name -> function that makes a :class:`Case`, an adapter on a backbone; or ``CHECKS``:
golden name -> function that compares by itself (operators, optimizers, allocations).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor, nn

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where (part of) a reference tensor lives in our adapter: ``ours[index] == reference[theirs]``."""

    name: str
    ours: Any = ...
    theirs: Any = ...


@dataclass
class Case:
    """A frozen backbone with the reference's weights, the method that the golden describes, and the key mapping."""

    backbone: nn.Module
    method: dict[str, Any]
    places: dict[str, list[Place]]
    mergeable: bool = False
    taps: dict[str, str] = field(default_factory=dict)  # "inter" name -> key of our part
    tapped: Callable[[Tensor, Tensor], Tensor] = lambda given, made: made  # our part's output as the reference taps it
    more: Callable[[nn.Module], None] | None = None  # further comparisons with the adapted model


class NotCoveredError(Exception):
    """The golden asks for something that is not built yet; the message is the reason."""


def vit(config: Config, state: Tensors) -> nn.Module:
    """A timm ViT of the golden's size with the frozen weights loaded strictly."""
    model = timm.create_model(
        "vit_base_patch16_224",
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        global_pool=config.get("pool", "token"),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )
    eps = config.get("layer_norm_eps", config.get("layer_norm_eps_backbone", 1e-6))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    wanted = model.state_dict()
    model.load_state_dict({k: state[k] for k in wanted if k in state}, strict=True)
    return model.eval()


def head() -> dict[str, list[Place]]:
    return {f"head.{n}": [Place(f"head.trained.{n}")] for n in ("weight", "bias")}


def blocks(config: Config) -> range:
    return range(config["depth"])


def group(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _family(name: str) -> str:
    """A trailing ``-a``, ``-b``, ... numbers the configurations of one golden."""
    return re.sub(r"-[a-z0-9]$", "", name)


def _tables(attribute: str) -> dict[str, Any]:
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {name: function for module in modules for name, function in getattr(module, attribute, {}).items()}


def check_of(name: str) -> Callable[[Config, Tensors], None] | None:
    """The comparison of a golden that is no adapter on a backbone."""
    return _tables("CHECKS").get(_family(name))


def case_of(name: str, config: Config, tensors: Tensors) -> Case:
    """The case behind a golden's name.

    Raises:
        NotCoveredError: the golden's method is not built yet.
    """
    cases = _tables("CASES")
    if _family(name) not in cases:
        raise NotCoveredError(f"no method for {_family(name)!r} yet")
    case: Case = cases[_family(name)](config, tensors)
    return case
