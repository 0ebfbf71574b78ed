"""Every described family: parameter counts on the real models, refusals, and the places where a hook would not fire."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from vision import asmlp

import peft_suite as ps
from peft_suite.errors import MergeError, UnsupportedError
from peft_suite.testing.case import adapter, assert_close, call, outputs, randomise, settle
from peft_suite.vision.anatomies import timm_convnext, timm_mixer, timm_resnet, timm_swin, timm_vit
from peft_suite.vision.support import YES, markdown, matrix

asmlp.register()
HEAD = 100


def build(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=HEAD, **options)


def head(model: nn.Module) -> int:
    return sum(model.get_parameter(n).numel() for n in ps.anatomy_of(model).fresh)


SWIN, MIXER, RESNET = "swin_base_patch4_window7_224", "mixer_b16_224", "resnet50"
COUNTS = {
    ("vit_base_patch16_224", "ssf"): 205_824,
    ("vit_base_patch16_224", "bitfit"): 102_912,
    ("vit_base_patch16_224", "norm"): 38_400,
    ("vit_base_patch16_224", "norm(bias=False)"): 19_200,
    ("vit_base_patch16_224", "ia3"): 55_296,
    ("vit_base_patch16_224", "lora(rank=8)"): 294_912,
    ("vit_base_patch16_224", "full"): 85_798_656,
    (SWIN, "ssf"): 267_264,
    # merging: norm of 4 C and reduction to 2 C
    (SWIN, "ssf(include_downsample=True)"): 267_264 + 2 * (4 + 2) * (128 + 256 + 512),
    (SWIN, "ia3"): 6 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024),
    (SWIN, "lora(rank=8)"): 8 * 2 * 2 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024),
    ("convnext_base", "ssf"): 255_232,
    ("convnext_base", "ssf(official=True)"): 255_232 + 2_048,
    # a norm before and a convolution after each step
    ("convnext_base", "ssf(include_downsample=True)"): 255_232 + 2 * (128 + 256 + 512) + 2 * (256 + 512 + 1024),
    # stem, then per block two norms, token MLP 384 and 196, channel MLP 3072 and 768, and the final norm
    (MIXER, "ssf"): 2 * (768 + 12 * (2 * 768 + 384 + 196 + 3072 + 768) + 768),
    (RESNET, "ssf"): 2 * (64 + sum(n * (2 * w + 4 * w) for n, w in ((3, 64), (4, 128), (6, 256), (3, 512)))),
    (RESNET, "norm"): 53_120,
}
SMALL = ("swinv2_tiny_window8_256", "convnextv2_tiny", "resmlp_12_224")


@pytest.mark.parametrize(("name", "method"), COUNTS)
def test_count(name: str, method: str) -> None:
    model = build(name)
    assert ps.plan(model, method).trainable == COUNTS[name, method] + head(model)


@pytest.mark.parametrize("name", [*dict.fromkeys(n for n, _ in COUNTS), *SMALL])
def test_classical_counts(name: str) -> None:
    model = build(name)
    fresh = head(model)
    assert fresh == HEAD * (model.num_features + 1)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    total = sum(p.numel() for p in model.parameters())
    assert ps.plan(model, "linear").trainable == fresh
    assert ps.plan(model, "full").trainable == total
    assert ps.plan(model, "bitfit").trainable == biases + fresh - HEAD
    widths = [b.point.width for b in ps.anatomy_of(model).blocks]
    if name != RESNET:
        for method in ("pfeiffer(bottleneck=8)", "adaptformer(bottleneck=8)"):
            assert ps.plan(model, method).trainable == sum(2 * 8 * d + 8 + d for d in widths) + fresh


def test_asmlp_count() -> None:
    with torch.device("meta"):
        model = asmlp.ASMLP(num_classes=HEAD)
    assert ps.plan(model, "ssf").trainable == 266_752 + head(model) == 369_252


VITS: tuple[tuple[str, dict[str, Any], int, list[str]], ...] = (  # prefix tokens, tail
    ("vit_base_patch16_224", {}, 1, ["norm"]),
    ("vit_base_patch16_224", {"global_pool": "avg"}, 1, ["fc_norm"]),
    ("vit_base_patch16_224", {"global_pool": "avg", "class_token": False}, 0, ["fc_norm"]),
    ("vit_base_patch16_gap_224", {}, 0, ["norm"]),
    ("vit_small_patch14_reg4_dinov2", {}, 5, ["norm"]),
    ("vit_medium_patch16_reg4_gap_256", {}, 4, ["fc_norm"]),
    ("deit_tiny_distilled_patch16_224", {}, 2, ["norm"]),
    ("vit_base_patch16_siglip_224", {}, 0, ["norm"]),
)


@pytest.mark.parametrize(("name", "options", "prefix", "tail"), VITS)
def test_vit_variants(name: str, options: dict[str, Any], prefix: int, tail: list[str]) -> None:
    model = build(name, **options)
    anatomy = ps.anatomy_of(model)
    assert (anatomy.prefix_tokens, [p.path for p in anatomy.tail]) == (prefix, tail)
    for method in ("linear", "full", "bitfit", "norm", "lora", "adaptformer", "ssf", "ia3", "vpt"):
        assert ps.plan(model, method).trainable > 0


REFUSED = {
    ("swinv2_tiny_window8_256", "lora"): "reads its weight",
    ("swinv2_tiny_window8_256", "lora(targets=['layers.*.attn.qkv'])"): "reads its weight",
    ("swinv2_tiny_window8_256", "ssf"): "reads its weight",
    ("swinv2_tiny_window8_256", "ia3"): "reads its weight",
    ("convnext_base", "lora"): "'q'",
    ("convnext_base", "houlsby"): "attn_out",
    ("convnext_base", "ia3"): "'k'",
    (MIXER, "houlsby"): "attn_out",
    (MIXER, "vpt"): "fixed number of tokens",
    ("resmlp_12_224", "norm"): "normalisation",
    (RESNET, "adapter"): "'mlp'",
    (RESNET, "adaptformer"): "residual stream",
    ("gmlp_s16_224", "ssf"): "residual blocks",
}


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_refusal(name: str, method: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name, method]):
        ps.plan(build(name), method)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("swinv2_tiny_window8_256", "lora(targets=[o, fc1, fc2])"),
        ("convnextv2_tiny", "lora(targets=[fc1, fc2])"),
        (MIXER, "lora(targets=[tokens_fc1, tokens_fc2, fc1])"),
        (RESNET, "lora(targets=['layer*.conv2', conv3])"),
        ("convnext_base", "ia3(targets=[fc2])"),
        ("swinv2_tiny_window8_256", "ia3(targets=[fc2])"),
    ],
)
def test_otherwise(name: str, method: str) -> None:
    assert ps.plan(build(name), method).trainable > 0


def test_swin_v2_trains_what_the_model_reads_itself() -> None:
    """``attn.qkv`` is never called: a copy that stood in by calling would be dead."""
    model, x = timm_swin.example_v2()
    settle(model)  # the norms after each branch start at zero
    base = outputs(model, x)
    ps.adapt(model, "full")
    ps.verify(model, x)
    part = adapter(model).get_submodule("layers.0.blocks.0.attn.qkv.direct")
    with torch.no_grad():
        part.weight.add_(torch.randn_like(part.weight))
    assert not torch.equal(outputs(model, x)[0], base[0])
    wanted = outputs(model, x)
    ps.merge(model)
    assert_close(outputs(model, x), wanted, "merged")


def test_last_site_of_convnext_stays() -> None:
    model, x = timm_convnext.example()
    ps.adapt(model, "ssf")
    assert not ps.plan(timm_convnext.example()[0], "ssf").mergeable
    wanted = outputs(model, x)
    with pytest.raises(MergeError, match=r"1 of \d+ edits cannot be folded into weights: norm_pre\.ssf"):
        ps.merge(model)
    ps.merge(model, partial=True)
    assert_close(outputs(model, x), wanted, "partially merged")
    assert [key for key, _ in adapter(model).parts()] == ["norm_pre.ssf"]


def test_bias_that_nobody_reads_is_not_made() -> None:
    """RMS norms have no place for a shift: the site stays instead of losing it."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=1,
        num_heads=2,
        norm_layer=timm.layers.RmsNorm,
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    ps.adapt(model, "ssf")
    wanted = outputs(model, x)
    with pytest.raises(MergeError, match=r"blocks\.0\.norm1\.ssf"):
        ps.merge(model)
    ps.merge(model, partial=True)
    assert_close(outputs(model, x), wanted, "partially merged")


def test_official_guess_of_the_channel_axis() -> None:
    """A map as wide as it has channels: the official code scales along the width, ours never."""
    model, _ = timm_convnext.example()
    x = torch.randn(1, 3, 32, 32)  # the first stage: 8 channels of 8 x 8
    ps.adapt(model, "ssf", name="ours")
    ps.adapt(model, "ssf(official=True)", name="theirs")
    seen: dict[str, Tensor] = {}
    for name in ("ours", "theirs"):
        part: Any = adapter(model, name).get_submodule("stem.0.ssf")
        part.register_forward_hook(lambda m, i, o, name=name: seen.update({f"{name}_in": i[0], name: o}))
        ps.activate(model, name)
        model(x)
        scale, shift = part.scale.flatten(), part.shift.flatten()
        axis = (-1,) if name == "theirs" else (-1, 1, 1)
        torch.testing.assert_close(seen[name], seen[f"{name}_in"] * scale.view(axis) + shift.view(axis))


def test_ia3_formula() -> None:
    model, x = timm_vit.example()
    ps.adapt(model, "ia3")
    randomise(adapter(model))
    seen: dict[str, Tensor] = {}
    block: Any = model.blocks[0]
    qkv: Any = adapter(model).get_submodule("blocks.0.attn.qkv.ia3")
    ff: Any = adapter(model).get_submodule("blocks.0.mlp.fc2.ia3")
    block.attn.qkv.register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o))
    block.mlp.act.register_forward_hook(lambda m, i, o: seen.update(act=o))
    block.mlp.fc2.register_forward_hook(lambda m, i, o: seen.update(fc2=o))
    model(x)
    plain = nn.functional.linear(seen["x"], block.attn.qkv.weight, block.attn.qkv.bias)
    scale = torch.cat((torch.ones(24), qkv.scale))
    torch.testing.assert_close(seen["y"], plain * scale)
    wanted = nn.functional.linear(seen["act"] * ff.scale, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(seen["fc2"], wanted)


@pytest.mark.parametrize(
    "names", [("lora(rank=2, targets=[v, fc2])", "ia3"), ("ia3", "lora(rank=2, targets=[v, fc2])")]
)
def test_input_scales_fold_after_everything_else(names: tuple[str, str]) -> None:
    model, x = timm_vit.example()
    for i, method in enumerate((*names, "lora(dora=True, targets=[fc2])")):
        ps.adapt(model, method, name=f"a{i}")
        randomise(adapter(model, f"a{i}"))
    ps.activate(model, "a0", "a1", "a2")
    wanted = outputs(model, x)
    ps.merge(model)
    assert_close(outputs(model, x), wanted, "merged")


def test_input_scales_stay_where_something_reads_the_scaled_input() -> None:
    model, x = timm_vit.example()
    ps.adapt(model, "ia3", name="scales")
    ps.adapt(model, "parallel-adapter(bottleneck=3)", name="beside")
    for name in ("scales", "beside"):
        randomise(adapter(model, name))
    ps.activate(model, "scales", "beside")
    wanted = outputs(model, x)
    ps.merge(model, partial=True)
    assert_close(outputs(model, x), wanted, "partially merged")


@pytest.mark.parametrize(
    "example",
    [
        timm_swin.example,
        timm_swin.example_v2,
        timm_convnext.example,
        timm_convnext.example_v2,
        timm_mixer.example,
        timm_mixer.example_resmlp,
        timm_vit.example,
        asmlp.example,
    ],
)
def test_described_forwards_are_the_models_own(example: Any) -> None:
    """``branch`` overrides a block's forward; with a part that adds nothing the output stays, bit for bit."""
    model, x = example()
    base = outputs(model, x)
    if example is asmlp.example:
        ps.adapt(model, "adapter(bottleneck=3)")  # on [B, C, H, W]
    else:
        ps.adapt(model, "adaptformer(bottleneck=3, dropout=0)")
    assert_close(outputs(model, x), base, "a fresh adapter", 1e-6)
    randomise(adapter(model))
    ps.verify(model, x)


def test_frozen_statistics() -> None:
    model, x = timm_resnet.example()
    ps.adapt(model, "ssf").train()
    before = model.bn1.running_mean.clone()
    model(x)
    assert torch.equal(model.bn1.running_mean, before)


def transformers_models() -> dict[str, Any]:
    library = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    clip = library.CLIPVisionConfig(**size, intermediate_size=32, projection_dim=8)
    swiglu = library.Dinov2Config(**size, mlp_ratio=2, use_swiglu_ffn=True, drop_path_rate=0.1)
    registers = library.Dinov2WithRegistersConfig(**size, mlp_ratio=2, num_register_tokens=3)
    vit = library.ViTConfig(**size, intermediate_size=32)
    return {
        "vit": library.ViTModel(vit),
        "vit-head": library.ViTForImageClassification(vit),
        "dinov2": library.Dinov2Model(swiglu),
        "dinov2-head": library.Dinov2ForImageClassification(swiglu),
        "registers": library.Dinov2WithRegistersModel(registers),
        "clip": library.CLIPVisionModel(clip),
        "clip-projection": library.CLIPVisionModelWithProjection(clip),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers(attention: str) -> None:
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    for name, model in transformers_models().items():
        model.eval()
        model.set_attn_implementation(attention)
        anatomy = ps.anatomy_of(model)
        assert anatomy.prefix_tokens == (4 if name == "registers" else 1)
        assert bool(anatomy.fresh) == name.endswith("head")
        base = outputs(model, batch)
        for method in ("full", "bitfit", "norm", "lora", "houlsby", "adaptformer", "ssf", "ia3", "parallel-adapter"):
            if name.startswith("dinov2") and method == "houlsby":
                with pytest.raises(UnsupportedError, match="drop1"):  # one drop path serves both branches
                    ps.plan(model, "houlsby(outside=True)")
            ps.adapt(model, method)
            randomise(adapter(model))
            ps.verify(model, batch)
            ps.remove(model)
            assert_close(outputs(model, batch), base, f"{name} after {method}", 0.0)
        if anatomy.norm is not None:
            for method in ("vpt(num_tokens=2)", "vpt(num_tokens=2, deep=True)"):
                ps.adapt(model, method)
                ps.verify(model, batch)
                assert outputs(model, batch)[0].shape == base[0].shape
                ps.remove(model)


def test_transformers_hidden_states() -> None:
    """The library's own recording of layers goes on beside ours."""
    model = transformers_models()["vit-head"].eval()
    ps.adapt(model, "adaptformer")
    randomise(adapter(model))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "output_hidden_states": True, "output_attentions": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sdpa gives no attention maps
        found = call(model, batch)
    assert len(found.hidden_states) == 3


def test_reentrant_checkpointing_is_refused() -> None:
    model = transformers_models()["vit-head"]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="reentrant"):
        ps.adapt(model, "ssf")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ps.adapt(model, "ssf")


def test_support_matrix() -> None:
    table = matrix()
    assert {"ssf", "ia3", "lora", "vpt", "full"} <= table.keys()
    assert all(verdict for row in table.values() for verdict in row.values())
    for name in ("linear", "full", "bitfit", "norm", "lora", "adaptformer", "ssf", "ia3", "vpt"):
        assert table[name]["timm-vit"] == YES
    assert table["lora"]["timm-convnext"].startswith(f"{YES} as `lora(targets=[fc1, fc2])`; by default: ")
    text = markdown()
    assert "| `ssf` |" in text and "only feature maps" in text
