"""Any2Point's sources, against the libraries that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from peft_suite.errors import (
    BackboneMismatchError,
    ConfigError,
    DataError,
    PeftSuiteError,
    UnknownNameError,
    UnsupportedError,
)
from peft_suite.pointcloud.anatomies.any2point import tiny_audio, tiny_language, tiny_vision
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.backbones import backbones
from peft_suite.testing.case import settle


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def built(name: str, **options: object) -> Any:
    return backbones.build(name, 15, pretrained=False, checkpoint="", options=options)


def through(model: Any, x: Tensor) -> Tensor:
    geometry, nowhere = model.geometry(clouds()), torch.zeros_like(x)
    out: Tensor = model.norm(model.blocks(x, nowhere, geometry))
    return out


@pytest.mark.parametrize(
    "options", [{"init_values": 0.5}, {"qkv_bias": False}, {"reg_tokens": 2, "no_embed_class": True}, {"num_heads": 3}]
)
def test_blocks_compute_what_timm_computes(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **options}
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
    settle(vit)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model: Any = tiny_vision(source_options=sizes, weights=str(tmp_path / "vit.pth"))
    x = torch.randn(3, 9, 24)
    torch.testing.assert_close(through(model, x), vit.norm(vit.blocks(x)))
    assert torch.equal(model.project.table, vit.pos_embed[0, -16:]) and torch.equal(model.cls_token, vit.cls_token)


def test_the_table_is_resampled_for_another_image_size(tmp_path: Path) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model: Any = tiny_vision(source_options={**sizes, "img_size": 56}, weights=str(tmp_path / "vit.pth"))
    assert model.project.grid == (7, 7)
    torch.testing.assert_close(model.project.table, resample_abs_pos_embed(vit.pos_embed, [7, 7])[0, 1:].detach())


def test_the_embedded_vit_is_a_source_with_weights() -> None:
    from peft_suite.vision.micro import load_weights

    model = backbones.build(
        "any2point-vision",
        5,
        pretrained=True,
        checkpoint="",
        options={"source": "micro-vit", "groups": 8, "group_size": 6},
    )
    shipped: Any = load_weights()
    assert torch.equal(model.blocks.blocks[3].mlp.fc1.weight, shipped["blocks.3.mlp.fc1.weight"])  # type: ignore[union-attr, index]
    assert torch.equal(model.project.table, shipped["pos_embed"][0, 1:])  # type: ignore[union-attr]


def test_text_from_a_folder(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=7,
        max_position_embeddings=9,
    )
    clip: Any = CLIPTextModel(config).eval()
    settle(clip)
    clip.save_pretrained(tmp_path)
    model: Any = tiny_language(source=str(tmp_path), source_options={}, pretrained=True)
    x = torch.randn(3, 9, 24)
    wanted = clip.final_layer_norm(clip.encoder(inputs_embeds=x).last_hidden_state)
    torch.testing.assert_close(through(model, x), wanted)
    assert torch.equal(model.project.table, clip.embeddings.position_embedding.weight)
    other: Any = tiny_language(source=str(tmp_path), source_options={})
    assert not torch.equal(other.project.table, model.project.table), "without pretrained, random weights of its sizes"


def test_sound_from_a_folder(tmp_path: Path) -> None:
    from transformers import ASTConfig, ASTModel

    sizes = {"num_mel_bins": 16, "max_length": 24, "patch_size": 8, "frequency_stride": 4, "time_stride": 4}
    heads = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ast: Any = ASTModel(ASTConfig(**sizes, **heads)).eval()  # type: ignore[arg-type]
    settle(ast)
    ast.save_pretrained(tmp_path)
    model: Any = tiny_audio(source=str(tmp_path), source_options={}, pretrained=True)
    x = wanted = torch.randn(3, 9, 24)
    for layer in ast.layers:
        wanted = layer(wanted, None)
    torch.testing.assert_close(through(model, x), ast.layernorm(wanted))
    assert model.project.grid == (3, 5) and torch.equal(model.cls_token, ast.embeddings.cls_token)
    assert torch.equal(model.project.table, ast.embeddings.position_embeddings[0, 2:])
    with pytest.raises(UnsupportedError, match="audio-spectrogram-transformer"):
        tiny_language(source=str(tmp_path), source_options={}, pretrained=True)


def test_a_saved_network_loads_again(tmp_path: Path) -> None:
    model = tiny_vision()
    settle(model)
    batch = clouds()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    options = {
        "source": "vit_tiny_patch16_224",
        "source_options": {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "init_values": 0.5,
        },
        "groups": 8,
        "group_size": 6,
        "last_width": 4,
    }
    path = str(tmp_path / "whole.pth")
    again = backbones.build("any2point-vision", 5, pretrained=True, checkpoint=path, options=options).eval()
    assert torch.equal(again(batch), model(batch))


def test_bad_sources_and_options() -> None:
    with pytest.raises(UnsupportedError, match="plain ViT"):
        built("any2point-vision", source="resnet18")
    with pytest.raises(UnsupportedError, match="norms of q and k"):
        tiny_vision(source_options={"embed_dim": 24, "depth": 1, "num_heads": 2, "qk_norm": True})
    with pytest.raises(UnsupportedError, match="gated MLP"):
        built("any2point-vision", source="vit_giant_patch14_reg4_dinov2", source_options={"depth": 1, "embed_dim": 48})
    with pytest.raises(UnknownNameError, match="vit_base_patch14_dinov2"):
        built("any2point-vision", source="vit_base_patch14_dinov3x")
    with pytest.raises(ConfigError, match="multiple of 8"):
        tiny_vision(source_options={"embed_dim": 36, "depth": 1, "num_heads": 2})
    with pytest.raises(ConfigError, match="twice the groups"):
        tiny_vision(group_size=17)
    with pytest.raises(ConfigError, match="distance"):
        tiny_vision(distance=0.5)
    with pytest.raises(ConfigError, match="cannot be built with the options"):
        built("any2point-vision", source="micro-vit", neighbours=3)
    with pytest.raises(ConfigError, match="hidden_size"):
        tiny_language(source_options={"hidden_sizes": 24})
    with pytest.raises(PeftSuiteError, match="neither a folder"):
        tiny_audio(source="/nowhere/at/all", source_options={})
    with pytest.raises(DataError, match="first stage"):
        tiny_vision()(torch.randn(2, 31, 3))
    with pytest.raises(DataError, match="batch, points"):
        tiny_vision()(torch.randn(31, 3))


def test_a_folder_of_other_sizes_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 7}
    CLIPTextModel(CLIPTextConfig(hidden_size=24, **sizes)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(BackboneMismatchError, match="encoder"):
        tiny_language(source=str(tmp_path), source_options={"num_hidden_layers": 2}, pretrained=True)
