"""A run that was stopped, by whatever means, ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_material import RECIPE, adapted, register_textures, run_config, splits

import peft_suite.train.state as state
from peft_suite.errors import ConfigError, FileFormatError, StorageError
from peft_suite.train import bench, fit, run

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def child(out: Path, *prefix: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *prefix, str(HERE / "train_material.py"), str(out), json.dumps(options)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120, check=False)


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def same(a: Path, b: Path) -> None:
    """Equal curves, metrics and adapter bytes; times may differ."""
    for key in ("final", "best", "confusion", "examples"):
        assert record(a)[key] == record(b)[key]
    for one, other in zip(record(a)["history"], record(b)["history"], strict=True):
        assert {k: one[k] for k in ("step", "lr", "train_loss", "val")} == {
            k: other[k] for k in ("step", "lr", "train_loss", "val")
        }
    files = [path / "adapter" / "adapter_model.safetensors" for path in (a, b)]
    assert files[0].read_bytes() == files[1].read_bytes()


def train(out: Path, **options):
    recipe = RECIPE.replace(**options.pop("recipe", {}))
    return fit(adapted(), options.pop("data", None) or splits(), recipe, out=out, seed=5, device="cpu", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_resumes_to_the_same_result(number, whole, tmp_path):
    first = child(tmp_path, kill=90 * 2 + 40, signal=number)  # in the third epoch
    if number == signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL
        assert record(tmp_path)["status"] == "running"
    else:  # Python ends as by Ctrl-C, with a checkpoint of the step it was in
        assert first.returncode in (130, -signal.SIGINT), first.stderr
        assert record(tmp_path)["status"] == "interrupted"
        assert "checkpoint written" in first.stderr
    second = child(tmp_path, resume=True)
    assert second.returncode == 0, second.stderr
    assert "resumed from epoch 2" in second.stderr
    same(whole, tmp_path)


class Interrupting(type(splits().train)):
    """Ctrl-C at one place: (epoch, samples served in it)."""

    at: tuple[int, int] = (-1, -1)
    served = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.served = 0

    def __getitem__(self, index: int):
        if (self.epoch, self.served) == self.at:
            signal.raise_signal(signal.SIGINT)
        self.served += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("at", [(0, 1), (1, 89), (2, 50)])
def test_ctrl_c_writes_a_checkpoint(at, whole, tmp_path):
    data = splits()
    data.train.__class__ = Interrupting
    data.train.at = at
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=data, verify=False)
    assert signal.getsignal(signal.SIGINT) is before
    assert record(tmp_path)["status"] == "interrupted"
    train(tmp_path, resume=True)
    same(whole, tmp_path)


def test_ctrl_c_during_evaluation(whole, tmp_path):
    data = splits()
    data.val.__class__ = Interrupting
    data.val.at = (0, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=data)
    train(tmp_path, resume=True)
    same(whole, tmp_path)


def test_resume_of_finished_changed_and_damaged(whole, tmp_path, capsys):
    before = (whole / "run.json").read_bytes()
    again = train(whole, resume=True)
    assert "already finished" in capsys.readouterr().err
    assert again.record == record(whole)
    assert (whole / "run.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"recipe\.lr was 0\.005 and is now 0\.1"):
        train(whole, resume=True, recipe={"lr": 0.1})
    other = splits()
    other.fingerprint = "other"
    with pytest.raises(ConfigError, match="data_fingerprint"):
        train(whole, resume=True, data=other)
    damaged = tmp_path / "checkpoint" / "state.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes((whole / "checkpoint" / "state.safetensors").read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="damaged"):
        train(tmp_path, resume=True)


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    state.write_checkpoint(path, {"epoch": 1})

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left.*intact"):
        state.write_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert state.read_checkpoint(path)["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_give_the_curve_of_one(tmp_path):
    """Global batch 16, last batch of 10, 2 processes on gloo; dropout off (each process would draw its own).

    The average of the trained values is what is evaluated, on each process its own part, and what is saved.
    """
    options = {"dropout": 0.0, "recipe": {"class_weights": "balanced", "accumulate": 2, "clip_norm": 1.0, "ema": 0.9}}
    one = child(tmp_path / "one", **options)
    two = child(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", **options)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    a, b = record(tmp_path / "one"), record(tmp_path / "two")
    assert b["platform"]["world_size"] == 2
    for x, y in zip(a["history"], b["history"], strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-5)
        assert y["val"] == pytest.approx(x["val"], rel=1e-4)
    assert b["final"]["test"] == pytest.approx(a["final"]["test"], rel=1e-4)
    assert b["confusion"] == a["confusion"]
    x, y = (load_file(next((tmp_path / name / "adapter").glob("*.safetensors"))) for name in ("one", "two"))
    for key, value in x.items():
        torch.testing.assert_close(y[key], value, rtol=1e-4, atol=1e-6)


# ---- orchestration -----------------------------------------------------------------------------------------------


def test_run_several_seeds_and_resume(tmp_path):
    register_textures()
    config = run_config(tmp_path, seeds=2, recipe=RECIPE.replace(epochs=2))
    results = run(config, progress=False)
    assert [r.record["seed"] for r in results] == [0, 1]
    assert results[0].history[0]["train_loss"] != results[1].history[0]["train_loss"]
    stamp = (tmp_path / "seed-1" / "run.json").stat().st_mtime_ns
    again = run(config, resume=True, progress=False)
    assert [r.metrics for r in again] == [r.metrics for r in results]
    assert (tmp_path / "seed-1" / "run.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match=r"recipe\.epochs was 2 and is now 3"):
        run(config.replace(recipe=RECIPE.replace(epochs=3)), resume=True, progress=False)


def test_bench_is_resumable_and_keeps_failures(tmp_path):
    register_textures()
    base = run_config(tmp_path, recipe=RECIPE.replace(epochs=1))
    tasks = [{"name": "good"}, {"name": "bad", "data": {"root": "broken"}}]
    rows = bench(base, ["linear", "lora(rank=2)"], tasks, [0], tmp_path, progress=False)
    assert [(r["task"], r["status"]) for r in rows] == [("good", "finished")] * 2 + [("bad", "failed")] * 2
    assert rows[2]["error"] == "DataError: There is no image under 'broken'."
    assert rows[0]["score"] is not None
    assert record(Path(rows[2]["out"]))["status"] == "failed"
    stamp = (Path(rows[0]["out"]) / "run.json").stat().st_mtime_ns
    assert bench(base, ["linear", "lora(rank=2)"], tasks, [0], tmp_path, progress=False) == rows
    assert (Path(rows[0]["out"]) / "run.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="has no field 'dta'"):
        bench(base, ["linear"], [{"dta": {}}], [0], tmp_path)


def test_a_run_of_an_older_version_resumes(tmp_path):
    """What an older version did not record counts as the default; any other value is a change."""
    from peft_suite.train.config import RunConfig
    from peft_suite.train.record import changed_fields, run_identity

    now = run_identity(RunConfig.from_dict({"plugin": "vision", "method": "ssf"}).to_dict())
    before = {k: v for k, v in now.items() if k not in ("task", "recipe.cutmix")}
    changed_fields(tmp_path, before, now)
    with pytest.raises(ConfigError, match="task was '' and is now 'segmentation'"):
        changed_fields(tmp_path, before, {**now, "task": "segmentation"})
