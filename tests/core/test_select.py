"""Chosen entries: what they save, how they are chosen again, files that lie about them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_suite as ps
from peft_suite import files
from peft_suite.errors import FileFormatError, KernelArgumentError, UnsupportedError
from peft_suite.method import Editor
from peft_suite.selecting import Select


class Net(nn.Module):
    """An embedding, a linear layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 16)
        self.own = nn.Bilinear(16, 16, 4)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.words(tokens))).mean(1))


ANATOMY = ps.Anatomy(family="select-net", dim=16, blocks=(), fresh=("head.weight", "head.bias"))


@dataclass(frozen=True)
class PickConfig(ps.MethodConfig):
    method: ClassVar[str] = "pick"
    path: str = "fc"
    entries: int = 9


class Pick(ps.Method[PickConfig]):
    """Every seventh entry; the number is not part of what a fresh adapter says when it is loaded."""

    config_class = PickConfig
    entries_now: ClassVar[int | None] = None

    @property
    def capabilities(self) -> ps.Capabilities:
        return ps.Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: ps.Anatomy, edit: Editor) -> None:
        """One select edit."""
        count = self.config.entries if self.entries_now is None else self.entries_now
        edit.select(ps.Weight(self.config.path), "select", torch.arange(count, device="cpu") * 7)


plugin = ps.Plugin(
    name="pick-testbed",
    methods=(ps.MethodEntry("pick", f"{__name__}:Pick", "chosen entries"),),
)


@pytest.fixture(autouse=True)
def registered() -> None:
    if plugin.name not in {p.name for p in ps.plugins.plugins()}:
        ps.register(plugin)


def adapted(spec: str = "pick") -> tuple[Net, Select]:
    torch.manual_seed(0)
    model = Net()
    ps.adapt(model, spec, anatomy=ANATOMY)
    [part] = [p for _, p in model.adapters["default"].parts() if isinstance(p, Select)]  # type: ignore[union-attr]
    return model, part


TOKENS = torch.arange(12).view(3, 4)


def test_only_the_chosen_entries_move_and_nothing_dense_is_kept() -> None:
    model, part = adapted()
    before = {n: p.clone() for n, p in model.named_parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(TOKENS).square().sum()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    loss.backward()
    optimizer.step()
    copies = [t for t in kept if t.shape == model.fc.weight.shape and t.data_ptr() != model.fc.weight.data_ptr()]
    assert not copies
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not n.startswith("adapters."))
    moved = part.forward(model.fc.weight, None)
    assert isinstance(moved, tuple) and moved[0] is not None
    changed = (moved[0] != model.fc.weight).flatten().nonzero()[:, 0]
    assert torch.equal(changed, part.positions().long())
    assert optimizer.state[part._parameters["weight_values"]]["exp_avg"].shape == (9,)  # type: ignore[index]


def test_gradient_is_the_dense_one_at_the_chosen_positions() -> None:
    model, part = adapted()
    model(TOKENS).square().sum().backward()
    dense = Net()
    dense.load_state_dict(model.state_dict(), strict=False)
    dense(TOKENS).square().sum().backward()
    assert dense.fc.weight.grad is not None
    wanted = dense.fc.weight.grad.flatten()[part.positions().long()]
    torch.testing.assert_close(part._parameters["weight_values"].grad, wanted)  # type: ignore[union-attr]


def test_embeddings_take_the_plain_path() -> None:
    model, part = adapted("pick(path=words)")
    optimizer = torch.optim.SGD(part.parameters(), lr=1.0)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    out = model(TOKENS)
    assert not torch.equal(out, ps.disabled(model).__enter__()(TOKENS))
    model, part = adapted("pick(path=words)")
    nn.init.constant_(part._parameters["weight_values"], 0.3)  # type: ignore[arg-type]
    out = model(TOKENS)
    torch.testing.assert_close(ps.merge(model)(TOKENS), out)


def test_choosing_again_keeps_what_stays() -> None:
    model, part = adapted()
    values = part._parameters["weight_values"]
    with torch.no_grad():
        values.copy_(torch.arange(9.0) + 1)  # type: ignore[union-attr]
    kept = part.choose(torch.arange(9) * 7 + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0]))
    assert part._parameters["weight_values"] is values
    assert kept.tolist() == [True, False] * 4 + [True]
    assert values.tolist() == [1, 0, 3, 0, 5, 0, 7, 0, 9]  # type: ignore[union-attr]
    assert part.choose(torch.tensor([0, 3, 14])).tolist() == [True, False, True]
    assert part._parameters["weight_values"].tolist() == [1, 0, 3]  # type: ignore[union-attr]
    before = part.positions().clone()
    for wrong in ([0, 0, 1], [5, 3, 9], [0, 1, 256], [-1, 2, 3]):
        with pytest.raises(KernelArgumentError, match="'index'"):
            part.choose(torch.tensor(wrong))
        assert torch.equal(part.positions(), before)
    model(TOKENS).sum().backward()


def test_a_file_brings_its_own_number_of_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = adapted()
    with torch.no_grad():
        part._parameters["weight_values"].normal_()  # type: ignore[union-attr]
    part.choose(torch.tensor([1, 2, 90, 255]))
    out = model(TOKENS)
    ps.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / files.TENSORS)
    assert stored["fc.select.weight_index"].dtype == torch.int32
    assert stored["fc.select.weight_values"].nbytes + stored["fc.select.weight_index"].nbytes == 8 * 4

    for count in (0, 30):  # whatever the method would choose on a fresh model
        monkeypatch.setattr(Pick, "entries_now", count)
        torch.manual_seed(0)
        fresh = Net()
        ps.load(fresh, tmp_path / "a", anatomy=ANATOMY)
        assert torch.equal(fresh(TOKENS), out)


@pytest.mark.parametrize("wrong", [[0, 7, 7], [3, 2, 1], [0, 1, 256]])
def test_a_file_with_impossible_positions_is_refused(tmp_path: Path, wrong: list[int]) -> None:
    model, _ = adapted("pick(entries=3)")
    ps.save(model, tmp_path / "a")
    file = tmp_path / "a" / files.TENSORS
    tensors = {**load_file(file), "fc.select.weight_index": torch.tensor(wrong, dtype=torch.int32)}
    header: dict[str, Any] = files.read_config(tmp_path / "a") | {"digest": files._digest(tensors)}
    import json

    save_file(tensors, file, metadata={"peft_suite": json.dumps({k: v for k, v in header.items() if k != "bytes"})})
    fresh = Net()
    state = {n: p.clone() for n, p in fresh.state_dict().items()}
    with pytest.raises(FileFormatError, match="Chosen entries in the file do not fit a tensor of 256 values"):
        ps.load(fresh, tmp_path / "a", anatomy=ANATOMY, check="none")
    assert not hasattr(fresh, "adapters") and all(torch.equal(v, state[n]) for n, v in fresh.state_dict().items())


def test_refusals_name_the_layer() -> None:
    with pytest.raises(UnsupportedError, match="forward of Bilinear is not known"):
        adapted("pick(path=own)")
    with pytest.raises(KernelArgumentError, match="'index'"):
        adapted("pick(entries=99)")
    editor = Editor(Net(), ANATOMY, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"words \(Embedding\) has no bias"):
        editor.select(ps.Weight("words"), "select", None, torch.tensor([0]))


def test_half_precision_weights_are_warned_of_once() -> None:
    model = Net().bfloat16()
    with pytest.warns(UserWarning, match="bfloat16 weights: changes smaller") as caught:
        ps.adapt(model, "pick", anatomy=ANATOMY)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(TOKENS).dtype == torch.bfloat16


def test_autocast_and_bfloat16_train_float32_values() -> None:
    model, part = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(TOKENS)
    out.float().square().sum().backward()
    gradient = part._parameters["weight_values"].grad  # type: ignore[union-attr]
    assert gradient is not None and gradient.dtype == torch.float32 and gradient.abs().sum() > 0
