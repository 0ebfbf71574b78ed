"""Folders to try the guides with: scans of meshes, and a LiDAR folder in the formats that scanners write.

    python pointcloud_data.py scans --meshes cad --out scans     # one noisy scan a mesh, seen from the back
    python pointcloud_data.py lidar --out lidar                  # CLASS/NAME.{bin,las,pcd}, z up, with intensity
    python pointcloud_data.py lidar --out lidar --broken         # and two files that no one can use

``scans`` makes what a scanner would see of each mesh; the names of the files are the names of the meshes. ``lidar``
makes furniture from simple bodies: metres, z up, with intensity, ``.las`` with coordinates of a survey. Same seed, same
files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from peft_suite.pointcloud.formats import MESHES, Array, read_cloud
from peft_suite.pointcloud.shapes import target_cloud
from peft_suite.pointcloud.shifted import scan
from peft_suite.pointcloud.views import visible

CLASSES = ("bench", "chair", "lamp", "table")
SIZES = {"train": 12, "test": 6}  # clouds of a class
SURVEY = (512_340.0, 5_401_120.0, 431.0)  # where the .las files lie


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scans", "lidar"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--meshes", type=Path, help="folder of meshes, for scans")
    parser.add_argument("--broken", action="store_true", help="add a truncated file and one of NaN, for lidar")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "lidar":
        count = lidar(options.out, options.seed, options.broken)
    elif options.meshes is None or not options.meshes.is_dir():
        parser.error(f"--meshes {options.meshes}: scans needs a folder of meshes")
    else:
        count = scans(options.meshes, options.out, options.seed)
    print(f"{count} files written to {options.out}")


def scans(meshes: Path, out: Path, seed: int) -> int:
    """One .ply of each mesh: what is seen from behind (x < 0), with noise of 1 % of the mesh's radius."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(p for p in meshes.iterdir() if p.suffix.lower() in MESHES)
    for number, file in enumerate(files):
        cloud = read_cloud(file, mesh_points=16000)
        rng = np.random.default_rng([seed, number])
        points = cloud.points - cloud.points.mean(0)
        radius = np.linalg.norm(points, axis=1).max()
        toward = np.array([-1.0, rng.uniform(-0.3, 0.6), rng.uniform(-0.6, 0.6)])
        seen = points[visible(points / radius, toward, 0.06, cloud.normals)]
        seen = seen[rng.permutation(len(seen))[:4000]]
        _write_ply(out / f"{file.stem}.ply", seen + rng.normal(0, 0.01 * radius, seen.shape))
    return len(files)


def lidar(out: Path, seed: int, broken: bool) -> int:
    """``out/SPLIT/CLASS/NNN`` in turn as KITTI .bin, .las and .pcd; returns how many files."""
    import laspy

    count = 0
    for split, size in SIZES.items():
        for label, name in enumerate(CLASSES):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(size):
                rng = np.random.default_rng([seed, split == "test", label, i])
                x, y, z = scan(target_cloud(name, 2400, rng), rng).T
                points = np.stack([x, -z, y], 1) + rng.uniform(-20, 20, 3)  # z up, somewhere around the scanner
                intensity = (0.35 + 0.25 * np.sin(3 * y) + rng.normal(0, 0.03, len(y))).clip(0, 1)
                kind = (".bin", ".las", ".pcd")[i % 3]
                place = folder / f"{i:03d}{kind}"
                if kind == ".bin":
                    np.column_stack([points, intensity]).astype("<f4").tofile(place)
                elif kind == ".pcd":
                    _write_pcd(place, points, intensity)
                else:
                    header = laspy.LasHeader(point_format=3, version="1.2")
                    header.offsets, header.scales = np.array(SURVEY), np.full(3, 0.001)
                    las = laspy.LasData(header)
                    las.x, las.y, las.z = (points + SURVEY).T
                    las.intensity = (65535 * intensity).astype(np.uint16)
                    las.write(place)
                count += 1
    if broken:
        whole = (out / "train" / "chair" / "000.bin").read_bytes()
        (out / "train" / "chair" / "cut-off.bin").write_bytes(whole[:-7])
        nothing = np.full((500, 4), np.nan, "<f4")
        nothing.tofile(out / "train" / "lamp" / "no-return.bin")
        count += 2
    return count


def _write_pcd(path: Path, points: Array, intensity: Array) -> None:
    rows = np.column_stack([points, intensity]).astype("<f4")
    header = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\n"
        f"WIDTH {len(rows)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(rows)}\nDATA binary\n"
    )
    path.write_bytes(header.encode() + rows.tobytes())


def _write_ply(path: Path, points: Array) -> None:
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
        "property float x\nproperty float y\nproperty float z\nend_header\n"
    )
    path.write_bytes(header.encode() + points.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
