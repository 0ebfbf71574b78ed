"""Published audio checkpoints: key lists typed from their description, broken files, and round trips."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import audio_keys as keys
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.audio.anatomies.ast import spectrograms
from peft_suite.audio.backbones import EMBEDDED, PUBLISHED, backbones
from peft_suite.audio.checkpoints import convert, load, to_transformers
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.audio.positions import adapt_positions
from peft_suite.errors import (
    AdapterError,
    BackboneMismatchError,
    ConfigError,
    FileFormatError,
    PeftSuiteError,
    UnknownNameError,
    UnsupportedError,
)

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = {**SIZES, "num_mel_bins": 32, "max_length": 46}  # 2 x 4 patches


def build(
    name: str = "ast-base", checkpoint: object = "", classes: int = keys.CLASSES, **options: Any
) -> AudioClassifier:
    path = str(checkpoint)
    return backbones.build(name, classes, pretrained=False, checkpoint=path, options={**TINY, **options}).eval()


def write(path: Path, rows: list[Any], **changes: Tensor) -> tuple[str, dict[str, Tensor]]:
    state = {**keys.filled(rows), **changes}
    torch.save(state, path)
    return str(path), state


def held(model: AudioClassifier) -> dict[str, Tensor]:
    """The model's values under transformers 5's names."""
    names = {"norm.": "classifier.layernorm.", "head.": "classifier.dense."}
    found = {}
    for key, value in model.state_dict().items():
        new = key.removeprefix("encoder.")
        for old, name in names.items():
            new = name + new.removeprefix(old) if key.startswith(old) else new
        found[new] = value
    return found


def assert_taken(model: AudioClassifier, rows: list[Any], state: dict[str, Tensor], skip: tuple[str, ...] = ()) -> None:
    own = held(model)
    for key, name, _ in rows:
        if name is None or name.startswith(skip or ("-",)):
            continue
        if ".qkv." in name:
            for role, value in zip("qkv", state[key].split(keys.WIDTH), strict=True):
                assert torch.equal(own[name.replace("qkv", f"{role}_proj")], value), key
        else:
            assert torch.equal(own[name], state[key]), key


def test_original_file(tmp_path: Path) -> None:
    rows = keys.original(8)
    path, state = write(tmp_path / "audioset_10_10_0.4593.pth", rows)
    model = build(pool="tokens", head="norm")
    report = load(model, path)
    assert_taken(model, rows, state)
    assert report.missing == () and report.reshaped == () and report.positions == "as they are"
    assert set(report.unexpected) == {f"v.{h}.{n}" for h in ("head", "head_dist") for n in ("weight", "bias")}
    eps = {m.eps for m in model.encoder.modules() if isinstance(m, nn.LayerNorm)}
    assert eps == {1e-6} and model.norm.eps == 1e-5


def test_transformers_4_file_and_what_5_writes(tmp_path: Path) -> None:
    rows = keys.transformers_4(8)
    path, state = write(tmp_path / "model.bin", rows)
    model = build(pool="tokens", head="norm")
    assert load(model, path).unexpected == ()
    assert_taken(model, rows, state)
    config = transformers.ASTConfig(**TINY, num_labels=keys.CLASSES)
    theirs = transformers.ASTForAudioClassification(config).eval()
    theirs.load_state_dict(to_transformers(state))
    theirs.save_pretrained(tmp_path / "hub")
    names = {k for k, _, _ in rows}
    from safetensors import safe_open

    with safe_open(tmp_path / "hub" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names, "transformers 5 still writes the older names"
    again = build(checkpoint=tmp_path / "hub", pool="tokens", head="norm")
    x = spectrograms()
    with torch.no_grad():
        torch.testing.assert_close(again(x), theirs(x).logits, atol=1e-5, rtol=0)
    assert again.norm.eps == 1e-12


def test_original_file_through_transformers_gives_the_same(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "a.pth", keys.original(8))
    ours = build(checkpoint=path, pool="tokens", head="norm")
    theirs = transformers.ASTForAudioClassification(transformers.ASTConfig(**TINY, num_labels=keys.CLASSES))
    load(theirs, path)
    theirs.save_pretrained(tmp_path / "hf")
    again = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "hf").eval()
    x = spectrograms()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, ours(x), atol=5e-5, rtol=0)
        bare = transformers.ASTModel.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(bare(x).last_hidden_state, ours.forward_features(x), atol=1e-5, rtol=0)


def test_ssast_reads_its_grid_and_drops_its_task(tmp_path: Path) -> None:
    size = {"module.p_input_fdim": torch.tensor(32), "module.p_input_tdim": torch.tensor(160)}
    rows = keys.ssast(2 * 10)
    path, state = write(tmp_path / "SSAST-Base-Patch-400.pth", rows, **size)
    model = build("ssast-base")  # 2 x 2 patches without overlap
    report = load(model, path)
    assert report.positions == "2 x 10 to 2 x 2"
    wanted = adapt_positions(state["module.v.pos_embed"], (2, 10), (2, 2))
    assert torch.equal(held(model)["embeddings.position_embeddings"], wanted)
    assert {"p_input_fdim", "mask_embed", "cpredlayer.0.weight", "gpredlayer.2.bias"} <= set(report.unexpected)
    overlapping = build("ssast-base", frequency_stride=10, time_stride=10)
    assert load(overlapping, path).positions == "2 x 10 to 2 x 4"


def test_ssast_frame_patches(tmp_path: Path) -> None:
    size = {"module.p_input_fdim": torch.tensor(128), "module.p_input_tdim": torch.tensor(60)}
    rows = keys.ssast(30, (128, 2))
    path, state = write(tmp_path / "frame.pth", rows, **size)
    model = build("ssast-base-frame", path, num_mel_bins=128, max_length=40)
    assert_taken(model, rows, state, ("embeddings.position",))
    assert model.forward_features(torch.randn(2, 40, 128)).shape == (2, 2 + 20, 24)
    with pytest.raises(BackboneMismatchError, match=r"patch_size \(128, 2\).*has patch_size 16"):
        load(build(), path)


def test_deit_colours_are_summed(tmp_path: Path) -> None:
    rows = keys.deit(4)
    path, state = write(tmp_path / "deit.pth", rows)
    torch.save({"model": state}, path)
    model = build()
    report = load(model, path)
    assert report.layout == "DeiT" and report.positions == "4 x 4 to 2 x 4"
    kernel = held(model)["embeddings.patch_embeddings.projection.weight"]
    torch.testing.assert_close(kernel, state["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert_taken(model, rows, state, ("embeddings.pos", "embeddings.patch_embeddings.projection.weight"))


def test_positions_of_other_lengths(tmp_path: Path) -> None:
    path, state = write(tmp_path / "a.pth", keys.original(2 * 4))
    for frames, columns in ((46, 4), (26, 2), (96, 9)):
        model = build(checkpoint=path, max_length=frames)
        got = held(model)["embeddings.position_embeddings"]
        assert torch.equal(got, adapt_positions(state["module.v.pos_embed"], (2, 4), (2, columns)))
        assert model(torch.randn(2, frames, 32)).shape == (2, keys.CLASSES)
    zeros = build(checkpoint=path, max_length=96, pos_embed="zeros")
    assert not held(zeros)["embeddings.position_embeddings"].any()
    with pytest.raises(ConfigError, match="pos_embed = 'random'"):
        build(checkpoint=path, pos_embed="random")


def test_positions_that_fit_no_rows(tmp_path: Path) -> None:
    path, state = write(tmp_path / "a.pth", keys.original(7))
    with pytest.raises(BackboneMismatchError, match="positions of 7 patches"):
        build(checkpoint=path)
    model = build(checkpoint=path, position_grid=[1, 7])
    wanted = adapt_positions(state["module.v.pos_embed"], (1, 7), (2, 4))
    assert torch.equal(held(model)["embeddings.position_embeddings"], wanted)


def test_folder_tells_sizes_grid_and_statistics(tmp_path: Path) -> None:
    config = transformers.ASTConfig(**{**TINY, "max_length": 66}, frequency_stride=16, time_stride=16, num_labels=3)
    transformers.ASTForAudioClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"mean": -6.5, "std": 5.25, "max_length": 66}))
    model = backbones.build("ast-base", 5, pretrained=False, checkpoint=str(tmp_path), options={"max_length": 50})
    assert model.encoder.config.hidden_size == 24 and model.encoder.config.frequency_stride == 16
    told = backbones.preprocessing("ast-base", model)
    assert (told["frames"], told["mel_bins"], told["mean"], told["std"]) == (50, 32, -6.5, 5.25)
    assert model(torch.randn(1, 50, 32)).shape == (1, 5)


def test_heads(tmp_path: Path) -> None:
    path, _ = write(tmp_path / "a.pth", keys.original(8))
    linear = load(build(), path)  # ours has no norm before the head
    assert {"classifier.layernorm.weight", "classifier.dense.weight"} <= set(linear.unexpected)
    assert set(linear.missing) == {"classifier.dense.weight", "classifier.dense.bias"}
    other = load(build(classes=9, head="norm"), path)
    assert set(other.reshaped) == {"classifier.dense.weight", "classifier.dense.bias"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 36}, "hidden_size 24.*hidden_size 36.*with backbone.options.hidden_size=24"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2.*has num_hidden_layers 3"),
        ({"num_hidden_layers": 1}, "keys unknown to the model.*layers.1"),
        ({"intermediate_size": 96}, "intermediate_size 48"),
        ({"patch_size": 8}, "patch_size 16.*has patch_size 8"),
    ],
)
def test_another_network_is_refused_before_anything_changes(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path, _ = write(tmp_path / "a.pth", keys.original(8))
    model = build(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BackboneMismatchError, match=words):
        load(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    state = keys.filled(keys.original(8))
    gone = ["module.v.norm.bias", "module.v.dist_token"]
    torch.save({k: v for k, v in state.items() if k not in gone}, tmp_path / "a.pth")
    with pytest.raises(BackboneMismatchError, match="class token alone") as caught:
        load(build(), str(tmp_path / "a.pth"))
    assert "layernorm.bias" in str(caught.value) and "embeddings.distillation_token" in str(caught.value)


def test_broken_files(tmp_path: Path) -> None:
    path, state = write(tmp_path / "whole.pth", keys.original(8))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(Path(path).read_bytes()[:2000])
    listed = tmp_path / "list.pth"
    torch.save([1, 2], listed)
    code = tmp_path / "code.pth"
    torch.save({"v.cls_token": os.system}, code)
    (tmp_path / "empty").mkdir()
    for broken in (cut, listed, code, tmp_path / "absent.pth", tmp_path / "empty"):
        with pytest.raises(FileFormatError, match=broken.name):
            load(build(), str(broken))
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileFormatError, match="type 'bert'"):
        load(build(), str(folder))


def test_unused_keys_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = write(tmp_path / "a.pth", keys.original(8))
    with caplog.at_level(logging.INFO, "peft_suite"):
        build(checkpoint=path)
    for key in ("v.head_dist.weight", "classifier.dense.bias"):
        assert key in caplog.text


def test_names_of_the_study() -> None:
    wanted = {
        "model.embeddings.cls_token": "embeddings.cls_token",
        "model.encoder.layer.1.attention.attention.value.bias": "layers.1.attention.v_proj.bias",
        "model.layernorm.weight": "layernorm.weight",
        "classification_head.bias": "classifier.dense.bias",
    }
    assert list(convert(dict.fromkeys(wanted, torch.zeros(3))).state) == list(wanted.values())


def test_save_and_load_of_ours(tmp_path: Path) -> None:
    x = spectrograms()
    for options in ({}, {"pool": "tokens", "head": "norm", "train_norm": False}):
        model = build(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path / options.get("pool", "mean")
        model.save_pretrained(folder)
        again = AudioClassifier.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
            assert torch.equal(transformers.ASTModel.from_pretrained(folder).eval()(x)[0], model.forward_features(x))
        assert (again.pool.kind, again.train_norm) == (model.pool.kind, model.train_norm)
    with pytest.raises(FileFormatError, match="holds no AudioClassifier"):
        AudioClassifier.from_pretrained(tmp_path)


def test_save_after_merging(tmp_path: Path) -> None:
    x, model = spectrograms(), build()
    ps.adapt(model, "lora(rank=2)")
    with torch.no_grad():
        for parameter in model.adapters["default"].parameters():  # type: ignore[union-attr,index]
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(AdapterError, match="merge"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    wanted = model(x).detach()
    ps.merge(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AudioClassifier.from_pretrained(tmp_path)(x), wanted, atol=1e-5, rtol=0)


def test_save_and_load_of_frame_patches(tmp_path: Path) -> None:
    model, x = build("ssast-base-frame", num_mel_bins=128, max_length=40), torch.randn(2, 40, 128)
    model.save_pretrained(tmp_path)
    assert torch.equal(AudioClassifier.from_pretrained(tmp_path)(x), model(x))


def test_plain_state_dict_of_ours(tmp_path: Path) -> None:
    model = build(head="norm")
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = build(head="norm")
    report = load(again, str(tmp_path / "ours.safetensors"))
    assert (report.layout, report.missing, report.unexpected) == ("AudioClassifier", (), ())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("ast-base", "wav2vec2-base"):
        with pytest.raises(PeftSuiteError, match=r"cannot be fetched.*checkpoint=PATH"):
            backbones.build(name, 5, pretrained=True, checkpoint="", options={})


def test_wav2vec2_folder(tmp_path: Path) -> None:
    from peft_suite.audio.anatomies.wav2vec2 import tiny, waveforms

    encoder = tiny()
    encoder.save_pretrained(tmp_path)
    model = backbones.build("wav2vec2-base", 4, pretrained=False, checkpoint=str(tmp_path), options={}).eval()
    x = waveforms()
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), encoder(x).last_hidden_state)
    assert backbones.preprocessing("wav2vec2-base", model)["input"] == "waveform"
    with pytest.raises(FileFormatError, match="is not a folder"):
        backbones.build(
            "wav2vec2-base", 4, pretrained=False, checkpoint=str(tmp_path / "model.safetensors"), options={}
        )


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_listed_parameters_are_counted(name: str) -> None:
    with torch.device("meta"):
        model = backbones.build(name, 50, pretrained=False, checkpoint="", options={})
    assert sum(p.numel() for p in model.encoder.parameters()) == PUBLISHED[name].parameters
    (info,) = backbones.list(name)
    assert info.parameters == PUBLISHED[name].parameters


def test_parameters_of_the_published_sizes() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        assert count(transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527))) == 86_594_063
        for frames, encoder in ((1024, 86_187_264), (500, 85_708_032)):
            options = {"max_length": frames}
            model = backbones.build("ast-base", 50, pretrained=False, checkpoint="", options=options)
            assert count(model.encoder) == encoder
            assert count(model) == encoder + 769 * 50
        tokens = {frames: 2 + 12 * ((frames - 16) // 10 + 1) for frames in (1024, 512, 500, 400, 128, 100, 800)}
    assert list(tokens.values()) == [1214, 602, 590, 470, 146, 110, 950]


def test_bad_requests() -> None:
    with pytest.raises(UnknownNameError, match="ast-base"):
        build("ast-bse")
    with pytest.raises(UnsupportedError, match="checkpoint=PATH"):
        backbones.build("ssast-base", 5, pretrained=True, checkpoint="", options={})
    with pytest.raises(ConfigError, match="does not know the options hidden"):
        build(hidden=3)
    with pytest.raises(ConfigError, match="num_attention_heads = 5"):
        build(num_attention_heads=5)
    with pytest.raises(ConfigError, match="max_length = 10 is less than one patch"):
        build(max_length=10)
    with pytest.raises(ConfigError, match="pool = 'max'"):
        build(pool="max")
    assert [info.name for info in backbones.list("ast-base*")] == [n for n in PUBLISHED if n.startswith("ast-base")]
    assert {info.name for info in backbones.list()} == {*PUBLISHED, *EMBEDDED}
