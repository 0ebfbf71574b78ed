"""Any2Point: sizes, and the method against loops over voxels and cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import (
    ConfigError,
    UnsupportedError,
)
from peft_suite.pointcloud.anatomies.any2point import tiny_audio, tiny_language, tiny_vision
from peft_suite.pointcloud.anatomies.point_transformer import clouds, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.methods.any2point_parts import KEY, Guide, Mixing
from peft_suite.pointcloud.models.any2point_positions import PLANE
from peft_suite.pointcloud.shapes import TARGET, target_cloud
from peft_suite.testing.case import randomise, settle

MODELS = {"vision": tiny_vision, "language": tiny_language, "audio": tiny_audio}
METHOD = "any2point(bottleneck=3, attention=4, heads=2, voxel=0.9"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def adapted(options: str = "", modality: str = "vision", **sizes: object) -> tuple[Any, Any]:
    """With random values, as if it had been trained."""
    model: Any = MODELS[modality](**sizes)
    settle(model)
    ps.adapt(model, f"{METHOD}{options})")
    randomise(model.adapters["default"])
    return model, model.adapters["default"]


def built(name: str, **options: object) -> Any:
    return backbones.build(name, 15, pretrained=False, checkpoint="", options=options)


def count(module: nn.Module, *names: str) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if not names or any(name in n for name in names))


def test_counts_on_dinov2() -> None:
    with torch.device("meta"):
        model = built("any2point-vision")
        ps.adapt(model, "any2point")
    adapter, dim = model.adapters["default"], 768
    guides = [p for _, p in adapter.parts() if isinstance(p, Guide)]
    mixing = guides[0].shared[0]
    assert isinstance(mixing, Mixing) and all(g.shared[0] is mixing for g in guides)
    assert count(model.encoder) == 276_672
    assert count(adapter, "any2point_adapter") == 156_768
    assert sum(count(g.norm_2d) for g in guides) == 110_592
    assert sum(count(g.norm_3d) for g in guides) == 18_432
    assert count(mixing.qkv) + count(mixing.proj) == 226_008
    assert mixing.gain.numel() + mixing.shift.numel() == 9_216
    assert model.cls_token.numel() + model.cls_pos.numel() == 2 * dim
    assert count(model.norm) == 2 * dim
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained - count(model.cls_head_finetune) == 800_760


def test_settings_follow_the_modality() -> None:
    for name, width, guide, cell, voxel in (
        ("vision", 8, 0.7, 26 / 14, 0.16),
        ("language", 16, 0.3, 2, 0.08),
        ("audio", 12, 0.5, 1, 0.16),
    ):
        model: Any = ps.adapt(MODELS[name](), "any2point")
        part = model.adapters["default"].get_submodule
        assert part("blocks.blocks.0.any2point_adapter").down.out_features == width
        assert part("blocks.blocks.1.any2point").guide == guide
        assert (part("project.any2point").cell, part("project.any2point").voxel) == (cell, voxel)


def test_listed_and_prepared_as_published() -> None:
    listed = {info.name: info for info in backbones.list("any2point-*")}
    assert set(listed) == {"any2point-vision", "any2point-language", "any2point-audio"}
    assert "timm" in listed["any2point-vision"].summary and "checkpoint" not in listed["any2point-audio"].summary
    with torch.device("meta"):
        model = built("any2point-vision")
    assert model.project.grid == (37, 37) and len(model.project.table) == 1369
    facts = backbones.preprocessing("any2point-vision", model)
    assert (facts["num_points"], facts["groups"], facts["group_size"]) == (1024, 128, 64)


def by_loops(model: Any, adapter: Any, points: Tensor, official: bool, both: bool) -> Tensor:
    """The blocks of the module's text, one voxel and one cell after the other, in train mode; normed tokens."""
    part = adapter.get_submodule
    geometry = model.geometry(points)
    own, locate = part("direct"), part("project.any2point")
    tokens = model.encoder(points, geometry)
    b, g, d = tokens.shape
    x = torch.cat((own.cls_token.expand(b, -1, -1), tokens), dim=1)
    pos = torch.cat((own.cls_pos.expand(b, -1, -1), model.project.positions(geometry)), dim=1)
    away = geometry.centers - geometry.centers.amin(1, keepdim=True)
    voxels = [tuple(v.tolist()) for v in (away / locate.voxel).floor().view(b * g, 3)]
    voxels = [(i // g, *v) for i, v in enumerate(voxels)]
    spread = (geometry.extra[PLANE] * torch.tensor(model.project.grid) / locate.cell).floor()
    mixing = part("blocks.blocks.0.any2point").mixing
    width = mixing.width
    for i, block in enumerate(model.blocks.blocks):
        x = x + pos
        x = x + block.ls1(block.attn(block.norm1(x)))
        a = part(f"blocks.blocks.{i}.any2point_adapter")
        u = block.ls2(block.mlp(block.norm2(x)))
        h = a.down(u)
        x = x + u + 0.3 * a.up(h * torch.sigmoid(1.702 * h))
        guide, patches = part(f"blocks.blocks.{i}.any2point"), x[:, 1:]
        v3 = scattered(patches.flatten(0, 1), voxels, guide.norm_3d.weight, guide.norm_3d.bias, True, 0)
        seen = []
        for m in range(6):
            cells = [(k // g, *c) for k, c in enumerate(map(tuple, spread[:, m].reshape(b * g, -1).tolist()))]
            gain, shift = mixing.gain.view(6, d)[m], mixing.shift.view(6, d)[m]
            n = F.layer_norm(patches, (d,), gain, shift).flatten(0, 1)
            qkv = n @ mixing.qkv.weight.view(6, 3 * width, d)[m].T + mixing.qkv.bias.view(6, -1)[m]
            mixed = torch.zeros(b * g, width)
            for cell in set(cells):
                rows = [k for k, c in enumerate(cells) if c == cell]
                q, k_, v = qkv[rows].view(len(rows), 3, mixing.heads, -1).permute(1, 2, 0, 3)
                scores = (q @ k_.mT / width**0.5).softmax(2)
                mixed[rows] = (scores @ v).transpose(0, 1).reshape(len(rows), width)
            y = (
                patches.flatten(0, 1)
                + mixed @ mixing.proj.weight.view(6, d, width)[m].T
                + mixing.proj.bias.view(6, d)[m]
            )
            norm, at = guide.norm_2d, slice(m * d, (m + 1) * d)
            places = math.prod(math.ceil(n / locate.cell) for n in model.project.grid)
            empty = b * places - len(set(cells)) if official else 0
            seen.append(scattered(y, cells, norm.weight[at], norm.bias[at], both, empty))
        weight = torch.stack([(F.cosine_similarity(v, v3, dim=1) + 1) / 2 for v in seen])
        weight = weight / weight.sum(0)
        more = (torch.stack(seen) * weight.unsqueeze(2)).sum(0).view(b, g, d)
        x = torch.cat((x[:, :1], patches + guide.guide * more), dim=1)
    out: Tensor = model.norm(x)
    return out


def scattered(y: Tensor, places: list[Any], weight: Tensor, bias: Tensor, largest: bool, empty: int) -> Tensor:
    """``gelu(BN(mean, perhaps + max, of every place))``, given back to the tokens."""
    names = sorted(set(places))
    pooled = []
    for name in names:
        rows = y[[k for k, p in enumerate(places) if p == name]]
        pooled.append(rows.mean(0) + (rows.max(0).values if largest else 0))
    table = torch.cat((torch.stack(pooled), torch.zeros(empty, y.shape[1])))
    normed = F.gelu(F.batch_norm(table, None, None, weight, bias, True, 0.0, 1e-5))
    return normed[[names.index(p) for p in places]]


@pytest.mark.parametrize("modality", MODELS)
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_blocks_follow_the_formula(modality: str, official: bool, both: bool) -> None:
    pooling = "mean_max" if both else "mean"
    model, adapter = adapted(f", dropout=0.0, official={official}, pooling={pooling}", modality, groups=12)
    points = torch.rand(2, 60, 3) - 0.5
    for block in model.blocks.blocks:
        block.train()
    for _, part in adapter.parts():
        if isinstance(part, Guide):
            part.train()
    found = model.forward_features(points)
    geometry = model.geometry(points)
    assert 1 < float(geometry.extra[KEY].weight[:, 0].sum()) < 24, "some voxels hold several tokens"
    with ps.disabled(model):
        own = dict(model.named_modules())
        for key, part in adapter.parts():  # tokenizer and norm as trained
            if key.startswith(("encoder.", "norm.")) and key.endswith("trained"):
                own[key.removesuffix(".trained")].load_state_dict(part.state_dict(), strict=False)
        wanted = by_loops(model, adapter, points, official, both)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


def test_without_scale_and_guide_it_is_the_frozen_model() -> None:
    model: Any = tiny_vision()
    settle(model)
    batch = clouds()
    base = model(batch)
    ps.adapt(model, f"{METHOD}, scale=0.0, guide=0.0)")
    assert torch.equal(model(batch), base)


@pytest.mark.parametrize("modality", MODELS)
def test_exactly_these_names_train(modality: str) -> None:
    model, adapter = adapted(modality=modality)
    model.train()
    model(clouds()).square().sum().backward()
    trained = {n.removeprefix("adapters.default.") for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in adapter.named_parameters()}
    places = {".".join(n.split(".")[:1]) for n in trained}
    assert places == {"blocks", "encoder", "norm", "cls_head_finetune", "direct"}
    inside = {n.split(".", 3)[3].split(".")[0] for n in trained if n.startswith("blocks.")}
    assert inside == {"any2point", "any2point_adapter"}
    assert {n for n in trained if n.startswith("direct")} == {"direct.cls_token", "direct.cls_pos"}


def test_statistics_of_voxels_and_cells_move_as_batch_norm_moves_them() -> None:
    part = Guide(0, 4, 1, 2, Mixing(4, 2, 4, 2), 0.5, "mean")
    norm: Any = part.norm_3d
    values = torch.randn(1, 3, 5, 4)
    values[:, :, 1] = values[:, :, 0]  # tokens 0 and 1 share everything
    weight = torch.tensor([0.5, 0.5, 1, 1, 1]).expand(1, 3, 5)
    from peft_suite.pointcloud.methods.any2point_parts import Places

    nothing = torch.zeros(1)
    places = Places(nothing, nothing, nothing, weight, torch.zeros(3), set())
    found = part.normed(values, places)
    twin = nn.BatchNorm1d(4)
    wanted = twin(values[0, 0, 1:])
    torch.testing.assert_close(found[0, 0, 1:], wanted)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert int(norm.num_batches_tracked) == 1
    part.eval()
    torch.testing.assert_close(part.normed(values, places)[0, 0, 1:], twin.eval()(values[0, 0, 1:]))


def test_two_forwards_under_checkpointing() -> None:
    """Batch statistics move once per forward, also where a block is computed twice."""
    found, batch = [], clouds()
    for on in (False, True):
        torch.manual_seed(3)
        model, adapter = adapted(", dropout=0.0")
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.set_grad_checkpointing(on)
        first, second = model(batch), model(batch.flip(1))
        (first.square().sum() + second.sum()).backward()
        grads = {n: p.grad.clone() for n, p in adapter.named_parameters()}
        found.append({**grads, **{n: b.clone() for n, b in adapter.named_buffers()}})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)
    assert any(bool(v.any()) for n, v in found[0].items() if n.endswith("any2point.norm_2d.running_mean"))


@pytest.mark.parametrize("modality", MODELS)
def test_training_on_solids_lowers_the_loss_and_travels(modality: str, tmp_path: Path) -> None:
    model: Any = MODELS[modality](classes=3, groups=16, group_size=8, head="linear")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    rng = np.random.default_rng(0)
    names = list(TARGET)[:3]
    points = torch.tensor(np.stack([target_cloud(n, 128, rng) for n in names for _ in range(4)])).float()
    labels = torch.arange(3).repeat_interleave(4)
    ps.adapt(model, "any2point(bottleneck=4)")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in start.items()), "frozen tensors moved"
    model.eval()
    ps.save(model, tmp_path / "adapter")
    fresh: Any = MODELS[modality](classes=3, groups=16, group_size=8, head="linear")
    fresh.load_state_dict(start)
    ps.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(points), model(points))


@pytest.mark.parametrize("method", ["linear", "lora(rank=2)", "ssf", "vpt(num_tokens=2)", "bitfit", "adaptformer"])
@pytest.mark.parametrize("modality", MODELS)
def test_methods_of_others_run_on_these_blocks(method: str, modality: str) -> None:
    model: Any = MODELS[modality]()
    settle(model)
    batch = clouds()
    base = model(batch)
    ps.adapt(model, method)
    ps.verify(model, batch)
    if not method.startswith(("vpt", "ssf")):
        assert torch.equal(model(batch), base)
    ps.remove(model)
    assert torch.equal(model(batch), base)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="any2point-vision"):
        ps.adapt(tiny(), "any2point")
    for options, what in (
        ("heads=5", "heads"),
        ("cell=0.0", "cell"),
        ("dropout=1.0", "dropout"),
        ("voxel=-1.0", "voxel"),
    ):
        with pytest.raises(ConfigError, match=what):
            ps.adapt(tiny_vision(), f"any2point({options})")
