"""Step time, memory and bookkeeping of sparse fine-tuning on a stack of 76 M weights, beside what it replaces.

    python benchmarks/diffusion/stack.py [--rows head,sara,lora] [--rounds 7] [--out DIR] [--no-peak]

The stack of docs/methods/costs.md, section 5, built again from its description: 8 Conv2d 512-512 3x3 on 16x16 maps and
12 pairs Linear 768-3072-768 on the pooled 8x8 maps between two projections, 76,335,360 parameters, random weights,
batch 4, mean squared error, float32. Sparse rows train the 5 % smallest weights; LoRA has rank 28 on the 32 layers in
the middle. A step is forward, backward, AdamW, zeroed gradients; all rows run in turn in one process, in alternating
order, and share the frozen weights. Ratios are medians over the rounds.

Saved: bytes of distinct storages that autograd keeps after a forward, without parameters and buffers. Held: weights,
adapter (indices included), gradients as they are after backward, and optimizer state, against the bound 4N + 20k bytes
for N weights of which k train. Peak growth: a process per row; the resident high-water mark over three steps after two,
minus what is resident, weights included, before adapter and optimizer are made (a tiny stack has been through one step
by then, so that imports do not count); allocator slack included, so read it to about 50 MB. "Tight" is the same with a
C library that gives every freed block of 256 KiB and more back at once (MALLOC_MMAP_THRESHOLD_=262144): what the
tensors themselves take.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from counts import bytes_of, saved_bytes, states_of
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.anatomy import Anatomy
from peft_suite.storage import write_json, write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from measure import interleaved, machine, markdown, ratio, show

BATCH, SHARE, RANK = 4, 0.05, 28
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # glibc: larger blocks go back to the system when freed
ROWS = {
    "head": "head only",
    "full": "full, AdamW",
    "sara": "SaRA, 5 % smallest",
    "masked": "the same, dense masks (LT-SFT's way)",
    "lora": "LoRA r=28",
    "peft-lora": "LoRA r=28, HF peft",
    "dora": "DoRA r=28",
    "peft-dora": "DoRA r=28, HF peft",
}


class Stack(nn.Module):
    """[B, 512, 16, 16] -> [B, 64, 512]."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        maps, wide, inner = 512 // scale, 768 // scale, 3072 // scale
        self.convs = nn.ModuleList(nn.Conv2d(maps, maps, 3, padding=1) for _ in range(8))
        self.enter = nn.Linear(maps, wide)
        self.up = nn.ModuleList(nn.Linear(wide, inner) for _ in range(12))
        self.down = nn.ModuleList(nn.Linear(inner, wide) for _ in range(12))
        self.head = nn.Linear(wide, maps)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + F.silu(conv(x))
        x = self.enter(F.avg_pool2d(x, 2).flatten(2).transpose(1, 2))  # [B, 64, 768]
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        y: Tensor = self.head(x)
        return y


ANATOMY = Anatomy(family="stack", dim=768, blocks=())
MIDDLE = ("convs.*", "up.*", "down.*")


class Row:
    """One way to fine-tune the stack: model, trained tensors, optimizer, and one step."""

    def __init__(
        self, name: str, weights: dict[str, Tensor], x: Tensor, y: Tensor, scale: int = 1, copies: bool = True
    ) -> None:
        self.x, self.y = x, y
        with torch.device("meta"):
            stack = Stack(scale)
        own = copies and name in ("full", "masked")
        stack.load_state_dict({n: t.clone() if own else t for n, t in weights.items()}, assign=True)
        self.model, self.masks = adapted(name, stack)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # Masked gradients keep unselected entries only without decay.
        decay = 0.0 if self.masks else 0.01
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=decay)

    def backward(self) -> None:
        """Forward and backward, and masks on the gradients where there are any."""
        F.mse_loss(self.model(self.x), self.y).backward()
        for p, mask in self.masks.items():
            if p.grad is not None:
                p.grad.mul_(mask)

    def step(self) -> None:
        """One training step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def counts(self) -> dict[str, Any]:
        """Trained values k, bytes saved by a forward, bytes held after backward, and the bound 4N + 20k."""
        kept = saved_bytes(self.model, lambda: F.mse_loss(self.model(self.x), self.y))[1]
        self.backward()
        weights = sum(p.numel() for n, p in self.model.named_parameters() if base_name(n))
        k = sum(int(m.sum()) for m in self.masks.values()) or sum(p.numel() for p in self.trained)
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *(p.grad for p in self.trained),
            *self.masks.values(),
        ]
        state = states_of(self.optimizer)
        held = bytes_of((*tensors, *state))
        states = bytes_of((*state, *(p.grad for p in self.trained)))
        self.optimizer.zero_grad()
        return {"trained": k, "saved": kept, "held": held, "states": states, "bound": 4 * weights + 20 * k}


def base_name(name: str) -> bool:
    """Whether a parameter is a weight of the stack rather than of an adapter."""
    return not name.startswith("adapters.") and "lora_" not in name


def adapted(name: str, stack: Stack) -> tuple[nn.Module, dict[nn.Parameter, Tensor]]:
    """The stack ready to train, and masks by parameter."""
    if name == "full":
        return stack.requires_grad_(True), {}
    if name == "masked":
        bound = smallest(stack)
        return stack.requires_grad_(True), {p: p.detach().abs() < bound for p in stack.parameters()}
    if name == "sara":
        return ps.adapt(stack, f"sara(quantile={SHARE}, weight_decay=0, progressive=None)", anatomy=ANATOMY), {}
    if name in ("lora", "dora"):
        spec = {"name": "lora", "rank": RANK, "targets": MIDDLE, "dora": name == "dora"}
        return ps.adapt(stack, spec, anatomy=ANATOMY), {}
    if name.startswith("peft"):
        import peft

        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=r"(convs|up|down)\.\d+",
            use_dora=name == "peft-dora",
        )
        return peft.get_peft_model(stack, config), {}  # type: ignore[arg-type,return-value]
    stack.requires_grad_(False)
    stack.head.requires_grad_(True)
    return stack, {}


def smallest(stack: Stack) -> float:
    """The value below which the share of |w| lies."""
    sizes_ = torch.cat([p.detach().abs().flatten() for p in stack.parameters()])
    return float(sizes_.kthvalue(round(SHARE * sizes_.numel()) + 1).values)


def inputs(scale: int = 1) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, x and y, the same for every row and process."""
    torch.manual_seed(0)
    weights = {n: t.detach() for n, t in Stack(scale).state_dict().items()}
    return weights, torch.randn(BATCH, 512 // scale, 16, 16), torch.randn(BATCH, 64, 512 // scale)


def peak(name: str) -> int:
    """Resident growth of this process in bytes; see the top of the file. Linux."""
    Row(name, *inputs(32), 32).step()
    weights, x, y = inputs()
    gc.collect()
    before = status("VmRSS")
    row = Row(name, weights, x, y, copies=False)
    del weights
    gc.collect()
    for _ in range(2):
        row.step()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        row.step()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--one-peak", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_peak:
        print(json.dumps(peak(args.one_peak)))
        return
    names = [n for n in args.rows.split(",") if n]
    found: dict[str, dict[str, Any]] = {n: {} for n in names}
    if args.peak:
        for name in names:
            command = [sys.executable, __file__, "--one-peak", name, "--threads", str(args.threads)]
            for kind, setting in (("peak", {}), ("tight_peak", TIGHT)):
                out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **setting})
                found[name][kind] = json.loads(out.stdout)
                print(f"{name}: {kind} {found[name][kind] / 2**20:.0f} MiB", file=sys.stderr)
    weights, x, y = inputs()
    rows = {name: Row(name, weights, x, y) for name in names}
    calls: dict[str, Callable[[], Any]] = {name: row.step for name, row in rows.items()}
    times = interleaved(calls, args.rounds, 2)
    for name, row in rows.items():
        found[name] |= row.counts()
        found[name]["ms"] = 1e3 * statistics.median(times[name])
        found[name]["times"] = times[name]
        if "head" in names:
            found[name]["x_head"] = ratio(times[name], times["head"])
        if "full" in names:
            found[name]["x_full"] = ratio(times[name], times["full"])
    record = {
        "date": str(datetime.date.today()),
        "machine": machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "parameters": sum(t.numel() for t in weights.values()),
        "rows": found,
    }
    cells = [cell(name, row) for name, row in found.items()]
    show("76 M stack, batch 4", cells)
    write_json(args.out / "stack.json", record)
    write_text(args.out / "stack.md", markdown(cells))


def cell(name: str, row: dict[str, Any]) -> dict[str, str]:
    """A row as text."""
    head, full = row.get("x_head"), row.get("x_full")
    mib = 2**20
    return {
        "method": ROWS[name],
        "trained": f"{row['trained']:,}",
        "step ms": f"{row['ms']:.0f}",
        "x head only": "" if head is None else f"{head['ratio']:.2f} ({head['low']:.2f}-{head['high']:.2f})",
        "x full": "" if full is None else f"{full['ratio']:.2f}",
        "saved MiB": f"{row['saved'] / mib:.0f}",
        "gradient + optimizer MiB": f"{row['states'] / mib:.1f}",
        "held MiB": f"{row['held'] / mib:.1f}",
        "4N + 20k MiB": f"{row['bound'] / mib:.1f}",
        "peak growth MiB": f"{row['peak'] / mib:.0f}" if "peak" in row else "",
        "tight": f"{row['tight_peak'] / mib:.0f}" if "peak" in row else "",
    }


if __name__ == "__main__":
    main()
