"""The viewer's page: pictures of clouds as plotly figures, in one HTML file that loads nothing from the network.

A picture has one scene, or two that turn together. Colours are those of Okabe and Ito, cividis, and blue to vermilion
through grey: colour-blind people tell them apart. More labels than colours repeat them with other symbols.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.pointcloud.formats import Array

__all__ = ["COLOURS", "GREY", "Picture", "Scene", "Trace", "by_label", "by_value", "figure", "page", "scatter"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#B8A800")
GREY = "#A3A9B1"
SYMBOLS = ("circle", "diamond", "square", "cross", "x")
SEQUENTIAL = "Cividis"
DIVERGING = [[0.0, "#0072B2"], [0.5, "#D0D3D8"], [1.0, "#D55E00"]]
UP = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}

Trace = dict[str, Any]


@dataclass
class Scene:
    """Traces in one coordinate system, and the heading above them."""

    title: str
    traces: list[Trace]


@dataclass
class Picture:
    """What the page shows at a time.

    Attributes:
        cloud, view: what the page's selectors call it.
        title: what a model says, or what is seen.
        facts: rows of the table below.
        notes: what is left out or changed.
        up: the axis that points up.
        members: for every centre the places of its points in the trace "points"; a click on the centre shows them.
    """

    cloud: str
    view: str
    title: str
    scenes: list[Scene]
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    up: str = "y"
    members: list[list[int]] = field(default_factory=list)


def scatter(
    points: Array,
    rows: Array,
    color: Any,
    hover: str,
    *,
    size: float = 0.0,
    marker: Mapping[str, Any] | None = None,
    **more: Any,
) -> Trace:
    """Points ``[n, 3]`` of the rows ``[n]`` of their file, which ``hover`` calls ``%{customdata}``.

    ``size`` 0: by their number.
    """
    style = {"size": size or round(float(np.clip(120 / max(len(points), 1) ** 0.5, 1.5, 6.0)), 1), "opacity": 1}
    return {
        "type": "scatter3d",
        "mode": "markers",
        **{name: points[:, axis].tolist() for axis, name in enumerate("xyz")},
        "customdata": rows.tolist(),
        "hovertemplate": f"{hover}<br>%{{x}}, %{{y}}, %{{z}}<extra></extra>",
        "marker": {**style, "color": color, "line": {"width": 0}, **(marker or {})},
        "showlegend": False,
        **more,
    }


def by_value(
    points: Array, rows: Array, values: Array, name: str, hover: str, *, diverging: bool = False, **more: Any
) -> Trace:
    """Points coloured by a number each; ``diverging`` around 0."""
    scale: Trace = {"colorscale": DIVERGING if diverging else SEQUENTIAL, "showscale": True}
    scale["colorbar"] = {"title": {"text": plain(name)}, "thickness": 12, "len": 0.6}
    low, high = (float(f(values)) if len(values) else 0.0 for f in (np.min, np.max))
    if diverging:
        high = max(abs(low), abs(high), 1e-12)
        low = -high
    scale |= {"cmin": more.pop("cmin", low), "cmax": more.pop("cmax", high)}
    colors = [float(f"{v:.4g}") for v in values.tolist()]
    return scatter(points, rows, colors, hover, marker=scale, **more)


def by_label(
    points: Array,
    rows: Array,
    labels: Array,
    names: Sequence[str],
    shown: set[int],
    hover: Sequence[str] | None = None,
) -> list[Trace]:
    """A trace for every label ``[n]`` that occurs, with its entry in the legend unless it is among ``shown``, which
    grows; -1 stands for no label. ``hover``: a text for every point instead of its label's name."""
    traces = []
    size = scatter(points, rows, GREY, "")["marker"]["size"]
    for label in np.unique(labels).tolist():
        here = np.flatnonzero(labels == label)
        known = 0 <= label < len(names)
        name = names[label] if known else "no label"
        symbol = SYMBOLS[label // len(COLOURS) % len(SYMBOLS)] if known else "circle"
        more: Trace = {} if hover is None else {"text": [plain(hover[i]) for i in here]}
        traces.append(
            scatter(
                points[here],
                rows[here],
                COLOURS[label % len(COLOURS)] if known else GREY,
                f"point %{{customdata}}: {plain(name) if hover is None else '%{text}'}",
                size=size,
                marker={"symbol": symbol},
                name=plain(name),
                legendgroup=str(label),
                **{**more, "showlegend": label not in shown},
            )
        )
        shown.add(label)
    return traces


def figure(picture: Picture) -> dict[str, Any]:
    """What the page's script draws: ``data`` and ``layout`` for plotly, and the texts around it."""
    data: list[Trace] = []
    layout: dict[str, Any] = {
        "margin": {"l": 0, "r": 0, "t": 30, "b": 0},
        "legend": {"orientation": "h", "itemsizing": "constant", "y": 0, "yanchor": "top"},
        "annotations": [],
    }
    count = len(picture.scenes)
    away = 1.0 if count == 1 else 1.5  # two scenes are narrow
    eye = {"x": 1.1 * away, "y": 0.9 * away, "z": 1.3 * away}
    for i, scene in enumerate(picture.scenes):
        key = f"scene{i + 1 if i else ''}"
        data += [{**trace, "scene": key} for trace in scene.traces]
        layout[key] = {
            "aspectmode": "data",
            "domain": {"x": [i / count, (i + 1) / count], "y": [0, 1]},
            "camera": {"up": dict(zip("xyz", UP[picture.up], strict=True)), "eye": eye},
        }
        heading = {"text": plain(scene.title), "x": (i + 0.5) / count, "y": 1, "xref": "paper", "yref": "paper"}
        layout["annotations"].append({**heading, "yanchor": "bottom", "showarrow": False})
    return {
        "cloud": picture.cloud,
        "view": picture.view,
        "title": picture.title,
        "facts": picture.facts,
        "notes": picture.notes,
        "members": picture.members,
        "data": data,
        "layout": layout,
    }


def page(pictures: Sequence[Picture], title: str) -> str:
    """The whole HTML."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from peft_suite import report

    templates = Path(str(report.__file__)).with_name("templates")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(templates), autoescape=True, trim_blocks=True)
    figures = json.dumps([figure(p) for p in pictures], ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return environment.from_string(_BODY).render(
        title=title,
        clouds=list(dict.fromkeys(p.cloud for p in pictures)),
        views=list(dict.fromkeys(p.view for p in pictures)),
        figures=Markup(figures.replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
        script=Markup(_SCRIPT),
    )


def plain(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(text, quote=False)


_BODY = """{% extends "base.html" %}
{% block body %}
<style>
.tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 14px; }
.tools select, .tools button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 12px; cursor: pointer; max-width: 100%; }
.tools button[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); font-weight: 600; }
#plot { height: 70vh; min-height: 380px; }
main { max-width: 1400px; }
</style>
<header><h1>{{ title }}</h1>
<p class="sub">Drag to turn, scroll to come closer, point at a point for its number, coordinates and label.</p></header>
<div class="tools">
<select id="cloud" aria-label="cloud"{% if clouds | length == 1 %} hidden{% endif %}>
{% for name in clouds %}<option value="{{ name }}">{{ name }}</option>{% endfor %}
</select>
<span id="views"{% if views | length == 1 %} hidden{% endif %}>
{% for name in views %}<button type="button">{{ name }}</button>
{% endfor %}
</span>
</div>
<section><h2 id="title"></h2><div id="plot"></div><noscript>This page needs JavaScript.</noscript>
<div id="notes" class="sub"></div></section>
<section id="below"><table class="facts" id="facts"></table></section>
<script>{{ plotly }}</script>
<script type="application/json" id="figures">{{ figures }}</script>
<script>{{ script }}</script>
{% endblock %}
"""

_SCRIPT = """"use strict";
(() => {
  const get = id => document.getElementById(id);
  const figures = JSON.parse(get("figures").textContent);
  const plot = get("plot"), cloud = get("cloud"), buttons = [...document.querySelectorAll("#views button")];
  // the buttons by name: newer versions of plotly have one among them that sends the data to a server
  const tools = [["toImage"], ["orbitRotation", "tableRotation", "pan3d", "zoom3d", "resetCameraDefault3d"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons: tools, plotlyServerURL: "" };
  let view = buttons[0].textContent, turning = false;
  const shade = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout) {
    const line = shade("--line");
    const axis = { color: shade("--soft"), gridcolor: line, zerolinecolor: line, showbackground: false };
    const clear = "rgba(0,0,0,0)", modebar = { bgcolor: clear, color: shade("--soft"), activecolor: shade("--accent") };
    const result = { ...layout, modebar, paper_bgcolor: clear, font: { color: shade("--ink") } };
    for (const key of Object.keys(layout).filter(k => k.startsWith("scene")))
      result[key] = { ...layout[key], xaxis: axis, yaxis: axis, zaxis: axis };
    return result;
  }

  function row(name, value) {
    const tr = document.createElement("tr"), th = document.createElement("th"), td = document.createElement("td");
    th.scope = "row"; th.textContent = name; td.textContent = value; tr.append(th, td);
    return tr;
  }

  function draw() {
    const here = figures.filter(f => f.cloud === cloud.value);
    const shown = here.find(f => f.view === view) || here[0];
    for (const b of buttons) b.setAttribute("aria-pressed", String(b.textContent === shown.view));
    get("title").textContent = shown.title;
    const paragraph = text => Object.assign(document.createElement("p"), { textContent: text });
    get("notes").replaceChildren(...shown.notes.map(paragraph));
    get("facts").replaceChildren(...Object.entries(shown.facts).map(([name, value]) => row(name, value)));
    get("below").hidden = !Object.keys(shown.facts).length;
    Plotly.purge(plot);  // a browser keeps few WebGL contexts
    Plotly.newPlot(plot, structuredClone(shown.data), themed(shown.layout), config);
    plot.on("plotly_relayout", change => {
      if (turning || !shown.layout.scene2) return;
      const [from, to] = change["scene2.camera"] ? ["scene2", "scene"] : ["scene", "scene2"];
      const camera = change[from + ".camera"];
      if (!camera) return;
      turning = true;
      Plotly.relayout(plot, { [to + ".camera"]: camera }).finally(() => { turning = false; });
    });
    plot.on("plotly_click", event => {
      const point = event.points[0], members = shown.members[point.pointNumber];
      if (!members || point.data.meta !== "centers") return;
      const points = shown.data.find(t => t.meta === "points"), target = shown.data.findIndex(t => t.meta === "chosen");
      const pick = name => [members.map(i => points[name][i])];
      Plotly.restyle(plot, { x: pick("x"), y: pick("y"), z: pick("z"), customdata: pick("customdata") }, [target]);
    });
  }

  cloud.addEventListener("change", draw);
  for (const b of buttons) b.addEventListener("click", () => { view = b.textContent; draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
"""
