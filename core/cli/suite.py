"""Named recipes and suites on the command line: the verb ``recipes``, ``train --recipe`` and ``bench --suite``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_suite.cli.common import plugin_of
from peft_suite.cli.console import note, show_json, show_mapping, show_table
from peft_suite.cli.root import Json
from peft_suite.cli.settings import assemble, overrides
from peft_suite.errors import ConfigError, DataError
from peft_suite.plugins import Plugin, methods, resolve
from peft_suite.train.suites import Book, NamedRecipe, Suite

if TYPE_CHECKING:
    from peft_suite.train.config import RunConfig
    from peft_suite.train.grid import Job

__all__ = ["book_of", "list_recipes", "plan_suite", "recipe_fields"]


def book_of(plugin: Plugin) -> Book:
    """The plugin's suites and recipes.

    Raises:
        ConfigError: it has none.
    """
    if not plugin.recipes:
        raise ConfigError(f"The plugin {plugin.name!r} has no suites and no named recipes. Give the fields yourself.")
    book: Book = resolve(plugin.recipes)
    return book


def recipe_fields(plugin: Plugin, name: str | None, task: str | None) -> dict[str, Any]:
    """What ``train --recipe NAME --task TASK`` starts from; empty without a recipe."""
    if name is None:
        return {}
    book = book_of(plugin)
    recipe = book.recipe(name)
    suite = book.suite(recipe.suite)
    if task is None and len(suite.tasks) > 1:
        raise ConfigError(
            f"The recipe {name!r} is for {len(suite.tasks)} tasks. Say --task, one of {', '.join(suite.tasks)}."
        )
    return recipe.run_fields(suite, suite.find(task) if task else suite.tasks[0])


def plan_suite(
    plugin: Plugin,
    suite_name: str,
    entries: Sequence[str],
    out: Path,
    *,
    config: Path | None,
    flags: Mapping[str, Any],
    words: Sequence[str],
    seeds: int,
    tasks: str,
    available: bool,
) -> list[Job]:
    """The jobs of a suite, and ``out/suite.json``, which says what they are.

    Raises:
        DataError: some tasks have no data; all of them are listed, and ``available`` leaves them out.
    """
    from peft_suite.storage import write_json
    from peft_suite.train.grid import Job, job_folder

    book = book_of(plugin)
    suite = book.suite(suite_name)
    wanted = [suite.find(t.strip()) for t in tasks.split(",") if t.strip()] or list(suite.tasks)
    recipes = {entry: book.choose(entry, suite.name) for entry in entries}
    bases = {
        (entry, task): assemble(plugin.name, config, flags, words, recipe.run_fields(suite, task))
        for entry, recipe in recipes.items()
        for task in wanted
    }
    left_out = _without_data(suite, wanted, bases, available)
    first = flags.get("seed")
    jobs = [
        Job(task, entry, seed, bases[entry, task].replace(seed=seed, seeds=1))
        for task in wanted
        if task not in left_out
        for entry, recipe in recipes.items()
        for seed in (recipe.take_seeds(seeds) if first is None else range(first, first + seeds))
    ]
    given = {**{k: v for k, v in flags.items() if v is not None and k != "data"}, **dict(overrides(words))}
    changed = ", ".join([*([str(config)] if config else []), *(f"{k}={v}" for k, v in given.items())])
    plan = {
        "format": 1,
        "suite": suite.name,
        "title": suite.summary,
        "groups": suite.groups,
        "tasks": wanted,
        "methods": [
            _method(entry, recipe, next(b for (e, _), b in bases.items() if e == entry), changed)
            for entry, recipe in recipes.items()
        ],
        "runs": [
            {"task": j.task, "method": j.method, "seed": j.seed, "folder": job_folder(j).as_posix()} for j in jobs
        ],
        "left_out": left_out,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "suite.json", plan)
    return jobs


def list_recipes(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="One recipe, in detail.", show_default=False)] = "",
    suite: Annotated[str, typer.Option(help="Only the recipes of this suite.")] = "",
    json: Json = False,
) -> None:
    """List the suites and the named recipes, or show one with every value and its source."""
    book = book_of(plugin_of(ctx))
    registered = methods()
    if name:
        recipe = book.recipe(name)
        shown = {**recipe.to_dict(), "registered": recipe.method_name in registered}
        if json:
            show_json(shown)
            return
        tasks = shown.pop("tasks")
        show_mapping(shown)
        rows = [{"task": task, **values} for task, values in tasks.items()]
        if rows:
            show_table(rows, {key: key for key in dict.fromkeys(k for row in rows for k in row)})
        return
    if suite:
        book.suite(suite)
    rows = [
        {
            "name": recipe.name,
            "suite": recipe.suite,
            "method": recipe.method_name,
            "registered": recipe.method_name in registered,
            "backbone": str(recipe.backbone.get("name", "")),
            "preprocess": str(recipe.data.get("preprocess", "")),
            "selects_on": recipe.selects_on,
            "reproduces": recipe.reproduces,
            "source": recipe.source,
        }
        for recipe in book.recipes.values()
        if suite in ("", recipe.suite)
    ]
    if json:
        suites = [{"name": s.name, "summary": s.summary, "groups": s.groups} for s in book.suites.values()]
        show_json({"suites": suites, "recipes": rows})
        return
    show_table(
        [{"name": s.name, "summary": s.summary, "n": len(s.tasks)} for s in book.suites.values()],
        {"name": "suite", "summary": "", "n": "tasks"},
    )
    columns = {"name": "recipe", "method": "method", "backbone": "checkpoint", "selects_on": "epoch chosen on"}
    show_table(rows, {**columns, "source": "source"})


def _without_data(
    suite: Suite, wanted: Sequence[str], bases: Mapping[tuple[str, str], RunConfig], available: bool
) -> dict[str, str]:
    """Task -> what is missing of it."""
    found: dict[str, str] = {}
    for (_, task), base in bases.items():
        root = str(base.data.get("root") or "")
        if not root:
            raise ConfigError(f"No data is given. Say --data ROOT, a folder that holds the tasks of {suite.name}.")
        if task not in found and (reason := suite.missing(root, task, base.data)):
            found[task] = reason
    if found and (not available or len(found) == len(wanted)):
        listing = "\n".join(f"  {task}: {reason}" for task, reason in found.items())
        advice = "" if len(found) == len(wanted) else "\nRun the others only with --available."
        raise DataError(f"{len(found)} of {len(wanted)} tasks of {suite.name} have no data:\n{listing}{advice}")
    for task, reason in found.items():
        note(f"Left out: {task}: {reason}")
    return found


def _method(entry: str, recipe: NamedRecipe, config: RunConfig, changed: str) -> dict[str, Any]:
    """What the page says of one method."""
    source = recipe.published.get("source")
    chosen = {"nothing": "the last one, on no data", "val": "validation data", "test": "test data"}[
        {"last": "nothing"}.get(config.recipe.select, config.recipe.select)
    ]
    told = {
        "recipe": recipe.name,
        "what": recipe.summary,
        "checkpoint": config.backbone.checkpoint or config.backbone.name,
        "preprocessing": config.data.get("preprocess") or "the backbone's own",
        "splits": config.data.get("splits"),
        "epoch chosen by": chosen,
        "values per task": recipe.tuning,
        "source": recipe.source,
        "published results": source,
        "departs from the source": "; ".join(recipe.departures),
        "set on the command line": changed,
    }
    from peft_suite.report.rendering import facts

    return {
        "label": entry,
        "recipe": recipe.name,
        "method": config.spec,
        "backbone": config.backbone.name,
        "select": config.recipe.select,
        "published": dict(recipe.published),
        "parameters": dict(recipe.parameters),
        "facts": facts(told),
    }
