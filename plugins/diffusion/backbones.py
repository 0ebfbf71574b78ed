"""The diffusion plugin's backbones: the embedded micro UNet, and one component of any diffusers pipeline on disk."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.diffusion import micro
from peft_suite.errors import ConfigError, FileFormatError, UnsupportedError, closest
from peft_suite.train.contracts import BackboneInfo

if TYPE_CHECKING:
    from torch import nn

    from peft_suite.train.opening import Opened

__all__ = ["EMBEDDED", "PIPELINE", "DiffusionBackbones", "backbones"]

PIPELINE = "pipeline"
EMBEDDED = (micro.NAME,)
OPTIONS = ("component", "gradient_checkpointing", "dtype", "config", "null")
DTYPES = ("float32", "bfloat16", "float16")


class DiffusionBackbones:
    """See :class:`peft_suite.train.Backbones`."""

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """Backbones by glob."""
        known = (
            BackboneInfo(
                micro.NAME,
                "diffusers-unet",
                "embedded: class-conditional UNet of 8x8 digits, trained on scikit-learn's; weights inside the package",
                177_553,
            ),
            BackboneInfo(
                PIPELINE,
                "diffusers",
                "any diffusers pipeline: --backbone FOLDER, or a single file (.safetensors, .ckpt); "
                "backbone.options.component=unet|transformer|text_encoder",
            ),
        )
        return [info for info in known if fnmatch.fnmatchcase(info.name, pattern)]

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> nn.Module:
        """One component; see :meth:`peft_suite.train.Backbones.build`. ``num_outputs`` changes nothing.

        Args:
            name: ``micro-unet``, or a pipeline: its folder, its single file, or a downloaded name on the hub.
            checkpoint: for ``micro-unet`` a safetensors file of a UNet with its keys; else a single file with the
                component's weights, the rest being the folder ``name``; or the pipeline, where ``name`` is "pipeline"
                or has moved.
            options: ``component`` ("unet", "transformer", "text_encoder"; by default what denoises), ``dtype`` of the
                frozen weights, ``gradient_checkpointing``, ``config`` (folder with the configuration of a single file),
                ``null`` (class label that means no class; -1 for none). Of ``micro-unet`` also UNet2DModel's fields.

        Raises:
            ConfigError: no such path or option.
            FileFormatError: files that are missing, damaged or something else.
        """
        options = dict(options)
        checkpointing = bool(options.pop("gradient_checkpointing", False))
        if name == micro.NAME:
            fields = {k: v for k, v in options.items() if k not in OPTIONS}
            model: Any = micro.build(pretrained=pretrained and not checkpoint, **fields)
            if checkpoint:
                _fill(model, checkpoint)
            if dtype := _dtype(options.get("dtype")):
                model.to(dtype)
            model.suite_facts = {**micro.preprocessing(), "size": model.config.sample_size}
        else:
            model = _open(name, pretrained, checkpoint, options)
        if checkpointing:
            _checkpoint(model)
        built: nn.Module = model.eval()
        return built

    def preprocessing(self, name: str, model: Any) -> dict[str, Any]:
        """What data and sampling need: where the pipeline is, which component trains, kind, sizes, scheduler.

        ``size`` and ``channels`` are those of images; ``latent_channels`` and ``factor`` (pixels per latent) of what
        the denoiser sees; ``null`` is the class that means none, or None.
        """
        facts: dict[str, Any] = {"model": type(model).__name__, "factor": 1, **model.suite_facts}
        facts.setdefault("latent_channels", facts["channels"])
        return facts

    def prepare(self, model: Any, method: Any) -> Any:
        """What a method needs of the backbone before it is adapted: textual inversion's tokens.

        Returns:
            The method with what was found out, here the tokens' ids.

        Raises:
            ConfigError: the initializer is no token, or the placeholder is one.
        """
        from peft_suite.method import make_method

        config: Any = make_method(method).config
        tokenizer = getattr(model, "suite_tokenizer", None)
        if config.method != "textual-inversion" or tokenizer is None:
            return method
        from peft_suite.diffusion.inversion import prepare_tokens

        ready = prepare_tokens(tokenizer, model, config.placeholder, config.initializer, config.num_vectors)
        model.suite_facts |= {"placeholder": ready.placeholder, "num_vectors": ready.num_vectors}
        return ready

    def write_merged(self, opened: Opened, out: Path) -> Sequence[Path]:
        """A plain pipeline folder: ``DiffusionPipeline.from_pretrained(out)`` reads it.

        ``peft_suite.json`` in it lets this package open it again.

        Raises:
            StorageError: the folder holds something else, or cannot be written.
            MergeError: the model has tensors that its configuration has no place for.
        """
        import tempfile

        from peft_suite.diffusion.writing import facts_of, write_pipeline
        from peft_suite.errors import StorageError
        from peft_suite.storage import write_json
        from peft_suite.train.opening import MERGED

        if out.exists() and any(out.iterdir()) and not (out / "model_index.json").is_file():
            raise StorageError(f"{out} is not empty and no pipeline. Choose another folder; nothing was changed.")
        keys = ("plugin", "backbone", "classes", "multi_label", "preprocessing", "data_config", "task")
        metadata = {k: opened.metadata[k] for k in keys if k in opened.metadata}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
                folder = Path(temporary) / "pipeline"
                write_pipeline(opened.model, facts_of(opened), folder)
                write_json(folder / MERGED, metadata)
                for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                    place = out / file.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(place)
        except OSError as error:
            raise StorageError(f"{out} cannot be written: {error}. Free space or choose another folder.") from error
        return sorted(p for p in out.rglob("*") if p.is_file())


backbones = DiffusionBackbones()


def _open(name: str, pretrained: bool, checkpoint: str, options: dict[str, Any]) -> Any:
    from peft_suite.diffusion import pipelines

    if odd := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(f"backbone.options has no {odd[0]!r}. {closest(odd[0], OPTIONS)}")
    if not checkpoint and name in ("", PIPELINE):
        raise ConfigError("Which pipeline? Give its folder: --backbone FOLDER, or --checkpoint FOLDER.")
    weights = checkpoint if Path(checkpoint).is_file() and Path(name).is_dir() else ""
    path = pipelines.locate(name if weights else checkpoint or name)
    dtype = _dtype(options.get("dtype"))
    config = str(options.get("config") or "")
    folder = path  # where the configurations are
    if pipelines.is_single_file(path):
        folder = pipelines.single_config(path, config).resolve()
        config = str(folder)
    index = pipelines.index_of(folder)
    component = pipelines.pick_component(index, str(options.get("component") or ""), folder)
    if "vqvae" in index:
        raise UnsupportedError(f"{path} has discrete latents (vqvae), which are not trained here. Use one with a vae.")
    model, scheduler = pipelines.load_component(
        path, component, pretrained=pretrained or bool(checkpoint), dtype=dtype, config=config, weights=weights
    )
    if component == "text_encoder":
        model.suite_tokenizer = pipelines.load_tokenizer(folder)
    model.suite_facts = {
        "pipeline": str(path.resolve()),
        "config": config,
        "component": component,
        "scheduler": {k: v for k, v in dict(scheduler).items() if k != "_diffusers_version"},
        **_facts(model, folder, component, options.get("null")),
    }
    return model


def _facts(model: Any, path: Path, component: str, null: int | None) -> dict[str, Any]:
    """Sizes and kind of the pipeline's denoiser, from configs alone."""
    import json

    from peft_suite.diffusion import pipelines

    if component.startswith("text_encoder"):
        denoiser = pipelines.pick_component(pipelines.index_of(path), "", path)
        config = json.loads((path / denoiser / "config.json").read_text("utf-8"))
        kind = str(config["_class_name"])
    else:
        config, kind = dict(model.config), type(model).__name__
        denoiser = component
    return {"denoiser": denoiser, "model": kind, **_sizes(config, kind, path, null)}


def _sizes(config: Mapping[str, Any], kind: str, path: Path, null: int | None) -> dict[str, Any]:
    autoencoder = _autoencoder(path)
    factor = 2 ** (len(autoencoder.get("block_out_channels") or [0]) - 1)
    latent = int(config.get("in_channels") or 0) // (4 if kind == "FluxTransformer2DModel" else 1)
    if autoencoder and latent != int(autoencoder.get("latent_channels") or latent):
        raise UnsupportedError(
            f"This {kind} reads {latent} channels and the VAE makes {autoencoder['latent_channels']}: models that get "
            "more than the noisy latents (inpainting, depth, editing) are not trained here."
        )
    side = config.get("sample_size") or 1024 // factor
    if not isinstance(side, int):
        side = min(side)
    facts: dict[str, Any] = {
        "size": side * factor,
        "channels": int(autoencoder.get("in_channels") or latent),
        "latent_channels": latent,
        "factor": factor,
        "classes": 0,
        "null": None,
        "guidance_embeds": bool(config.get("guidance_embeds")),
        "widths": {k: config[k] for k in ("joint_attention_dim", "cross_attention_dim") if config.get(k)},
    }
    if kind == "DiTTransformer2DModel":
        count = int(config.get("num_embeds_ada_norm") or 0)
        return {**facts, "kind": "class", "classes": count, "null": count}
    if kind == "UNet2DModel":
        rows = int(config.get("num_class_embeds") or 0)
        if not rows:
            return {**facts, "kind": "unconditional"}
        if null is not None and null < 0:
            return {**facts, "kind": "class", "classes": rows}
        return {**facts, "kind": "class", "classes": rows - 1, "null": rows - 1 if null is None else null}
    return {**facts, "kind": "text"}


def _autoencoder(path: Path) -> Mapping[str, Any]:
    """Config of the VAE; {} for models that work on pixels."""
    import json

    file = path / "vae" / "config.json"
    config: Mapping[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return config


def _dtype(name: Any) -> Any:
    if not name:
        return None
    if str(name) not in DTYPES:
        raise ConfigError(f"backbone.options.dtype = {name!r}. {closest(str(name), DTYPES)}")
    import torch

    return getattr(torch, str(name))


def _checkpoint(model: Any) -> None:
    """Non-reentrant, so that adapters keep their gradients."""
    import functools

    from torch.utils.checkpoint import checkpoint

    if hasattr(model, "gradient_checkpointing_enable"):  # transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    else:
        raise UnsupportedError(f"{type(model).__name__} has no gradient checkpointing. Leave the option out.")


def _fill(model: nn.Module, checkpoint: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from peft_suite.errors import BackboneMismatchError

    try:
        state = load_file(checkpoint)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{checkpoint} is no safetensors file of {micro.NAME}: {error}.") from error
    own = model.state_dict()
    wrong = sorted(k for k in {*state, *own} if k not in state or k not in own or state[k].shape != own[k].shape)
    if wrong:
        raise BackboneMismatchError(f"{checkpoint} belongs to another model: {', '.join(wrong[:6])} differ.")
    model.load_state_dict({k: v.float() for k, v in state.items()})
