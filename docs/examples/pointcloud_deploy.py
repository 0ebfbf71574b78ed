"""A trained point-cloud model in a program: files, then points as they come from a sensor.

    python pointcloud_deploy.py runs/cad/merged scans

The directory is an adapter of a run, or what ``peft-suite pointcloud merge`` wrote.
"""

from __future__ import annotations

import sys

import torch

from peft_suite.pointcloud.data import source
from peft_suite.pointcloud.formats import Array, Cloud, read_cloud
from peft_suite.pointcloud.sampling import in_order, repeated
from peft_suite.pointcloud.transforms import Preprocess
from peft_suite.train import open_adapter, predict

folder, clouds = sys.argv[1], sys.argv[2]
opened = open_adapter(folder)  # backbone, adapter, classes, preparation
facts, classes = opened.metadata["preprocessing"], opened.classes

# Files: read, checked, prepared and batched as in training.
files, dataset = source.inputs([clouds], facts)
logits = predict(opened.model, dataset, batch_size=32)
for file, scores in zip(files[:3], logits.softmax(-1), strict=False):
    print(f"{file}: {classes[int(scores.argmax())]} {scores.max():.3f}")

# Points from anywhere, one cloud at a time.
prepare = Preprocess.from_dict(facts)


def classify(points: Array) -> tuple[str, float]:
    """Class and probability of points ``[N, 3]`` in the axes and units of the training files."""
    x = prepare(Cloud(points))  # centred, scaled, y up
    x = x[in_order(x, prepare.num_points, prepare.num_points)]  # the farthest points, as in evaluation
    batch = torch.from_numpy(x[repeated(len(x), prepare.num_points)])[None]
    with torch.inference_mode():
        scores = opened.model(batch).softmax(-1)[0]
    return classes[int(scores.argmax())], float(scores.max())


cloud = read_cloud(files[0])
name, probability = classify(cloud.points)
print(f"from an array: {name} {probability:.3f}")
