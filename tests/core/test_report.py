"""Reports from recorded runs, complete and with every piece missing; files are self-contained and escaped."""

from __future__ import annotations

import base64
import copy
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from peft_suite.errors import FileFormatError
from peft_suite.report import write_comparison, write_report, write_summary

HOSTILE = "<script>alert('$x$')</script> & \"co\""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNggAAAAAYAAaddgL4AAAAASUVORK5CYII="


def record(
    method: str = "ssf", seed: int = 0, accuracy: float = 0.9, classes: int = 4, **changes: Any
) -> dict[str, Any]:
    """A run.json as the training loop writes it."""
    names = ["cat", HOSTILE, "dog", "frog"][:classes] + [f"class {i:03d}" for i in range(4, classes)]
    matrix = [[10 if i == j else (2 if (i + 1) % classes == j else 0) for j in range(classes)] for i in range(classes)]
    run: dict[str, Any] = {
        "format": 1,
        "status": "finished",
        "plugin": "vision",
        "config": {
            "plugin": "vision",
            "backbone": {"name": "micro_vit", "pretrained": True, "checkpoint": "", "options": {}},
            "data": {"root": "/data/pets", "shots": 50},
            "method": {"name": method},
            "recipe": {"epochs": 4, "lr": 1e-3},
            "seed": seed,
        },
        "seed": seed,
        "versions": {"torch": "2.11.0", "timm": "1.0.31"},
        "platform": {"machine": "x86_64", "device": "cpu"},
        "data": {
            "fingerprint": "ab12",
            "classes": names,
            "info": {"counts": {"train": {"cat": 10}}, "size": [3, 32, 32]},
        },
        "method": {
            "name": method,
            "config": {"rank": 8},
            "plan": {
                "method": method,
                "trainable": 6120,
                "rows": [{"point": f"blocks.{i}.attn.qkv", "edit": "after", "parameters": 384} for i in range(8)],
            },
        },
        "parameters": {"trainable": 6120, "total": 210_000, "adapter_bytes": 25_000, "rows": [{"key": "k"}]},
        "history": [
            {
                "epoch": e - 1,
                "step": 10 * e,
                "lr": 1e-3 / e,
                "train_loss": 2.0 / e,
                "seconds": 1.5,
                "samples_per_s": 400.0,
                "val": {"loss": 2.1 / e, "accuracy": accuracy - 0.2 / e, "macro_f1": accuracy - 0.25 / e},
            }
            for e in range(1, 5)
        ],
        "best": {"epoch": 3, "metrics": {"loss": 0.5, "accuracy": accuracy - 0.05}, "selected_by": "val"},
        "metric": "accuracy",
        "final": {
            "val": {"loss": 0.5, "accuracy": accuracy - 0.05},
            "test": {"loss": 0.6, "accuracy": accuracy, "macro_f1": accuracy - 0.01},
            "per_class": {n: accuracy - 0.02 * (i % 9) for i, n in enumerate(names)},
        },
        "confusion": matrix,
        "examples": [
            {
                "name": f"img {i}.png",
                "target": names[i % classes],
                "prediction": names[(i + i % 2) % classes],
                "probability": 0.8,
                "correct": i % 2 == 0,
                "split": "test",
                "index": i,
            }
            for i in range(12)
        ],
        "time": {"total_s": 12.5, "train_s": 9.0, "per_step_ms": 21.5},
        "memory": {"peak_mib": 512.5},
        "adapter": {"path": "adapter", "bytes": 25_400},
        "error": None,
    }
    run.update(changes)
    return run


def write(folder: Path, run: dict[str, Any], images: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    if images is not None:
        (folder / "examples.json").write_text(json.dumps({"png": images}))
    return folder


class Checker(html.parser.HTMLParser):
    """Collects what a browser would load and execute, and that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data") and v]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: Path) -> str:
    text = page.read_text("utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    assert all(load.startswith("data:image/png;base64,") for load in checker.loads)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    return text


def test_full_report_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run = write(tmp_path, record(), [PNG] * 12)
    text = check(write_report(run))
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    for shown in (
        "90.0 %",
        "6,120",
        "2.91 % of all",
        "24.8 KiB",
        "512 MiB",
        "blocks.3.attn.qkv",
        "peft-suite vision predict",
    ):
        assert shown in text, shown
    assert text.count("data:image/png") == 14
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    "missing",
    [
        "config",
        "data",
        "method",
        "parameters",
        "history",
        "best",
        "final",
        "confusion",
        "examples",
        "time",
        "memory",
        "adapter",
    ],
)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_each_piece_may_be_missing(tmp_path: Path, missing: str, how: str) -> None:
    run = record(history=record()["history"][:1])
    if how == "absent":
        del run[missing]
    else:
        run[missing] = None
    check(write_report(write(tmp_path, run)))


def test_interrupted_run_without_validation(tmp_path: Path) -> None:
    run = record(status="interrupted", final={}, best={}, confusion=[], examples=[])
    for row in run["history"]:
        row["val"] = None
        row["lr"] = float("nan")
    text = check(write_report(write(tmp_path, run, ["not base64"])))
    assert "interrupted" in text
    assert "--resume" in text
    assert "train --config" in text


def test_failed_run_shows_its_error(tmp_path: Path) -> None:
    run = record(status="failed", history=[], error={"type": "TrainingError", "message": "loss is nan <b>"})
    assert "TrainingError: loss is nan &lt;b&gt;" in check(write_report(write(tmp_path, run)))


def test_many_classes_and_a_class_without_samples(tmp_path: Path) -> None:
    run = record(classes=120)
    run["confusion"][7] = [0] * 120
    text = check(write_report(write(tmp_path, run)))
    assert "The other 105 classes" in text
    assert "Most frequent confusions" in text


def test_indices_and_multi_label_examples_are_named(tmp_path: Path) -> None:
    run = record(confusion=None)
    run["examples"] = [{"name": "a", "target": [0, 2], "prediction": [3], "probability": None, "correct": False}]
    text = check(write_report(write(tmp_path, run)))
    assert "is cat, dog" in text
    assert "frog" in text


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "\x00"])
def test_foreign_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FileFormatError, match=re.escape("run.json")):
        write_report(tmp_path)


def test_missing_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        write_report(tmp_path)
    with pytest.raises(FileFormatError, match=r"no run\.json"):
        write_comparison(tmp_path)


def test_comparison_means_spread_and_failures(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        write(tmp_path / "ssf" / f"seed{seed}", record("ssf", seed, accuracy))
        write(
            tmp_path / "lora" / f"seed{seed}",
            record("lora", seed, 0.6, parameters={"trainable": 9000, "total": 210_000}),
        )
    failed = copy.deepcopy(record("vpt", 0, status="failed", error="TrainingError: loss is nan"))
    write(tmp_path / "vpt" / "seed0", failed)
    write(tmp_path / "vpt" / "seed0" / "adapter", record("not a run of the grid"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    text = check(write_comparison(tmp_path))
    assert "80.0 % ± 10.0 %" in text
    assert "60.0 % ± 0.0 %" in text
    assert "loss is nan" in text
    assert "broken" in text
    assert "not a run of the grid" not in text
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert [(r["method"], round(r["mean"], 6) if r["mean"] else None) for r in table["rows"]] == [
        ("ssf", 0.8),
        ("lora", 0.6),
        ("vpt", None),
    ]
    assert len(table["failures"]) == 2
    assert (tmp_path / "comparison.csv").read_text().count("\n") == 4
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_summary_of_seeds_links_each_report(tmp_path: Path) -> None:
    for seed in range(2):
        write_report(write(tmp_path / f"seed {seed}", record(seed=seed, accuracy=0.8 + 0.1 * seed)))
    text = check(write_summary(tmp_path))
    assert "85.0 % ± 7.1 %" in text
    assert 'href="seed%200/report.html"' in text


def test_all_runs_failed(tmp_path: Path) -> None:
    write(tmp_path / "a", record(status="failed", error="boom", final={}, best={}))
    assert "boom" in check(write_comparison(tmp_path))


def test_reports_are_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(write(tmp_path, record()))
    before = page.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    write(tmp_path, record("lora"))
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_png_constant_is_an_image() -> None:
    assert base64.b64decode(PNG)[:4] == b"\x89PNG"
    assert io.BytesIO(base64.b64decode(PNG)).read(8)
