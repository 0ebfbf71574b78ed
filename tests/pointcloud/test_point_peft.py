"""Point-PEFT: the memory, what is computed once, whose neighbours patches have, files, counts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import peft_suite as ps
from peft_suite.errors import AdapterError, ConfigError, MergeError, UnsupportedError
from peft_suite.pointcloud.anatomies import pointgpt, recon
from peft_suite.pointcloud.anatomies.point_transformer import clouds, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.methods.point_peft import PointPEFTConfig
from peft_suite.pointcloud.methods.point_peft_parts import Aggregate, Bank, Locate
from peft_suite.train import DataSplits, Recipe, fit

METHOD = "point-peft(num_prompts=4)"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def loss(model: nn.Module) -> Any:
    return lambda batch: model(batch).square().mean()


def tuned(method: str = METHOD, model: nn.Module | None = None, shown: int = 2) -> Any:
    model = ps.adapt(tiny() if model is None else model, method)
    ps.events(model).calibrate([clouds() for _ in range(shown)], loss(model))
    return model


def shaken(model: Any, size: float = 0.1) -> Any:
    with torch.no_grad():
        for p in model.adapters["default"].parameters():
            p.add_(size * torch.randn_like(p))
    return model


def part(model: Any, kind: type, index: int = 0) -> Any:
    return [e.part for e in model.adapters["default"].edits if isinstance(e.part, kind)][index]


def bank(model: Any) -> Bank:
    found: Bank = part(model, Bank)
    return found


# counts --------------------------------------------------------------------------------------------------------------


def test_counts_on_point_mae() -> None:
    """The published code counts 62,268 parameters that it never uses."""
    for classes, official in ((15, 773_017), (40, 779_442)):
        with torch.device("meta"):
            model = backbones.build("point-mae", classes, pretrained=False, checkpoint="", options={})
        assert ps.plan(model, "point-peft(official=True)").trainable == official
        assert ps.plan(model, "point-peft").trainable == official - 62_268


# the memory ----------------------------------------------------------------------------------------------------------


def frozen_feature(model: Any, points: Tensor) -> Tensor:
    """The maximum over the normed patches, from patches that see each other alone."""
    geometry = model.group_divider(points)
    x, pos = model.reduce_dim(model.encoder(geometry.groups)), model.pos_embed(geometry.centers)
    return model.norm(model.blocks(x, pos, geometry)).amax(1).detach()


def test_memory_holds_features_of_the_frozen_model() -> None:
    model = tiny(drop_path=0.5)
    points = [clouds(), clouds()]
    wanted = torch.cat([frozen_feature(model, p) for p in points])
    shaken(ps.adapt(model, METHOD)).train()
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    ps.events(model).calibrate(iter(points), loss(model))
    assert torch.allclose(bank(model).memory, wanted, atol=1e-6)
    assert torch.allclose(bank(model).length, wanted.norm(dim=1))
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in statistics.items() if not k.endswith(("memory", "length")))
    assert model.adapters["default"].method.config.memory == 6  # type: ignore[index]


@pytest.mark.parametrize("make", [recon.example, pointgpt.example])
def test_feature_depends_on_nothing_that_trains(make: Any) -> None:
    model, batch = make()
    ps.adapt(model, METHOD)
    found: list[Tensor] = []
    recall = bank(model).recall
    bank(model).recall = lambda f: (found.append(f), recall(f))[1]  # type: ignore[method-assign]
    model(batch)
    shaken(model).train()
    model(batch)
    assert torch.equal(found[0], found[1]) and not found[0].requires_grad


def test_recall() -> None:
    own = bank(tuned())
    f = torch.randn(2, 24)
    rows = own.memory
    cosine = nn.functional.cosine_similarity(f[:, None], rows[None], dim=2)
    best = cosine.topk(2, dim=1)
    wanted = rows[best.indices]
    cache = own.recall(f)
    assert torch.equal(cache[:, 0], f) and torch.equal(cache[:, 2:], wanted)
    assert torch.allclose(cache[:, 1], (best.values.softmax(1)[..., None] * wanted).sum(1), atol=1e-6)
    official = bank(tuned("point-peft(num_prompts=4, official=True)"))
    direct = (f / f.norm(dim=1, keepdim=True)) @ official.memory.T
    assert torch.equal(official.recall(f)[:, 2:], official.memory[direct.topk(2, dim=1).indices])


def test_before_calibration_a_cloud_recalls_itself() -> None:
    model = ps.adapt(tiny(), METHOD)
    cache = bank(model).recall(f := torch.randn(2, 24))
    assert torch.equal(cache, f[:, None].expand(-1, 4, -1))
    ps.verify(model, clouds())


def test_cap_keeps_a_random_subset() -> None:
    points = [torch.randn(4, 40, 3) for _ in range(6)]
    model = tiny()
    everything = torch.cat([frozen_feature(model, p) for p in points])
    ps.adapt(model, "point-peft(num_prompts=4, bank_size=5)")
    ps.events(model).calibrate(points, loss(model))
    kept = bank(model).memory
    at = [int((everything - row).norm(dim=1).argmin()) for row in kept]
    assert len(kept) == len(set(at)) == 5 and at != [0, 1, 2, 3, 4]
    assert torch.allclose(everything[at], kept, atol=1e-6)


def test_calibration_refuses() -> None:
    model = ps.adapt(tiny(), "point-peft")
    with pytest.raises(AdapterError, match="recalls 8 clouds and was calibrated with 3"):
        ps.events(model).calibrate([clouds()], loss(model))
    with ps.disabled(model), pytest.raises(AdapterError, match="activate it"):
        model.adapters["default"].calibrate([clouds()], loss(model))  # type: ignore[index, union-attr]
    with pytest.raises(ConfigError, match="calibrate"):
        ps.adapt(tiny(), "point-peft(memory=9)")
    with pytest.raises(ConfigError, match="bank_size"):
        PointPEFTConfig(bank_size=4)


def test_file_brings_the_memory(tmp_path: Path) -> None:
    model = shaken(tuned())
    ps.save(model, tmp_path)
    again: Any = ps.load(tiny_like(model), tmp_path)
    assert torch.equal(bank(again).memory, bank(model).memory)
    x = clouds()
    assert torch.equal(again(x), model(x))
    assert not again.adapters["default"].method.capabilities.needs_calibration


def tiny_like(model: nn.Module) -> nn.Module:
    twin = tiny()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")})
    return twin


class Clouds(Dataset):
    def __init__(self, count: int) -> None:
        self.points = torch.randn(count, 40, 3, generator=torch.Generator().manual_seed(count))
        self.targets = torch.arange(count) % 5

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], int(self.targets[index])


def test_training_shows_every_cloud(tmp_path: Path) -> None:
    splits = DataSplits(Clouds(19), None, None, tuple("abcde"), fingerprint="clouds")
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3, warmup_epochs=0.0, calibration_batches=1, select="last")
    model: Any = ps.adapt(tiny(), METHOD)
    fit(model, splits, recipe, out=tmp_path, seed=0, device="cpu", progress=False)
    assert model.adapters["default"].method.config.memory == len(bank(model).memory) == 19


# once per forward ----------------------------------------------------------------------------------------------------


def test_frozen_pass_runs_once_per_forward_under_checkpointing() -> None:
    model = tuned().train()
    model.set_grad_checkpointing(True)
    runs: list[int] = []
    feature = bank(model).feature
    bank(model).feature = lambda *a: (runs.append(1), feature(*a))[1]  # type: ignore[method-assign]
    sum(model(x).square().mean() for x in (clouds(), clouds())).backward()
    assert len(runs) == 2


def test_statistics_move_once_per_forward_under_checkpointing() -> None:
    model = tuned("point-peft(num_prompts=4, dropout=0.0)", tiny(drop_path=0.0))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    x, found = clouds(), []
    for checkpointing in (False, True):
        model.load_state_dict(start)
        model.train().set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model(x).square().mean().backward()
        norm = part(model, Aggregate).norm
        found.append((norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2] == 1 and bool(found[0][0].any())


def test_bank_gets_no_gradient_and_is_no_parameter() -> None:
    model = tuned()
    x = clouds()
    model(x).sum().backward()
    names = {n for n, _ in model.adapters["default"].named_parameters()}
    assert not any("bank" in n for n in names)
    assert not bank(model).memory.requires_grad
    assert all(p.grad is not None for p in model.adapters["default"].parameters())


# the geometry adapter ------------------------------------------------------------------------------------------------


def test_propagation_is_the_weighted_sum_over_all_neighbourhoods() -> None:
    model = tuned()
    once = part(model, Locate)(model.group_divider(clouds())).extra["point_peft_places"]
    centers = model.group_divider(clouds()).centers
    torch.manual_seed(0)
    geometry = model.group_divider(torch.randn(3, 40, 3))
    around = part(model, Locate)(geometry).extra["point_peft_places"].late
    middles = geometry.centers.gather(1, around.middle[..., None].expand(-1, -1, 3))
    gaps = (geometry.centers[:, :, None] - middles[:, None]).square().sum(-1)
    ranked, order = gaps.sort(-1)
    share = 1 / (ranked + 1e-8)
    values = torch.randn(3, 4, 7)
    taken = torch.stack([values[b][order[b]] for b in range(3)])  # [B, G, M, 7]
    wanted = (taken * (share / share.sum(-1, keepdim=True))[..., None]).sum(2)
    assert torch.allclose(around.weights @ values, wanted, atol=1e-6)
    assert once.early.weights.requires_grad and not once.late.weights.requires_grad
    assert once.late.near.shape == (3, 4, 3) and centers.shape == (3, 8, 3)


def test_clouds_of_a_batch_do_not_meet_unless_official() -> None:
    x = torch.randn(3, 40, 3)
    for method, alone in ((METHOD, True), ("point-peft(num_prompts=4, official=True)", False)):
        model = shaken(tuned(method))
        together, apart = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
        assert torch.allclose(together, apart, atol=1e-5) == alone
        assert torch.allclose(together[0], apart[0], atol=1e-5)  # the first one's rows are its own


def test_class_token_is_untouched_before_the_last_bottleneck() -> None:
    model = shaken(tuned())
    aggregate = part(model, Aggregate, 1)
    with torch.no_grad():
        for p in aggregate.adapter.parameters():
            p.zero_()
    seen: list[tuple[Tensor, Tensor]] = []
    aggregate.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    model(clouds())
    assert torch.equal(seen[0][0][:, 0], seen[0][1][:, 0])
    assert not torch.equal(seen[0][0][:, 5:], seen[0][1][:, 1:])


def test_without_its_scales_an_unprompted_block_is_plain() -> None:
    model = tuned("point-peft(num_prompts=4, prompted_blocks=1, mlp_scale=0.0, propagate=0.0, biases=False)")
    with torch.no_grad():
        for p in part(model, Aggregate, 1).adapter.parameters():
            p.zero_()
    seen: list[tuple[Any, Tensor]] = []
    block = model.blocks.blocks[1]
    block.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(clouds())
    (args, out) = seen[0]
    with ps.disabled(model):
        assert torch.allclose(block(*args), out, atol=1e-6)


def test_attention_is_never_dropped() -> None:
    model = tuned("point-peft(num_prompts=4, dropout=0.0)", tiny(drop_path=0.9))
    model.train()
    seen: list[bool] = []
    drop = model.blocks.blocks[1].drop_path1
    drop.register_forward_hook(lambda m, args, out: seen.append(torch.equal(args[0], out)))
    for _ in range(4):
        model(clouds())
    assert all(seen)


def test_partial_merge_leaves_the_frozen_blocks_to_the_memory() -> None:
    model = shaken(tuned())
    x = clouds()
    wanted = model(x)
    ps.merge(model, partial=True)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    kinds = {type(e.part).__name__ for e in model.adapters["default"].edits}
    assert "Apart" in kinds and not any("cls_head" in e.key for e in model.adapters["default"].edits)


# refusals ------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = tuned()
    with pytest.raises(MergeError):
        ps.merge(model)
    assert not ps.plan(tiny(), METHOD).mergeable
    with pytest.raises(UnsupportedError, match="point clouds"):
        ps.plan(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1), METHOD)
    with pytest.raises(UnsupportedError, match="at least 2"):
        ps.adapt(tiny(groups=1), METHOD)
