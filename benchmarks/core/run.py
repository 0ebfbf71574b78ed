"""Core benchmarks: import time, file and lifecycle verbs, training steps. Everything side by side in one run.

    python benchmarks/core/run.py [--pairs 15] [--only imports,verbs,steps] [--out benchmarks/core/results]

Ratios below 1 mean that peft-suite takes less. Counts are exact; times are medians of interleaved pairs with a
distribution-free 95 % interval, on one thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import peft_suite as ps

sys.path.insert(0, str(Path(__file__).parent))
import handwritten
from measure import count, forward_ops, paired, step

CLASSES = 100


def imports(pairs: int) -> list[dict[str, Any]]:
    """``import peft_suite`` and ``peft-suite --help`` against ``import torch``, as whole processes."""

    def process(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    torch_only = process("import torch")
    rows = []
    for label, code in (
        ("import peft_suite", "import peft_suite"),
        ("import peft_suite and its verbs", "import peft_suite; peft_suite.adapt"),
        (
            "peft-suite --help",
            "import sys; sys.argv = ['peft-suite', '--help']; from peft_suite.cli import main; main()",
        ),
        ("import peft", "import peft"),
    ):
        rows.append(
            {"what": label, "against": "import torch", **paired(process(code), torch_only, max(3, pairs // 3), 1)}
        )
    return rows


def verbs(pairs: int) -> list[dict[str, Any]]:
    """adapt, save, load, merge of LoRA r=8 on ViT-B/16: q,v and head, against peft's LoRA on the fused qkv and head."""
    base = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    state = base.state_dict()

    def fresh() -> nn.Module:
        model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
        model.load_state_dict(state)
        return model

    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    folder = Path(tempfile.mkdtemp())
    stage: dict[str, nn.Module] = {}

    def timed(
        label: str, prepare: Callable[[str], None], ours: Callable[[], Any], theirs: Callable[[], Any]
    ) -> dict[str, Any]:
        from time import perf_counter

        a, b = [], []
        for i in range(max(5, pairs // 2)):
            for who, fn, times in (("ours", ours, a), ("theirs", theirs, b))[:: 1 if i % 2 else -1]:
                prepare(who)
                start = perf_counter()
                fn()
                times.append(perf_counter() - start)
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        middle = len(ratios) // 2
        half = int(0.98 * len(ratios) ** 0.5)
        return {
            "what": label,
            "against": f"peft {peft.__version__}",
            "ours_s": sorted(a)[middle],
            "theirs_s": sorted(b)[middle],
            "ratio": ratios[middle],
            "low": ratios[max(0, middle - half)],
            "high": ratios[min(len(ratios) - 1, middle + half)],
        }

    def plain(_: str) -> None:
        stage["m"] = fresh()

    def to_save(who: str) -> None:
        adapted(who)
        shutil.rmtree(folder / ("ours" if who == "ours" else "peft"), ignore_errors=True)

    def adapted(who: str) -> None:
        stage["m"] = ps.adapt(fresh(), "lora(rank=8)") if who == "ours" else peft.get_peft_model(fresh(), config)

    rows = [
        timed(
            "adapt",
            plain,
            lambda: ps.adapt(stage["m"], "lora(rank=8)"),
            lambda: peft.get_peft_model(stage["m"], config),
        ),
        timed(
            "save",
            to_save,
            lambda: ps.save(stage["m"], folder / "ours"),
            lambda: stage["m"].save_pretrained(folder / "peft"),
        ),
        timed(
            "load",
            plain,
            lambda: ps.load(stage["m"], folder / "ours"),
            lambda: peft.PeftModel.from_pretrained(stage["m"], folder / "peft"),
        ),
        timed("merge", adapted, lambda: ps.merge(stage["m"]), lambda: stage["m"].merge_and_unload()),
    ]
    trained = ps.summary(ps.adapt(fresh(), "lora(rank=8)")).trainable
    size = (folder / "ours" / "adapter_model.safetensors").stat().st_size
    rows.append({"what": "adapter file, bytes", "ours": size, "limit": 4 * trained + 16 * 1024, "trained": trained})
    return rows


def steps(pairs: int, model: str = "vit_small_patch16_224", batch: int = 4) -> list[dict[str, Any]]:
    """Training steps on ViT-S against handwritten minimal versions, and LoRA against peft on the same fused qkv."""
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))

    def new() -> nn.Module:
        return timm.create_model(model, num_classes=CLASSES)

    def compare(label: str, against: str, ours: nn.Module, theirs: nn.Module) -> dict[str, Any]:
        a, b = count(ours, x, y), count(theirs, x, y)
        trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
        assert trained[0] == trained[1], f"{label}: {trained} parameters are not the same method"
        row = paired(lambda: step(ours, x, y), lambda: step(theirs, x, y), pairs)
        return {
            "what": label,
            "against": against,
            "ops": [a["ops"], b["ops"]],
            "saved_mib": [a["saved"] / 2**20, b["saved"] / 2**20],
            **row,
        }

    rows = []
    for name, (spec, _) in handwritten.METHODS.items():
        rows.append(compare(spec, "handwritten", ps.adapt(new(), spec), handwritten.build(new(), name)))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    fused = "lora(rank=8, targets=[q,k,v], shared_a=True)"
    rows.append(compare(fused, f"peft {peft.__version__}", ps.adapt(new(), fused), peft.get_peft_model(new(), config)))
    for spec in ("ssf", "lora(rank=8)"):
        rows.append(merged(spec, new, x))
    return rows


def merged(spec: str, new: Callable[[], nn.Module], x: Tensor) -> dict[str, Any]:
    """Inference of a merged model against the plain one: the very same operations."""
    plain, model = new().eval(), new().eval()
    ps.merge(ps.adapt(model, spec))
    a, b = forward_ops(model, x), forward_ops(plain, x)
    return {
        "what": f"{spec}, merged inference",
        "against": "plain model",
        "same_ops": a == b,
        "ops": [a.total(), b.total()],
    }


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=title.replace("``", ""), title_justify="left")
    for column in ("what", "against", "ours", "other", "ratio (95 %)", "operations", "saved MiB"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    for r in rows:
        if "ratio" in r:
            cells = [f"{r['ours_s'] * 1e3:.1f} ms", f"{r['theirs_s'] * 1e3:.1f} ms"]
            cells.append(f"{r['ratio']:.3f} ({r['low']:.2f} to {r['high']:.2f})")
        elif "limit" in r:
            cells = [f"{r['ours']:,}", f"limit {r['limit']:,}", ""]
        else:
            cells = ["", "", "same graph" if r["same_ops"] else "OTHER GRAPH"]
        ops = f"{r['ops'][0]} / {r['ops'][1]}" if "ops" in r else ""
        saved = f"{r['saved_mib'][0]:.2f} / {r['saved_mib'][1]:.2f}" if "saved_mib" in r else ""
        table.add_row(escape(r["what"]), r.get("against", ""), *cells, ops, saved)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="imports,verbs,steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=160, record=True)
    console.print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread, {datetime.date.today()}"
    )
    results: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "peft": peft.__version__},
        "pairs": options.pairs,
    }
    titles = {"imports": imports, "verbs": verbs, "steps": steps}
    for name in options.only.split(","):
        results[name] = titles[name](options.pairs)
        show((titles[name].__doc__ or "").splitlines()[0], results[name], console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "core.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "core.txt").write_text(console.export_text())
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
