"""A frozen norm before a matrix with LoRA keeps its output for backward, not its input."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.methods.trained_norm import FrozenNorm


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients, bytes kept for backward."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.square().sum(), wanted)), sum(kept.values())


@pytest.mark.parametrize("targets", ["[q, v]", "[q, k, v, fc1]"])
def test_the_same_values_and_gradients_from_less(vit: nn.Module, targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 32, 32)
    model = ps.adapt(copy.deepcopy(vit), f"lora(rank=2, targets={targets}, init=official)").train()
    y, ours, kept = gradients(model, x)
    monkeypatch.setattr(FrozenNorm, "direct", lambda *_: False)
    want, theirs, usual = gradients(model, x)
    assert torch.equal(y, want)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    norms = 2 * (2 if "fc1" in targets else 1)  # of the blocks behind the first, whose input asks for no gradient
    norms += 1 if "fc1" in targets else 0  # norm2 of the first block
    assert usual - kept >= norms * 4 * 17 * 32 * 4 * 0.9


def test_norms_that_would_drown_the_input_work_as_usual(vit: nn.Module) -> None:
    model = copy.deepcopy(vit)
    model.blocks[1].norm1.weight.data[3] = 1e-6
    ps.adapt(model, "lora(rank=2)").train()
    norms = {e.path: e.part for e in model.adapters["default"].edits if isinstance(e.part, FrozenNorm)}
    assert set(norms) == {f"blocks.{i}.norm1" for i in range(3)}
    x = torch.randn(1, 17, 32, requires_grad=True)
    acts = {path: norms[path].direct(n.weight, n.bias, x) for path in norms for n in [model.get_submodule(path)]}
    assert acts == {"blocks.0.norm1": True, "blocks.1.norm1": False, "blocks.2.norm1": True}
    with torch.no_grad():  # a change of the weights is seen
        model.blocks[1].norm1.weight[3] = 1.0
    norm = model.blocks[1].norm1
    assert norms["blocks.1.norm1"].direct(norm.weight, norm.bias, x)


def test_it_is_not_counted_nor_shown_and_merges(vit: nn.Module) -> None:
    model = ps.adapt(copy.deepcopy(vit), "lora(rank=2, init=official)").eval()
    assert [row.point for row in ps.plan(vit, "lora(rank=2)").rows] == [
        *(f"blocks.{i}.attn.qkv" for i in range(3)),
        "head",
    ]
    assert not any("kept" in row.key for row in ps.summary(model).rows)
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    torch.testing.assert_close(ps.merge(model)(x), want, rtol=1e-5, atol=1e-5)
