"""Images from a component or from a whole pipeline; the same seed gives the same images, whatever the batch size is.

A pixel model (no VAE, no text) is sampled here with diffusers' schedulers, without noise in the steps:

    x_T ~ N(0, 1) from (seed, image),   x_{t-1} = scheduler.step(e, t, x_t),
    e = e_null + guidance (e_class - e_null)

Everything else runs through diffusers' own pipeline with the adapted component in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_suite.adapter import adapters_of
from peft_suite.diffusion.denoising import denoise
from peft_suite.errors import ConfigError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SAMPLERS", "at_strength", "grid", "noise_of", "open_pipeline", "sample", "sampler_of"]

Step = Callable[[int, int], None]
SAMPLERS = {"ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler", "ddpm": "DDPMScheduler"}
_NONE = 1000  # the null class of DiT on ImageNet, written into diffusers' pipeline
_TILE = 32  # pixels that an image of a grid has at least


def sample(
    model: nn.Module,
    facts: Mapping[str, Any],
    n: int,
    *,
    classes: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    steps: int = 25,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    sampler: str = "",
    size: int = 0,
    pipeline: Any = None,
    each: Step | None = None,
) -> Tensor:
    """``n`` images, uint8 ``[N, H, W, C]`` on the CPU.

    Args:
        model: the component that makes the image (UNet, transformer), or, with a pipeline, any of its components.
        facts: what ``preprocessing`` of the backbone says: kind, size, channels, classes, null, scheduler, pipeline.
        classes: class indices that the images take in turn; all classes by default.
        prompts: texts that the images take in turn.
        steps: denoising steps.
        guidance: 1 asks for the condition alone; more than 1 moves away from no condition, at two forwards a step.
        seed: image i starts from the noise of (seed, i).
        sampler: "ddim", "dpm", "ddpm"; by default ddim for pixel models and the pipeline's own for pipelines.
        size: side of the images where it is not the one that the model was trained with (pipelines).
        pipeline: a loaded pipeline; otherwise it is read from ``facts["pipeline"]`` where one is needed.
        each: called after every batch with images done and images in all.

    Raises:
        ConfigError: the condition does not suit the model, an unknown class, a bad number.
    """
    if n < 1 or steps < 1:
        raise ConfigError(f"n = {n}, steps = {steps}: both must be at least 1.")
    if sampler and sampler not in SAMPLERS:
        raise UnknownNameError("sampler", sampler, SAMPLERS)
    kind = str(facts.get("kind") or "unconditional")
    wanted = _conditions(facts, kind, n, classes, prompts)
    if pipeline is not None or _needs_pipeline(facts, kind):
        if kind == "text":
            size = size or int(facts.get("size") or 0)
        elif guidance > 1 and kind == "class" and facts.get("null") != _NONE:
            raise ConfigError(
                f"guidance = {guidance:g}: DiTPipeline takes class {_NONE} for no class, and that of this model is "
                f"{facts.get('null')}. Take 1."
            )
        pipe = pipeline if pipeline is not None else open_pipeline(model, facts)
        return _piped(pipe, kind, wanted, steps, guidance, seed, batch_size, sampler, size, each)
    if kind == "text":
        raise ConfigError(
            "Prompts need the whole pipeline: give a diffusers folder as the backbone (--checkpoint DIR)."
        )
    if guidance != 1 and (kind == "unconditional" or facts.get("null") is None):
        raise ConfigError(f"guidance = {guidance:g}: the model knows no 'no class' to move away from. Take 1.")
    scheduler = sampler_of(facts["scheduler"], sampler or "ddim")
    parts = []
    with _evaluating(model), torch.no_grad():
        for start in range(0, n, batch_size):
            rows = range(start, min(n, start + batch_size))
            labels = None if kind == "unconditional" else torch.tensor([int(wanted[i]) for i in rows])
            parts.append(_denoised(model, facts, rows, labels, scheduler, steps, guidance, seed))
            if each is not None:
                each(rows[-1] + 1, n)
    return torch.cat(parts)


def _conditions(
    facts: Mapping[str, Any], kind: str, n: int, classes: Sequence[int] | None, prompts: Sequence[str] | None
) -> list[Any]:
    """One condition per image."""
    if kind == "text":
        if classes or not prompts:
            raise ConfigError("The model draws by text: give prompts (--prompt TEXT), and no classes.")
        return [prompts[i % len(prompts)] for i in range(n)]
    if prompts:
        known = "by class: give classes (--classes 0,1)" if kind == "class" else "without a condition"
        raise ConfigError(f"The model takes no prompts; it draws {known}.")
    if kind == "unconditional":
        if classes:
            raise ConfigError("The model draws without a condition, so it takes no classes.")
        return [None] * n
    count = int(facts["classes"])
    chosen = list(classes) if classes else list(range(count))
    most = max(count - 1, int(facts.get("null") or 0))
    if wrong := [c for c in chosen if not 0 <= c <= most]:
        raise ConfigError(f"class {wrong[0]}: the model has the classes 0 to {count - 1}.")
    return [chosen[i % len(chosen)] for i in range(n)]


def _needs_pipeline(facts: Mapping[str, Any], kind: str) -> bool:
    """Text, latents, or an adapted text encoder."""
    latent = int(facts.get("factor") or 1) != 1 or str(facts.get("component")).startswith("text_encoder")
    return bool(facts.get("pipeline")) and (kind == "text" or latent)


def sampler_of(config: Mapping[str, Any], name: str) -> Any:
    """A diffusers scheduler that samples what a training scheduler describes; flow matching keeps its own class.

    Raises:
        UnsupportedError: diffusers has no such scheduler.
    """
    import diffusers

    own = str(config.get("_class_name") or "DDPMScheduler")
    wanted = own if "FlowMatch" in own else SAMPLERS[name]
    cls = getattr(diffusers, wanted, None)
    if cls is None:
        raise UnsupportedError(f"diffusers has no scheduler {wanted!r}; the model was trained with it.")
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    if name == "dpm" and config.get("beta_schedule") == "squaredcos_cap_v2":
        fields["lambda_min_clipped"] = -5.1  # where almost nothing is left of the image the solver overflows
    return cls.from_config(fields)


def noise_of(seed: int, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal ``[len(rows), *shape]``; row i depends on (seed, i) alone."""
    return torch.stack([torch.randn(*shape, generator=_drawn(seed, i)) for i in rows])


def _drawn(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed((1_000_003 * seed + row) % 2**63)


def _denoised(
    model: nn.Module,
    facts: Mapping[str, Any],
    rows: Sequence[int],
    labels: Tensor | None,
    scheduler: Any,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """uint8 ``[B, H, W, C]`` of a pixel model."""
    parameter, side = next(model.parameters()), int(facts["size"])
    x = noise_of(seed, rows, (int(facts["channels"]), side, side)).to(parameter.device, parameter.dtype)
    scheduler.set_timesteps(steps)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    generators = [_drawn(seed + 1, i) for i in rows]
    name = str(facts.get("model") or type(model).__name__)
    condition = {} if labels is None else {"class_labels": labels.to(parameter.device)}
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        when = t.expand(len(x)).to(parameter.device)
        inputs = {"sample": given, "timestep": when}
        guess = denoise(model, name, {**inputs, **condition})
        if guidance != 1:
            free = {"class_labels": torch.full_like(condition["class_labels"], int(facts["null"]))}
            base = denoise(model, name, {**inputs, **free})
            guess = base + guidance * (guess - base)
        options = {"generator": generators} if type(scheduler).__name__ == "DDPMScheduler" else {}
        x = scheduler.step(guess, t, x, **options).prev_sample
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def open_pipeline(model: nn.Module, facts: Mapping[str, Any]) -> Any:
    """The pipeline of ``facts["pipeline"]`` with ``model`` in the place of its component; the others take its dtype.

    Raises:
        ConfigError: there is no pipeline.
        FileFormatError: it cannot be read.
    """
    from peft_suite.diffusion.writing import open_with

    if not facts.get("pipeline"):
        raise ConfigError("The backbone is a component without a pipeline. Give a diffusers folder (--checkpoint DIR).")
    pipe = open_with(model, facts)
    dtype = next(model.parameters()).dtype
    for part in pipe.components.values():
        other = isinstance(part, nn.Module) and part is not model  # the adapter keeps its own dtype
        if other and next(part.parameters()).dtype != dtype:
            part.to(dtype)
    return pipe


def _piped(
    pipe: Any,
    kind: str,
    wanted: Sequence[Any],
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    sampler: str,
    size: int,
    each: Step | None,
) -> Tensor:
    """uint8 ``[N, H, W, C]`` from diffusers' own call."""
    import numpy as np

    if sampler:
        pipe.scheduler = sampler_of(pipe.scheduler.config, sampler)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    options |= {} if kind == "unconditional" else {"guidance_scale": guidance}
    options |= {"height": size, "width": size} if size else {}
    key = {"text": "prompt", "class": "class_labels"}.get(kind)
    parts = []
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(_evaluating(network))
        for start in range(0, len(wanted), batch_size):
            rows = range(start, min(len(wanted), start + batch_size))
            given = {"batch_size": len(rows)} if key is None else {key: [wanted[i] for i in rows]}
            images = pipe(**given, **options, generator=[_drawn(seed, i) for i in rows]).images
            parts.append(torch.from_numpy(np.asarray(images)).mul(255).round().to(torch.uint8))
            if each is not None:
                each(rows[-1] + 1, len(wanted))
    return torch.cat(parts)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def at_strength(model: nn.Module, strength: float) -> nn.Module:
    """``P + strength (P' - P)``: 0 is the base, 1 is the adapter, and what lies between or beyond.

    Adapters that add to weights get their strength; others are merged into the weights and these are interpolated.
    Source: SaRA (Hu et al., ICLR 2025) shows 0 to 2.

    Raises:
        UnsupportedError: the adapter can be neither scaled nor merged.
    """
    import peft_suite as ps
    from peft_suite.strength import scale

    if strength == 1:
        return model
    try:
        for name in adapters_of(model).active:
            scale(model, name, strength)
        return model
    except UnsupportedError:
        pass
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("adapters.")}
    ps.merge(model)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in base and value.is_floating_point():
                value.copy_(base[key] + strength * (value - base[key]))
    return model


def grid(images: Tensor, columns: int = 0, tile: int = _TILE) -> Image.Image:
    """uint8 ``[N, H, W, C]`` as one picture, row by row; small images are enlarged by whole factors.

    Args:
        columns: images in a row; about a square by default.
        tile: pixels that an image has at least on a side.
    """
    from PIL import Image

    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, math.ceil(tile / max(height, width)))
    large = images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    lines, gap = math.ceil(count / columns), 2
    height, width = factor * height + gap, factor * width + gap
    sheet = torch.full((lines * height + gap, columns * width + gap, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(large):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = image
    return Image.fromarray(sheet.squeeze(-1).numpy())
