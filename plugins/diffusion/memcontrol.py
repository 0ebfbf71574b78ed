"""MemControl (Dutt et al., WACV 2025): which places of a model may train, searched against what it memorises.

How much a fine-tuned generator remembers of its training images depends on which parameters it may change. The outer
problem draws a bit for every named group of modules and a learning rate; the inner one fine-tunes any method with the
groups of bit 0 left out (:mod:`peft_suite.diffusion.methods.subset`) on a share of the data. All objectives are
minimised. The search ends with the Pareto front; which of its points to train on all the data, people choose.

A search lives in one folder: ``journal.log``, Optuna's own, from which a stopped search goes on, and ``pareto.json``
and ``pareto.csv``, written anew after every trial, with ``pareto.png`` at the end or when it stops. Draws of a trial
depend on the seed and on the trials before it, so that a search that was stopped and resumed tries the same as one that
was not.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_suite.config import Config
from peft_suite.diffusion.pareto import front, knee, plot, table
from peft_suite.errors import ConfigError, MissingExtraError, PeftSuiteError, TrainingError, UnsupportedError
from peft_suite.storage import write_bytes, write_json, write_text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Group", "Search", "SearchConfig", "Trial", "groups_of", "live_groups", "masked"]

RATE = "learning_rate"
_STACK = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)")
_STAGE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?")
_ORDER = ("down_blocks", "mid_block", "up_blocks")
_BIT = re.compile(r"bit(\d+)")


@dataclass(frozen=True)
class Group:
    """What one bit switches: everything at and below ``path``."""

    name: str
    path: str


@dataclass(frozen=True)
class Trial:
    """One point: a bit for each group, in their order, and a learning rate."""

    number: int
    mask: tuple[int, ...]
    learning_rate: float
    groups: tuple[Group, ...]

    @property
    def off(self) -> tuple[str, ...]:
        """Paths whose bit is 0."""
        return tuple(g.path for g, bit in zip(self.groups, self.mask, strict=True) if not bit)


@dataclass(frozen=True)
class SearchConfig(Config):
    """How to search.

    Attributes:
        trials: in all, with those of earlier starts.
        lr_low, lr_high: the learning rate is drawn log-uniformly between them; the published ranges are 1e-5 to 1e-3
            for adapters and 5e-6 to 1e-5 for full fine-tuning.
        sampler: "nsga2" (Optuna's default for several objectives), "tpe" or "random".
        population: of nsga2; so many trials are random before the first cross. Optuna's 50 would make a search of 20
            trials purely random.
        seed: of the draws.
    """

    trials: int = 20
    lr_low: float = 1e-5
    lr_high: float = 1e-3
    sampler: Literal["nsga2", "tpe", "random"] = "nsga2"
    population: int = 10
    seed: int = 0

    def validate(self) -> None:
        self.require("trials", self.trials >= 1, "must be at least 1")
        self.require("lr_low", 0 < self.lr_low <= self.lr_high, "must be above 0 and at most lr_high")
        self.require("population", self.population >= 2, "must be at least 2")


def groups_of(model: nn.Module, *, third: bool = True) -> tuple[Group, ...]:
    """The groups of a model, in the order of their bits.

    Transformer stacks of a conditional UNet: down blocks, middle, up blocks; 16 in Stable Diffusion 1.5. Of other UNets
    the stages in that order; of other models the residual blocks.

    Args:
        third: False gives no bit to stacks of up blocks beyond the first two, which then always train: the 13 bits of
            the published search over SVDiff and DiffFit.

    Raises:
        UnsupportedError, BackboneError: the model has nothing of the kind.
    """
    names = [n for n, _ in model.named_modules() if not n.startswith("adapters.")]
    stacks = [m for n in names if (m := _STACK.fullmatch(n)) and f"{n}.transformer_blocks" in names]
    stages = [m for n in names if (m := _STAGE.fullmatch(n)) and (m[1] == "mid_block" or m[2])]
    if stacks:
        found = sorted(stacks, key=lambda m: (_ORDER.index(m[1]), int(m[2] or 0), int(m[3])))
        paths = [m[0] for m in found if third or m[1] != "up_blocks" or int(m[3]) < 2]
    elif stages:
        paths = [m[0] for m in sorted(stages, key=lambda m: (_ORDER.index(m[1]), int(m[2] or 0)))]
    else:
        from peft_suite.lifecycle import described

        paths = list(dict.fromkeys(block.point.path for block in described(model).blocks))
    if not paths:
        raise UnsupportedError(f"{type(model).__name__} has no blocks to switch; give groups of your own.")
    return tuple(Group(path, path) for path in paths)


def live_groups(model: nn.Module, method: Any, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups in which a method has a part at all; a bit for another one would decide nothing.

    Raises:
        UnsupportedError: there is none.
    """
    import peft_suite as ps

    points = [row.point for row in ps.plan(model, method).rows]
    kept = tuple(g for g in groups if any(p == g.path or p.startswith(f"{g.path}.") for p in points))
    if not kept:
        raise UnsupportedError(f"{method!r} has no part in any of the groups; choose other targets, or other groups.")
    return kept


def masked(method: Any, off: Sequence[str], containing: str = "") -> dict[str, Any]:
    """The specification of a method without the groups that are off, as ``adapt``, ``train`` and files take it."""
    from peft_suite.method import make_method

    inner = make_method(method)
    spec = method if isinstance(method, str) else {"name": inner.name, **inner.config.to_dict()}
    return {"name": "subset", "of": spec, "off": list(off), "containing": containing}


Evaluate = Callable[[Trial], Mapping[str, Any]]


class Search:
    """A study in a folder.

    Args:
        groups: what the bits switch.
        objectives: names of what ``evaluate`` returns, all minimised; the first two are drawn.
        facts: JSON-ready description of the inner problem; a folder whose search had another is refused.

    Raises:
        ConfigError: the folder holds a search and ``resume`` is False, or that of another problem.
        MissingExtraError: Optuna is not installed.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        objectives: Sequence[str],
        config: SearchConfig,
        out: str | Path,
        *,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        if not groups or not objectives or len(set(objectives)) != len(objectives):
            raise ConfigError("A search needs at least one group, and objectives with different names.")
        self.groups, self.objectives, self.config = tuple(groups), tuple(objectives), config
        self.out = Path(out)
        journal = self.out / "journal.log"
        if journal.exists() and not resume:
            raise ConfigError(
                f"{self.out} already holds a search; nothing was changed. Go on with --resume, or choose another "
                "folder."
            )
        self.optuna = _optuna()
        self.out.mkdir(parents=True, exist_ok=True)
        storage = self.optuna.storages.JournalStorage(self.optuna.storages.journal.JournalFileBackend(str(journal)))
        self.study = self.optuna.create_study(
            storage=storage, study_name="memcontrol", directions=["minimize"] * len(objectives), load_if_exists=True
        )
        self._agree(
            {"groups": [g.path for g in groups], "objectives": list(objectives), **_space(config), **(facts or {})}
        )
        self._forget_running()

    def run(self, evaluate: Evaluate, *, progress: Callable[[int, Mapping[str, Any]], None] | None = None) -> None:
        """Try until there are ``config.trials`` trials, those before included.

        A trial that raises one of the suite's errors, or has a value that is not finite, counts as failed, with its
        reason. Any other exception, and Ctrl-C, stop the search; the trial is drawn again at the next start.

        Args:
            evaluate: the inner problem: objectives by name, and further JSON-ready facts such as ``trained``.
            progress: called with the number of trials and the row of the last.
        """
        try:
            while len(rows := self.rows()) < self.config.trials:
                row = self._try(evaluate, len(rows))
                self.write(picture=False)
                if progress is not None:
                    progress(len(rows) + 1, row)
        finally:
            self.write()

    def _try(self, evaluate: Evaluate, number: int) -> Mapping[str, Any]:
        """One trial, told to the study; its row."""
        trial, point = self._ask(number)
        failed = self.optuna.trial.TrialState.FAIL
        try:
            found = dict(evaluate(point))
            if missing := [name for name in self.objectives if name not in found]:
                raise ConfigError(f"The inner problem returned no {missing[0]!r}; it returned {sorted(found)}.")
            if bad := [n for n in self.objectives if not math.isfinite(found[n])]:
                raise TrainingError(f"{bad[0]} is {found[bad[0]]}.")
        except BaseException as error:
            counts = isinstance(error, PeftSuiteError) and not isinstance(error, ConfigError)
            if counts:
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            self.study.tell(trial, state=failed)
            if not counts:
                raise
        else:
            for name, value in found.items():
                if name not in self.objectives:
                    trial.set_user_attr(name, value)
            self.study.tell(trial, [float(found[name]) for name in self.objectives])
        return self.rows()[-1]

    def rows(self) -> list[dict[str, Any]]:
        """Finished trials, numbered from 0 without gaps: mask, learning rate, values, what failed and why."""
        state = self.optuna.trial.TrialState
        kept = [
            t
            for t in self.study.get_trials(deepcopy=False)
            if t.state == state.COMPLETE or (t.state == state.FAIL and "error" in t.user_attrs)
        ]
        return [
            {
                "number": number,
                "mask": list(mask_of(t.params, len(self.groups))),
                "learning_rate": t.params[RATE],
                "values": dict(zip(self.objectives, t.values or (), strict=False)),
                **{k: v for k, v in t.user_attrs.items() if k != "number"},
            }
            for number, t in enumerate(kept)
        ]

    def best(self, number: int | None = None) -> Trial:
        """A finished trial of the front: the one of that number, or the suggested one.

        Raises:
            ConfigError: nothing has finished, or the trial has no values.
        """
        rows = self.rows()
        found = knee(front(rows, self.objectives), self.objectives) if number is None else None
        if number is not None:
            found = next((r for r in rows if r["number"] == number and r["values"]), None)
        if found is None:
            known = ", ".join(str(r["number"]) for r in front(rows, self.objectives)) or "none yet"
            failed = next((f" Trial {r['number']} failed: {r['error']}" for r in rows if "error" in r), "")
            which = "" if number is None else f" {number}"
            raise ConfigError(f"There is no finished trial{which}. On the front: {known}.{failed}")
        return Trial(found["number"], tuple(found["mask"]), found["learning_rate"], self.groups)

    def write(self, *, picture: bool = True) -> None:
        """``pareto.json``, ``pareto.csv`` and, with ``picture``, ``pareto.png`` of what has finished."""
        rows = self.rows()
        best = front(rows, self.objectives)
        chosen = knee(best, self.objectives)
        record = {
            "format": 1,
            **self.study.user_attrs["search"],
            "pareto": [r["number"] for r in best],
            "suggested": None if chosen is None else chosen["number"],
            "trials": rows,
        }
        write_json(self.out / "pareto.json", record)
        write_text(self.out / "pareto.csv", table(best, self.objectives, [g.name for g in self.groups]))
        if picture and len(self.objectives) > 1 and best:
            write_bytes(self.out / "pareto.png", plot(rows, self.objectives))

    def _ask(self, number: int) -> tuple[Any, Trial]:
        samplers = self.optuna.samplers
        seed = (self.config.seed * 100_003 + number) % 2**31
        if self.config.sampler == "random":
            self.study.sampler = samplers.RandomSampler(seed=seed)
        elif self.config.sampler == "tpe":
            self.study.sampler = samplers.TPESampler(seed=seed)
        else:
            self.study.sampler = samplers.NSGAIISampler(population_size=self.config.population, seed=seed)
        trial = self.study.ask()
        for i in range(len(self.groups)):
            trial.suggest_categorical(f"bit{i:02d}", (0, 1))
        rate = trial.suggest_float(RATE, self.config.lr_low, self.config.lr_high, log=True)
        return trial, Trial(number, mask_of(trial.params, len(self.groups)), rate, self.groups)

    def _agree(self, facts: dict[str, Any]) -> None:
        known = self.study.user_attrs.get("search")
        if known is None:
            self.study.set_user_attr("search", facts)
        elif known != facts:
            odd = sorted(k for k in {*known, *facts} if known.get(k) != facts.get(k))
            raise ConfigError(
                f"{self.out} holds the search of another problem: {odd[0]} was {known.get(odd[0])!r} and is "
                f"{facts.get(odd[0])!r}. Go on with the same settings, or choose another folder."
            )

    def _forget_running(self) -> None:
        """A trial that was running when its process was killed never finished."""
        state = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self.study.tell(trial.number, state=state.FAIL)


def mask_of(parameters: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """The bits among a trial's parameters, in their order; the learning rate is none of them.

    Raises:
        ConfigError: not ``count`` bits.
    """
    bits = {int(m[1]): int(v) for n, v in parameters.items() if (m := _BIT.fullmatch(n))}
    if sorted(bits) != list(range(count)):
        raise ConfigError(f"The trial has {len(bits)} bits for {count} groups.")
    return tuple(bits[i] for i in range(count))


def clear(folder: Path) -> Path:
    """An empty folder for a trial; what an interrupted one left there is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _space(config: SearchConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "trials"}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("MemControl's search needs Optuna. Run: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
