"""Random changes: ranges, one draw per clip, seeds, and the places they belong to."""

from __future__ import annotations

import pytest
import torch

from peft_suite.audio.frontend.augment import (
    AUGMENTS,
    PUBLISHED,
    SpecAugment,
    add_noise,
    feature_noise,
    mix,
    mixup,
    parse_augment,
    roll,
    spec_augment,
    time_shift,
)
from peft_suite.errors import ConfigError, DataError, UnknownNameError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(hidden: torch.Tensor) -> int:
    """Stretches of True."""
    padded = torch.cat((torch.tensor([False]), hidden))
    return int((padded[1:] & ~padded[:-1]).sum())


def test_spec_augment_masks_one_band_and_one_stretch() -> None:
    x = torch.ones(600, 50, 32)
    out = spec_augment(x, 8, 20, value=-3.0, generator=seeded())
    assert bool((x == 1).all())
    assert set(out.unique().tolist()) <= {1.0, -3.0}
    widths: dict[str, set[int]] = {"freq": set(), "time": set()}
    starts = set()
    for clip in out == -3:
        band, stretch = clip.all(0), clip.all(1)
        assert bool((clip == (band | stretch[:, None])).all())
        assert runs(band) <= 1 and runs(stretch) <= 1
        widths["freq"].add(int(band.sum()))
        widths["time"].add(int(stretch.sum()))
        if bool(stretch.any()):
            starts.add(int(stretch.nonzero()[0]))
    assert widths == {"freq": set(range(8)), "time": set(range(20))}  # uniform in 0..P-1
    assert min(starts) == 0 and max(starts) > 40
    assert torch.equal(spec_augment(x, 8, 20, value=-3.0, generator=seeded()), out)
    assert not torch.equal(spec_augment(x, 8, 20, value=-3.0, generator=seeded(1)), out)


def test_spec_augment_edges() -> None:
    x = torch.ones(50, 6, 4)
    assert torch.equal(spec_augment(x, 0, 0), x)
    assert not bool((spec_augment(x, 0, 4, generator=seeded()) == 0).all(1).any())  # no band
    wide = spec_augment(x, 0, 400, generator=seeded())  # a parameter above the size masks everything at most
    assert bool((wide == 0).all(2).all(1).any())
    twice = spec_augment(torch.ones(200, 40, 40), 6, 0, masks=2, generator=seeded())
    assert max(runs((c == 0).all(0)) for c in twice) == 2
    with pytest.raises(DataError, match=r"\[B, T, F\]"):
        spec_augment(torch.ones(6, 4))
    with pytest.raises(UnknownNameError, match="normalized"):
        SpecAugment(stage="waveform")
    assert torch.equal(SpecAugment(3, 3)(x, seeded(2)), spec_augment(x, 3, 3, generator=seeded(2)))


def test_mix_pads_or_cuts_the_second() -> None:
    a, b = torch.ones(4), torch.full((6,), 2.0)
    assert mix(a, b, 0.75).tolist() == [1.25] * 4
    assert mix(b, a, 0.5).tolist() == [1.5] * 4 + [1.0] * 2
    assert a.tolist() == [1.0] * 4


def test_mixup_mixes_sounds_and_targets_alike() -> None:
    count = 2000
    x = torch.eye(count)  # every clip is recognisable by its sample
    lengths = torch.full((count,), count)
    mixed, targets = mixup(x, torch.eye(count), rate=0.5, lengths=lengths, generator=seeded())
    assert torch.equal(mixed, targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    changed = targets.diagonal() < 1
    assert 0.45 < float(changed.float().mean()) < 0.55
    share = targets.diagonal()[changed]
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / 84, rel=0.15)  # of Beta(10, 10)
    assert bool(((targets > 0).sum(1)[changed] == 2).all())
    again = mixup(x, torch.eye(count), rate=0.5, generator=seeded())
    assert torch.equal(again[0], mixed)
    assert torch.equal(mixup(x, torch.eye(count), rate=0.0)[0], x)


def test_mixup_respects_lengths_and_wants_soft_targets() -> None:
    mixed, _ = mixup(torch.ones(8, 20), torch.eye(8), rate=1.0, lengths=torch.full((8,), 12), generator=seeded())
    assert not mixed[:, 12:].any() and bool((mixed[:, :12] - 1).abs().max() < 1e-6)
    with pytest.raises(DataError, match="one_hot"):
        mixup(torch.ones(3, 5), torch.arange(3))
    with pytest.raises(ConfigError, match="alpha=0"):
        mixup(torch.ones(3, 5), torch.eye(3), alpha=0.0)


def test_noise_has_the_ratio_asked_for() -> None:
    x = torch.randn(64, 8000, generator=seeded()) * torch.linspace(0.01, 1, 64)[:, None]
    x[0] = 0
    out = add_noise(x, 20.0, 20.0, generator=seeded(1))
    assert not out[0].any()
    ratio = 10 * (x[1:].square().mean(1) / (out - x)[1:].square().mean(1)).log10()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 20.0), atol=0.3, rtol=0)
    lengths = torch.full((64,), 4000)
    x[:, 4000:] = 0
    padded = add_noise(x, 20.0, 20.0, lengths=lengths, generator=seeded(1))
    assert not padded[:, 4000:].any()
    ratio = 10 * (x[1:, :4000].square().mean(1) / (padded - x)[1:, :4000].square().mean(1)).log10()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 20.0), atol=0.4, rtol=0)
    spread = add_noise(torch.ones(500, 400), 0.0, 40.0, generator=seeded()) - 1
    power = -10 * spread.square().mean(1).log10()
    assert -1 < float(power.min()) < 3 and 37 < float(power.max()) < 41
    with pytest.raises(ConfigError, match="above"):
        add_noise(x, 30.0, 20.0)


def test_time_shift_and_roll() -> None:
    x = torch.arange(1.0, 101.0).repeat(400, 1)
    out = time_shift(x, 0.1, generator=seeded())
    by = set()
    for row in out:
        first = int((row > 0).nonzero()[0])
        shift = first if first else 1 - int(row[0])
        by.add(shift)
        wanted = torch.zeros(100)
        wanted[max(shift, 0) : 100 + min(shift, 0)] = x[0][max(-shift, 0) : 100 - max(shift, 0)]
        assert torch.equal(row, wanted)
    assert by == set(range(-10, 11))
    frames = torch.arange(30.0).view(1, 30, 1).expand(400, 30, 3)
    rolled = roll(frames, 10, generator=seeded())
    starts = {int(clip[0, 0]) for clip in rolled}
    assert starts == {(-k) % 30 for k in range(-10, 10)}
    assert all(torch.equal(clip, frames[0].roll(-int(clip[0, 0]), 0)) for clip in rolled)


def test_feature_noise() -> None:
    out = feature_noise(torch.zeros(300, 40, 20), generator=seeded())
    top = out.amax((1, 2))
    assert float(out.min()) >= 0 and float(top.max()) < 0.1 and float(top.max()) > 0.095
    assert float(top.min()) < 0.005  # one amount per clip


def test_steps_go_where_they_belong() -> None:
    augment = parse_augment("mixup(rate=1)+noise+spec-augment-ast(freq=3, time=4)+roll(most=2)")
    assert augment.mixes
    x, y = torch.randn(6, 800, generator=seeded()), torch.eye(6)
    wave, targets = augment.waveform(x, y, generator=seeded(3))
    assert targets is not None and not torch.equal(targets, y) and not torch.equal(wave, x)
    features = torch.ones(6, 9, 8)
    assert torch.equal(augment.features(features, seeded(4)), spec_augment(features, 3, 4, generator=seeded(4)))
    ramp = torch.arange(9.0).view(1, 9, 1).expand(6, 9, 8)
    assert torch.equal(augment.normalized(ramp, seeded(5)), roll(ramp, 2, generator=seeded(5)))
    with pytest.raises(DataError, match="targets"):
        augment.waveform(x)
    for name in ("", "none"):
        assert torch.equal(parse_augment(name).waveform(x)[0], x)


def test_every_recipe_and_change_runs() -> None:
    for text in (*PUBLISHED, *AUGMENTS, "+".join(AUGMENTS)):
        augment = parse_augment(text)
        wave, _ = augment.waveform(torch.randn(4, 500), torch.eye(4), generator=seeded())
        assert wave.shape == (4, 500)
        assert augment.normalized(augment.features(torch.randn(4, 12, 8), seeded()), seeded()).shape == (4, 12, 8)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("spec-augmnt", UnknownNameError, "Did you mean 'spec-augment'"),
        ("roll(by=3)", ConfigError, "roll has most=10"),
        ("roll(most=1.5)", ConfigError, "not possible"),
        ("shift(most=-1)", ConfigError, "not possible"),
        ("mixup(rate=true)", ConfigError, "not possible"),
    ],
)
def test_bad_texts(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_augment(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_seed_means_the_same_on_a_gpu() -> None:
    x, features = torch.randn(5, 700, generator=seeded()), torch.randn(5, 20, 16, generator=seeded())
    augment = parse_augment("+".join(AUGMENTS))
    here, there = augment.waveform(x, torch.eye(5), generator=seeded(1)), None
    there = augment.waveform(x.cuda(), torch.eye(5).cuda(), generator=seeded(1))
    for a, b in zip(here, there, strict=True):
        assert a is not None and b is not None and b.is_cuda
        torch.testing.assert_close(b.cpu(), a)
    for stage in (augment.features, augment.normalized):
        torch.testing.assert_close(stage(features.cuda(), seeded(2)).cpu(), stage(features, seeded(2)))
