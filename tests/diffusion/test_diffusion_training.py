"""Training denoisers: every family against diffusers' own formulas, whole runs, resuming, merging, pictures."""

from __future__ import annotations

import contextlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusion_data import bare, captioned
from diffusion_parts import (
    draw,
    tiny_dit,
    tiny_flux,
    tiny_pipeline,
    tiny_sd3,
    tiny_sdxl_unet,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from safetensors.torch import load_file
from torch.nn import functional

import peft_suite as ps
from peft_suite.diffusion.backbones import backbones
from peft_suite.diffusion.data import DiffusionDataConfig, source
from peft_suite.diffusion.denoising import denoise, pack, unpack
from peft_suite.errors import BackboneMismatchError, ConfigError, FileFormatError, TrainingError
from peft_suite.train import RunConfig, open_adapter, run
from peft_suite.train.averaging import Average, decay_at
from peft_suite.train.loader import global_batches
from peft_suite.train.running import run_once
from peft_suite.train.state import read_checkpoint

RECIPE = {"epochs": 2, "batch_size": 2, "lr": 1e-3, "warmup_epochs": 0}
QUIET = {"pictures": 0, "encode_device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    tiny_pipeline(folder / "pipe")
    captioned(folder / "images")
    return folder


def config(place: Path, out: Path, data: dict | None = None, backbone: dict | None = None, **changes: Any) -> RunConfig:
    values = {
        "plugin": "diffusion",
        "backbone": {"name": str(place / "pipe"), **(backbone or {})},
        "data": {"root": str(place / "images"), **QUIET, **(data or {})},
        "method": "lora",
        "out": str(out),
        "device": "cpu",
        **changes,
    }
    return RunConfig.from_dict({**values, "recipe": {**RECIPE, **changes.get("recipe", {})}})


def micro(out: Path, **changes: Any) -> RunConfig:
    recipe = {**RECIPE, "batch_size": 8, **changes.pop("recipe", {})}
    data = {"root": "digits-shifted", "shots": 2, **QUIET, **changes.pop("data", {})}
    backbone = {"name": "micro-unet", "pretrained": False}
    values = {"plugin": "diffusion", "backbone": backbone, "data": data, "method": "lora", "device": "cpu"}
    return RunConfig.from_dict({**values, "recipe": recipe, "out": str(out), **changes})


def losses(result) -> list[float]:
    return [entry["train_loss"] for entry in result.history]


def loaded(facts: dict, **data: Any):
    return source.load(DiffusionDataConfig.from_dict({**QUIET, "val_fraction": 0.0, **data}), facts)


# ---- a whole run -------------------------------------------------------------------------------------------------


def test_train_save_merge_and_the_same_images_again(place, tmp_path):
    from diffusers import DiffusionPipeline

    data = {"pictures": 2, "picture_steps": 1, "random_flip": True}
    result = run(config(place, tmp_path / "run", data, recipe={"ema": 0.9}), progress=False)
    assert result.record["metric"] == "loss" and result.score == pytest.approx(result.metrics["loss"])
    moments = [(p["moment"], p["file"]) for p in result.record["pictures"]]
    assert moments == [("before", "pictures/before/samples.png"), ("after", "pictures/after/samples.png")]
    assert result.report.read_text().count("<figcaption>before</figcaption>") == 1

    opened = open_adapter(result.adapter)
    pipe = tiny_pipeline()
    base = draw(pipe)
    pipe.unet = opened.model
    trained = draw(pipe)
    assert np.abs(trained - base).max() > 1e-4
    ps.merge(opened.model)
    backbones.write_merged(opened, tmp_path / "merged")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    plain.set_progress_bar_config(disable=True)
    assert np.abs(draw(plain) - trained).max() < 1e-5
    assert not any("adapters" in name for name, _ in plain.unet.named_modules())
    again = open_adapter(tmp_path / "merged")
    assert again.merged and all(torch.equal(a, b) for a, b in zip(again.model.parameters(), plain.unet.parameters()))


class Killed(BaseException):
    """As sudden as SIGKILL: nothing is written any more."""


def kill(settings: RunConfig, at: int, monkeypatch) -> None:
    """Run until the training set is asked for its sample number ``at``."""
    from peft_suite.diffusion.drawing import Draws

    own, served = Draws.__getitem__, iter(range(10**6))

    def deadly(self, index):
        if self.train and next(served) == at:
            raise Killed
        return own(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "__getitem__", deadly)
        with pytest.raises(Killed):
            run_once(settings, progress=False)


def test_killed_and_resumed_is_the_same_run(tmp_path, monkeypatch):
    settings = {
        "recipe": {"epochs": 3, "ema": 0.95, "max_steps": 8},
        "data": {"noise_offset": 0.1, "random_flip": True},
    }
    whole = run_once(micro(tmp_path / "whole", **settings), progress=False)
    kill(micro(tmp_path / "killed", **settings), 30, monkeypatch)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    resumed = run_once(micro(tmp_path / "killed", **settings), resume=True, progress=False)
    assert losses(resumed) == losses(whole) and len(whole.history) == 3
    assert [h["step"] for h in resumed.history] == [3, 6, 8]
    assert resumed.metrics == whole.metrics
    files = [next(r.adapter.glob("*.safetensors")) for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def precise(place, out, method: str, precision: str, dtype: str = "float32") -> RunConfig:
    data = {"pictures": int(dtype != "float32"), "picture_steps": 1}
    recipe = {"precision": precision, "max_steps": 4}
    return config(place, out, data, {"options": {"dtype": dtype}}, method=method, recipe=recipe)


@pytest.mark.parametrize("method", ["sara(budget='2K')", "lora", "difffit"])
def test_bf16_stays_near_float32_and_saves_float32(place, tmp_path, method):
    plain = run_once(precise(place, tmp_path / "plain", method, "no"), progress=False)
    results = [run_once(precise(place, tmp_path / "autocast", method, "bf16"), progress=False)]
    sparse = pytest.warns(UserWarning, match="Chosen entries of bfloat16 weights")
    with sparse if method.startswith("sara") else contextlib.nullcontext():
        results.append(run_once(precise(place, tmp_path / "weights", method, "no", "bfloat16"), progress=False))
    assert len(results[1].record["pictures"]) == 2
    for result in results:
        assert losses(result) == pytest.approx(losses(plain), rel=3e-3) and losses(result) != losses(plain)
        assert result.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=3e-3)
        tensors = load_file(next(result.adapter.glob("*.safetensors")))
        assert {t.dtype for t in tensors.values()} <= {torch.float32, torch.int32}
        assert all(bool(t.isfinite().all()) for t in tensors.values())


@pytest.mark.parametrize("method", ["sara(budget='2K')"])  # it has state of its own beside the optimizer's
def test_bf16_resumes(place, tmp_path, monkeypatch, method):
    whole = run_once(precise(place, tmp_path / "whole", method, "bf16"), progress=False)
    killed = precise(place, tmp_path / "killed", method, "bf16")
    kill(killed, 7, monkeypatch)
    resumed = run_once(killed, resume=True, progress=False)
    assert losses(resumed) == losses(whole)
    files = [next(r.adapter.glob("*.safetensors")) for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapter_of_another_base_is_refused(place, tmp_path):
    from diffusers import UNet2DConditionModel

    result = run_once(config(place, tmp_path / "run", recipe={"epochs": 1}), progress=False)
    tiny_pipeline(tmp_path / "other", seed=1)
    other = UNet2DConditionModel.from_pretrained(tmp_path / "other" / "unet")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(BackboneMismatchError):
        ps.load(other, result.adapter)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    first = micro(tmp_path / "run", recipe={"lr": 1e25, "epochs": 4, "decay": "none"})
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf)"):
        run_once(first, progress=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


# ---- losses of the families, against the formulas of diffusers' scripts -------------------------------------------


@pytest.mark.parametrize("family", ["epsilon", "v_prediction", "sample"])
def test_loss_is_that_of_the_text_to_image_script(place, family):
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_snr

    unet = UNet2DConditionModel.from_pretrained(place / "pipe" / "unet")
    facts = backbones.preprocessing(
        "", backbones.build(str(place / "pipe"), 0, pretrained=True, checkpoint="", options={})
    )
    data = loaded(facts, root=str(place / "images"), prediction_type=family, snr_gamma=5.0)
    scheduler = DDPMScheduler.from_config(DDIMScheduler.from_pretrained(place / "pipe", subfolder="scheduler").config)
    plain = loaded(facts, root=str(place / "images"), prediction_type="epsilon")
    for i in range(3):
        x, y = data.train[i]
        noise = plain.train[i][1]["target"]  # the same draw
        t = x["timestep"][None]
        root = scheduler.alphas_cumprod[t] ** 0.5
        latents = ((x["sample"] - (1 - root**2) ** 0.5 * noise) / root)[None]
        assert torch.allclose(scheduler.add_noise(latents, noise[None], t)[0], x["sample"], atol=1e-5)
        goal = {
            "epsilon": noise[None],
            "v_prediction": scheduler.get_velocity(latents, noise[None], t),
            "sample": latents,
        }
        states = x["encoder_hidden_states"][None]
        with torch.no_grad():
            said = unet(x["sample"][None], t, states).sample
            wanted = functional.mse_loss(said, goal[family], reduction="none").mean((1, 2, 3))
            snr = compute_snr(scheduler, t)
            weights = torch.minimum(snr, torch.tensor(5.0))
            weights = weights / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[family]
            batch = {k: v[None] for k, v in x.items()}
            loss = data.task.loss(data.task.predict(unet, batch), {k: v[None] for k, v in y.items()})
        torch.testing.assert_close(loss, wanted * weights, rtol=2e-3, atol=1e-4)


def sd3_pipeline(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    encoders = []
    for _ in range(2):
        settings = tiny_text_encoder().config
        settings.projection_dim = 32
        encoders.append(CLIPTextModelWithProjection(settings).eval())
    vae = tiny_vae((8, 16), groups=2)
    vae.register_to_config(shift_factor=0.0609, scaling_factor=1.5305, sample_size=16)
    StableDiffusion3Pipeline(
        transformer=tiny_sd3(joint_attention_dim=64, pos_embed_max_size=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tiny_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def test_stable_diffusion_3_trains_by_flow_matching(place, tmp_path):
    sd3_pipeline(tmp_path / "pipe")
    settings = config(
        place, tmp_path / "run", {"resolution": 16}, {"name": str(tmp_path / "pipe")}, recipe={"max_steps": 1}
    )
    result = run_once(settings, progress=False)
    info = result.record["data"]["info"]
    assert (info["learns"], info["timesteps"], len(result.history)) == ("flow", "logit_normal", 1)

    model = backbones.build(str(tmp_path / "pipe"), 0, pretrained=True, checkpoint="", options={})
    data = loaded(backbones.preprocessing("", model), root=str(place / "images"), resolution=16, precondition=True)
    x, y = data.train[1]
    sigma = x["timestep"] / 1000
    clean = (x["sample"] - sigma * y["target"])[None]  # x_t = z + s (e - z)
    batch = {k: v[None] for k, v in x.items()}
    with torch.no_grad():
        said = model(
            hidden_states=batch["sample"],
            timestep=batch["timestep"],
            encoder_hidden_states=batch["encoder_hidden_states"],
            pooled_projections=batch["pooled_projections"],
        ).sample
        loss = data.task.loss(data.task.predict(model, batch), {k: v[None] for k, v in y.items()})
    wanted = (batch["sample"] - sigma * said - clean).square().mean()  # the script's preconditioned outputs
    torch.testing.assert_close(loss[0], wanted, rtol=1e-4, atol=1e-5)


def test_flux_is_called_with_packed_latents_and_positions():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    theirs = FluxPipeline._pack_latents(latents, 2, 1, 6, 4)
    assert torch.equal(pack(latents), theirs) and torch.equal(unpack(theirs, 6, 4), latents)
    torch.manual_seed(0)
    model = tiny_flux(guidance_embeds=True)
    inputs = {
        "sample": latents,
        "timestep": torch.tensor([100.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    with torch.no_grad():
        ours = denoise(model, "FluxTransformer2DModel", inputs)
        wanted = model(
            hidden_states=theirs,
            timestep=inputs["timestep"] / 1000,
            guidance=inputs["guidance"],
            pooled_projections=inputs["pooled_projections"],
            encoder_hidden_states=inputs["encoder_hidden_states"],
            txt_ids=torch.zeros(5, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 3, 2, "cpu", torch.float32),
        ).sample
    assert torch.equal(ours, unpack(wanted, 6, 4))


def test_predicted_variances_are_left_out_and_sdxl_gets_its_sizes():
    torch.manual_seed(0)
    dit = tiny_dit(out_channels=2)
    inputs = {
        "sample": torch.randn(3, 1, 8, 8),
        "timestep": torch.tensor([1, 2, 3]),
        "class_labels": torch.tensor([0, 4, 10]),
    }
    with torch.no_grad():
        whole = dit(inputs["sample"], timestep=inputs["timestep"], class_labels=inputs["class_labels"]).sample
        assert torch.equal(denoise(dit, "DiTTransformer2DModel", inputs), whole[:, :1])
    xl = tiny_unet(
        (8, 16),
        groups=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 900]),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "text_embeds": torch.randn(2, 16),
        "time_ids": torch.tensor([[36.0, 40, 0, 2, 32, 32]] * 2),
    }
    with torch.no_grad():
        first = denoise(xl, "UNet2DConditionModel", inputs)
        other = denoise(xl, "UNet2DConditionModel", {**inputs, "time_ids": inputs["time_ids"] * 4})
    assert first.shape == (2, 4, 8, 8) and not torch.allclose(first, other)


# ---- DreamBooth, textual inversion, buckets -----------------------------------------------------------------------


def test_prior_preservation_draws_class_images_and_adds_their_loss(place, tmp_path, capsys):
    prior = {
        "root": str(bare(tmp_path / "dog", 3)),
        "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "class_data_dir": str(tmp_path / "class"),
        "num_class_images": 2,
        "prior_steps": 1,
        "prior_weight": 0.5,
    }
    model = backbones.build(str(place / "pipe"), 0, pretrained=True, checkpoint="", options={})
    facts = backbones.preprocessing("", model)
    data = loaded(facts, **prior)
    assert sorted(p.name for p in (tmp_path / "class").iterdir()) == ["class-00000.png", "class-00001.png"]
    assert "Drawing 2 class images" in capsys.readouterr().err
    x, y = data.train[1]
    assert x["sample"].shape == (2, 4, 16, 16) and y["weight"].tolist() == [1.0, 0.5]
    batch, goal = {k: v[None] for k, v in x.items()}, {k: v[None] for k, v in y.items()}
    with torch.no_grad():
        loss = data.task.loss(data.task.predict(model, batch), goal)
        said = model(x["sample"], x["timestep"], x["encoder_hidden_states"]).sample
    halves = (said - y["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(loss[0], halves[0] + 0.5 * halves[1])
    assert not torch.equal(x["encoder_hidden_states"][0], x["encoder_hidden_states"][1])

    again = loaded(facts, **{**prior, "num_class_images": 3})
    assert "Drawing 1 class images" in capsys.readouterr().err and len(again.train) == 3
    result = run_once(
        config(place, tmp_path / "run", {**prior, "val_fraction": 0.34}, recipe={"max_steps": 1}), progress=False
    )
    assert result.record["data"]["info"]["class_images"] == 2


def test_textual_inversion_learns_a_word_through_the_frozen_unet(place, tmp_path):
    method = "textual-inversion(placeholder='<thing>', initializer='a', num_vectors=2)"
    settings = config(
        place,
        tmp_path / "run",
        {"root": str(bare(tmp_path / "thing", 3)), "val_fraction": 0.34},
        {"options": {"component": "text_encoder"}},
        method=method,
        recipe={"lr": 1e-2},
    )
    result = run_once(settings, progress=False)
    assert result.record["parameters"]["trainable"] == 2 * 32
    opened = open_adapter(result.adapter)
    rows = opened.model.get_input_embeddings().weight
    assert rows.shape[0] == 516
    ps.merge(opened.model)
    learned = opened.model.get_input_embeddings().weight
    plain = tiny_pipeline().text_encoder.get_input_embeddings().weight
    assert torch.equal(learned[:514], plain) and not torch.allclose(learned[514], learned[515])
    backbones.write_merged(opened, tmp_path / "merged")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    ids = pipe.tokenizer("a photo of <thing> <thing>_1").input_ids
    assert 514 in ids and 515 in ids and torch.equal(pipe.text_encoder.get_input_embeddings().weight, learned)


def test_buckets_keep_shapes_apart_and_train(place, tmp_path):
    folder = captioned(tmp_path / "wide", 8, ((32, 64), (40, 40), (64, 32)))
    settings = config(place, tmp_path / "run", {"root": str(folder), "buckets": True, "resolution": 32})
    result = run_once(settings, progress=False)
    assert len(result.history) == 2 and "40x24" in result.record["data"]["info"]["buckets"]
    groups = ["a", "b", "a", "c", "a", "b", "a"]
    for epoch in range(3):
        batches = global_batches(7, 2, seed=1, epoch=epoch, groups=groups)
        assert sorted(i for b in batches for i in b) == list(range(7)) and len(batches) == 4
        assert all(len({groups[i] for i in b}) == 1 for b in batches)


# ---- the loop ----------------------------------------------------------------------------------------------------


def test_average_is_that_of_diffusers():
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    carrier = torch.nn.Module()
    carrier.adapters = torch.nn.ModuleDict({"default": model})
    ours, theirs = Average(carrier, ["default"], 0.3), EMAModel(model.parameters(), decay=0.3)
    for step in range(1, 9):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ours.update()
        theirs.step(model.parameters())
        assert decay_at(step, 0.3) == pytest.approx(theirs.cur_decay_value)
        for mine, wanted in zip(ours.values.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, wanted)
    live = model.weight.detach().clone()
    with ours.in_place():
        assert torch.equal(model.weight, ours.values["default/weight"]) and not torch.equal(model.weight, live)
    assert torch.equal(model.weight, live)


def test_lowest_loss_is_best_and_pictures_leave_training_alone(tmp_path):
    own = {"epochs": 3, "lr": 3e-3, "patience": 1}
    plain = run_once(micro(tmp_path / "a", recipe=own, data={"shots": 1}), progress=False)
    values = [h["val"]["loss"] for h in plain.history]
    assert len(values) == 3 and values == sorted(values, reverse=True), "a falling loss is no reason to stop"
    assert plain.record["best"]["epoch"] == 2
    drawn = micro(
        tmp_path / "b", recipe={**own, "sample_every": 2}, data={"shots": 1, "pictures": 10, "picture_steps": 1}
    )
    drawn = run_once(drawn, progress=False)
    assert losses(drawn) == losses(plain)
    assert [p["moment"] for p in drawn.record["pictures"]] == ["before", "epoch 2", "after"]
    still = run_once(micro(tmp_path / "c", recipe={**own, "lr": 0.0}, data={"shots": 1}), progress=False)
    assert len(still.history) == 2 and still.record["best"]["epoch"] == 0


def test_gradient_checkpointing_changes_nothing_but_memory(place, tmp_path):
    plain = run_once(config(place, tmp_path / "a", recipe={"max_steps": 2}), progress=False)
    spared = run_once(
        config(place, tmp_path / "b", backbone={"options": {"gradient_checkpointing": True}}, recipe={"max_steps": 2}),
        progress=False,
    )
    assert losses(plain) == pytest.approx(losses(spared), rel=1e-6)


def test_weights_of_one_file_in_a_folder_of_everything_else(place, tmp_path):
    from safetensors.torch import save_file

    unet = tiny_pipeline(seed=3).unet
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    file = str(tmp_path / "unet.safetensors")
    model = backbones.build(str(place / "pipe"), 0, pretrained=True, checkpoint=file, options={})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unet.parameters(), strict=True))
    result = run_once(
        config(place, tmp_path / "run", backbone={"checkpoint": file}, recipe={"max_steps": 1}), progress=False
    )
    opened = open_adapter(result.adapter)
    ps.merge(opened.model)
    backbones.write_merged(opened, tmp_path / "merged")
    merged = open_adapter(tmp_path / "merged").model
    assert torch.equal(merged.conv_in.weight, unet.conv_in.weight)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(FileFormatError, match=r"bad.safetensors cannot be read"):
        backbones.build(
            str(place / "pipe"), 0, pretrained=True, checkpoint=str(tmp_path / "bad.safetensors"), options={}
        )
    with pytest.raises(FileFormatError, match=r"bad.safetensors cannot be read as a checkpoint"):
        backbones.build(str(tmp_path / "bad.safetensors"), 0, pretrained=True, checkpoint="", options={})


def test_eight_bit_moments_train_and_resume(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    own = {
        "method": "sara(budget='100K', progressive=0.5, reset_state=True)",
        "recipe": {"optimizer": "bitsandbytes.optim:AdamW8bit", "lr": 1e-2},
    }
    usual = {**own, "recipe": {**own["recipe"], "optimizer": "adamw"}}
    plain = run_once(micro(tmp_path / "plain", **usual), progress=False)
    whole = run_once(micro(tmp_path / "whole", **own), progress=False)
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-2) and losses(whole) != losses(plain)
    state = read_checkpoint(tmp_path / "whole" / "checkpoint" / "state.safetensors")["optimizer"]["state"]
    inner = [part for s in state.values() for part in s.values() if isinstance(part, dict)]  # wrapped for FSDP
    assert any(part["state1"].dtype == torch.uint8 for part in inner)
    kill(micro(tmp_path / "killed", **own), 28, monkeypatch)
    resumed = run_once(micro(tmp_path / "killed", **own), resume=True, progress=False)
    assert losses(resumed) == losses(whole)
    files = [next(r.adapter.glob("*.safetensors")) for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_settings_without_meaning_are_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="no meaning for denoising"):
        run_once(micro(tmp_path / "a", recipe={"class_weights": "balanced"}), progress=False)
    with pytest.raises(ConfigError, match=r"no 'compnent'.*Did you mean 'component'"):
        run_once(config(place, tmp_path / "b", backbone={"options": {"compnent": "unet"}}), progress=False)
    with pytest.raises(ConfigError, match="nothing is downloaded by itself"):
        backbones.build("somebody/some-model", 0, pretrained=True, checkpoint="", options={})
    with pytest.raises(FileFormatError, match="no diffusers pipeline"):
        backbones.build(str(place / "images"), 0, pretrained=True, checkpoint="", options={})
    with pytest.raises(ConfigError, match="predicts nothing"):
        source.inputs(["x.png"], {})


def test_script_with_the_one_changed_line(place, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "docs" / "examples" / "diffusion_script.py"
    assert script.read_text().count("ps.adapt(") == 1
    words = [str(place / "pipe"), str(bare(tmp_path / "dog", 2)), "--prompt", "a photo of sks dog", "--steps", "3"]
    words += [
        "--method",
        "sara(budget='1K')",
        "--resolution",
        "32",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(script), run_name="__main__")
    assert "step 2: loss" in capsys.readouterr().out and (tmp_path / "out" / "sample.png").is_file()
    unet = tiny_pipeline().unet
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    ps.load(unet, tmp_path / "out")
    ps.merge(unet)
    moved = sum(int((v != before[k]).sum()) for k, v in unet.state_dict().items())
    assert 0 < moved <= 1010, "only selected weights differ"


def test_flags_of_other_tools_set_fields(place, tmp_path, monkeypatch, capsys):
    from peft_suite.cli.app import main

    words = [
        "--instance-prompt",
        "5: a photo",
        "--resolution",
        "16",
        "--max-train-steps",
        "7",
        "--gradient-checkpointing",
    ]
    words += ["--component", "unet", "--data", str(bare(tmp_path / "dog", 2)), "--backbone", str(place / "pipe")]
    monkeypatch.setattr("sys.argv", ["peft-suite", "diffusion", "train", "--method", "lora", "--dry-run", *words])
    with contextlib.suppress(SystemExit):
        main()
    said = yaml.safe_load(capsys.readouterr().out.partition("plugin: ")[2].join(("plugin: ", "")))
    assert said["data"] == {"instance_prompt": "5: a photo", "resolution": 16, "root": str(tmp_path / "dog")}
    assert said["recipe"]["max_steps"] == 7
    assert said["backbone"]["options"] == {"component": "unet", "gradient_checkpointing": True}


def test_unconditional_models_train_on_a_bare_folder(place, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=8,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    settings = config(
        place,
        tmp_path / "run",
        {"root": str(bare(tmp_path / "images", 3)), "pictures": 2, "picture_steps": 1},
        {"name": str(tmp_path / "pipe")},
        recipe={"max_steps": 1},
    )
    result = run_once(settings, progress=False)
    facts = result.record["data"]["info"]["preprocessing"]
    assert (facts["kind"], facts["size"], facts["channels"], facts["factor"]) == ("unconditional", 8, 3, 1)
    assert len(result.record["pictures"]) == 2


def test_stable_diffusion_xl_reads_sizes_and_two_encoders(place, tmp_path):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    second = tiny_text_encoder().config
    second.projection_dim = 16
    unet = tiny_sdxl_unet()
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae((8, 16), groups=2),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    pipe.save_pretrained(tmp_path / "pipe")
    model = backbones.build(str(tmp_path / "pipe"), 0, pretrained=True, checkpoint="", options={})
    data = loaded(backbones.preprocessing("", model), root=str(place / "images"))
    x, y = data.train[2]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt("picture number 2", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(x["encoder_hidden_states"], states[0])
    torch.testing.assert_close(x["text_embeds"], pooled[0])
    assert x["time_ids"].tolist() == [36, 40, 0, 2, 32, 32], "original size, corner of the crop, target size"
    loss = data.task.loss(
        data.task.predict(model, {k: v[None] for k, v in x.items()}), {k: v[None] for k, v in y.items()}
    )
    assert torch.isfinite(loss).all()
