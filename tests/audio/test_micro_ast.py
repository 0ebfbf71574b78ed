"""The embedded AST, generated sounds, the script that makes its weights, and the demo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import peft_suite as ps
from peft_suite.anatomy import anatomy_of
from peft_suite.audio import demo, micro, pretrain_micro, shifted, synth
from peft_suite.audio.backbones import backbones
from peft_suite.audio.data import AudioDataConfig, source
from peft_suite.audio.features import AudioDataset
from peft_suite.errors import ConfigError, DataError, FileFormatError
from peft_suite.train import pretraining
from peft_suite.train.config import Recipe

ASSET = Path(micro.__file__).parent / "assets" / micro.ASSET
shipped = pytest.mark.skipif(not ASSET.exists(), reason="pretrain_micro has not made the weights yet")
EVERY = (*synth.SOURCE, *synth.TARGET)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_micro, "BATCH", 6)
    monkeypatch.setattr(pretrain_micro, "ROUND", 2)
    monkeypatch.setattr(pretrain_micro, "RENEWED", 3)
    monkeypatch.setattr(pretrain_micro.Stream.__init__, "__defaults__", (8,))
    monkeypatch.setattr(pretrain_micro, "probes", lambda model: {"source": 0.5})


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- sounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_sounds_are_repeatable_bounded_and_heard(name: str) -> None:
    for number in range(3):
        x = synth.sound(name, number)
        assert x.shape == (16_000,) and x.dtype == np.float32 and np.isfinite(x).all()
        assert 0.099 < np.abs(x).max() < 0.901
        assert abs(x.mean()) < 1e-4
        assert np.array_equal(x, synth.sound(name, number))
    assert not np.array_equal(synth.sound(name, 0), synth.sound(name, 1))
    assert not np.array_equal(synth.sound(name, 0), synth.sound(name, 0, seed=1))


def test_no_class_is_both_source_and_target() -> None:
    assert not set(synth.SOURCE) & set(synth.TARGET)
    assert len(synth.SOURCE) == 19 and len(synth.TARGET) == 10


def test_classes_differ() -> None:
    """The spectrum, averaged over time, tells most classes apart."""
    numbers = [(label, i) for label in range(len(EVERY)) for i in range(12)]
    x = np.stack([pretrain_micro.log_mel(synth.sound(EVERY[label], i)) for label, i in numbers])
    features = torch.from_numpy(np.concatenate([x.mean(1), x.std(1)], 1))
    known = torch.tensor([i < 8 for _, i in numbers])
    labels = torch.tensor([label for label, _ in numbers])
    assert pretraining.ridge_accuracy(features, labels, known, len(EVERY)) > 0.4  # chance: 0.034


def spectrum(x: Any) -> Any:
    return np.abs(np.fft.rfft(x))


def test_what_sounds_are_made_of() -> None:
    rng = np.random.default_rng(0)
    wave = synth.harmonics(1000.0, {1: 1.0, 3: 0.5, 9: 1.0}, rng)  # 9 kHz is above the limit
    heard = spectrum(wave) / 8000
    assert heard[[1000, 3000]] == pytest.approx([1, 0.5], abs=1e-6)
    assert np.delete(heard, [1000, 3000]).max() < 1e-6
    brown = spectrum(synth.noise(rng, -1))
    assert np.square(brown[200:400]).mean() / np.square(brown[2000:4000]).mean() == pytest.approx(100, rel=0.3)
    string = synth.string(rng, 250.0, 0.25)
    assert not string[:4000].any()
    period, later = string[4000:4064], string[14000:14064]
    assert np.square(later).sum() < 0.5 * np.square(period).sum()
    loop = np.roll(period, 1) + period
    second = string[4064:4128]
    assert np.corrcoef(loop, second)[0, 1] == pytest.approx(1, abs=1e-9)  # a turn averages neighbours


def test_room_adds_noise_and_a_tail() -> None:
    click = np.zeros(synth.SIZE)
    click[1000] = 1.0
    for seed in range(5):
        heard = shifted.room(click, np.random.default_rng(seed))
        assert heard.argmax() == 1000
        before = np.square(heard[:1000]).mean()
        assert np.square(heard[1001:1800]).mean() > before > 0
    x = synth.sound("siren", 0).astype(float)
    rest = [shifted.room(x, np.random.default_rng(s)) for s in range(20)]
    assert all(np.isfinite(r).all() and r.shape == (16_000,) for r in rest)


# ---- the data set --------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    return backbones.preprocessing(micro.NAME, micro.build(0, pretrained=False))


def test_shifted_sounds_as_a_data_set() -> None:
    config = AudioDataConfig(root="sounds-shifted", shots=3, eval_shots=2)
    assert source.classes(config) == (tuple(synth.TARGET), False)
    splits = source.load(config, facts())
    assert (len(splits.train), len(splits.val or ()), len(splits.test or ())) == (30, 20, 20)
    assert splits.info["layout"] == "sounds-shifted"
    x, label = splits.train[0]
    assert x.shape == (96, 64) and torch.isfinite(x).all() and label == 0
    assert isinstance(splits.train, AudioDataset)
    assert splits.train.sound(0)[:4] == b"RIFF"
    assert splits.info["preprocessing"]["statistics"] == "data"
    again = source.load(config, facts())
    assert splits.fingerprint == again.fingerprint and torch.equal(again.train[0][0], x)
    other = source.load(AudioDataConfig(root="sounds-shifted", shots=3, eval_shots=2, split_seed=1), facts())
    assert other.fingerprint != splits.fingerprint


def test_shifted_sounds_at_another_rate_and_as_waveforms() -> None:
    config = AudioDataConfig(root="sounds-shifted", shots=1, eval_shots=1, verify="none")
    told = {"input": "waveform", "sample_rate": 8000, "samples": 8000, "normalize": True}
    x, _ = source.load(config, told).train[0]
    assert x.shape == (8000,) and float(x.mean()) == pytest.approx(0, abs=1e-5)


def test_splits_share_no_sound_and_orders_of_classes() -> None:
    names = [shifted.shifted_sound(split, "bell", 0).tobytes() for split in shifted.SIZES]
    assert len(set(names)) == 3
    turned = tuple(reversed(synth.TARGET))
    config = AudioDataConfig(root="sounds-shifted", classes=turned, shots=1, eval_shots=1)
    splits = source.load(config, facts())
    assert splits.classes == turned
    assert splits.sample_name(splits.train, 0).startswith(f"{turned[0]}/train")
    with pytest.raises(DataError, match=r"data\.classes"):
        source.load(AudioDataConfig(root="sounds-shifted", classes=("bell", "gong")), facts())


# ---- the backbone --------------------------------------------------------------------------------------------------


def test_size_limits() -> None:
    model = micro.build(40, pretrained=False)
    body = sum(p.numel() for p in model.encoder.parameters())
    assert body == 586_752 == backbones.list("micro-ast")[0].parameters
    assert 2 * body < 1.5 * 2**20 - 20_000  # in float16, with names and metadata
    assert model(torch.randn(2, 96, 64)).shape == (2, 40)
    assert anatomy_of(model).grid == (4, 6)
    assert facts() == {
        "input": "fbank",
        "sample_rate": 16_000,
        "frames": 96,
        "mel_bins": 64,
        "mean": micro.STATISTICS[0],
        "std": micro.STATISTICS[1],
    }


def test_statistics_are_those_of_the_source_sounds() -> None:
    x = np.stack([pretrain_micro.log_mel(pretrain_micro.source(3, i)) for i in range(10 * len(synth.SOURCE))])
    assert x.mean() == pytest.approx(micro.STATISTICS[0], abs=0.3)
    assert x.std() == pytest.approx(micro.STATISTICS[1], abs=0.2)


@shipped
def test_shipped_weights_and_fresh_head() -> None:
    assert ASSET.stat().st_size < 1.5 * 2**20
    weights = micro.load_weights()
    model = backbones.build(micro.NAME, 7, pretrained=True, checkpoint="", options={})
    state = model.state_dict()
    assert {k for k in state if micro.is_body(k)} == set(weights)
    assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert {"head.weight", "head.bias"} <= set(anatomy_of(model).fresh)


@shipped
def test_metadata_tells_the_origin() -> None:
    facts = micro.read_metadata()
    assert "pretrain_micro --seed" in facts["made_by"] and facts["weights_licence"] == "Apache-2.0"
    assert (float(facts["mean"]), float(facts["std"])) == micro.STATISTICS
    for name in ("source", "target_clean", "target_shifted"):
        assert float(facts[f"probe_{name}"]) > float(facts[f"probe_{name}_random_weights"])


@shipped
def test_option_that_does_not_fit_the_weights() -> None:
    with pytest.raises(FileFormatError, match="pretrained=False"):
        micro.build(3, num_hidden_layers=3)


def test_options() -> None:
    model = backbones.build(
        micro.NAME, 3, pretrained=False, checkpoint="", options={"num_hidden_layers": 3, "pool": "cls"}
    )
    assert len(model.encoder.layers) == 3 and model.pool.kind == "cls"
    with pytest.raises(ConfigError, match="num_layers"):
        backbones.build(micro.NAME, 3, pretrained=False, checkpoint="", options={"num_layers": 3})


# ---- the script ----------------------------------------------------------------------------------------------------


def test_pool_depends_on_the_step_alone(small: None) -> None:
    there = pretrain_micro.Stream(1)
    for step in range(6):
        x, goal = there.batch(step)
    directly = pretrain_micro.Stream(1).batch(5)
    assert torch.equal(x, directly[0]) and torch.equal(goal, directly[1])
    assert x.shape == (6, 96, 64) and goal.shape == (6, 19)
    assert goal.sum(1).tolist() == [1.0] * 6


def test_goal_names_the_sounds_in_a_clip(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_micro, "MIXED", 0.0)
    monkeypatch.setattr(pretrain_micro, "MOVED", 0)
    stream = pretrain_micro.Stream(2)
    for step in (0, 4, 9):
        x, goal = stream.batch(step)
        for row, label in zip(x, goal.argmax(1), strict=True):
            numbers = [n for n in range(3 * step, 3 * step + 8) if n % 19 == int(label)]
            made = [pretrain_micro.log_mel(pretrain_micro.source(2, n)) for n in numbers]
            assert any(torch.allclose(row, pretrain_micro.normalized(torch.from_numpy(m)), atol=1e-5) for m in made)
    monkeypatch.setattr(pretrain_micro, "MIXED", 1.0)
    _, goal = pretrain_micro.Stream(2).batch(0)
    assert set(goal.unique().tolist()) <= {0.0, 0.5, 1.0} and 0.5 in goal


def contents(file: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Metadata and values; the order of metadata in the bytes is not settled."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata()), {k: opened.get_tensor(k).flatten().tolist() for k in opened.keys()}  # noqa: SIM118


def test_script_writes_a_loadable_file_and_resumes(small: None, threads: None, tmp_path: Path) -> None:
    straight, broken = tmp_path / "a" / "micro.safetensors", tmp_path / "b" / "micro.safetensors"
    pretrain_micro.main(["--steps", "4", "--out", str(straight)])
    assert [p.name for p in straight.parent.iterdir()] == [straight.name]

    step = pretraining.train_step
    calls: list[int] = []

    def failing(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power failure")
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "train_step", failing)
        with pytest.raises(RuntimeError):
            pretrain_micro.main(["--steps", "4", "--out", str(broken)])
    with pytest.raises(FileFormatError, match="--seed 0"):
        pretrain_micro.main(["--seed", "1", "--resume", "--out", str(broken)])
    pretrain_micro.main(["--resume", "--out", str(broken)])
    assert contents(straight) == contents(broken)
    model = micro.build(4, pretrained=False)
    assert set(load_file(straight)) == {name for name in model.state_dict() if micro.is_body(name)}


def test_minutes_become_steps(small: None) -> None:
    model = pretrain_micro.Classes(micro.build(0, pretrained=False))
    before = model.head.weight.clone()
    assert pretrain_micro.steps_in(1.0, model, 0) > pretrain_micro.steps_in(1e-9, model, 0) == 1
    assert torch.equal(model.head.weight, before)


def test_probe_tells_apart_what_features_tell_apart() -> None:
    def noises(label: int, i: int) -> Any:
        return np.random.default_rng([label, i]).normal(0, (0.001, 0.3)[label], 16_000).astype(np.float32)

    torch.manual_seed(0)
    model = micro.build(0, pretrained=False)
    assert pretrain_micro.probe(model, noises, 2, shots=6, tests=6) > 0.8


# ---- the demo ------------------------------------------------------------------------------------------------------


def test_demo_recipes_are_complete() -> None:
    chosen = demo.showcase()
    assert list(chosen.methods) == list(demo.METHODS)
    assert set(demo.RECIPES) == set(demo.METHODS)
    for recipe in demo.RECIPES.values():
        Recipe.from_dict(recipe)
    AudioDataConfig.from_dict(demo.DATA)
    assert demo.DATA["root"] == "sounds-shifted"


@pytest.mark.parametrize("name", list(demo.METHODS))
def test_demo_methods_fit_the_backbone(name: str) -> None:
    model = micro.build(len(synth.TARGET), pretrained=False).eval()
    ps.adapt(model, demo.METHODS[name])
    assert model(torch.randn(2, 96, 64)).shape == (2, 10)
