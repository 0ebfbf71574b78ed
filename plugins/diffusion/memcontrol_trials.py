"""The inner problem of MemControl: fine-tune with a mask on a share of the data, then measure memory and quality."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import peft_suite as ps
from peft_suite.diffusion.conditioning import EMPTY
from peft_suite.diffusion.denoising import Denoising
from peft_suite.diffusion.drawing import Draws
from peft_suite.diffusion.memcontrol import Group, Trial, clear, groups_of, live_groups, masked
from peft_suite.diffusion.metrics import check_tiles, conditional_norms, copied, frechet, norm_scores
from peft_suite.diffusion.networks import Network
from peft_suite.errors import ConfigError, UnknownNameError
from peft_suite.plugins import find_plugin
from peft_suite.train.config import Recipe, RunConfig
from peft_suite.train.evaluation import evaluate, pick_device
from peft_suite.train.loop import fit
from peft_suite.train.running import data_config, open_plugin
from peft_suite.train.state import seed_everything

__all__ = ["OBJECTIVES", "FineTuning", "Measures", "Share"]

OBJECTIVES: Mapping[str, str] = {
    "max_norm": "memory: the largest conditional norm of a batch, averaged over batches",
    "avg_norm": "memory: the mean conditional norm",
    "copies": "memory: share of drawn images that the tile rule takes for copies of a training image",
    "frechet": "quality: Fréchet distance of drawn images to held-out ones in the features of --features",
    "loss": "quality: the loss on held-out images, with fixed draws of noise",
}


class Share(Dataset[Any]):
    """A fixed part of a training set, drawn by ``seed``; everything that the loop asks of a data set is passed on."""

    def __init__(self, whole: Draws, share: float, seed: int) -> None:
        count = max(1, round(share * len(whole)))
        self.whole = whole
        self.kept = sorted(random.Random(f"memcontrol/{seed}").sample(range(len(whole)), count))
        if hasattr(whole, "group"):
            self.group = lambda index: whole.group(self.kept[index])

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.kept[index]]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew."""
        self.whole.set_epoch(epoch)

    def target(self, index: int) -> int:
        """Class of a sample."""
        return self.whole.target(self.kept[index])


class Measures:
    """What is measured after a trial, on images that are fixed for the whole search.

    Args:
        shown: the training share; memory is measured on it, with its conditions and fixed draws.
        repeats: draws of noise and timestep for each of its images.
        network: of "frechet"; None where that is not asked for.
        images, steps, guidance, seed: how images are drawn.
    """

    def __init__(
        self,
        data: Any,
        shown: Share,
        facts: Mapping[str, Any],
        *,
        network: Network | None = None,
        images: int = 200,
        steps: int = 25,
        guidance: float = 1.0,
        repeats: int = 4,
        batch_size: int = 64,
        seed: int = 0,
        threshold: float = 20.0,
        device: str = "auto",
    ) -> None:
        self.data, self.shown, self.facts, self.network = data, shown, facts, network
        self.images, self.steps, self.guidance, self.seed = images, steps, guidance, seed
        self.repeats, self.batch_size, self.threshold = repeats, batch_size, threshold
        self.device = pick_device(device)
        self.known: Tensor | None = None

    def check(self, objectives: Sequence[str]) -> None:
        """Everything that the objectives need is there, before the first trial.

        Raises:
            UnknownNameError, ConfigError: a name that is none, or what is missing for it.
        """
        for name in objectives:
            if name not in OBJECTIVES:
                raise UnknownNameError("objective", name, OBJECTIVES)
        kind = str(self.facts["kind"])
        if {"max_norm", "avg_norm"} & set(objectives):
            if kind == "unconditional":
                raise ConfigError(
                    "An unconditional model has no conditional norm. Take other objectives, such as copies."
                )
            if kind == "class" and self.facts.get("null") is None:
                raise ConfigError("The model has no class that means none, which the conditional norm compares with.")
        if "frechet" in objectives and self.network is None:
            raise ConfigError("The objective 'frechet' needs --features: a judge's file, inception:FILE, or pixels.")
        if {"loss", "frechet"} & set(objectives) and self.data.val is None:
            raise ConfigError("Quality is measured on held-out images, and there are none. Set data.val_fraction=0.2.")
        if {"copies", "frechet"} & set(objectives) and hasattr(self.shown, "group"):
            raise ConfigError("Drawn images are compared with images of one size. Leave data.buckets out.")
        if "copies" in objectives:
            _, height, width, channels = _pictures(self.shown.whole, self.shown.kept[:1]).shape
            check_tiles(height, width, channels, self.threshold)

    @torch.no_grad()
    def of(self, model: nn.Module, objectives: Sequence[str]) -> dict[str, float]:
        """The objectives of a model."""
        model.to(self.device).eval()
        found: dict[str, float] = {}
        if {"max_norm", "avg_norm"} & set(objectives):
            found |= norm_scores(self.norms(model))
        if {"frechet", "copies"} & set(objectives):
            drawn = self.draw(model)
            if "frechet" in objectives and self.network is not None:
                if self.known is None:
                    self.known = self.network.features(_pictures(self.data.val, range(len(self.data.val))))
                found["frechet"] = frechet(self.known, self.network.features(drawn))
            if "copies" in objectives:
                train = _pictures(self.shown.whole, self.shown.kept)
                found["copies"] = copied(drawn, train, threshold=self.threshold)
        if "loss" in objectives:
            result = evaluate(model, self.data.val, self.data.task, batch_size=self.batch_size, device=self.device)
            found["loss"] = float(result["metrics"]["loss"])
        return {name: found[name] for name in objectives}

    def norms(self, model: nn.Module) -> Iterator[Tensor]:
        """Conditional norms of the shown images, batch by batch."""
        probe = copy.copy(self.shown.whole)
        probe.train, probe.drop, probe.repeats = False, 0.0, self.repeats
        count = len(probe.samples)
        rows = [index + r * count for r in range(self.repeats) for index in self.shown.kept if index < count]
        kind = self.data.task.kind
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            inputs = [probe[row][0] for row in part]
            free = [probe.condition(None, probe.clean(row % count, None), None) for row in part]
            yield conditional_norms(model, kind, self._stack(inputs), self._stack(free))

    def draw(self, model: nn.Module) -> Tensor:
        """uint8 ``[images, H, W, C]``; the same seeds for every trial."""
        from peft_suite.diffusion.sampling import sample

        options: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}
        kind, whole = str(self.facts["kind"]), self.shown.whole
        condition: Any = whole.condition
        if kind == "class":
            options["classes"] = sorted({int(condition.labels[whole.target(i)]) for i in self.shown.kept})
        elif kind == "text":
            said = (text for i in self.shown.kept for text in condition.captions(whole.samples[i % len(whole.samples)]))
            options["prompts"] = [text for text in dict.fromkeys(said) if text != EMPTY][: self.images]
        return sample(model, self.facts, self.images, **options)

    def _stack(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([s[key] for s in samples]).to(self.device) for key in samples[0]}


class FineTuning:
    """``evaluate`` of :class:`peft_suite.diffusion.memcontrol.Search` for a run of the core loop.

    Args:
        base: as for ``train``; its method is the one that is masked, its learning rate is drawn instead.
        objectives: names of :data:`OBJECTIVES`.
        share: of the training images.
        network: see :class:`Measures`; further keywords go there.
        thirteen: 13 bits instead of 16, see :func:`peft_suite.diffusion.memcontrol.groups_of`.
        containing: see :class:`peft_suite.diffusion.methods.subset.SubsetConfig`.
        score: more objectives: name -> ``score(model, measures)``, all minimised.
    """

    def __init__(
        self,
        base: RunConfig,
        objectives: Sequence[str],
        *,
        share: float = 1.0,
        network: Network | None = None,
        thirteen: bool = False,
        containing: str = "",
        score: Mapping[str, Callable[[nn.Module, Measures], float]] | None = None,
        **measured: Any,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"share = {share}: must be above 0 and at most 1.")
        self.base, self.containing, self.score = base, containing, dict(score or {})
        self.own = [name for name in objectives if name not in self.score]
        self.objectives = tuple(objectives)
        plugin = find_plugin(base.plugin)
        backbones, source = open_plugin(plugin)
        chosen = data_config(source, base.replace(data={**base.data, "pictures": 0}))
        classes, _ = source.classes(chosen)
        seed_everything(base.seed)
        one = base.backbone
        self.model = backbones.build(
            one.name, len(classes), pretrained=one.pretrained, checkpoint=one.checkpoint, options=one.options
        )
        facts = backbones.preprocessing(one.name, self.model)
        self.groups: tuple[Group, ...] = live_groups(self.model, base.spec, groups_of(self.model, third=not thirteen))
        self.rows = [row.point for row in ps.plan(self.model, base.spec).rows]
        self.data = source.load(chosen, facts)
        if not isinstance(self.data.train, Draws) or not isinstance(self.data.task, Denoising):
            raise ConfigError("MemControl searches on plain images: leave class_prompt and placeholder out.")
        self.shown = Share(self.data.train, share, base.seed)
        self.data = copy.copy(self.data)
        self.data.train, self.data.test = self.shown, None  # the test images stay unseen
        facts = self.data.info["preprocessing"]  # with the size that the data have
        self.measures = Measures(
            self.data, self.shown, facts, network=network, seed=base.seed, device=base.device, **measured
        )
        self.measures.check(self.own)
        self.metadata = {
            "plugin": base.plugin,
            "task": base.task,
            "backbone": {**one.to_dict(), "num_outputs": len(classes)},
            "classes": list(classes),
            "multi_label": False,
            "preprocessing": facts,
            "data_config": chosen.to_dict(),
        }

    def facts(self) -> dict[str, Any]:
        """What must stay the same within a search."""
        recipe = {k: v for k, v in self.base.recipe.to_dict().items() if k != "lr"}
        return {
            "method": self.base.spec,
            "containing": self.containing,
            "backbone": self.base.backbone.to_dict(),
            "data": dict(self.base.data),
            "images": len(self.shown),
            "recipe": recipe,
            "network": self.measures.network.facts() if self.measures.network else None,
            "drawn": {"images": self.measures.images, "steps": self.measures.steps, "guidance": self.measures.guidance},
            **({"threshold": self.measures.threshold} if "copies" in self.own else {}),
        }

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Train, measure, and leave the model as it was; a mask that leaves nothing measures the frozen model."""
        out = clear(Path(self.base.out) / "trials" / f"{trial.number:03d}")
        trained = 0
        seed_everything(self.base.seed)
        try:
            if self.trains(trial):
                trained = self._train(trial, out)
            found: dict[str, Any] = self.measures.of(self.model, self.own)
            found |= {name: float(score(self.model, self.measures)) for name, score in self.score.items()}
        finally:
            if "adapters" in self.model._modules:
                ps.remove(self.model)
        return {**found, "trained": trained}

    def trains(self, trial: Trial) -> bool:
        """Whether the mask leaves anything of the method."""
        return bool(self.containing) or any(
            not any(p == off or p.startswith(f"{off}.") for off in trial.off) for p in self.rows
        )

    def spec_of(self, trial: Trial) -> dict[str, Any]:
        """The masked method, for training on all the data."""
        return masked(self.base.spec, trial.off, self.containing)

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe with the learning rate of a trial; without validation images it takes the last epoch."""
        select = "last" if self.base.recipe.select == "val" and self.data.val is None else self.base.recipe.select
        return self.base.recipe.replace(lr=trial.learning_rate, select=select)

    def _train(self, trial: Trial, out: Path) -> int:
        spec = self.spec_of(trial)
        plan = ps.plan(self.model, spec)
        ps.adapt(self.model, spec)
        config = self.base.replace(method=spec, out=str(out), data={**self.base.data, "pictures": 0}).to_dict()
        select = "val" if self.data.val is not None else "last"
        recipe = self.recipe_of(trial).replace(select=select, checkpoint_every=0)
        fit(
            self.model,
            self.data,
            recipe,
            task=self.data.task or "classification",
            out=out,
            seed=self.base.seed,
            device=self.base.device,
            workers=0,
            run_info={
                "plugin": self.base.plugin,
                "config": {**config, "recipe": recipe.to_dict()},
                "plan": plan.to_dict(),
                "metadata": self.metadata,
            },
            progress=False,
            verify=False,
        )
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
        return int(ps.summary(self.model).trainable)


def _pictures(dataset: Draws, rows: Sequence[int]) -> Tensor:
    """uint8 ``[N, H, W, C]`` of the images behind samples."""
    reader: Any = dataset.clean.__self__  # type: ignore[attr-defined]
    count = len(dataset.samples)
    return torch.stack([torch.as_tensor(reader.pixels(row % count)) for row in dict.fromkeys(r % count for r in rows)])
