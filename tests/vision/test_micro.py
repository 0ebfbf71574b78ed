"""The embedded backbone and the demo's task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_suite.errors import DataError, FileFormatError
from peft_suite.vision import digits, micro, pretrain_micro
from peft_suite.vision.backbones import backbones
from peft_suite.vision.data import ImageDataConfig, source

ASSET = Path(micro.__file__).parent / "assets" / micro.ASSET


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def test_size_limits() -> None:
    model = micro.build(10, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == 214_218 <= 250_000
    assert ASSET.stat().st_size < 2**20
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_metadata_tells_the_origin() -> None:
    facts = micro.read_metadata()
    assert "pretrain_micro" in facts["made_by"] and "CC BY 4.0" in facts["data_licence"]
    assert float(facts["accuracy_other_half_upright"]) > 0.95


def test_shipped_weights_reach_the_recorded_accuracy_on_images_never_seen() -> None:
    model = micro.build(10, pretrained=True)
    model.load_state_dict(micro.load_weights())
    model.eval()
    _, labels = digits.target_half()
    upright = digits.render_source(digits.upright_target(), None)
    recorded = float(micro.read_metadata()["accuracy_other_half_upright"])
    assert pretrain_micro.accuracy(model, upright, labels) == pytest.approx(recorded, abs=0.005)
    shifted = pixels(torch.from_numpy(digits.target_half()[0]))
    assert pretrain_micro.accuracy(model, shifted, labels) < 0.3


def test_head_is_fresh_and_body_is_shipped() -> None:
    shipped = micro.load_weights()
    model = micro.build(10, pretrained=True)
    assert not torch.equal(model.head.weight, shipped["head.weight"])
    assert torch.equal(model.blocks[3].mlp.fc2.weight, shipped["blocks.3.mlp.fc2.weight"])


def test_option_that_does_not_fit_the_weights() -> None:
    with pytest.raises(FileFormatError, match="pretrained=False"):
        micro.build(3, depth=3)
    assert len(micro.build(3, pretrained=False, depth=3).blocks) == 3


def test_halves_do_not_overlap_and_target_is_deterministic() -> None:
    source_images, _ = digits.source_half()
    assert len(source_images) + len(digits.upright_target()) == 1797
    assert source_images.data_ptr() + source_images.nbytes == digits.upright_target().data_ptr()
    first = digits.target_half()[0].copy()
    digits.target_half.cache_clear()
    assert (digits.target_half()[0] == first).all()


def test_digits_shifted_as_data_source() -> None:
    config = ImageDataConfig(root="digits-shifted", shots=10, augment="light")
    model = backbones.build("micro-vit", 10, pretrained=True, checkpoint="", options={})
    splits = source.load(config, backbones.preprocessing("micro-vit", model))
    assert source.classes(config) == (digits.CLASSES, False)
    assert splits.info["sizes"] == {"train": 100, "val": 50, "test": 600}
    assert set(splits.info["counts"]["test"].values()) == {60}
    rows = [{s.row for s in part.samples} for part in (splits.train, splits.val, splits.test)]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    image, label = splits.train[0]
    assert image.shape == (3, 32, 32) and image.min() >= -1.001 and label == 0
    assert splits.train.hflip == 0.0
    again = source.load(config, backbones.preprocessing("micro-vit", model))
    assert again.fingerprint == splits.fingerprint
    assert source.load(config.replace(split_seed=1), {}).fingerprint != splits.fingerprint
    with pytest.raises(DataError, match="at most 21"):
        source.load(config.replace(shots=40), {})


def test_pretraining_script_writes_a_loadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "micro.safetensors"
    threads = torch.get_num_threads()
    pretrain_micro.main(["--epochs", "1", "--out", str(out)])
    torch.set_num_threads(threads)
    assert "other half" in capsys.readouterr().out
    model = backbones.build("micro-vit", 4, pretrained=False, checkpoint=str(out), options={})
    assert model.head.weight.shape == (4, 64)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_demo_recipes_are_complete() -> None:
    from peft_suite.train.config import Recipe

    assert set(digits.DEMO_RECIPES) >= set(digits.DEMO_METHODS)
    for recipe in digits.DEMO_RECIPES.values():
        Recipe.from_dict(recipe)
    ImageDataConfig.from_dict(digits.DEMO_DATA)
