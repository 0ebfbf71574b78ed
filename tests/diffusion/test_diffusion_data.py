"""Layouts, captions, images, caches and what is refused, without training."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_data import bare, captioned, write_image
from diffusion_parts import tiny_pipeline, tiny_scheduler
from PIL import Image

from peft_suite.diffusion import micro
from peft_suite.diffusion.backbones import backbones
from peft_suite.diffusion.buckets import bucket_of, bucket_sizes
from peft_suite.diffusion.caching import TensorCache, fingerprint
from peft_suite.diffusion.data import DiffusionDataConfig, source
from peft_suite.diffusion.images import as_channels, fit, open_image
from peft_suite.errors import ConfigError, DataError, FileFormatError, UnknownNameError

QUIET = {"pictures": 0, "encode_device": "cpu"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipe")
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def facts(pipe) -> dict:
    model = backbones.build(str(pipe), 0, pretrained=True, checkpoint="", options={})
    return backbones.preprocessing(str(pipe), model)


@pytest.fixture
def small() -> dict:
    """Facts of the micro UNet, which needs no pipeline."""
    return {**micro.preprocessing(), "model": "UNet2DModel", "factor": 1}


def load(facts: dict, root: Path | str, **data: Any):
    return source.load(DiffusionDataConfig.from_dict({**QUIET, "val_fraction": 0.0, "root": str(root), **data}), facts)


# ---- what a pipeline says of itself ------------------------------------------------------------------------------


def test_facts_of_a_pipeline(pipe, facts):
    assert (facts["component"], facts["kind"], facts["model"]) == ("unet", "text", "UNet2DConditionModel")
    assert (facts["size"], facts["channels"], facts["latent_channels"], facts["factor"]) == (32, 3, 4, 2)
    assert facts["scheduler"]["_class_name"] == "DDIMScheduler"
    assert json.loads(json.dumps(facts)) == facts
    text = backbones.build(str(pipe), 0, pretrained=True, checkpoint="", options={"component": "text_encoder"})
    told = backbones.preprocessing("", text)
    assert (told["component"], told["denoiser"], told["model"]) == ("text_encoder", "unet", "UNet2DConditionModel")
    with pytest.raises(UnknownNameError, match=r"component 'transformer'.*text_encoder, unet"):
        backbones.build(str(pipe), 0, pretrained=True, checkpoint="", options={"component": "transformer"})
    fresh = backbones.build("pipeline", 0, pretrained=False, checkpoint=str(pipe), options={"dtype": "bfloat16"})
    assert type(fresh) is type(backbones.build(str(pipe), 0, pretrained=True, checkpoint="", options={}))


def test_a_tokenizer_without_vocabulary_is_refused(pipe, facts, tmp_path):
    import shutil

    shutil.copytree(pipe, tmp_path / "pipe")
    for file in (tmp_path / "pipe" / "tokenizer").glob("*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    from transformers import CLIPTokenizer

    CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]).save_pretrained(
        tmp_path / "pipe" / "tokenizer"
    )
    with pytest.raises(FileFormatError, match=r"knows 2 tokens and cannot tell texts apart"):
        load({**facts, "pipeline": str(tmp_path / "pipe")}, captioned(tmp_path / "images", 2))


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_captions_of_jsonl_csv_and_lists(facts, tmp_path):
    folder = captioned(tmp_path / "a", 3)
    data = load(facts, folder)
    assert [s.captions for s in data.train.samples] == [(f"picture number {i}",) for i in range(3)]
    assert source.classes(DiffusionDataConfig(root=str(folder))) == ((), False)
    states = [data.train[i][0]["encoder_hidden_states"] for i in range(3)]
    assert states[0].shape == (77, 32) and not torch.equal(states[0], states[1])

    folder = bare(tmp_path / "b", 2)
    (folder / "metadata.csv").write_text('file_name,what\n0.png,"one, two"\n1.png,three\n')
    data = load(facts, folder, caption_column="what")
    assert [s.captions for s in data.train.samples] == [("one, two",), ("three",)]

    rows = [{"file_name": f"{i}.png", "text": ["first", "second"]} for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(facts, folder)
    drawn = set()
    for epoch in range(8):
        data.train.set_epoch(epoch)
        drawn.add(float(data.train[0][0]["encoder_hidden_states"].sum()))
    assert len(drawn) == 2, "each draw takes one of the captions"


def test_missing_captions_and_images(facts, tmp_path):
    folder = bare(tmp_path / "a", 3)
    with pytest.raises(DataError, match=r"3 of 3 images have no caption, first '0.png'.*data.instance_prompt"):
        load(facts, folder)
    rows = [
        {"file_name": "0.png", "text": "a"},
        {"file_name": "1.png", "text": ""},
        {"file_name": "9.png", "text": "b"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    with pytest.raises(DataError, match=r"1 of 2 images have no caption, first '1.png'"):
        load(facts, folder)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"lists 1 of 3 images that do not exist: 9.png"):
        load(facts, folder, instance_prompt="a thing")
    assert len(load(facts, folder, skip_bad=True).train) == 1
    with pytest.raises(DataError, match=r"no column 'caption'. Did you mean|no column 'caption'. Valid choices: text"):
        load(facts, folder, caption_column="caption")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": oops\n')
    with pytest.raises(DataError, match=r"line 2 is no JSON"):
        load(facts, folder)
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'a'"):
        load(facts, tmp_path / "aa")


def test_class_folders_tar_files_and_labels(small, tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "d" / split / name / f"{i}.png", i, (12, 8))
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for file in sorted((tmp_path / "d").rglob("*.png")):
            archive.add(file, file.relative_to(tmp_path / "d").as_posix())
    folder, packed = load(small, tmp_path / "d", val_fraction=0.25), load(small, tmp_path / "d.tar", val_fraction=0.25)
    assert folder.classes == packed.classes == ("cat", "dog")
    for split, size in (("train", 6), ("val", 2), ("test", 4)):
        one, two = getattr(folder, split), getattr(packed, split)
        assert len(one.samples) == len(two.samples) == size
        assert [s.name for s in one.samples] == [s.name for s in two.samples]
        assert torch.equal(one[0][0]["sample"], two[0][0]["sample"])
    assert folder.train[0][0]["sample"].shape == (1, 8, 8)
    some = load(small, tmp_path / "d", only=["dog"], labels=[7], condition_dropout=0.0)
    assert some.classes == ("dog",) and {int(some.train[i][0]["class_labels"]) for i in range(4)} == {7}
    with pytest.raises(DataError, match="labels up to 10, and the model knows 0 to 9"):
        load(small, tmp_path / "d", labels=[0, 10])
    with pytest.raises(DataError, match="no classes, and this model draws by class"):
        load(small, bare(tmp_path / "bare", 2))
    dropped = load(small, tmp_path / "d", condition_dropout=1.0)
    assert int(dropped.train[0][0]["class_labels"]) == 10 != int(dropped.test[0][0]["class_labels"])


def test_class_folders_become_captions(facts, tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "d" / name / "0.png")
    data = load(facts, tmp_path / "d", instance_prompt="a photo of a {}")
    texts = data.train.condition
    assert [texts.captions(s) for s in data.train.samples] == [("a photo of a cat",), ("a photo of a dog",)]


# ---- images ------------------------------------------------------------------------------------------------------


def test_pixels_crop_orientation_and_channels(tmp_path):
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    view = fit(Image.fromarray(pixels), (4, 4), 3)
    assert np.array_equal(view.pixels, pixels[1:5]) and (view.original, view.corner) == ((6, 4), (1, 0))
    last = fit(Image.fromarray(pixels), (4, 4), 3, crop=(0.999, 0.0))
    assert np.array_equal(last.pixels, pixels[2:6])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.array(open_image(tmp_path / "x.png")), np.rot90(pixels, -1))
    clear = Image.fromarray(np.zeros((2, 2, 4), np.uint8))
    assert np.array(as_channels(clear, 3)).min() == 255, "what is transparent becomes white"
    deep = Image.fromarray(np.full((2, 2), 65535, np.uint16))
    assert np.array(as_channels(deep, 1)).min() == 255
    with pytest.raises(DataError, match="reads 4 channels"):
        as_channels(clear, 4)


def test_unusable_images_resolutions_and_schedulers(facts, small, tmp_path):
    folder = bare(tmp_path / "a", 3)
    (folder / "1.png").write_bytes(b"\x89PNG and nothing else")
    with pytest.raises(DataError, match=r"'1.png' \(is no image\)"):
        load(facts, folder, instance_prompt="x")
    data = load(facts, folder, instance_prompt="x", skip_bad=True)
    assert len(data.train) == 2 and data.info["skipped_files"][0]["name"] == "1.png"
    (folder / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match=r"notes.txt' is no image"):
        load(facts, folder, instance_prompt="x")
    (folder / "notes.txt").unlink()
    with pytest.raises(ConfigError, match=r"resolution = 30: must be a multiple of 4"):
        load(facts, folder, instance_prompt="x", skip_bad=True, resolution=30)
    with pytest.raises(DataError, match="images of 4 channels"):
        load({**facts, "channels": 4}, folder, instance_prompt="x", skip_bad=True)
    odd = {
        **facts,
        "scheduler": {**tiny_scheduler().config, "_class_name": "DDIMScheduler", "prediction_type": "noise"},
    }
    with pytest.raises(UnknownNameError, match="prediction type of DDIMScheduler 'noise'"):
        load(odd, folder, instance_prompt="x", skip_bad=True)
    with pytest.warns(UserWarning, match="smaller than they are shown"):
        load(facts, folder, instance_prompt="x", skip_bad=True, resolution=64)
    with pytest.raises(ConfigError, match="for flow matching"):
        load(small, "digits-shifted", density="mode")


# ---- draws, latents, caches --------------------------------------------------------------------------------------


def test_draws_depend_on_seed_epoch_and_index_alone(small):
    one, two = (load(small, "digits-shifted", shots=2, noise_offset=0.1, input_perturbation=0.1) for _ in range(2))
    for epoch in (3, 0):
        for data in (one, two):
            data.train.set_epoch(epoch)
        for i in (7, 1):
            for a, b in zip(one.train[i], two.train[i], strict=True):
                assert all(torch.equal(a[k], b[k]) for k in a)
    first = one.train[1][0]
    one.train.set_epoch(1)
    assert not torch.equal(one.train[1][0]["sample"], first["sample"])
    times = sorted(int(one.val[i][0]["timestep"]) for i in range(len(one.val)))
    gaps = np.diff([0, *times, 1000])
    assert len(one.val) == 80 and max(gaps) < 40, "validation covers all noise levels evenly"
    one.val.set_epoch(5)


def test_latents_are_drawn_from_the_kept_distribution(facts, pipe, tmp_path):
    from diffusers import AutoencoderKL

    folder = captioned(tmp_path / "images", 2)
    vae = AutoencoderKL.from_pretrained(pipe, subfolder="vae")
    data = load(facts, folder, random_flip=True, cache=str(tmp_path / "cache"))
    reader = data.train.clean.__self__
    pixels = torch.from_numpy(reader.pixels(0)).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(pixels[None]).latent_dist
    torch.testing.assert_close(reader.clean(0, None).values, wanted.mean[0] * vae.config.scaling_factor)
    kept = torch.from_numpy(reader.kept[0])
    assert kept.shape == (2, 8, 16, 16), "the image and its mirror, mean and spread"
    torch.testing.assert_close(kept[0, 4:], wanted.std[0])
    draws = [reader.clean(0, torch.Generator().manual_seed(s)).values for s in range(4)]
    assert not torch.equal(draws[0], draws[1])

    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2 + 3, "two images; two captions and the empty one"
    again = load(facts, folder, random_flip=True, cache=str(tmp_path / "cache"))
    assert again.train.clean.__self__.store.made == 0
    lazily = load(facts, folder, random_flip=True, cache_mib=0)
    assert lazily.train.clean.__self__.kept is None
    for other in (again, lazily):
        for a, b in zip(data.train[1], other.train[1], strict=True):
            assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    files[0].write_bytes(b"damaged")
    load(facts, folder, random_flip=True, cache=str(tmp_path / "cache"))
    assert files[0].stat().st_size > 7


def test_random_crops_differ_and_validation_does_not(facts, tmp_path):
    folder = captioned(tmp_path / "images", 4)
    data = load(facts, folder, center_crop=False, resolution=16, val_fraction=0.25)
    reader = data.train.clean.__self__
    views = [reader.clean(0, torch.Generator().manual_seed(s)).size for s in range(6)]
    assert len({v[2:4] for v in views}) > 1 and data.val.clean.__self__.clean(0, None).size[4:] == (16, 16)
    first, second = data.val[0][0]["sample"], data.val[0][0]["sample"]
    assert torch.equal(first, second)


def test_cache_keys_tell_settings_and_weights_apart(tmp_path):
    one, two = TensorCache(tmp_path, {"a": 1}), TensorCache(tmp_path, {"a": 2})
    assert one.place(b"x") != two.place(b"x") != two.place(b"y")
    assert TensorCache("", {}).get(b"x", lambda: {"v": torch.ones(2)})["v"].sum() == 2
    torch.manual_seed(0)
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(a) != fingerprint(b) and fingerprint(a, b) != fingerprint(a)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)


def test_bucket_sizes():
    sizes = bucket_sizes(512, 64, 2.0)
    assert (512, 512) in sizes and (704, 320) not in sizes and (384, 640) in sizes
    assert all(h * w <= 512 * 512 and not h % 64 and not w % 64 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert bucket_of(1000, 1000, sizes) == (512, 512)
    tall, wide = bucket_of(1500, 1000, sizes), bucket_of(1000, 1500, sizes)
    assert tall == wide[::-1] and tall[0] > tall[1]


def test_pictures_of_files_in_memory_are_found(small):
    data = load(small, "digits-shifted", shots=1)
    png = data.thumbnail(data.train, 3)
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (96, 96)
    assert data.sample_name(data.train, 3).startswith("train/")
