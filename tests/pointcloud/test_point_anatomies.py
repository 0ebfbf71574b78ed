"""Anatomies of the point transformers: classical methods act, heads train, geometry and positions reach the parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.adapter import Adapter
from peft_suite.anatomy import anatomy_of
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.lifecycle import install
from peft_suite.method import Editor, make_method
from peft_suite.pointcloud.anatomies import pointgpt, recon, segmenter
from peft_suite.pointcloud.anatomies.point_transformer import clouds, example, tiny
from peft_suite.pointcloud.models.geometry import Geometry

EXAMPLES = {"plain": example, "recon": recon.example, "pointgpt": pointgpt.example, "segmenter": segmenter.example}
CLASSICAL = (
    "linear",
    "full",
    "bitfit",
    "norm",
    "vpt(num_tokens=2)",
    "vpt(num_tokens=2, deep=True)",
    "lora(rank=2)",
    "lora(rank=2, targets=[q, k, v, o, fc1, fc2])",
    "houlsby(bottleneck=2)",
    "pfeiffer(bottleneck=2)",
    "parallel-adapter(bottleneck=2)",
    "adaptformer(bottleneck=2)",
    "ssf",
    "ia3",
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(**batch) if isinstance(batch, dict) else model(batch)
    return out


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("method", CLASSICAL)
def test_classical_methods_train_everything_they_add(name: str, method: str) -> None:
    model, batch = EXAMPLES[name]()
    base = run(model, batch).detach()
    ps.adapt(model, method)
    ps.verify(model, batch)
    if not method.startswith(("vpt", "ssf")):
        assert torch.equal(run(model, batch), base)
    ps.remove(model)
    assert torch.equal(run(model, batch), base)


@pytest.mark.parametrize("name", EXAMPLES)
def test_described_forwards_equal_the_models(name: str) -> None:
    model, batch = EXAMPLES[name]()
    base = run(model, batch)
    ps.adapt(model, "adaptformer(bottleneck=2)")  # lies at the residual sums
    ps.adapt(model, "mam(prefix=2, bottleneck=2)", name="second")  # inside attention
    for adapters in ((), ("default",)):
        ps.activate(model, *adapters)
        assert torch.equal(run(model, batch), base)


@pytest.mark.parametrize("name", EXAMPLES)
def test_paths_of_the_description_exist(name: str) -> None:
    model, _ = EXAMPLES[name]()
    anatomy = anatomy_of(model)
    modules = dict(model.named_modules())
    points = [anatomy.embed, anatomy.norm, anatomy.head, *anatomy.stem, *anatomy.tail]
    for block in anatomy.blocks:
        points += [block.point, *block.points.values(), *block.affine]
        for weight in block.weights.values():
            rows = modules[weight.path].weight.shape[0]
            assert weight.rows is None or weight.rows[1] <= rows
    assert all(point is not None and point.path in modules for point in points)
    assert set(anatomy.fresh) <= {n for n, _ in model.named_parameters()}
    affine = {n for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    described = {p.path for p in (*anatomy.stem, *anatomy.tail, *(p for b in anatomy.blocks for p in b.affine))}
    rest = {n for n in affine - described if f"{n}.weight" not in anatomy.fresh}
    assert not rest, f"affine operations outside the head that no description names: {rest}"


def test_statistics_of_a_fresh_head_move_and_travel(tmp_path: Any) -> None:
    """The head's batch norm is new: frozen at 0 and 1 it would normalise nothing. The tokenizer's stays frozen."""
    for method in ("linear", "lora(rank=2)"):
        model, batch = example()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        ps.adapt(model, method)
        model.train()
        assert model.cls_head_finetune.training and model.encoder.training == (method != "linear")  # type: ignore[union-attr]
        for _ in range(3):
            model(batch)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.startswith("adapters."))
        own = {k: v for k, v in model.adapters["default"].state_dict().items() if k.endswith("running_mean")}  # type: ignore[index]
        assert set(own) == {f"cls_head_finetune.{i}.statistics.running_mean" for i in (1, 5)}
        assert all(bool(v.any()) for v in own.values())
        model.eval()
        wanted = model(batch)
        ps.save(model, tmp_path / method[:4])
        fresh, _ = example()
        fresh.load_state_dict(before)
        ps.load(fresh, tmp_path / method[:4])
        assert torch.equal(fresh(batch), wanted)
        ps.merge(model)
        torch.testing.assert_close(model(batch), wanted, atol=1e-5, rtol=1e-5)


def test_all_statistics_move_when_asked() -> None:
    model, batch = example()
    ps.adapt(model, "lora(rank=2)", batchnorm="train")
    model.train()
    model(batch)
    own = [k for k in model.adapters["default"].state_dict() if k.endswith("running_mean")]  # type: ignore[index]
    assert len(own) == 4 and any(k.startswith("encoder.") for k in own)


def test_a_last_batch_of_one_cloud_trains() -> None:
    model, batch = example()
    ps.adapt(model, "linear")
    model.train()
    assert bool(model(batch[:1]).isfinite().all())


class Centres(Part):
    """Adds a multiple of each patch's centre to the first three channels; needs the geometry."""

    needs_context = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        delta = torch.zeros_like(x)
        delta[:, -geometry.centers.shape[1] :, :3] = geometry.centers.to(x.dtype)
        return self.gain * delta


class Basis(Part):
    """Adds one tensor to the geometry, once per forward."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def forward(self, geometry: Geometry) -> Geometry:
        self.made += 1
        return geometry.adding(test_basis=geometry.centers.mean(1))


class Reads(Part):
    """Reads what the other has made, and what it left in this call of the block."""

    needs_context = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.log: list[bool] = []

    def forward(self, y: Tensor, n: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        self.log.append("left" in geometry.extra)
        geometry.extra["left"] = y
        return y + self.gain * geometry.extra["test_basis"].sum(), n


@pytest.mark.parametrize("name", EXAMPLES)
def test_geometry_reaches_the_parts(name: str) -> None:
    model, batch = EXAMPLES[name]()
    anatomy = anatomy_of(model)
    base = run(model, batch)
    editor = Editor(model, anatomy, torch.device("cpu"))
    basis, first, second = Basis(), Reads(), Reads()
    block = anatomy.blocks[0]
    editor.inside(ps.Point(editor.having("geometry")[0], 3), "geometry", basis, "basis")
    editor.inside(block.point, "attn_out", first, "first")
    editor.inside(block.point, "mlp_out", second, "second")
    for b in anatomy.blocks:
        editor.branch(b, "mlp", Centres(), "centres")
    install(model, Adapter("default", make_method("lora"), editor.finish()))
    ps.trainable(model, "default")
    for set_on in (False, True):
        model.train()
        model.set_grad_checkpointing(set_on)  # type: ignore[operator]
        out = run(model, batch)
        out.square().sum().backward()
    assert basis.made == 2, "once per forward, also under checkpointing"
    assert not any(first.log) and all(second.log), "what a part leaves is there in the same call only"
    assert first.gain.grad is not None and first.gain.grad.abs() > 0
    assert not torch.allclose(out, base)


def test_prompts_of_a_causal_backbone_stand_first() -> None:
    model, batch = pointgpt.example()
    ps.adapt(model, "vpt(num_tokens=2, deep=True)")
    assert model.adapters["default"].get_submodule("blocks.layers.0.vpt").at == 0  # type: ignore[index]
    ps.verify(model, batch)


def test_shallow_prompts_bring_their_positions_to_every_block() -> None:
    model, batch = example()
    ps.adapt(model, "vpt(num_tokens=2)")
    adapter = model.adapters["default"]  # type: ignore[index]
    assert {n for n, _ in adapter.named_parameters() if "vpt" in n} == {
        "blocks.blocks.0.vpt.prompt",
        "blocks.blocks.0.vpt.position",
    }
    seen: list[int] = []
    for block in model.blocks.blocks:  # type: ignore[union-attr]
        block.norm1.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    model(batch)
    assert seen == [1 + 8 + 2] * 2


def test_deep_prompts_follow_the_formula() -> None:
    model, batch = example()
    base: Any = model
    g = base.group_divider(batch)
    tokens, pos = base.encoder(g.groups), base.pos_embed(g.centers)
    x = torch.cat((base.cls_token.expand(3, -1, -1), tokens), dim=1)
    pos = torch.cat((base.cls_pos.expand(3, -1, -1), pos), dim=1)
    ps.adapt(model, "vpt(num_tokens=2, deep=True)")
    adapter = base.adapters["default"]
    wanted = x
    with ps.disabled(model):
        for i, block in enumerate(base.blocks.blocks):
            part = adapter.get_submodule(f"blocks.blocks.{i}.vpt")
            z = torch.cat((wanted, part.prompt.expand(3, -1, -1)), dim=1)
            p = torch.cat((pos, part.position.expand(3, -1, -1)), dim=1)
            wanted = block(z, p, g)[:, :-2]
        wanted = base.norm(wanted)
    torch.testing.assert_close(base.forward_features(batch), wanted)


def test_prompts_that_need_a_grid_are_refused() -> None:
    for method in ("vpt(location=add)", "vpt(location=pad)", "convpass"):
        with pytest.raises(UnsupportedError):
            ps.adapt(tiny(), method)


def test_roles_of_recons_query_tokens() -> None:
    model, batch = recon.example()
    ps.adapt(model, "lora(rank=2, targets=[contrast_q, contrast_v])")
    ps.verify(model, batch)
    assert clouds().shape == (3, 40, 3)
