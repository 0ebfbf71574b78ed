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
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_suite import kernels
from peft_suite.errors import FileFormatError
from peft_suite.pointcloud import micro, shapes, shifted
from peft_suite.pointcloud.formats import Array
from peft_suite.pointcloud.models.layers import Block, new_token
from peft_suite.pointcloud.models.transformer import Blocks, PointTransformer, position_mlp, start_from_scratch
from peft_suite.pointcloud.sampling import farthest, oversampled
from peft_suite.storage import atomic, write_bytes
from peft_suite.train.display import Display
from peft_suite.train.stopping import StopRequest

BATCH = 128
ROUND = 50  # steps between lines, and between checkpoints
POOL = 4096  # clouds to draw from
RENEWED = 16  # of them in every step
TIMED = 9  # steps that tell how many fit into the minutes


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


def train(model: Masked, partial: Path, seed: int, steps: int, state: Mapping[str, Any] | None, lr: float) -> None:
    """Train from ``state``, or from the beginning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.95))
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    stream, stop, done = Stream(seed), StopRequest(), first
    losses: list[float] = []
    clock = time.perf_counter()
    display = Display(enabled=True, epochs=-(-steps // ROUND), steps=ROUND, epoch=first // ROUND, metric="")
    model.train()
    try:
        with stop:
            while done < steps and not stop.wanted:
                losses.append(train_step(model, optimizer, stream.batch(done), lr * pace(done, steps)))
                display.step(done % ROUND + 1, 1e3 * losses[-1])
                done += 1
                if done % ROUND == 0 or done == steps or stop.wanted:
                    keep(partial, model, optimizer, done, steps, seed)
                    speed = len(losses) * BATCH / (time.perf_counter() - clock)
                    entry = {"epoch": (done - 1) // ROUND, "train_loss": 1e3 * sum(losses) / len(losses)}
                    display.epoch({**entry, "val": None, "test": None, "samples_per_s": speed})
                    losses, clock = [], time.perf_counter()
    finally:
        display.close()
    if done < steps:
        raise SystemExit(f"Stopped after step {done} of {steps}. Go on with --resume.")


def steps_in(minutes: float, model: Masked, seed: int) -> int:
    """How many steps fit, from the time of a few on a copy, and of as many new clouds as they need."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = Stream(seed, pool=BATCH).batch(0)
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        train_step(model, optimizer, batch, 0.0)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(RENEWED):
        source(seed, number)
    return max(1, round(60 * minutes / (statistics.median(times) + time.perf_counter() - start)))


def read_partial(path: Path, seed: int) -> Mapping[str, Any] | None:
    """What an interrupted run left, or None.

    Raises:
        FileFormatError: it was begun with another seed.
    """
    if not path.exists():
        return None
    state: Mapping[str, Any] = torch.load(path, weights_only=True)
    if state["seed"] != seed:
        raise FileFormatError(f"{path} was begun with --seed {state['seed']}. Go on with that one, or remove the file.")
    return state


def train_step(model: Masked, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float) -> float:
    """One step; the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(*batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise SystemExit(f"The loss is {value}; the last checkpoint is kept.")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return value


def pace(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over 50 steps times a cosine to 0."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def keep(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, steps: int, seed: int) -> None:
    """Write what ``--resume`` needs."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "steps": steps,
        "seed": seed,
    }
    with atomic(path) as temporary:
        torch.save(state, temporary)


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
    x = features(model, np.stack([thinned(make(label, i), micro.POINTS) for label, i in numbers])).double()
    y = torch.tensor([label for label, _ in numbers])
    known = torch.tensor([i < shots for _, i in numbers])
    x = (x - x[known].mean(0)) / x[known].std(0).clamp_min(1e-6)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    goal = nn.functional.one_hot(y[known], classes).to(x.dtype)
    penalty = 10.0 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x[known].T @ x[known] + penalty, x[known].T @ goal)
    return float(((x[~known] @ weight).argmax(1) == y[~known]).double().mean())


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
    state = read_partial(partial, options.seed) if options.resume else None
    steps = state["steps"] if state else options.steps or steps_in(options.minutes, model, options.seed)
    train(model, partial, options.seed, steps, state, options.lr)
    body = {key: value for key, value in backbone.state_dict().items() if micro.is_body(key)}
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in body.items()}
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
    for name, value in after.items():
        print(f"probe {name.replace('_', ' '):16s} {value:6.1%}   random weights {before[name]:6.1%}")
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {steps} steps, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
