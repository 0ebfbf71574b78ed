"""Cost of every method on ViT-B/16: training step, memory, inference, file. Ratios within one process.

    python benchmarks/vision/steps.py [--methods ssf,lora] [--rounds 5] [--batch 4] [--threads 1] [--device cuda]

A step is forward, cross entropy, backward, AdamW, zeroed gradients, in float32. Linear probing (a frozen backbone, the
head alone trains) runs in turn with each method, in alternating order; the ratio is the median over the rounds. Saved:
bytes of distinct storages that autograd keeps after a forward, without parameters and buffers. Files: bytes on disk
against four bytes a trained value (its bits in one-bit methods), head included. Inference: the adapted model in eval
mode against the plain one in turn; merged: whether the very same operations run. Rows marked "peer" are of other
libraries.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.cli.settings import split_methods
from peft_suite.errors import MergeError
from peft_suite.vision.methods.binary import QuantisedLinear

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from measure import Trial, adapted, cost, forward_ops, machine

MODEL, CLASSES = "vit_base_patch16_224", 100
METHODS = (
    "full,bitfit,norm,lora(rank=8),adaptformer(bottleneck=8),adaptformer,pfeiffer,houlsby,parallel-adapter,ssf,ia3,"
    "vpt(num_tokens=50),vpt(num_tokens=50, deep=True),convpass,convpass-attn,mam,hst,spt-lora,spt-adapter,"
    "bi-adaptformer,bi-lora,snell,snella"
)


def main() -> None:
    """Parse, measure row by row, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="HF peft's LoRA, if there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    y = torch.randint(0, CLASSES, (args.batch,), device=args.device)
    state = timm.create_model(args.model, num_classes=CLASSES).state_dict()

    def fresh() -> nn.Module:
        model: nn.Module = timm.create_model(args.model, num_classes=CLASSES)
        model.load_state_dict(state)
        return model.to(args.device)

    linear = Trial(ps.adapt(fresh(), "linear"), x, y)
    plain = fresh()
    specs: list[str] = list(split_methods(args.methods))
    rows: list[dict[str, Any]] = []
    builders: list[tuple[str, Callable[[], nn.Module]]] = [(s, lambda s=s: adapted(fresh(), s, x, y)) for s in specs]
    if args.peer and (peer := peer_lora(fresh)) is not None:
        builders.append(peer)
    for label, build in builders:
        start = time.perf_counter()
        model = build()
        rows.append(cost(label, model, plain, {"linear": linear}, args.rounds))
        if "adapters" in model._modules:
            rows[-1] |= files(model)
            rows[-1]["merged"] = merged(model, plain, x)
        print(f"{label}: {rows[-1]['x_linear']:.2f}x, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        del model
        gc.collect()
    record = {
        "date": str(datetime.date.today()),
        "machine": machine(args.device),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "model": args.model,
        "batch": args.batch,
        "rounds": args.rounds,
        "linear_ms": 1e3 * sorted(r["linear_s"] for r in rows)[len(rows) // 2],
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"steps-{args.device.partition(':')[0]}.json").write_text(json.dumps(record, indent=1) + "\n")
    show(record)


def peer_lora(fresh: Callable[[], nn.Module]) -> tuple[str, Callable[[], nn.Module]] | None:
    """HF peft's LoRA on the fused qkv; None where the library is not installed."""
    try:
        import peft
    except ImportError:
        return None
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    return f"peer: peft {peft.__version__} lora on qkv", lambda: peft.get_peft_model(fresh(), config)  # type: ignore[return-value,arg-type]


def files(model: nn.Module) -> dict[str, Any]:
    """Bytes of the tensor file, and the least that its trained values need."""
    bits = {id(m.weight): m.bits for m in model.modules() if isinstance(m, QuantisedLinear)}
    own = [p for p in model.adapters.parameters() if p.requires_grad]  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {"file_bytes": size, "least_bytes": sum(p.numel() * bits.get(id(p), 32) // 8 for p in own)}


def merged(model: nn.Module, plain: nn.Module, x: Tensor) -> str:
    """ "same operations", "other operations", or "does not fold"."""
    try:
        ps.merge(model)
    except MergeError:
        return "does not fold"
    return "same operations" if forward_ops(model, x) == forward_ops(plain, x) else "other operations"


def show(record: dict[str, Any]) -> None:
    """The table."""
    full = next((r["x_linear"] for r in record["rows"] if r["method"] == "full"), None)
    columns = (
        "method",
        "trained",
        "step / linear",
        "/ full",
        "saved MiB",
        "inference / plain",
        "file / least",
        "merged",
    )
    title = f"{record['model']}, batch {record['batch']}, {record['machine']}, {record['threads']} thread(s)"
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for r in record["rows"]:
        size = f"{r['file_bytes']:,} / {r['least_bytes']:,}" if "file_bytes" in r else ""
        table.add_row(
            escape(r["method"]),
            f"{r['trained']:,}",
            f"{r['x_linear']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            f"{r['x_linear'] / full:.2f}" if full else "",
            f"{r['saved_mib']:.0f}",
            f"{r['x_plain']:.2f}",
            size,
            r.get("merged", ""),
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
