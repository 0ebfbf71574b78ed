"""VPT beyond plain prompts: Swin, layer ranges, sharing, prompts added to tokens, pixels around and below."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.vision.anatomies.swin_prompts import prompted_block


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | options).eval()


def swin(**options: Any) -> Any:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **size | options, num_classes=5).eval()


def parameters(model: Any) -> dict[str, nn.Parameter]:
    found = dict(model.adapters["default"].named_parameters())
    return {n: p for n, p in found.items() if ".trained." not in n}


def louder(model: Any) -> Any:
    with torch.no_grad():
        for p in parameters(model).values():
            p.copy_(torch.randn_like(p))
    return model


# ---- Swin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("options", [{}, {"img_size": 40}, {"depths": (2, 2, 2), "num_heads": (2, 2, 2)}])
def test_swin_samples_do_not_see_each_other(deep: bool, options: dict[str, Any]) -> None:
    model = louder(ps.adapt(swin(**options), f"vpt(num_tokens=3, deep={deep})"))
    side = options.get("img_size", 32)
    x = torch.randn(4, 3, side, side)
    together = model(x)
    torch.testing.assert_close(together, torch.cat([model(one[None]) for one in x]), atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_swin_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    assert ps.plan(model, "vpt(num_tokens=10)").trainable == 10 * 128
    deep = 10 * (2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024)
    assert ps.plan(model, "vpt(num_tokens=10, deep=True)").trainable == deep


def test_every_window_reads_the_prompts_and_the_pool_counts_them() -> None:
    model = ps.adapt(swin(), "vpt(num_tokens=3)")
    x = torch.randn(2, 3, 32, 32)
    before = model.forward_features(x)
    assert before.shape == (2, 1, 16 + 3, 32)  # 4x4 patches and the prompts, packed
    assert torch.allclose(model(x), model.head.fc(before.mean((1, 2))), atol=1e-6)
    louder(model)
    moved = (model.forward_features(x) - before).abs().amax(3)
    assert bool((moved > 1e-4).all())


def test_one_window_is_attention_over_patches_and_prompts() -> None:
    """Where a map is one window, its block is a plain transformer block over all tokens, prompts without bias."""
    model = louder(ps.adapt(swin(img_size=16, depths=(1,), num_heads=(2,)), "vpt(num_tokens=3)"))
    block: Any = model.layers[0].blocks[0]
    patches = model.patch_embed(torch.randn(2, 3, 16, 16))
    prompts = parameters(model)["layers.0.blocks.0.vpt.prompt"].expand(2, -1, -1)
    z = torch.cat([prompts, patches.flatten(1, 2)], 1)
    n = block.norm1(z)
    q, k, v = block.attn.qkv(n).reshape(2, 19, 3, 2, 8).permute(2, 0, 3, 1, 4)
    bias = F.pad(block.attn._get_rel_pos_bias(), (3, 0, 3, 0))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    z = z + block.attn.proj(out)
    z = z + block.mlp(block.norm2(z))
    wanted = torch.cat([z[:, 3:], z[:, :3]], 1)[:, None]
    torch.testing.assert_close(block(patches), wanted, atol=1e-5, rtol=1e-4)


def test_patches_alone_agree_with_the_plain_block() -> None:
    """Prompts that no patch attends to leave the patches as they are: shifted windows, padding and mask included."""

    class Far(nn.Module):
        active = True

        def through(self, place: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, torch.zeros(len(x), 0, x.shape[3])

        def attn(self, x: torch.Tensor, h: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            return h

        mlp = attn

    model = swin(img_size=40)
    x = model.patch_embed(torch.randn(2, 3, 40, 40))
    for block in model.layers[0].blocks:
        found = prompted_block(block, Far(), x)  # type: ignore[arg-type]
        torch.testing.assert_close(found[:, 0].unflatten(1, x.shape[1:3]), block(x), atol=1e-5, rtol=1e-4)


def test_merging_repeats_prompts_four_times() -> None:
    model = louder(ps.adapt(swin(), "vpt(num_tokens=3)"))
    merge: Any = model.layers[1].downsample
    packed = torch.randn(2, 1, 64 + 3, 16)
    found = merge(packed)
    prompts = packed[:, 0, 64:]
    torch.testing.assert_close(found[:, 0, 16:], merge.reduction(merge.norm(torch.cat([prompts] * 4, 2))))
    with ps.disabled(model):
        plain = merge(packed[:, 0, :64].unflatten(1, (8, 8)))
    torch.testing.assert_close(found[:, 0, :16].unflatten(1, (4, 4)), plain)


def test_swin_bound_is_that_of_stage_zero() -> None:
    model = ps.adapt(swin(), "vpt(num_tokens=50, deep=True)")
    bound = (6 / (3 * 16 + 16)) ** 0.5
    for p in parameters(model).values():
        assert 0.9 * bound < float(p.detach().abs().max()) <= bound


# ---- layers, sharing ---------------------------------------------------------------------------------------------


def places(model: Any) -> list[str]:
    return sorted(n for n, p in model.adapters["default"].parts() if any(True for _ in p.parameters()) and "vpt" in n)


def test_ranges_from_the_end_and_shared_prompts() -> None:
    model = ps.adapt(vit(), "vpt(num_tokens=3, deep=True, first_block=-2)")
    assert places(model) == ["blocks.2.vpt", "blocks.3.vpt"]
    model = ps.adapt(vit(), "vpt(num_tokens=3, deep=True, shared=True)")
    assert places(model) == ["norm_pre.vpt"] and sum(p.numel() for p in parameters(model).values()) == 3 * 24
    tied = louder(model)
    separate = ps.adapt(vit(), "vpt(num_tokens=3, deep=True)")
    with torch.no_grad():
        for p in parameters(separate).values():
            p.copy_(parameters(tied)["norm_pre.vpt.prompt"])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tied(x), separate(x))
    with pytest.raises(UnsupportedError, match="has 4"):
        ps.plan(vit(), "vpt(deep=True, first_block=-5)")


def test_flowing_prompts() -> None:
    """The last prompts run on to the end; with one prompted block that is the shallow form from there on."""
    x = torch.randn(2, 3, 32, 32)
    shallow = louder(ps.adapt(vit(), "vpt(num_tokens=3)"))
    flowing = ps.adapt(vit(), "vpt(num_tokens=3, deep=True, num_blocks=1, flow=True)")
    cut = ps.adapt(vit(), "vpt(num_tokens=3, deep=True, num_blocks=1)")
    for model in (flowing, cut):
        with torch.no_grad():
            parameters(model)["norm_pre.vpt.prompt"].copy_(parameters(shallow)["norm_pre.vpt.prompt"])
    assert torch.equal(flowing(x), shallow(x))
    assert (cut(x) - shallow(x)).abs().max() > 1e-3
    whole = louder(ps.adapt(vit(), "vpt(num_tokens=3, deep=True, flow=True)"))
    plain = ps.adapt(vit(), "vpt(num_tokens=3, deep=True)")
    plain.adapters["default"].load_state_dict(whole.adapters["default"].state_dict())
    torch.testing.assert_close(whole(x), plain(x))


# ---- other locations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_added_prompts(deep: bool) -> None:
    x = torch.randn(2, 3, 32, 32)
    each = louder(ps.adapt(vit(), f"vpt(location=add, deep={deep})"))
    blocks = 4 if deep else 1
    assert [tuple(p.shape) for p in parameters(each).values()] == [(17, 24)] * blocks
    one = louder(ps.adapt(vit(), f"vpt(location='add-1', deep={deep})"))
    assert [tuple(p.shape) for p in parameters(one).values()] == [(1, 24)] * blocks
    with torch.no_grad():
        for name, p in parameters(each).items():
            p.copy_(parameters(one)[name].expand(17, -1))
    torch.testing.assert_close(each(x), one(x))
    zero = ps.adapt(vit(), f"vpt(location=add, deep={deep}, init=zero)")
    assert torch.equal(zero(x), vit()(x))


def test_a_border_around_images_of_free_size() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet18", num_classes=5).eval()
    plain = timm.create_model("resnet18", num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    ps.adapt(model, "vpt(location=pad, num_tokens=4, image_size=32)")
    values = parameters(model)
    assert {n: tuple(p.shape) for n, p in values.items()} == {
        "conv1.vpt.rows": (3, 8, 40),
        "conv1.vpt.columns": (3, 32, 8),
    }
    assert all(float(p.min()) >= 0 and float(p.max()) <= 1 for p in (v.detach() for v in values.values()))
    x = torch.randn(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows, columns = ((values[f"conv1.vpt.{n}"] - mean) / std for n in ("rows", "columns"))
    big = torch.empty(2, 3, 40, 40)
    big[..., 4:36, 4:36] = x
    big[..., :4, :], big[..., 36:, :] = rows[:, :4], rows[:, 4:]
    big[..., 4:36, :4], big[..., 4:36, 36:] = columns[..., :4], columns[..., 4:]
    torch.testing.assert_close(model(x), plain(big))
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 5)  # scaled


def test_a_border_inside_fixed_images() -> None:
    model = ps.adapt(vit(), "vpt(location=pad, num_tokens=4)")
    shapes = {n.rpartition(".")[2]: tuple(p.shape) for n, p in parameters(model).items()}
    assert shapes == {"rows": (3, 8, 32), "columns": (3, 24, 8)}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(UnsupportedError, match="leaves nothing"):
        ps.plan(vit(), "vpt(location=pad, num_tokens=16)")


def test_channels_below_are_a_wider_convolution() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet18", num_classes=5).eval()
    ps.adapt(model, "vpt(location=below, num_tokens=2, image_size=32)")
    x = torch.randn(2, 3, 32, 32)
    part = model.adapters["default"].get_submodule("conv1.vpt")
    extra = (part.channels - 0.449) / 0.226
    wide = torch.cat([x, extra.expand(2, -1, -1, -1)], 1)
    weight = torch.cat([model.conv1.weight, part.weight], 1)
    torch.testing.assert_close(model.conv1(x), F.conv2d(wide, weight, None, 2, 3), atol=1e-4, rtol=1e-4)


def test_configurations_that_mean_nothing() -> None:
    for text in (
        "vpt(location=pad, deep=True)",
        "vpt(shared=True)",
        "vpt(flow=True)",
        "vpt(location=add, deep=True, flow=True)",
    ):
        with pytest.raises(ConfigError):
            ps.plan(vit(), text)
    with pytest.raises(UnsupportedError, match="each stage's own width"):
        ps.plan(swin(), "vpt(deep=True, num_blocks=1)")
