"""Descriptions of diffusers models and their text encoders: completeness, counts of real models, refusals, merging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig

import peft_suite as ps
from peft_suite.anatomy import Anatomy, anatomy_of
from peft_suite.diffusion.anatomies import dit, joint, text, unet
from peft_suite.errors import BackboneError, UnsupportedError
from peft_suite.testing.case import (
    adapter,
    assert_close,
    call,
    error,
    gradients,
    loss,
    outputs,
    randomise,
    seeded,
    tensors,
)

Example = Callable[[], tuple[nn.Module, Any]]

BOTH = "[q, k, v, o, xq, xk, xv, xo]"
EXAMPLES: dict[str, Example] = {
    "unet": unet.example,
    "sdxl": unet.example_sdxl,
    "pixels": unet.example_pixels,
    "dit": dit.example,
    "sd3": joint.example_sd3,
    "sd35": joint.example_sd35,
    "flux": joint.example_flux,
    "clip": text.example_clip,
    "clip-projection": text.example_clip_projection,
    "t5": text.example_t5,
}


def built(name: str) -> tuple[nn.Module, Any]:
    with seeded(0):
        return EXAMPLES[name]()


def adapted(name: str, method: str) -> tuple[nn.Module, Any]:
    model, batch = built(name)
    with seeded(1):
        ps.adapt(model, method)
        randomise(adapter(model))
    return model, batch


def affine_calls(model: nn.Module, batch: Any) -> list[str]:
    """Paths of the affine operations in the order of their first call."""
    seen: dict[str, None] = {}
    kinds = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
    for name, module in model.named_modules():
        own = isinstance(getattr(module, "weight", None), Tensor) and not isinstance(module, nn.Embedding)
        if own and (isinstance(module, kinds) or "Norm" in type(module).__name__):
            module.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
    outputs(model, batch)
    return list(seen)


def described(anatomy: Anatomy) -> list[str]:
    inside = [point.path for block in anatomy.blocks for point in block.affine]
    return [p.path for p in anatomy.stem] + inside + [p.path for p in (*anatomy.between, *anatomy.tail)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_affine_operation_is_described_once(name: str) -> None:
    model, batch = built(name)
    anatomy = anatomy_of(model)
    paths = described(anatomy)
    assert len(paths) == len(set(paths))
    idle = {full.rpartition(".")[0] for full in anatomy.idle}
    assert set(paths) == set(affine_calls(model, batch)) - idle


@pytest.mark.parametrize("name", EXAMPLES)
def test_blocks_and_what_is_in_them_come_in_the_order_of_the_forward(name: str) -> None:
    model, batch = built(name)
    anatomy, seen = anatomy_of(model), []
    for block in anatomy.blocks:
        model.get_submodule(block.point.path).register_forward_pre_hook(
            lambda *_, path=block.point.path: seen.append(path)
        )
    order = {path: i for i, path in enumerate(affine_calls(model, batch))}
    assert seen == [block.point.path for block in anatomy.blocks]
    for block in anatomy.blocks:
        if name not in ("sd3", "sd35", "flux"):  # two streams, in no order to each other
            places = [order[point.path] for point in block.affine]
            assert places == sorted(places), block.point.path
        weights = [order[weight.path] for role, weight in block.weights.items() if role in ("q", "o")]
        assert weights == sorted(weights)


@pytest.mark.parametrize("name", EXAMPLES)
def test_points_have_the_width_and_layout_that_they_say(name: str) -> None:
    model, batch = built(name)
    anatomy = anatomy_of(model)
    found: dict[str, Any] = {}
    points = [p for b in anatomy.blocks for p in (b.point, *b.points.values(), *b.affine)]
    points += [*anatomy.stem, *anatomy.between, *anatomy.tail]
    for point in points:
        model.get_submodule(point.path).register_forward_hook(lambda _, __, y, at=point.path: found.setdefault(at, y))
    outputs(model, batch)
    for point in points:
        y = found[point.path]
        y = y if point.output is None else y[point.output]
        assert y.shape[1 if point.layout == "first" else -1] == point.width, point


@pytest.mark.parametrize("name", ["unet", "sdxl", "dit", "sd3", "sd35", "flux", "clip"])
def test_described_forwards_compute_what_the_blocks_compute(name: str) -> None:
    model, batch = built(name)
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 0)
    base = outputs(model, batch)
    where = ("attn", "mlp") if name != "clip" else ("mlp",)
    for position in where:
        ps.adapt(model, f"adapter(position={position}, insertion=parallel, source=residual)", name=position)
        assert any(edit.kind == "branch" for edit in adapter(model, position).edits)
        assert_close(outputs(model, batch), base, f"a fresh adapter at {position}", 1e-6)
        randomise(adapter(model, position))
        assert error(outputs(model, batch), base) > 1e-4


def test_text_mask_and_extra_arguments_pass_through_the_described_block() -> None:
    model, batch = built("unet")
    batch |= {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "cross_attention_kwargs": {}}
    base = outputs(model, batch)
    ps.adapt(model, "adaptformer(bottleneck=2)")
    assert_close(outputs(model, batch), base, "masked text", 1e-6)


def meta(build: Callable[..., nn.Module], **config: Any) -> nn.Module:
    with torch.device("meta"):
        return build(**config)


@functools.cache
def sd15() -> nn.Module:
    return meta(UNet2DConditionModel, sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@functools.cache
def sd2() -> nn.Module:
    heads = (5, 10, 20, 20)
    return meta(
        UNet2DConditionModel,
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=heads,
        use_linear_projection=True,
    )


@functools.cache
def sd3() -> nn.Module:
    return meta(
        SD3Transformer2DModel,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


@functools.cache
def sdxl() -> nn.Module:
    return meta(
        UNet2DConditionModel,
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


@functools.cache
def dit_xl() -> nn.Module:
    return meta(DiTTransformer2DModel, out_channels=8)


@pytest.mark.parametrize(
    ("build", "method", "trained", "total"),
    [
        (sd15, f"lora(rank=4, targets={BOTH})", 797_184, 859_520_964),
        (sd15, f"lora(rank=16, targets={BOTH})", 3_188_736, 859_520_964),
        (sd15, f"lora(rank=4, dora=True, targets={BOTH})", 797_184 + 99_840, 859_520_964),
        (sd15, "bitfit", 343_684, 859_520_964),
        (sd15, "norm", 200_320, 859_520_964),
        (sd2, f"lora(rank=4, targets={BOTH})", 829_952, 865_910_724),
        (sd3, "lora(rank=4, targets=[q, k, v, o])", 1_179_648, 2_028_328_000),
        (sdxl, "lora(rank=1, targets=[xk])", 10 * (2048 + 640) + 60 * (2048 + 1280), 2_567_463_684),
        (dit_xl, "lora(rank=4, targets=[q])", 28 * 4 * 2 * 1152, 749_826_464),
    ],
)
def test_counts_on_real_sizes(build: Callable[[], nn.Module], method: str, trained: int, total: int) -> None:
    plan = ps.plan(build(), method)
    added = 0 if method in ("bitfit", "norm") else plan.trainable  # copies stand for what was there before
    assert (plan.trainable, plan.total - added) == (trained, total)


def test_biases_norms_and_scales_of_stable_diffusion() -> None:
    model = sd15()
    anatomy = anatomy_of(model)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    trained = biases | {f"{path}.{n}" for path in anatomy.norms for n in ("weight", "bias")}
    assert sum(p.numel() for n, p in model.named_parameters() if n in trained) == 443_844
    crossed = [block for block in anatomy.blocks if "xattn" in block.points]
    assert len(crossed) == 16 and len(anatomy.blocks) == 16 + 22
    assert sum(block.points[role].width for block in crossed for role in ("attn", "xattn", "mlp")) == 37_440


def test_norms_of_dit_are_no_adaptive_containers() -> None:
    assert anatomy_of(dit_xl()).norms == ()  # norm1.linear alone would be 300 million
    flux = meta(FluxTransformer2DModel, guidance_embeds=True)
    anatomy = anatomy_of(flux)
    assert len(anatomy.blocks) == 19 + 38 and sum(p.numel() for p in flux.parameters()) == 11_901_408_320
    assert {path.rpartition(".")[2] for path in anatomy.norms} == {"norm_q", "norm_k", "norm_added_q", "norm_added_k"}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("unet", f"lora(rank=2, targets={BOTH})"),
        ("unet", "lora(rank=2, targets=[conv1, conv2, temb, fc1, fc2])"),
        ("sdxl", "full"),
        ("pixels", "ia3(targets=[k, v])"),
        ("dit", "lora(rank=2, dora=True, targets=[q, k, v, o, fc1, fc2])"),
        ("sd3", "lora(rank=2, targets=[q, k, v, o, add_q, add_k, add_v, add_o, cfc1, cfc2])"),
        ("sd35", "lora(rank=2, targets=[q2, k2, v2, o2])"),
        ("flux", "lora(rank=2, targets=[q, k, v, out, add_q, add_o])"),
        ("clip", "bitfit"),
        ("clip-projection", "lora(rank=2, targets=[q, k, v, o])"),
        ("t5", "full"),
    ],
)
def test_merged_models_are_plain_and_save_as_before(name: str, method: str, tmp_path: Path) -> None:
    model, batch = adapted(name, method)
    keys = set(built(name)[0].state_dict())
    assert ps.verify(model, batch)["parameters"] == len(list(adapter(model).parameters()))
    assert ps.summary(model).trainable == ps.plan(built(name)[0], method).trainable
    wanted = outputs(model, batch)
    ps.merge(model)
    assert set(model.state_dict()) == keys
    assert_close(outputs(model, batch), wanted, "merged")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again: Any = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    for module in again.modules():
        module.dropout_prob = 0.0
    assert_close(outputs(again.eval(), batch), wanted, "saved and loaded")


@pytest.mark.parametrize("name", ["unet", "pixels", "sd3", "flux"])
def test_fused_projections_are_refused(name: str) -> None:
    model, _ = adapted(name, "lora(rank=2)")
    ps.merge(model)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections()
    with pytest.raises(BackboneError, match=r"fused projections.*Load it again"):
        ps.adapt(model, "lora(rank=2)")
    assert "adapters" not in model._modules


def test_an_adapter_of_peft_is_refused() -> None:
    model: Any = built("unet")[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(BackboneError, match="carries an adapter of peft already"):
        ps.adapt(model, "lora(rank=2)")
    model.unload_lora()
    ps.adapt(model, "lora(rank=2)")


@pytest.mark.parametrize("name", ["unet", "pixels", "dit", "sd3", "flux"])
def test_gradient_checkpointing(name: str) -> None:
    found = []
    for on in (False, True):
        model, batch = adapted(name, "adapter(bottleneck=2)")
        with seeded(2):
            ps.adapt(model, "lora(rank=2, targets=[q, v])", name="lora")
            randomise(adapter(model, "lora"))
        ps.activate(model, "default", "lora")
        ps.trainable(model, "default", "lora")
        if on:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        model.train()
        loss(call(model, batch)).backward()  # type: ignore[no-untyped-call]
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and found[0]
    for key, grad in found[0].items():
        assert_close([found[1][key]], [grad], key)


def test_reentrant_checkpointing_is_refused() -> None:
    model: Any = built("unet")[0]
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    with pytest.raises(UnsupportedError, match="reentrant"):
        ps.adapt(model, "lora(rank=2)")


def test_methods_take_the_blocks_that_have_the_place() -> None:
    model, _ = adapted("unet", "lora(rank=2, targets=[xk, conv1])")
    paths = {edit.path for edit in adapter(model).edits if edit.key.endswith(".lora")}
    assert {path.rpartition(".")[2] for path in paths} == {"to_k", "conv1"}
    assert all(".attn2." in path for path in paths if path.endswith("to_k"))
    model, _ = built("unet")
    ps.adapt(model, "pfeiffer(bottleneck=2)")
    ends = {edit.path.rpartition(".")[2] for edit in adapter(model).edits if edit.kind == "after"}
    assert ends == {"conv2", "ff"}


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("unet", "linear", "linear trains the head, and this diffusers-unet model has none"),
        ("unet", "lora(targets=[add_q])", r"no block of diffusers-unet, from down_blocks\.0\.resnets\.0 on, has such"),
        (
            "pixels",
            "ia3",
            r"ia3 targets 'fc2', and no block of diffusers-unet2d, from down_blo.* has such a matrix.*conv2",
        ),
        ("pixels", "adaptformer", "does not give access to the residual stream"),
        ("unet", "vpt", "cannot add tokens to diffusers-unet: it has no token sequence"),
        ("unet", "convpass", "convolves the token grid"),
        ("dit", "norm", "norm trains normalisation layers, and this diffusers-dit model has none with weights"),
        ("dit", "adapter(norms=True)", r"needs the point 'norm2'"),
        ("t5", "bitfit", "bitfit trains biases, and this t5-encoder model has none"),
    ],
)
def test_what_a_family_cannot_carry_is_refused_in_one_sentence(name: str, method: str, message: str) -> None:
    model, _ = built(name)
    with pytest.raises(UnsupportedError, match=message):
        ps.adapt(model, method)
    assert "adapters" not in model._modules


def test_text_queries_of_the_last_sd3_block_are_idle() -> None:
    model, _ = adapted("sd3", "full")
    missing = {n for n, _ in built("sd3")[0].named_parameters()} - {
        f"{edit.path}.{n}" for edit in adapter(model).edits for n, _ in edit.part.named_parameters()
    }
    assert missing == {"transformer_blocks.1.attn.add_q_proj.weight", "transformer_blocks.1.attn.add_q_proj.bias"}
    roles = [set(block.weights) for block in anatomy_of(built("sd3")[0]).blocks]
    assert roles[0] - roles[1] == {"add_q", "add_o", "cfc1", "cfc2"}


def test_tied_embedding_of_t5_trains_where_it_is_read() -> None:
    model, _ = adapted("t5", "full")
    assert "encoder.embed_tokens" in {edit.path for edit in adapter(model).edits}
    before = model.shared.weight.clone()  # type: ignore[union-attr, operator]
    ps.merge(model)
    assert model.shared.weight is model.encoder.embed_tokens.weight  # type: ignore[union-attr]
    assert not torch.equal(model.shared.weight, before)  # type: ignore[union-attr, arg-type]


def test_hidden_states_of_an_adapted_text_encoder() -> None:
    model, batch = built("clip")
    base = call(model, {**batch, "output_hidden_states": True}).hidden_states
    ps.adapt(model, "adaptformer(bottleneck=2)")
    randomise(adapter(model))
    found = call(model, {**batch, "output_hidden_states": True}).hidden_states
    assert len(found) == len(base) == 3
    assert torch.equal(found[0], base[0]) and error(tensors(found[1:]), tensors(base[1:])) > 1e-4
