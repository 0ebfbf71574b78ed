"""Bad input to the core: a typed error that says what to do, and nothing changed, nothing lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import peft_suite as ps
from peft_suite.errors import (
    AdapterError,
    AdapterNameError,
    BackboneError,
    BackboneMismatchError,
    ConfigError,
    FileFormatError,
    MergeError,
    PeftSuiteError,
    StorageError,
    UnknownNameError,
    UnsupportedError,
)
from peft_suite.files import CARD, CONFIG, TENSORS
from peft_suite.testing.case import assert_unchanged, seeded, settle, snapshot
from peft_suite.vision.anatomies.timm_vit import example, example_deit


@pytest.fixture
def vit() -> nn.Module:
    return _vit()


@pytest.fixture
def saved(tmp_path: Path, vit: nn.Module) -> Path:
    """A LoRA adapter of the same backbone."""
    return ps.save(ps.adapt(vit, "lora(rank=2)"), tmp_path / "adapter")


def _vit(seed: int = 0) -> nn.Module:
    with seeded(seed):
        model, _ = example()
        settle(model)
    return model


@contextmanager
def refused(model: nn.Module | None, kind: type[PeftSuiteError], *said: str) -> Iterator[None]:
    """The block raises ``kind`` with all of ``said`` in the message, and the model is as before."""
    before = None if model is None else snapshot(model)
    with pytest.raises(PeftSuiteError) as caught:
        yield
    assert type(caught.value) is kind, repr(caught.value)
    for part in said:
        assert part in str(caught.value)
    if model is not None and before is not None:
        assert_unchanged(model, before, "a refused operation")


@pytest.mark.parametrize("verb", [ps.adapt, ps.plan])
@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        ("lorra", UnknownNameError, ("'lorra'", "Did you mean 'lora'?", "bitfit", "peft-suite methods")),
        ({"name": "adaptfromer"}, UnknownNameError, ("Did you mean 'adaptformer'?",)),
        ("lora(rnak=2)", ConfigError, ("LoRAConfig has no field 'rnak'", "Did you mean 'rank'?")),
        ({"name": "lora", "rank": "two"}, ConfigError, ("LoRAConfig.rank = 'two'", "int", "8")),
        ("lora(rank=True)", ConfigError, ("rank = True",)),
        ("lora(rank=0)", ConfigError, ("rank = 0", "at least 1")),
        ("lora(dora=True, dropout=0.1)", ConfigError, ("dropout = 0.1", "dora")),
        ("lora(init=zero)", ConfigError, ("init = 'zero'", "'lora'", "'official'")),
        ("vpt(num_tokens=5", ConfigError, ("Cannot read method", "vpt(num_tokens=50, deep=True)")),
        ("vpt(5)", ConfigError, ("Cannot read method",)),
        ("vpt(num_tokens=__import__('os'))", ConfigError, ("only literals",)),
        ({"rank": 2}, ConfigError, ("'name'", "rank")),
        (7, ConfigError, ("int",)),
        ("lora(targets=[q, w])", UnsupportedError, ("'w'", "blocks.0", "fc1")),
        ("lora(targets=['blocks.*.nothing'])", UnsupportedError, ("matches no Linear or Conv2d", "blocks.0.attn.qkv")),
        ("vpt(deep=True, first_block=7)", UnsupportedError, ("timm-vit has 2",)),
    ],
)
def test_methods_that_cannot_be_read_or_carried(vit: nn.Module, verb: Any, method: Any, kind: Any, said: Any) -> None:
    with refused(vit, kind, *said):
        verb(vit, method)
    ps.adapt(vit, "linear")
    with refused(vit, kind, *said):
        verb(vit, method) if verb is ps.plan else verb(vit, method, name="second")


def test_a_backbone_without_a_head_has_no_linear_probe() -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    with refused(model, UnsupportedError, "linear trains the head", "num_classes > 0"):
        ps.adapt(model, "linear")


def test_a_model_that_nobody_describes() -> None:
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    model = Stranger()
    for act in (lambda: ps.adapt(model, "lora"), lambda: ps.plan(model, "lora")):
        with refused(model, BackboneError, "Stranger", "transformers-vit", "anatomy="):
            act()


def test_an_attribute_called_adapters_that_is_not_ours(vit: nn.Module) -> None:
    vit.adapters = nn.ModuleDict({"other": nn.Linear(1, 1)})
    with refused(vit, AdapterError, "'adapters'", "ModuleDict"):
        ps.adapt(vit, "lora")


def test_names(vit: nn.Module, saved: Path) -> None:
    """Taken and impossible names; names of nothing."""
    with refused(vit, AdapterNameError, "already has an adapter named 'default'", "another name", "remove("):
        ps.adapt(vit, "ssf")
    with refused(vit, AdapterNameError, "already has an adapter named 'default'"):
        ps.load(vit, saved)
    for name in ("", "a.b", "1st", "train", "forward", "state_dict", "with space"):
        with refused(vit, AdapterNameError, repr(name)):
            ps.adapt(vit, "ssf", name=name)
        with refused(vit, AdapterNameError):
            ps.load(vit, saved, name=name or "-")
    with refused(vit, AdapterNameError, "'defualt'", "Did you mean 'default'?"):
        ps.activate(vit, "defualt")
    with refused(vit, UnknownNameError, "'defualt'", "Did you mean 'default'?"):
        ps.save(vit, saved, "defualt")
    ps.adapt(vit, "ssf", name="second")
    ps.activate(vit)
    with refused(vit, AdapterNameError, "default, second", "name="):
        ps.save(vit, saved)


@pytest.mark.parametrize("verb", [ps.activate, ps.trainable, ps.remove])
def test_verbs_without_an_adapter(vit: nn.Module, verb: Any) -> None:
    with refused(vit, AdapterError, "carries no adapter", "adapt(model, method)"):
        verb(vit)


def test_saving_and_disabling_without_an_adapter(vit: nn.Module, tmp_path: Path) -> None:
    with refused(vit, AdapterError, "carries no adapter"):
        ps.save(vit, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with refused(vit, AdapterError, "carries no adapter"), ps.disabled(vit):
        pass


@pytest.mark.parametrize("method", ["adaptformer(bottleneck=2)", "vpt(num_tokens=2)", "houlsby"])
def test_merging_what_does_not_fold(vit: nn.Module, method: str) -> None:
    ps.adapt(vit, method)
    with refused(
        vit, MergeError, "cannot be folded", "blocks.0" if method != "vpt(num_tokens=2)" else "vpt", "partial=True"
    ):
        ps.merge(vit)


def test_merging_beside_an_inactive_adapter(vit: nn.Module) -> None:
    ps.adapt(ps.adapt(vit, "ssf"), "lora", name="second")
    with refused(vit, MergeError, "'default'", "remove()", "activate()"):
        ps.merge(vit)


def test_another_backbone(saved: Path) -> None:
    """Other weights, another number of classes, another width, another member of the family."""
    import timm

    with refused(other := _vit(seed=1), BackboneMismatchError, "VisionTransformer", "weights", 'check="shapes"'):
        ps.load(other, saved)
    ps.load(other, saved, check="shapes")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    for change in ({"num_classes": 6}, {"embed_dim": 32}, {"depth": 1}, {"depth": 3}, {"img_size": 48}):
        model = timm.create_model("vit_tiny_patch16_224", **{**sizes, **change})
        with refused(model, BackboneMismatchError, "VisionTransformer"):
            ps.load(model, saved, check="shapes")
    deit, _ = example_deit()
    with refused(deit, BackboneMismatchError, "VisionTransformerDistilled"):
        ps.load(deit, saved)


def test_broken_tensor_files(saved: Path) -> None:
    """Truncated at any point, overwritten, empty, missing; the config alone or the tensors alone."""
    whole = (saved / TENSORS).read_bytes()
    flipped = bytes([whole[0] ^ 0xFF]) + whole[1:]
    for content in (whole[:4], whole[: len(whole) // 2], whole[:-1], b"", b"PK\x03\x04" + whole, flipped):
        (saved / TENSORS).write_bytes(content)
        with refused(model := _vit(), FileFormatError, TENSORS, "truncated or corrupted"):
            ps.load(model, saved)
        with refused(None, FileFormatError, TENSORS):
            ps.read_config(saved)
    (saved / TENSORS).unlink()
    with refused(model := _vit(), FileFormatError, TENSORS):
        ps.load(model, saved)
    (saved / TENSORS).write_bytes(whole)
    (saved / CONFIG).unlink()
    with refused(model, FileFormatError, CONFIG):
        ps.load(model, saved)
    with refused(model, FileFormatError, "nowhere"):
        ps.load(model, saved / "nowhere")


def test_a_flipped_bit_among_the_values(saved: Path) -> None:
    """The lengths are right and the header reads; still these are not the values that were saved."""
    content = bytearray((saved / TENSORS).read_bytes())
    content[-5] ^= 0x40
    (saved / TENSORS).write_bytes(content)
    with refused(model := _vit(), FileFormatError, TENSORS, "corrupted"):
        ps.load(model, saved)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not readable JSON"),
        ('{"method": "lora"', "not readable JSON"),
        ("[1, 2]", "'method'"),
        ('{"architectures": ["ViT"]}', "'method'"),
        ('{"peft_type": "LORA", "r": 4}', "import_peft"),
    ],
)
def test_foreign_json(saved: Path, text: str, said: str) -> None:
    (saved / CONFIG).write_text(text)
    with refused(model := _vit(), FileFormatError, CONFIG, said):
        ps.load(model, saved)


def test_tensors_of_somebody_else(saved: Path) -> None:
    save_file({"weight": torch.zeros(2)}, saved / TENSORS, metadata={"format": "pt"})
    with refused(model := _vit(), FileFormatError, "not written by peft-suite", "import_peft"):
        ps.load(model, saved)


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of the header; None takes a key out."""
    with safe_open(folder / TENSORS, framework="pt") as opened:
        header = json.loads(opened.metadata()["peft_suite"]) | changes
        values = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    header = {k: v for k, v in header.items() if v is not None}
    save_file(values, folder / TENSORS, metadata={"peft_suite": json.dumps(header)})


@pytest.mark.parametrize("key", ["method", "method_config", "backbone", "parts", "batchnorm", "adapter_name"])
def test_a_header_that_lacks_a_key(saved: Path, key: str) -> None:
    """Each missing piece is an error of the family, never a KeyError."""
    _rewrite(saved, **{key: None})
    before = snapshot(model := _vit())
    with pytest.raises(FileFormatError, match=TENSORS):
        ps.load(model, saved)
    assert_unchanged(model, before, "a header without " + key)


def test_an_unknown_method_names_its_package(saved: Path) -> None:
    _rewrite(saved, method="wonder", provided_by="wonder-adapters")
    with refused(model := _vit(), UnknownNameError, "'wonder'", "'wonder-adapters'", "pip install wonder-adapters"):
        ps.load(model, saved)
    assert ps.read_config(saved)["method"] == "wonder"


def test_a_config_with_impossible_values(saved: Path) -> None:
    _rewrite(saved, method_config={"rank": "many"})
    with refused(model := _vit(), ConfigError, "rank = 'many'"):
        ps.load(model, saved)


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_files(
    saved: Path, vit: nn.Module, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whichever step fails, the files of the earlier save are whole, no scrap is left, and they still load."""
    old = {f.name: f.read_bytes() for f in saved.iterdir()}
    with torch.no_grad():
        for parameter in vit.adapters["default"].parameters():  # type: ignore[index,union-attr]
            parameter.add_(1.0)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if when == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, {"write": "write_bytes", "replace": "replace"}[when], full)
        with refused(vit, StorageError, TENSORS, "No space left on device", "intact"):
            ps.save(vit, saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == old
    ps.load(_vit(), saved)


def test_a_real_limit_on_file_size(saved: Path, vit: nn.Module) -> None:
    """The same through the operating system: a file may not grow beyond 2 KiB."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    old = {f.name: f.read_bytes() for f in saved.iterdir()}
    handler, limits = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with refused(vit, StorageError, TENSORS, "intact"):
            ps.save(vit, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == old


def test_a_save_that_breaks_between_files_is_noticed_or_harmless(
    saved: Path, vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors go first and decide: with the new tensors and the old JSON the directory loads as the new adapter."""
    with torch.no_grad():
        for parameter in vit.adapters["default"].parameters():  # type: ignore[index,union-attr]
            parameter.add_(1.0)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with refused(vit, StorageError, CONFIG):
        ps.save(vit, saved)
    monkeypatch.undo()
    assert {f.name for f in saved.iterdir()} == {CONFIG, TENSORS, CARD}
    fresh = ps.load(_vit(), saved)
    new, found = (m.adapters["default"].state_dict() for m in (vit, fresh))  # type: ignore[index,union-attr]
    assert all(torch.equal(new[k], found[k]) for k in new)


def test_a_folder_that_is_a_file(vit: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    ps.adapt(vit, "ssf")
    with refused(vit, StorageError, "taken"):
        ps.save(vit, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_metadata_that_is_not_json(vit: nn.Module, tmp_path: Path) -> None:
    ps.adapt(vit, "ssf")
    before = snapshot(vit)
    with pytest.raises((PeftSuiteError, TypeError)):
        ps.save(vit, tmp_path / "x", metadata={"model": vit})
    assert_unchanged(vit, before, "a refused save")
    assert not (tmp_path / "x" / TENSORS).exists()
