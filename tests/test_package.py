"""The distribution: what the wheel holds, and what importing costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {
    "core": "peft_suite",
    "kernels": "peft_suite/kernels",
    "plugins/vision": "peft_suite/vision",
    "plugins/pointcloud": "peft_suite/pointcloud",
    "plugins/audio": "peft_suite/audio",
    "plugins/diffusion": "peft_suite/diffusion",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = tmp_path_factory.mktemp("source")
    for folder in ("core", "kernels", "plugins"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    [file] = (source / "dist").glob("*.whl")
    return [n for n in zipfile.ZipFile(file).namelist() if ".dist-info/" not in n]


def test_wheel_holds_every_file_of_the_tree(wheel: list[str]) -> None:
    wanted = set()
    for folder, package in HOMES.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                wanted.add(f"{package}/{file.relative_to(ROOT / folder).as_posix()}")
    assert set(wheel) == wanted


def test_every_plugin_folder_is_shipped() -> None:
    folders = {f"plugins/{p.name}" for p in (ROOT / "plugins").iterdir() if (p / "__init__.py").exists()}
    assert folders == {h for h in HOMES if h.startswith("plugins/")}


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, peft_suite, peft_suite.plugins as p\n"
        "assert [f.name for f in p.plugins()] and p.find_method('ssf') and all(f.plugin for f in p.plugins())\n"
        "heavy = {'torch', 'numpy', 'timm', 'accelerate', 'transformers', 'matplotlib', 'h5py', 'trimesh', 'plotly'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented() -> None:
    import peft_suite

    for name in peft_suite.__all__:
        assert getattr(peft_suite, name).__doc__, name
    assert peft_suite.__version__
    with pytest.raises(AttributeError, match="no_such"):
        _ = peft_suite.no_such


def test_no_path_of_a_machine_in_the_tree() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for file in filter(None, files):
        path = ROOT / file
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".html", ".json", ".css"} and path.exists():
            text = path.read_text(encoding="utf-8")
            for needle in ("/" + "work/", "/" + "root/", "/" + "home/"):
                assert needle not in text, f"{file}: {needle}"
