"""A small task for the tests of the training loop: tiny ViT, textures to tell apart, and a plugin of it all."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import Dataset

import peft_suite as ps
from peft_suite.train import BackboneInfo, DataConfig, DataSplits, Recipe, RunConfig, fit

CLASSES = ("stripes", "dots", "grid", "waves")


class Textures(Dataset):
    """Noise plus one of four textures of 8x8 pixels. Augmentation depends on (epoch, index) only."""

    def __init__(self, size: int, seed: int, multi_label: bool = False, augment: bool = False) -> None:
        tiles = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(99)).repeat(1, 1, 4, 4)
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(0, 4, (size,), generator=generator)
        self.images = torch.randn(size, 3, 32, 32, generator=generator) + 0.3 * tiles[self.targets]
        if multi_label:
            self.targets = torch.nn.functional.one_hot(self.targets, 4).float()
            self.targets[:, 0] = self.targets[:, 1:3].amax(dim=1)  # a second label that follows from the first
        self.augment, self.epoch = augment, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image = self.images[index]
        if self.augment:
            generator = torch.Generator().manual_seed(self.epoch * 100_003 + index)
            image = image + 0.1 * torch.randn(image.shape, generator=generator)
        target = self.targets[index]
        return image, target if target.ndim else int(target)


def splits(train: int = 90, val: int = 37, test: int = 41, multi_label: bool = False) -> DataSplits:
    return DataSplits(
        Textures(train, 1, multi_label, augment=True),
        Textures(val, 2, multi_label) if val else None,
        Textures(test, 3, multi_label) if test else None,
        CLASSES,
        fingerprint=f"textures-{train}-{val}-{test}",
        multi_label=multi_label,
        thumbnail=lambda dataset, index: b"\x89PNG-of-" + str(index).encode(),
    )


def backbone(seed: int = 0, dropout: float = 0.1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=4,
        proj_drop_rate=dropout,
    )


def adapted(method: str = "lora", seed: int = 0, dropout: float = 0.1) -> torch.nn.Module:
    return ps.adapt(backbone(seed, dropout), method)


RECIPE = Recipe(epochs=4, batch_size=16, lr=5e-3, warmup_epochs=0.5)


class TinyBackbones:
    def list(self, pattern: str = "*") -> list[BackboneInfo]:
        return [BackboneInfo("micro", "timm-vit")]

    def build(self, name: str, num_outputs: int, **options: Any) -> torch.nn.Module:
        return backbone(int(torch.initial_seed() % 1000), dropout=0.1)

    def preprocessing(self, name: str, model: torch.nn.Module) -> dict[str, Any]:
        return {"input_size": [3, 32, 32]}


class TextureData:
    config = DataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        return CLASSES, False

    def load(self, config: DataConfig, preprocessing: dict[str, Any]) -> DataSplits:
        if config.root == "broken":
            raise ps_errors().DataError("There is no image under 'broken'.")
        return splits()


def ps_errors() -> Any:
    import peft_suite.errors

    return peft_suite.errors


backbones, data = TinyBackbones(), TextureData()


def register_textures() -> None:
    plugin = ps.Plugin("textures", "test", backbones="train_material:backbones", data="train_material:data")
    with contextlib.suppress(ps_errors().PluginError):  # already there
        ps.register(plugin)


def run_config(out: Path, **changes: Any) -> RunConfig:
    return RunConfig("textures", method="lora", recipe=RECIPE, out=str(out), device="cpu").replace(**changes)


def main() -> None:
    """``python train_material.py OUT '{"recipe": {...}, "method": "lora", "resume": false, "kill": 3}'``."""
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    material, kill = splits(), options.get("kill", -1)
    if kill >= 0:
        import os
        import signal

        number = options.get("signal", signal.SIGKILL)
        served = iter(range(10**9))

        class Deadly(Textures):
            def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
                if next(served) == kill:
                    os.kill(os.getpid(), number)
                return super().__getitem__(index)

        material.train = Deadly(90, 1, augment=True)
    model = adapted(options.get("method", "lora"), dropout=options.get("dropout", 0.1))
    recipe = RECIPE.replace(**options.get("recipe", {}))
    fit(model, material, recipe, out=out, seed=5, resume=options.get("resume", False), device="cpu")


if __name__ == "__main__":
    main()
