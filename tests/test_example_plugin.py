"""A stranger's distribution: installed by pip into an environment of its own, found, and as good as ours."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_suite import plugins as registry
from peft_suite.errors import PluginError
from peft_suite.testing.runner import everything

SOURCE = Path(__file__).parent / "example_plugin"
COSTLY = ("compile", "checkpointing_compiled", "export", "ddp", "fsdp", "adapt_after_sharding")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that sees ours and has the example installed."""
    root = tmp_path_factory.mktemp("stranger")
    venv.create(root / "env", with_pip=False, symlinks=True)
    interpreter = root / "env" / "bin" / "python"
    packages = subprocess.check_output(
        [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    ours = [p for p in site.getsitepackages() if Path(p).is_dir()]
    lines = [f"import site; site.addsitedir({p!r})" for p in ours]
    (Path(packages.strip()) / "ours.pth").write_text("\n".join(lines) + "\n")
    shutil.copytree(SOURCE, root / "source")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", *offline, str(root / "source")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return interpreter


def _run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COV_"))}
    return subprocess.run([python, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_it_is_found_without_importing_torch(python: Path, tmp_path: Path) -> None:
    """Plugin, method and backbone family are listed with the distribution they come from."""
    code = (
        "import json, sys\n"
        "from peft_suite.plugins import methods, plugins\n"
        "entry, found = methods()['gate']\n"
        "families = [a.family for p in plugins() if p.name == 'example' for a in p.plugin.anatomies]\n"
        "print(json.dumps([found.distribution, found.version, entry.summary, families, 'torch' in sys.modules]))\n"
    )
    done = _run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    distribution, version, summary, families, heavy = json.loads(done.stdout)
    assert (distribution, version, families, heavy) == ("peft-suite-example", "1.2", ["tiny-former"], False)
    assert "gain" in summary


def test_the_command_line_lists_it(python: Path, tmp_path: Path) -> None:
    done = _run(python, "-m", "peft_suite.cli", "methods", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gate" in done.stdout
    assert "peft-suite-example" in done.stdout


def test_it_passes_the_suite(python: Path, tmp_path: Path) -> None:
    """The one line that its author writes. Expensive checks run for its own pair, and for all in ``make test-all``."""
    chosen = [] if everything() else ["-k", f"gate-tiny-former or not ({' or '.join(COSTLY)})"]
    suite = str(SOURCE / "check_conformance.py")
    done = _run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite, *chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path whose ``*.dist-info`` count as installed; entry points are read again before and after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._checked.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    registry._checked.cache_clear()


def _install(folder: Path, name: str, entry: str, **modules: str) -> None:
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[peft_suite.plugins]\n{entry}\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    importlib.invalidate_caches()


def test_broken_plugins_are_listed_and_not_fatal(distributions: Path) -> None:
    """An import that raises, an object that is no plugin, a name that does not agree: each with its reason."""
    _install(distributions, "broken-one", "broken = broken_one:plugin", broken_one="raise RuntimeError('no GPU here')")
    _install(distributions, "broken-two", "wrong = broken_two:plugin", broken_two="plugin = 3")
    text = "from peft_suite import Plugin\nplugin = Plugin(name='something-else')"
    _install(distributions, "broken-three", "other = broken_three:plugin", broken_three=text)
    _install(distributions, "broken-four", "absent = broken_four_missing:plugin")
    found = {p.name: p for p in registry.plugins()}
    assert {"core", "broken", "wrong", "other", "absent"} <= set(found)
    assert "RuntimeError: no GPU here" in found["broken"].error
    assert found["broken"].distribution == "broken-one"
    assert "int" in found["wrong"].error
    assert "something-else" in found["other"].error
    assert "broken_four_missing" in found["absent"].error
    assert "lora" in registry.methods()
    with pytest.raises(PluginError, match=r"'broken' of broken-one 0\.1 is broken: RuntimeError: no GPU here"):
        registry.find_plugin("broken")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Plugin(name='second', methods=(MethodEntry('lora', 'a:B', ''),))", "method 'lora'"),
        ("Plugin(name='second', anatomies=(AnatomyEntry('timm-vit', (), 'a:b'),))", "backbone family 'timm-vit'"),
    ],
)
def test_duplicates_name_both_distributions(
    distributions: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """Nobody wins silently; the message says how to go on, and that works."""
    code = f"from peft_suite import AnatomyEntry, MethodEntry, Plugin\nplugin = {text}"
    monkeypatch.delitem(sys.modules, "second", raising=False)
    _install(distributions, "second-house", "second = second:plugin", second=code)
    with pytest.raises(PluginError) as caught:
        registry.plugins()
    for part in (said, "second-house 0.1", "peft-suite", "PEFT_SUITE_DISABLE="):
        assert part in str(caught.value)
    monkeypatch.setenv("PEFT_SUITE_DISABLE", "second")
    assert "second" not in {p.name for p in registry.plugins()}
    monkeypatch.delitem(sys.modules, "second", raising=False)
