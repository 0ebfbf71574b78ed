"""LoRA files: stock diffusers loads what is written here, and what diffusers, peft and kohya write is read exactly."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusion_parts as made
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_suite as ps
from peft_suite.diffusion.interchange import load_lora, save_lora, to_lora
from peft_suite.diffusion.lora_keys import original_names
from peft_suite.errors import BackboneMismatchError, FileFormatError, UnsupportedError
from peft_suite.methods.lora_parts import LowRank

FILE = "pytorch_lora_weights.safetensors"
UNET = "lora(rank=4, alpha=6, targets=['*.to_q', '*.to_out.0', '*.conv1', '*.ff.net.2'])"
UNEVEN = (
    "lora(rank=4, alpha=8, targets=['*.to_q', '*.conv1'], "
    "ranks=[('mid_block.resnets.0.conv1', 2), ('mid_block.attentions.0.transformer_blocks.0.attn1.to_q', 3)], "
    "alphas=[('mid_block.resnets.0.conv1', 5.0), ('mid_block.attentions.0.transformer_blocks.0.attn1.to_q', 1.0)])"
)


def trained(model: nn.Module, method: str, seed: int = 0) -> nn.Module:
    """The model with an adapter of random values."""
    ps.adapt(model, method)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.mul_(1 + 0.1 * noise) if name.endswith("magnitude") else parameter.add_(0.2 * noise)
    return model


def low_rank(model: nn.Module) -> list[Any]:
    """The edits that are updates of matrices."""
    return [e for e in model.adapters["default"].edits if isinstance(e.part, LowRank)]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.adapters["default"].state_dict()


def step(unet: nn.Module) -> torch.Tensor:
    """One prediction of a tiny UNet."""
    draw = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 5, 32, generator=draw)
    with torch.no_grad():
        return unet(x, 37, encoder_hidden_states=text).sample


@pytest.mark.parametrize(
    ("spec", "format", "options"),
    [
        (UNET, "diffusers", {}),
        (UNET.replace("rank=4", "rank=4, dora=True"), "diffusers", {}),
        (UNEVEN, "diffusers", {}),
        (UNET, "kohya", {}),
        (UNET, "kohya", {"naming": "original"}),
        (UNEVEN, "diffusers", {"bake": True}),
        (UNEVEN, "kohya", {"bake": True}),
    ],
)
def test_stock_pipeline_loads_what_is_written(tmp_path: Path, spec: str, format: Any, options: dict[str, Any]) -> None:
    """Images of stock load_lora_weights equal ours; unloading gives the plain pipeline; our reader gives our values."""
    pipe = made.tiny_pipeline()
    plain = made.draw(pipe)
    trained(pipe.unet, spec)
    text = "diffusers-lora-text" if "dora" not in spec else "diffusers-lora-text(dora=True)"
    trained(pipe.text_encoder, text, seed=1)
    ours = made.draw(pipe)
    assert abs(ours - plain).max() > 0.05
    both = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    assert save_lora(both, tmp_path, format=format, **options) == {}

    stock = made.tiny_pipeline()
    stock.load_lora_weights(tmp_path, **({"unet_config": stock.unet.config} if "naming" in options else {}))
    assert abs(made.draw(stock) - ours).max() < 1e-5
    stock.unload_lora_weights()
    assert abs(made.draw(stock) - plain).max() == 0

    again = made.tiny_pipeline()
    load_lora(again.unet, tmp_path)
    load_lora(again.text_encoder, tmp_path)
    for name in both:
        found, expected = values(getattr(again, name)), values(getattr(pipe, name))
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        if "bake" not in options:
            assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert abs(made.draw(again) - ours).max() < (1e-5 if "bake" in options else 1e-12)


def test_keys_are_those_of_diffusers(tmp_path: Path) -> None:
    """The same keys, shapes and (where both have them) metadata as save_lora_weights writes for the same layers."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors import safe_open

    theirs = made.tiny_pipeline()
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    theirs.text_encoder.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.text_encoder)),
        **_collate_lora_metadata({"unet": theirs.unet, "text_encoder": theirs.text_encoder}),
    )
    ours = made.tiny_pipeline()
    ps.adapt(ours.unet, "diffusers-lora(alpha=6)")
    ps.adapt(ours.text_encoder, "diffusers-lora-text")
    save_lora({"unet": ours.unet, "text_encoder": ours.text_encoder}, tmp_path / "ours")
    found, expected = load_file(tmp_path / "ours" / FILE), load_file(tmp_path / "theirs" / FILE)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    facts = []
    for who in ("ours", "theirs"):
        with safe_open(tmp_path / who / FILE, framework="pt") as opened:
            facts.append(json.loads(opened.metadata()["lora_adapter_metadata"]))
    same = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias", "peft_type")
    for key in [f"{component}.{k}" for component in ("unet", "text_encoder") for k in same]:
        assert facts[0][key] == facts[1][key], key


def peft_unet(**options: Any) -> nn.Module:
    """A UNet with a random LoRA of peft on it."""
    from peft import LoraConfig

    unet = made.tiny_pipeline().unet
    names = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]
    unet.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, **options}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return unet


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("adapter", {}),
        ("adapter", {"use_rslora": True}),
        ("adapter", {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"conv1": 3}}),
        ("raw", {"use_dora": True}),
        ("converted", {"use_dora": True}),
        ("converted", {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"conv1": 3}}),
    ],
)
def test_reads_what_peft_and_diffusers_write(tmp_path: Path, how: str, options: dict[str, Any]) -> None:
    """save_lora_adapter, raw peft keys under ``unet.``, and keys after convert_state_dict_to_diffusers."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    theirs = peft_unet(**options)
    if how == "adapter":
        theirs.save_lora_adapter(tmp_path)
    else:
        layers = get_peft_model_state_dict(theirs)
        layers = convert_state_dict_to_diffusers(layers) if how == "converted" else layers
        config = theirs.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    ours = load_lora(made.tiny_pipeline().unet, tmp_path)
    torch.testing.assert_close(step(ours), step(theirs), rtol=1e-5, atol=2e-6)
    config = ours.adapters["default"].method.config
    assert config.dora == ("use_dora" in options)
    if "rank_pattern" in options:
        assert {rank for _, rank in config.ranks} == {2} and len(config.ranks) == 8
    assert not any(p.requires_grad for p in ours.parameters())


def test_reads_kohya_as_diffusers_writes_it_and_old_processor_keys(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    theirs = peft_unet(lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    layers = get_peft_model_state_dict(theirs)
    save_file(convert_state_dict_to_kohya({f"unet.{k}": v for k, v in layers.items()}), tmp_path / "k.safetensors")
    old = {
        "unet."
        + k.replace(".to_out.0.", ".to_out.")
        .replace(".lora_A.weight", "_lora.down.weight")
        .replace(".lora_B.weight", "_lora.up.weight")
        .replace(".attn1.", ".attn1.processor.")
        .replace(".attn2.", ".attn2.processor."): v
        for k, v in layers.items()
    }
    assert any("attn2.processor.to_out_lora.up.weight" in k for k in old)
    save_file(old, tmp_path / "old.safetensors")
    expected = step(theirs)
    for name in ("k", "old"):
        ours = load_lora(made.tiny_pipeline().unet, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(step(ours), expected, rtol=1e-5, atol=2e-6)


def test_text_encoders_with_and_without_their_old_level(tmp_path: Path) -> None:
    """Files from before transformers 5 have ``text_model.`` in their keys."""
    pipe = made.tiny_pipeline()
    trained(pipe.text_encoder, "diffusers-lora-text")
    save_lora(pipe.text_encoder, tmp_path)
    old = {k.replace("text_encoder.", "text_encoder.text_model."): v for k, v in load_file(tmp_path / FILE).items()}
    save_file(old, tmp_path / "old.safetensors")
    again = load_lora(made.tiny_text_encoder(), tmp_path / "old.safetensors")
    assert all(torch.equal(v, values(pipe.text_encoder)[k]) for k, v in values(again).items())


@pytest.mark.parametrize("build", [functools.partial(made.tiny_sd3, layers=2), made.tiny_flux])
def test_transformers_both_ways(tmp_path: Path, build: Any) -> None:
    torch.manual_seed(0)
    ours = build()
    plain = {k: v.clone() for k, v in ours.state_dict().items()}
    trained(ours, "diffusers-lora-sd3(alpha=2)")
    save_lora(ours, tmp_path)
    assert all(k.startswith("transformer.") and ".lora_" in k for k in load_file(tmp_path / FILE))
    theirs = build()
    theirs.load_state_dict(plain)
    theirs.load_lora_adapter(str(tmp_path), weight_name=FILE, use_safetensors=True)
    again = build()
    again.load_state_dict(plain)
    load_lora(again, tmp_path)
    assert all(torch.equal(v, values(ours)[k]) for k, v in values(again).items())
    deltas = {n: m.get_delta_weight("default_0") for n, m in theirs.named_modules() if hasattr(m, "get_delta_weight")}
    mine = {e.path: e.part.delta() for e in low_rank(ours)}
    assert deltas.keys() == mine.keys()
    assert all(torch.allclose(mine[n], deltas[n], atol=1e-6) for n in mine)


def test_original_block_names_are_those_of_diffusers_converter() -> None:
    """Names of Stable Diffusion 1.5's layers, translated back by diffusers' own function, are the modules again."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=8)
    names = {p: n for p, n in original_names(unet).items() if isinstance(unet.get_submodule(p), nn.Linear | nn.Conv2d)}
    assert names["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    )
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert len(set(names.values())) == len(names)
    skipped = ("time_embedding", "up_blocks.0.upsamplers")  # the converter takes the latter for an attention
    mapped = {f"lora_unet_{n.replace('.', '_')}.lora_down.weight": p for p, n in names.items()}
    mapped = {k: p for k, p in mapped.items() if not p.startswith(skipped)}
    for key, path in mapped.items():
        (renamed,) = _maybe_map_sgm_blocks_to_diffusers({key: torch.zeros(1)}, unet.config)
        (found,) = convert_unet_state_dict_to_peft({_convert_unet_lora_key(renamed): torch.zeros(1)})
        assert found == f"{path}.lora_A.weight"


def test_other_adapters_are_approximated(tmp_path: Path) -> None:
    """A sparse update: what is kept is the sum of the largest squared singular values; the lost tensors are named."""
    unet = made.tiny_pipeline().unet
    ps.adapt(unet, "full")
    before = {n: p.detach().clone() for n, p in unet.named_parameters() if not n.startswith("adapters.")}
    draw = torch.Generator().manual_seed(0)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        for name, parameter in unet.adapters["default"].named_parameters():
            if path in name or "conv_in" in name:
                mask = torch.rand(parameter.shape, generator=draw) < 0.3
                parameter.add_(mask * torch.randn(parameter.shape, generator=draw))
    now = {e.path: e.part for e in unet.adapters["default"].edits}
    change = (now[path].weight - before[f"{path}.weight"]).detach().double()
    conv = (now["conv_in"].weight - before["conv_in.weight"]).detach().double()
    bias = (now["conv_in"].bias - before["conv_in.bias"]).detach().double()
    found = to_lora(unet, 4)
    s = torch.linalg.svdvals(change).square()
    total = float(s.sum() + conv.square().sum() + bias.square().sum())
    assert list(found.factors) == [path]
    assert found.energy[path] == pytest.approx(float(s[:4].sum() / s.sum()), rel=1e-5)
    assert found.retained == pytest.approx(float(s[:4].sum()) / total, rel=1e-5)
    assert found.lost == {
        "conv_in.weight": pytest.approx(float(conv.square().sum()) / total, rel=1e-5),
        "conv_in.bias": pytest.approx(float(bias.square().sum()) / total, rel=1e-5),
    }
    assert "2 tensors without a place" in str(found)
    u, d, v = torch.linalg.svd(change)
    best = u[:, :4] @ torch.diag(d[:4]) @ v[:4]
    reported = save_lora(unet, tmp_path, rank=4)
    assert reported["unet"].retained == found.retained
    again = load_lora(made.tiny_pipeline().unet, tmp_path)
    (edit,) = low_rank(again)
    torch.testing.assert_close(edit.part.delta().double(), best, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="has no place for it"):
        save_lora(unet, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_fits_or_something_is_left_over(tmp_path: Path) -> None:
    unet = made.tiny_pipeline().unet
    keys = set(unet.state_dict())
    good = {
        f"unet.mid_block.resnets.0.conv1.lora.{w}.weight": v
        for w, v in (("down", torch.zeros(2, 16, 3, 3)), ("up", torch.zeros(16, 2, 1, 1)))
    }
    stray = "unet.mid_block.resnets.7.conv1.lora.down.weight"
    save_file({"unet.other.lora.down.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    save_file({"text_encoder.x.lora_linear_layer.down.weight": torch.zeros(1)}, tmp_path / "text.safetensors")
    save_file({**good, stray: torch.zeros(1), "unet.zz.hada_w1_a": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({k: v for k, v in good.items() if "down" in k}, tmp_path / "half.safetensors")
    save_file(
        {k: v.new_zeros(v.shape[0], 8, *v.shape[2:]) if "down" in k else v for k, v in good.items()},
        tmp_path / "wide.safetensors",
    )
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "old.bin").write_bytes(b"")
    for name, error, text in (
        (
            "none",
            BackboneMismatchError,
            r"No key .* fits this UNet2DConditionModel as 'unet'. Without a place: unet.other",
        ),
        ("text", BackboneMismatchError, r"It is for text_encoder \(1 keys\)"),
        (
            "more",
            BackboneMismatchError,
            r"2 keys .*: unet.mid_block.resnets.7.conv1.* \(nearest module: mid_block.resnets",
        ),
        ("half", FileFormatError, "not both factors"),
        ("wide", BackboneMismatchError, r"\[2, 8, 3, 3\] .* weight of this UNet2DConditionModel is \[16, 16, 3, 3\]"),
        ("cut", FileFormatError, "truncated"),
        ("old.bin", FileFormatError, "can run code"),
        ("missing", FileFormatError, "does not exist"),
    ):
        file = tmp_path / (name if "." in name else f"{name}.safetensors")
        with pytest.raises(error, match=text):
            load_lora(unet, file)
        assert set(unet.state_dict()) == keys
    with pytest.warns(UserWarning, match="2 keys .* left out"):
        load_lora(unet, tmp_path / "more.safetensors", strict=False)
    assert [e.path for e in low_rank(unet)] == ["mid_block.resnets.0.conv1"]


def test_refuses_what_the_formats_cannot_hold(tmp_path: Path) -> None:
    pipe = made.tiny_pipeline()
    ps.adapt(pipe.unet, "diffusers-dora")
    with pytest.raises(UnsupportedError, match="disagree about DoRA"):
        save_lora(pipe.unet, tmp_path, format="kohya")
    sd3 = made.tiny_sd3(layers=2)
    ps.adapt(sd3, "diffusers-lora-sd3")
    with pytest.raises(UnsupportedError, match="fused matrices"):
        save_lora(sd3, tmp_path, format="kohya")
    with pytest.raises(UnsupportedError, match="'vae' is no component"):
        save_lora({"vae": sd3}, tmp_path)
    with pytest.raises(UnsupportedError, match="format='onnx'"):
        save_lora(sd3, tmp_path, format="onnx")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_gaussian_start_and_own_ranks() -> None:
    """diffusers' initialisation: A of standard deviation 1/r, B zero; modules may differ in rank and alpha."""
    torch.manual_seed(0)
    unet = made.tiny_unet()
    ps.adapt(unet, "diffusers-lora(rank=16)")
    parts = [e.part for e in low_rank(unet)]
    pooled = torch.cat([p.lora_A.detach().flatten() for p in parts])
    assert float(pooled.std()) == pytest.approx(1 / 16, rel=0.03) and not any(p.lora_B.any() for p in parts)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    other = made.tiny_unet((8, 16), groups=2)
    ps.adapt(other, {"name": "lora", "targets": ["*.to_q"], "alpha": 4, "ranks": [[path, 2]], "alphas": [[path, 3.0]]})
    shapes = {e.key: (e.part.rank, e.part.scale) for e in low_rank(other)}
    assert shapes.pop(f"{path}.lora") == (2, 1.5) and set(shapes.values()) == {(8, 0.5)}
    with pytest.raises(UnsupportedError, match="does not target it"):
        ps.adapt(made.tiny_unet((8, 16), groups=2), "lora(targets=['*.to_q'], ranks=[('conv_in', 2)])")


def command(*words: str) -> int:
    """Exit code of ``peft-suite diffusion ...``."""
    from peft_suite.cli import main

    with pytest.raises(SystemExit) as left:
        main(["diffusion", *words])
    return int(left.value.code or 0)


def test_verbs_write_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of diffusers becomes an adapter directory, and that the same file of diffusers, or one of kohya."""
    from peft_suite.train.opening import open_adapter

    pipe = made.tiny_pipeline(tmp_path / "pipe")
    trained(pipe.unet, UNET)
    trained(pipe.text_encoder, "diffusers-lora-text")
    image = made.draw(pipe)
    save_lora({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, tmp_path / "given")
    given, common = str(tmp_path / "given"), ["--backbone", str(tmp_path / "pipe"), "--json"]
    text = "backbone.options.component=text_encoder"
    for out, words in (("a", []), ("t", [text])):
        assert command("import-lora", given, str(tmp_path / out), *words, *common) == 0
    shown = [json.loads(block + "}") for block in capsys.readouterr().out.split("}")[:-1]]
    assert [s["modules"] for s in shown] == [len(low_rank(pipe.unet)), len(low_rank(pipe.text_encoder))]
    opened = open_adapter(tmp_path / "a")
    assert all(torch.equal(v, values(pipe.unet)[k]) for k, v in values(opened.model).items())
    adapters = [str(tmp_path / "a"), str(tmp_path / "back"), "--with", str(tmp_path / "t")]
    assert command("export-lora", *adapters) == 0
    back, first = load_file(tmp_path / "back" / FILE), load_file(tmp_path / "given" / FILE)
    assert back.keys() == first.keys() and all(torch.equal(back[k], first[k]) for k in first)
    kohya = tmp_path / "k.safetensors"
    assert command("export-lora", adapters[0], str(kohya), "--format", "kohya", *adapters[2:]) == 0
    stock = made.tiny_pipeline()
    stock.load_lora_weights(str(kohya))
    assert abs(made.draw(stock) - image).max() < 1e-5
    capsys.readouterr()
    assert command("export-lora", adapters[0], str(kohya), "--with", adapters[0]) != 0
    assert "a file holds one for each" in capsys.readouterr().err
