"""The pictures of the point-cloud guides, computed by the library.

    python pointcloud_figures.py --out docs/images
    python pointcloud_figures.py --out docs/images --adapter runs/cad/adapter --clouds scans --room named.ply

Writes ``pointcloud-groups.png`` and ``pointcloud-basis.png``; with ``--adapter`` and ``--clouds`` also
``pointcloud-classes.png``, with ``--room`` (what open3d_pipeline.py wrote) ``pointcloud-room.png``.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageChops

from peft_suite import kernels
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.formats import Array, read_cloud
from peft_suite.pointcloud.models.geometry import Geometry
from peft_suite.pointcloud.shapes import target_cloud

matplotlib.use("Agg")
COLORS = np.array(
    [[0, 114, 178], [230, 159, 0], [0, 158, 115], [213, 94, 0], [204, 121, 167], [86, 180, 233], [240, 228, 66]]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--clouds", type=Path)
    parser.add_argument("--room", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    points = target_cloud("chair", 512, np.random.default_rng(4)).astype(np.float32)
    model: Any = backbones.build("micro-points", 10, pretrained=True, checkpoint="", options={})
    with torch.inference_mode():
        geometry = model.group_divider(torch.from_numpy(points[None]))
    groups(points, geometry, options.out / "pointcloud-groups.png")
    basis(points, geometry, options.out / "pointcloud-basis.png")
    if options.adapter and options.clouds:
        classes(options.adapter, options.clouds, options.out / "pointcloud-classes.png")
    if options.room:
        room(options.room, options.out / "pointcloud-room.png")


def groups(points: Array, geometry: Geometry, out: Path) -> None:
    """The points; each in the colour of the nearest centre, with the centres; one group alone."""
    centers = geometry.centers[0].numpy()
    owner = np.linalg.norm(points[:, None] - centers, axis=2).argmin(1)
    figure, axes = panels(3)
    scatter(axes[0], points, points[:, 1], "512 points, coloured by height", cmap="cividis")
    scatter(axes[1], points, COLORS[owner % len(COLORS)] / 255, f"{len(centers)} centres and their points")
    place(axes[1], centers, c="black", s=14, depthshade=False)
    near = geometry.neighbors[0].numpy()
    shown = np.full((len(points), 3), 0.8)
    chosen = (centers[:, 1].argmax(), centers[:, 1].argmin(), np.abs(centers).sum(1).argmin())
    for color, g in zip(COLORS, chosen, strict=False):
        shown[near[g]] = color / 255
    scatter(axes[2], points, shown, f"3 groups of {near.shape[1]}")
    save(figure, out)


def basis(points: Array, geometry: Geometry, out: Path) -> None:
    """Eigenvectors of the graph over the centres, on the points that are nearest."""
    centers = geometry.centers
    found = kernels.graph_fourier_basis(centers)
    owner = np.linalg.norm(points[:, None] - centers[0].numpy(), axis=2).argmin(1)
    figure, axes = panels(3)
    for axis, vector in zip(axes, (1, 2, 12), strict=True):
        values = found.v[0][:, vector].numpy()
        most = float(np.abs(values).max())
        title = f"eigenvector {vector}, eigenvalue {float(found.w[0, vector]):.2f}"
        scatter(axis, points, values[owner], title, cmap="RdBu_r", vmin=-most, vmax=most)
    save(figure, out)


def classes(adapter: Path, clouds: Path, out: Path) -> None:
    """Ten clouds with what the adapter says of each; the file's name is the truth."""
    from peft_suite.pointcloud.data import source
    from peft_suite.train import open_adapter, predict

    opened = open_adapter(adapter)
    files, dataset = source.inputs([str(clouds)], opened.metadata["preprocessing"])
    scores = predict(opened.model, dataset, batch_size=32).softmax(-1)
    figure, axes = panels(10, rows=2)
    for axis, i in zip(axes, np.linspace(0, len(files) - 1, 10).astype(int), strict=True):
        points = read_cloud(files[i]).points[:1500]
        points = (points - points.mean(0)) / np.linalg.norm(points - points.mean(0), axis=1).max()
        name = opened.classes[int(scores[i].argmax())]
        right = name == Path(files[i]).stem
        scatter(axis, points, points[:, 1], f"{name} {scores[i].max():.2f}", cmap="cividis", size=2)
        axis.title.set_color("black" if right else "#b02000")
    save(figure, out)


def room(file: Path, out: Path) -> None:
    """The cloud that open3d_pipeline.py coloured, from above at a slant; z is up."""
    cloud = read_cloud(file)
    if cloud.colors is None:
        raise SystemExit(f"{file} has no colours. Write it with open3d_pipeline.py.")
    rows = np.random.default_rng(0).permutation(len(cloud.points))[:25_000]
    points, colors = cloud.points[rows], cloud.colors[rows]
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 4.2))
    axis: Any = figure.add_axes((-0.3, -0.3, 1.6, 1.6), projection="3d")  # its box is square, the room is not
    axis.scatter(*points.T, c=colors, s=np.where(np.ptp(colors, axis=1) > 0.05, 1.6, 0.3), linewidths=0)
    axis.set_box_aspect(np.ptp(points, axis=0), zoom=1.05)
    axis.view_init(elev=38, azim=-62)
    axis.set_axis_off()
    save(figure, out)


def panels(count: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with ``count`` empty 3D axes."""
    import matplotlib.pyplot as plt

    columns = count // rows
    figure = plt.figure(figsize=(min(3.2 * columns, 9.6), (3.2 if rows == 1 else 2.1) * rows))
    axes = [figure.add_subplot(rows, columns, i + 1, projection="3d") for i in range(count)]
    figure.subplots_adjust(0, 0, 1, 0.86 if rows == 1 else 0.93, 0, 0.1)
    return figure, axes


def scatter(axis: Any, points: Array, color: Any, title: str, size: float = 7, **more: Any) -> None:
    """Points with y up, equal scales, no frame."""
    place(axis, points, c=color, s=size, linewidths=0, **more)
    axis.set_box_aspect(np.ptp(points, axis=0)[[2, 0, 1]], zoom=1.12)
    axis.view_init(elev=18, azim=35)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9, y=1.0 if len(axis.figure.axes) > 3 else 1.08)


def place(axis: Any, points: Array, **more: Any) -> None:
    axis.scatter(points[:, 2], points[:, 0], points[:, 1], **more)


def save(figure: Any, out: Path) -> None:
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, facecolor="white")
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB")
    left, top, right, bottom = ImageChops.invert(picture).getbbox() or (0, 0, *picture.size)  # of what is not white
    picture = picture.crop(
        (max(left - 12, 0), max(top - 12, 0), min(right + 12, picture.width), min(bottom + 12, picture.height))
    )
    picture.quantize(96).save(out, optimize=True)  # 96 colours: a third of the size
    print(f"{out}  {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
