"""MemControl: groups and their bits, masked methods, a search that survives being killed, and 20 real trials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusion_data import captioned
from diffusion_parts import tiny_pipeline
from torch import nn
from typer.testing import CliRunner

import peft_suite as ps
from peft_suite.cli.app import build
from peft_suite.diffusion import micro
from peft_suite.diffusion.memcontrol import Group, Search, SearchConfig, Trial, groups_of, live_groups, mask_of, masked
from peft_suite.diffusion.memcontrol_trials import FineTuning
from peft_suite.diffusion.pareto import front, knee, table
from peft_suite.errors import BackboneError, ConfigError, UnknownNameError, UnsupportedError
from peft_suite.train.config import BackboneConfig, Recipe, RunConfig
from peft_suite.train.running import run_once

GROUPS = tuple(Group(name, name) for name in ("a", "b", "c"))


@pytest.fixture(scope="module")
def large() -> nn.Module:
    """Stable Diffusion 1.5's UNet without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


def attention(model: nn.Module, path: str) -> int:
    """Attention parameters of a stack's transformer blocks."""
    inside = f"{path}.transformer_blocks."
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(inside) and ".attn" in n)


def test_sixteen_bits_of_stable_diffusion_in_published_order(large: nn.Module) -> None:
    groups = groups_of(large)
    down = [f"down_blocks.{b}.attentions.{a}" for b in range(3) for a in range(2)]
    up = [f"up_blocks.{b}.attentions.{a}" for b in range(1, 4) for a in range(3)]
    assert [g.path for g in groups] == [*down, "mid_block.attentions.0", *up]
    small, middle, big = 1_106_560, 3_441_920, 11_799_040
    expected = [small] * 2 + [middle] * 2 + [big] * 2 + [big] + [big] * 3 + [middle] * 3 + [small] * 3
    assert [attention(large, g.path) for g in groups] == expected
    assert sum(expected) == 93_536_640


def test_thirteen_bits_leave_the_third_stack_of_up_blocks_out(large: nn.Module) -> None:
    paths = [g.path for g in groups_of(large, third=False)]
    assert len(paths) == 13
    assert paths[7:] == [f"up_blocks.{b}.attentions.{a}" for b in range(1, 4) for a in range(2)]


def test_groups_of_other_models() -> None:
    from diffusers import DiTTransformer2DModel

    stages = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [g.path for g in groups_of(micro.build())] == stages
    with torch.device("meta"):
        dit = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=12, sample_size=8, patch_size=2
        )
    assert [g.path for g in groups_of(dit)] == [f"transformer_blocks.{i}" for i in range(12)]
    with pytest.raises(BackboneError, match="Sequential"):
        groups_of(nn.Sequential())


def test_groups_without_a_part_get_no_bit() -> None:
    model = micro.build()
    live = live_groups(model, "lora(rank=2)", groups_of(model))
    assert [g.path for g in live] == ["down_blocks.1", "mid_block", "up_blocks.0"]
    with pytest.raises(UnsupportedError, match="no part"):
        live_groups(model, "lora(targets=(conv_in,))", groups_of(model))


def state(spec: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A freshly adapted micro UNet and its adapter's tensors."""
    model = micro.build()
    torch.manual_seed(3)
    ps.adapt(model, spec)
    return model, model.adapters["default"].state_dict()  # type: ignore[index, operator, union-attr]


@pytest.mark.parametrize("method", ["lora(rank=2)", "difffit", "sara(quantile=0.05)", "bitfit"])
def test_all_ones_is_the_plain_method(method: str) -> None:
    _, plain = state(method)
    _, ones = state(masked(method, ()))
    assert list(plain) == list(ones)
    assert all(torch.equal(plain[k], ones[k]) for k in plain)


@pytest.mark.parametrize("method", ["lora(rank=2)", "difffit", "sara(quantile=0.05)", "bitfit"])
def test_groups_that_are_off_hold_nothing_and_the_rest_is_as_it_was(method: str) -> None:
    _, plain = state(method)
    model, some = state(masked(method, ("mid_block", "up_blocks.0")))
    kept = {k: t for k, t in plain.items() if not k.startswith(("mid_block.", "up_blocks.0."))}
    assert set(some) == set(kept) and 0 < len(some) < len(plain)
    assert all(torch.equal(some[k], kept[k]) for k in kept)
    before = {k: p.clone() for k, p in model.state_dict().items() if not k.startswith("adapters.")}
    train_once(model)
    after = model.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items())
    assert any(not torch.equal(t, kept[k]) for k, t in model.adapters["default"].state_dict().items())  # type: ignore[index, operator, union-attr]


def train_once(model: nn.Module) -> None:
    model.train()
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(
            x, torch.tensor([5, 300, 600, 900]), class_labels=torch.tensor([0, 1, 2, 10])
        ).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_all_zeros_trains_nothing() -> None:
    model = micro.build()
    off = tuple(g.path for g in live_groups(model, "lora(rank=2)", groups_of(model)))
    with pytest.raises(UnsupportedError, match="nothing to train"):
        ps.adapt(model, masked("lora(rank=2)", off))
    assert "adapters" not in model._modules
    points = [row.point for row in ps.plan(model, masked("bitfit", off)).rows]
    assert points and not any(p.startswith(tuple(f"{o}." for o in off)) for p in points)


def test_a_masked_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = state("subset(of='lora(rank=2)', off=('mid_block',))")
    train_once(model)
    model.eval()
    ps.save(model, tmp_path)
    other = micro.build()
    ps.load(other, tmp_path)
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(model(x, t, class_labels=c).sample, other(x, t, class_labels=c).sample)
    assert not any("mid_block" in key for key in other.adapters["default"].state_dict())  # type: ignore[index, operator, union-attr]


def test_only_parts_of_a_name_are_switched() -> None:
    off = ("mid_block",)
    plan = ps.plan(micro.build(), "difffit")
    labels = {row.point for row in ps.plan(micro.build(), masked("difffit", off, "bias")).rows}
    assert {r.point for r in plan.rows if not r.point.startswith("mid_block")} <= labels
    assert any(point.startswith("mid_block") for point in labels)  # norms of the group stay


def test_bad_masks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"nothing at 'mid_blok'.*mid_block"):
        ps.adapt(micro.build(), masked("lora", ("mid_blok",)))
    with pytest.raises(ConfigError, match="twice"):
        ps.plan(micro.build(), masked("lora", ("mid_block", "mid_block")))
    with pytest.raises(ConfigError, match="subset itself"):
        ps.plan(micro.build(), masked(masked("lora", ()), ()))


def test_the_learning_rate_is_no_bit() -> None:
    values = {"learning_rate": 0.5, "bit02": 1, "bit00": 0, "bit01": 1}
    assert mask_of(values, 3) == (0, 1, 1)
    with pytest.raises(ConfigError, match="3 bits for 4 groups"):
        mask_of(values, 4)
    trial = Trial(0, (1, 0, 1), 0.1, GROUPS)
    assert trial.off == ("b",)


def row(number: int, *values: float) -> dict[str, Any]:
    named = dict(zip(("memory", "quality"), values, strict=True)) if values else {}
    return {"number": number, "mask": [1, 0], "learning_rate": 0.1, "values": named}


def test_front_and_knee() -> None:
    names = ("memory", "quality")
    rows = [row(0, 1, 9), row(1, 2, 2), row(2, 9, 1), row(3, 3, 3), row(4), row(5, 2, 2), row(6, float("nan"), 0)]
    best = front(rows, names)
    assert [r["number"] for r in best] == [0, 1, 5, 2]
    found = knee(best, names)
    assert found is not None and found["number"] == 1
    assert knee([], names) is None and front([row(4)], names) == []
    assert table(best[:1], names, ("a", "b")) == "number,memory,quality,learning_rate,trained,a,b\n0,1,9,0.1,,1,0\n"


def toy(trial: Trial) -> dict[str, Any]:
    """More bits: more memory, better quality; the best rate is 1e-3."""
    import math

    off = 3 - sum(trial.mask)
    return {"memory": 1.0 + sum(trial.mask), "quality": off + abs(math.log10(trial.learning_rate) + 3), "trained": off}


def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    names, config = ("memory", "quality"), SearchConfig(trials=10, population=3)
    whole = Search(GROUPS, names, config, tmp_path / "whole")
    whole.run(toy)

    def stopping(trial: Trial) -> dict[str, Any]:
        if trial.number == 6:
            raise KeyboardInterrupt
        return toy(trial)

    stopped = Search(GROUPS, names, config, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stopping)
    assert len(stopped.rows()) == 6
    again = Search(GROUPS, names, config, tmp_path / "stopped", resume=True)
    again.run(toy)
    assert again.rows() == whole.rows() and len(whole.rows()) == 10
    record = json.loads((tmp_path / "stopped" / "pareto.json").read_text())
    assert record["pareto"] == [r["number"] for r in front(whole.rows(), names)]
    assert whole.best().number == record["suggested"] and whole.best(3).number == 3
    assert (tmp_path / "stopped" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    rates = [r["learning_rate"] for r in whole.rows()]
    assert 1e-5 <= min(rates) < 1e-4 and 1e-4 < max(rates) <= 1e-3
    assert all(len(r["mask"]) == 3 and set(r["mask"]) <= {0, 1} for r in whole.rows())


def test_a_killed_process_loses_one_trial_only(tmp_path: Path) -> None:
    script = """
import os, sys
from peft_suite.diffusion.memcontrol import Group, Search, SearchConfig
groups = tuple(Group(n, n) for n in ("a", "b", "c"))
def toy(trial):
    if trial.number == 3:
        os._exit(9)
    return {"memory": 1.0 + sum(trial.mask), "quality": trial.learning_rate}
Search(groups, ("memory", "quality"), SearchConfig(trials=6), sys.argv[1]).run(toy)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9

    def evaluate(trial: Trial) -> dict[str, Any]:
        return {"memory": 1.0 + sum(trial.mask), "quality": trial.learning_rate}

    search = Search(GROUPS, ("memory", "quality"), SearchConfig(trials=6), tmp_path, resume=True)
    assert len(search.rows()) == 3
    search.run(evaluate)
    fresh = Search(GROUPS, ("memory", "quality"), SearchConfig(trials=6), tmp_path / "fresh")
    fresh.run(evaluate)
    assert search.rows() == fresh.rows()


def test_failed_trials_are_told_and_do_not_stop_the_search(tmp_path: Path) -> None:
    def failing(trial: Trial) -> dict[str, Any]:
        if trial.number == 1:
            raise UnsupportedError("this mask does not fit")
        return {**toy(trial), **({"memory": float("nan")} if trial.number == 2 else {})}

    search = Search(GROUPS, ("memory", "quality"), SearchConfig(trials=5), tmp_path)
    search.run(failing)
    rows = search.rows()
    assert len(rows) == 5 and "does not fit" in rows[1]["error"] and "nan" in rows[2]["error"]
    assert not {1, 2} & {r["number"] for r in front(rows, search.objectives)}
    with pytest.raises(ConfigError, match="no finished trial 1"):
        search.best(1)


def test_a_folder_belongs_to_one_search(tmp_path: Path) -> None:
    names, config = ("memory", "quality"), SearchConfig(trials=1)
    Search(GROUPS, names, config, tmp_path, facts={"method": "lora"}).run(toy)
    with pytest.raises(ConfigError, match="--resume"):
        Search(GROUPS, names, config, tmp_path, facts={"method": "lora"})
    with pytest.raises(ConfigError, match="method was 'lora' and is 'sara'"):
        Search(GROUPS, names, config, tmp_path, facts={"method": "sara"}, resume=True)
    with pytest.raises(ConfigError, match="no 'quality'"):
        Search(GROUPS, names, SearchConfig(trials=2), tmp_path, facts={"method": "lora"}, resume=True).run(
            lambda trial: {"memory": 1.0}
        )
    assert len(Search(GROUPS, names, config, tmp_path, facts={"method": "lora"}, resume=True).rows()) == 1
    for sampler in ("tpe", "random"):
        other = Search(GROUPS, names, config.replace(sampler=sampler), tmp_path / sampler)
        other.run(toy)
        assert other.rows()[0]["values"]
    with pytest.raises(ConfigError, match="lr_low"):
        SearchConfig(lr_low=0.1, lr_high=0.01)


def base(out: Path, **fields: Any) -> RunConfig:
    return RunConfig(
        "diffusion",
        BackboneConfig("micro-unet"),
        {"root": "digits-shifted", "shots": 2},
        "lora(rank=2)",
        Recipe(epochs=1, batch_size=20, warmup_epochs=0.0, select="last"),
        out=str(out),
        device="cpu",
        **fields,
    )


def test_twenty_trials_on_the_embedded_backbone(tmp_path: Path) -> None:
    names, config = ("avg_norm", "loss"), SearchConfig(trials=20, lr_low=1e-3, lr_high=1e-1, population=6)
    tuning = FineTuning(base(tmp_path), names, share=0.5, repeats=1)
    tuning.data.val.samples = tuning.data.val.samples[:20]
    assert len(tuning.shown) == 10
    frozen = {k: t.clone() for k, t in tuning.model.state_dict().items()}

    def stopping(trial: Trial) -> dict[str, Any]:
        if trial.number == 8:
            raise KeyboardInterrupt
        return tuning(trial)

    with pytest.raises(KeyboardInterrupt):
        Search(tuning.groups, names, config, tmp_path, facts=tuning.facts()).run(stopping)
    search = Search(tuning.groups, names, config, tmp_path, facts=tuning.facts(), resume=True)
    assert len(search.rows()) == 8
    search.run(tuning)
    rows = search.rows()
    assert len(rows) == 20 and not any("error" in r for r in rows)
    each = {tuple(r["mask"]): r["trained"] for r in rows}
    assert all((count > 0) == any(mask) for mask, count in each.items())
    assert len({r["values"]["loss"] for r in rows}) > 5
    assert all(torch.equal(frozen[k], t) for k, t in tuning.model.state_dict().items())
    untouched = tuning.measures.of(tuning.model, names)
    nothing = [r["values"] for r in rows if not any(r["mask"])]
    assert all(values == untouched for values in nothing)
    one = next(r for r in rows if any(r["mask"]))
    assert tuning(Trial(99, tuple(one["mask"]), one["learning_rate"], tuning.groups))["loss"] == one["values"]["loss"]
    model = micro.build()
    ps.load(model, tmp_path / "trials" / f"{one['number']:03d}" / "adapter")
    assert tuning.measures.of(model, ("avg_norm",))["avg_norm"] == pytest.approx(one["values"]["avg_norm"], rel=1e-4)


def test_measures(tmp_path: Path) -> None:
    from peft_suite.diffusion.networks import network_of

    names = ("max_norm", "avg_norm", "copies", "frechet", "constant")
    tuning = FineTuning(
        base(tmp_path),
        names,
        network=network_of("pixels"),
        images=6,
        steps=2,
        threshold=1.0,
        repeats=2,
        score={"constant": lambda model, measures: 4.0},
    )
    tuning.data.val.samples = tuning.data.val.samples[:20]
    found = tuning(Trial(0, (1, 0, 0), 1e-2, tuning.groups))
    assert set(found) == {*names, "trained"} and found["constant"] == 4.0
    assert found["max_norm"] > found["avg_norm"] > 0 and found["frechet"] > 0 and 0 <= found["copies"] <= 1
    norms = torch.cat(list(tuning.measures.norms(tuning.model)))
    assert len(norms) == 2 * len(tuning.shown) and bool((norms > 0).all())  # no condition was dropped
    assert torch.equal(norms, torch.cat(list(tuning.measures.norms(tuning.model))))
    assert tuning.shown.whole.train and tuning.shown.whole.drop == 0.1


def test_what_cannot_be_measured_is_said_before_the_first_trial(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="avg_norm"):
        FineTuning(base(tmp_path), ("avg_norms", "loss"))
    with pytest.raises(ConfigError, match="--features"):
        FineTuning(base(tmp_path), ("avg_norm", "frechet"))
    with pytest.raises(ConfigError, match="share"):
        FineTuning(base(tmp_path), ("avg_norm", "loss"), share=0.0)
    with pytest.raises(ConfigError, match="threshold of 20 takes every image"):
        FineTuning(base(tmp_path), ("copies", "loss"))
    tuning = FineTuning(base(tmp_path), ("copies", "loss"), threshold=1.0)
    assert tuning.facts()["threshold"] == 1.0
    tuning.measures.facts = {**tuning.measures.facts, "kind": "unconditional"}
    with pytest.raises(ConfigError, match="unconditional"):
        tuning.measures.check(("avg_norm", "loss"))


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(build(), ["diffusion", "memcontrol", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "Example: peft-suite diffusion memcontrol --backbone micro-unet" in shown.output
    command = [
        "diffusion",
        "memcontrol",
        "--backbone",
        "micro-unet",
        "--data",
        "digits-shifted",
        "--method",
        "lora(rank=2)",
    ]
    command += [
        "--epochs",
        "1",
        "--trials",
        "2",
        "--lr-high",
        "0.01",
        "--out",
        str(tmp_path / "search"),
        "data.shots=2",
    ]
    ran = runner.invoke(build(), [*command, "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["trials"] == 2 and said["pareto"]
    assert (tmp_path / "search" / "best.yaml").read_text().count("name: subset") == 1
    again = runner.invoke(build(), command)
    assert again.exit_code != 0 and "--resume" in again.output
    bad = runner.invoke(build(), [*command, "--objectives", "loss"])
    assert bad.exit_code != 0 and "at least two" in bad.output


def test_best_yaml_trains_as_it_is_without_validation_images(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "pipe")
    captioned(tmp_path / "images", 3)
    command = ["diffusion", "memcontrol", "--backbone", str(tmp_path / "pipe"), "--data", str(tmp_path / "images")]
    command += ["--method", "lora(rank=2)", "--objectives", "avg_norm,copies", "--threshold", "1", "--trials", "2"]
    command += ["--images", "2", "--steps", "1", "--epochs", "1", "--out", str(tmp_path / "search"), "--json"]
    command += ["data.val_fraction=0", "data.resolution=16", "data.pictures=0"]
    ran = CliRunner().invoke(build(), command)
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert len(said["pareto"]) >= 1 and all("error" not in row for row in said["pareto"])
    config = RunConfig.from_dict(yaml.safe_load(Path(said["best"]).read_text()))
    assert config.recipe.select == "last"
    result = run_once(config, progress=False)
    wanted = next(row for row in said["pareto"] if row["number"] == said["chosen"])
    assert result.record["parameters"]["trainable"] == wanted["trained"]
    again = CliRunner().invoke(build(), [*command, "--resume", "--threshold", "0.5"])
    assert again.exit_code != 0 and "threshold was 1.0 and is 0.5" in again.output
