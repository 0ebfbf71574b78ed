"""Images from components and pipelines: the same as diffusers draws, the same for the same seed, at any strength."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusion_parts as made
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

import peft_suite as ps
from peft_suite.cli.app import build
from peft_suite.diffusion import micro, sampling
from peft_suite.errors import ConfigError, MergeError, UnknownNameError, UnsupportedError

FACTS = micro.preprocessing()


@functools.cache
def unet() -> nn.Module:
    return micro.build()


def draw(model: nn.Module, n: int = 4, facts: dict[str, Any] = FACTS, **options: Any) -> Tensor:
    return sampling.sample(model, facts, n, **{"steps": 3, **options})


def cli(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(build(), ["diffusion", *map(str, words)])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


# ---- pixel models ----------------------------------------------------------------------------------------------------


def test_images_depend_on_seed_and_number_alone() -> None:
    images = draw(unet(), 7)
    assert images.shape == (7, 8, 8, 1) and images.dtype == torch.uint8
    assert torch.equal(images, draw(unet(), 7))
    assert torch.equal(images[:4], draw(unet(), 4))
    assert (images.int() - draw(unet(), 7, batch_size=2).int()).abs().max() <= 1  # other sums in other batches
    assert not torch.equal(images, draw(unet(), 7, seed=1))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_step_is_that_of_diffusers(guidance: float) -> None:
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(3)
    x = sampling.noise_of(5, [0, 1], (1, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            asked = unet()(x, t, class_labels=torch.tensor([3, 8])).sample
            free = unet()(x, t, class_labels=torch.tensor([10, 10])).sample
            x = scheduler.step(free + guidance * (asked - free), t, x).prev_sample
    expected = (x.clamp(-1, 1) + 1) * 127.5
    found = draw(unet(), 2, classes=[3, 8], seed=5, guidance=guidance)
    assert (found.permute(0, 3, 1, 2) - expected).abs().max() <= 0.51


def test_unconditional_images_are_those_of_diffusers_pipeline() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    model = UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    facts = {**FACTS, "kind": "unconditional", "channels": 3, "classes": 0, "null": None}
    pipe = DDIMPipeline(model, DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(2 * 1_000_003 + i) for i in range(2)]
    expected = pipe(batch_size=2, generator=generators, num_inference_steps=3, output_type="np").images
    model.train()
    found = draw(model, 2, facts, seed=2)
    assert (found.float() - torch.from_numpy(expected) * 255).abs().max() <= 0.51
    assert model.training and model.mid_block.training  # as it was


def test_images_take_the_classes_in_turn() -> None:
    both = draw(unet(), 4, classes=[2, 7])
    assert torch.equal(both[1], draw(unet(), 2, classes=[7])[1])
    assert torch.equal(draw(unet(), 4), draw(unet(), 4, classes=list(range(10))))


@pytest.mark.parametrize("name", ["dpm", "ddpm"])
def test_other_samplers(name: str) -> None:
    images = draw(unet(), 3, sampler=name, steps=6)
    assert torch.equal(images, draw(unet(), 3, sampler=name, steps=6))
    assert images.float().std() > 20  # strokes on a ground


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": [10, 12]}, "class 12: the model has the classes 0 to 9"),
        ({"prompts": ["a seven"]}, "takes no prompts"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_wrong_conditions_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        draw(unet(), 2, **options)


def test_what_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ddim'"):
        draw(unet(), 2, sampler="dddim")
    with pytest.raises(ConfigError, match="guidance = 3"):
        draw(unet(), 2, {**FACTS, "null": None}, guidance=3.0)
    with pytest.raises(ConfigError, match="Prompts need the whole pipeline"):
        draw(unet(), 2, {**FACTS, "kind": "text"}, prompts=["x"])
    with pytest.raises(ConfigError, match="draws by text"):
        draw(unet(), 2, {**FACTS, "kind": "text"})


# ---- pipelines -------------------------------------------------------------------------------------------------------


def test_text_pipeline_draws_what_diffusers_draws(tmp_path: Path) -> None:
    pipe = made.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    facts = {"kind": "text", "component": "unet", "pipeline": "", "factor": 2}
    prompts = ["a red cube", "a small dog"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    expected = pipe(prompts, generator=generators, height=32, width=32, **options).images
    found = sampling.sample(pipe.unet, facts, 2, prompts=prompts, steps=2, guidance=4.0, size=32, pipeline=pipe)
    assert found.shape == (2, 32, 32, 3)
    assert (found.float() - torch.from_numpy(expected) * 255).abs().max() <= 0.51


def test_pipeline_folder_gets_the_adapted_component(tmp_path: Path) -> None:
    made.tiny_pipeline().save_pretrained(tmp_path / "sd")
    from peft_suite.diffusion.backbones import backbones

    model: Any = backbones.build(str(tmp_path / "sd"), 0, pretrained=True, checkpoint="", options={})
    facts = backbones.preprocessing("", model)
    options: dict[str, Any] = {"prompts": ["a red cube"], "steps": 2, "guidance": 2.0, "size": 32}
    plain = sampling.sample(model, facts, 1, **options)
    ps.adapt(model, "bitfit")
    assert torch.equal(plain, sampling.sample(model, facts, 1, **options))
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.5)
    assert not torch.equal(plain, sampling.sample(model, facts, 1, **options))


# ---- strength --------------------------------------------------------------------------------------------------------


def adapted(spec: str) -> nn.Module:
    model = micro.build()
    torch.manual_seed(0)
    ps.adapt(model, spec)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():  # type: ignore[operator, union-attr]
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


@pytest.mark.parametrize("spec", ["lora(rank=2)", "bitfit"])
def test_strength_goes_from_the_base_to_the_adapter_and_beyond(spec: str) -> None:
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor(400), torch.tensor([1, 2])

    def answer(strength: float) -> Tensor:
        model = sampling.at_strength(adapted(spec), strength)
        with torch.no_grad():
            return model(x, t, class_labels=label).sample

    with torch.no_grad():
        base, full = unet()(x, t, class_labels=label).sample, adapted(spec)(x, t, class_labels=label).sample
    assert not torch.allclose(base, full, atol=1e-2)
    torch.testing.assert_close(answer(0.0), base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer(1.0), full, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(answer(2.0), full, atol=1e-2)


def test_strength_of_merged_weights_is_linear() -> None:
    half, whole, base = sampling.at_strength(adapted("bitfit"), 0.5), adapted("bitfit"), unet().state_dict()
    ps.merge(whole)
    for name, value in half.state_dict().items():
        torch.testing.assert_close(value, (base[name] + whole.state_dict()[name]) / 2)


def test_strength_of_what_neither_scales_nor_merges_is_refused() -> None:
    with pytest.raises((UnsupportedError, MergeError)):
        sampling.at_strength(adapted("adapter(bottleneck=4)"), 0.5)


# ---- pictures and the verb -------------------------------------------------------------------------------------------


def test_grid_places_images_row_by_row() -> None:
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 8, 8, 1) * 100
    sheet = sampling.grid(images, columns=2)
    assert sheet.mode == "L" and sheet.size == (2 * 34 + 2, 2 * 34 + 2)
    assert [sheet.getpixel(p) for p in ((5, 5), (40, 5), (5, 40), (40, 40), (0, 0))] == [0, 100, 200, 255, 255]
    assert sampling.grid(torch.zeros(4, 64, 64, 3, dtype=torch.uint8)).size == (134, 134)


def test_verb_writes_images_and_what_was_asked(tmp_path: Path) -> None:
    words = ("sample", "micro-unet", "--classes", "3,8", "-n", "4", "--steps", "3", "--seed", "5", "--json")
    told = json.loads(cli(*words, "--out", tmp_path / "a").stdout)
    assert told["images"] == 4 and Path(told["grid"]).is_file()
    cli(*words, "--out", tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").glob("*.png"))
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "images.json").read_text())
    assert [r["class"] for r in record["images"]] == [3, 8, 3, 8] and record["seed"] == 5
    expected = draw(unet(), 4, classes=[3, 8], seed=5)
    with Image.open(tmp_path / "a" / "0002.png") as image:
        assert list(image.getdata()) == expected[2].flatten().tolist()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("micro-unet", "--classes", "horse"), "no class"),
        (("micro-unet", "--strength", "0.5"), "no adapter"),
        (("no-such-model",), "does not exist"),
    ],
)
def test_verb_refuses(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    result = cli("sample", *words, "--out", tmp_path / "x", code=1)
    assert told in result.output.replace("\n", " ")
    assert not (tmp_path / "x").exists()
