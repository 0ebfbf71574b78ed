"""From a sound file to a mono waveform at the backbone's sample rate; what is wrong with a file is told in words.

libsndfile reads wav, flac, ogg (Vorbis, Opus), mp3 and aiff, and takes what is left of a truncated file without a
word; here that is an error.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_suite.errors import DataError, closest

__all__ = ["EXTENSIONS", "Clip", "UnreadableError", "decode", "encode"]

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc")
FRAME = 400  # samples at 16 kHz: one frame of the front end
_CONTENT = {"WAV": "WAV", "WAVEX": "WAV", "RF64": "WAV", "FLAC": "FLAC", "OGG": "OGG", "MP3": "MP3", "AIFF": "AIFF"}
_USUAL = {"WAV": (".wav",), "FLAC": (".flac",), "OGG": (".ogg", ".oga", ".opus"), "MP3": (".mp3",)}
_USUAL["AIFF"] = (".aiff", ".aif", ".aifc")
_SPARE = 0.1  # seconds decoded beyond those asked for, so that resampling sees what follows
_WHOLE = 60.0  # seconds: files up to this length are read to their end, so that damage behind what is used is found

Array = np.ndarray[Any, Any]


class UnreadableError(DataError):
    """A file that cannot be used; the message is the reason without the file's name."""


@dataclass(frozen=True)
class Clip:
    """A decoded sound.

    Attributes:
        samples: mono, float32 ``[n]``, at ``rate``.
        seconds: length of the file.
        silent: every sample is 0.
        note: what was changed to make it usable.
    """

    samples: Array
    rate: int
    seconds: float
    silent: bool = False
    note: str = ""


def decode(path: str | Path, *, rate: int = 16_000, channel: int = -1, seconds: float = 0.0) -> Clip:
    """Read a file.

    Args:
        rate: samples per second of the result.
        channel: take this one, counted from 0; -1 takes the mean of all.
        seconds: only the first ones; 0 takes all. What follows them in a file of a minute or less is checked too.

    Raises:
        UnreadableError: missing, empty, truncated, without samples, named for another format, not finite.
    """
    path = Path(path)
    samples, source_rate, frames = _read(path, channel, seconds)
    silent = not samples.any()
    if source_rate != rate:
        samples = _resampled(samples, source_rate, rate)
    if seconds:
        samples = samples[: max(1, round(seconds * rate))]
    note = ""
    least = math.ceil(FRAME * rate / 16_000)
    if len(samples) < least:
        note = f"{len(samples)} samples, padded to the {least} of one frame"
        samples = np.pad(samples, (0, least - len(samples)))
    return Clip(np.ascontiguousarray(samples, np.float32), rate, frames / source_rate, silent, note)


def encode(samples: Array, rate: int) -> bytes:
    """A small WAV file, or for more than two seconds an Ogg Vorbis one; louder than 1 is made quieter."""
    import io

    import soundfile

    peak = float(np.abs(samples).max(initial=0.0))
    samples = samples / peak if peak > 1 else samples
    stream = io.BytesIO()
    if len(samples) > 2 * rate:
        soundfile.write(stream, samples, rate, format="OGG", subtype="VORBIS")
    else:
        soundfile.write(stream, samples, rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _read(path: Path, channel: int, seconds: float) -> tuple[Array, int, int]:
    """(mono samples at the file's rate, that rate, frames of the whole file)."""
    import soundfile

    kind = path.suffix.lower()
    if kind not in EXTENSIONS:
        raise UnreadableError(f"unknown extension {path.suffix!r}. {closest(kind, EXTENSIONS)}".rstrip("."))
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnreadableError("the file does not exist") from error
    if size == 0:
        raise UnreadableError("the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            content = _CONTENT.get(file.format, file.format)
            if kind not in _USUAL.get(content, (kind,)):
                raise UnreadableError(f"its name ends in {kind} and its content is {content}; rename it")
            _whole(path, content, size)
            if not file.frames:
                raise UnreadableError("it holds no samples")
            if channel >= file.channels:
                count = f"{file.channels} channel{'s' * (file.channels > 1)}"
                raise UnreadableError(f"it has {count}, so there is no channel {channel}")
            rate, frames = int(file.samplerate), int(file.frames)
            used = min(frames, math.ceil((seconds + _SPARE) * rate)) if seconds else frames
            wanted = frames if frames <= _WHOLE * rate else used
            samples = _mono(file, wanted, channel)
            _complete(path, content, len(samples), wanted)
            if wrong := int(np.count_nonzero(~np.isfinite(samples))):
                raise UnreadableError(f"{wrong} of {len(samples)} samples are NaN or infinite")
            return samples[:used], rate, frames
    except soundfile.LibsndfileError as error:
        raise UnreadableError(_reason(path, kind, str(error))) from error


def _mono(file: Any, wanted: int, channel: int, block: int = 2**20) -> Array:
    """``wanted`` frames as one channel, a block at a time."""
    parts = []
    while wanted > 0:
        part = file.read(min(block, wanted), dtype="float32", always_2d=True)  # [n, channels]
        if not len(part):
            break
        parts.append(part[:, channel] if channel >= 0 else part.mean(1) if part.shape[1] > 1 else part[:, 0])
        wanted -= len(part)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _resampled(samples: Array, source: int, target: int) -> Array:
    import torch

    from peft_suite.audio.frontend.resample import resample

    result: Array = resample(torch.from_numpy(np.ascontiguousarray(samples)), source, target).numpy()
    return result


def _whole(path: Path, content: str, size: int) -> None:
    """The lengths that headers promise are there; raises UnreadableError."""
    with path.open("rb") as file:
        if content in ("WAV", "AIFF"):
            missing = _missing(file, size, content == "WAV")
            if missing > 0:
                raise UnreadableError(f"truncated: {missing} bytes of the samples are missing")
        elif content == "OGG":
            file.seek(max(0, size - 2**16))
            tail = file.read()
            page = tail.rfind(b"OggS")
            if page < 0 or len(tail) < page + 6 or not tail[page + 5] & 4:  # flag of a stream's last page
                raise UnreadableError("truncated: its last page is missing")


def _missing(file: Any, size: int, little: bool) -> int:
    """Bytes that the chunk of samples of a RIFF or AIFF file promises beyond the end of the file."""
    order = "<I" if little else ">I"
    wanted = b"data" if little else b"SSND"
    at = 12
    while at + 8 <= size:
        file.seek(at)
        head = file.read(8)
        length = struct.unpack(order, head[4:])[0]
        if head[:4] == wanted:
            return 0 if length == 0xFFFFFFFF else at + 8 + length - size  # a stream's unknown length
        at += 8 + length + length % 2
    return 0


def _complete(path: Path, content: str, got: int, wanted: int) -> None:
    """MP3 ends where its data end; how much there should be is exact only with an encoder's header."""
    if got >= wanted:
        return
    with path.open("rb") as file:
        head = file.read(2**13)
    exact = content != "MP3" or b"Xing" in head or b"Info" in head
    if got == 0 or exact or got < 0.95 * wanted:
        raise UnreadableError(f"truncated: {got} of {wanted} samples can be decoded")


def _reason(path: Path, kind: str, error: str) -> str:
    """libsndfile's reason without the path."""
    text = error.partition("': ")[2] or error
    magic = path.read_bytes()[:4] if path.stat().st_size < 2**24 else b""
    known = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "OGG", b"FORM": "AIFF"}.get(magic, "")
    known = known or ("MP3" if magic[:3] == b"ID3" or magic[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2") else "")
    if known and kind not in _USUAL[known]:
        return f"its name ends in {kind} and its content is {known}; rename it"
    if known:
        return f"truncated or damaged {known} ({text.strip().rstrip('.')})"
    return f"its name ends in {kind} and its content is no audio ({text.strip().rstrip('.')})"
