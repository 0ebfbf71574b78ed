"""``peft-suite pointcloud view``: clouds on one HTML page, and in Open3D's window where there is a display."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_suite.cli.common import plugin_of
from peft_suite.cli.console import note, show_json
from peft_suite.cli.root import Json
from peft_suite.errors import ConfigError, DataError

if TYPE_CHECKING:
    from peft_suite.pointcloud.view_page import Picture, Scene

__all__ = ["MOST", "open_window", "view"]

MOST = 40  # clouds of a page: more of them make it too large to open


def view(
    ctx: typer.Context,
    clouds: Annotated[list[str], typer.Argument(help="Files and folders (searched recursively).", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter directory of a run, or a merged model's directory.")
    ] = None,
    show: Annotated[
        list[str] | None,
        typer.Option(
            help="points, classes, parts, groups, attention or basis; several times for several. By default what the "
            "adapter predicts, without one the points."
        ),
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Block whose attention is shown, from 0; by default the last.")
    ] = None,
    vector: Annotated[int | None, typer.Option(help="Eigenvector of the basis, from 0; by default 1.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("view.html"),
    points: Annotated[int, typer.Option(min=1, help="Draw at most this many points of a cloud.")] = 20_000,
    groups: Annotated[int | None, typer.Option(min=1, help="Without an adapter: patches (64).")] = None,
    group_size: Annotated[int | None, typer.Option(min=1, help="Without an adapter: points of a patch (32).")] = None,
    columns: Annotated[str, typer.Option(help="What the columns of text files are, as data.columns.")] = "",
    up: Annotated[str, typer.Option(help="Axis that points up: x, y or z.")] = "",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="The backbone's weights, if they moved.")] = "",
    window: Annotated[bool, typer.Option(help="Also open Open3D's window where there is a display.")] = True,
    json: Json = False,
) -> None:
    """Show clouds, what a model says of them, its patches, its attention or a spectral basis, as one HTML page."""
    plugin = plugin_of(ctx)
    files = _files(clouds)
    _refuse(adapter, show or [], block, vector, out, up, groups, group_size)
    plugin.ensure()
    from peft_suite.pointcloud.view import Viewer
    from peft_suite.pointcloud.view_page import page
    from peft_suite.storage import write_text
    from peft_suite.train.opening import open_adapter

    opened = open_adapter(adapter, plugin=plugin, checkpoint=checkpoint) if adapter else None
    viewer = Viewer(
        opened,
        points=points,
        groups=groups or 64,
        group_size=group_size or 32,
        columns=columns,
        up=up,
        block=block,
        vector=1 if vector is None else vector,
    )
    views = list(dict.fromkeys(show or [viewer.usual]))
    twice = Counter(Path(file).name for file in files)
    pictures: list[Picture] = []
    for file in files:
        name = Path(file).name if twice[Path(file).name] == 1 else file
        pictures += viewer.pictures(file, views, name)
    title = Path(files[0]).name if len(files) == 1 else f"{len(files)} clouds"
    write_text(out, page(pictures, title))
    if json:
        rows = [
            {"cloud": p.cloud, "view": p.view, "title": p.title, "facts": p.facts, "notes": p.notes} for p in pictures
        ]
        show_json({"written": str(out), "bytes": out.stat().st_size, "pictures": rows})
    else:
        note(f"{len(pictures)} pictures written to {out} ({out.stat().st_size / 2**20:.1f} MiB). Open it in a browser.")
    if window:
        open_window(pictures[0])


def open_window(picture: Picture) -> bool:
    """Show a picture's first scene in Open3D until the window is closed; False where that is not possible."""
    screen = sys.platform in ("win32", "darwin") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    if not screen or importlib.util.find_spec("open3d") is None:
        return False
    try:
        open3d: Any = importlib.import_module("open3d")
        points, colors = _coloured(picture.scenes[0])
        cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
        cloud.colors = open3d.utility.Vector3dVector(colors)
        open3d.visualization.draw_geometries([cloud], window_name=f"{picture.cloud}: {picture.title}")
    except Exception as error:  # a display that does not answer, a broken installation: the page is written
        note(f"Open3D's window did not open ({' '.join(str(error).split())[:120]}).")
        return False
    return True


def _coloured(scene: Scene) -> tuple[Any, Any]:
    """All points of a scene ``[n, 3]`` and their colours in 0..1 ``[n, 3]``."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    points, colors = [], []
    for trace in scene.traces:
        count, marker = len(trace["x"]), trace["marker"]
        color = marker["color"]
        if isinstance(color, list) and color and not isinstance(color[0], str):
            scale = marker["colorscale"]
            table = colormaps["cividis"] if scale == "Cividis" else LinearSegmentedColormap.from_list("scale", scale)
            span = max(marker["cmax"] - marker["cmin"], 1e-12)
            colors.append(table((np.asarray(color) - marker["cmin"]) / span)[:, :3])
        else:
            each = color if isinstance(color, list) else [color] * count
            colors.append(np.array([to_rgb(c) for c in each], float).reshape(count, 3))
        points.append(np.array([trace["x"], trace["y"], trace["z"]], float).T)
    return np.concatenate(points), np.concatenate(colors)


def _files(paths: list[str]) -> list[str]:
    from peft_suite.pointcloud.folders import clouds_below
    from peft_suite.pointcloud.formats import EXTENSIONS

    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist. Give files or folders.")
        files += [str(p) for p in clouds_below(path)] if path.is_dir() else [str(path)]
    if not files:
        raise DataError(f"No cloud in {', '.join(paths)}. Clouds end in {', '.join(EXTENSIONS)}.")
    if len(files) > MOST:
        raise DataError(f"A page holds at most {MOST} clouds, and there are {len(files)}. Name fewer files or folders.")
    return files


def _refuse(
    adapter: Path | None,
    show: list[str],
    block: int | None,
    vector: int | None,
    out: Path,
    up: str,
    groups: int | None,
    group_size: int | None,
) -> None:
    """What contradicts itself, before anything is loaded."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the name must end in .html.")
    if up not in ("", "x", "y", "z"):
        raise ConfigError(f"--up {up}: choose x, y or z.")
    if block is not None and "attention" not in show:
        raise ConfigError(f"--block {block} says whose attention is shown. Add --show attention.")
    if vector is not None and "basis" not in show:
        raise ConfigError(f"--vector {vector} says which eigenvector is shown. Add --show basis.")
    if adapter is not None and (groups or group_size):
        raise ConfigError("--groups and --group-size are those of the adapter's backbone. Leave them out.")
