"""The description fits every architecture that the plugin lists, hybrids and parallel blocks included."""

from __future__ import annotations

import pytest
import timm
import torch

import peft_suite as ps
from peft_suite.errors import UnsupportedError
from peft_suite.vision.backbones import MODULES

# one of each kind: the others differ in size
KINDS = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
    "vit_base_patch16_rpn_224",
    "vit_small_resnet26d_224",
    "vit_base_mci_224",
    "vit_base_patch16_xp_224",
    "vit_small_patch16_18x2_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
)


@pytest.mark.parametrize("name", [n for n in KINDS if any(n in timm.list_models(module=m) for m in MODULES)])
def test_every_kind_is_described(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert ps.plan(model, "linear").trainable == sum(p.numel() for n, p in model.named_parameters() if "head" in n)
    blocks = ps.anatomy_of(model).blocks
    assert len(blocks) in (0, len(model.blocks))
    for method in ("lora", "ssf", "vpt", "adaptformer", "houlsby"):
        if blocks:
            assert ps.plan(model, method).trainable > 0
        else:
            with pytest.raises(UnsupportedError, match="residual blocks"):
                ps.plan(model, method)
