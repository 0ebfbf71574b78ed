"""From a configuration to a finished run: plugin, data, backbone, adapter, training, report."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft_suite as ps
from peft_suite.errors import ConfigError, PeftSuiteError, PluginError
from peft_suite.plugins import Plugin, find_plugin, resolve
from peft_suite.train.config import RunConfig
from peft_suite.train.contracts import Backbones, DataConfig, DataSource
from peft_suite.train.loop import fit
from peft_suite.train.notes import heard
from peft_suite.train.record import RunResult, changed_fields, read_run, run_identity
from peft_suite.train.state import seed_everything

__all__ = ["data_config", "failed_record", "is_main", "open_plugin", "prepared", "run", "run_once", "write_page"]


def run(
    config: RunConfig, *, resume: bool = False, progress: bool = True, begin: Callable[[], None] | None = None
) -> RunResult | list[RunResult]:
    """Do what the configuration says, write the report, and say what to do next.

    With ``config.seeds > 1`` the runs go to ``out/seed-K``, and ``out`` gets a summary with means and spreads.

    Args:
        resume: finished runs are left as they are, interrupted ones go on.
        begin: called in each run when nothing can be refused any more, before the first file is written.

    Returns:
        One result, or a list for several seeds.

    Raises:
        PeftSuiteError: anything wrong with the configuration, the plugin, the data or the training.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
    """
    if config.seeds == 1:
        result = run_once(config, resume=resume, progress=progress, begin=begin)
        if is_main():
            result = RunResult(result.out, result.record, write_page("write_report", result.out))
            _announce(config, [result], result.report, progress)
        return result
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        one = config.replace(seed=seed, seeds=1, out=str(Path(config.out) / f"seed-{seed}"))
        result = run_once(one, resume=resume, progress=progress, begin=begin)
        results.append(
            RunResult(result.out, result.record, write_page("write_report", result.out) if is_main() else None)
        )
    if is_main():
        _announce(config, results, write_page("write_summary", Path(config.out)), progress)
    return results


def run_once(
    config: RunConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    task_name: str = "",
    begin: Callable[[], None] | None = None,
) -> RunResult:
    """One seed, without report. ``task_name`` is recorded for tables; ``begin`` is that of :func:`run`."""
    if config.seeds < 1:
        raise ConfigError(f"RunConfig.seeds = {config.seeds!r}: must be at least 1.")
    out = Path(config.out)
    if resume and (finished := _finished(config, out)):
        if progress and is_main():
            print(f"{out} is already finished: nothing to resume.", file=sys.stderr)
        return finished
    plugin = find_plugin(config.plugin).for_task(config.task)
    backbones, source = open_plugin(plugin)
    chosen = data_config(source, config)
    classes, multi_label = source.classes(chosen)

    seed_everything(config.seed)  # the fresh head and the adapter differ from seed to seed
    backbone = config.backbone
    with heard() as notes:
        model = backbones.build(
            backbone.name,
            len(classes),
            pretrained=backbone.pretrained,
            checkpoint=backbone.checkpoint,
            options=backbone.options,
        )
        method = prepared(backbones, model, config.spec)
        preprocessing = backbones.preprocessing(backbone.name, model)
        data = source.load(chosen, preprocessing)
    notes += _left_out(data.info)
    if notes:
        data.info["notes"] = notes
    if progress and is_main():
        for note in notes:
            print(note, file=sys.stderr)
    if task_name:
        data.info.setdefault("task", task_name)
    plan = ps.plan(model, method)
    ps.adapt(model, method)
    metadata = {
        "plugin": config.plugin,
        "task": config.task,
        "backbone": {**backbone.to_dict(), "num_outputs": len(classes)},
        "classes": list(classes),
        "multi_label": multi_label,
        "preprocessing": data.info.get("preprocessing", preprocessing),  # with the data's own overrides
        "data_config": chosen.to_dict(),
    }
    return fit(
        model,
        data,
        config.recipe,
        task=data.task or "classification",
        out=out,
        seed=config.seed,
        resume=resume,
        device=config.device,
        workers=chosen.workers,
        run_info={"plugin": config.plugin, "config": config.to_dict(), "plan": plan.to_dict(), "metadata": metadata},
        progress=progress,
        begin=begin,
    )


def prepared(backbones: Backbones, model: Any, method: Any) -> Any:
    """``method`` with what the backbone has to say about it; see :class:`peft_suite.train.Backbones`."""
    prepare = getattr(backbones, "prepare", None)
    return prepare(model, method) if prepare else method


def _left_out(info: Mapping[str, Any]) -> list[str]:
    """What ``skip_bad`` has left out, in a line."""
    count, files = info.get("skipped") or 0, info.get("skipped_files") or []
    if not isinstance(count, int) or not count:
        return []
    named = "; ".join(f"{f['name']} ({f['reason']})" for f in files[:5])
    return [f"{count} unusable file{'s' * (count > 1)} left out: {named}{'; ...' if count > 5 else ''}"]


def open_plugin(plugin: Plugin) -> tuple[Backbones, DataSource]:
    """The plugin's backbones and data source.

    Raises:
        MissingExtraError: its requirements are not installed; the install line is given.
        PluginError: it declares no backbones or no data.
    """
    for field in ("backbones", "data"):
        if not getattr(plugin, field):
            raise PluginError(
                f"The plugin {plugin.name!r} declares no {field}, so it cannot be trained with this command."
            )
    return resolve(plugin.backbones, plugin), resolve(plugin.data, plugin)


def data_config(source: DataSource, config: RunConfig) -> DataConfig:
    """``config.data`` as the plugin's own data configuration."""
    drawn = {"split_seed": config.seed} if config.resample else {}
    return source.config.from_dict({**config.data, **drawn})


def _finished(config: RunConfig, out: Path) -> RunResult | None:
    record = read_run(out)
    if record is None or record["status"] != "finished":
        return None
    changed_fields(out, run_identity(record["config"]), run_identity(config.to_dict()))
    return RunResult(out, record)


def write_page(writer: str, out: Path) -> Path | None:
    """Write a page; a run is never lost because its page could not be drawn."""
    try:
        import peft_suite.report as report

        page: Path = getattr(report, writer)(out)
        return page
    except (PeftSuiteError, ImportError, OSError) as error:
        warnings.warn(f"The report of {out} could not be written: {error}", stacklevel=3)
        return None


def _announce(config: RunConfig, results: list[RunResult], page: Path | None, progress: bool) -> None:
    if not progress:
        return
    scores = [result.score for result in results]
    known = [score for score in scores if score is not None]
    if known:
        spread = f" (seeds: {', '.join(f'{s:.4f}' for s in known)})" if len(known) > 1 else ""
        split = "test" if results[0].record["final"]["test"] else "val"
        print(f"{split} {results[0].record['metric']} {sum(known) / len(known):.4f}{spread}")
    adapter = results[0].adapter
    size = results[0].record["adapter"]["bytes"]
    print(f"adapter  {adapter}  ({size / 1024:.1f} KiB)")
    if page:
        print(f"report   {page}")
    print("next:")
    print(f"  peft-suite {config.plugin} {find_plugin(config.plugin).use.format(adapter=adapter)}")
    if results[0].record["method"]["plan"]["mergeable"]:
        print(f"  peft-suite {config.plugin} merge {adapter}")
    else:
        print(f"  peft-suite {config.plugin} export {adapter} exported --format torch-export")
    print(f"  peft-suite info {adapter}")


def is_main() -> bool:
    """The process that writes, before and after an Accelerator exists."""
    import os

    return int(os.environ.get("RANK", "0")) == 0


def failed_record(config: RunConfig, error: BaseException, task_name: str) -> dict[str, Any]:
    """A ``run.json`` for a run that failed before training began."""
    from peft_suite.train.record import versions

    return {
        "format": 1,
        "status": "failed",
        "plugin": config.plugin,
        "config": config.to_dict(),
        "seed": config.seed,
        "versions": versions(),
        "data": {"info": {"task": task_name} if task_name else {}},
        "history": [],
        "error": f"{type(error).__name__}: {error}",
    }
