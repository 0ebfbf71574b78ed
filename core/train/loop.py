"""The training loop, in reading order: set up, train, evaluate and select, checkpoint, conclude."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.errors import DataError, StorageError, TrainingError
from peft_suite.storage import write_json
from peft_suite.train.averaging import Average
from peft_suite.train.config import Recipe
from peft_suite.train.contracts import DataSplits
from peft_suite.train.display import Display
from peft_suite.train.evaluation import autocast, collect, predictor, to_device
from peft_suite.train.loader import batches, epoch_plan, global_batches, groups_of, targets_of
from peft_suite.train.mixing import make_mixing
from peft_suite.train.optim import build_optimizer, describe_groups, lr_at, set_lr
from peft_suite.train.pictures import draw
from peft_suite.train.record import (
    PeakMemory,
    RunResult,
    changed_fields,
    choose_examples,
    platform_facts,
    read_run,
    run_identity,
    versions,
    write_thumbnails,
)
from peft_suite.train.selection import Selection
from peft_suite.train.setup import (
    Restartable,
    check_recipe,
    make_accelerator,
    restored_forward,
    set_epoch,
    train_split,
)
from peft_suite.train.state import (
    read_checkpoint,
    rng_state,
    seed_everything,
    set_rng_state,
    write_checkpoint,
)
from peft_suite.train.stopping import StopRequest
from peft_suite.train.task import Task, as_task
from peft_suite.train.trained import TrainedAdapters

__all__ = ["fit"]


def fit(
    model: nn.Module,
    data: DataSplits,
    recipe: Recipe,
    *,
    task: str | Task = "classification",
    out: str | Path,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int = 0,
    run_info: Mapping[str, Any] | None = None,
    progress: bool = True,
    verify: bool = True,
    begin: Callable[[], None] | None = None,
) -> RunResult:
    """Train the open parameters of an adapted model; afterwards the model carries the selected state.

    The loss of a step is ``sum(loss) / sum(mass)`` over the global batch, so processes and accumulation change the
    speed, not the curve (dropout and mixup partners excepted: each process draws its own). Ctrl-C and SIGTERM write a
    checkpoint and raise KeyboardInterrupt.

    Args:
        model: a model with at least one adapter; it is moved to the device.
        out: run directory: ``run.json``, ``examples.json``, ``adapter/``, ``checkpoint/state.safetensors``.
        resume: go on from the checkpoint in ``out``; without one the run starts from the beginning. The model must
            have been built as for the first start.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; processes come from ``torchrun`` or ``accelerate launch``.
        workers: data loader processes.
        run_info: ``{"plugin", "config", "plan", "metadata"}``; metadata travels in the adapter file.
        verify: prove on the first batch that every part of the adapter takes part.
        begin: called when nothing can be refused any more, before the first file is written into ``out``.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint is kept.
        ConfigError: the recipe does not fit the data, or a resumed run was started with another configuration.
        DataError: a split that the recipe needs is missing, or labels are out of range.
    """
    training = _Training(model, data, recipe, task, Path(out), seed, device, workers, dict(run_info or {}))
    return training.execute(resume=resume, progress=progress, verify=verify, begin=begin)


class _Training:
    """State of one run. ``epoch`` and ``step`` are the next position; ``step == steps`` means evaluation is due."""

    def __init__(
        self,
        model: nn.Module,
        data: DataSplits,
        recipe: Recipe,
        task: str | Task,
        out: Path,
        seed: int,
        device: str,
        workers: int,
        info: dict[str, Any],
    ) -> None:
        self.model, self.data, self.recipe, self.out, self.seed = model, data, recipe, out, seed
        self.workers, self.info = workers, info
        self.events = ps.events(model)  # AdapterError at once when the model carries no adapter
        self.trained = TrainedAdapters(model)
        self.task = as_task(task, data.classes, data.multi_label)
        self.train_data = train_split(data)
        check_recipe(recipe, data)
        self.accelerator = make_accelerator(recipe, device, out)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.predict = predictor(self.task)
        self.groups = groups_of(self.train_data)
        self.steps = len(self.global_batches(0))  # of every epoch
        self.total = recipe.max_steps or recipe.epochs * self.steps
        self.epochs = -(-self.total // self.steps)
        self.checkpoint_file = out / "checkpoint" / "state.safetensors"
        self.epoch = self.step = 0
        self.loss_sum, self.samples, self.epoch_seconds = 0.0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.selection = Selection(recipe, self.task.primary)
        self.average: Average | None = None
        self.pictures: list[dict[str, str]] = []
        self.train_seconds = self.earlier_seconds = 0.0
        self.saved_at = ""
        self.begun = self.adapter_saved = False
        self.started = time.perf_counter()
        self.stop = StopRequest()

    # ---- the whole run -------------------------------------------------------------------------------------------

    def execute(
        self, *, resume: bool, progress: bool, verify: bool, begin: Callable[[], None] | None = None
    ) -> RunResult:
        state = self.read_checkpoint() if resume else None
        record = read_run(self.out) if resume else None
        show = progress and self.main
        if state and record and record["status"] == "finished":
            if show:
                print(f"{self.out} is already finished: nothing to resume.", file=sys.stderr)
            self.trained.take_plans(state)
            self.trained.load(
                state["best_state"] or {**state["adapters"], **state.get("average", {}).get("values", {})}
            )
            return RunResult(self.out, record)
        with restored_forward(self.model), self.stop:
            self.display = Display(enabled=False, epochs=0, steps=0, epoch=0, metric="")
            try:
                self.set_up(state, show=show, verify=verify, begin=begin)
                self.train()
                return self.conclude()
            except KeyboardInterrupt:
                if self.begun:
                    self.write_record("interrupted")
                raise
            except Exception as error:
                if self.begun:
                    self.write_record("failed", error=f"{type(error).__name__}: {error}")
                raise
            finally:
                self.display.close()
                self.accelerator.end_training() if self.recipe.tracker != "none" else None

    def set_up(
        self, state: dict[str, Any] | None, *, show: bool, verify: bool, begin: Callable[[], None] | None
    ) -> None:
        seed_everything(self.seed)
        self.memory = PeakMemory(self.device)
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, self.recipe)

        targets = targets_of(self.train_data)
        self.task.check(targets, "train")
        self.class_weights = None
        if self.recipe.class_weights == "balanced":
            self.class_weights = self.task.class_weights(targets).to(self.device)
        self.mixing = make_mixing(self.recipe, self.task, self.data.multi_label)

        set_epoch(self.train_data, 0)
        if verify and state is None:
            inputs, _, _ = next(self.batches(0, 0, 1))[0]
            ps.verify(self.model, to_device(inputs, self.device), self.predict)
            self.model.zero_grad(set_to_none=True)
        if begin is not None:
            begin()
        self.begun = True  # from here on run.json tells of this run; what is refused earlier leaves the folder alone
        self.write_record("running")
        if state is not None:
            self.trained.take_plans(state)
        elif any(method.capabilities.needs_calibration for method in self.trained.methods()):
            self.calibrate()
        if self.trained.plans():
            self.optimizer = build_optimizer(self.model, self.recipe)

        self.model.train()
        self.wrapped: Any = self.accelerator.prepare_model(self.model) if self.world > 1 else self.model
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer)
        seed_everything(self.seed + 7919 * self.rank)  # processes must not drop the same units
        if self.recipe.ema:
            self.average = Average(self.model, self.trained.names, self.recipe.ema)
        if state is not None:
            self.restore(state)
        self.events.begin(self.total)
        if self.recipe.tracker == "tensorboard":
            self.accelerator.init_trackers("tensorboard")
        self.display = Display(
            enabled=show, epochs=self.epochs, steps=self.steps, epoch=self.epoch, metric=self.task.primary
        )
        self.display.say(describe_groups(self.optimizer))
        for adapter in self.events.adapters:
            if adapter.method.decision:
                self.display.say(f"{adapter.method.name}: {adapter.method.decision}")
        if state is not None:
            self.display.say(f"resumed from {self.saved_at}")
        else:
            self.draw("before")

    def calibrate(self) -> None:
        """Show ``calibration_batches`` global batches (or all), the same on every process, to methods asking for it."""
        every = any(a.method.capabilities.calibrates_on_all for a in self.events.adapters)
        size = len(self.train_data)  # type: ignore[arg-type]
        plan = epoch_plan(size, self.recipe.batch_size, 1, seed=self.seed, epoch=0, groups=self.groups)

        def stream() -> Iterator[tuple[Any, Any]]:
            shown = plan if every else plan[: self.recipe.calibration_batches]
            for step in batches(self.train_data, shown, workers=self.workers, seed=self.seed):
                inputs, targets, _ = step[0]
                yield to_device(inputs, self.device), to_device(targets, self.device)

        def loss(batch: tuple[Any, Any]) -> Tensor:
            with autocast(self.device, self.recipe.precision):
                output = self.predict(self.model, batch[0])
            return self.task.loss(output, batch[1]).mean()

        self.model.train()
        self.events.calibrate(Restartable(stream), loss)
        self.model.zero_grad(set_to_none=True)

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        while self.epoch < self.epochs and not self.selection.exhausted(self.history, self.epoch):
            if self.step < self.steps_now():
                self.train_epoch()
            self.close_epoch()
        if self.step or not self.saved_at.startswith(f"epoch {self.epoch},"):
            self.write_checkpoint()

    def steps_now(self) -> int:
        """Steps of this epoch: fewer in the last one where ``max_steps`` ends it."""
        return min(self.steps, self.total - self.epoch * self.steps)

    def global_batches(self, epoch: int) -> list[list[int]]:
        """Sample indices of every step of an epoch, over all processes."""
        size = len(self.train_data)  # type: ignore[arg-type]
        return global_batches(size, self.recipe.batch_size, seed=self.seed, epoch=epoch, groups=self.groups)

    def batches(self, epoch: int, start: int, stop: int | None = None) -> Iterator[list[tuple[Any, Any, float]]]:
        """This process's micro-batches of the steps ``start`` to ``stop`` of an epoch."""
        plan = epoch_plan(
            len(self.train_data),  # type: ignore[arg-type]
            self.recipe.batch_size,
            self.recipe.accumulate,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world=self.world,
            groups=self.groups,
        )
        pin = self.device.type == "cuda"
        seed = self.seed * 1_000_003 + epoch
        return batches(self.train_data, plan[start:stop], workers=self.workers, seed=seed, pin=pin)

    def train_epoch(self) -> None:
        self.model.train()
        set_epoch(self.train_data, self.epoch)
        sizes = [len(batch) for batch in self.global_batches(self.epoch)]
        clock = time.perf_counter()
        for micros in self.batches(self.epoch, self.step, self.steps_now()):
            loss, stop = self.train_step(micros)
            count = sizes[self.step]
            self.step += 1
            self.loss_sum += loss * count
            self.samples += count
            now = time.perf_counter()
            self.epoch_seconds += now - clock
            self.train_seconds += now - clock
            clock = now
            self.display.step(self.step, loss)
            if stop:
                self.interrupt()

    def train_step(self, micros: list[tuple[Any, Any, float]]) -> tuple[float, bool]:
        """One optimizer step. Returns the loss of the global batch and whether any process was asked to stop."""
        number = self.epoch * self.steps + self.step
        lr = lr_at(number, self.recipe, self.steps)
        set_lr(self.optimizer, lr)
        moved = [(to_device(x, self.device), to_device(y, self.device), weight) for x, y, weight in micros]
        parts = [(*self.mixing(x, y), weight) for x, y, weight in moved] if self.mixing else moved
        masses = [weight * self.task.mass(y, self.class_weights).sum() for _, y, weight in parts]
        mass = torch.stack(masses).sum()
        mass = self.accelerator.reduce(mass) if self.world > 1 else mass
        smoothing = 0.0 if self.mixing else self.recipe.label_smoothing  # mixed targets are smooth already
        total = torch.zeros((), device=self.device)
        for index, (inputs, targets, weight) in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with autocast(self.device, self.recipe.precision), self.memory.counting():
                    output = self.predict(self.wrapped, inputs)
                each = self.task.loss(output, targets, smoothing=smoothing, class_weights=self.class_weights)
                loss = weight * each.sum() / mass
                penalty = self.events.penalty() if last else None
                if penalty is not None:
                    loss = loss + penalty / self.world
                self.accelerator.backward(loss * self.world)  # data-parallel averages gradients; we want their sum
            total += loss.detach()
        told = torch.stack(
            [total.double(), torch.tensor(float(self.stop.wanted), dtype=torch.float64, device=self.device)]
        )
        value, asked = (self.accelerator.reduce(told) if self.world > 1 else told).tolist()
        if not math.isfinite(value):
            self.refuse(value, lr)
        self.accelerator.unscale_gradients()
        self.events.before_step(number, self.optimizer)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g["params"]], self.recipe.clip_norm
            )
        self.stepper.step()
        self.events.after_step(number, self.optimizer)
        self.stepper.zero_grad()
        if self.average:
            self.average.update()
        if self.recipe.tracker != "none":
            self.accelerator.log({"train/loss": value, "train/lr": lr}, step=number)
        return value, asked > 0

    def refuse(self, value: float, lr: float) -> None:
        where = f"The last good checkpoint is {self.checkpoint_file} ({self.saved_at})."
        raise TrainingError(
            f"The loss is {value} at epoch {self.epoch + 1}, step {self.step + 1} of {self.steps} (learning rate "
            f"{lr:g}). {where if self.saved_at else 'There is no checkpoint yet.'} Use a lower lr, clip_norm=1 or "
            "precision='no', and look for broken samples."
        )

    # ---- evaluation and selection --------------------------------------------------------------------------------

    def close_epoch(self) -> None:
        """Evaluate where due, write the history line, select, checkpoint, and move to the next epoch."""
        due = (self.epoch + 1) % self.recipe.eval_every == 0 or self.epoch + 1 == self.epochs
        with self.averaged():
            val = self.metrics("val") if due else None
            test = self.metrics("test") if due and self.recipe.select == "test" else None
        number = self.epoch * self.steps + self.steps_now()
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "step": number,
            "lr": lr_at(number - 1, self.recipe, self.steps),
            "train_loss": self.loss_sum / max(self.samples, 1),
            "seconds": round(self.epoch_seconds, 4),
            "samples_per_s": round(self.samples / max(self.epoch_seconds, 1e-9), 2),
            "val": val,
            "test": test,
        }
        self.history.append(entry)
        with self.averaged():
            if self.selection.better(entry):
                self.selection.state = {k: v.detach().cpu().clone() for k, v in self.trained.state().items()}
                self.save_adapter()
            if self.recipe.sample_every and (self.epoch + 1) % self.recipe.sample_every == 0:
                self.draw(f"epoch {self.epoch + 1}")
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.samples, self.epoch_seconds = 0.0, 0, 0.0
        self.display.epoch(entry)
        if self.recipe.tracker != "none":
            scalars = {f"{s}/{k}": v for s in ("val", "test") for k, v in (entry[s] or {}).items() if v is not None}
            self.accelerator.log(scalars, step=number)
        every = self.recipe.checkpoint_every
        if self.agreed_stop():
            self.interrupt()
        if every and self.epoch % every == 0:
            self.write_checkpoint()
        self.write_record("running")

    def metrics(self, split: str) -> dict[str, float | None] | None:
        found = self.outputs(split)
        return self.task.metrics(*found) if found else None

    def outputs(self, split: str) -> tuple[Tensor, Tensor] | None:
        dataset = getattr(self.data, split)
        if dataset is None:
            return None

        def stop() -> None:
            if self.stop.wanted and self.world == 1:  # several processes must agree first: after the evaluation
                self.interrupt()

        output, target = collect(
            self.model,
            dataset,
            batch_size=max(self.recipe.batch_size // self.world, 1),
            device=self.device,
            workers=self.workers,
            precision=self.recipe.precision,
            rank=self.rank,
            world=self.world,
            gather=self.accelerator.gather,
            stop=stop,
            reduce=getattr(self.task, "reduce", None),
            call=self.predict,
            sorts=getattr(dataset, "group", None),
        )
        if target is None:
            raise DataError(f"The {split} split has no targets: samples must be (input, target).")
        self.task.check(target, split)
        return output, target

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the adapters have their averaged values, where the recipe asks for an average."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def draw(self, moment: str) -> None:
        """Let the task draw what the model makes now; see :class:`peft_suite.train.Task`."""
        if self.main:
            self.pictures += draw(self.task, self.model, self.out, moment)
        self.accelerator.wait_for_everyone()

    # ---- checkpoints and stopping --------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for two starts to be one run."""
        config = self.info.get("config") or {"recipe": self.recipe.to_dict()}
        methods = {f"adapters.{name}": str(config) for name, config in self.trained.started_as.items()}
        return {**run_identity(config), **methods, "seed": self.seed, "data_fingerprint": self.data.fingerprint}

    def write_checkpoint(self) -> None:
        """Everything that continuing needs, in one atomic file; the previous one stays until this one is complete."""
        ranks = gather_object([rng_state()]) if self.world > 1 else [rng_state()]
        scaler = self.accelerator.scaler
        position = f"epoch {self.epoch}, step {self.step}"
        if self.main:
            write_checkpoint(
                self.checkpoint_file,
                {
                    "identity": self.identity(),
                    "epoch": self.epoch,
                    "step": self.step,
                    "loss_sum": self.loss_sum,
                    "samples": self.samples,
                    "epoch_seconds": self.epoch_seconds,
                    "train_seconds": self.train_seconds,
                    "total_seconds": self.total_seconds(),
                    "history": self.history,
                    "best": self.selection.best,
                    "best_state": self.selection.state,
                    "adapters": self.trained.state(),
                    "average": self.average.state() if self.average else {},
                    "pictures": self.pictures,
                    "plans": self.trained.plans(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "rng": ranks,
                },
            )
        self.accelerator.wait_for_everyone()
        self.saved_at = position

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one and it belongs to this very run."""
        if not self.checkpoint_file.exists():
            return None
        state = read_checkpoint(self.checkpoint_file)
        changed_fields(self.out, state["identity"], self.identity())
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.trained.load(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum, self.samples, self.epoch_seconds = state["loss_sum"], state["samples"], state["epoch_seconds"]
        self.train_seconds, self.earlier_seconds = state["train_seconds"], state["total_seconds"]
        self.history, self.selection.best, self.selection.state = state["history"], state["best"], state["best_state"]
        self.adapter_saved = bool(self.selection.state)
        self.pictures = state.get("pictures", [])
        if self.average:
            self.average.load(state["average"])
        if self.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.rank])
        self.saved_at = f"epoch {self.epoch}, step {self.step}"

    def agreed_stop(self) -> bool:
        if self.world == 1:
            return self.stop.wanted
        asked = torch.tensor(float(self.stop.wanted), device=self.device)
        return bool(self.accelerator.reduce(asked) > 0)

    def interrupt(self) -> None:
        """Write a checkpoint and leave as Ctrl-C does."""
        if self.average:
            self.average.put_back()
        self.write_checkpoint()
        self.display.close()
        self.display.say(f"Interrupted at {self.saved_at}; checkpoint written. Continue with --resume.")
        raise KeyboardInterrupt(f"checkpoint at {self.saved_at}")

    # ---- results -------------------------------------------------------------------------------------------------

    def conclude(self) -> RunResult:
        """Load the selected state, evaluate it on every split, save the adapter and write the record."""
        if self.selection.state:
            self.trained.load(self.selection.state)
        elif self.average:
            self.average.adopt()
        self.events.finish()
        final: dict[str, Any] = {"val": None, "test": None, "per_class": None}
        confusion, maps = None, None
        examples: list[dict[str, Any]] = []
        for split in ("val", "test"):  # test comes last: where it exists, details are of test
            found = self.outputs(split)
            if found:
                final[split] = self.task.metrics(*found)
                final["per_class"] = self.task.per_class(*found)
                confusion = self.task.confusion(*found)
                outcome = self.task.outcome(*found)
                examples, maps = (choose_examples(outcome, self.data, split), outcome.maps) if self.main else ([], None)
        self.save_adapter()
        self.draw("after")
        if self.main:
            write_thumbnails(self.out, self.data, examples, maps)
        record = self.write_record("finished", final=final, confusion=confusion, examples=examples)
        self.accelerator.wait_for_everyone()
        self.model.eval()
        return RunResult(self.out, record)

    def save_adapter(self) -> None:
        if self.main:
            self.trained.save(self.out / "adapter", self.info.get("metadata"))
        self.adapter_saved = True
        self.accelerator.wait_for_everyone()

    def total_seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def write_record(self, status: str, *, error: str | None = None, **parts: Any) -> dict[str, Any]:
        steps = min(self.epoch * self.steps + self.step, self.total)
        methods = [method.config for method in self.trained.methods()]
        files = sorted(p for p in (self.out / "adapter").rglob("*.safetensors")) if self.adapter_saved else []
        record = {
            "format": 1,
            "status": status,
            "plugin": self.info.get("plugin"),
            "config": self.info.get("config") or {"recipe": self.recipe.to_dict()},
            "seed": self.seed,
            "versions": versions(),
            "platform": platform_facts(self.device, self.world, self.recipe.precision),
            "data": {
                "fingerprint": self.data.fingerprint,
                "classes": list(self.data.classes),
                "multi_label": self.data.multi_label,
                "info": self.data.info,
            },
            "method": {
                "name": "+".join(m.method for m in methods),
                "config": methods[0].to_dict() if len(methods) == 1 else [m.to_dict() for m in methods],
                "plan": self.info.get("plan"),
            },
            "parameters": ps.summary(self.model).to_dict(),
            "metric": self.task.primary,
            "history": self.history,
            "best": self.selection.best,
            "final": {"val": None, "test": None, "per_class": None},
            "confusion": None,
            "examples": [],
            "pictures": self.pictures,
            "time": {
                "total_s": round(self.total_seconds(), 3),
                "train_s": round(self.train_seconds, 3),
                "per_step_ms": round(1000 * self.train_seconds / steps, 3) if steps else None,
            },
            "memory": {"peak_mib": self.memory.mib(self.model, self.optimizer) if hasattr(self, "optimizer") else None},
            "adapter": {"path": "adapter", "bytes": sum(p.stat().st_size for p in files)} if files else None,
            "error": error,
            **parts,
        }
        if self.main:
            with contextlib.suppress(StorageError) if error else contextlib.nullcontext():
                write_json(self.out / "run.json", record)
        return record
