"""What is learnt, by family of scheduler: noisy inputs, targets, timesteps and weights, from a scheduler's config.

With clean latents z, noise e and a timestep of index i:

=============  ====================================  ===============================  ============================
family         noisy input                           target                           timestep for the model
=============  ====================================  ===============================  ============================
epsilon        sqrt(a_t) z + sqrt(1 - a_t) e         e                                t = i, uniform in 0..T-1
v_prediction   the same                              sqrt(a_t) e - sqrt(1 - a_t) z    the same
sample         the same                              z                                the same
flow           (1 - s) z + s e                       e - z                            1000 s of the shifted sigma s
=============  ====================================  ===============================  ============================

a_t is the cumulative product of 1 - beta (Ho et al., NeurIPS 2020); v of Salimans and Ho, ICLR 2022; flow matching with
densities and weights of Esser et al., ICML 2024; min-SNR weights of Hang et al., ICCV 2023; zero terminal SNR of Lin et
al., WACV 2024. All functions are pure: what is random comes in as numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_suite.errors import ConfigError, UnknownNameError

__all__ = [
    "DENSITIES",
    "FAMILIES",
    "WEIGHTINGS",
    "Schedule",
    "index_of",
    "model_timestep",
    "noisy",
    "read_schedule",
    "target",
    "weight",
]

FAMILIES = ("epsilon", "v_prediction", "sample", "flow")
DENSITIES = ("uniform", "logit_normal", "mode")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
DIFFUSION = (  # schedulers of diffusers that share DDPM's forward process
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass(frozen=True)
class Schedule:
    """The forward process. ``levels`` ``[T]`` are a_t by timestep, or for "flow" the shifted sigmas, falling from 1."""

    family: str
    levels: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return len(self.levels)


def read_schedule(config: Mapping[str, Any], prediction: str = "") -> Schedule:
    """The schedule of a scheduler's config, which names its class as ``_class_name``.

    Args:
        prediction: family to train instead of the config's own, where a checkpoint is meant to change.

    Raises:
        UnknownNameError: a scheduler class, prediction type or beta schedule that is not known here.
        ConfigError: flow matching asked of a diffusion schedule, or the other way round.
    """
    name = str(config.get("_class_name") or "")
    steps = int(config.get("num_train_timesteps") or 1000)
    if name in FLOW:
        if prediction not in ("", "flow"):
            raise ConfigError(f"data.prediction_type = {prediction!r}: {name} trains flow matching; leave it empty.")
        return Schedule("flow", _flow_sigmas(config, steps))
    if name not in DIFFUSION:
        raise UnknownNameError("scheduler", name, (*DIFFUSION, *FLOW), "The pipeline's scheduler says how to train it.")
    family = prediction or str(config.get("prediction_type") or "epsilon")
    if family not in FAMILIES[:3]:
        raise UnknownNameError(
            f"prediction type of {name}",
            family,
            FAMILIES[:3],
            "Correct the scheduler's config, or data.prediction_type.",
        )
    return Schedule(family, torch.cumprod(1 - _betas(config, steps), 0))


def _betas(config: Mapping[str, Any], steps: int) -> Tensor:
    """beta_t ``[T]``."""
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = str(config.get("beta_schedule") or "linear")
    if (given := config.get("trained_betas")) is not None:
        betas = torch.tensor(given, dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol and Dhariwal, ICML 2021
        share = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(share)])
    elif kind == "sigmoid":  # GeoDiff
        betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    else:
        raise UnknownNameError(
            "beta schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), "Or give trained_betas."
        )
    return _without_terminal_signal(betas) if config.get("rescale_betas_zero_snr") else betas


def _without_terminal_signal(betas: Tensor) -> Tensor:
    """Betas whose last step is pure noise: sqrt(a) moved to 0 at T and scaled back to its first value."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    squares = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat((squares[:1], squares[1:] / squares[:-1]))


def _flow_sigmas(config: Mapping[str, Any], steps: int) -> Tensor:
    """sigma_i ``[T]``: T/T ... 1/T, moved by the static shift; a dynamic one (by resolution) acts in sampling only."""
    sigmas = torch.linspace(1, steps, steps, dtype=torch.float64).flip(0) / steps
    shift = float(config.get("shift") or 1.0)
    if not config.get("use_dynamic_shifting"):
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return sigmas.float()


def index_of(
    schedule: Schedule, u: Tensor, density: str = "uniform", *, mean: float = 0.0, std: float = 1.0, scale: float = 1.29
) -> Tensor:
    """Index of a timestep from ``u``, uniform in [0, 1): ``floor(T f(u))``.

    ``logit_normal``: f = sigmoid(mean + std q(u)) with the normal quantile q; ``mode``:
    f = 1 - u - scale (cos^2(pi u / 2) - 1 + u). Both are densities of flow matching; the shift of the sigmas then
    changes the density of the noise levels too.

    Raises:
        UnknownNameError: no such density.
    """
    if density not in DENSITIES:
        raise UnknownNameError("timestep density", density, DENSITIES)
    if density == "logit_normal":
        u = torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12)))
    elif density == "mode":
        u = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return (u * schedule.steps).long().clamp(0, schedule.steps - 1)


def noisy(schedule: Schedule, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """The noisy input, of the shape of ``clean`` ``[..., C, H, W]``; ``index`` ``[...]``."""
    level = schedule.levels[index].to(clean.dtype)[..., None, None, None]
    if schedule.family == "flow":
        return (1 - level) * clean + level * noise
    return level.sqrt() * clean + (1 - level).sqrt() * noise


def target(schedule: Schedule, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """What the model should say, of the shape of ``clean``."""
    level = schedule.levels[index].to(clean.dtype)[..., None, None, None]
    if schedule.family == "epsilon":
        return noise
    if schedule.family == "v_prediction":
        return level.sqrt() * noise - (1 - level).sqrt() * clean
    return clean if schedule.family == "sample" else noise - clean


def model_timestep(schedule: Schedule, index: Tensor) -> Tensor:
    """The timestep that the model reads: the index itself, for flow matching the shifted sigma times T (float)."""
    return schedule.levels[index] * schedule.steps if schedule.family == "flow" else index


def weight(
    schedule: Schedule, index: Tensor, *, snr_gamma: float = 0.0, weighting: str = "none", precondition: bool = False
) -> Tensor:
    """Weight of each squared error, ``[...]`` as ``index``.

    min-SNR with g = ``snr_gamma`` and snr = a / (1 - a): min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v,
    min(snr, g) for sample; 0 switches it off. Where a zero-terminal-SNR schedule has snr = 0, epsilon's weight is its
    limit 1. Flow matching: ``sigma_sqrt`` s^-2, ``cosmap`` 2 / (pi (1 - 2s + 2s^2)); ``precondition`` measures the
    error of the clean latents x_t - s v, that is s^2 times the velocity's.

    Raises:
        ConfigError: a weight of one family asked of another.
        UnknownNameError: no such weighting.
    """
    if weighting not in WEIGHTINGS:
        raise UnknownNameError("loss weighting", weighting, WEIGHTINGS)
    level = schedule.levels[index]
    if schedule.family == "flow":
        if snr_gamma:
            raise ConfigError("data.snr_gamma: min-SNR weights are for diffusion schedules, this one is flow matching.")
        found = torch.ones_like(level)
        if weighting == "sigma_sqrt":
            found = level**-2.0
        elif weighting == "cosmap":
            found = 2 / (math.pi * (1 - 2 * level + 2 * level**2))
        return found * level**2 if precondition else found
    if weighting != "none" or precondition:
        what = "data.precondition" if precondition else f"data.weighting = {weighting!r}"
        raise ConfigError(f"{what} is for flow matching, this schedule predicts {schedule.family}. Use data.snr_gamma.")
    if not snr_gamma:
        return torch.ones_like(level)
    snr = level / (1 - level)
    capped = snr.clamp(max=snr_gamma)
    if schedule.family == "epsilon":
        return torch.where(snr > 0, capped / snr.clamp(min=1e-20), torch.ones_like(snr))
    return capped / (snr + 1) if schedule.family == "v_prediction" else capped
