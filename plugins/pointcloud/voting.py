"""Voting: the mean of a model's logits over several random views of every cloud.

Each pass draws ``num_points`` of the ``point_all`` farthest points and changes them (published: scale-translate).

- The honest protocol: one vote of 10 passes, decided before looking at any label.
- The official scripts repeat that vote 299 times with new random numbers and print the **best** accuracy, which is
  chosen with the test labels. ``repetitions=299`` does it, is refused unless ``reproduces="paper"`` says why, and says
  so in ``protocol``; the honest number, that of the first vote, is always given beside it.

``protocol`` belongs next to every number that comes from here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_suite.errors import ConfigError
from peft_suite.pointcloud.clouds import CloudDataset
from peft_suite.pointcloud.transforms import parse_augment
from peft_suite.train.evaluation import collect, pick_device
from peft_suite.train.task import Classification, Task

__all__ = ["OFFICIAL_REPETITIONS", "PASSES", "VoteResult", "vote", "voting_dataset"]

PASSES = 10
OFFICIAL_REPETITIONS = 299


@dataclass
class VoteResult:
    """What a vote said.

    Attributes:
        logits: ``[N, C]``, mean over the passes; of the first vote.
        metrics: of the first vote, as :func:`peft_suite.train.evaluate` gives them.
        protocol: one sentence for the table.
        best: highest primary metric over all repetitions, None for a single vote.
        history: the primary metric of every repetition.
    """

    logits: Tensor
    target: Tensor
    metrics: Mapping[str, float | None]
    protocol: str
    best: float | None
    history: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the logits."""
        return {
            "protocol": self.protocol,
            "metrics": dict(self.metrics),
            "best": self.best,
            "repetitions": len(self.history),
        }


def voting_dataset(dataset: CloudDataset, augment: str = "scale-translate", seed: int = 0) -> CloudDataset:
    """The samples of an evaluation data set, drawn and changed at random in every pass (``set_epoch(pass)``)."""
    views = copy.copy(dataset)
    views.own_epoch()
    views.train, views.augment, views.seed = True, parse_augment(augment), seed
    return views


def vote(
    model: nn.Module,
    dataset: CloudDataset,
    task: Task | None = None,
    *,
    passes: int = PASSES,
    augment: str = "scale-translate",
    repetitions: int = 1,
    reproduces: str = "",
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    workers: int = 0,
    precision: str = "no",
) -> VoteResult:
    """Metrics of the mean logits over ``passes`` random views.

    Args:
        dataset: an evaluation split of the plugin's classification data, with targets.
        task: None is classification over as many classes as there are logits.
        augment: changes at test time, as ``data.augment``; "none" only draws points anew.
        repetitions: more than one picks the best by test labels, as the official scripts do; needs ``reproduces``.
        reproduces: "paper" acknowledges that.
        seed: of the views.

    Raises:
        ConfigError: several repetitions without ``reproduces="paper"``, or a number below 1.
    """
    if passes < 1 or repetitions < 1:
        raise ConfigError(f"vote(passes={passes}, repetitions={repetitions}): both must be at least 1.")
    if repetitions > 1 and reproduces != "paper":
        raise ConfigError(
            f"vote(repetitions={repetitions}) reports the best of several votes, chosen by the test labels. Use "
            "repetitions=1, or reproduces='paper' in a recipe that repeats a paper's numbers."
        )
    views = voting_dataset(dataset, augment, seed)
    target_device = pick_device(device)
    model = model.to(target_device)
    first: tuple[Tensor, Tensor, Task, Mapping[str, float | None]] | None = None
    history = []
    for repetition in range(repetitions):
        total: Tensor | None = None
        target: Tensor | None = None
        for number in range(passes):
            views.set_epoch(repetition * passes + number)
            logits, target = collect(
                model, views, batch_size=batch_size, device=target_device, workers=workers, precision=precision
            )
            total = logits if total is None else total + logits
        assert total is not None and target is not None
        mean = total / passes
        chosen = first[2] if first else task or Classification(tuple(map(str, range(mean.shape[1]))))
        metrics = chosen.metrics(mean, target)
        history.append(float(metrics[chosen.primary] or 0.0))
        first = first or (mean, target, chosen, metrics)
    assert first is not None
    protocol = f"mean logits of {passes} passes (random subset, {augment})"
    if repetitions > 1:
        protocol = f"BEST of {repetitions} votes by test labels, each: {protocol}"
    return VoteResult(first[0], first[1], first[3], protocol, max(history) if repetitions > 1 else None, history)
