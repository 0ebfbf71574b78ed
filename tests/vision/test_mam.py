"""MAM: closed counts, the gated reading of prefixes, masks, reparametrisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import peft_suite as ps
from peft_suite.errors import AdapterError, UnsupportedError
from peft_suite.vision.methods.mam import Prefix, compact


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | options).eval()


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("mam", 599_232),
        ("mam(bottleneck=0)", 294_912),
        ("mam(prefix=30, bottleneck=0)", 552_960),
        ("mam(prefix=0, bottleneck=64)", 1_189_632),
        ("mam(prefix=0, bottleneck=8)", 156_768),
        ("mam(bottleneck=0, hidden=800)", 16 * 768 + 768 * 800 + 800 + 2 * 12 * 768 * 801),
    ],
)
def test_counts_on_vit_b(method: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert ps.plan(model, method).trainable == count


@pytest.mark.parametrize("source", ["sublayer", "residual"])
def test_without_prefixes_a_fresh_adapter_is_an_identity_bit_for_bit(source: str) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    base = model(x)
    ps.adapt(model, f"mam(prefix=0, source={source})")
    assert torch.equal(model(x), base)


def test_keys_that_nothing_attends_to_leave_the_model_as_it_is() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    for block in model.blocks:  # one query direction for all tokens, and prefix keys far against it
        with torch.no_grad():
            block.attn.qkv.bias[:24] = 3.0
    base = model(x)
    ps.adapt(model, "mam(prefix=3)")
    with torch.no_grad():
        for _, part in model.adapters["default"].parts():
            if isinstance(part, Prefix):
                part.prefix[0] = -50.0
    torch.testing.assert_close(model(x), base)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"reg_tokens": 2}])
def test_gated_reading(options: dict[str, Any]) -> None:
    """Attention with prefixes = (1 - g) * attention + g * softmax(q P_k) P_v."""
    model = vit(**options)
    attn: Any = model.blocks[0].attn
    x = torch.randn(2, 17, 24)
    ps.adapt(model, "mam(prefix=3, bottleneck=0)")
    part = model.adapters["default"].get_submodule("blocks.0.attn.mam_prefix")
    nn.init.normal_(part.prefix)
    found = attn(x)
    qkv = attn.qkv(x).reshape(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]) * attn.scale, attn.k_norm(qkv[1]), qkv[2]
    pk, pv = part.prefix.reshape(2, 3, 2, 12).transpose(1, 2)
    own, extra = (q @ k.transpose(-2, -1)).exp(), (q @ pk.transpose(-2, -1)).exp()
    gate = extra.sum(-1, keepdim=True) / (extra.sum(-1, keepdim=True) + own.sum(-1, keepdim=True))
    plain, prefix = (own / own.sum(-1, keepdim=True)) @ v, (extra / extra.sum(-1, keepdim=True)) @ pv
    wanted = attn.proj(((1 - gate) * plain + gate * prefix).transpose(1, 2).reshape(2, 17, 24))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["float", "bool", "causal"])
def test_masks_leave_prefixes_visible(how: str) -> None:
    model = vit()
    attn: Any = model.blocks[0].attn
    x = torch.randn(2, 5, 24)
    ps.adapt(model, "mam(prefix=2, bottleneck=0)")
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    if how == "causal":
        found = attn(x, is_causal=True)
    else:
        mask = allowed if how == "bool" else torch.zeros(5, 5).masked_fill(~allowed, float("-inf"))
        found = attn(x, attn_mask=mask)
    for i in range(5):  # query i alone, with the tokens it may see
        torch.testing.assert_close(attn(x[:, : i + 1])[:, i], found[:, i])


def test_reparametrised_prefixes_become_plain_ones(tmp_path: Path) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    ps.adapt(model, "mam(prefix=3, hidden=7, bottleneck=4)")
    wanted = model(x)
    large = ps.summary(model).adapter_bytes
    compact(model)
    torch.testing.assert_close(model(x), wanted)
    assert ps.summary(model).adapter_bytes < large
    assert ps.summary(model).trainable == 2 * 2 * 3 * 24 + 2 * (2 * 24 * 4 + 4 + 24) + 24 * 5 + 5
    ps.save(model, tmp_path)
    fresh = vit()
    ps.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(AdapterError, match="no reparametrised"):
        compact(model)


def test_refusals() -> None:
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UnsupportedError, match="'prefix'"):
        ps.plan(swin, "mam")
    assert ps.plan(swin, "mam(prefix=0)").trainable > 0
