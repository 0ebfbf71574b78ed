"""DAPT: the blocks against their formula, what trains, prompts, what folds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import ConfigError, MergeError, UnsupportedError
from peft_suite.pointcloud.anatomies import pointgpt, recon, segmenter
from peft_suite.pointcloud.anatomies.point_transformer import clouds, example, example_bert, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.testing.case import randomise

FAMILIES = {"plain": example, "bert": example_bert, "recon": recon.example, "pointgpt": pointgpt.example}
OPTIONS = (
    "dapt(rank=3)",
    "dapt(rank=3, positions=every, prompt_token=max, patch_token=mean)",
    "dapt(rank=3, prompt_token=None)",
    "dapt(rank=3, patch_token=None, dropout=0.2)",
    "dapt(rank=3, class_token=False, patch_token=None)",
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def adapted(method: str, **options: object) -> tuple[Any, Any]:
    """With random values, as if it had been trained."""
    model: Any = ps.adapt(tiny(**options), method)
    randomise(model.adapters["default"])
    return model, model.adapters["default"]


def test_counts_on_point_mae() -> None:
    """Published; where no prompt reaches the classifier, without the two vectors of the last one, which do nothing."""
    cases = ((15, {"rank": 64}, 1_087_771), (40, {"rank": 72, "prompt_token": None}, 1_069_716 - 2 * 384))
    for classes, options, wanted in cases:
        with torch.device("meta"):
            model = backbones.build("point-mae", classes, pretrained=False, checkpoint="", options={})
        assert ps.plan(model, {"name": "dapt", **options}).trainable == wanted


@pytest.mark.parametrize("positions", ["once", "every"])
def test_blocks_follow_the_formula(positions: str) -> None:
    model, adapter = adapted(f"dapt(rank=3, positions={positions})", depth=3)
    batch = clouds()
    found = model.forward_features(batch)
    part = adapter.get_submodule

    def s(path: str, x: Tensor) -> Tensor:
        return x * part(path).scale + part(path).shift

    own = adapter.get_submodule("direct")
    with ps.disabled(model):
        geometry = model.group_divider(batch)
        tokens = s("embed.dapt_scale", model.encoder(geometry.groups))
        x = torch.cat((own.cls_token.expand(3, -1, -1), tokens), dim=1)
        pos = torch.cat((own.cls_pos.expand(3, -1, -1), model.pos_embed(geometry.centers)), dim=1)
        for i, block in enumerate(model.blocks.blocks):
            at = f"blocks.blocks.{i}"
            if i == 0 or positions == "every":
                x = x + torch.cat((pos[:, :1], torch.zeros(3, i, 24), pos[:, 1:]), dim=1)
            n, width = s(f"{at}.norm1.dapt_scale", block.norm1(x)), 12
            qkv = s(f"{at}.attn.qkv.dapt_scale", block.attn.qkv(n))
            q, k, v = qkv.view(3, -1, 3, 2, width).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.transpose(2, 3)) / width**0.5).softmax(3) @ v
            mixed = block.attn.proj(mixed.transpose(1, 2).flatten(2))
            x = x + s(f"{at}.attn.proj.dapt_scale", mixed)
            y = s(f"{at}.norm2.dapt_scale", block.norm2(x))
            a = part(f"{at}.dapt")
            n = a.norm(y)
            delta = F.relu(a.gate(n)) * a.up(F.gelu(a.down(n)))
            h = F.gelu(s(f"{at}.mlp.fc1.dapt_scale", block.mlp.fc1(y)))
            x = x + s(f"{at}.mlp.fc2.dapt_scale", block.mlp.fc2(h)) + delta
            prompt = s(f"{at}.dapt_prompt", F.gelu(delta).mean(1, keepdim=True))
            x = torch.cat((x[:, :1], prompt, x[:, 1:]), dim=1)
        wanted = s("norm.dapt_scale", model.norm(x))
    assert found.shape[1] == 1 + 3 + 8
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    feature = torch.cat((wanted[:, 0], wanted[:, 1:4].mean(1), wanted[:, 4:].amax(1)), dim=1)
    torch.testing.assert_close(model(batch), model.cls_head_finetune(feature), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_gives_the_shift_as_prompt() -> None:
    model: Any = ps.adapt(tiny(depth=3), "dapt(rank=3)")
    outputs: list[Tensor] = []
    for block in model.blocks.blocks:
        block.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(clouds())
    for i, out in enumerate(outputs):
        part = model.adapters["default"].get_submodule(f"blocks.blocks.{i}.dapt_prompt")
        torch.testing.assert_close(out[:, 1], part.shift.expand(3, -1))
        assert out.shape[1] == 1 + 8 + i + 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", OPTIONS)
def test_everything_it_adds_trains(family: str, method: str) -> None:
    model, batch = FAMILIES[family]()
    base = model(batch)
    if family == "recon" and "class_token=False" in method:
        with pytest.raises(UnsupportedError, match="queries"):
            ps.adapt(model, method)
        return
    ps.adapt(model, method)
    found = ps.verify(model, batch)
    assert found["parameters"] == sum(p.requires_grad for p in model.parameters())
    assert not [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("adapters.")]
    assert model.train()(batch).shape == base.shape
    model.eval()
    ps.remove(model)
    assert torch.equal(model(batch), base)


def test_scales_fold_and_the_rest_is_named() -> None:
    model, _ = adapted("dapt(rank=3)")
    batch = clouds()
    wanted = model(batch)
    with pytest.raises(MergeError, match="dapt"):
        ps.merge(model)
    ps.merge(model, partial=True)
    torch.testing.assert_close(model(batch), wanted, atol=1e-5, rtol=1e-5)
    left = {key for key, _ in model.adapters["default"].parts()}
    assert not any(key.endswith("dapt_scale") for key in left - {"embed.dapt_scale"})
    assert {"embed.dapt_scale", "blocks.blocks.0.dapt", "pool.dapt", "cls_head_finetune.0.dapt_head"} <= left
    assert isinstance(model.blocks.blocks[0].attn.qkv.bias, nn.Parameter)


def test_two_forwards_under_checkpointing() -> None:
    """What the adapter leaves for the prompt belongs to one call of a block."""
    model, adapter = adapted("dapt(rank=3)")
    grads, batch = [], clouds()
    for on in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(on)
        for block in model.blocks.blocks:
            block.train()
            block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
        first, second = model(batch), model(batch.flip(1))
        (first.square().sum() + second.sum()).backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="classifier of whole clouds"):
        ps.adapt(segmenter.example()[0], "dapt")
    with pytest.raises(ConfigError, match="class_token"):
        ps.adapt(tiny(), "dapt(class_token=False, prompt_token=None, patch_token=None)")
