"""The scripts of the audio pages run as they stand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sound_data as made

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers"
)
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers.Trainer needs it: pip install accelerate"
)


def _run(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _gap(printed: str, start: str) -> float:
    """From "merged, saved, from_pretrained: 1.2e-07 between logits"."""
    line = next(line for line in printed.splitlines() if line.startswith(start))
    return float(line.removeprefix(start).split()[0])


@needs_transformers
def test_pipeline_learns_and_leaves_a_plain_model(tmp_path: Path) -> None:
    printed = _run("audio_pipeline.py", "--out", "out", folder=tmp_path)
    learned = next(line for line in printed.splitlines() if line.startswith("accuracy")).split()
    before, after = float(learned[1]), float(learned[3])
    assert after >= 0.75 and after > before + 0.2, printed
    assert _gap(printed, "adapter loaded again: ") < 1e-5
    assert _gap(printed, "merged, saved, from_pretrained: ") < 1e-4
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "merged" / "preprocessor_config.json").is_file()


@needs_transformers
@needs_accelerate
def test_pipeline_with_the_libraries_own_parts_on_its_own_output(tmp_path: Path) -> None:
    _run("audio_pipeline.py", "--epochs", "1", "--out", "out", folder=tmp_path)
    again = ("out/merged", "--front-end", "transformers", "--trainer", "--epochs", "2")
    printed = _run("audio_pipeline.py", *again, folder=tmp_path)
    assert "ASTFeatureExtractor" in printed
    assert _gap(printed, "merged, saved, from_pretrained: ") < 1e-4


def test_data_of_the_guide(tmp_path: Path) -> None:
    for digit in range(5):
        for index in (0, 7):
            name = f"{digit}_theo_{index}.wav"
            made.put(tmp_path / "fsdd" / "recordings" / name, made.tone(digit, index, rate=8000), 8000)
    printed = _run("audio_data.py", "fsdd", "--out", ".", "--broken", folder=tmp_path)
    assert "308 seconds with one of 4 words or a pause" in printed and "60 s with 4 words" in printed
    train, test = (sorted(p.name for p in (tmp_path / "words" / s).rglob("*_*.wav")) for s in ("train", "test"))
    assert train == [f"{d}_theo_7.wav" for d in range(4)] and test == [f"{d}_theo_0.wav" for d in range(4)]
    assert (tmp_path / "words" / "train" / "zero" / "empty.wav").stat().st_size == 0
    assert len((tmp_path / "long.csv").read_text().splitlines()) == 5


@needs_transformers
def test_checkpoints_of_the_guide_load_and_say_what_is_fresh(tmp_path: Path) -> None:
    made_by = ("--make", "pretrain.pth", "--like", "ssast", "--backbone", "ssast-tiny", "--layers", "1")
    _run("audio_checkpoint.py", *made_by, folder=tmp_path)
    read = ("pretrain.pth", "--backbone", "ssast-tiny", "max_length=500")
    printed = _run("audio_checkpoint.py", *read, folder=tmp_path)
    assert "layout: AST or SSAST; sizes: num_hidden_layers 1, hidden_size 192" in printed
    assert "8 x 64 to 8 x 31" in printed and "mask_embed" in printed
