"""One cloud from one file: every extension, every way in which it can be wrong, and pickles that run nothing."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import cloud_data as made
import numpy as np
import pytest

from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.formats import EXTENSIONS, fault, parse_columns, read_cloud
from peft_suite.pointcloud.pickles import load_numbers
from peft_suite.pointcloud.ply import read_ply_mesh

POINTS = made.cloud(count=40)
COLORS = np.random.default_rng(0).integers(0, 256, (40, 3)).astype(np.uint8)
LABELS = np.arange(40) % 4


def rgb(name: str = "") -> dict[str, Any]:
    return {n: COLORS[:, i] for i, n in enumerate(("red", "green", "blue"))}


def test_every_extension_is_tried_here() -> None:
    tested = {".ply", ".obj", ".off", ".stl", ".pcd", ".npy", ".npz", ".txt", ".csv", ".xyz", ".pts", ".bin", ".las"}
    assert tested | {".laz"} == set(EXTENSIONS)


# ---- tables


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".xyz", ".pts"])
@pytest.mark.parametrize("separator", [" ", ",", "; ", "\t"])
def test_text(tmp_path: Path, suffix: str, separator: str) -> None:
    file = tmp_path / f"a{suffix}"
    np.savetxt(file, POINTS, "%.7g", separator)
    np.testing.assert_allclose(read_cloud(file).points, POINTS, rtol=1e-6)


def test_text_columns_by_number_header_and_name(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    np.savetxt(file, made.with_normals(count=40))
    assert read_cloud(file).normals is not None and read_cloud(file).colors is None
    np.savetxt(file, np.concatenate([POINTS, COLORS, LABELS[:, None]], 1))
    cloud = read_cloud(file, columns="x,y,z,r,g,b,label")
    np.testing.assert_allclose(cloud.colors, COLORS / 255, rtol=1e-6)
    assert cloud.labels is not None and cloud.labels.tolist() == LABELS.tolist()
    assert read_cloud(file, labelled=True).labels is not None
    file.write_text("# a comment\n//x z y\nx z y Red\n" + "\n".join(f"{a} {b} {c} 7" for a, b, c in POINTS) + "\n\n")
    np.testing.assert_allclose(read_cloud(file).points, POINTS[:, [0, 2, 1]], rtol=1e-6)
    file.write_text("40\n" + "\n".join(f"{a} {b} {c}" for a, b, c in POINTS))
    assert read_cloud(file).points.shape == (40, 3)
    np.savetxt(tmp_path / "a.pts", np.concatenate([POINTS, LABELS[:, None], COLORS], 1))
    pts = read_cloud(tmp_path / "a.pts")
    assert pts.intensity is not None and pts.colors is not None and pts.labels is None


def test_text_keeps_the_precision_of_a_survey(tmp_path: Path) -> None:
    file = tmp_path / "a.xyz"
    exact = POINTS.astype(np.float64) + np.array([691_234.125, 5_334_765.0625, 500])
    np.savetxt(file, exact, "%.6f")
    np.testing.assert_allclose(read_cloud(file).points, exact, atol=1e-5)


def test_npy_npz_bin(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", made.with_normals(count=40))
    assert read_cloud(tmp_path / "a.npy").normals is not None
    np.savez(tmp_path / "a.npz", xyz=POINTS, rgb=COLORS, label=LABELS[:, None])
    cloud = read_cloud(tmp_path / "a.npz")
    assert cloud.colors is not None and float(cloud.colors.max()) <= 1 and cloud.labels is not None
    np.concatenate([POINTS, np.ones((40, 1))], 1).astype("<f4").tofile(tmp_path / "a.bin")
    scan = read_cloud(tmp_path / "a.bin")
    np.testing.assert_array_equal(scan.points, POINTS)
    assert scan.intensity is not None and scan.intensity.tolist() == [1.0] * 40


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_las(tmp_path: Path, suffix: str) -> None:
    laspy = pytest.importorskip("laspy")
    las = laspy.create(point_format=2)
    las.header.scales, las.header.offsets = [0.001] * 3, [600_000, 5_000_000, 0]
    las.x, las.y, las.z = (POINTS.astype(np.float64) + np.array([600_000, 5_000_000, 0])).T
    las.red, las.green, las.blue = (COLORS.astype(np.uint16) * 257).T
    las.classification = LABELS
    las.write(tmp_path / f"a{suffix}")
    cloud = read_cloud(tmp_path / f"a{suffix}", labelled=True)
    np.testing.assert_allclose(cloud.points - [600_000, 5_000_000, 0], POINTS, atol=2e-3)
    np.testing.assert_allclose(cloud.colors, COLORS / 255, atol=1e-6)
    assert cloud.labels is not None and cloud.labels.tolist() == LABELS.tolist()
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(data[: len(data) - 300])
    with pytest.raises(DataError, match=f"b{suffix}"):
        read_cloud(tmp_path / f"b{suffix}")


# ---- PLY and PCD


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply(tmp_path: Path, order: str) -> None:
    nx, ny, nz = made.normals(40).T
    file = made.ply(tmp_path / "a.ply", POINTS, None, order, nx=nx, ny=ny, nz=nz, **rgb(), label=LABELS)
    cloud = read_cloud(file)
    np.testing.assert_allclose(cloud.points, POINTS, rtol=1e-6)
    np.testing.assert_allclose(cloud.colors, COLORS / 255, rtol=1e-6)
    assert cloud.normals is not None and cloud.labels is not None and cloud.labels.tolist() == LABELS.tolist()
    squares = np.array([[0, 1, 3, 2], [4, 5, 7, 6]])
    mesh = made.ply(tmp_path / "m.ply", made.CUBE, squares, order)
    vertices, faces = read_ply_mesh(mesh)
    assert faces.tolist() == [[0, 1, 3], [0, 3, 2], [4, 5, 7], [4, 7, 6]] and len(vertices) == 8
    drawn = read_cloud(mesh, mesh_points=100).points
    assert drawn.shape == (100, 3) and set(np.unique(drawn[:, 0])) == {0.0, 1.0}
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"a\.ply.*truncated: \d+ of 40 vertex rows"):
        read_cloud(file)
    whole = mesh.read_bytes()
    mesh.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=r"m\.ply.*truncated: 1 of 2 face rows"):
        read_cloud(mesh)


def test_ply_polygons_of_any_size_and_strips(tmp_path: Path) -> None:
    mixed: Any = [[0, 1, 3, 2], [4, 5, 7], [0, 1]]
    _, faces = read_ply_mesh(made.ply(tmp_path / "m.ply", made.CUBE, mixed))
    assert faces.tolist() == [[0, 1, 3], [0, 3, 2], [4, 5, 7]]
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 8\nproperty float x\nproperty float y\n"
    head += "property float z\nelement tristrips 1\nproperty list int int vertex_indices\nend_header\n"
    strip = [0, 1, 2, 3, -1, 4, 5, 6]
    body = made.CUBE.astype("<f4").tobytes() + struct.pack(f"<i{len(strip)}i", len(strip), *strip)
    (tmp_path / "s.ply").write_bytes(head.encode() + body)
    assert read_ply_mesh(tmp_path / "s.ply")[1].tolist() == [[0, 1, 2], [3, 2, 1], [4, 5, 6]]
    (tmp_path / "x.ply").write_bytes(b"solid")
    with pytest.raises(DataError, match="does not begin with 'ply'"):
        read_cloud(tmp_path / "x.ply")


def pcd(path: Path, mode: str, values: Any = POINTS, height: int = 1) -> Path:
    packed = (COLORS[:, 0].astype("u4") << 16 | COLORS[:, 1].astype("u4") << 8 | COLORS[:, 2]).view("f4")
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb label\nSIZE 4 4 4 4 4\nTYPE F F F F U\nCOUNT 1 1 1 1 1\n"
    head += f"WIDTH {40 // height}\nHEIGHT {height}\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 40\nDATA {mode}\n"
    table = np.zeros(40, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<f4"), ("label", "<u4")])
    table["x"], table["y"], table["z"], table["rgb"], table["label"] = *values.T, packed, LABELS
    if mode == "ascii":
        body = "\n".join(" ".join(map(repr, row)) for row in table.tolist()).encode()
    elif mode == "binary":
        body = table.tobytes()
    else:  # stored without a match: runs of at most 32 bytes
        raw = b"".join(table[n].tobytes() for n in table.dtype.names or ())
        runs = [raw[i : i + 32] for i in range(0, len(raw), 32)]
        lzf = b"".join(bytes([len(r) - 1]) + r for r in runs)
        body = struct.pack("<II", len(lzf), len(raw)) + lzf
    path.write_bytes(head.encode() + body)
    return path


@pytest.mark.parametrize("mode", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path: Path, mode: str) -> None:
    cloud = read_cloud(pcd(tmp_path / "a.pcd", mode))
    np.testing.assert_allclose(cloud.points, POINTS, rtol=1e-6)
    np.testing.assert_allclose(cloud.colors, COLORS / 255, rtol=1e-6)
    assert cloud.labels is not None and cloud.labels.tolist() == LABELS.tolist()
    whole = (tmp_path / "a.pcd").read_bytes()
    (tmp_path / "a.pcd").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"a\.pcd.*truncated"):
        read_cloud(tmp_path / "a.pcd")


def test_pcd_images_of_points_and_back_references(tmp_path: Path) -> None:
    from peft_suite.pointcloud.pcd import _lzf

    assert _lzf(bytes([2]) + b"abc" + bytes([(3 << 5), 2]), 8) == b"abcabcab"
    assert _lzf(bytes([0]) + b"a" + bytes([7 << 5, 3, 0]), 13) == b"a" * 13
    holes = POINTS.copy()
    holes[::4] = np.nan
    assert len(read_cloud(pcd(tmp_path / "a.pcd", "binary", holes, height=4)).points) == 30
    assert "10 of 40 points" in fault(read_cloud(pcd(tmp_path / "b.pcd", "binary", holes)).points)


# ---- meshes


def mesh(path: Path) -> Path:
    import trimesh

    trimesh.Trimesh(made.CUBE, made.SIDES, process=False).export(path)
    return path


@pytest.mark.parametrize("suffix", [".obj", ".off", ".stl", ".ply"])
def test_meshes_are_sampled_by_area_with_a_seed(tmp_path: Path, suffix: str) -> None:
    file = mesh(tmp_path / f"a{suffix}")
    cloud = read_cloud(file, mesh_points=3000, seed=1)
    p = cloud.points
    on_side = np.isclose(p, 0, atol=1e-6) | np.isclose(p, 1, atol=1e-6)
    assert on_side.any(1).all() and p.shape == (3000, 3)
    shares = np.array([np.isclose(p[:, a], v, atol=1e-6).mean() for a in range(3) for v in (0, 1)])
    assert abs(shares - 1 / 6).max() < 0.03
    assert cloud.normals is not None
    np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=1), 1, rtol=1e-5)
    assert np.array_equal(read_cloud(file, mesh_points=3000, seed=1).points, p)
    assert not np.array_equal(read_cloud(file, mesh_points=3000, seed=2).points, p)


def test_off_with_the_counts_on_the_first_line(tmp_path: Path) -> None:
    rows = [" ".join(map(str, v)) for v in made.CUBE] + [f"3 {a} {b} {c}" for a, b, c in made.SIDES]
    (tmp_path / "a.off").write_text("OFF8 12 0\n" + "\n".join(rows) + "\n")  # as in ModelNet's own files
    assert len(read_cloud(tmp_path / "a.off", mesh_points=50).points) == 50


# ---- bad files


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, match: str, data: bytes | str = b"", **options: Any) -> None:
        file = tmp_path / name
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        with pytest.raises(DataError, match=match) as caught:
            read_cloud(file, **options)
        assert name in str(caught.value)

    refused("a.obj", "a mesh without faces", "v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    refused("flat.obj", "without any area", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    refused("a.off", "a mesh without faces|not readable", "OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n")
    refused("cut.off", "OFF", "OFF\n8 12 0\n0 0 0\n")
    refused("a.stl", "STL|a mesh without faces", b"solid nothing\nendsolid\n")
    refused("a.docx", r"unknown extension '\.docx'.*\.ply", b"x")
    refused("plyy.pyl", r"Did you mean '\.ply'", b"x")
    refused("empty.ply", "the file is empty")
    refused("a.bin", "truncated: 30 bytes are no multiple of 16", b"0" * 30)
    refused("a.txt", r"data line 2 has 2 of 3 values: '4 5'", "1 2 3\n4 5\n6 7 8\n9 1 2\n")
    refused("cut.txt", r"the last line has 2 of 3 values", "1 2 3\n6 7 8\n9 1")
    refused("words.txt", r"data line 2 has no numbers: '4 five 6'", "1 2 3\n4 five 6\n7 8 9\n")
    refused("b.txt", "no line of numbers", "hello\n")
    refused("two.xyz", "2 columns of unknown meaning", "1 2\n3 4\n")
    refused("c.txt", "4 columns, and data.columns names 3", "1 2 3 4\n5 6 7 8\n", columns="x y z")
    refused("l.txt", "label column", "1 2 3 0.5\n5 6 7 1\n", labelled=True)
    refused("a.npz", "not readable as NPZ", b"PK broken")
    refused("a.npy", "not readable as NPY", b"\x93NUMPY\x01\x00v\x00")
    refused("a.pcd", "a PCD header without FIELDS", b"VERSION 0.7\n")
    refused("a.las", "not readable as LAS", b"LASF" + bytes(100))
    with pytest.raises(DataError, match=r"nowhere\.ply.*does not exist"):
        read_cloud(tmp_path / "nowhere.ply")


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Bomb()], object))
    np.savez(tmp_path / "b.npz", points=np.array([Bomb()], object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(DataError, match=name):
            read_cloud(tmp_path / name)
    np.savez(tmp_path / "c.npz", cloud=POINTS)
    with pytest.raises(DataError, match="no array named points or xyz or pos; it has cloud"):
        read_cloud(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", points=POINTS, labels=LABELS[:30])
    with pytest.raises(DataError, match="40 points and 30 labels"):
        read_cloud(tmp_path / "d.npz")


def test_faults_of_clouds() -> None:
    nan = POINTS.copy()
    nan[3, 1] = np.nan
    nan[4, 1] = np.inf
    assert fault(POINTS) == ""
    assert fault(nan) == "2 of 40 points have a coordinate that is NaN or infinite"
    assert fault(np.ones((40, 3))) == "all 40 points are equal"
    assert "40 points, and at least 64" in fault(POINTS, 64)
    assert "[40, 2]" in fault(POINTS[:, :2])
    assert fault(POINTS[:0])


def test_columns_are_checked() -> None:
    assert parse_columns("X, Y z _ red") == ("x", "y", "z", "_", "r")
    for wrong, match in (("x y", "name x, y and z"), ("x y z x", "no column twice"), ("x y z lable", "'label'")):
        with pytest.raises(ConfigError, match=match):
            parse_columns(wrong)


# ---- pickles


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_numbers(tmp_path: Path, protocol: int) -> None:
    value = {
        "train": [(POINTS, 3, np.int32(7)), (POINTS.astype(">f8").T.copy(order="F"), 1, np.float32(0.5))],
        "test": [[np.array([3], np.int32)], True, None, "x"],
    }
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    read = load_numbers(file)
    np.testing.assert_array_equal(read["train"][0][0], POINTS)
    np.testing.assert_array_equal(read["train"][1][0], POINTS.T)
    assert read["train"][0][1:] == (3, 7) and read["train"][1][2] == 0.5
    assert read["test"] == [[np.array([3], np.int32)], True, None, "x"]


def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.dat"
    loop: list[Any] = []
    loop.append(loop)
    nested: Any = [1]
    for _ in range(60):
        nested = [nested, nested]  # 2^60 entries, if read naively
    bad: list[tuple[Any, str]] = [
        (Bomb(), "posix.mkdir|nt.mkdir"),
        ([np.array([Bomb(), 1], object)], "type 'O8'|posix.mkdir"),
        (np.array(["a"], object), "type 'O8'"),
        (np.zeros(2, [("a", "f4")]), "type|objects"),
        (np.array(["text"]), "type 'U4'"),
        (np.float32, "numpy.float32"),
        ({1, 2}, "set"),
        (Path, "pathlib"),
        (eval, "builtins.eval|__builtin__"),
        (loop, "holds itself"),
    ]
    for value, match in bad:
        for protocol in (2, 4):
            file.write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(DataError, match=match) as caught:
                load_numbers(file)
            assert "a.dat" in str(caught.value)
    assert not (tmp_path / "was-run").exists()
    file.write_bytes(pickle.dumps(nested))
    assert len(load_numbers(file)) == 2
    for data, match in (
        (b"", "damaged"),
        (pickle.dumps([POINTS])[:-50], "damaged"),
        (b"\x80\x04Pid.", "damaged|refers"),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError, match=match):
            load_numbers(file)
    # numpy's own functions with unexpected arguments
    for text in (b"cnumpy\ndtype\n(Vf4\ntR.", b"cnumpy\nndarray\n(I3\ntR.", b"c_codecs\nencode\n(Va\nVzlib\ntR."):
        file.write_bytes(text)
        with pytest.raises(DataError):
            load_numbers(file)
