"""A suite on the command line: recipes per task, missing data, killed and resumed, means and published values."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from peft_suite.cli.app import build

pytest.importorskip("torch")
pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
import protocol_data as made

SMALL = (
    "--backbone",
    "micro-vit",
    "--epochs",
    "2",
    "--batch-size",
    "16",
    "--device",
    "cpu",
    "recipe.warmup_epochs=0.5",
)


def call(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build(), [str(w) for w in words])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vtab")
    made.vtab_task(folder, "kitti", 4)
    made.vtab_task(folder, "patch_camelyon", 2, test=4)
    return folder


def suite(root: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("vision", "bench", "--suite", "vtab", "--data", str(root), "--out", str(out), *SMALL, *more)


def finished(out: Path) -> dict[str, float]:
    """Run folder -> when its record was last written, for finished runs."""
    found = {}
    for file in out.rglob("run.json"):
        try:
            if json.loads(file.read_text())["status"] == "finished":
                found[file.parent.relative_to(out).as_posix()] = file.stat().st_mtime_ns
        except (OSError, ValueError):
            continue
    return found


def test_missing_tasks_are_listed(root: Path, tmp_path: Path) -> None:
    error = call(*suite(root, tmp_path, "--methods", "linear"), code=1).stderr
    assert "17 of 19 tasks of vtab have no data" in error and "--available" in error
    assert "svhn: " in error and "kitti: " not in error
    assert not (tmp_path / "suite.json").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    error = call(*suite(empty, tmp_path, "--methods", "linear", "--available"), code=1).stderr
    assert "19 of 19" in error
    assert "No data is given" in call("vision", "bench", "--suite", "vtab", "--methods", "ssf", code=1).stderr
    assert "Unknown suite" in call("vision", "bench", "--suite", "vtap", "--methods", "ssf", code=1).stderr
    assert "recipe of the suite" in call(*suite(root, tmp_path, "--methods", "ssff"), code=1).stderr
    call("vision", "bench", "--tasks", "kitti", "--methods", "ssf", "--data", str(root), code=2)


def test_killed_and_resumed(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = suite(root, out, "--methods", "ssf,linear", "--seeds", "2", "--available")
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_suite.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    until = time.monotonic() + 240
    while len(finished(out)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, told = process.communicate()
    before = finished(out)
    assert 2 <= len(before) < 8, told.decode()

    rows = json.loads(call(*words, "--json").stdout)["runs"]
    assert [r["status"] for r in rows] == ["finished"] * 8, rows
    after = finished(out)
    assert len(after) == 8
    assert {k: after[k] for k in before} == before  # what was finished did not run again
    assert {(r["task"], r["method"], r["seed"]) for r in rows} == {
        (t, m, s)
        for t in ("kitti", "patch_camelyon")
        for m, ss in (("ssf", (42, 43)), ("linear", (42, 44)))
        for s in ss
    }
    record = json.loads((out / "kitti" / "ssf" / "seed-42" / "run.json").read_text())
    config = record["config"]
    assert config["recipe"]["lr"] == 1e-2 and config["recipe"]["epochs"] == 2  # the task's value, the command's value
    assert config["data"]["preprocess"] == "ssf" and config["recipe"]["select"] == "last"
    assert record["data"]["info"]["preprocessing"]["resize"] == "squash"
    assert json.loads((out / "patch_camelyon/ssf/seed-42/run.json").read_text())["config"]["recipe"]["lr"] == 5e-3
    check_page(out, rows)


def check_page(out: Path, rows: list[dict[str, Any]]) -> None:
    record = json.loads((out / "comparison.json").read_text())
    means = {row["label"]: row for row in record["means"]}
    assert list(means) == ["ssf", "linear"]
    for label, row in means.items():
        score = {
            t: [r["score"] for r in rows if (r["task"], r["method"]) == (t, label)] for t in ("kitti", "patch_camelyon")
        }
        mean = {t: sum(v) / 2 for t, v in score.items()}
        got = row["means"]
        assert got["Structured"]["mean"] == pytest.approx(mean["kitti"])
        assert (got["Structured"]["done"], got["Structured"]["of"]) == (1, 8)
        assert got["Natural"]["mean"] is None
        assert got["mean of tasks"]["mean"] == pytest.approx(sum(mean.values()) / 2)
        assert got["mean of tasks"]["of"] == 19
        assert got["mean of groups"]["partial"]
    assert means["ssf"]["published"]["mean of tasks"] == 73.10
    page = (out / "comparison.html").read_text()
    for text in ("mean of groups", "mean of tasks", "published 73.1 %", "1 of 8 tasks", "data:image/png", "kitti"):
        assert text in page
    assert "Tasks without data: 17" in page and "vit_base" not in page.split("Recipes")[0]
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert (out / "comparison.png").stat().st_size > 1000
    assert (out / "comparison.csv").read_text().startswith("task,method,")


def test_the_page_of_an_unfinished_suite(root: Path, tmp_path: Path) -> None:
    from peft_suite.report import write_comparison

    call(*suite(root, tmp_path, "--methods", "linear", "--seeds", "1", "--tasks", "kitti"))
    plan = json.loads((tmp_path / "suite.json").read_text())
    assert plan["tasks"] == ["kitti"] and len(plan["groups"]["Structured"]) == 8
    plan["runs"].append({"task": "kitti", "method": "linear", "seed": 7, "folder": "kitti/linear/seed-7"})
    (tmp_path / "suite.json").write_text(json.dumps(plan))
    page = write_comparison(tmp_path).read_text()
    assert "1 of 2 runs finished" in page and "not started" in page


def test_own_fields_and_seeds(root: Path, tmp_path: Path) -> None:
    words = suite(root, tmp_path, "--methods", "vpt(num_tokens=2)", "--seeds", "1", "--seed", "5", "--tasks", "kitti")
    text = call(*words, "data.splits=tune", "recipe.select=val").stdout
    assert "published ones" in text and "[55.0]" in text and "vpt(num_tokens=2)" in text
    record = json.loads((next(tmp_path.rglob("run.json"))).read_text())
    assert record["seed"] == 5 and record["config"]["method"]["num_tokens"] == 2
    assert record["config"]["method"]["deep"] is True and record["final"]["val"]


def test_a_method_without_its_plugin_is_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    from peft_suite.plugins import methods
    from peft_suite.vision.recipes import book

    lost = [n for n, r in book.recipes.items() if r.suite == "vtab" and r.method_name not in methods()]
    if not lost:
        pytest.skip("every recipe's method is registered")
    error = call(*suite(root, tmp_path, "--methods", lost[0], "--available"), code=1).stderr
    assert "Unknown method" in error
    assert not list(tmp_path.rglob("run.json"))


def test_train_by_recipe(root: Path, tmp_path: Path) -> None:
    words = ("vision", "train", "--recipe", "ssf-vtab", "--data", root, *SMALL, "--out", tmp_path / "run")
    call(*words, "--task", "camelyon")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["task"] == "patch_camelyon" and record["seed"] == 42
    assert record["config"]["recipe"]["weight_decay"] == 5e-5
    assert "Say --task" in call(*words, code=1).stderr
    assert "Unknown VTAB task" in call(*words, "--task", "nothing", code=1).stderr
    assert "Unknown recipe" in call("vision", "train", "--recipe", "ssf-vtap", "--data", root, code=1).stderr


def test_listing() -> None:
    listed = json.loads(call("vision", "recipes", "--json").stdout)
    assert {s["name"] for s in listed["suites"]} >= {"vtab", "fgvc", "few-shot", "cifar100"}
    assert any(r["name"] == "ssf-vtab" and r["selects_on"] == "nothing" for r in listed["recipes"])
    one = json.loads(call("vision", "recipes", "ssf-vtab", "--json").stdout)
    assert one["tasks"]["clevr_dist"]["recipe.lr"] == 0.05
    assert "clevr_dist" in call("vision", "recipes", "ssf-vtab").stdout
    assert "ssf-fgvc" not in call("vision", "recipes", "--suite", "vtab").stdout


@pytest.mark.parametrize("name", ["fgvc", "few-shot", "cifar100"])
def test_the_other_suites(name: str, tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    if name == "fgvc":
        made.fgvc_json(root / "CUB_200_2011", "images", [1, 2])
        method, task, tasks = "linear", "cub", "CUB_200_2011"
    elif name == "few-shot":
        made.few_shot(root / "oxford-pets", "images", 3, shots=1)
        method, task, tasks = "lora", "oxford_pets-1", "oxford-pets-1"
    else:
        made.cifar_binary(root, True, each=1)
        method, task, tasks = "linear", "cifar100", ""
    words = (
        "vision",
        "bench",
        "--suite",
        name,
        "--data",
        root,
        "--out",
        out,
        *SMALL,
        "--epochs",
        "1",
        "--tasks",
        tasks,
    )
    rows = json.loads(call(*words, "--methods", method, "--seeds", "2", "--json").stdout)["runs"]
    assert [(r["task"], r["status"]) for r in rows] == [(task, "finished")] * 2, rows
    runs = [json.loads((Path(r["out"]) / "run.json").read_text()) for r in rows]
    drawn = {run["data"]["fingerprint"] for run in runs}
    assert len(drawn) == (2 if name == "few-shot" else 1)  # there each seed takes its own list
    page = (out / "comparison.html").read_text()
    assert "published" in page if name == "fgvc" else "mean of tasks" in page
