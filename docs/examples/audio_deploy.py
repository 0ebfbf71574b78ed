"""A trained audio model in a program: files, then samples as they come from a microphone.

    python audio_deploy.py runs/words/merged words/test/two

The directory is an adapter of a run, or what ``peft-suite audio merge`` wrote.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from peft_suite.audio.data import source
from peft_suite.audio.decode import decode
from peft_suite.audio.features import Preprocess
from peft_suite.train import open_adapter, predict

folder, sounds = sys.argv[1], sys.argv[2]
opened = open_adapter(folder)  # backbone, adapter, classes, preparation
facts, classes = opened.metadata["preprocessing"], opened.classes

# Files: decoded, resampled, cut, normalised and batched as in training.
files, dataset = source.inputs([sounds], facts)
logits = predict(opened.model, dataset, batch_size=32)
for file, scores in zip(files[:3], logits.softmax(-1), strict=False):
    print(f"{file}: {classes[int(scores.argmax())]} {scores.max():.3f}")

# Samples from anywhere, one sound at a time.
prepare = Preprocess.from_dict(facts)
opened.model.eval()


def classify(samples: np.ndarray) -> tuple[str, float]:
    """Class and probability of mono samples [n] between -1 and 1 at ``prepare.sample_rate``."""
    waveform = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
    batch = prepare.finish(prepare.features(waveform))[None]  # log-mel [1, T, F], normalised
    with torch.inference_mode():
        scores = opened.model(batch).softmax(-1)[0]
    return classes[int(scores.argmax())], float(scores.max())


clip = decode(files[0], rate=prepare.sample_rate)
name, probability = classify(clip.samples)
print(f"from an array: {name} {probability:.3f}")
