"""Whole pipelines of every family: trained, saved, opened, merged, read by diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_data import bare, captioned
from diffusion_files import stable_diffusion_1, stable_diffusion_3
from diffusion_parts import draw, tiny_family, tiny_pipeline, tiny_sd3
from safetensors.torch import save_file
from torch import Tensor

import peft_suite as ps
from peft_suite.diffusion.backbones import backbones
from peft_suite.diffusion.data import DiffusionDataConfig, source
from peft_suite.diffusion.sampling import open_pipeline, sample
from peft_suite.errors import ConfigError, FileFormatError, MergeError
from peft_suite.plugins import find_plugin
from peft_suite.train import RunConfig, open_adapter
from peft_suite.train.running import run_once


def images(pipe: Any, kind: str) -> Tensor:
    """One or two images ``[N, H, W, C]`` of 16x16 pixels, the same for the same weights."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    if kind == "dit":
        return torch.from_numpy(pipe([0, 1], guidance_scale=1.0, **options).images)
    return torch.from_numpy(pipe("a picture", height=16, width=16, guidance_scale=3.0, **options).images)


def data_of(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "dit":
        for number, name in enumerate("ab"):
            bare(folder / name, 3, 3 * number)
        return {"root": str(folder), "pictures": 0}
    return {"root": str(captioned(folder, 4)), "resolution": 16, "pictures": 0}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("sdxl", "lora"), ("sd3", "lora(rank=2, dora=True)"), ("flux", "sara(quantile=0.1)"), ("dit", "lora")],
)
def test_train_merge_and_the_same_images_from_diffusers_alone(tmp_path, kind, method):
    from diffusers import DiffusionPipeline

    base = tiny_family(kind, tmp_path / "pipe")
    config = RunConfig.from_dict(
        {
            "plugin": "diffusion",
            "backbone": {"name": str(base)},
            "data": {**data_of(kind, tmp_path / "images"), "encode_device": "cpu"},
            "method": method,
            "out": str(tmp_path / "run"),
            "device": "cpu",
            "recipe": {"max_steps": 2, "batch_size": 2, "lr": 1e-2, "warmup_epochs": 0},
        }
    )
    result = run_once(config, progress=False)
    opened = open_adapter(result.adapter)
    adapted = images(open_pipeline(opened.model, opened.metadata["preprocessing"]), kind)
    assert (adapted - images(DiffusionPipeline.from_pretrained(base), kind)).abs().max() > 5e-4
    ps.merge(opened.model)
    backbones.write_merged(opened, tmp_path / "merged")
    merged = images(DiffusionPipeline.from_pretrained(tmp_path / "merged"), kind)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    again = open_adapter(tmp_path / "merged")
    facts = again.metadata["preprocessing"]
    assert torch.equal(images(open_pipeline(again.model, facts), kind), merged)
    if kind == "dit":
        with pytest.raises(ConfigError, match="class 1000 for no class, and that of this model is 3"):
            sample(again.model, facts, 1, guidance=2.0, steps=1)
    else:
        assert sample(again.model, facts, 1, prompts=["a"], steps=1).shape == (1, 16, 16, 3), "the size of training"


@pytest.mark.parametrize("kind", ["sd3", "flux", "dit"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, kind):
    base = tiny_family(kind, tmp_path / "pipe")
    found, facts = [], {}
    settings = data_of(kind, tmp_path / "images")
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing}
        model = backbones.build(str(base), 0, pretrained=True, checkpoint="", options=options)
        facts = backbones.preprocessing("", model)
        data = source.load(DiffusionDataConfig.from_dict({**settings, "encode_device": "cpu"}), facts)
        ps.adapt(model, "sara(quantile=0.2)")
        model.train()
        x, y = data.train[0]
        batch, goal = ({k: v[None] for k, v in part.items()} for part in (x, y))
        torch.manual_seed(0)  # the model drops classes by itself
        data.task.loss(data.task.predict(model, batch), goal).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert bool(getattr(model, "is_gradient_checkpointing", False)) is checkpointing
    plain, spared = found
    assert plain.keys() == spared.keys() and all(g is not None and bool(g.any()) for g in list(plain.values())[:1])
    for name, gradient in plain.items():
        torch.testing.assert_close(spared[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_moved_base_and_a_merged_folder_alone_draw_the_same(tmp_path):
    from peft_suite.diffusion.sample_verb import opened

    tiny_pipeline(tmp_path / "pipe")
    config = RunConfig.from_dict(
        {
            "plugin": "diffusion",
            "backbone": {"name": str(tmp_path / "pipe"), "options": {"component": "text_encoder"}},
            "data": {"root": str(bare(tmp_path / "toy", 2)), "pictures": 0, "encode_device": "cpu", "val_fraction": 0},
            "method": "textual-inversion(placeholder='<toy>', initializer='a')",
            "out": str(tmp_path / "run"),
            "device": "cpu",
            "recipe": {"max_steps": 1, "batch_size": 2, "lr": 0.5, "warmup_epochs": 0, "select": "last"},
        }
    )
    adapter = run_once(config, progress=False).adapter
    found = open_adapter(adapter)
    ps.merge(found.model)
    backbones.write_merged(found, tmp_path / "merged")
    drawn = []
    for word in ("<toy>", "a"):
        model, facts, _ = opened(find_plugin("diffusion"), str(adapter))
        drawn.append(sample(model, facts, 1, prompts=[f"a photo of {word}"], steps=1))
    assert not torch.equal(*drawn), "the new word is known"
    (tmp_path / "pipe").rename(tmp_path / "moved")
    for place, checkpoint in ((adapter, str(tmp_path / "moved")), (tmp_path / "merged", "")):
        model, facts, _ = opened(find_plugin("diffusion"), str(place), checkpoint)
        assert torch.equal(sample(model, facts, 1, prompts=["a photo of <toy>"], steps=1), drawn[0])


def test_merged_biases_that_loading_would_drop_are_refused(tmp_path):
    from peft_suite.train.opening import Opened

    tiny_pipeline(tmp_path / "pipe")
    model = backbones.build(str(tmp_path / "pipe"), 0, pretrained=True, checkpoint="", options={})
    metadata = {"preprocessing": backbones.preprocessing("", model)}
    ps.adapt(model, "ssf")
    ps.merge(model)
    assert model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.bias is not None
    with pytest.raises(MergeError, match=r"24 tensors.*attn1\.to_k\.bias.*Nothing was written\. Keep the adapter"):
        backbones.write_merged(Opened(model, metadata, tmp_path), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe"]


# ---- single files ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch) -> list[Any]:
    """What was asked of the network, which is not there."""
    asked: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    return asked


def same(model: Any, wanted: Any) -> bool:
    """Equal weights."""
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in wanted.state_dict().items())


def test_single_file_trains_merges_and_needs_no_network(tmp_path, offline):
    from diffusers import DiffusionPipeline

    pipe = tiny_pipeline(seed=3)
    tiny_pipeline(tmp_path / "config")
    parts = (pipe.unet.state_dict(), pipe.vae.state_dict(), pipe.text_encoder.state_dict())
    file = tmp_path / "everything.safetensors"
    save_file(stable_diffusion_1(*parts), file)
    torch.save({"state_dict": stable_diffusion_1(*parts)}, tmp_path / "everything.ckpt")
    options = {"config": str(tmp_path / "config")}
    for name in ("everything.safetensors", "everything.ckpt"):
        assert same(
            backbones.build(str(tmp_path / name), 0, pretrained=True, checkpoint="", options=options), pipe.unet
        )
    encoder = {**options, "component": "text_encoder"}
    model = backbones.build(str(file), 0, pretrained=True, checkpoint="", options=encoder)
    facts = backbones.preprocessing("", model)
    assert same(model, pipe.text_encoder) and len(model.suite_tokenizer) == 514
    assert (facts["model"], facts["denoiser"], facts["factor"], facts["size"]) == (
        "UNet2DConditionModel",
        "unet",
        2,
        32,
    )

    config = RunConfig.from_dict(
        {
            "plugin": "diffusion",
            "backbone": {"name": str(file), "options": options},
            "data": {"root": str(captioned(tmp_path / "images", 3)), "pictures": 0, "encode_device": "cpu"},
            "method": "lora",
            "out": str(tmp_path / "run"),
            "device": "cpu",
            "recipe": {"max_steps": 1, "batch_size": 2, "lr": 1e-2, "warmup_epochs": 0},
        }
    )
    opened = open_adapter(run_once(config, progress=False).adapter)
    adapted = draw(open_pipeline(opened.model, opened.metadata["preprocessing"]))
    ps.merge(opened.model)
    backbones.write_merged(opened, tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert same(merged.vae, pipe.vae) and abs(draw(merged) - adapted).max() < 1e-4
    assert not offline


def test_single_files_that_do_not_fit_say_what_to_give(tmp_path, offline):
    torch.manual_seed(0)
    base = tiny_family("sd3", tmp_path / "pipe")
    transformer = tiny_sd3(layers=2, joint_attention_dim=64, pooled_projection_dim=32)
    file = tmp_path / "transformer.safetensors"
    save_file(stable_diffusion_3(transformer.state_dict(), 2), file)
    model = backbones.build(str(base), 0, pretrained=True, checkpoint=str(file), options={})
    assert same(model, transformer)

    def refused(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            backbones.build(str(file), 0, pretrained=True, checkpoint="", options=options)

    refused(ConfigError, r"nothing is downloaded by itself.*backbone\.options\.config=FOLDER.*hf download")
    refused(ConfigError, "does not exist", config=str(tmp_path / "nothing"))
    refused(FileFormatError, "--backbone FOLDER --checkpoint FILE", config=str(base))
    assert not offline
