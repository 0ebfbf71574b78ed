"""Make the weights of the embedded micro point transformer: ``python -m peft_suite.pointcloud.pretrain_micro``.

Masked point modelling after Point-MAE (Pang et al., ECCV 2022) on solids that are made as training goes:

    60 % of the patches are hidden; the backbone sees the others alone
    y = decoder([visible ; mask tokens] + positions of all)           two blocks
    loss = Chamfer distance L2 between W y and the hidden patches     [16, 3] points each

The solids of :data:`peft_suite.pointcloud.shapes.SOURCE` are clean, whole and upright. ``--minutes`` times the first
steps and fixes their number; ``--steps`` with that number gives the same weights on the same machine. What is
interrupted goes on with ``--resume``. At the end, ridge classifiers on frozen features tell what was learnt.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_suite import kernels
from peft_suite.pointcloud import micro, shapes, shifted
from peft_suite.pointcloud.formats import Array
from peft_suite.pointcloud.models.layers import Block, new_token
from peft_suite.pointcloud.models.transformer import Blocks, PointTransformer, position_mlp, start_from_scratch
from peft_suite.pointcloud.sampling import farthest, oversampled
from peft_suite.storage import write_bytes
from peft_suite.train import pretraining

BATCH = 128
ROUND = 50  # steps between lines, and between checkpoints
POOL = 4096  # clouds to draw from
RENEWED = 16  # of them in every step


class Masked(nn.Module):
    """The backbone with a light decoder."""

    def __init__(self, backbone: PointTransformer, hidden: float = 0.6, depth: int = 2) -> None:
        super().__init__()
        dim, heads = backbone.embed_dim, micro.ARCHITECTURE["num_heads"]
        grouping = backbone.group_divider
        self.backbone, self.seen = backbone, grouping.groups - round(hidden * grouping.groups)
        self.mask_token = new_token(dim)
        self.pos_embed = position_mlp(dim)
        self.decoder = Blocks([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, 3 * grouping.size)

    def forward(self, points: Tensor, order: Tensor) -> Tensor:
        """The loss of clouds ``[B, N, 3]`` whose patches are seen in the order ``[B, G]``, as many as ``seen``."""
        geometry = self.backbone.group_divider(points)
        groups = kernels.group_points(geometry.groups.flatten(2), order.unsqueeze(2)).squeeze(2)  # [B, G, S * 3]
        centers = kernels.gather_points(geometry.centers, order)
        visible = groups[:, : self.seen].reshape(len(groups), self.seen, -1, 3)
        tokens = self.backbone.reduce_dim(self.backbone.encoder(visible))
        pos = self.backbone.pos_embed(centers[:, : self.seen])
        tokens = self.backbone.norm(self.backbone.blocks(tokens, pos, geometry))
        lost = self.mask_token.expand(len(points), groups.shape[1] - self.seen, -1)
        y = self.decoder(torch.cat((tokens, lost), dim=1), self.pos_embed(centers), geometry)
        guess = self.predict(self.norm(y[:, self.seen :]))
        hidden = groups[:, self.seen :]
        return chamfer(guess.reshape(-1, guess.shape[2] // 3, 3), hidden.reshape(-1, hidden.shape[2] // 3, 3))


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other set, both ways: ``[M, S, 3]`` twice."""
    gaps = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(3)  # [M, S, S]
    return gaps.amin(2).mean() + gaps.amin(1).mean()


class Stream:
    """Batches of deformed solids. The pool at a step is the clouds of a window of numbers, so a run can go on."""

    def __init__(self, seed: int, pool: int = POOL) -> None:
        self.seed, self.pool = seed, pool
        self.points = np.empty((pool, oversampled(micro.POINTS), 3), np.float32)
        self.made = 0  # clouds so far

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Clouds ``[B, 512, 3]``, turned and stretched, and the order ``[B, G]`` in which their patches are seen."""
        self._renew(step)
        rng = np.random.default_rng([self.seed, step])
        rows = rng.choice(self.pool, BATCH, replace=False)
        some = rng.random((BATCH, self.points.shape[1])).argsort(1)[:, : micro.POINTS]
        angle = rng.uniform(0, 2 * math.pi, BATCH)
        c, s, zero, one = np.cos(angle), np.sin(angle), np.zeros(BATCH), np.ones(BATCH)
        turn = np.stack([c, zero, s, zero, one, zero, -s, zero, c], 1).reshape(BATCH, 3, 3)
        turn *= rng.uniform(0.8, 1.25, (BATCH, 1, 3))
        points = self.points[rows[:, None], some] @ turn.astype(np.float32)
        order = rng.random((BATCH, micro.ARCHITECTURE["groups"])).argsort(1)
        return unit(torch.from_numpy(points)), torch.from_numpy(order)

    def _renew(self, step: int) -> None:
        last = step * RENEWED + self.pool
        for number in range(max(self.made, step * RENEWED), last):
            self.points[number % self.pool] = source(self.seed, number)
        self.made = last


def source(seed: int, number: int) -> Array:
    """A cloud of the source classes, thinned to farthest points: ``[600, 3]``."""
    rng = np.random.default_rng([seed, 7, number])
    names = tuple(shapes.SOURCE)
    return thinned(shapes.source_cloud(names[number % len(names)], 1024, rng), oversampled(micro.POINTS))


def thinned(points: Array, count: int) -> Array:
    """The farthest ``count`` points, as the data loader takes them."""
    return np.asarray(points[farthest(points, count)], np.float32)


def unit(points: Tensor) -> Tensor:
    """Every cloud's mean to 0 and its farthest point to distance 1."""
    points = points - points.mean(1, keepdim=True)
    scaled: Tensor = points / points.norm(dim=2).amax(1)[:, None, None]
    return scaled


def steps_in(minutes: float, model: Masked, seed: int) -> int:
    """How many steps fit; see :func:`peft_suite.train.pretraining.steps_in`."""
    batch = Stream(seed, pool=BATCH).batch(0)
    return pretraining.steps_in(minutes, model, batch, lambda: [source(seed, number) for number in range(RENEWED)])


@torch.no_grad()
def features(model: PointTransformer, clouds: Array) -> Tensor:
    """Maximum and mean over patches of frozen tokens: ``[N, 512, 3] -> [N, 2D]``."""
    model.eval()
    rows = []
    for points in torch.from_numpy(clouds).split(128):  # type: ignore[no-untyped-call]
        tokens = model.forward_features(unit(points))[:, 1:]
        rows.append(torch.cat((tokens.amax(1), tokens.mean(1)), dim=1))
    return torch.cat(rows)


def probe(
    model: PointTransformer, make: Callable[[int, int], Array], classes: int, shots: int, tests: int = 20
) -> float:
    """Accuracy of a ridge classifier on features: ``make(label, number)`` gives a cloud; the first ``shots`` train."""
    numbers = [(label, i) for label in range(classes) for i in range(shots + tests)]
    x = features(model, np.stack([thinned(make(label, i), micro.POINTS) for label, i in numbers]))
    known = torch.tensor([i < shots for _, i in numbers])
    return pretraining.ridge_accuracy(x, torch.tensor([label for label, _ in numbers]), known, classes)


def probes(model: PointTransformer, shots: int = 20) -> dict[str, float]:
    """Accuracies on source classes, whole target solids and shifted ones."""
    seen, unseen = tuple(shapes.SOURCE), tuple(shapes.TARGET)

    def known(c: int, i: int) -> Array:
        return shapes.source_cloud(seen[c], 1024, np.random.default_rng([8, c, i]))

    def whole(c: int, i: int) -> Array:
        return shapes.target_cloud(unseen[c], 1024, np.random.default_rng([9, c, i]))

    def scanned(c: int, i: int) -> Array:
        return shifted.shifted_cloud("train", c, i)

    return {
        "source": probe(model, known, len(seen), shots),
        "target_whole": probe(model, whole, len(unseen), shots),
        "target_shifted": probe(model, scanned, len(unseen), shots),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m peft_suite.pointcloud.pretrain_micro", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true", help="go on from OUT's .partial.pt, if there is one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / micro.ASSET)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one summation order on every machine with the same instruction set
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    backbone = micro.build(0, pretrained=False)
    model = Masked(backbone)
    start_from_scratch(model)
    before = probes(backbone)
    partial = options.out.with_suffix(".partial.pt")
    state = pretraining.read_partial(partial, options.seed) if options.resume else None
    steps = state["steps"] if state else options.steps or steps_in(options.minutes, model, options.seed)
    pretraining.pretrain(
        model,
        Stream(options.seed).batch,
        partial,
        seed=options.seed,
        steps=steps,
        lr=options.lr,
        state=state,
        every=ROUND,
        shown=1e3,
    )
    tensors = pretraining.half({k: v for k, v in backbone.state_dict().items() if micro.is_body(k)})
    backbone.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, strict=False)
    after = probes(backbone)
    metadata = {
        "format": "pt",
        "model": f"PointTransformer {micro.ARCHITECTURE}",
        "made_by": f"python -m peft_suite.pointcloud.pretrain_micro --seed {options.seed} --steps {steps}",
        "data": f"generated solids of {len(shapes.SOURCE)} classes: {', '.join(shapes.SOURCE)}",
        "weights_licence": "Apache-2.0",
        "seed": str(options.seed),
        "steps": str(steps),
        **{f"probe_{name}": f"{value:.4f}" for name, value in after.items()},
        **{f"probe_{name}_random_weights": f"{value:.4f}" for name, value in before.items()},
        "torch": torch.__version__,
    }
    write_bytes(options.out, save(tensors, metadata))
    partial.unlink(missing_ok=True)
    print(pretraining.probe_lines(after, before))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {steps} steps, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
