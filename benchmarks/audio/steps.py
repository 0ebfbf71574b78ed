"""Cost of every method on AST-base (86 M parameters, random weights): training step, memory, inference.

    python benchmarks/audio/steps.py --methods "ast-lora,soft-moa(experts=14, position=mlp)" --rounds 7
    python benchmarks/audio/steps.py --saved
    python benchmarks/audio/steps.py --quick

Two spectrograms of 500 x 128 (590 tokens), 50 classes, mean over all tokens. A step is forward, cross entropy,
backward, AdamW, zeroed gradients, in float32 and train mode. Every round runs these in turn, in alternating order;
ratios are medians over the rounds, with a 95 % interval:

    the method      the final norm and the head train too, 39,986 parameters
    linear          our linear probing: final norm and head train, attention fused, as the method has it
    plain linear    the same weights, attention with its matrix (transformers' "eager"), the head alone trains (38,450):
                    what the published ratios were taken against, in the published code's own operations (transformers
                    4.28 then, today's here), and so the base of the targets
    full            our full fine-tuning

Saved: MiB of distinct storages that autograd keeps after a forward, without parameters. Inference: the adapted model in
eval mode against the plain one with fused attention. --saved only counts those bytes, one forward a method, and tells
which shapes hold most of them. Targets and what the published code took (on another machine, its own widths) stand
beside the methods of the same widths.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import peft_suite as ps
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.cli.settings import split_methods
from peft_suite.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peers_cpu
from measure import Trial, adapted, cost, kept, machine, markdown, show

CLASSES, BINS, SHAPES = 50, 128, 6
PFEIFFER, LORA = "ast-pfeiffer(bottleneck=8)", "ast-lora(rank=12)"
SOFT, DENSE = "soft-moa(experts=14, position=mlp)", "dense-moa(experts=14, position=mlp)"
QUICK = f"{PFEIFFER},{LORA},audio-prompts,{SOFT},{DENSE}"
METHODS = (
    f"linear,full,ast-bitfit,bitfit,{LORA},ast-lora,lora(rank=8),ssf,{PFEIFFER},ast-pfeiffer,"
    "ast-pfeiffer(insertion=sequential),ast-pfeiffer(insertion=before),ast-pfeiffer(position=attn),ast-houlsby,"
    "ast-houlsby(insertion=sequential),ast-houlsby(insertion=before),conformer,conformer(pre_norm=True),"
    "conformer(position=both),convpass,audio-prompts,"
    f"audio-prompts(num_tokens=300, deep=False),prefix,{SOFT},soft-moa,soft-moa(position=both),{DENSE},dense-moa,"
    "dense-moa(position=both)"
)


class Published(NamedTuple):
    """What the published code took: step over linear probing's, saved MiB; and at most this here."""

    ratio: float
    saved: int
    ratio_target: float | None = None
    saved_target: int | None = None


PUBLISHED = {
    "full": Published(3.00, 1050),
    PFEIFFER: Published(2.10, 756, 2.1, 430),
    "conformer(pre_norm=True)": Published(2.14, 758),
    LORA: Published(2.14, 795, 2.15, 430),
    "audio-prompts": Published(2.28, 807, 2.3, 460),
    SOFT: Published(2.14, 759, 2.15),
    DENSE: Published(3.40, 1346, 2.3, 430),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure row by row, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="separated by commas; default: all, with --quick those with targets")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=500, help="of a spectrogram, 100 a second")
    parser.add_argument("--rounds", type=int, help="7; with --quick 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True, help="beside full fine-tuning")
    parser.add_argument("--saved", action="store_true", help="count saved bytes and stop: seconds a method, no timing")
    parser.add_argument("--quick", action="store_true", help="methods with targets, one round, no full: minutes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args(argv)
    peers_cpu.pin(args.threads)
    specs = split_methods(args.methods or (QUICK if args.quick else METHODS))
    rounds = args.rounds or (1 if args.quick else 7)
    bench = Bench(args.batch, args.frames, args.device, full=args.full and not args.quick and not args.saved)
    title = f"AST-base, batch {args.batch}, {args.frames} frames, {machine(args.device)}"
    title += f", {args.threads} thread(s)" if args.device == "cpu" else ""
    facts = {"batch": args.batch, "frames": args.frames, "rounds": 0 if args.saved else rounds, "threads": args.threads}
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    named = args.device.partition(":")[0] + ("-saved" if args.saved else "-quick" if args.quick else "")
    path = args.out / f"steps-{named}"
    official = (args.batch, args.frames) == (2, 500)
    rows: list[dict[str, Any]] = []
    for spec in specs:
        start = time.perf_counter()
        try:
            rows.append(bench.saved(spec) if args.saved else bench.row(spec, rounds, 1 if args.quick else None))
        except UnsupportedError as reason:
            print(f"left out: {spec}: {reason}", file=sys.stderr)
            continue
        took, row = time.perf_counter() - start, rows[-1]
        ratio = f"{row['x_plain_linear']:.2f}x, " if "x_plain_linear" in row else ""
        print(f"{spec}: {ratio}{row['saved_mib']:.1f} MiB, {took:.0f} s", file=sys.stderr)
        record = {"machine": machine(args.device), **facts, "versions": versions, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")  # what is measured stays
    if not rows:
        return
    cells = [(saved_cells if args.saved else cells_of)(row, official) for row in rows]
    show(title, cells)
    note = title
    if not args.saved:
        ours, base = (1e3 * statistics.median(r[key] for r in rows) for key in ("linear_s", "plain_linear_s"))
        note += f". {rounds} rounds; linear probing {ours:.0f} ms a step, plain {base:.0f}"
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    path.with_suffix(".md").write_text(markdown(cells) + f"\n{note}. {told}.\n", encoding="utf-8")


class Bench:
    """Spectrograms of one shape, and the models that every method is compared with."""

    def __init__(self, batch: int, frames: int, device: str, *, full: bool) -> None:
        torch.manual_seed(0)
        self.x = 0.5 * torch.randn(batch, frames, BINS).to(device)  # features are normalised to this deviation
        self.y = torch.randint(0, CLASSES, (batch,)).to(device)
        encoder = transformers.ASTModel(transformers.ASTConfig(max_length=frames, num_mel_bins=BINS))
        self.base = AudioClassifier(encoder, CLASSES).to(device)
        self.plain = copy.deepcopy(self.base).eval()
        published: Any = copy.deepcopy(self.base).requires_grad_(False)
        published.encoder.set_attn_implementation("eager")
        published.head.requires_grad_(True)
        models: dict[str, nn.Module] = {"linear": ps.adapt(copy.deepcopy(self.base), "linear")}
        models["plain_linear"] = published
        if full:
            models["full"] = ps.adapt(copy.deepcopy(self.base), "full")
        self.others = {name: Trial(model, self.x, self.y) for name, model in models.items()}

    def row(self, spec: str, rounds: int, inferences: int | None) -> dict[str, Any]:
        """Everything about one method."""
        model = adapted(copy.deepcopy(self.base), spec, self.x, self.y)
        found = cost(spec, model, self.plain, self.others, rounds, inferences=inferences)
        del model
        gc.collect()
        return found

    def saved(self, spec: str) -> dict[str, Any]:
        """What one method keeps, and in which shapes."""
        model = adapted(copy.deepcopy(self.base), spec, self.x, self.y).train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = kept(model, self.x, self.y)
        shapes = {shape: size / 2**20 for shape, size in found["by_shape"].items()}
        del model
        gc.collect()  # overridden forwards make cycles: without this, every method's copy stays a while
        return {"method": spec, "trained": trained, "saved_mib": found["saved"] / 2**20, "by_shape_mib": shapes}


def cells_of(row: dict[str, Any], official: bool) -> dict[str, str]:
    """A row for people; ``official``: targets are about this shape."""
    told = PUBLISHED.get(row["method"]) if official else None
    return {
        "method": row["method"],
        "trained": f"{row['trained']:,}",
        "step / linear": f"{row['x_linear']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        "/ plain linear": f"{row['x_plain_linear']:.2f}",
        "target (published)": goal(told and told.ratio_target, told and told.ratio, ".2f"),
        **({"/ full": f"{row['x_full']:.2f}"} if "x_full" in row else {}),
        "saved MiB": f"{row['saved_mib']:.0f}",
        "target (publ.)": goal(told and told.saved_target, told and told.saved, "d"),
        **({"peak MiB": f"{row['peak_mib']:.0f}"} if "peak_mib" in row else {}),
        "inference / plain": f"{row['x_plain']:.2f}",
    }


def saved_cells(row: dict[str, Any], official: bool) -> dict[str, str]:
    """The same of --saved."""
    told = PUBLISHED.get(row["method"]) if official else None
    largest = list(row["by_shape_mib"].items())[:SHAPES]
    return {
        "method": row["method"],
        "trained": f"{row['trained']:,}",
        "saved MiB": f"{row['saved_mib']:.1f}",
        "target (publ.)": goal(told and told.saved_target, told and told.saved, "d"),
        "most of it": ", ".join(f"{shape}: {size:.1f}" for shape, size in largest if size >= 0.1),
    }


def goal(target: float | None, published: float | None, form: str) -> str:
    """``"2.10 (2.14)"``; without a target the published figure alone."""
    return " ".join(([] if target is None else [f"{target:{form}}"]) + ([f"({published:{form}})"] if published else []))


if __name__ == "__main__":
    main()
