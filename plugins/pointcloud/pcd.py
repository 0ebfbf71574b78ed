"""PCD files of the Point Cloud Library: ascii, binary and binary_compressed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peft_suite.pointcloud.formats import Array, Cloud, UnreadableError, from_columns

__all__ = ["read_pcd"]


def read_pcd(path: Path) -> Cloud:
    """Points, normals, packed colours, intensity and labels. In an image of points (HEIGHT > 1) NaN marks pixels
    without a point; they are left out."""
    header: dict[str, list[str]] = {}
    with path.open("rb") as file:
        while line := file.readline(4096):
            words = line.decode("ascii", "replace").split()
            if words and not words[0].startswith("#"):
                header[words[0].upper()] = words[1:]
                if words[0].upper() == "DATA":
                    break
        body = file.read()
    if lost := [k for k in ("FIELDS", "SIZE", "TYPE", "POINTS", "DATA") if not header.get(k)]:
        raise UnreadableError(f"a PCD header without {lost[0]}")
    names, count = header["FIELDS"], int(header["POINTS"][0])
    repeats = [int(c) for c in header.get("COUNT", ["1"] * len(names))]
    kinds = [f"<{t.lower()}{s}" for t, s in zip(header["TYPE"], header["SIZE"], strict=True)]
    row = np.dtype([(f"{n}#{i}", k, (c,)) for i, (n, k, c) in enumerate(zip(names, kinds, repeats, strict=True))])
    mode = header["DATA"][0].lower()
    if mode == "ascii":
        columns = _ascii(body, row, count)
    elif mode == "binary":
        if len(body) < count * row.itemsize:
            raise UnreadableError(f"truncated: {len(body) // row.itemsize} of {count} points")
        values = np.frombuffer(body, row, count)
        columns = {f: values[f] for f in row.names or ()}
    elif mode == "binary_compressed":
        columns = _compressed(body, row, count)
    else:
        raise UnreadableError(f"PCD data of the kind {mode!r}; known are ascii, binary, binary_compressed")
    single = {f.partition("#")[0]: v[:, 0] for f, v in columns.items() if v.shape[1] == 1}
    for name in ("rgb", "rgba"):
        if name in single:  # 0xAARRGGBB in the bits of a float or an integer
            bits = np.ascontiguousarray(single.pop(name).astype("<f4" if single_is_float(row, name) else "<u4"))
            packed = bits.view("<u4")
            single |= {c: (packed >> s & 255).astype(np.uint8) for c, s in (("r", 16), ("g", 8), ("b", 0))}
    cloud = from_columns(single)
    if int(header.get("HEIGHT", ["1"])[0]) > 1:
        cloud = cloud.take(np.flatnonzero(np.isfinite(cloud.points).all(1)))
    return cloud


def single_is_float(row: np.dtype[np.void], name: str) -> bool:
    """Whether a field is stored as a float."""
    return any(f.partition("#")[0] == name and row[f].base.kind == "f" for f in row.names or ())


def _ascii(body: bytes, row: np.dtype[np.void], count: int) -> dict[str, Array]:
    fields = row.names or ()
    width = sum(row[f].shape[0] for f in fields)
    words = body.split()
    if len(words) < count * width:
        raise UnreadableError(f"truncated: {len(words) // width} of {count} points")
    values = np.array(words[: count * width], np.float64).reshape(count, width)
    columns, at = {}, 0
    for field in fields:
        size = row[field].shape[0]
        columns[field] = values[:, at : at + size].astype(row[field].base)
        at += size
    return columns


def _compressed(body: bytes, row: np.dtype[np.void], count: int) -> dict[str, Array]:
    """The fields one after the other, packed by LZF."""
    if len(body) < 8:
        raise UnreadableError("truncated: no compressed points")
    packed, size = (int(v) for v in np.frombuffer(body, "<u4", 2))
    if len(body) - 8 < packed or size < count * row.itemsize:
        raise UnreadableError(f"truncated: {len(body) - 8} of {packed} compressed bytes")
    data, at, columns = _lzf(body[8 : 8 + packed], size), 0, {}
    for field in row.names or ():
        kind, repeats = row[field].base, row[field].shape[0]
        columns[field] = np.frombuffer(data, kind, count * repeats, at).reshape(count, repeats)
        at += count * row[field].itemsize
    return columns


def _lzf(data: bytes, size: int) -> bytes:
    """LZF: a byte below 32 is followed by one byte more than it says; others say how far back and how long to copy."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) <= size:
        control = data[at]
        at += 1
        if control < 32:
            out += data[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[at]
            at += 1
        start = len(out) - ((control & 31) << 8) - data[at] - 1
        at += 1
        if start < 0:
            raise UnreadableError("damaged compressed points")
        for i in range(start, start + length + 2):  # source and target may overlap
            out.append(out[i])
    if len(out) != size:
        raise UnreadableError(f"truncated: {len(out)} of {size} bytes after unpacking")
    return bytes(out)
