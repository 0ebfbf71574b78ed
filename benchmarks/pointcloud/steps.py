"""Cost of every method on Point-MAE (22 M parameters, random weights): training step, memory, geometry, inference.

    python benchmarks/pointcloud/steps.py --methods pointgst,lora --batch 8,32 --points 1024,2048 --rounds 7
    python benchmarks/pointcloud/steps.py --quick

A step is forward, cross entropy of 15 classes, backward, clipping of gradients to norm 10, AdamW, zeroed gradients, in
float32. Every round runs these in turn, in alternating order; ratios are medians over the rounds, with a 95 % interval:

    the method      class token and its position train too, as in the published codes and counts (--frozen-tokens: not)
    linear          our linear probing: the head (three layers, 267,535 parameters) trains, all else is frozen
    plain linear    the same head on the same weights, everything computed as in the published codes, in plain torch
                    operations, frozen layers in train mode: the base of the published codes' ratios, and so of targets
    full            our full fine-tuning

Saved: bytes of distinct storages that autograd keeps after a forward, without parameters. Geometry: the share of the
step spent in farthest points, neighbours, graphs and their eigenvectors, timed in further steps. Every step makes its
geometry anew, as training on augmented clouds does; all blocks of a step share it. Point-PEFT's memory has as many rows
as ScanObjectNN has training clouds. Inference: the adapted model in eval mode against the plain one. Targets and what
the published codes took (on another machine, 8 x 1024 points) stand beside Point-PEFT, IDPT, DAPT and PointGST.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_suite import kernels, plugins
from peft_suite.cli.settings import split_methods
from peft_suite.errors import UnsupportedError
from peft_suite.pointcloud.methods import idpt, pointgst
from peft_suite.pointcloud.methods.point_peft_parts import Bank
from peft_suite.pointcloud.models.transformer import PointTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peers_cpu
import plain
import table
from measure import Trial, adapted, cost, machine, markdown, show, timed_calls

CLASSES, CLIP, GROUP, MEMORY = 15, 10.0, 16, 11_392
METHODS = (
    "linear,full,bitfit,vpt(num_tokens=10, deep=True),lora(rank=8),ssf,adaptformer,pfeiffer,houlsby,parallel-adapter,"
    "idpt,idpt(generator=dgcnn_light2),idpt(generator=dgcnn_light),idpt(generator=mlp),idpt(generator=transformer),"
    "point-peft,point-peft(official=True),pointgst,pointgst(official=True),dapt"
)
QUICK = "point-peft,idpt,dapt,pointgst"
GEOMETRY = (
    (kernels, "farthest_point_sampling", "fps"),
    (kernels, "knn", "knn"),
    (kernels, "ball_query", "knn"),
    (kernels, "group_relative", "grouping"),
    (kernels, "morton_order", "graph"),
    (kernels, "graph_fourier_basis", "graph"),
    (kernels, "eigh_small", "graph"),
    (pointgst, "official_laplacian", "graph"),
    (idpt, "nearest", "knn"),
)
LABELS = ("fps", "knn", "grouping", "graph")


class Target(NamedTuple):
    """Step over plain linear probing's, and saved MiB: at most these; what the published code took."""

    ratio: float
    saved: int
    official_ratio: float
    official_saved: int


TARGETS = {
    "point-peft": Target(3.0, 470, 5.93, 836),
    "idpt": Target(1.9, 200, 4.56, 465),
    "dapt": Target(1.75, 260, 2.21, 257),
    "pointgst": Target(1.52, 100, 1.52, 100),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure shape by shape and row by row, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="separated by commas; default: all")
    parser.add_argument("--batch", type=numbers, default=[8], help="clouds, one or more numbers (8)")
    parser.add_argument("--points", type=numbers, default=[1024], help="of a cloud, one or more (1024); a group per 16")
    parser.add_argument("--rounds", type=int, help="7; with --quick 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="cpu, cuda or both: cpu,cuda; default: cpu, and cuda where there is one")
    parser.add_argument("--frozen-tokens", action="store_true", help="methods leave class token and position frozen")
    parser.add_argument("--quick", action="store_true", help="four methods, two rounds, no full fine-tuning: a minute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    peers_cpu.pin(args.threads)
    default = QUICK if args.quick else METHODS + (",any2point" if "any2point" in plugins.methods() else "")
    specs = split_methods(args.methods or default)
    rounds = args.rounds or (2 if args.quick else 7)
    devices = (args.device or ("cpu,cuda" if torch.cuda.is_available() else "cpu")).split(",")
    for device, points, batch in itertools.product(devices, args.points, args.batch):
        shape = f"{batch}x{points}"
        facts = {"device": device, "threads": args.threads, "rounds": rounds}
        facts |= {"batch": batch, "points": points, "tokens": "frozen" if args.frozen_tokens else "trained"}
        bench = Bench(batch, points, device, not args.frozen_tokens, not args.quick)
        rows: list[dict[str, Any]] = []
        path = args.out / f"steps{'-quick' if args.quick else ''}-{device.partition(':')[0]}-{shape}"
        for spec in specs:
            start = time.perf_counter()
            try:
                rows.append({**facts, **bench.row(spec, rounds)})
            except UnsupportedError as reason:
                print(f"left out: {spec}: {reason}", file=sys.stderr)
                continue
            took = time.perf_counter() - start
            print(f"{device} {shape} {spec}: {rows[-1]['x_plain_linear']:.2f}x, {took:.0f} s", file=sys.stderr)
            table.write(path, rows)  # after every row: what is measured stays
        if not rows:
            continue
        title = f"Point-MAE, {batch} clouds of {points} points, {machine(device)}"
        cells = [cells_of(row, batch == 8 and points == 1024) for row in rows]
        show(f"{title}, {args.threads} thread(s)" if device == "cpu" else title, cells)
        ours, base = (1e3 * statistics.median(r[key] for r in rows) for key in ("linear_s", "plain_linear_s"))
        note = f"{title}. {rounds} rounds; linear probing {ours:.0f} ms a step, plain {base:.0f}. {table.versions()}."
        path.with_suffix(".md").write_text(markdown(cells) + f"\n{note}\n", encoding="utf-8")


def numbers(text: str) -> list[int]:
    """``"8,32"`` as two numbers."""
    return [int(part) for part in text.split(",")]


class Bench:
    """Clouds of one shape, and the models that every method is compared with."""

    def __init__(self, batch: int, points: int, device: str, tokens: bool, full: bool) -> None:
        torch.manual_seed(0)
        self.x = clouds(batch, points).to(device)
        self.y = torch.randint(0, CLASSES, (batch,)).to(device)
        groups = points // GROUP
        self.base = PointTransformer(CLASSES, groups=groups, fresh_tokens=False).to(device)
        self.tokens = tokens
        self.plain = self.fresh(False).eval()
        published = plain.plainly(self.fresh(False)).requires_grad_(False)
        published.get_submodule("cls_head_finetune").requires_grad_(True)
        models = {"linear": adapted(self.fresh(False), "linear", self.x, self.y), "plain_linear": published}
        if full:
            models["full"] = adapted(self.fresh(False), "full", self.x, self.y)
        self.others = {name: Trial(model, self.x, self.y, CLIP) for name, model in models.items()}

    def fresh(self, tokens: bool) -> PointTransformer:
        """The same weights again; ``tokens``: methods train the class token and its position."""
        model = copy.deepcopy(self.base)
        model.fresh_tokens = tokens
        return model

    def row(self, spec: str, rounds: int) -> dict[str, Any]:
        """Everything about one method."""
        model = adapted(self.fresh(self.tokens), spec, self.x, self.y, max(2, -(-8 // len(self.x))))  # 8 to recall
        for part in model.modules():
            if isinstance(part, Bank):
                part.memory = torch.randn(MEMORY, part.memory.shape[1], device=self.x.device)
                part.length = part.memory.norm(dim=1)
        row = cost(spec, model, self.plain, self.others, rounds, CLIP)
        row |= self.geometry(Trial(model, self.x, self.y, CLIP).step, max(1, rounds // 2))
        del model
        gc.collect()
        return row

    @staticmethod
    def geometry(step: Callable[[], None], steps: int) -> dict[str, float]:
        """Milliseconds of a step in each kind of geometry, and the share of all."""
        with timed_calls(GEOMETRY) as spent:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            total = time.perf_counter() - start
        found = {f"{label}_ms": 1e3 * spent.get(label, 0.0) / steps for label in LABELS}
        return {**found, "geometry_share": sum(spent.values()) / total}


def clouds(batch: int, points: int) -> Tensor:
    """Points on ellipsoids, ``[B, N, 3]``."""
    axes = torch.empty(batch, 1, 3).uniform_(0.4, 1)
    return nn.functional.normalize(torch.randn(batch, points, 3), dim=-1) * axes


def cells_of(row: dict[str, Any], official: bool) -> dict[str, str]:
    """A row for people; ``official``: the targets are about this shape."""
    target = TARGETS.get(row["method"]) if official else None
    return {
        "method": row["method"] + (" (and the class token)" if row["method"] == "linear" != row["tokens"] else ""),
        "trained": f"{row['trained']:,}",
        "step / linear": f"{row['x_linear']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        "/ plain linear": f"{row['x_plain_linear']:.2f}",
        "target (published)": f"{target.ratio:.2f} ({target.official_ratio:.2f})" if target else "",
        **({"/ full": f"{row['x_full']:.2f}"} if "x_full" in row else {}),
        "saved MiB": f"{row['saved_mib']:.0f}",
        "target (publ.)": f"{target.saved} ({target.official_saved})" if target else "",
        **({"peak MiB": f"{row['peak_mib']:.0f}"} if "peak_mib" in row else {}),
        "geometry": f"{row['geometry_share']:.1%}",
        "fps, knn, grouping, graph ms": ", ".join(f"{row[f'{label}_ms']:.1f}" for label in LABELS),
        "inference / plain": f"{row['x_plain']:.2f}",
    }


if __name__ == "__main__":
    main()
