"""Closed-form parameter counts on the real ViT-B/16, as the method cards and the documentation state them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import peft_suite as ps

D, L, HEAD = 768, 12, 100 * 768 + 100
LN, MLP = 2 * D, 2 * (4 * D + D)
COUNTS = {
    "linear": HEAD,
    "full": 85_798_656 + HEAD,
    "bitfit": D + L * (D + 3 * D + D + D + 4 * D + D) + D + HEAD,
    "norm": (2 * L + 1) * LN + HEAD,
    "norm(bias=False)": (2 * L + 1) * D + HEAD,
    "lora": L * 2 * (8 * D + D * 8) + HEAD,
    "lora(targets=[q,k,v,o,fc1,fc2])": L * 8 * (4 * 2 * D + 2 * 5 * D) + HEAD,
    "lora(targets=[q,k,v], shared_a=True)": L * 8 * (D + 3 * D) + HEAD,
    "adaptformer": L * (2 * D * 64 + 64 + D) + HEAD,
    "adaptformer(bottleneck=8)": L * (2 * D * 8 + 8 + D) + HEAD,
    "adapter(bottleneck=8, bias=False)": L * 2 * D * 8 + HEAD,
    "pfeiffer(bottleneck=8)": L * (2 * D * 8 + 8 + D) + HEAD,
    "houlsby(bottleneck=8)": 2 * L * (2 * D * 8 + 8 + D) + HEAD,
    "ssf": LN + L * (2 * LN + 2 * 3 * D + 2 * D + MLP) + LN + HEAD,
    "vpt(num_tokens=50)": 50 * D + HEAD,
    "vpt(num_tokens=50, deep=True)": L * 50 * D + HEAD,
    "vpt(num_tokens=10, deep=True, project=64)": L * 10 * 64 + 64 * D + D + HEAD,
}


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=100)


@pytest.mark.parametrize("method", COUNTS)
def test_count(vit: torch.nn.Module, method: str) -> None:
    plan = ps.plan(vit, method)
    assert plan.trainable == COUNTS[method]
    assert plan.adapter_bytes == 4 * COUNTS[method]
    ps.adapt(vit, method)
    summary = ps.summary(vit)
    ps.remove(vit)
    assert (summary.trainable, summary.total) == (plan.trainable, plan.total)


def test_documented_counts() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \|", text, flags=re.M)
    assert len(rows) >= 11
    for method, count in rows:
        assert int(count.replace(",", "")) == COUNTS[method], method
