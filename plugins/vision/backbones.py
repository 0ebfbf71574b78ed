"""The vision plugin's backbones: the embedded micro ViT and timm's vision transformers."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from peft_suite.errors import (
    BackboneMismatchError,
    ConfigError,
    PeftSuiteError,
    UnknownNameError,
    UnsupportedError,
)
from peft_suite.train.contracts import BackboneInfo
from peft_suite.vision import micro
from peft_suite.weights import no_waiting_for_the_hub as _no_waiting_for_the_hub
from peft_suite.weights import read_weights

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn

__all__ = ["TimmBackbones", "backbones"]

MODULES: Mapping[str, str] = {  # timm module -> anatomy family, which describes every model of the module
    "vision_transformer": "timm-vit",
    "deit": "timm-vit",
    "vision_transformer_hybrid": "timm-vit",
    "swin_transformer": "timm-swin",
    "swin_transformer_v2": "timm-swin",
    "convnext": "timm-convnext",
    "mlp_mixer": "timm-mixer",
    "resnet": "timm-resnet",
}
_log = logging.getLogger(__name__)


class TimmBackbones:
    """See :class:`peft_suite.train.Backbones`."""

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """The micro ViT and timm's models by glob; a pattern with a dot lists weights: ``vit_base*.*in21k``."""
        import timm

        found = []
        if fnmatch.fnmatchcase(micro.NAME, pattern):
            found.append(
                BackboneInfo(micro.NAME, "timm-vit", "embedded: digits, 3x32x32, patch 8, works offline", 214_218)
            )
        for module, family in MODULES.items():
            for name in timm.list_models(module=module):
                tags = _tags(name)
                if "." in pattern:
                    tagged = (f"{name}.{tag}" for tag in tags)
                    found += [BackboneInfo(n, family, _summary(n)) for n in tagged if fnmatch.fnmatchcase(n, pattern)]
                elif fnmatch.fnmatchcase(name, pattern):
                    weights = f"weights: {', '.join(tags)}" if tags else "no published weights"
                    found.append(BackboneInfo(name, family, f"{_summary(name)}; {weights}"))
        return found

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> nn.Module:
        """A backbone with a fresh head; see :meth:`peft_suite.train.Backbones.build`.

        Raises:
            UnknownNameError: no backbone of that name, or no such weights.
            UnsupportedError: ``pretrained`` for a model without published weights.
            PeftSuiteError: the published weights cannot be fetched.
            FileFormatError: ``checkpoint`` is missing, truncated or no weights file.
            BackboneMismatchError: ``checkpoint`` belongs to another model; every key that differs is listed.
            ConfigError: the model does not know an option.
        """
        _check_name(name)
        state = _read_state(checkpoint) if checkpoint else None
        published = pretrained and not checkpoint
        try:
            if name == micro.NAME:
                model: nn.Module = micro.build(num_outputs, pretrained=published, **options)
            else:
                model = _create(name, num_outputs, published, options)
        except TypeError as error:
            raise ConfigError(
                f"Backbone {name!r} cannot be built with the options {dict(options)}: {error}."
            ) from error
        if state is not None:
            _load_state(model, state, checkpoint)
        return model

    def preprocessing(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Size, normalisation and interpolation that the weights were trained with."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        size = [int(n) for n in config["input_size"]]
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)  # differs after options img_size=...
        if built is not None:
            size[1:] = [int(n) for n in built]
        return {
            "input_size": size,
            "mean": [float(v) for v in config["mean"]],
            "std": [float(v) for v in config["std"]],
            "interpolation": str(config["interpolation"]),
            "crop_pct": float(config["crop_pct"]),
        }


backbones = TimmBackbones()


def _tags(name: str) -> Sequence[str]:
    """Tags of the published weights of an architecture, timm's default first."""
    from timm.models import get_arch_pretrained_cfgs

    configs = get_arch_pretrained_cfgs(name)
    return [tagged.partition(".")[2] for tagged, config in configs.items() if config.has_weights and "." in tagged]


def _summary(name: str) -> str:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name, allow_unregistered=True)
    return "x".join(map(str, config.input_size)) if config is not None else ""


def _check_name(name: str) -> None:
    import timm
    from timm.models import is_model_in_modules

    architecture, _, tag = name.partition(".")
    if name == micro.NAME:
        return
    advice = "List them with: peft-suite vision backbones"
    if not timm.is_model(architecture) or not is_model_in_modules(architecture, list(MODULES)):
        known = [micro.NAME, *(n for module in MODULES for n in timm.list_models(module=module))]
        if timm.is_model(architecture):
            advice = f"timm has {architecture!r}, but no anatomy of this plugin describes it yet. {advice}"
        raise UnknownNameError("backbone", name, known, advice)
    if tag and tag not in (tags := _tags(architecture)):
        raise UnknownNameError("weights", name, [architecture, *(f"{architecture}.{t}" for t in tags)], advice)


def _create(name: str, num_outputs: int, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    import timm

    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=num_outputs, **options)
    if not _tags(name.partition(".")[0]):
        raise UnsupportedError(
            f"Backbone {name!r} has no published weights. Give checkpoint=PATH, or pretrained=False for random weights."
        )
    try:
        with _no_waiting_for_the_hub():
            return timm.create_model(name, pretrained=True, num_classes=num_outputs, **options)
    except (OSError, ConnectionError) as error:  # every hub and URL error derives from one of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeftSuiteError(
            f"The published weights of {name!r} are not in the local cache and cannot be fetched: {reason} "
            "Give checkpoint=PATH of a downloaded safetensors file, pretrained=False for random weights, or the "
            f"backbone {micro.NAME!r}, which needs no network."
        ) from error


def _read_state(path: str) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file, out of the usual wrappers; nothing in the file is executed."""
    state = read_weights(path, ("state_dict_ema", "model_ema", "state_dict", "model"))
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load_state(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load everything but a head that does not fit. Checked before the first tensor is copied."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = model.state_dict()
    heads = _head_names(model)
    lost, extra, shapes = _difference(own, state, heads)
    if lost or extra or shapes:  # original DeiT, DINOv2, MAE, ... layouts and position embeddings of another size
        try:
            converted = checkpoint_filter_fn(dict(state), cast("VisionTransformer", model))
        except (KeyError, RuntimeError, AssertionError, AttributeError):
            converted = state
        if not any(_difference(own, converted, heads)):
            state, lost, extra, shapes = converted, [], [], []
    if lost or extra or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys)}"
            for what, keys in (
                ("keys missing in the file", lost),
                ("keys unknown to the model", extra),
                ("other shapes", shapes),
            )
            if keys
        ]
        raise BackboneMismatchError(
            f"checkpoint = {path!r} does not fit {type(model).__name__}. {'; '.join(parts)}. Choose the backbone "
            "(and the options) that the file was made with."
        )
    usable = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    fresh = sorted(set(own) - set(usable))
    if fresh or len(usable) < len(state):
        _log.info("%s: not taken %s, fresh %s", path, sorted(set(state) - set(usable)), fresh)
    model.load_state_dict(usable, strict=False)


def _difference(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], heads: tuple[str, ...]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    def body(keys: Iterable[str]) -> set[str]:
        return {key for key in keys if not key.startswith(heads)}

    mine, given = body(own), body(state)
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(mine & given)
        if state[key].shape != own[key].shape
    ]
    return sorted(mine - given), sorted(given - mine), shapes


def _head_names(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
