"""Backbones by name, local checkpoints, and what happens when something does not fit."""

from __future__ import annotations

import json
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from peft_suite.errors import (
    BackboneMismatchError,
    ConfigError,
    FileFormatError,
    PeftSuiteError,
    UnknownNameError,
    UnsupportedError,
)
from peft_suite.vision.backbones import MODULES, backbones

TEST_VIT = "test_vit"


def build(name: str, outputs: int = 5, checkpoint: str | Path = "", pretrained: bool = False, **options: Any) -> Any:
    return backbones.build(name, outputs, pretrained=pretrained, checkpoint=str(checkpoint), options=options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(3)
    save_file(timm.create_model(TEST_VIT, num_classes=7).state_dict(), path)
    return path


def test_list_is_quick_and_has_globs() -> None:
    backbones.list("nothing")
    start = time.perf_counter()
    names = [b.name for b in backbones.list()]
    assert time.perf_counter() - start < 5
    assert (
        names[0] == "micro-vit" and "deit_base_distilled_patch16_224" in names and len(names) == len(set(names)) > 150
    )
    assert "resnet50" in names and "efficientnet_b0" not in names and not any("relpos" in n for n in names)
    tagged = [b.name for b in backbones.list("vit_base_patch16_224.*in21k")]
    assert "vit_base_patch16_224.augreg_in21k" in tagged and all("." in n for n in tagged)
    assert "augreg2_in21k_ft_in1k" in backbones.list("vit_base_patch16_224")[0].summary


@pytest.mark.parametrize("name", [TEST_VIT, "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_listed_models_are_vision_transformers(name: str) -> None:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = build(name)
    assert isinstance(model, VisionTransformer)
    assert timm.models.is_model_in_modules(name, list(MODULES))


def test_preprocessing_is_json_and_follows_the_model() -> None:
    micro = backbones.preprocessing("micro-vit", build("micro-vit"))
    assert json.loads(json.dumps(micro))["input_size"] == [3, 32, 32]
    model = build(TEST_VIT, img_size=96)
    found = backbones.preprocessing(TEST_VIT, model)
    assert found["input_size"] == [3, 96, 96] and set(found) == {
        "input_size",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
    }
    deit = backbones.preprocessing("x", build("deit_tiny_patch16_224"))
    assert deit["mean"] == [0.485, 0.456, 0.406] and deit["crop_pct"] == 0.9


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_checkpoint_with_another_head(tmp_path: Path, weights: Path, wrap: str | None) -> None:
    reference = timm.create_model(TEST_VIT, num_classes=7)
    from safetensors.torch import load_file

    state = load_file(weights)
    path = weights
    if wrap:
        path = tmp_path / "vit.pth"
        torch.save({wrap: {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    model = build(TEST_VIT, checkpoint=path)
    assert model.head.weight.shape[0] == 5
    same = build(TEST_VIT, outputs=7, checkpoint=path)
    reference.load_state_dict(state)
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(same.eval()(x), reference.eval()(x))


def test_checkpoint_of_another_image_size_is_resampled(weights: Path) -> None:
    model = build(TEST_VIT, checkpoint=weights, img_size=96)
    assert torch.isfinite(model(torch.randn(1, 3, 96, 96))).all()


def test_checkpoint_with_missing_unknown_and_misshapen_keys(tmp_path: Path) -> None:
    state = timm.create_model(TEST_VIT).state_dict()
    state["stranger.weight"] = state.pop("blocks.0.mlp.fc1.bias")
    state["norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(BackboneMismatchError) as caught:
        build(TEST_VIT, checkpoint=tmp_path / "x.safetensors")
    for part in ("blocks.0.mlp.fc1.bias", "stranger.weight", "norm.weight (3,) instead of (64,)"):
        assert part in str(caught.value)


def test_unreadable_checkpoints(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(FileFormatError, match="is not a file"):
        build(TEST_VIT, checkpoint=tmp_path / "nowhere.safetensors")
    with pytest.raises(FileFormatError, match="It is a folder"):
        build(TEST_VIT, checkpoint=weights.parent)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="cannot be read"):
        build(TEST_VIT, checkpoint=cut)
    cut_torch = tmp_path / "cut.pt"
    torch.save({"a": torch.zeros(1000)}, cut_torch)
    cut_torch.write_bytes(cut_torch.read_bytes()[:800])
    with pytest.raises(FileFormatError, match="cannot be read"):
        build(TEST_VIT, checkpoint=cut_torch)
    empty = tmp_path / "empty.pt"
    torch.save({}, empty)
    with pytest.raises(FileFormatError, match="no state dict"):
        build(TEST_VIT, checkpoint=empty)


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched-by-checkpoint"),))


def test_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(FileFormatError, match="tensors only"):
            build(TEST_VIT, checkpoint=tmp_path / name)
    assert not (tmp_path / "touched-by-checkpoint").exists()


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vit_base_patch16_224'"):
        build("vit_base_patch16_225")
    with pytest.raises(UnknownNameError, match=r"augreg_in21k"):
        build("vit_base_patch16_224.augreg_in22k")
    with pytest.raises(UnknownNameError, match="no anatomy of this plugin"):
        build("efficientnet_b0")
    with pytest.raises(UnknownNameError, match="micro-vit"):
        build("micro_vit")


def test_unknown_option() -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        build(TEST_VIT, no_such_option=3)
    with pytest.raises(ConfigError, match="no_such_option"):
        build("micro-vit", no_such_option=3)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def no_name(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.perf_counter()
    with pytest.raises(PeftSuiteError, match=r"checkpoint=PATH.*pretrained=False"):
        build("vit_tiny_patch16_224", pretrained=True)
    assert time.perf_counter() - start < 10
    assert constants.HF_HUB_OFFLINE is False


def test_no_published_weights() -> None:
    name = next(b.name for b in backbones.list() if "no published weights" in b.summary)
    with pytest.raises(UnsupportedError, match="no published weights"):
        build(name, pretrained=True)
