"""DiffFit: where it acts, its counts, its start, and that it folds."""

from __future__ import annotations

import functools

import diffusion_parts as made
import pytest
import torch

import peft_suite as ps
from peft_suite.diffusion.methods.difffit import Gamma, loss_weights
from peft_suite.edits import Trained
from peft_suite.errors import ConfigError


@functools.cache
def stable_diffusion() -> torch.nn.Module:
    """Stable Diffusion 1.5's UNet without storage."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=draw),
        "timestep": torch.tensor([7, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=draw),
    }


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("difffit(norms=False, biases=False)", 37_440),
        ("difffit(gamma=False, processor=True, norms=False, biases=False)", 99_840),
        ("difffit(gamma=False)", 443_844),
        ("difffit(gamma=False, norms=False)", 343_684),
        ("difffit", 481_284),
        ("difffit(processor=True)", 581_124),
    ],
)
def test_counts_on_stable_diffusion(spec: str, count: int) -> None:
    assert ps.plan(stable_diffusion(), spec).trainable == count


@pytest.mark.parametrize("spec", ["difffit", "difffit(processor=True)"])
def test_starts_as_the_model_and_folds_into_it(spec: str) -> None:
    torch.manual_seed(0)
    model = made.tiny_unet((8, 16), groups=2)
    with torch.no_grad():
        base = model(**inputs()).sample
        ps.adapt(model, spec)
        assert torch.equal(model(**inputs()).sample, base)
        moved = shaken(model)(**inputs()).sample
        ps.merge(model)
        merged = model(**inputs()).sample
    assert (moved - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, moved, rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "adapters")


def test_gamma_scales_what_the_sub_layers_add() -> None:
    """A block with γ = 2 for its feed-forward adds twice what the feed-forward gives."""
    torch.manual_seed(0)
    model = made.tiny_unet((8, 16), groups=2)
    block = model.mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(1, 4, 16), torch.randn(1, 3, 32)
    seen: list[torch.Tensor] = []
    block.ff.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    with torch.no_grad():
        base = block(x, encoder_hidden_states=text)
        ps.adapt(model, "difffit(biases=False, norms=False)")
        parts = dict(model.adapters["default"].parts())
        parts["mid_block.attentions.0.transformer_blocks.0.ff.net.2.gamma_ff"].gamma.fill_(2.0)
        doubled = block(x, encoder_hidden_states=text)
    torch.testing.assert_close(doubled - base, seen[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_what_trains_on_dit() -> None:
    """γ per block for attention and feed-forward, all biases, label tables; adaLN's matrices stay frozen."""
    model = made.tiny_dit(layers=2)
    ps.adapt(model, "difffit")
    parts = dict(model.adapters["default"].parts())
    assert sum(isinstance(p, Gamma) for p in parts.values()) == 2 * 2
    assert sum(p.gamma.numel() for p in parts.values() if isinstance(p, Gamma)) == 2 * 32 * 2
    owned = {f"{k.rpartition('.')[0]}.{n}" for k, p in parts.items() if isinstance(p, Trained) for n in p._parameters}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith("adapters.")}
    tables = {f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(2)}
    scaled = {f"{k.rpartition('.')[0]}.bias" for k, p in parts.items() if isinstance(p, Gamma) and p.beta is not None}
    assert len(scaled) == 2 * 2 and not scaled & owned  # their change trains with the scale
    assert owned | scaled == biases | tables
    assert "transformer_blocks.0.norm1.linear.bias" in owned and "transformer_blocks.0.norm1.linear.weight" not in owned


@pytest.mark.parametrize("build", [made.tiny_sd3, made.tiny_flux, made.tiny_text_encoder])
def test_other_models_carry_it(build: object) -> None:
    model = build()  # type: ignore[operator]
    ps.adapt(model, "difffit(processor=True)")
    labels = {key.rpartition(".")[2] for key, p in model.adapters["default"].parts() if isinstance(p, Gamma)}
    assert {"gamma_attn1", "gamma_ff", "gamma_q", "gamma_k", "gamma_v", "gamma_fnn"} <= labels


def test_loss_weights_are_those_of_the_variational_bound() -> None:
    """Against the formula written out for single steps, and for the first one."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    total = (1 - beta).cumprod(0)
    found = loss_weights(total, strength=1.0)
    for t in (1, 10, 999):
        posterior = beta[t] * (1 - total[t - 1]) / (1 - total[t])
        expected = beta[t] ** 2 / (2 * posterior * (1 - beta[t]) * (1 - total[t]))
        assert float(found[t]) == pytest.approx(1 + float(expected), rel=1e-9)
    second = beta[1] * (1 - total[0]) / (1 - total[1])
    first = beta[0] ** 2 / (2 * second * (1 - beta[0]) * (1 - total[0]))
    assert float(found[0]) == pytest.approx(1 + float(first), rel=1e-9)
    assert torch.equal(loss_weights(total, strength=0.0), torch.ones_like(total))


def test_refuses_what_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        ps.adapt(made.tiny_dit(), "difffit(gamma=False, norms=False, biases=False, labels=False)")
