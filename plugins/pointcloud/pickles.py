"""Pickles of numbers, read without running anything: lists, dictionaries and numpy arrays of numbers, nothing else.

A pickle may name any function of any module to be called while it is read. Here only the six names with which numpy
writes arrays are known, and they stand for our own objects: not even numpy's own reconstruction runs on what a file
says.

Data sets that are published as pickles: ModelNet40's ``.dat`` files and the few-shot episodes.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.errors import DataError

__all__ = ["load_numbers"]


def load_numbers(path: str | Path) -> Any:
    """The object of a pickle file.

    Raises:
        DataError: the file cannot be read, or holds something else than numbers in arrays, lists, tuples, dictionaries.
    """
    try:
        with open(path, "rb") as file:
            return _plain(_Reader(file).load())
    except _RefusedError as error:
        raise DataError(
            f"{str(path)!r} was not opened: {error}, and only numbers, lists, dictionaries and numpy arrays of numbers "
            "are read from pickles. Ask for a file of another format, or convert it to .npz or HDF5 where you trust it."
        ) from error
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{str(path)!r} is damaged or no pickle: {reason.rstrip('.')}.") from error


class _RefusedError(Exception):
    pass


class _Type:
    """A numpy dtype of numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str | bytes):
            raise _RefusedError("it holds an array of an unknown type")
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "<"
        if not re.fullmatch(r"[<>|=]?[biuf](1|2|4|8)", self.code):
            raise _RefusedError(f"it holds an array of the type {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "<"

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.code[0] in "<>|=" else self.order + self.code)


class _Values:
    """A numpy array, made real from its bytes at the end."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.state = shape, kind, fortran, data

    def real(self) -> np.ndarray[Any, Any]:
        if self.state is None:
            raise _RefusedError("it holds an array without values")
        shape, kind, fortran, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote it
        if not isinstance(kind, _Type) or not isinstance(data, bytes):
            raise _RefusedError("it holds an array of objects")
        return np.frombuffer(data, kind.real()).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Values:
    return _Values()


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any) -> _Values:
    values = _Values()
    values.state = shape, kind, order == "F", bytes(data)
    return values


def _scalar(kind: Any, data: Any) -> Any:
    if not isinstance(kind, _Type) or not isinstance(data, bytes):
        raise _RefusedError("it holds a number of an unknown type")
    return np.frombuffer(data, kind.real(), 1)[0].item()


def _encode(text: Any, coding: Any) -> bytes:
    """How protocol 2 of Python 3 writes bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise _RefusedError("it holds text in an unknown coding")
    return text.encode("latin1")


class _Array:
    """Stands for numpy.ndarray, which numpy's pickles name and never call."""

    def __new__(cls, *_: Any) -> Any:
        raise _RefusedError("it makes an array in an unknown way")


_KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote bytes as text

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it refers to objects outside the file")


def _plain(value: Any, known: dict[int, Any] | None = None) -> Any:
    """The same with real arrays; anything that is not a number or a container of such is refused.

    ``known`` holds what each container became (None while it is being converted): one that is named a million times is
    converted once, and one that holds itself is refused.
    """
    known = {} if known is None else known
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in known:
        if known[id(value)] is None:
            raise _RefusedError("it holds a list that holds itself")
        return known[id(value)]
    known[id(value)] = None
    result: Any
    if isinstance(value, _Values):
        result = value.real()
    elif isinstance(value, list | tuple):
        result = type(value)([_plain(item, known) for item in value])
    elif isinstance(value, dict):
        result = {_plain(k, known): _plain(v, known) for k, v in value.items()}
    else:
        raise _RefusedError(f"it holds a {type(value).__name__.lstrip('_')}")
    known[id(value)] = result
    return result
