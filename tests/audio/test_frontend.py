"""Filter bank, features, resampling: against torchaudio, by themselves, and at their edges."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from peft_suite.audio.frontend import logmel
from peft_suite.audio.frontend.fbank import LOG_FLOOR, FilterBank, fbank, mel_filters
from peft_suite.audio.frontend.logmel import STATISTICS, LogMel, measure_statistics, torchaudio_problem
from peft_suite.audio.frontend.resample import resample, resampled_length
from peft_suite.errors import ConfigError, DataError, PluginError, UnknownNameError

PROBLEM = torchaudio_problem()
referee = pytest.mark.skipif(bool(PROBLEM), reason=f"torchaudio is the referee here: {PROBLEM}")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def sound(n: int = 16000, seed: int = 0, rate: int = 16000) -> torch.Tensor:
    """A tone, a chirp, quiet noise and a silent stretch."""
    t = torch.arange(n, dtype=torch.float64) / rate
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = 0.4 * (2 * math.pi * (200 + 40 * seed) * t).sin() + 0.2 * (2 * math.pi * (100 * t + 900 * t**2)).sin()
    x = x + 0.01 * noise
    x[n // 2 : n // 2 + n // 8] = 0
    return x.float()


def theirs(x: torch.Tensor, **options: Any) -> torch.Tensor:
    from torchaudio.compliance import kaldi

    options = {"sample_frequency": 16000, "window_type": "hanning", "num_mel_bins": 128, **options}
    return kaldi.fbank(x.unsqueeze(0), **options)


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"window": "hamming"}, {"window_type": "hamming"}),
    ({"window": "povey", "num_mel_bins": 23}, {"window_type": "povey", "num_mel_bins": 23}),
    (
        {"num_mel_bins": 80, "low_freq": 60.0, "high_freq": 7600.0},
        {"num_mel_bins": 80, "low_freq": 60.0, "high_freq": 7600.0},
    ),
    ({"high_freq": -400.0, "num_mel_bins": 40}, {"high_freq": -400.0, "num_mel_bins": 40}),
    ({"sample_rate": 22050, "num_mel_bins": 64}, {"sample_frequency": 22050, "num_mel_bins": 64}),
    ({"sample_rate": 8000}, {"sample_frequency": 8000}),
    ({"preemphasis": 0.0}, {"preemphasis_coefficient": 0.0}),
    ({"frame_length": 32.0, "frame_shift": 16.0}, {"frame_length": 32.0, "frame_shift": 16.0}),
]


@referee
@pytest.mark.parametrize(
    ("ours", "options"), VARIANTS, ids=[",".join(map(str, o.values())) or "ast" for o, _ in VARIANTS]
)
@pytest.mark.parametrize("n", [400, 2000, 16000, 99_999])
def test_equals_torchaudio(ours: dict[str, Any], options: dict[str, Any], n: int) -> None:
    x = sound(n, rate=ours.get("sample_rate", 16000))
    n = max(n, FilterBank(**ours).options.window_size)
    x = torch.nn.functional.pad(x, (0, n - len(x)))
    wanted = theirs(x, **options)
    torch.testing.assert_close(fbank(x, **ours), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(fbank(x.requires_grad_(), **ours).detach(), wanted, atol=1e-5, rtol=0)


@referee
def test_scale_and_double() -> None:
    x = sound()
    torch.testing.assert_close(fbank(x, scale=32768.0), theirs(x * 32768), atol=1e-5, rtol=0)
    torch.testing.assert_close(fbank(x.double()), theirs(x.double()), atol=1e-9, rtol=0)
    torch.testing.assert_close(fbank(x, zero_mean=True), theirs(x - x.mean()), atol=1e-5, rtol=0)


@referee
def test_logmel_equals_its_torchaudio_backend_and_the_feature_extractor() -> None:
    transformers = pytest.importorskip("transformers")
    clips = [sound(n, seed) for seed, n in enumerate((300, 5000, 16000, 30_000))]
    ours = LogMel(128)(clips)
    assert ours.shape == (4, 128, 128)
    torch.testing.assert_close(ours, LogMel(128, backend="torchaudio")(clips), atol=1e-5, rtol=0)
    extractor = transformers.ASTFeatureExtractor(max_length=128)
    made = extractor([c.numpy() for c in clips[1:]], sampling_rate=16000, return_tensors="pt")["input_values"]
    torch.testing.assert_close(ours[1:], made, atol=1e-5, rtol=0)


@referee
def test_gradient_equals_that_of_torchaudio() -> None:
    x = sound(4000).requires_grad_()
    weight = torch.randn(FilterBank().num_frames(4000), 128, generator=torch.Generator().manual_seed(1))
    (theirs(x) * weight).sum().backward()
    wanted, x.grad = x.grad, None
    (fbank(x) * weight).sum().backward()
    assert float((x.grad - wanted).norm() / wanted.norm()) < 1e-5


def test_gradient_is_right() -> None:
    x = (0.1 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    bank = LogMel(4, sample_rate=1000, num_mel_bins=4, low_freq=20.0, frame_length=16.0, frame_shift=8.0)
    assert torch.autograd.gradcheck(bank, (x,))
    assert torch.autograd.gradcheck(lambda w: bank(w, torch.tensor([40, 10])), (x,))


@pytest.mark.parametrize("n", [160, 400, 16000, 90_000])
def test_batch_equals_single(n: int) -> None:
    batch = torch.stack([sound(n, seed) for seed in range(9)])
    bank = FilterBank()
    together = bank(batch)
    assert together.shape == (9, bank.num_frames(n), 128)
    for one, row in zip(batch, together, strict=True):
        torch.testing.assert_close(bank(one), row, atol=2e-6, rtol=0)
    torch.testing.assert_close(bank(batch.view(3, 3, n)).view_as(together), together, atol=2e-6, rtol=0)
    torch.testing.assert_close(bank(batch.mT.contiguous().mT), together, atol=2e-6, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(bank(batch), together, atol=0, rtol=0)


def test_constants_made_in_inference_mode_serve_training() -> None:
    x = sound(2000)
    with torch.inference_mode():
        fbank(x, num_mel_bins=37)
        resample(x, 16000, 11000)
    x.requires_grad_()
    (fbank(x, num_mel_bins=37).sum() + resample(x, 16000, 11000).sum()).backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("grad", [False, True])
def test_padded_batches_and_lists_equal_single_clips(grad: bool) -> None:
    lengths = torch.tensor([120, 399, 400, 9000, 16000, 23_456])
    clips = [sound(int(n), seed) for seed, n in enumerate(lengths)]
    batch = torch.full((len(clips), 23_456), 0.7)  # what follows a clip must not matter
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    batch.requires_grad_(grad)
    for zero_mean in (False, True):
        for frames in (100, None):
            front = LogMel(frames, zero_mean=zero_mean)
            got = front(batch, lengths).detach()
            total = frames or front.bank.num_frames(23_456)
            assert got.shape == (len(clips), total, 128)
            torch.testing.assert_close(
                got, front([c.clone().requires_grad_(grad) for c in clips]).detach(), atol=1e-5, rtol=0
            )
            for clip, row in zip(clips, got, strict=True):
                alone = LogMel(total, zero_mean=zero_mean)(clip)
                torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


def test_padding_comes_before_the_normalisation() -> None:
    frames = STATISTICS["audioset"][2]
    x = LogMel()(sound(16000))
    assert x.shape == (frames, 128)
    torch.testing.assert_close(x[98:], torch.full_like(x[98:], 0.467032), atol=1e-6, rtol=0)
    raw = LogMel().features(sound(16000))
    assert not raw[98:].any()
    torch.testing.assert_close(LogMel().normalize(raw), x, atol=1e-6, rtol=0)
    assert LogMel(50)(sound(16000)).shape == (50, 128)
    torch.testing.assert_close(LogMel(50)(sound(16000)), x[:50], atol=2e-6, rtol=0)


def test_silence_is_the_floor() -> None:
    for length in (1, 399, 16000):
        out = fbank(torch.zeros(length))
        assert out.shape == (1 if length < 400 else 98, 128)
        assert bool((out == math.log(LOG_FLOOR)).all())
    empty = mel_filters(FilterBank().options).sum(1) == 0
    assert empty.nonzero().flatten().tolist() == [3]  # narrower than the distance of two FFT bins
    assert bool((fbank(sound())[:, 3] == math.log(LOG_FLOOR)).all())


def test_lower_precision_and_autocast_change_nothing() -> None:
    x = sound(8000)
    wanted = fbank(x)
    torch.testing.assert_close(fbank(x.half()), fbank(x.half().float()))
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fbank(x.clone().requires_grad_(grad)).detach(), wanted, atol=1e-6, rtol=0)
            got = resample(x.clone().requires_grad_(grad), 16000, 11025).detach()
        torch.testing.assert_close(got, resample(x, 16000, 11025), atol=1e-6, rtol=0)


def test_module_has_no_state_and_copies() -> None:
    front = LogMel(64, num_mel_bins=40)
    assert not front.state_dict() and not list(front.parameters())
    x = sound(4000)
    torch.testing.assert_close(copy.deepcopy(front)(x), front(x), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled() -> None:
    x, bank = sound(2000), FilterBank(num_mel_bins=40)
    compiled = torch.compile(bank, backend="eager")
    torch.testing.assert_close(compiled(x), bank(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(compiled(x.requires_grad_()), bank(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"window": "hann"}, UnknownNameError, "hanning"),
        ({"low_freq": 9000.0}, ConfigError, "8000"),
        ({"high_freq": 9000.0}, ConfigError, "low_freq=20"),
        ({"num_mel_bins": 0}, ConfigError, "num_mel_bins=0"),
        ({"preemphasis": 2.0}, ConfigError, "pre-emphasis"),
    ],
)
def test_bad_options(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FilterBank(**fields)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="32768"):
        fbank(torch.zeros(16000, dtype=torch.int16))
    with pytest.raises(DataError, match="no samples"):
        fbank(torch.zeros(2, 0))
    with pytest.raises(DataError, match="no clips"):
        LogMel()([])
    with pytest.raises(DataError, match="lengths"):
        LogMel()(torch.zeros(2, 500), torch.tensor([0, 500]))
    with pytest.raises(DataError, match=r"\[B, n\]"):
        LogMel()(torch.zeros(2, 2, 500))
    with pytest.raises(ConfigError, match="frames"):
        LogMel(0)
    with pytest.raises(UnknownNameError, match="torchaudio"):
        LogMel(backend="librosa")


def test_without_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A None in sys.modules is what Python itself does with a module that must not be imported."""
    import sys

    from peft_suite.cli.doctor import examine

    for name in [n for n in sys.modules if n.startswith("torchaudio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert "torchaudio" in torchaudio_problem()
    with pytest.raises(PluginError, match="Use 'torch'"):
        LogMel(backend="torchaudio")
    assert bool(torch.isfinite(LogMel(64)(sound(4000))).all())
    (row,) = logmel.examine()
    assert row["status"] == "note" and "own front end" in row["detail"]
    (told,) = [r for r in examine() if r["name"] == row["name"]]
    assert told == row


def test_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(b, 10, 8, generator=generator) * 3 - 5 for b in (4, 4, 1)]
    mean, std = measure_statistics(batches)
    everything = torch.cat(batches).double()
    assert mean == pytest.approx(float(everything.mean()), abs=1e-12)
    assert std == pytest.approx(float(everything.std()), rel=1e-12)
    mean, std = measure_statistics(batches, official=True)
    assert mean == pytest.approx(np.mean([float(b.double().mean()) for b in batches]))
    assert std == pytest.approx(np.mean([float(b.double().std()) for b in batches]))
    with pytest.raises(DataError, match="at least one batch"):
        measure_statistics([])


RATES = [
    (44100, 16000),
    (48000, 16000),
    (8000, 16000),
    (22050, 16000),
    (11025, 16000),
    (96000, 16000),
    (16000, 44100),
    (3, 2),
]


@referee
@pytest.mark.parametrize(("orig", "new"), RATES)
def test_resample_equals_torchaudio(orig: int, new: int) -> None:
    from torchaudio import functional

    x = torch.stack([sound(5003, seed, orig) for seed in range(3)])
    got = resample(x, orig, new)
    assert got.shape == (3, resampled_length(5003, orig, new))
    torch.testing.assert_close(got, functional.resample(x, orig, new), atol=2e-5, rtol=0)
    torch.testing.assert_close(got.double(), functional.resample(x.double(), orig, new), atol=1e-6, rtol=0)
    torch.testing.assert_close(resample(x[1], orig, new), got[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("orig", "new"), [(44100, 16000), (8000, 16000), (44101, 16000), (16000, 48001)])
def test_resample_keeps_a_tone(orig: int, new: int) -> None:
    def tone(rate: int) -> torch.Tensor:
        return (2 * math.pi * 440 * torch.arange(rate // 2, dtype=torch.float64) / rate).sin()

    got, wanted = resample(tone(orig), orig, new), tone(new)
    assert len(got) == resampled_length(orig // 2, orig, new)
    middle = slice(len(wanted) // 10, -len(wanted) // 10)
    torch.testing.assert_close(got[: len(wanted)][middle], wanted[middle], atol=2e-3, rtol=0)


def test_resample_edges() -> None:
    x = sound(100)
    assert resample(x, 16000, 16000) is x
    assert resample(torch.zeros(2, 0), 8000, 16000).shape == (2, 0)
    assert resample(torch.zeros(0, 100), 44100, 16000).shape == (0, 37)
    assert resample(torch.ones(1), 44100, 16000).shape == (1,)
    assert torch.autograd.gradcheck(lambda w: resample(w, 20, 11), torch.randn(2, 50).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda w: resample(w, 441, 160), torch.randn(1, 60).double().requires_grad_())
    with pytest.raises(ConfigError, match="whole numbers"):
        resample(x, 16000, 0)
    with pytest.raises(DataError, match="int16"):
        resample(x.to(torch.int16), 8000, 16000)


@pytest.mark.gpu
@gpu
def test_gpu_agrees_with_cpu() -> None:
    lengths = torch.tensor([16000, 300, 9000, 16000])
    batch = torch.stack([sound(16000, seed) for seed in range(4)])
    front = LogMel(100).cuda()
    got = front.features(batch.cuda(), lengths)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), front.features(batch, lengths), atol=5e-3, rtol=0)
    exact = FilterBank()(batch.double().cuda()).cpu()
    torch.testing.assert_close(exact, FilterBank()(batch.double()), atol=1e-6, rtol=0)
    for orig, new in RATES:
        torch.testing.assert_close(
            resample(batch.cuda(), orig, new).cpu(), resample(batch, orig, new), atol=1e-5, rtol=0
        )
    wave = batch.cuda().requires_grad_()
    front(wave).sum().backward()
    assert bool(torch.isfinite(wave.grad).all())
