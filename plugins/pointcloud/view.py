"""Pictures of clouds: as they are, and as a model sees them.

==========  ==========================================================================================
view        what it shows
==========  ==========================================================================================
points      the file's points in their own colours, or coloured by height
classes     the same, with the predicted classes and their probabilities
parts       the predicted part of every point, beside the file's own labels where it has them
groups      the patches: their centres and the points that belong to them
attention   how much the class token of a block looks at every patch, mean over the heads
basis       an eigenvector of the graph Laplacian over the centres (PointGST's graph Fourier basis)
==========  ==========================================================================================

Everything is drawn at the file's coordinates. What a model says of centres or of the points that it saw is carried to
the other points from the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_suite import kernels
from peft_suite.errors import ConfigError, closest
from peft_suite.pointcloud.clouds import Reading
from peft_suite.pointcloud.formats import Array
from peft_suite.pointcloud.models.geometry import Grouping
from peft_suite.pointcloud.transforms import Preprocess
from peft_suite.pointcloud.view_cloud import HOVER, Look, Shown
from peft_suite.pointcloud.view_page import COLOURS, GREY, Picture, Scene, by_label, scatter

if TYPE_CHECKING:
    from peft_suite.train.opening import Opened

__all__ = ["VIEWS", "Viewer"]

VIEWS = ("points", "classes", "parts", "groups", "attention", "basis")


class Viewer:
    """Makes pictures of files.

    Args:
        opened: a model, as ``open_adapter`` gives it; None shows what needs none.
        points: draw at most this many of a cloud's points, the same ones every time.
        groups, group_size: patches where there is no model; with one they are the model's.
        columns: of text files and arrays, see ``data.columns``; with a model they are those of its training.
        up: the axis that points up; "" takes the model's, else y (z for .las, .laz and .bin).
        block: whose attention, from 0; None is the last.
        vector: which eigenvector, from 0 (the nearly constant one).
    """

    def __init__(
        self,
        opened: Opened | None = None,
        *,
        points: int = 20_000,
        groups: int = 64,
        group_size: int = 32,
        columns: str = "",
        up: str = "",
        block: int | None = None,
        vector: int = 1,
    ) -> None:
        self.model = opened.model.cpu().eval() if opened else None
        self.classes = opened.classes if opened else ()
        self.block, self.vector = block, vector
        given: Mapping[str, Any] = (
            opened.metadata["preprocessing"]
            if opened
            else {"num_points": max(1024, 16 * groups, group_size), "groups": groups, "group_size": group_size}
        )
        self.parts: Mapping[str, Sequence[int]] = given.get("parts", {})
        goal = Preprocess.from_dict(given)
        reading = Reading(
            replace(goal, min_points=1),  # a cloud too small for a view is refused by that view
            columns=str(given.get("columns", "")) or columns,
            mesh_points=int(given.get("mesh_points", 8192)),
            rule=given.get("fps_rule", "standard"),
            ordered=True,
        )
        found = [m for m in self.model.modules() if isinstance(m, Grouping)] if self.model else []
        grouping = found[0] if found else Grouping(groups, group_size)
        self.look = Look(reading, grouping, points, up or (goal.up if opened else ""), opened is not None)

    @property
    def usual(self) -> str:
        """The view that tells most."""
        return "points" if self.model is None else "parts" if self.parts else "classes"

    def pictures(self, file: str, views: Sequence[str], name: str = "") -> list[Picture]:
        """One picture per view.

        Raises:
            DataError: the file is no cloud, or one too small for its patches.
            ConfigError: a view that needs a model, or another one; a block or eigenvector that does not exist.
            UnsupportedError: attention of a backbone without a class token that sees the patches.
        """
        for view in views:
            self._check(view)
        shown = Shown(self.look, file, name or Path(file).name)
        return [getattr(self, f"_{view}")(shown) for view in views]

    def _check(self, view: str) -> None:
        if view not in VIEWS:
            raise ConfigError(f"--show {view}: {closest(view, VIEWS)}")
        if self.model is None and view in ("classes", "parts", "attention"):
            raise ConfigError(f"--show {view} needs a trained model. Give --adapter RUN/adapter.")
        if view == "classes" and self.parts:
            raise ConfigError("--show classes: this adapter was trained for parts. Use --show parts.")
        if view == "parts" and not self.parts:
            raise ConfigError("--show parts: this adapter was trained for classes of whole clouds. Use --show classes.")

    def _points(self, shown: Shown) -> Picture:
        traces, how = shown.plain_traces()
        return shown.picture("points", f"{len(shown.cloud.points):,} points", [Scene(how, traces)])

    def _classes(self, shown: Shown) -> Picture:
        assert self.model is not None
        shown.require_groups()
        with torch.no_grad():
            chances = self.model(shown.seen)[0].float().softmax(0)
        values, order = (t.tolist() for t in chances.topk(min(5, len(chances))))
        names = [self.classes[i] if self.classes else str(i) for i in order]
        told = {name: f"{100 * value:.1f} %" for name, value in zip(names, values, strict=True)}
        title = "predicted: " + ", ".join(f"{name} {value}" for name, value in list(told.items())[:3])
        traces, how = shown.plain_traces()
        facts = {f"probability of {name}": value for name, value in told.items()}
        return shown.picture("classes", title, [Scene(how, traces)], facts)

    def _parts(self, shown: Shown) -> Picture:
        assert self.model is not None
        shown.require_groups()
        known = list(self.parts)
        category = known[0] if len(known) == 1 else Path(shown.file).resolve().parent.name
        own = list(self.parts[category]) if category in known else list(range(len(self.classes)))
        inputs = {"category": torch.tensor([known.index(category)])} if category in known else {}
        with torch.no_grad():
            scores = self.model(shown.seen, **inputs)[0]  # [n, P]
        said = scores[:, own].argmax(1)[shown.nearest(shown.seen[..., :3])].numpy()  # [N], places in own
        names = [self.classes[i] for i in own]
        facts = {"category": category if category in known else "unknown: no folder of the cloud's category"}
        facts |= {f"share of {names[i]}": f"{100 * np.mean(said == i):.1f} %" for i in np.unique(said).tolist()}
        true, note = shown.truth(category, own, names) if category in known else (None, "")
        title = "parts: " + ", ".join(names[i] for i in np.unique(said).tolist())
        points, rows = shown.points, shown.rows
        hover, listed = None, set[int]()
        if true is not None:
            counted = true >= 0
            right = float(np.mean(said[counted] == true[counted]))
            facts["points of their true part"] = f"{100 * right:.1f} % of {int(counted.sum()):,}"
            is_ = [f"is {names[i]}" if i >= 0 else "no label" for i in true[rows]]
            hover = [f"predicted {names[a]}, {b}" for a, b in zip(said[rows], is_, strict=True)]
        scenes = [Scene("predicted", by_label(points, rows, said[rows], names, listed, hover))]
        if true is not None:
            scenes.append(Scene("labels of the file", by_label(points, rows, true[rows], names, listed, hover)))
        return shown.picture("parts", title, scenes, facts, [note] if note else [])

    def _groups(self, shown: Shown) -> Picture:
        shown.require_groups()
        near = shown.geometry.neighbors[0].numpy()  # [G, S] places among the points that the network takes
        centers = shown.center_rows
        distinct, place = np.unique(shown.seen_rows, return_inverse=True)  # a small cloud's points come again
        kept = shown.limited(len(distinct))
        points, rows = shown.placed[distinct[kept]], distinct[kept]
        at = np.full(len(distinct), -1)
        at[kept] = np.arange(len(kept))
        members = [sorted({int(i) for i in at[place[group]] if i >= 0}) for group in near]
        count = np.zeros(len(rows), np.int64)
        owner = np.full(len(rows), -1)
        best = np.full(len(rows), np.inf)
        for g, listed in enumerate(members):
            group = np.asarray(listed, np.int64)
            distance = np.linalg.norm(points[group] - shown.placed[centers[g]], axis=1)
            owner[group[distance < best[group]]] = g
            best[group] = np.minimum(best[group], distance)
            count[group] += 1
        colors = _contrasting(shown.placed[centers])
        text = [f"group {o}, in {n} groups" if n else "in no group" for o, n in zip(owner, count, strict=True)]
        traces = [
            scatter(points, rows, [colors[o] if o >= 0 else GREY for o in owner], HOVER, text=text, meta="points"),
            shown.centers(colors, [f"centre of group {g}" for g in range(len(centers))]),
            scatter(points[:0], rows[:0], "#111111", "point %{customdata} of the chosen group", size=7, meta="chosen"),
        ]
        traces[-1]["marker"] |= {"symbol": "circle-open", "line": {"width": 2}}
        facts = {
            "groups": f"{len(near):,} of {near.shape[1]} points",
            "points that the network takes": f"{len(distinct):,} of {len(shown.cloud.points):,}",
            "of these in no group": f"{int((count == 0).sum()):,} of {len(rows):,}",
            "in more than one": f"{int((count > 1).sum()):,}",
        }
        notes = ["Colours only tell neighbouring groups apart. Click on a centre to see all points of its group."]
        picture = shown.picture("groups", f"{len(near)} groups", [Scene("", traces)], facts, notes, len(rows))
        picture.members = members
        return picture

    def _attention(self, shown: Shown) -> Picture:
        from peft_suite.lifecycle import described
        from peft_suite.pointcloud.view_attention import attention

        assert self.model is not None
        shown.require_groups()
        block = len(described(self.model).blocks) - 1 if self.block is None else self.block
        found = attention(self.model, shown.seen, block)
        facts = {
            "on patches": f"{100 * float(found.patches.sum()):.1f} %",
            "on the class token itself": f"{100 * found.itself:.1f} %",
            "on added tokens": f"{100 * found.others:.1f} %",
            "even attention would be": f"{100 * float(found.patches.mean()):.2f} % for each patch",
        }
        scene = shown.patch_scene(100 * found.patches.numpy(), "% of attention", "mean over the heads")
        return shown.picture("attention", f"attention of the class token in block {block}", [scene], facts)

    def _basis(self, shown: Shown) -> Picture:
        shown.require_groups()
        basis = kernels.graph_fourier_basis(shown.geometry.centers)
        w, v = basis.w[0], basis.v[0]  # [G], [G, G]
        if not 0 <= self.vector < len(w):
            raise ConfigError(f"--vector {self.vector}: {len(w)} centres have the eigenvectors 0 to {len(w) - 1}.")
        scene = shown.patch_scene(v[:, self.vector].numpy(), "entry", "", diverging=True)
        value = float(w[self.vector])
        facts = {"eigenvalue": f"{value:.4f}", "eigenvalues": f"{float(w[0]):.4f} to {float(w[-1]):.4f}"}
        title = f"eigenvector {self.vector} (of 0 to {len(w) - 1}) of the graph over the centres"
        return shown.picture("basis", title, [scene], facts)


def _contrasting(centers: Array) -> list[str]:
    """Colours of centres ``[G, 3]``, other ones for each of the nearest six."""
    gaps = np.linalg.norm(centers[:, None] - centers[None], axis=2)
    near = gaps.argsort(1, kind="stable")[:, 1:7]
    chosen = np.full(len(centers), -1)
    for g in range(len(centers)):
        beside = {*chosen[near[g]].tolist(), *chosen[(near == g).any(1)].tolist()}
        used = np.bincount(chosen[chosen >= 0], minlength=len(COLOURS))
        free = [c for c in range(len(COLOURS)) if c not in beside] or [int(used.argmin())]
        chosen[g] = min(free, key=lambda c: used[c])
    return [COLOURS[c] for c in chosen]
