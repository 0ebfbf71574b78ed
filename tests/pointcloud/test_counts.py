"""Parameters of the full-size networks, and what every method trains on Point-MAE; the numbers are published ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import peft_suite as ps
from peft_suite.pointcloud.backbones import backbones, part_backbones
from peft_suite.pointcloud.models.pointgpt import GPTBlock

TOTALS = {
    ("point-bert", 15): 22_059_535,
    ("point-bert", 40): 22_065_960,
    ("point-mae", 15): 22_093_327,
    ("point-mae", 40): 22_099_752,
    ("act", 15): 22_093_327,
    ("recon", 15): 43_571_215,
    ("recon", 40): 43_577_640,
    ("recon-plain", 15): 22_093_327,
}
PIECES = {  # of Point-MAE with 15 classes
    "encoder": 494_464,
    "pos_embed": 50_048,
    "blocks": 21_279_744,
    "blocks.blocks.0": 1_773_312,
    "norm": 768,
    "cls_head_finetune": 267_535,
}
TRAINED = {  # method -> with 15 and 40 classes
    "full": (22_093_327, 22_099_752),
    "linear": (268_303, 274_728),
    "bitfit": (307_983, 314_408),
    "vpt(num_tokens=10, deep=True)": (360_463, 366_888),
    "lora(rank=8, targets=[q, k, v], shared_a=True)": (268_303 + 147_456, 274_728 + 147_456),
    "adapter(bottleneck=16)": (268_303 + 152_256, 274_728 + 152_256),
    "adapter(bottleneck=64)": (268_303 + 595_200, 274_728 + 595_200),
    "adaptformer(bottleneck=64)": (268_303 + 595_200, 274_728 + 595_200),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@functools.cache
def build(name: str, classes: int) -> nn.Module:
    with torch.device("meta"):
        return backbones.build(name, classes, pretrained=False, checkpoint="", options={})


@pytest.mark.parametrize(("name", "classes"), TOTALS)
def test_totals(name: str, classes: int) -> None:
    assert count(build(name, classes)) == TOTALS[name, classes]


@pytest.mark.parametrize("path", PIECES)
def test_pieces_of_point_mae(path: str) -> None:
    assert count(build("point-mae", 15).get_submodule(path)) == PIECES[path]


@pytest.mark.parametrize(("name", "total"), [("pointgpt-b", 120_461_263), ("pointgpt-l", 360_457_679)])
def test_pointgpt_with_the_parts_that_are_left_out(name: str, total: int) -> None:
    """Published totals count the generator of four blocks with its token, norm and prediction layer, the same layer in
    the extractor, and a norm that nothing reads."""
    model: Any = build(name, 15)
    dim = model.embed_dim
    with torch.device("meta"):
        block = count(GPTBlock(dim, 8))
    prediction, norm = dim * 96 + 96, 2 * dim
    generator = 4 * block + dim + norm + prediction
    assert count(model) + generator + prediction + norm == total


def test_part_segmenter() -> None:
    with torch.device("meta"):
        model = part_backbones.build("point-mae", 50, pretrained=False, checkpoint="", options={})
    assert count(model) == 27_063_730


def test_listed_sizes_are_true() -> None:
    for table, outputs in ((backbones, 40), (part_backbones, 50)):
        for info in table.list():
            with torch.device("meta"):
                model = table.build(info.name, outputs, pretrained=False, checkpoint="", options={})
            assert count(model) == info.parameters, info.name


@pytest.mark.parametrize("method", TRAINED)
def test_trained_on_point_mae(method: str) -> None:
    for classes, wanted in zip((15, 40), TRAINED[method], strict=True):
        assert ps.plan(build("point-mae", classes), method).trainable == wanted


def test_linear_head_with_tokens() -> None:
    for classes, wanted in ((15, 12_303), (40, 31_528)):
        with torch.device("meta"):
            model = backbones.build("act", classes, pretrained=False, checkpoint="", options={"head": "linear"})
        assert ps.plan(model, "linear").trainable == wanted


def test_head_alone_where_the_checkpoint_has_the_tokens() -> None:
    assert ps.plan(build("recon-plain", 15), "linear").trainable == 267_535
