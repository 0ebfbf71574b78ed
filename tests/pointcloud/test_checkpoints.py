"""Published checkpoint layouts: synthetic files with key lists typed from their description, and broken files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import official_keys as keys
import pytest
import torch
from official_keys import Shapes
from safetensors.torch import save_file
from torch import Tensor

from peft_suite.errors import BackboneMismatchError, FileFormatError
from peft_suite.pointcloud.backbones import backbones, part_backbones
from peft_suite.pointcloud.checkpoints import load, read

DIM, DEPTH = 24, 3
SMALL: dict[str, Any] = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "groups": 8, "group_size": 6}
HEAD = {k for k in keys.head(2 * DIM, 15) if not k.endswith("num_batches_tracked")}


def write(path: Path, shapes: Shapes, wrapper: str = "base_model") -> tuple[str, dict[str, Tensor]]:
    tensors = keys.filled(shapes)
    extra = {"optimizer": {"state": {}}, "epoch": 3, "metrics": {"acc": np.float64(91.5)}, "best_metrics": {}}
    torch.save({wrapper: tensors, **extra}, path)
    return str(path), tensors


def build(name: str, checkpoint: str = "", **options: Any) -> torch.nn.Module:
    return backbones.build(name, 15, pretrained=False, checkpoint=checkpoint, options={**SMALL, **options})


CASES = {
    "point-mae": (keys.point_mae(DIM, DEPTH), {}, "MAE_encoder.", HEAD | {"cls_token", "cls_pos"}),
    "point-bert": (
        keys.point_bert(DIM, DEPTH, 16),
        {"encoder_dim": 16},
        "module.transformer_q.",
        {f"cls_head_finetune.{i}.{n}" for i in (0, 3) for n in ("weight", "bias")},
    ),
    "act": (keys.act(DIM, DEPTH), {}, "ACT_encoder.", HEAD | {"cls_token", "cls_pos"}),
    "recon": (keys.recon(DIM, DEPTH), {}, "MAE_encoder.", HEAD),
    "recon-plain": (keys.recon(DIM, DEPTH), {}, "MAE_encoder.", HEAD),
    "pointgpt-s": (
        keys.pointgpt(DIM, DEPTH, large=False),
        {},
        "GPT_Transformer.",
        {f"blocks.{k}" for k in HEAD} | {"blocks.cls_norm.weight", "blocks.cls_norm.bias", "cls_token", "cls_pos"},
    ),
    "pointgpt-b": (
        keys.pointgpt(DIM, DEPTH, large=True),
        {},
        "GPT_Transformer.",
        {f"blocks.{k}" for k in HEAD} | {"blocks.cls_norm.weight", "blocks.cls_norm.bias", "cls_token", "cls_pos"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layout_loads_with_nothing_missing_but_what_is_fresh(name: str, tmp_path: Path) -> None:
    shapes, options, prefix, fresh = CASES[name]
    path, tensors = write(tmp_path / "pretrain.pth", shapes)
    model = build(name, **options)
    report = load(model, path)
    assert set(report.missing) == fresh
    assert not report.reshaped
    own = model.state_dict()
    used = {k for k in own if k not in fresh and not k.startswith(("cls_head_finetune.", "blocks.cls_head_finetune."))}
    for key in used:
        theirs = key.replace(".attn.qkv.", ".attn.in_proj_") if "gpt" in name else key
        theirs = theirs.replace(".attn.proj.", ".attn.out_proj.") if "gpt" in name else theirs
        assert torch.equal(own[key], tensors[prefix + theirs]), key
    assert len(report.unexpected) == len(shapes) - len(used), "a key of the file is neither used nor reported"


def test_what_is_not_used_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = write(tmp_path / "recon.pth", keys.recon(DIM, DEPTH))
    with caplog.at_level(logging.INFO, "peft_suite"):
        build("recon-plain", path)
    for key in ("img_token", "blocks.blocks.0.attn_contrast.kv.weight", "MAE_decoder.norm.weight", "text_proj.bias"):
        assert key in caplog.text
    path, _ = write(tmp_path / "bert.pth", keys.point_bert(DIM, DEPTH, 16))
    report = load(build("point-bert", encoder_dim=16), path)
    assert {"queue", "transformer_k.cls_token", "transformer_q.cls_head.0.weight", "lm_head.weight"} <= {
        k.removeprefix("module.") for k in report.unexpected
    }


@pytest.mark.parametrize("wrapper", ["base_model", "model"])
def test_fine_tuned_classifier_loads_whole(wrapper: str, tmp_path: Path) -> None:
    path, tensors = write(tmp_path / "ckpt-best.pth", keys.fine_tuned(DIM, DEPTH, 15), wrapper)
    model = build("point-mae")
    report = load(model, path)
    assert not report.missing and not report.unexpected and not report.reshaped
    assert torch.equal(model.state_dict()["cls_head_finetune.8.weight"], tensors["module.cls_head_finetune.8.weight"])


def test_head_of_other_classes_stays_fresh(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "ckpt.pth", keys.fine_tuned(DIM, DEPTH, 40))
    assert set(load(build("point-mae"), path).reshaped) == {"cls_head_finetune.8.weight", "cls_head_finetune.8.bias"}
    short = load(build("point-mae", head="linear"), path)
    assert "cls_head_finetune.8.weight" in short.unexpected and "cls_head_finetune.0.weight" in short.missing


def test_own_files_round_trip(tmp_path: Path) -> None:
    for name in ("point-mae", "recon", "pointgpt-s"):
        model = build(name)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        report = load(build(name), str(tmp_path / f"{name}.safetensors"))
        lost = [k for k in report.missing if "cls_head" not in k]
        assert not lost and not [k for k in report.unexpected if "cls_head" not in k]


def test_part_segmenter_takes_the_encoder(tmp_path: Path) -> None:
    path, tensors = write(tmp_path / "pretrain.pth", keys.point_mae(DIM, DEPTH))
    model = part_backbones.build("point-mae", 50, pretrained=True, checkpoint=path, options=SMALL)
    assert torch.equal(model.state_dict()["norm.weight"], tensors["MAE_encoder.norm.weight"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"embed_dim": 32}, "embed_dim=24"),
        ({"depth": 2}, "depth=3"),
        ({"depth": 4}, "depth=3"),
        ({"channels": 6}, "channels=3"),
    ],
)
def test_other_sizes_name_what_the_file_holds(options: dict[str, int], told: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path / "pretrain.pth", keys.point_mae(DIM, DEPTH))
    model = build("point-mae", **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BackboneMismatchError, match=told) as caught:
        load(model, path)
    assert path in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "a refused file changed the model"


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "pretrain.pth", keys.point_mae(DIM, DEPTH))
    for name in ("recon", "pointgpt-s", "point-bert"):
        with pytest.raises(BackboneMismatchError, match="missing in the file"):
            build(name, path)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "pretrain.pth", keys.point_mae(DIM, DEPTH))
    whole = Path(path).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"epoch": 3, "weights": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name, told in {
        "cut.pth": "cannot be read",
        "empty.pth": "cannot be read",
        "other.pth": "found: epoch, weights",
        "tensor.pth": "found: Tensor",
        "absent.pth": "is not a file",
    }.items():
        with pytest.raises(FileFormatError, match=told) as caught:
            read(str(tmp_path / name))
        assert name in str(caught.value)
    with pytest.raises(FileFormatError, match=r"It is a folder.*pretrain\.pth"):
        read(str(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"base_model": {"a": torch.zeros(1)}, "metrics": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read(str(tmp_path / "evil.pth"))
    assert "executed" not in capsys.readouterr().out
