"""An adapted point transformer in an Open3D pipeline: clean a scene, cut it into objects, name and colour each.

    python open3d_pipeline.py --out named.ply                        # a generated room, an adapter trained on the fly
    python open3d_pipeline.py room.ply --adapter runs/lidar/adapter --out named.ply

Open3D reads, cleans and clusters; peft-suite classifies. Runs without a display. Needs ``pip install open3d`` and
``pip install 'peft-suite[pointcloud]'``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peft_suite as ps
from peft_suite import kernels
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.formats import Array, Cloud
from peft_suite.pointcloud.shapes import target_cloud
from peft_suite.pointcloud.transforms import Preprocess

BACKBONE = "micro-points"
CLASSES = ("chair", "lamp", "mug", "table")
COLORS = np.array(
    [[0.0, 0.45, 0.7], [0.9, 0.6, 0.0], [0.0, 0.62, 0.45], [0.8, 0.4, 0.0], [0.8, 0.6, 0.7], [0.9, 0.9, 0.3]]
)
GREY = (0.75, 0.75, 0.75)  # ground, outliers, clusters that are too small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", nargs="?", type=Path, help="point cloud or mesh; without it a room is generated")
    parser.add_argument("--adapter", type=Path, help="adapter directory of a run; without it one is trained here")
    parser.add_argument("--out", type=Path, default=Path("named.ply"))
    parser.add_argument("--up", default="z", choices=("x", "y", "z"), help="axis that points up in the scene")
    parser.add_argument("--eps", type=float, default=0.25, help="gap that separates two objects, in units of the scene")
    parser.add_argument("--steps", type=int, default=150, help="training steps where no adapter is given")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.scene is None:
        options.scene = options.out.with_name("room.ply")
        truth = generate(options.scene, options.seed)
    else:
        truth = None
    if options.adapter is None:
        options.adapter = options.out.with_name("furniture-adapter")
        train(options.adapter, options.steps, options.seed)

    model, classes, preprocess = restore(options.adapter, options.up)
    cloud = read(options.scene)
    clusters = segment(cloud, options.up, options.eps, options.seed)
    if not clusters:
        raise SystemExit(
            f"No object stands out of {options.scene}: is --up {options.up} right, is --eps {options.eps} too small?"
        )
    points = np.asarray(cloud.points)
    probabilities = classify(model, preprocess, [points[rows] for rows in clusters])

    colors = np.tile(GREY, (len(points), 1))
    right = 0
    print("object  points  class      probability" + ("  truth" if truth is not None else ""))
    for number, (rows, scores) in enumerate(zip(clusters, probabilities, strict=True)):
        label = int(scores.argmax())
        colors[rows] = COLORS[label % len(COLORS)]
        line = f"{number:6d}  {len(rows):6,d}  {classes[label]:9s}  {scores[label]:11.3f}"
        if truth is not None:
            true = nearest(truth, points[rows].mean(0))
            right += true == classes[label]
            line += f"  {true}"
        print(line)
    if truth is not None:
        print(f"{right} of {len(clusters)} objects named right; the room has {len(truth)}")
    write(cloud, colors, options.out)


# ---- the part of peft-suite ----------------------------------------------------------------------------------------


def build(classes: int) -> torch.nn.Module:
    """The frozen point transformer with a fresh head."""
    return backbones.build(BACKBONE, classes, pretrained=True, checkpoint="", options={})


def train(folder: Path, steps: int, seed: int) -> None:
    """Adapt the backbone to single pieces of furniture in an ordinary loop, and save what was trained."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build(len(CLASSES))
    ps.adapt(model, "pointgst(rank=16, local=8)", name="furniture")
    print(ps.summary(model))
    preprocess = Preprocess.from_dict(backbones.preprocessing(BACKBONE, model)).override(up="z")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    loss = torch.tensor(0.0)
    for _ in range(steps):
        labels = rng.integers(0, len(CLASSES), 16)
        batch = torch.stack([inputs(preprocess, cut(furniture(CLASSES[i], 1200, rng), rng)) for i in labels])
        loss = torch.nn.functional.cross_entropy(model(batch), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    facts = {"classes": list(CLASSES), "backbone": {"name": BACKBONE}, "preprocessing": preprocess.to_dict()}
    ps.save(model, folder, metadata=facts)
    print(f"{steps} steps, last loss {loss.item():.3f}, adapter in {folder}")


def restore(folder: Path, up: str) -> tuple[torch.nn.Module, list[str], Preprocess]:
    """A fresh backbone with the saved adapter; runs of ``peft-suite pointcloud train`` say the same things about
    themselves."""
    facts = ps.read_config(folder)["metadata"]
    made = facts["backbone"]
    model = backbones.build(
        made["name"],
        len(facts["classes"]),
        pretrained=bool(made.get("pretrained", True)) and not made.get("checkpoint"),
        checkpoint=made.get("checkpoint") or "",
        options=made.get("options") or {},
    )
    ps.load(model, folder)
    return model.eval(), facts["classes"], Preprocess.from_dict(facts["preprocessing"]).override(up=up)


def inputs(preprocess: Preprocess, points: Array) -> torch.Tensor:
    """Points of one object ``[N, 3]`` as the network wants them, ``[num_points, 3]``: centred, scaled, y up, farthest
    points first; small objects repeat theirs."""
    x = torch.from_numpy(preprocess(Cloud(points)))
    wanted = preprocess.num_points
    if len(x) > wanted:
        return x[kernels.farthest_point_sampling(x[None, :, :3].contiguous(), wanted)[0].long()]
    return x[torch.arange(wanted) % len(x)]


def classify(model: torch.nn.Module, preprocess: Preprocess, objects: list[Array]) -> Array:
    """Probabilities ``[objects, classes]``."""
    batch = torch.stack([inputs(preprocess, points) for points in objects])
    with torch.inference_mode():
        result: Array = model(batch).softmax(-1).numpy()
    return result


# ---- the part of Open3D --------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """A point cloud; a mesh becomes one."""
    import open3d as o3d

    o3d.utility.random.seed(0)
    if path.suffix.lower() in (".obj", ".off", ".stl", ".ply"):
        with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
            mesh = o3d.io.read_triangle_mesh(str(path))
        if len(mesh.triangles):
            return mesh.sample_points_uniformly(100_000)
    cloud = o3d.io.read_point_cloud(str(path))
    if cloud.is_empty():
        raise SystemExit(f"{path} holds no points that Open3D can read.")
    return cloud


def segment(cloud: Any, up: str, eps: float, seed: int) -> list[Array]:
    """Rows of every object: without the ground plane and stray points, connected within ``eps``, largest first."""
    import open3d as o3d

    o3d.utility.random.seed(seed)
    plane, ground = cloud.segment_plane(distance_threshold=0.03, ransac_n=3, num_iterations=500)
    rest = np.arange(len(cloud.points))
    if abs(plane["xyz".index(up)]) > 0.9 * np.linalg.norm(plane[:3]):  # a wall or a table is no ground
        rest = np.setdiff1d(rest, ground)
    above = cloud.select_by_index(rest)
    _, kept = above.remove_radius_outlier(nb_points=4, radius=eps)
    rest, above = rest[kept], above.select_by_index(kept)
    labels = np.asarray(above.cluster_dbscan(eps=eps, min_points=8))
    groups = [rest[labels == i] for i in range(labels.max() + 1)]
    return sorted((rows for rows in groups if len(rows) >= 200), key=len, reverse=True)


def write(cloud: Any, colors: Array, path: Path) -> None:
    import open3d as o3d

    cloud.colors = o3d.utility.Vector3dVector(colors)
    if not o3d.io.write_point_cloud(str(path), cloud):
        raise SystemExit(f"{path} cannot be written.")
    print(f"coloured cloud: {path}")


# ---- a room to try it on -------------------------------------------------------------------------------------------


def furniture(name: str, count: int, rng: np.random.Generator) -> Array:
    """Points ``[count, 3]`` of a piece of furniture, turned about the up axis, z up, with noise; radius about 1."""
    x, y, z = target_cloud(name, count, rng).T
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    result: Array = np.stack([c * x - s * z, -s * x - c * z, y], 1) + rng.normal(0, 0.01, (count, 3))
    return result


def cut(points: Array, rng: np.random.Generator) -> Array:
    """What taking the ground away leaves: a little is missing at the bottom."""
    result: Array = points[points[:, 2] > points[:, 2].min() + rng.uniform(0, 0.08)]
    return result


def generate(path: Path, seed: int) -> list[tuple[str, Array]]:
    """Write a floor with furniture and stray points; returns (class, middle) of every piece."""
    import open3d as o3d

    rng = np.random.default_rng([seed, 1])
    low, high = (-1.5, -1.5, 0), (10.5, 4.5, 3)
    floor = rng.uniform(low, high, (30_000, 3))
    floor[:, 2] = rng.normal(0, 0.008, len(floor))
    parts, truth = [floor, rng.uniform(low, high, (150, 3))], []
    for i, name in enumerate(rng.permutation(np.repeat(CLASSES, 2))):
        piece = furniture(str(name), 3000, rng)
        piece += (3 * (i % 4), 3 * (i // 4), 0)
        piece[:, 2] -= piece[:, 2].min()
        parts.append(piece)
        truth.append((str(name), piece.mean(0)))
    points = np.concatenate(parts)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    if not o3d.io.write_point_cloud(str(path), cloud):
        raise SystemExit(f"{path} cannot be written.")
    print(f"{len(points):,} points of a room with {len(truth)} pieces of furniture: {path}")
    return truth


def nearest(truth: list[tuple[str, Array]], middle: Array) -> str:
    """Class of the piece whose middle is nearest."""
    return min(truth, key=lambda piece: float(np.linalg.norm(piece[1] - middle)))[0]


if __name__ == "__main__":
    main()
