"""Noisy inputs, targets, timesteps and weights against diffusers' schedulers and the formulas of its examples."""

from __future__ import annotations

import math

import pytest
import torch

from peft_suite.diffusion.schedules import index_of, model_timestep, noisy, read_schedule, target, weight
from peft_suite.errors import ConfigError, UnknownNameError

BETAS = (
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
)


def config_of(scheduler) -> dict:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def material(steps: int):
    draw = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(6, 4, 3, 5, generator=draw), torch.randn(6, 4, 3, 5, generator=draw)
    index = torch.randint(steps, (6,), generator=draw)
    index[:2] = torch.tensor([0, steps - 1])
    return clean, noise, index


@pytest.mark.parametrize("fields", BETAS, ids=lambda f: "-".join(map(str, f.values()))[:30])
def test_forward_process_is_that_of_diffusers(fields):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**{"prediction_type": "v_prediction", **fields})
    schedule = read_schedule(config_of(scheduler))
    assert (schedule.family, schedule.steps) == ("v_prediction", len(scheduler.alphas_cumprod))
    torch.testing.assert_close(schedule.levels, scheduler.alphas_cumprod, rtol=1e-6, atol=1e-7)
    clean, noise, index = material(schedule.steps)
    torch.testing.assert_close(noisy(schedule, clean, noise, index), scheduler.add_noise(clean, noise, index))
    velocity = scheduler.get_velocity(clean, noise, index)
    torch.testing.assert_close(target(schedule, clean, noise, index), velocity)
    assert torch.equal(target(read_schedule(config_of(scheduler), "epsilon"), clean, noise, index), noise)
    assert torch.equal(target(read_schedule(config_of(scheduler), "sample"), clean, noise, index), clean)
    assert torch.equal(model_timestep(schedule, index), index)


@pytest.mark.parametrize("fields", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_flow_matching_is_that_of_diffusers(fields):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**fields)
    schedule = read_schedule(config_of(scheduler))
    assert schedule.family == "flow"
    torch.testing.assert_close(schedule.levels, scheduler.sigmas[:1000], rtol=1e-6, atol=1e-7)
    clean, noise, index = material(1000)
    times = scheduler.timesteps[index]
    torch.testing.assert_close(model_timestep(schedule, index), times)
    torch.testing.assert_close(noisy(schedule, clean, noise, index), scheduler.scale_noise(clean, times, noise))
    assert torch.equal(target(schedule, clean, noise, index), noise - clean)


def test_min_snr_weights():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    index = torch.tensor([0, 3, 200, 700, 999])
    snr = compute_snr(scheduler, index)
    capped = torch.minimum(snr, torch.full_like(snr, 5.0))
    for family, wanted in (("epsilon", capped / snr), ("v_prediction", capped / (snr + 1)), ("sample", capped)):
        schedule = read_schedule(config_of(scheduler), family)
        torch.testing.assert_close(weight(schedule, index, snr_gamma=5.0), wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(weight(schedule, index), torch.ones(5))


def test_zero_terminal_snr_keeps_weights_finite():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    schedule = read_schedule(config_of(scheduler), "epsilon")
    schedule.levels[-1] = 0.0  # the ideal schedule; diffusers' ends a rounding error above
    assert weight(schedule, torch.tensor([999]), snr_gamma=5.0).tolist() == [1.0]
    other = read_schedule(config_of(scheduler), "v_prediction")
    assert weight(other, torch.tensor([999]), snr_gamma=5.0).item() < 1e-6


def test_densities_and_weights_of_flow_matching():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    schedule = read_schedule(config_of(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    index = torch.tensor([5, 400, 999])
    sigmas = schedule.levels[index]
    for scheme in ("sigma_sqrt", "cosmap", "none"):
        wanted = compute_loss_weighting_for_sd3(scheme, sigmas)
        torch.testing.assert_close(weight(schedule, index, weighting=scheme), wanted)
    torch.testing.assert_close(weight(schedule, index, precondition=True), sigmas**2)

    u = (torch.arange(20_000) + 0.5) / 20_000
    assert torch.equal(index_of(schedule, u), (u * 1000).long())
    torch.manual_seed(0)
    for scheme in ("logit_normal", "mode"):
        theirs = compute_density_for_timestep_sampling(scheme, 20_000, 0.3, 0.8, 1.29).clamp(0, 0.999999)
        ours = index_of(schedule, u, scheme, mean=0.3, std=0.8)
        shares = [torch.histc(x.float(), 10, 0, 1000) / 20_000 for x in (ours, (theirs * 1000).long())]
        assert (shares[0] - shares[1]).abs().max() < 0.012, scheme
    exact = index_of(schedule, torch.tensor([0.25, 0.6]), "mode", scale=1.29)
    assert exact.tolist() == [
        int(1000 * (1 - x - 1.29 * (math.cos(math.pi * x / 2) ** 2 - 1 + x))) for x in (0.25, 0.6)
    ]


def test_preconditioned_error_is_the_error_of_the_clean_latents():
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = read_schedule(config_of(FlowMatchEulerDiscreteScheduler()))
    clean, noise, index = material(1000)
    said = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    mixed, goal = noisy(schedule, clean, noise, index), target(schedule, clean, noise, index)
    sigma = schedule.levels[index].view(-1, 1, 1, 1)
    of_latents = ((mixed - said * sigma) - clean).square().mean((1, 2, 3))
    weighted = weight(schedule, index, precondition=True) * (said - goal).square().mean((1, 2, 3))
    torch.testing.assert_close(weighted, of_latents)


def test_what_is_unknown_is_refused_with_the_valid_names():
    with pytest.raises(UnknownNameError, match=r"prediction type.*'epsilom'.*Did you mean 'epsilon'"):
        read_schedule({"_class_name": "DDPMScheduler", "prediction_type": "epsilom"})
    with pytest.raises(UnknownNameError, match="scheduler 'EDMEulerScheduler'"):
        read_schedule({"_class_name": "EDMEulerScheduler"})
    with pytest.raises(UnknownNameError, match="beta schedule"):
        read_schedule({"_class_name": "DDPMScheduler", "beta_schedule": "cubic"})
    with pytest.raises(ConfigError, match="trains flow matching"):
        read_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "epsilon")
    ddpm, flow = (
        read_schedule({"_class_name": "DDPMScheduler"}),
        read_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    )
    with pytest.raises(ConfigError, match="min-SNR"):
        weight(flow, torch.tensor(3), snr_gamma=5.0)
    with pytest.raises(ConfigError, match="flow matching"):
        weight(ddpm, torch.tensor(3), weighting="cosmap")
    with pytest.raises(UnknownNameError, match="timestep density"):
        index_of(flow, torch.rand(2), "normal")
