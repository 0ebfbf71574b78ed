"""SPT's allocation: one ranking of the most sensitive scalars serves every threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft_suite.kernels import select_topk

__all__ = ["Allocation", "Ranking", "Site", "allocate", "allocate_official"]

Rule = tuple[float, float, bool, bool]  # alpha, beta, structured_vector, structured_only


@dataclass(frozen=True)
class Site:
    """A matrix or vector, or its rows in a fused parameter: flat positions ``[start, stop)`` of ``path.tensor``.

    ``role`` is empty for vectors; ``cost`` is that of a matrix's module.
    """

    name: str
    path: str
    tensor: str
    start: int
    stop: int
    role: str = ""
    rows: tuple[int, int] | None = None
    cost: int = 0
    norm: bool = False

    @property
    def size(self) -> int:
        """Entries."""
        return self.stop - self.start


@dataclass(frozen=True)
class Allocation:
    """Matrices with a module, vectors trained whole, single entries (site -> flat positions in it), counts."""

    matrices: tuple[str, ...]
    vectors: tuple[str, ...]
    entries: Mapping[str, Tensor]
    sensitive: int
    total: int
    structured: int
    unstructured: int


class Ranking:
    """The ``count`` largest scores of all sites together, largest first; ties in the order of sites and positions."""

    def __init__(self, scores: Mapping[str, Tensor], count: int) -> None:
        chosen = select_topk(dict(scores), count, score="value", index_dtype=torch.int64)
        lengths = [len(i) for i in chosen.values()]
        values = torch.cat([scores[n].reshape(-1)[i].float() for n, i in chosen.items()])
        order = torch.sort(values, descending=True, stable=True).indices.cpu()
        site = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.site = site[order].numpy()
        self.position = torch.cat([i.cpu() for i in chosen.values()])[order]
        self.sites = len(lengths)

    def counts(self, k: int) -> np.ndarray:  # type: ignore[type-arg]
        """Entries of every site among the first k."""
        return np.bincount(self.site[:k], minlength=self.sites)

    def entries(self, k: int, site: int) -> Tensor:
        """Sorted positions in a site of its entries among the first k."""
        return self.position[: min(k, len(self.site))][torch.from_numpy(self.site[:k] == site)].sort().values


def _needs(sites: Sequence[Site], rule: Rule) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """(cost of treating a site as a whole, sensitive entries from which it is; infinite where it never is)."""
    alpha, beta, vectors, _ = rule
    cost = np.array([s.cost if s.role else s.size for s in sites], dtype=np.int64)
    share = [s.cost / alpha if s.role else (s.size / beta if vectors else math.inf) for s in sites]
    return cost, np.array(share)


def _made(
    sites: Sequence[Site],
    ranking: Ranking,
    k: int,
    whole: Sequence[bool],
    rule: Rule,
    cost: np.ndarray,
    extra: int,  # type: ignore[type-arg]
) -> Allocation:
    counts = ranking.counts(k)
    single = [i for i in range(len(sites)) if counts[i] and not whole[i] and not rule[3]]
    structured = int(sum(cost[i] for i in range(len(sites)) if whole[i]))
    unstructured = int(sum(counts[i] for i in single))
    return Allocation(
        tuple(s.name for s, w in zip(sites, whole, strict=True) if w and s.role),
        tuple(s.name for s, w in zip(sites, whole, strict=True) if w and not s.role),
        {sites[i].name: ranking.entries(k, i) for i in single},
        k,
        structured + unstructured + extra,
        structured,
        unstructured,
    )


def allocate_official(
    sites: Sequence[Site], scores: Mapping[str, Tensor], rule: Rule, budget: int, steps: Sequence[int], token: int
) -> Allocation:
    """Of the thresholds that keep ``steps`` entries, the one with the total nearest to the budget, later ones first."""
    everything = sum(site.size for site in sites)
    steps = [min(k, everything) for k in steps]
    ranking = Ranking(scores, max(steps))
    cost, share = _needs(sites, rule)
    best, chosen = math.inf, 0
    for k in steps:
        counts = ranking.counts(k)
        whole = counts >= share
        spent = int(cost[whole].sum()) + (0 if rule[3] else int(counts[~whole].sum())) + token
        if abs(spent - budget) <= best:
            best, chosen = abs(spent - budget), k
    return _made(sites, ranking, chosen, list(ranking.counts(chosen) >= share), rule, cost, token)


def allocate(sites: Sequence[Site], scores: Mapping[str, Tensor], rule: Rule, budget: int) -> Allocation | None:
    """Lower the threshold until the budget is spent; None when it is not positive or cannot be spent.

    A site becomes whole when it has enough sensitive entries and its cost still fits; one that does not fit keeps its
    single entries, and cheaper ones may still follow.
    """
    everything = sum(site.size for site in sites)
    count = min(everything, 2 * budget)
    while budget > 0:
        made = _walk(sites, Ranking(scores, count), rule, budget)
        if made is not None or count == everything:
            return made
        count = min(everything, 4 * count)
    return None


def _walk(sites: Sequence[Site], ranking: Ranking, rule: Rule, budget: int) -> Allocation | None:
    cost, share = _needs(sites, rule)
    price = 0 if rule[3] else 1  # of a single entry
    order = np.argsort(ranking.site, kind="stable")
    first = np.searchsorted(ranking.site[order], np.arange(len(sites) + 1))
    events = []
    for i in range(len(sites)):
        need = max(math.ceil(share[i]), 1) if math.isfinite(share[i]) else math.inf
        if need <= first[i + 1] - first[i]:
            events.append((int(order[first[i] + int(need) - 1]) + 1, i))
    whole = np.zeros(len(sites), dtype=bool)
    counts = np.zeros(len(sites), dtype=np.int64)
    at = 0
    for k, site in [*sorted(events), (len(ranking.site), -1)]:
        step = ranking.site[at:k]
        spent = int(cost[whole].sum()) + price * int(counts[~whole].sum())
        paid = np.cumsum(~whole[step]) * price
        # the event's own entry is free when its site becomes whole
        over = np.flatnonzero(paid > budget - spent)
        becomes = (
            site >= 0
            and spent + int(paid[-1]) + int(cost[site]) - price * int(counts[site] + (step == site).sum()) <= budget
        )
        if len(over) and not (becomes and over[0] == len(step) - 1):
            return _made(sites, ranking, at + int(over[0]), list(whole), rule, cost, 0)
        counts += np.bincount(step, minlength=len(sites))
        at = k
        if becomes:
            whole[site] = True
    spent = int(cost[whole].sum()) + price * int(counts[~whole].sum())
    return _made(sites, ranking, at, list(whole), rule, cost, 0) if spent >= 0.99 * budget else None
