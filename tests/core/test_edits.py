"""The core on models made here: streams in keywords and tuples, batch norm, direct parameters, dtypes, folding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.edits import Part
from peft_suite.errors import AdapterError, MergeError, UnsupportedError, VerificationError
from peft_suite.method import Editor


class TwoStreams(nn.Module):
    """A block that gets everything by keyword and returns two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, *, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return text, image + self.fc(image)


class Chain(nn.Module):
    """A root with a forward around a plain sequence."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.gain = nn.Parameter(torch.ones(6))
        self.block = TwoStreams()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).flatten(2).mean(-1)
        _, x = self.block(text=x.detach(), image=x * self.gain)
        return self.head(x)


ANATOMY = ps.Anatomy(
    family="test-net",
    dim=6,
    blocks=(
        ps.Block(
            ps.Point("block", 6, argument="image", output=1),
            {},
            {"fc1": ps.Weight("block.fc")},
            (ps.Point("block.fc", 6),),
        ),
    ),
    stem=(ps.Point("stem", 6, "first"),),
    norms=("bn",),
    fresh=("head.weight", "head.bias"),
)


@dataclass(frozen=True)
class ShiftConfig(ps.MethodConfig):
    method: ClassVar[str] = "test-shift"


class ShiftPart(Part):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Shift(ps.Method[ShiftConfig]):
    config_class = ShiftConfig

    def build(self, anatomy: ps.Anatomy, edit: Editor) -> None:
        edit.before(anatomy.blocks[0].point, ShiftPart(), "into")
        edit.after(anatomy.blocks[0].point, ShiftPart(), "out")


@dataclass(frozen=True)
class SquashConfig(ps.MethodConfig):
    method: ClassVar[str] = "test-squash"


class SquashPart(Part):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.tanh(weight * self.by), bias


class Squash(ps.Method[SquashConfig]):
    config_class = SquashConfig

    def build(self, anatomy: ps.Anatomy, edit: Editor) -> None:
        edit.reweigh(ps.Weight("block.fc"), SquashPart(), "squash")


@pytest.fixture(scope="module", autouse=True)
def methods_are_registered() -> None:
    entries = [ps.MethodEntry(f"test-{n.lower()}", f"{__name__}:{n}", "for tests") for n in ("Shift", "Squash")]
    ps.register(ps.Plugin("test-core", methods=tuple(entries)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 3, 5, 5))  # moves the batch-norm statistics off their start
    return model.eval()


def randomise(model: Any, scale: float = 0.3) -> None:
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(torch.randn_like(p) * scale)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert float((a - b).norm() / b.norm()) < tolerance


X = torch.randn(7, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def test_streams_by_keyword_and_in_tuples(net: Net) -> None:
    base = net(X)
    ps.adapt(net, "test-shift", anatomy=ANATOMY)
    assert torch.equal(net(X), base)
    into, out = (net.adapters["default"].edits[i].part for i in (0, 1))
    with torch.no_grad():
        out.by.add_(1.0)
    close(net(X), base + net.head.weight.sum(1))
    with torch.no_grad():
        out.by.zero_()
        into.by.add_(1.0)
    close(net(X), base + (torch.ones(6) + net.block.fc.weight.sum(1)) @ net.head.weight.t())
    assert ps.verify(net, X) == {"parts": 3, "parameters": 4}


def test_batch_norm_statistics_stay_in_train_mode(net: Net) -> None:
    before = copy.deepcopy(net.bn.state_dict())
    ps.adapt(net, "norm", anatomy=ANATOMY)
    net.train()
    for _ in range(3):
        net(X * 5)
    for name, value in net.bn.state_dict().items():
        assert torch.equal(value, before[name]), name
    ps.remove(net)
    net.train()(X * 5)
    assert not torch.equal(net.bn.running_mean, before["running_mean"])


def test_batch_norm_statistics_that_train_belong_to_the_adapter(net: Net, tmp_path: Path) -> None:
    reference, state = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    ps.adapt(net, "norm", anatomy=ANATOMY, batchnorm="train")
    net.train(), reference.train()
    for _ in range(3):
        close(net(X * 5), reference(X * 5))
    net.eval(), reference.eval()
    close(net(X), reference(X))
    ps.save(net, tmp_path)
    fresh = Net()
    fresh.load_state_dict(state)
    ps.load(fresh.eval(), tmp_path, anatomy=ANATOMY)
    assert torch.equal(fresh(X), net(X))
    ps.merge(fresh)
    close(fresh(X), net(X))
    ps.remove(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_full_trains_parameters_that_the_model_reads_directly(net: Net) -> None:
    base, keys = net(X), set(net.state_dict())
    ps.adapt(net, "full", anatomy=ANATOMY)
    ps.verify(net, X)
    shadow = net.__dict__["gain"]
    assert shadow is dict(net.adapters["default"].named_parameters())["direct.gain"]
    with torch.no_grad():
        shadow.mul_(2.0)
    assert not torch.allclose(net(X), base)
    with ps.disabled(net):
        assert torch.equal(net(X), base)
        assert "gain" not in net.__dict__
    tuned = net(X)
    ps.merge(net)
    assert torch.equal(net(X), tuned)
    assert set(net.state_dict()) == keys
    assert "gain" not in net.__dict__


def test_folding_order_is_weight_then_output(net: Net) -> None:
    ps.adapt(net, "lora(targets=[fc1], rank=2, dora=True)", name="dora", anatomy=ANATOMY)
    ps.adapt(net, "ssf", name="ssf")
    ps.adapt(net, "lora(targets=[fc1], rank=3)", name="lora")
    randomise(net)
    for order in (("dora", "ssf", "lora"), ("lora", "ssf", "dora"), ("ssf", "dora", "lora")):
        model = copy.deepcopy(net)
        ps.activate(model, *order)
        wanted = model(X)
        ps.merge(model)
        close(model(X), wanted)


def test_partial_merge_keeps_what_does_not_fold(net: Net, tmp_path: Path) -> None:
    ps.adapt(net, "ssf", name="ssf", anatomy=ANATOMY)
    ps.adapt(net, "test-shift", name="shift")
    randomise(net)
    ps.activate(net, "ssf", "shift")
    wanted = net(X)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(MergeError, match=r"block\.into \(before\)"):
        ps.merge(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    ps.merge(net, partial=True)
    assert list(net.adapters) == ["shift"]
    close(net(X), wanted)
    ps.save(net, tmp_path)
    base = {k: v for k, v in net.state_dict().items() if not k.startswith("adapters.")}
    fresh = Net()
    fresh.load_state_dict(base)
    ps.load(fresh.eval(), tmp_path, anatomy=ANATOMY)
    close(fresh(X), net(X))


def test_partial_merge_leaves_what_follows_a_weight_function_that_stays(net: Net) -> None:
    ps.adapt(net, "test-squash", name="squash", anatomy=ANATOMY)
    ps.adapt(net, "ssf", name="ssf")
    randomise(net)
    ps.activate(net, "squash", "ssf")
    wanted = net(X)
    ps.merge(net, partial=True)
    close(net(X), wanted)
    assert [e.key for e in net.adapters["ssf"].edits] == ["block.fc.ssf"]


def test_lora_by_a_path_without_a_dot_means_that_module_alone(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc(x))

    model, anatomy, x = Two(), ps.Anatomy("t", 6, ()), torch.randn(3, 6)
    twin = copy.deepcopy(model)
    ps.adapt(model, "lora(targets=[fc], rank=2)", anatomy=anatomy)
    randomise(model)
    ps.export_peft(model, tmp_path)
    ps.import_peft(twin, tmp_path, anatomy=anatomy, trainable=True)
    assert [k for k, _ in twin.adapters["default"].parts()] == ["fc.lora"]
    assert all(p.requires_grad for p in twin.adapters.parameters())
    close(twin(x), model(x))


def test_merge_makes_a_bias_where_there_is_none() -> None:
    model = Chain(nn.Linear(6, 6, bias=False), nn.Linear(6, 4))
    point = ps.Point("layers.0", 6)
    anatomy = ps.Anatomy("t", 6, (ps.Block(point, {}, {}, (point,)),), fresh=("layers.1.weight", "layers.1.bias"))
    ps.adapt(model, "ssf", anatomy=anatomy)
    randomise(model)
    x = torch.randn(3, 6)
    wanted = model(x)
    ps.merge(model)
    close(model(x), wanted)
    assert model.layers[0].bias is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["ssf", "lora(targets=[fc1])", "norm", "bitfit", "full", "test-shift"])
def test_half_precision_base_keeps_float32_adapters(net: Net, method: str, dtype: torch.dtype) -> None:
    net.to(dtype)
    ps.adapt(net, method, anatomy=ANATOMY)
    kept = {p.dtype for n, p in net.adapters.named_parameters() if "direct" not in n}
    assert kept == {torch.float32}
    out = net(X.to(dtype))
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.adapters.parameters())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_convolutions(groups: int, dora: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups)
    model = Chain(conv, nn.Flatten(), nn.Linear(128, 3))
    x = torch.randn(2, 4, 9, 9)
    anatomy = ps.Anatomy("t", 8, (), fresh=("layers.2.weight", "layers.2.bias"))
    base = model(x)
    ps.adapt(model, f"lora(targets=['layers.0'], rank=3, alpha=6, dora={dora})", anatomy=anatomy)
    close(model(x), base, 1e-6)
    ps.verify(model, x)
    randomise(model, 0.1)
    wanted = model(x)
    assert not torch.allclose(wanted, base, atol=1e-3)
    ps.merge(model)
    close(model(x), wanted)


def test_verify_names_an_edit_that_never_fires(net: Net) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.fc.weight)

    model = Reads()
    anatomy = ps.Anatomy("t", 6, (ps.Block(ps.Point("", 6), {}, {"q": ps.Weight("fc")}),))
    ps.adapt(model, "lora(targets=[q])", anatomy=anatomy)
    with pytest.raises(VerificationError, match=r"default:fc\.lora"):
        ps.verify(model, torch.randn(2, 6))
    assert all(p.grad is None for p in model.parameters())


def test_a_bare_sequence_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(UnsupportedError, match="Wrap it"):
        ps.adapt(model, "linear", anatomy=ps.Anatomy("t", 6, (), fresh=("0.weight",)))
    assert len(model) == 1


def test_two_prompts_cannot_be_active_together() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    ps.adapt(model, "vpt(num_tokens=2)", name="a")
    ps.adapt(model, "vpt(num_tokens=3, deep=True)", name="b")
    with pytest.raises(AdapterError, match="one of them at a time"):
        ps.activate(model, "a", "b")
    assert model.adapters.active == ("b",)


def test_prompt_positions_are_the_same_function() -> None:
    """Blocks see tokens as a set: where prompts stand changes rounding only, and intermediate features stay a grid."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    outputs, prompts = [], None
    for position in ("end", "after_prefix", "start"):
        for deep in (True, False):
            ps.adapt(model, f"vpt(num_tokens=4, deep={deep}, position={position})")
            state = model.adapters["default"].state_dict()
            if deep:
                prompts = prompts or {k: torch.randn_like(v) * 0.2 for k, v in state.items()}
                model.adapters["default"].load_state_dict(prompts)
                outputs.append(model(x))
                features = model.forward_intermediates(x, intermediates_only=True)
                assert [tuple(f.shape) for f in features] == [(2, 24, 4, 4)] * 3
            ps.remove(model)
    close(outputs[1], outputs[0])
    close(outputs[2], outputs[0])


def test_reentrant_checkpointing_is_refused() -> None:
    from timm.layers import set_reentrant_ckpt

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(UnsupportedError, match="reentrant"):
            ps.adapt(model, "lora")
    finally:
        set_reentrant_ckpt(False)
    assert not hasattr(model, "adapters")
    ps.adapt(model, "lora")
