"""The command line without training: what it imports, lists, refuses and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from peft_suite import plugins as registry
from peft_suite.cli.app import build
from peft_suite.cli.settings import assemble, split_methods
from peft_suite.errors import ConfigError, DataError
from peft_suite.plugins import FoundPlugin, MethodEntry, Plugin, VerbEntry

HEAVY = ("torch", "numpy", "accelerate", "matplotlib", "timm", "torchvision", "transformers", "jinja2")
VERBS = ("plan", "train", "eval", "predict", "merge", "export", "bench", "methods", "backbones", "datasets")


def call(*words: str) -> Result:
    return CliRunner().invoke(build(), list(words))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Adds plugins to those that are installed."""

    def add(*items: FoundPlugin) -> None:
        everything = (*registry.plugins(), *items)
        monkeypatch.setattr(registry, "_checked", lambda _: everything)

    return add


def found_plugin(plugin: Plugin) -> FoundPlugin:
    return FoundPlugin(plugin.name, "somebody-else", "1.2", plugin)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["vision", "--help"],
        ["vision", "train", "--help"],
        ["plugins", "--json"],
        ["methods"],
        ["--version"],
    ],
)
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom peft_suite.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print(sorted(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert done.stdout


def test_help_names_every_verb_and_ends_with_an_example() -> None:
    assert "Example: peft-suite" in call("--help").stdout
    group = call("vision", "--help").stdout
    for verb in VERBS:
        assert verb in group
        shown = " ".join(call("vision", verb, "--help").stdout.split())
        assert f"Example: peft-suite vision {verb}" in shown
    for verb in ("doctor", "plugins", "methods", "info", "demo"):
        assert f"Example: peft-suite {verb}" in call(verb, "--help").stdout


@pytest.mark.parametrize("words", [["nonsense"], ["vision", "trian"], ["vision", "train", "--no-such"], ["info"]])
def test_wrong_usage_is_two(words: list[str]) -> None:
    assert call(*words).exit_code == 2


def test_lists_are_pure_json() -> None:
    methods = json.loads(call("methods", "--json").stdout)
    table = {m["name"]: m for m in methods}
    assert {"linear", "lora", "ssf", "vpt"} <= set(table)
    rank = next(f for f in table["lora"]["fields"] if f["name"] == "rank")
    assert rank["type"] == "int"
    preset = {f["name"]: f["default"] for f in table["adaptformer"]["fields"]}
    assert preset["insertion"] == "parallel"
    assert json.loads(call("methods", "lora", "--json").stdout)["name"] == "lora"
    assert {p["name"] for p in json.loads(call("plugins", "--json").stdout)} >= {"core", "vision"}
    assert json.loads(call("vision", "datasets", "--json").stdout)
    assert json.loads(call("vision", "methods", "--json").stdout) == methods
    names = [b["name"] for b in json.loads(call("vision", "backbones", "micro*", "--json").stdout)]
    assert names == ["micro-vit"]


def test_doctor_reports_json_and_success() -> None:
    result = call("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["ok"] is (result.exit_code == 0)
    assert {"python", "library", "device", "plugin", "disk"} <= {c["group"] for c in report["checks"]}


def test_unknown_names_list_the_closest() -> None:
    result = call("methods", "lorra")
    assert result.exit_code == 1
    assert "Did you mean 'lora'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert "micro-vit" in call("vision", "plan", "--backbone", "micro-vti").stderr


def test_broken_plugin_is_listed_and_never_fatal(found: Callable[..., None]) -> None:
    found(FoundPlugin("hearing", "bad-package", "0.1", None, "ImportError: no module named nothing"))
    assert "hearing" not in call("--help").stdout
    row = next(r for r in json.loads(call("plugins", "--json").stdout) if r["name"] == "hearing")
    assert row["status"] == "broken"
    assert "no module named nothing" in row["error"]
    doctor = call("doctor", "--json")
    assert doctor.exit_code == 1
    assert "PEFT_SUITE_DISABLE=hearing" in doctor.stdout


def test_missing_extra_answers_with_one_line(found: Callable[..., None]) -> None:
    plugin = Plugin("smell", "Odours", extra="smell", requires=("nose_lib",), backbones="nose:b", data="nose:d")
    found(found_plugin(plugin))
    assert "smell" in call("--help").stdout
    for words in (["train", "--data", "x"], ["plan"], ["backbones"], ["bench", "--methods", "linear"]):
        result = call("smell", *words)
        assert result.exit_code == 1, words
        assert "pip install 'peft-suite[smell]'" in result.stderr
        assert result.stderr.count("\n") == 1
    assert call("smell", "--help").exit_code == 0


def test_own_verbs_of_a_plugin_are_imported_when_used(found: Callable[..., None]) -> None:
    verb = VerbEntry("shout", f"{__name__}:shout", "Say it loudly")
    gone = VerbEntry("gone", "no_such_module_at_all:f", "Not there")
    plugin = Plugin("noise", "Noise", verbs=(verb, gone), methods=(MethodEntry("m", "x:Y", "s"),))
    found(found_plugin(plugin))
    listing = call("noise", "--help")
    assert "Say it loudly" in listing.stdout
    assert "Not there" in listing.stdout
    assert call("noise", "shout", "hello", "--times", "2").stdout == "HELLO HELLO\n"
    assert "--times" in call("noise", "shout", "--help").stdout


def shout(word: str, times: int = 1) -> None:
    """Say it loudly."""
    print(" ".join([word.upper()] * times))


def test_errors_show_their_traceback_only_on_request(found: Callable[..., None], monkeypatch: Any) -> None:
    found(found_plugin(Plugin("noise", "Noise", verbs=(VerbEntry("fail", f"{__name__}:fail", "Fails"),))))
    quiet = call("noise", "fail")
    assert quiet.exit_code == 1
    assert quiet.stderr == "Error: there [is] no data\n"
    assert isinstance(call("--debug", "noise", "fail").exception, DataError)
    monkeypatch.setenv("PEFT_SUITE_DEBUG", "1")
    assert isinstance(call("noise", "fail").exception, DataError)


def fail() -> None:
    """Fails."""
    raise DataError("there [is] no data")


def test_interrupt_is_130(found: Callable[..., None]) -> None:
    found(found_plugin(Plugin("noise", "Noise", verbs=(VerbEntry("stop", f"{__name__}:stop", "Stops"),))))
    result = call("noise", "stop")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr


def stop() -> None:
    """Stops."""
    raise KeyboardInterrupt


def test_settings_rise_from_file_to_flags_to_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: vpt(num_tokens=5)\nrecipe: {lr: 1e-3, epochs: 3}\ndata: {root: photos}\n")
    words = ["method.deep=true", "recipe.lr=2e-3", "data.shots=4", "backbone.options.img_size=64"]
    config = assemble("vision", file, {"epochs": 7, "data": None}, words)
    assert config.method == {"name": "vpt", "num_tokens": 5, "deep": True}
    assert (config.recipe.lr, config.recipe.epochs) == (2e-3, 7)
    assert config.data == {"root": "photos", "shots": 4}
    assert config.backbone.options == {"img_size": 64}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("recipe.learning_rate=1", "Unknown field 'recipe.learning_rate'"),
        ("recipe.epoch=1", "Did you mean 'epochs'?"),
        ("metod=ssf", "Did you mean 'method'?"),
        ("recipe.epochs=many", "is not of type int"),
        ("recipe.epochs=0", "at least 1"),
        ("recipe", "FIELD=VALUE"),
        ("recipe=5", "must be a mapping"),
        ("seed.x=5", "single value"),
        ("data.root=[", "as YAML"),
        ("plugin=audio", "cannot be set"),
    ],
)
def test_bad_fields_are_named(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        assemble("vision", None, {"seed": 1}, [word])
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "5", "plugin: audio\n", "nothing: 1\n"])
def test_bad_files_are_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        assemble("vision", file, {}, [])
    with pytest.raises(ConfigError, match="does not exist"):
        assemble("vision", tmp_path / "absent.yaml", {}, [])


def test_methods_split_at_outer_commas() -> None:
    assert split_methods("linear, vpt(a=1, b=[1, 2]) ,ssf") == ["linear", "vpt(a=1, b=[1, 2])", "ssf"]
    for bad in ("", ",", "vpt(a=1"):
        with pytest.raises(ConfigError):
            split_methods(bad)


def test_plan_counts_without_training() -> None:
    result = call("vision", "plan", "--backbone", "micro-vit", "--method", "lora(rank=4)", "--classes", "7", "--json")
    plan = json.loads(result.stdout)
    assert plan["method"] == "lora"
    assert plan["trainable"] == sum(r["parameters"] for r in plan["rows"])
    table = call("vision", "plan", "--backbone", "micro-vit", "--method", "lora(rank=4)", "--classes", "7").stdout
    assert f"{plan['trainable']:,}" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "digits-shifted", "--backbone", "micro-vit", "--method", "ssff"], "Did you mean 'ssf'?"),
        (["--data", "digits-shifted", "--backbone", "micro-vit", "data.shot=3"], "Did you mean 'shots'?"),
        (["--data", "digits-shifted", "--backbone", "micro-vit", "--method", "lora(rnk=3)"], "Did you mean 'rank'?"),
        (["--backbone", "micro-vit"], "No data is given"),
    ],
)
def test_train_checks_before_it_writes(tmp_path: Path, words: list[str], said: str) -> None:
    result = call("vision", "train", "--out", str(tmp_path / "run"), *words)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_plan_and_configuration(tmp_path: Path) -> None:
    words = ["--backbone", "micro-vit", "--data", "digits-shifted", "--method", "ssf", "--out", str(tmp_path / "run")]
    result = call("vision", "train", *words, "--dry-run", "recipe.lr=1e-3")
    assert result.exit_code == 0, result.output
    values = yaml.safe_load(result.stdout[result.stdout.index("plugin: vision") :])
    assert values["recipe"]["lr"] == 1e-3
    assert "blocks.0.attn.qkv" in result.stdout
    assert not (tmp_path / "run").exists()


def test_foreign_adapters_are_refused(tmp_path: Path) -> None:
    for words in (["info", str(tmp_path)], ["vision", "eval", str(tmp_path)], ["vision", "merge", str(tmp_path / "x")]):
        result = call(*words)
        assert result.exit_code == 1
        assert str(tmp_path) in result.stderr


def test_help_is_quicker_than_half_of_importing_torch() -> None:
    def seconds(code: str) -> float:
        timed = f"import time; s = time.process_time()\n{code}\nprint(time.process_time() - s)"
        env = {**os.environ, "COLUMNS": "80"}
        runs = [
            subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, env=env)
            for _ in range(3)
        ]
        return min(float(r.stdout.splitlines()[-1]) for r in runs)

    shown = seconds("from peft_suite.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass")
    assert shown < 0.5 * seconds("import torch")


def test_demo_calls_each_plugin_with_what_it_takes(found: Callable[..., None], tmp_path: Path) -> None:
    silent = Plugin("noise", "Noise", demo=f"{__name__}:show")
    needy = Plugin("smell", "Odours", extra="smell", requires=("nose_lib",), demo="nose:demo")
    found(found_plugin(silent), found_plugin(needy))
    result = call("demo", "noise", "--out", str(tmp_path), "--seeds", "2", "--json")
    assert json.loads(result.stdout) == {"noise": {"out": str(tmp_path / "noise"), "seeds": 2, "progress": False}}
    missing = call("demo", "smell")
    assert missing.exit_code == 1
    assert "peft-suite[smell]" in missing.stderr
    assert "has none" in call("demo", "core").stderr


def show(out: Path, seeds: int, progress: bool) -> dict[str, Any]:
    return {"out": str(out), "seeds": seeds, "progress": progress}
