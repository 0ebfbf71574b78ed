"""Step time of Stable Diffusion 1.5's UNet with random weights on the CPU, ratios of one process.

    python benchmarks/diffusion/steps.py [--rounds 3] [--batch 4] [--side 8] [--out DIR]

Latents of 8x8, 77 text tokens, float32. All rows share the frozen weights (3.4 GB) and run in turn; the reference is
the forward of the frozen model without gradients. Dense masks and full fine-tuning hold 13 GB and are left out unless
--all is given.
Ratios at full size will be others: work on the weights does not shrink with the number of tokens.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from memory import ATTENTION, lora
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.storage import write_json, write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from measure import interleaved, machine, markdown, ratio, show

M = 1_000_000


def fresh(weights: dict[str, Tensor] | None) -> nn.Module:
    """The UNet on shared weights, or with weights of its own."""
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
    if weights is None:
        return UNet2DConditionModel(**fields)
    with torch.device("meta"):
        model = UNet2DConditionModel(**fields)
    model.load_state_dict(weights, assign=True)
    return model.train()


class Row:
    """A model, its optimizer and a step."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], noise: Tensor) -> None:
        self.model, self.inputs, self.noise = model, inputs, noise
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, foreach=False) if self.trained else None

    def step(self) -> None:
        """Forward, backward, update; of a model without trained values a forward."""
        if self.optimizer is None:
            with torch.no_grad():
                self.model(*self.inputs)
            return
        nn.functional.mse_loss(self.model(*self.inputs).sample, self.noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="with full fine-tuning, which needs 13 GB more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weights = {n: t.detach() for n, t in fresh(None).state_dict().items()}
    inputs = torch.randn(args.batch, 4, args.side, args.side), torch.ones(args.batch), torch.randn(args.batch, 77, 768)
    noise = torch.randn(args.batch, 4, args.side, args.side)
    made: dict[str, nn.Module] = {"frozen, forward": fresh(weights).requires_grad_(False)}
    for budget in (5, 20, 50):
        spec = f"sara(budget={budget * M}, weight_decay=0, progressive=None)"
        made[f"SaRA, {budget}M"] = ps.adapt(fresh(weights), spec)
    made["LoRA on attention, 5M"] = lora(fresh(weights), 5 * M, ATTENTION)[0]
    made["LoRA on attention, 50M"] = lora(fresh(weights), 50 * M, ATTENTION)[0]
    made["LoRA on every layer, 5M"] = lora(fresh(weights), 5 * M, ("*",))[0]
    made["DoRA on attention, 5M"] = lora(fresh(weights), 5 * M, ATTENTION, True)[0]
    if args.all:
        made["full"] = fresh({n: t.clone() for n, t in weights.items()}).requires_grad_(True)
    rows = {name: Row(model, inputs, noise) for name, model in made.items()}
    times = interleaved({name: row.step for name, row in rows.items()}, args.rounds, 1)
    found = {
        name: {
            "trained": sum(p.numel() for p in row.trained),
            "ms": 1e3 * statistics.median(times[name]),
            "x_forward": ratio(times[name], times["frozen, forward"]),
            "x_lora": ratio(times[name], times["LoRA on attention, 5M"]),
        }
        for name, row in rows.items()
    }
    cells = [
        {
            "method": name,
            "trained": f"{row['trained']:,}",
            "step ms": f"{row['ms']:,.0f}",
            "x forward": f"{row['x_forward']['ratio']:.2f}",  # type: ignore[index]
            "x LoRA 5M": f"{row['x_lora']['ratio']:.2f}",  # type: ignore[index]
        }
        for name, row in found.items()
    ]
    show(f"UNet of Stable Diffusion 1.5, batch {args.batch}, latents {args.side}x{args.side}", cells)
    facts = {"date": str(datetime.date.today()), "machine": machine(), "torch": torch.__version__}
    write_json(
        args.out / "steps.json", {**facts, **{k: str(v) for k, v in vars(args).items() if k != "out"}, "rows": found}
    )
    write_text(args.out / "steps.md", markdown(cells))


if __name__ == "__main__":
    main()
