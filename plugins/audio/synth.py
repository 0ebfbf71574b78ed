"""Generated sounds of one second at 16 kHz: simple ones to pre-train on, and others that nobody has heard there.

A class is a function from a random generator to a waveform ``[16000]``; pitch, timbre, length and loudness differ from
one sound to the next. Sound number i of a class depends on (seed, class, i) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["RATE", "SIZE", "SOURCE", "TARGET", "levelled", "noise", "sound"]

RATE = SIZE = 16_000
LOUDEST, SOFTEST = 0.9, 0.1  # peaks

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
Sound = Callable[[Rng], Array]

TIME = np.arange(SIZE) / RATE
_HERTZ = np.fft.rfftfreq(SIZE, 1 / RATE)  # [8001]


def sound(name: str, number: int, seed: int = 0) -> Array:
    """Sound ``number`` of a class, float32 ``[16000]`` with a peak from 0.1 to 0.9."""
    make = SOURCE[name] if name in SOURCE else TARGET[name]
    rng = np.random.default_rng([seed, *name.encode(), number])
    x = make(rng)
    faint = float(np.abs(x).max()) * between(rng, 1e-4, 1e-2)  # what every recording has in its silence
    return levelled(x + faint * rng.standard_normal(SIZE), rng)


def levelled(x: Array, rng: Rng) -> Array:
    """Float32 with mean 0 and a random peak."""
    x = x - x.mean()
    peak = SOFTEST * (LOUDEST / SOFTEST) ** rng.random()
    scaled: Array = (x * (peak / max(float(np.abs(x).max()), 1e-9))).astype(np.float32)
    return scaled


# ---- what sounds are made of ---------------------------------------------------------------------------------------


def summed(parts: Sequence[Array]) -> Array:
    """All at once."""
    whole: Array = np.sum(parts, axis=0)
    return whole


def between(rng: Rng, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return float(low * (high / low) ** rng.random())


def cycles(frequency: Array | float, rng: Rng) -> Array:
    """Phase in cycles of a frequency that may change, ``[n]``."""
    return rng.random() + np.cumsum(np.broadcast_to(frequency, SIZE)) / RATE


def sine(phase: Array) -> Array:
    """Of a phase in cycles."""
    wave: Array = np.sin(2 * np.pi * phase)
    return wave


def harmonics(frequency: Array | float, loudness: Mapping[int, float], rng: Rng) -> Array:
    """Multiples of a frequency below 7.5 kHz; ``loudness``: multiple -> amplitude, 1 among them."""
    phase, most = cycles(frequency, rng), float(np.max(frequency))
    before, now, twice = np.zeros(SIZE), sine(phase), 2 * np.cos(2 * np.pi * phase)
    total = loudness[1] * now
    for k in range(2, max(loudness) + 1):
        if k * most >= 7500:
            break
        before, now = now, twice * now - before  # sin k p = 2 cos p sin (k - 1) p - sin (k - 2) p
        if k in loudness:
            total += loudness[k] * now
    return total


def filtered(x: Array, response: Array) -> Array:
    """``response``: gain per frequency ``[8001]``."""
    return np.fft.irfft(np.fft.rfft(x) * response, SIZE)


def noise(rng: Rng, slope: float = 0.0, low: float = 50.0, high: float = 7900.0) -> Array:
    """Noise with a spectrum of ``f^slope``: 0 white, -0.5 pink, -1 brown; root mean square 1."""
    gain = np.where((low <= _HERTZ) & (high >= _HERTZ), np.maximum(_HERTZ, 20.0) ** slope, 0.0)
    x = filtered(rng.standard_normal(SIZE), gain)
    scaled: Array = x / np.sqrt(np.square(x).mean())
    return scaled


def resonances(centres: Sequence[float], widths: Sequence[float] | Array) -> Array:
    """Gains of poles, the second weaker than the first and so on."""
    parts = [0.7**i / (1 + np.square((_HERTZ - c) / w)) for i, (c, w) in enumerate(zip(centres, widths, strict=True))]
    return summed(parts)


def window(rng: Rng, shortest: float = 0.25, longest: float = 0.9, edge: float = 0.03) -> Array:
    """On from a random start for a random time, with edges of about ``edge`` seconds."""
    long = rng.uniform(shortest, longest)
    start, soft = rng.uniform(0, 0.95 - long), edge * rng.uniform(0.3, 1.5)
    on: Array = np.clip(np.minimum(TIME - start, start + long - TIME) / soft, 0, 1)
    return on


def fading(start: float, seconds: float, attack: float = 0.002) -> Array:
    """0 before ``start``, then an exponential that falls to 1/e in ``seconds``."""
    t = TIME - start
    return np.where(t < 0, 0.0, np.minimum(1.0, t / attack) * np.exp(-np.maximum(t, 0) / seconds))


def string(rng: Rng, frequency: float, start: float) -> Array:
    """A plucked string (Karplus and Strong, 1983): a loop of noise, averaged at every turn."""
    period = max(2, round(RATE / frequency))
    turn = 0.5 * rng.uniform(0.97, 0.999) * (1 + np.exp(-2j * np.pi * np.arange(period // 2 + 1) / period))
    turns = turn ** np.arange(-(-SIZE // period))[:, None]  # [turns, frequencies of the loop]
    rung = np.fft.irfft(turns * np.fft.rfft(rng.uniform(-1, 1, period)), period).ravel()
    at = int(start * RATE)
    return np.concatenate((np.zeros(at), rung[: SIZE - at]))


# ---- to pre-train on -----------------------------------------------------------------------------------------------


def tone(rng: Rng) -> Array:
    """One sine."""
    return sine(cycles(between(rng, 120, 6000), rng)) * window(rng)


def hollow(rng: Rng) -> Array:
    """Odd harmonics."""
    fall = rng.uniform(0.7, 1.6)
    return harmonics(between(rng, 90, 1200), {k: k**-fall for k in range(1, 20, 2)}, rng) * window(rng)


def buzz(rng: Rng) -> Array:
    """All harmonics."""
    fall = rng.uniform(0.4, 1.2)
    return harmonics(between(rng, 70, 900), {k: k**-fall for k in range(1, 13)}, rng) * window(rng)


def chord(rng: Rng) -> Array:
    """Two to four sines that have nothing to do with each other."""
    parts = [rng.uniform(0.4, 1) * sine(cycles(between(rng, 150, 5000), rng)) for _ in range(rng.integers(2, 5))]
    return summed(parts) * window(rng)


def tremolo(rng: Rng) -> Array:
    """A sine that grows louder and softer."""
    beat = 1 - rng.uniform(0.6, 1) * (0.5 + 0.5 * sine(cycles(rng.uniform(4, 16), rng)))
    return sine(cycles(between(rng, 200, 5000), rng)) * beat * window(rng, 0.5)


def _glide(rng: Rng, low: float, high: float) -> Array:
    """From one frequency to another within the window, straight or by equal ratios."""
    on = window(rng, 0.15)
    share = np.cumsum(on) / on.sum()
    curve = low + (high - low) * share if rng.random() < 0.5 else low * (high / low) ** share
    return harmonics(curve, {1: 1, 2: rng.uniform(0, 0.5)}, rng) * on


def rise(rng: Rng) -> Array:
    """A chirp upwards."""
    low = between(rng, 100, 2500)
    return _glide(rng, low, min(7000, low * rng.uniform(1.5, 6)))


def fall(rng: Rng) -> Array:
    """A chirp downwards."""
    low = between(rng, 100, 2500)
    return _glide(rng, min(7000, low * rng.uniform(1.5, 6)), low)


def hiss(rng: Rng) -> Array:
    """A burst of white or blue noise."""
    return noise(rng, rng.uniform(0, 0.6)) * window(rng, 0.1, edge=0.01)


def murmur(rng: Rng) -> Array:
    """A burst of pink noise."""
    return noise(rng, rng.uniform(-0.7, -0.4)) * window(rng, 0.1, edge=0.01)


def rumble(rng: Rng) -> Array:
    """A burst of brown noise."""
    return noise(rng, rng.uniform(-1.5, -1)) * window(rng, 0.1, edge=0.01)


def band(rng: Rng) -> Array:
    """A burst of noise a third of an octave to an octave wide."""
    low = between(rng, 150, 4500)
    return noise(rng, 0, low, low * rng.uniform(1.25, 2)) * window(rng, 0.1, edge=0.01)


def tick(rng: Rng) -> Array:
    """A very short burst."""
    return noise(rng, rng.uniform(-0.8, 0.3)) * fading(rng.uniform(0, 0.8), rng.uniform(0.003, 0.015))


def pluck(rng: Rng) -> Array:
    """One string."""
    return string(rng, between(rng, 80, 1000), rng.uniform(0, 0.4))


def strum(rng: Rng) -> Array:
    """Three to five strings, one after the other."""
    base, gap, start = between(rng, 80, 250), rng.uniform(0.03, 0.12), rng.uniform(0, 0.3)
    notes = rng.permutation([1, 1.25, 1.5, 2, 2.5])[: rng.integers(3, 6)]
    return summed([string(rng, base * note, start + i * gap) for i, note in enumerate(notes)])


_FORMANTS = {  # Hz; Peterson and Barney, 1952
    "ah": (730, 1090, 2440),
    "eh": (530, 1840, 2480),
    "ee": (270, 2290, 3010),
    "aw": (570, 840, 2410),
    "oo": (300, 870, 2240),
}


def _vowel(centres: Sequence[float]) -> Sound:
    def speak(rng: Rng) -> Array:
        pitch = between(rng, 85, 260) * (1 + rng.uniform(-0.15, 0.15) * TIME)
        strikes = np.diff(np.floor(cycles(pitch, rng)), prepend=0.0).clip(0, 1)
        size = rng.uniform(0.9, 1.2)  # of the mouth
        peaks = resonances([size * rng.uniform(0.95, 1.05) * c for c in centres], rng.uniform(50, 140, len(centres)))
        return filtered(strikes, peaks) * window(rng, edge=0.06)

    return speak


SOURCE: Mapping[str, Sound] = {
    **{
        make.__name__: make
        for make in (tone, hollow, buzz, chord, tremolo, rise, fall, hiss, murmur, rumble, band, tick, pluck, strum)
    },
    **{name: _vowel(centres) for name, centres in _FORMANTS.items()},
}


# ---- to adapt to ---------------------------------------------------------------------------------------------------


def bell(rng: Rng) -> Array:
    """Partials that are no harmonics, the high ones fading first."""
    base, start, long = between(rng, 250, 1000), rng.uniform(0, 0.4), rng.uniform(0.15, 0.5)
    ratios = np.array([1, 2.0, 2.4, 3.0, 4.5, 5.33, 6.7]) * rng.uniform(0.98, 1.02, 7)
    parts = [
        rng.uniform(0.3, 1) * sine(cycles(base * r, rng)) * fading(start, long / r**0.7)
        for r in ratios
        if base * r < 7500
    ]
    return summed(parts)


def siren(rng: Rng) -> Array:
    """A wail up and down."""
    swing = sine(cycles(rng.uniform(1, 3.5), rng))
    return harmonics(between(rng, 500, 1300) * 1.45**swing, {1: 1, 2: 0.4, 3: rng.uniform(0.1, 0.5)}, rng)


def engine(rng: Rng) -> Array:
    """Uneven firing, muffled, speeding up or slowing down."""
    pace = cycles(rng.uniform(18, 45) * (1 + rng.uniform(-0.3, 0.6) * TIME), rng)
    fires = np.diff(np.floor(pace), prepend=0.0).clip(0, 1) * rng.uniform(0.4, 1, SIZE)
    body = resonances((rng.uniform(80, 200), rng.uniform(400, 900)), (60.0, 250.0))
    return filtered(fires, body) + 0.01 * filtered(noise(rng), body)


def bird(rng: Rng) -> Array:
    """Short warbled calls, high."""
    base, count, start = between(rng, 2200, 4500), int(rng.integers(3, 8)), rng.uniform(0, 0.2)
    gap, bend = rng.uniform(0.08, 0.13), rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)
    place = (TIME - start) / gap  # in calls
    inside = place % 1
    on = (place >= 0) & (place < count) & (inside < 0.7)
    pitch = base * (1 + bend * (inside - 0.35)) * (1 + 0.05 * sine(cycles(rng.uniform(25, 50), rng)))
    calls: Array = on * np.sin(np.pi * np.clip(inside / 0.7, 0, 1))
    return calls * sine(cycles(np.minimum(pitch, 7500), rng))


def drops(rng: Rng) -> Array:
    """Bubbles: short sines whose pitch rises as they die."""
    parts = []
    for start in rng.uniform(0, 0.9, rng.integers(2, 6)):
        pitch = between(rng, 600, 2200) * (1 + rng.uniform(3, 8) * np.maximum(TIME - start, 0))
        quiet = rng.uniform(0.3, 1) * fading(start, rng.uniform(0.015, 0.05))
        parts.append(quiet * sine(cycles(np.minimum(pitch, 7500), rng)))
    return summed(parts)


def steps(rng: Rng) -> Array:
    """Two or three heels and soles: a low thump, then a soft scrape."""
    gap, start, pitch = rng.uniform(0.3, 0.45), rng.uniform(0, 0.15), rng.uniform(60, 140)
    thump, scrape = sine(cycles(pitch, rng)), noise(rng, -0.5, 300, between(rng, 1500, 5000))
    parts = []
    for at in start + gap * np.arange(3) + rng.uniform(-0.03, 0.03, 3):
        loud = rng.uniform(0.6, 1)
        parts.append(loud * (thump * fading(at, 0.03) + 0.25 * scrape * fading(at + 0.05, 0.04, 0.02)))
    return summed(parts)


def alarm(rng: Rng) -> Array:
    """Beeps, of one pitch or of two in turn."""
    base, pace = between(rng, 700, 2500), rng.uniform(3, 8)
    place = TIME * pace + rng.random()
    pitch = np.where(np.floor(place) % 2 < 1, base, base * rng.choice([1.0, rng.uniform(1.15, 1.5)]))
    return harmonics(pitch, {1: 1, 3: 0.33, 5: 0.2}, rng) * np.clip(20 * (rng.uniform(0.5, 0.8) - place % 1), 0, 1)


def flute(rng: Rng) -> Array:
    """Few harmonics, a slow vibrato, and breath."""
    pitch = between(rng, 260, 1100) * (1 + rng.uniform(0.008, 0.02) * sine(cycles(rng.uniform(4.5, 6.5), rng)))
    played = harmonics(pitch, {1: 1, 2: rng.uniform(0.15, 0.4), 3: rng.uniform(0.03, 0.12)}, rng)
    centre = float(pitch.mean())
    return (played + rng.uniform(0.05, 0.15) * noise(rng, -0.3, centre, min(6 * centre, 7900))) * window(
        rng, 0.5, 0.9, 0.1
    )


def wind(rng: Rng) -> Array:
    """Noise that swells, and whose centre wanders."""
    low, share = between(rng, 200, 700), 0.5 + 0.5 * sine(cycles(rng.uniform(0.5, 1.5), rng))
    dark, bright = noise(rng, -1, low, 2 * low), noise(rng, -0.5, 1.5 * low, 4 * low)
    return (dark * (1 - share) + bright * share) * (0.4 + 0.6 * share)


def snare(rng: Rng) -> Array:
    """A skin and its wires, struck once to four times."""
    gap, start, long = rng.uniform(0.09, 0.25), rng.uniform(0, 0.2), rng.uniform(0.03, 0.09)
    skin, wires = sine(cycles(rng.uniform(160, 240), rng)), noise(rng, 0.2, 800)
    parts = [
        rng.uniform(0.6, 1) * (skin * fading(start + i * gap, 0.05) + 0.5 * wires * fading(start + i * gap, long))
        for i in range(rng.integers(1, 5))
    ]
    return summed(parts)


TARGET: Mapping[str, Sound] = {
    make.__name__: make for make in (bell, siren, engine, bird, drops, steps, alarm, flute, wind, snare)
}
