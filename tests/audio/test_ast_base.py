"""AST-base at full size, from sound files to a merged model that predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from peft_suite.audio import synth
from peft_suite.audio.data import source
from peft_suite.train import RunConfig, open_adapter, predict, run

CLASSES = tuple(synth.TARGET)[:4]
CLIPS = 16  # of each class


@pytest.mark.slow
def test_end_to_end_on_64_clips(tmp_path: Path) -> None:
    for name in CLASSES:
        folder = tmp_path / "sounds" / name
        folder.mkdir(parents=True)
        for number in range(CLIPS):
            wave = synth.sound(name, number, seed=7)
            soundfile.write(folder / f"{number:02d}.wav", wave, synth.RATE)
    config = RunConfig.from_dict(
        {
            "plugin": "audio",
            "backbone": {"name": "ast-base", "pretrained": False, "options": {"max_length": 128}},
            "data": {"root": str(tmp_path / "sounds"), "val_fraction": 0.25},
            "method": "ast-lora",
            "recipe": {"epochs": 2, "batch_size": 8, "lr": 5e-3},
            "out": str(tmp_path / "run"),
            "device": "cpu",
        }
    )
    result = run(config, progress=False)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
    opened = open_adapter(result.adapter)
    files, sounds = source.inputs([str(tmp_path / "sounds")], opened.metadata["preprocessing"])
    logits = predict(opened.model, sounds, batch_size=16)
    assert len(files) == 4 * CLIPS
    assert logits.shape == (4 * CLIPS, 4)
    assert sum(p.numel() for p in opened.model.parameters()) > 85_000_000
