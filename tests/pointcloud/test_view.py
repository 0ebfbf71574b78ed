"""The viewer: what is in the page's traces, for every view; what it refuses; the window that is optional."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloud_data as made
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import peft_suite as ps
from peft_suite import kernels
from peft_suite.cli.app import build
from peft_suite.errors import ConfigError, DataError, UnsupportedError
from peft_suite.pointcloud import view_verb
from peft_suite.pointcloud.anatomies import pointgpt, recon, segmenter
from peft_suite.pointcloud.anatomies.point_transformer import clouds, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.models.segmentation import PartSegmenter
from peft_suite.pointcloud.view import Viewer
from peft_suite.pointcloud.view_attention import attention
from peft_suite.pointcloud.view_page import COLOURS, GREY, Picture, figure, page
from peft_suite.train.opening import Opened

SEEN = {"num_points": 40, "groups": 8, "group_size": 6}
CLASSES = ("chair", "lamp <b>", "sofa", "table", "stool")
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def call(*words: str) -> Result:
    return CliRunner().invoke(build(), ["pointcloud", "view", *words])


def figures(file: Path) -> list[dict[str, Any]]:
    text = file.read_text("utf-8")
    assert "https://cdn" not in re.sub(r"(?s)<script>/\*.*?</script>", "", text)
    found = re.findall(r'(?s)<script type="application/json" id="figures">(.*?)</script>', text)
    assert len(found) == 1
    loaded: list[dict[str, Any]] = json.loads(found[0])
    return loaded


def opened(model: nn.Module, classes: tuple[str, ...] = CLASSES, **preprocessing: Any) -> Opened:
    return Opened(model.eval(), {"preprocessing": {**SEEN, **preprocessing}, "classes": classes}, Path("adapter"))


def saved(folder: Path, name: str, values: Array) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / name, values)
    return str(folder / name)


def drawn(trace: dict[str, Any]) -> Array:
    return np.array([trace["x"], trace["y"], trace["z"]]).T


def one(viewer: Viewer, file: str, view: str) -> tuple[Picture, dict[str, Any]]:
    (picture,) = viewer.pictures(file, [view])
    return picture, json.loads(json.dumps(figure(picture), allow_nan=False))


def test_points_by_height_colour_and_label(tmp_path: Path) -> None:
    points = made.cloud()
    _, shown = one(Viewer(up="z"), saved(tmp_path, "a.npy", points), "points")
    (trace,) = shown["data"]
    assert np.allclose(drawn(trace), points, atol=1e-3) and trace["customdata"] == list(range(64))
    assert np.allclose(trace["marker"]["color"], points[:, 2], atol=1e-2)
    scene = shown["layout"]["scene"]
    assert scene["aspectmode"] == "data" and scene["camera"]["up"] == {"x": 0, "y": 0, "z": 1}
    assert shown["notes"] == [] and trace["type"] == "scatter3d"
    level = np.arange(64, dtype=np.uint8)
    made.ply(tmp_path / "b.ply", points, red=level, green=level * 0, blue=level * 0 + 255, label=np.arange(64) // 32)
    (trace,) = one(Viewer(), str(tmp_path / "b.ply"), "points")[1]["data"]
    assert trace["marker"]["color"][:2] == ["#0000ff", "#0100ff"] and trace["text"][40] == "label 1"


def test_many_points_are_capped_with_a_note_and_far_ones_moved(tmp_path: Path) -> None:
    far = made.cloud(count=500).astype(np.float64) + np.array([400_000.5, 5_000_000, 0])
    picture, shown = one(Viewer(points=100), saved(tmp_path, "a.npy", far), "points")
    (trace,) = shown["data"]
    assert len(trace["x"]) == 100 and any("100 of 500" in note for note in picture.notes)
    moved = far[trace["customdata"]] - drawn(trace)
    assert np.ptp(moved, axis=0).max() < 1e-2 and "minus (400,00" in picture.notes[1]
    again = one(Viewer(points=100), saved(tmp_path, "a.npy", far), "points")[1]
    assert again["data"] == shown["data"]


def test_classes(tmp_path: Path) -> None:
    model = ps.adapt(tiny(), "lora")
    viewer = Viewer(opened(model))
    picture, shown = one(viewer, saved(tmp_path, "a.npy", made.cloud()), "classes")
    told = {k.removeprefix("probability of "): float(v[:-2]) for k, v in picture.facts.items() if v.endswith("%")}
    assert set(told) == set(CLASSES) and abs(sum(told.values()) - 100) < 0.4
    assert picture.title.startswith(f"predicted: {max(told, key=lambda name: told[name])} ")
    assert viewer.usual == "classes" and len(shown["data"][0]["x"]) == 64


def segmented(parts: dict[str, list[int]], names: tuple[str, ...]) -> tuple[PartSegmenter, Opened]:
    model = PartSegmenter(len(names), categories=len(parts), embed_dim=24, depth=3, num_heads=2, groups=8, group_size=6)
    return model.eval(), opened(model, names, parts=parts)


def test_parts_beside_the_labels_of_the_file(tmp_path: Path) -> None:
    names = ("chair/back", "chair/leg", "lamp/foot", "lamp/shade", "lamp/pole")
    model, found = segmented({"chair": [0, 1], "lamp": [2, 3, 4]}, names)
    points = made.cloud()[:30]  # fewer than the network takes
    labels = np.array([2, 0, -1] * 10)
    file = saved(tmp_path / "lamp", "a.npy", points)
    (tmp_path / "lamp" / "a.seg").write_text("\n".join(map(str, labels)))
    picture, shown = one(Viewer(found), file, "parts")
    assert picture.facts["category"] == "lamp" and Viewer(found).usual == "parts"
    sides: dict[str, dict[int, str]] = {"scene": {}, "scene2": {}}
    for trace in shown["data"]:
        sides[trace["scene"]] |= dict.fromkeys(trace["customdata"], trace["name"])
    told = {2: "lamp/pole", 0: "lamp/foot", -1: "no label"}
    assert [sides["scene2"][i] for i in range(30)] == [told[v] for v in labels.tolist()]
    x = points - points.mean(0)
    x = torch.from_numpy(np.resize(x / np.linalg.norm(x, axis=1).max(), (40, 3)).astype(np.float32))[None]
    with torch.no_grad():
        said = model(x, torch.tensor([1]))[0, :30, 2:].argmax(1)
    assert [sides["scene"][i] for i in range(30)] == [names[2 + i] for i in said.tolist()]
    right = np.mean([sides["scene"][i] == sides["scene2"][i] for i in range(30) if labels[i] >= 0])
    assert picture.facts["points of their true part"] == f"{100 * right:.1f} % of 20"
    entries = [trace["name"] for trace in shown["data"] if trace["showlegend"]]
    assert len(entries) == len(set(entries)) and any("several times" in note for note in picture.notes)


def test_labels_by_number_and_of_others(tmp_path: Path) -> None:
    _, found = segmented({"Bag": [0, 1], "Mug": [2, 3]}, ("Bag/0", "Bag/1", "Mug/0", "Mug/1"))
    points = made.cloud(count=40)
    for codes, other in (([0, 1], False), ([2, 3], False), ([0, 7], True)):
        file = made.ply(tmp_path / "Mug.ply", points, label=np.resize(codes, 40))
        place = tmp_path / "Mug"
        place.mkdir(exist_ok=True)
        picture, shown = one(Viewer(found), str(file.replace(place / "a.ply")), "parts")
        assert ("scene2" in shown["layout"]) is not other
        assert any("(0, 7) are not those of 'Mug'" in note for note in picture.notes) is other
        if not other:
            true = [t for t in shown["data"] if t["scene"] == "scene2"]
            assert [t["name"] for t in true] == ["Mug/0", "Mug/1"] and true[0]["customdata"] == list(range(0, 40, 2))
    alone = one(Viewer(found), saved(tmp_path, "a.npy", points), "parts")  # its folder is no category
    assert "unknown" in alone[0].facts["category"] and "scene2" not in alone[1]["layout"]


def test_groups(tmp_path: Path) -> None:
    points = made.cloud(count=1024)
    _, shown = one(Viewer(groups=16, group_size=10), saved(tmp_path, "a.npy", points), "groups")
    members, centers, chosen = shown["data"]
    assert drawn(centers).shape == (16, 3) and len(members["x"]) == 1024 and chosen["x"] == []
    assert [t["meta"] for t in shown["data"]] == ["points", "centers", "chosen"]
    gaps = np.linalg.norm(points[centers["customdata"]][:, None] - points[None], axis=2)
    for g, inside in enumerate(shown["members"]):
        rows = {members["customdata"][i] for i in inside}
        assert rows == set(gaps[g].argsort()[:10].tolist())
    owners = [int(t.split()[1].rstrip(",")) if t.startswith("group") else -1 for t in members["text"]]
    for i, owner in enumerate(owners):
        mine = [g for g in range(16) if i in shown["members"][g]]
        assert (owner == min(mine, key=lambda g: gaps[g, i])) if mine else members["marker"]["color"][i] == GREY
    colors = centers["marker"]["color"]
    nearest = np.linalg.norm(points[centers["customdata"]][:, None] - points[centers["customdata"]], axis=2).argsort()
    assert all(colors[g] != colors[nearest[g, 1]] for g in range(16)) and set(colors) <= set(COLOURS)
    few = one(Viewer(groups=16, group_size=10, points=50), saved(tmp_path, "a.npy", points), "groups")[1]
    assert len(few["data"][0]["x"]) == 50 and max(max(m, default=0) for m in few["members"]) < 50


def test_basis(tmp_path: Path) -> None:
    points = made.cloud(count=200)
    viewer = Viewer(groups=12, group_size=8, vector=2)
    picture, shown = one(viewer, saved(tmp_path, "a.npy", points), "basis")
    around, centers = shown["data"]
    x = torch.from_numpy(points[centers["customdata"]])
    x = (x - torch.from_numpy(points).mean(0)) / np.linalg.norm(points - points.mean(0), axis=1).max()
    basis = kernels.graph_fourier_basis(x[None])
    assert np.allclose(centers["marker"]["color"], basis.v[0, :, 2], atol=1e-3)
    assert picture.facts["eigenvalue"] == f"{float(basis.w[0, 2]):.4f}"
    near = np.linalg.norm(points[:, None] - points[centers["customdata"]], axis=2).argmin(1)
    assert np.allclose(around["marker"]["color"], np.array(centers["marker"]["color"])[near], atol=1e-6)
    assert around["marker"]["cmin"] == -around["marker"]["cmax"] == centers["marker"]["cmin"]
    with pytest.raises(ConfigError, match="--vector 12: 12 centres have the eigenvectors 0 to 11"):
        one(Viewer(groups=12, group_size=8, vector=12), saved(tmp_path, "a.npy", points), "basis")


@pytest.mark.parametrize(
    ("method", "first", "own", "front"),
    [
        (None, 1, 0, 0),
        ("lora(rank=2)", 1, 0, 0),
        ("vpt(num_tokens=3)", 1, 0, 0),
        ("vpt(num_tokens=3, position=start)", 4, 3, 0),
        ("vpt(num_tokens=3, position=after_prefix, deep=True)", 4, 0, 0),
    ],
)
def test_attention_is_the_blocks_own(method: str | None, first: int, own: int, front: int) -> None:
    model: Any = tiny()
    model = model if method is None else ps.adapt(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    kept: list[torch.Tensor] = []
    model.blocks.blocks[1].attn.qkv.register_forward_hook(lambda module, args, output: kept.append(output))
    points = clouds()[:1]
    found = attention(model.eval(), points, 1)
    q, k, _ = kept[0].detach()[0].view(-1, 3, 2, 12).permute(1, 2, 0, 3)  # [heads, tokens, width]
    wanted = (q @ k.mT / 12**0.5).softmax(2).mean(0)[own]
    assert torch.allclose(found.patches, wanted[first : first + 8], atol=1e-6)
    assert found.itself == pytest.approx(float(wanted[own]), abs=1e-6)
    assert found.others == pytest.approx(1 - float(wanted[own] + found.patches.sum()), abs=1e-5)
    assert not model.blocks.blocks[1]._forward_pre_hooks


def test_attention_of_recon_and_where_there_is_none(tmp_path: Path) -> None:
    model, points = recon.example()[0], clouds()[:1]
    found = attention(model, points, 0)
    assert found.patches.shape == (8,) and float(found.patches.sum()) == pytest.approx(1) and found.itself == 0
    with pytest.raises(UnsupportedError, match=r"pointgpt stands before the patches.*Use --show groups"):
        attention(pointgpt.example()[0], points, 0)
    with pytest.raises(UnsupportedError, match="point-segmenter has no class token"):
        attention(segmenter.example()[0], points, 0)
    with pytest.raises(ConfigError, match="--block 2: the backbone has the blocks 0 to 1"):
        attention(model, points, 2)
    picture, shown = one(Viewer(opened(tiny())), saved(tmp_path, "a.npy", made.cloud()), "attention")
    around, centers = shown["data"]
    assert picture.title.endswith("block 1") and len(around["x"]) == 64 and len(centers["x"]) == 8
    assert sum(centers["marker"]["color"]) == pytest.approx(float(picture.facts["on patches"][:-2]), abs=0.1)


def test_what_is_refused(tmp_path: Path) -> None:
    few = saved(tmp_path, "few.npy", made.cloud()[:5])
    odd = tmp_path / "a.plyy"
    odd.write_text("x")
    with pytest.raises(DataError, match=r"unknown extension '.plyy'. Did you mean '.ply'"):
        Viewer().pictures(str(odd), ["points"])
    with pytest.raises(DataError, match=r"has 5 points, and one group needs 32. Lower --group-size"):
        Viewer().pictures(few, ["groups"])
    with pytest.raises(DataError, match=r"has 5 points, and one group needs 6. Give a cloud with more points"):
        Viewer(opened(tiny())).pictures(few, ["classes"])
    for view in ("classes", "parts", "attention"):
        with pytest.raises(ConfigError, match=f"--show {view} needs a trained model. Give --adapter RUN/adapter"):
            Viewer().pictures(few, [view])
    with pytest.raises(ConfigError, match="Use --show classes"):
        Viewer(opened(tiny())).pictures(few, ["parts"])
    with pytest.raises(ConfigError, match=r"--show group: Did you mean 'groups'\?"):
        Viewer().pictures(few, ["group"])
    np.save(tmp_path / "nan.npy", np.full((50, 3), np.nan))
    with pytest.raises(DataError, match="cannot be shown: 50 of 50 points have a coordinate that is NaN"):
        Viewer().pictures(str(tmp_path / "nan.npy"), ["points"])


def test_page_escapes_what_it_is_told() -> None:
    scene = figure(Picture("</script><i>", "points", "</script>", [], {"<": "&"}))
    text = page([Picture("</script><i>", "points", "</script>", [], {"<": "&"})], "<marquee>")
    body = text[text.index("<main>") :]
    assert body.count("</script>") == 3 and "<marquee>" not in body and scene["title"] == "</script>"


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "groups": 8, "group_size": 6}
    torch.manual_seed(0)
    model = backbones.build("point-mae", 5, pretrained=False, checkpoint="", options=options)
    facts = {"name": "point-mae", "options": options, "pretrained": False, "num_outputs": 5}
    ps.adapt(model, "linear")
    metadata = {"plugin": "pointcloud", "backbone": facts, "classes": list(CLASSES), "preprocessing": SEEN}
    ps.save(model, tmp_path / "adapter", metadata=metadata)
    made.folder(tmp_path / "data", {"chair": 2, "lamp": 1})
    out = tmp_path / "page.html"
    words = ["--adapter", str(tmp_path / "adapter"), "--out", str(out), "--no-window", "--json"]
    done = call(str(tmp_path / "data"), *words, "--show", "classes", "--show", "attention", "--block", "0")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["written"] == str(out) and told["bytes"] == out.stat().st_size > 3e6
    shown = figures(out)
    names = [str(tmp_path / "data" / "chair" / "000.npy"), "001.npy", str(tmp_path / "data" / "lamp" / "000.npy")]
    assert [(f["cloud"], f["view"]) for f in shown] == [(n, v) for n in names for v in ("classes", "attention")]
    assert shown[0]["title"].startswith("predicted: ") and shown[1]["title"].endswith("block 0")
    text = out.read_text("utf-8")
    assert all(f'<option value="{name}">' in text for name in names) and "Plotly.newPlot" in text
    assert "modeBarButtons: tools" in text  # not plotly's own choice, which can hold one that uploads the data

    file = names[0]
    for words, said in (
        (["--out", "a.png"], "must end in .html"),
        (["--block", "1"], "Add --show attention"),
        (["--vector", "1"], "Add --show basis"),
        (["--up", "w"], "choose x, y or z"),
        (["--adapter", str(tmp_path), "--groups", "3"], "those of the adapter's backbone"),
        (["--show", "classes"], "needs a trained model"),
    ):
        refused = call(file, *words)
        assert refused.exit_code == 1 and said in refused.output, refused.output
    assert "does not exist" in call(str(tmp_path / "none")).output
    monkeypatch.setattr(view_verb, "MOST", 2)
    assert "at most 2 clouds, and there are 3" in call(str(tmp_path / "data")).output
    assert not (Path.cwd() / "view.html").exists()


def test_window_only_with_display_and_open3d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, _ = one(Viewer(groups=8, group_size=8), saved(tmp_path, "a.npy", made.cloud()), "groups")
    height, _ = one(Viewer(), saved(tmp_path, "a.npy", made.cloud()), "points")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not view_verb.open_window(picture)
    opened_with: list[Any] = []
    fake = SimpleNamespace(
        __spec__=SimpleNamespace(name="open3d"),
        geometry=SimpleNamespace(PointCloud=lambda points: SimpleNamespace(points=points)),
        utility=SimpleNamespace(Vector3dVector=np.asarray),
        visualization=SimpleNamespace(draw_geometries=lambda clouds, window_name: opened_with.append(clouds[0])),
    )
    monkeypatch.setitem(sys.modules, "open3d", fake)  # type: ignore[arg-type]
    assert not view_verb.open_window(picture) and not opened_with
    monkeypatch.setenv("DISPLAY", ":0")
    assert view_verb.open_window(picture) and view_verb.open_window(height)
    assert [c.points.shape for c in opened_with] == [(72, 3), (64, 3)]
    assert all(c.colors.shape == c.points.shape and 0 <= c.colors.min() <= c.colors.max() <= 1 for c in opened_with)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no GL")

    fake.visualization.draw_geometries = broken
    assert not view_verb.open_window(picture)
    monkeypatch.setitem(sys.modules, "open3d", None)  # type: ignore[arg-type]
    assert not view_verb.open_window(picture)
