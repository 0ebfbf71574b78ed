"""How good generated images are, and how much of them is remembered, from features ``[N, D]`` or pixels.

Fréchet distance and KID of any feature network, VLHI, nearest neighbours, the tile rule, and the conditional norm.
Everything here is a pure function; the networks are in :mod:`peft_suite.diffusion.networks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.diffusion.denoising import denoise
from peft_suite.errors import ConfigError, DataError

__all__ = [
    "check_tiles",
    "conditional_norms",
    "copied",
    "frechet",
    "kid",
    "memorisation",
    "nearest",
    "norm_scores",
    "remembered",
    "tile_distance",
    "vlhi",
]

TILES = 4  # the tile rule compares 4 x 4 tiles
NEAR = 20.0  # largest L2 distance of a tile, pixels between 0 and 1
MEMBERS = 3  # of a group of near-identical images that makes a prompt count as memorised


def frechet(real: Tensor, made: Tensor) -> float:
    """``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`` of the Gaussians fitted to ``[N, D]`` and ``[M, D]``.

    In double precision; the trace of the root comes from the eigenvalues of ``S^(1/2) S' S^(1/2)``, which is symmetric.
    Source: Heusel et al., NeurIPS 2017. With few images the value is too high by an amount that depends on their
    number: compare only equal numbers.

    Raises:
        DataError: fewer than two images on a side, or features of different networks.
    """
    real, made = _checked(real), _checked(made)
    if real.shape[1] != made.shape[1]:
        raise DataError(f"Features of {real.shape[1]} and {made.shape[1]} values: use one network for both sides.")
    first, second = torch.cov(real.T).reshape(2 * real.shape[1:]), torch.cov(made.T).reshape(2 * made.shape[1:])
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (real.mean(0) - made.mean(0)).square().sum() + first.trace() + second.trace() - 2 * middle
    return max(0.0, float(distance))


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise DataError(
            f"A distance of distributions needs at least 2 images on each side, got {list(features.shape)}."
        )
    if not bool(features.isfinite().all()):
        raise DataError("The features are not finite: the images or the network are broken.")
    return features.detach().double().cpu()


def kid(real: Tensor, made: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD with the kernel ``(x y / D + 1)^3``.

    Source: Binkowski et al., ICLR 2018. Subsets are as large as the smaller side where that has fewer than ``size``
    images; where a subset is both sides, the value is exact and the deviation 0.
    """
    real, made = _checked(real), _checked(made)
    size = min(size, len(real), len(made))
    draw = torch.Generator().manual_seed(seed)
    whole = size == len(real) == len(made)
    values = []
    for _ in range(1 if whole else subsets):
        x = real[torch.randperm(len(real), generator=draw)[:size]]
        y = made[torch.randperm(len(made), generator=draw)[:size]]
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(within / (size * (size - 1)) - 2 * xy.mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std()) if len(found) > 1 else 0.0


def vlhi(distances: Sequence[float], scores: Sequence[float]) -> list[float]:
    """Visual-linguistic harmony index: what each of n runs reaches of the span of Fréchet distances and CLIP scores.

        VLHI_i = (max FID - FID_i) / (max FID - min FID) + (CLIP_i - min CLIP) / (max CLIP - min CLIP)

    Between 0 and 2. The group is all methods and budgets, with full fine-tuning, on one base model and one data set:
    the value of a run changes with its competitors and means nothing beside those of another table. Source: SaRA (Hu et
    al., ICLR 2025).

    Raises:
        DataError: fewer than two runs, or all distances or all scores are equal; then it is not defined.
    """
    if len(distances) != len(scores) or len(distances) < 2:
        raise DataError(
            f"VLHI compares at least 2 runs by a distance and a score each; got {len(distances)} distances and "
            f"{len(scores)} scores."
        )
    if not all(math.isfinite(v) for v in (*distances, *scores)):
        raise DataError("VLHI: a distance or a score is not a finite number. Leave out the runs that failed.")
    far, low = max(distances), min(scores)
    spans = (far - min(distances), max(scores) - low)
    if not all(spans):
        raise DataError("VLHI is not defined where all distances or all scores of the group are equal.")
    return [(far - d) / spans[0] + (s - low) / spans[1] for d, s in zip(distances, scores, strict=True)]


def nearest(made: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Distance ``[M]`` of each row of ``made`` ``[M, D]`` to its nearest of ``known`` ``[N, D]``, and which that is."""
    if not len(known):
        raise DataError("There is no image to look for neighbours in.")
    rows = made.split(256)  # type: ignore[no-untyped-call]
    parts = [torch.cdist(part.double(), known.double()).min(1) for part in rows]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def memorisation(made: Tensor, train: Tensor, held_out: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Are generated images nearer to the training images than to images of the same kind that were not trained on?

    The larger side is thinned to as many images as the other has, so that without memory both distances are alike.

    Args:
        made, train, held_out: features or pixels ``[M, D]``, ``[N, D]``, ``[K, D]``.

    Returns:
        ``train`` and ``held_out``: mean distance to the nearest; ``ratio`` of the two (1: no sign of memory, 0:
        copies); ``nearer``: share of generated images whose nearest is a training image (0.5: no sign); ``images``:
        per side.
    """
    count = min(len(train), len(held_out))
    draw = torch.Generator().manual_seed(seed)
    sides = [known[torch.randperm(len(known), generator=draw)[:count]] for known in (train, held_out)]
    first, second = (nearest(made, known)[0] for known in sides)
    return {
        "train": float(first.mean()),
        "held_out": float(second.mean()),
        "ratio": float(first.mean() / second.mean().clamp_min(1e-12)),
        "nearer": float(((first < second).double() + 0.5 * (first == second).double()).mean()),
        "images": float(count),
    }


def tile_distance(images: Tensor, others: Tensor, tiles: int = TILES) -> Tensor:
    """The largest L2 distance over corresponding tiles of uint8 ``[N, H, W, C]`` and ``[M, H, W, C]``: ``[N, M]``.

    Pixels count between 0 and 1. Source: the copy rule of Carlini et al., USENIX Security 2023, as MemControl uses it.

    Raises:
        DataError: other sizes, or sides that the tiles do not divide.
    """
    _, height, width, channels = images.shape
    if images.shape[1:] != others.shape[1:] or height % tiles or width % tiles:
        raise DataError(
            f"The tile rule compares images of one size that {tiles} divides, got {list(images.shape[1:])} and "
            f"{list(others.shape[1:])}. Resize them, or give another number of tiles."
        )
    cut = []
    for part in (images, others):
        x = part.float().div(255).reshape(len(part), tiles, height // tiles, tiles, width // tiles, channels)
        cut.append(x.transpose(2, 3).flatten(3).flatten(1, 2))  # [N, tiles * tiles, h * w * C]
    return torch.stack([torch.cdist(cut[0][:, i], cut[1][:, i]) for i in range(tiles * tiles)]).amax(0)


def copied(images: Tensor, train: Tensor, *, threshold: float = NEAR, tiles: int = TILES) -> float:
    """Share of images that the tile rule takes for copies of a training image.

    Raises:
        ConfigError: on images of this size everything is nearer than the threshold.
    """
    height, width, channels = images.shape[1:]
    check_tiles(height, width, channels, threshold, tiles)
    return float((tile_distance(images, train, tiles).amin(1) < threshold).double().mean())


def remembered(
    images: Tensor, train: Tensor | None = None, *, threshold: float = NEAR, tiles: int = TILES, members: int = MEMBERS
) -> dict[str, Any]:
    """Does a prompt always give the same image? The nearest-copy attack on the images of ONE prompt.

    Images that are nearer than the threshold are joined; the prompt counts as memorised when a connected group has at
    least ``members``, and as extracted when a member of it is as near to a training image.

    Returns:
        ``group``: size of the largest group, ``memorised``, and with ``train`` also ``extracted``.
    """
    height, width, channels = images.shape[1:]
    check_tiles(height, width, channels, threshold, tiles)
    near = tile_distance(images, images, tiles) < threshold
    left, groups = set(range(len(images))), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {j for i in edge for j in near[i].nonzero().flatten().tolist()} - group
        left -= group
        groups.append(sorted(group))
    large = [g for g in groups if len(g) >= members]
    result: dict[str, Any] = {"group": max(map(len, groups)), "memorised": bool(large)}
    if train is not None:
        held = [i for g in large for i in g]
        near_train = bool(held) and bool((tile_distance(images[held], train, tiles) < threshold).any())
        result["extracted"] = near_train
    return result


def check_tiles(height: int, width: int, channels: int, threshold: float, tiles: int = TILES) -> None:
    """Raise ConfigError for a threshold that everything of this size is nearer than."""
    most = math.sqrt(height / tiles * (width / tiles) * channels)
    if threshold >= most:
        raise ConfigError(
            f"A threshold of {threshold:g} takes every image for a copy: tiles of {height}x{width} images are at most "
            f"{most:.3g} apart. Give one below that; the paper's 20 is for images of hundreds of pixels."
        )


@torch.no_grad()
def conditional_norms(
    model: nn.Module, kind: str, inputs: Mapping[str, Any], free: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``|e(x_t, t, c) - e(x_t, t, none)|_2`` per sample, over the flattened latent: ``[N]``.

    Large where the condition alone decides the image, which is what memorised prompts do (Wen et al., ICLR 2024; the
    objective of MemControl, Dutt et al., WACV 2025).

    Args:
        kind: class name of the denoiser.
        inputs: ``sample``, ``timestep`` and the condition.
        free: the entries of the condition that mean none; None for a model without condition, whose norms are 0.
    """
    if not free:
        return torch.zeros(len(inputs["sample"]))
    bound = denoise(model, kind, inputs).float()
    loose = denoise(model, kind, {**inputs, **free}).float()
    norms: Tensor = torch.linalg.vector_norm((bound - loose).flatten(1), dim=1)
    return norms


def norm_scores(batches: Iterable[Tensor]) -> dict[str, float]:
    """``max_norm`` and ``avg_norm``: the maximum and the mean of each batch's norms, averaged over batches."""
    found = [(float(norms.max()), float(norms.mean())) for norms in batches if len(norms)]
    if not found:
        raise DataError("There is no batch to measure the conditional norm on.")
    return {key: sum(f[i] for f in found) / len(found) for i, key in enumerate(("max_norm", "avg_norm"))}
