"""IDPT below the part-segmentation head: where prompts enter and leave, what the head reads, what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peft_suite as ps
from peft_suite.errors import UnsupportedError
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.anatomies.segmenter import example, example_bert
from peft_suite.pointcloud.backbones import part_backbones
from peft_suite.pointcloud.models.segmentation import PartSegmenter

OFFICIAL = 5_686_066
NEVER_CALLED = 3 * 2 * 384  # parameters of a batch norm that each official generator counts and never calls


def adapted(method: str = "idpt", **options: Any) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A model of six blocks, of which 1, 3 and 5 are read, a batch and the adapter."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 6, "num_heads": 2, "groups": 8, "group_size": 6, **options}
    model: Any = PartSegmenter(6, categories=3, **sizes).eval()
    ps.adapt(model, method)
    batch = {"points": clouds(), "category": torch.tensor([0, 2, 1])}
    adapter: Any = model.adapters["default"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, batch, adapter


def test_trainable_on_point_mae_is_the_published_count() -> None:
    with torch.device("meta"):
        model = part_backbones.build("point-mae", 50, pretrained=False, checkpoint="", options={})
    assert ps.plan(model, "idpt").trainable == OFFICIAL - NEVER_CALLED
    assert ps.plan(model, "idpt(train_position=False)").trainable == OFFICIAL - NEVER_CALLED - 384


@pytest.mark.parametrize("taps", [(1, 3, 5), (0, 1, 2), (0, 2, 3)])
def test_head_reads_prompts_before_and_after_the_blocks(taps: tuple[int, int, int]) -> None:
    """Against the formula, block by block; also where one prompted block follows the other."""
    model, batch, adapter = adapted(taps=taps)
    seen: dict[str, Any] = {}
    model.convs1.register_forward_hook(lambda m, args, out: seen.update(cloud=args[1]))
    model.propagation_0.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    found = model(**batch)
    parts = {t: adapter.get_submodule(f"blocks.blocks.{t}.idpt") for t in taps}
    position = parts[taps[0]].position
    before, after, patches = [], [], []
    with torch.no_grad(), ps.disabled(model):
        g = model.group_divider(batch["points"])
        x, pos = model.encoder(g.groups), model.pos_embed(g.centers)
        for t, block in enumerate(model.blocks.blocks):
            if t in taps:
                prompt = parts[t].generator(x, pos)
                x = block(torch.cat((prompt, x), 1), torch.cat((position.expand(3, -1, -1), pos), 1), g)
                before.append(model.norm(prompt)[:, 0])
                after.append(model.norm(x)[:, 0])
                x = x[:, 1:]
                patches.append(model.norm(x))
            else:
                x = block(x, pos, g)
    torch.testing.assert_close(seen["x"], torch.cat(patches, dim=2))
    torch.testing.assert_close(seen["cloud"][:, :144], torch.cat((*before, *after), dim=1))
    assert found.shape == (3, 40, 6)


def test_nothing_else_reaches_the_head_and_all_of_it_trains() -> None:
    model, batch, adapter = adapted()
    model.train()
    model(**batch).square().mean().backward()
    assert not [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("adapters.")]
    names = {n.partition(".idpt.")[2].partition(".")[0] for n in dict(adapter.named_parameters()) if ".idpt." in n}
    assert names == {"generator", "position"}
    positions = [n for n, _ in adapter.named_parameters() if n.endswith(".position")]
    assert positions == ["blocks.blocks.1.idpt.position"]  # one, of all three prompts


def test_prompts_differ_from_cloud_to_cloud_and_not_with_the_batch() -> None:
    model, batch, _ = adapted()
    whole = model(**batch)
    alone = torch.cat([model(batch["points"][i : i + 1], batch["category"][i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    model, batch, adapter = adapted(drop_path=0.0)
    model.train()
    model.dp1.p = 0.0
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(**batch).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_refusals() -> None:
    for option in ("prompt_layer=0", "cls_type=promptonly"):
        with pytest.raises(UnsupportedError, match="says itself where prompts enter"):
            ps.adapt(example()[0], f"idpt({option})")
    with pytest.raises(UnsupportedError, match="classifier of whole clouds"):
        ps.adapt(example_bert()[0], "idpt")  # its head reads no feature of the whole cloud
