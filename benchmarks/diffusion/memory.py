"""Bytes of one training step of Stable Diffusion 1.5's UNet, counted on fake tensors: nothing is allocated.

    python benchmarks/diffusion/memory.py [--batches 1,4,8] [--side 64] [--out DIR]

Latents of 64x64, 77 text tokens, float32, AdamW. Rows: SaRA with 5, 20 and 50 million entries, LoRA with as many values
on the attention projections (where diffusers' scripts put it) and on every linear and convolution layer, DoRA, dense
masks (LT-SFT's way: gradients and moments of everything), and full fine-tuning. "peer" is HF peft.

Fixed: weights, adapter with indices, gradients and optimizer state, against the bound 4N + 20k bytes for N weights and
k trained values. Saved: distinct storages that autograd keeps after a forward, without parameters and buffers. Peak:
both together, which is what a step needs at least when backward begins. File: bytes of tensors in the adapter for each
trained value. SaRA's entries are spread over all tensors by their size; real weights spread them otherwise, which
changes no column here.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from counts import bytes_of, saved_bytes, states_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_suite as ps
from peft_suite.anatomy import Anatomy, Weight
from peft_suite.diffusion.methods.sara import SaRAConfig
from peft_suite.diffusion.methods.sparse_values import SparseValues, selectable
from peft_suite.lifecycle import install, prepare
from peft_suite.method import Editor, Method
from peft_suite.storage import write_json, write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from measure import markdown, show

BUDGETS = (5_000_000, 20_000_000, 50_000_000)
ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
Made = tuple[nn.Module, int]  # with the number of trained values


def unet() -> nn.Module:
    """Stable Diffusion 1.5's."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    return model.train()


class Spread(Method[SaRAConfig]):
    """SaRA with as many entries in every tensor as it has of the weights: on fake weights nothing is small."""

    config_class = SaRAConfig

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        names, _ = selectable(anatomy, edit)
        whole, budget = sum(t.numel() for t in names.values()), int(str(self.config.budget))
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        done = seen = 0
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            own = {n: none for n in ("weight", "bias") if f"{path}.{n}" in names}
            part = edit.select(Weight(path), "sara", own.get("weight"), own.get("bias"), SparseValues)
            part.keep()
            for name, size in part.sizes.items():
                seen += size
                count = round(budget * seen / whole) - done
                done += count
                index = part._buffers[f"{name}_index"] = torch.empty(count, dtype=torch.int32)
                part._parameters[f"{name}_values"] = nn.Parameter(torch.empty(count))
                if name == "weight":  # entries in all columns: nothing to leave out of the inputs
                    part.columns = (index, index._version, None, None)


def sara(model: nn.Module, budget: int) -> Made:
    """SaRA."""
    install(model, prepare(model, Spread(SaRAConfig(budget=budget)), "default", None, None))
    ps.trainable(model, "default")
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora(model: nn.Module, budget: int, targets: Sequence[str], dora: bool = False) -> Made:
    """LoRA of the rank that comes closest to so many values."""
    one = ps.plan(model, {"name": "lora", "rank": 1, "targets": targets}).trainable
    spec = {"name": "lora", "rank": max(1, round(budget / one)), "targets": targets, "dora": dora}
    ps.adapt(model, spec)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def peer(model: Any, budget: int) -> Made:
    """HF peft's LoRA on the attention projections, as diffusers attaches it."""
    import peft

    rank = round(budget / 199_296)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def full(model: nn.Module) -> Made:
    """Everything."""
    return model, sum(p.numel() for p in model.requires_grad_(True).parameters())


def rows() -> list[tuple[str, Callable[[nn.Module], Made], int]]:
    """(name, how it is made, bytes of masks)."""
    every = ("*",)
    found: list[tuple[str, Callable[[nn.Module], Made], int]] = []
    for budget in BUDGETS:
        size = f"{budget // 10**6}M"
        found += [
            (f"SaRA, {size}", lambda m, b=budget: sara(m, b), 0),  # type: ignore[misc]
            (f"LoRA on attention, {size}", lambda m, b=budget: lora(m, b, ATTENTION), 0),  # type: ignore[misc]
            (f"peer: LoRA on attention, {size}", lambda m, b=budget: peer(m, b), 0),  # type: ignore[misc]
            (f"LoRA on every layer, {size}", lambda m, b=budget: lora(m, b, every), 0),  # type: ignore[misc]
        ]
    found.append(("DoRA on attention, 5M", lambda m: lora(m, BUDGETS[0], ATTENTION, True), 0))
    found.append(("dense masks, 5M", full, 1))
    found.append(("full", full, 0))
    return found


def measure(make: Callable[[nn.Module], Made], mask: int, batches: Sequence[int], side: int) -> dict[str, Any]:
    """One row. ``mask``: bytes of a mask for each weight."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, k = make(unet())
        weights = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n and "adapters." not in n)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        saved = {}
        for batch in batches:
            inputs = torch.randn(batch, 4, side, side), torch.ones(batch), torch.randn(batch, 77, 768)
            noise = torch.randn(batch, 4, side, side)

            def forward(inputs: Any = inputs, noise: Tensor = noise) -> Tensor:
                return nn.functional.mse_loss(model(*inputs).sample, noise)

            loss, saved[batch] = saved_bytes(model, forward)
            del forward
        loss.backward()
        optimizer.step()
        tensors = (*model.parameters(), *model.buffers(), *(p.grad for p in trained), *states_of(optimizer))
        fixed = bytes_of(tensors) + mask * weights
        states = bytes_of(states_of(optimizer)) + bytes_of(p.grad for p in trained)
        stored = 0
        if "adapters" in model._modules:
            stored = sum(t.numel() * t.element_size() for t in model.adapters["default"].state_dict().values())  # type: ignore[index, operator, union-attr]
    return {
        "trained": BUDGETS[0] if mask else k,
        "fixed": fixed,
        "gradient_optimizer": states,
        "bound": 4 * weights + 20 * (BUDGETS[0] if mask else k),
        "saved": saved,
        "peak": {b: fixed + s for b, s in saved.items()},
        "file": stored / k if stored else None,
    }


def main() -> None:
    """Parse, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    batches = [int(b) for b in args.batches.split(",")]
    found = {}
    for name, make, mask in rows():
        found[name] = measure(make, mask, batches, args.side)
        print(name, file=sys.stderr)
    cells = [cell(name, row, batches) for name, row in found.items()]
    show(f"UNet of Stable Diffusion 1.5, latents {args.side}x{args.side}", cells)
    record = {"date": str(datetime.date.today()), "torch": torch.__version__, "side": args.side, "rows": found}
    write_json(args.out / "memory.json", record)
    write_text(args.out / "memory.md", markdown(cells))


def cell(name: str, row: dict[str, Any], batches: Sequence[int]) -> dict[str, str]:
    """A row as text."""
    gib = 2**30
    return {
        "method": name,
        "trained": f"{row['trained']:,}",
        "gradient + optimizer MiB": f"{row['gradient_optimizer'] / 2**20:,.0f}",
        "fixed GiB": f"{row['fixed'] / gib:.2f}",
        "4N + 20k GiB": "" if name == "full" else f"{row['bound'] / gib:.2f}",
        **{f"saved GiB, batch {b}": f"{row['saved'][b] / gib:.2f}" for b in batches},
        **{f"peak GiB, batch {b}": f"{row['peak'][b] / gib:.2f}" for b in batches},
        "file bytes a value": "" if row["file"] is None else f"{row['file']:.2f}",
    }


if __name__ == "__main__":
    main()
