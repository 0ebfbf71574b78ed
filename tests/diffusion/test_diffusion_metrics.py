"""Metrics of generated images: against other libraries, against closed forms, and against published numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusion_parts as made
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

pytest.importorskip("diffusers")

from peft_suite.cli.app import build
from peft_suite.diffusion import judge, metrics, micro, networks
from peft_suite.errors import ConfigError, DataError, FileFormatError


def cli(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(build(), ["diffusion", *map(str, words)])
    assert result.exit_code == code, (words, result.output, result.exception)
    return result


def features(count: int, width: int = 6, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw) @ torch.randn(width, width, generator=draw)


def pictures(count: int, seed: int = 0, side: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), generator=draw, dtype=torch.uint8)


# ---- distances -------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_the_textbook_formula() -> None:
    from scipy.linalg import sqrtm

    real, made_up = features(50, 12).double(), features(40, 12, seed=1).double() ** 2
    first, second = np.cov(real.T.numpy()), np.cov(made_up.T.numpy())
    expected = np.square(real.mean(0).numpy() - made_up.mean(0).numpy()).sum()
    expected += np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert metrics.frechet(real, made_up) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_known_cases() -> None:
    x = features(200)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(6.0)
    assert metrics.frechet(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    assert metrics.frechet(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * float(x.var(0).sum()), rel=1e-5)
    few = features(4)  # fewer images than values: singular covariances
    assert metrics.frechet(few, few + shift) == pytest.approx(float(shift.square().sum()), rel=1e-4)


def test_kid_is_the_mean_over_pairs_of_different_images() -> None:
    x, y = features(9).double(), features(9, seed=1).double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 6 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = [kernel(s[i], s[j]) for s in (x, y) for i, j in pairs if i != j]
    expected = 2 * np.mean(within) - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs])
    value, deviation = metrics.kid(x, y)
    assert value == pytest.approx(expected, rel=1e-9) and deviation == 0
    draw = torch.Generator().manual_seed(0)
    same = [metrics.kid(*torch.randn(2, 50, 4, generator=draw))[0] for _ in range(20)]
    assert min(same) < 0 < max(same)  # unbiased: two samples of one distribution fall on both sides
    first = metrics.kid(features(60), features(40, seed=1), subsets=5, size=20)
    assert first == metrics.kid(features(60), features(40, seed=1), subsets=5, size=20) and first[1] > 0


@pytest.mark.parametrize(
    ("real", "made_up", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least 2 images"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "one network"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "not finite"),
    ],
)
def test_distances_refuse(real: Tensor, made_up: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        metrics.frechet(real, made_up)


# ---- VLHI ------------------------------------------------------------------------------------------------------------

# SaRA, Table 1, Stable Diffusion 1.5, means over five data sets: FID, CLIP, VLHI of LoRA, AdaptFormer, LT-SFT and SaRA
# at 50, 20 and 5 million, and of full fine-tuning
PUBLISHED = (
    (150.74, 27.96, 1.45),
    (148.77, 27.97, 1.52),
    (151.58, 28.00, 1.44),
    (146.62, 27.06, 1.18),
    (150.24, 27.39, 1.21),
    (156.88, 27.67, 1.13),
    (150.18, 25.76, 0.49),
    (155.48, 25.99, 0.42),
    (165.72, 26.37, 0.27),
    (134.96, 27.08, 1.55),
    (136.92, 27.53, 1.69),
    (147.80, 27.73, 1.44),
    (133.69, 26.42, 1.30),
)


def test_vlhi_is_the_published_one() -> None:
    distances, scores, expected = zip(*PUBLISHED, strict=True)
    assert metrics.vlhi(distances, scores) == pytest.approx(expected, abs=0.011)


@pytest.mark.parametrize(
    ("distances", "scores", "words"),
    [
        ((1.0, 1.0), (2.0, 3.0), "not defined"),
        ((1.0, 2.0), (3.0, 3.0), "not defined"),
        ((1.0,), (2.0,), "at least 2"),
        ((1.0, 2.0), (2.0, math.nan), "not a finite number"),
    ],
)
def test_vlhi_is_not_always_defined(distances: tuple[float, ...], scores: tuple[float, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        metrics.vlhi(distances, scores)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memorisation_tells_copies_from_new_ones() -> None:
    train, held, new = features(80), features(60, seed=1), features(50, seed=2)
    copies = metrics.memorisation(train[:50], train, held)
    assert copies["images"] == 60
    assert copies["nearer"] > 0.85 and copies["ratio"] < 0.5  # 60 of the 80 are looked at
    assert metrics.memorisation(train[:50], train[:60], held)["train"] < 1e-6
    fresh = metrics.memorisation(new, new.flip(0), new.roll(1, 0))
    assert fresh["nearer"] == 0.5 and fresh["images"] == 50
    distance, row = metrics.nearest(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 7.0]]))
    assert distance.tolist() == [3.0] and row.tolist() == [0]


def test_tile_distance_is_the_largest_of_the_tiles() -> None:
    a, b = pictures(2), pictures(3, seed=1)
    expected = torch.zeros(2, 3)
    for i in range(2):
        for j in range(3):
            change = (a[i].float() - b[j].float()) / 255
            tiles = [change[r : r + 2, c : c + 2].norm() for r in range(0, 8, 2) for c in range(0, 8, 2)]
            expected[i, j] = max(tiles)
    torch.testing.assert_close(metrics.tile_distance(a, b), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="one size"):
        metrics.tile_distance(a, pictures(2, side=12))
    with pytest.raises(DataError, match="that 4 divides"):
        metrics.tile_distance(pictures(1, side=10), pictures(1, side=10))


def test_copies_and_memorised_prompts() -> None:
    train = pictures(4)
    near = (train[:1].int() + 2).clamp(0, 255).to(torch.uint8)
    images = torch.cat([near, train[:1], near.flip(3), pictures(2, seed=1)])
    assert metrics.copied(images, train, threshold=0.1) == pytest.approx(2 / 5)
    found = metrics.remembered(torch.cat([near, train[:1], near, pictures(2, seed=1)]), train, threshold=0.1)
    assert found == {"group": 3, "memorised": True, "extracted": True}
    found = metrics.remembered(torch.cat([near, near, near]), pictures(3, seed=2), threshold=0.1)
    assert found == {"group": 3, "memorised": True, "extracted": False}
    assert metrics.remembered(images, threshold=0.1) == {"group": 2, "memorised": False}
    with pytest.raises(ConfigError, match="takes every image for a copy"):
        metrics.copied(images, train)  # 20 is more than a tile of 2 x 2 pixels can differ


def test_groups_are_connected_not_complete() -> None:
    steps = torch.arange(0, 100, 20, dtype=torch.uint8)[:, None, None, None].expand(5, 8, 8, 3)
    assert metrics.remembered(steps, threshold=0.3)["group"] == 5  # neighbours are 0.27 apart, the ends 1.1


def test_conditional_norm_is_the_change_by_the_condition() -> None:
    model = micro.build()
    inputs = {"sample": torch.randn(3, 1, 8, 8), "timestep": torch.tensor([10, 500, 900])}
    bound = {**inputs, "class_labels": torch.tensor([1, 2, micro.NULL])}
    norms = metrics.conditional_norms(model, "UNet2DModel", bound, {"class_labels": torch.full((3,), micro.NULL)})
    with torch.no_grad():
        first = model(bound["sample"], bound["timestep"], class_labels=bound["class_labels"]).sample
        second = model(bound["sample"], bound["timestep"], class_labels=torch.full((3,), micro.NULL)).sample
    torch.testing.assert_close(norms, (first - second).flatten(1).norm(dim=1))
    assert norms[0] > 0 and norms[2] == 0
    assert metrics.conditional_norms(model, "UNet2DModel", bound).tolist() == [0, 0, 0]  # no condition, no memory of it
    scores = metrics.norm_scores([torch.tensor([1.0, 3.0]), torch.tensor([5.0])])
    assert scores == {"max_norm": 4.0, "avg_norm": 3.5}
    with pytest.raises(DataError, match="no batch"):
        metrics.norm_scores([])


# ---- networks --------------------------------------------------------------------------------------------------------


def bars(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Upright and lying bars at random places."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        place = rng.integers(0, 8)
        image[(slice(None), place) if label else (place, slice(None))] = 220
    return torch.from_numpy(images), torch.from_numpy(labels)


def test_judge_learns_and_comes_back_from_its_file(tmp_path: Path) -> None:
    said: list[float] = []
    options: dict[str, Any] = {"classes": 2, "width": 4, "epochs": 4, "batch": 20}
    judged = judge.fit(*bars(200), **options, each=lambda _, loss: said.append(loss))
    assert judge.accuracy(judged, *bars(60, seed=1)) > 0.9 and said[-1] < said[0]
    assert torch.equal(judged.features(bars(9)[0]), judge.fit(*bars(200), **options).features(bars(9)[0]))
    judge.save_judge(judged, tmp_path / "judge.safetensors")
    network = networks.network_of(str(tmp_path / "judge.safetensors"))
    torch.testing.assert_close(network.features(bars(9)[0], batch_size=4), judged.features(bars(9)[0]))
    assert network.facts()["network"] == "judge"
    with pytest.raises(DataError, match="takes uint8 images"):
        judged(bars(3)[0].float())
    (tmp_path / "broken.safetensors").write_bytes(b"12345678nothing")
    with pytest.raises(DataError, match="holds no judge"):
        networks.network_of(str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inception:", "weights-inception-2015-12-05"),
        ("inception:/no/such.pth", "nothing is downloaded"),
        ("clip:/no/such/folder", "hf download openai/clip-vit-large-patch14"),
        ("judge.safetensors", "no such file"),
    ],
)
def test_what_is_not_here_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        networks.network_of(text)


def test_damaged_inception_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(FileFormatError, match="holds no Inception weights"):
        networks.network_of(f"inception:{tmp_path / 'weights.pth'}")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {"vocab_size": made.WORDS, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text |= {"num_hidden_layers": 1, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), made.tiny_tokenizer()).save_pretrained(folder)
    return folder


def test_clip_score_is_a_hundred_times_the_cosine(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images, texts = pictures(3, side=20), ["a dog", "two red cubes", "rain"]
    found, facts = networks.clip_score(images, texts, str(clip_folder), side=0, batch_size=2)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    given = processor(text=texts, images=list(images.numpy()), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**given).logits_per_image / model.logit_scale.exp()
    assert found == pytest.approx(100 * float(logits.diagonal().mean()), abs=1e-3)
    assert "transformers" in facts["library"]
    with pytest.raises(DataError, match="one text per image"):
        networks.clip_score(images, texts[:2], str(clip_folder))
    assert networks.network_of(f"clip:{clip_folder}").features(images).shape == (3, 8)


# ---- the verb --------------------------------------------------------------------------------------------------------


def folder_of(images: Tensor, path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze(-1).numpy()).save(path / f"{i:04d}.png")
    if rows:
        named = [{"file": f"{i:04d}.png", **row} for i, row in enumerate(rows)]
        (path / "images.json").write_text(json.dumps({"images": named}))
    return path


def test_verb_measures_and_says_how(tmp_path: Path, clip_folder: Path) -> None:
    (train, labels), judged = bars(40), judge.fit(*bars(200), classes=2, width=4, epochs=4, batch=20)
    judge.save_judge(judged, tmp_path / "judge.safetensors")
    rows = [{"class": int(label), "text": "a bar"} for label in labels]
    folders = [folder_of(train, tmp_path / "made", rows), folder_of(bars(30, seed=1)[0], tmp_path / "real")]
    folders.append(folder_of(train, tmp_path / "train"))
    Image.new("L", (90, 90)).save(tmp_path / "made" / "grid.png")
    words = (
        "--train",
        folders[2],
        "--features",
        tmp_path / "judge.safetensors",
        "--threshold",
        0.5,
        "--clip",
        clip_folder,
    )
    told = json.loads(cli("metrics", *folders[:2], *words, "--out", tmp_path / "m.json", "--json").stdout)
    assert told == json.loads((tmp_path / "m.json").read_text())
    assert (told["generated"], told["real"], told["copied"]) == (40, 30, 1.0)
    assert (
        told["nearest_train"] < told["nearest_held_out"]
        and told["class_accuracy"] == judge.accuracy(judged, train, labels) > 0.8
    )
    assert -100 <= told["clip_score"] <= 100 and told["resize"] == "none" and "not resized" in told["read_as"]
    plain = json.loads(cli("metrics", *folders[:2], "--size", 4, "--resize", "box", "--json").stdout)
    assert plain["network"] == "pixels" and plain["read_as"] == "4x4, box resize"
    whole = metrics.frechet(
        *(f.reshape(-1, 4, 2, 4, 2).float().mean((2, 4)).round().flatten(1) / 255 for f in (bars(30, seed=1)[0], train))
    )
    assert plain["frechet_distance"] == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--threshold", "1"), "Give --train FOLDER"),
        (("--clip", "x"), "no text for every image"),
        (("--resize", "bicubik"), "Did you mean 'bicubic'"),
        (("--out", "m.txt"), "must end in .json"),
    ],
)
def test_verb_refuses(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    folders = [folder_of(pictures(3, seed), tmp_path / str(seed)) for seed in (0, 1)]
    assert told in " ".join(cli("metrics", *folders, *words, code=1).output.split())


def test_verb_refuses_folders(tmp_path: Path) -> None:
    good, empty, mixed = folder_of(pictures(3), tmp_path / "good"), tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    folder_of(pictures(2), mixed)
    Image.new("RGB", (5, 7)).save(mixed / "odd.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    for other, told in (
        (empty, "has no images"),
        (mixed, "one size with --size"),
        (tmp_path / "bad", "is no image"),
        (tmp_path / "none", "is no folder"),
    ):
        assert told in " ".join(cli("metrics", good, other, code=1).output.split())
