"""The filter bank, its normalisation and the resampler against torchaudio and transformers."""

from __future__ import annotations

import torch

from golden_cases import Config, NotCoveredError, Tensors
from peft_suite.audio.frontend.fbank import FilterBank, mel_filters
from peft_suite.audio.frontend.logmel import LogMel
from peft_suite.audio.frontend.resample import resample

OPTIONS = {  # names a golden may give its options by, and ours
    "sample_rate": "sample_rate",
    "num_mel_bins": "num_mel_bins",
    "low_freq": "low_freq",
    "high_freq": "high_freq",
    "window_type": "window",
    "window": "window",
    "frame_length": "frame_length",
    "frame_shift": "frame_shift",
    "preemphasis_coefficient": "preemphasis",
}


def fbank(config: Config, tensors: Tensors) -> None:
    """Log-mel values, the original AST's and the float64 variant, the normalised features and the mel matrix."""
    spec = {**config["spec"], **config}
    wave = tensors["in.waveform"]
    options = {ours: spec[theirs] for theirs, ours in OPTIONS.items() if theirs in spec}
    options.setdefault("num_mel_bins", tensors["out.logmel"].shape[1])
    bank = FilterBank(**options)
    got = {
        "out.logmel": bank(wave),
        "out.logmel_original_ast": FilterBank(**options, zero_mean=True)(wave),
        "out.logmel_float64": bank(wave.double()),
        "out.mel_filters": mel_filters(bank.options),
    }
    if "out.normalised" in tensors:
        got["out.normalised"] = LogMel(spec["max_length"], spec["mean"], spec["std"], **options)(wave)
    wanted = {name: value for name, value in tensors.items() if name.startswith("out.")}
    if unknown := wanted.keys() - got.keys():
        raise NotCoveredError(f"no counterpart of {sorted(unknown)}")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0)
    differentiable = bank(wave.clone().requires_grad_()).detach()
    torch.testing.assert_close(differentiable, wanted["out.logmel"], atol=1e-5, rtol=0)


def audio_resample(config: Config, tensors: Tensors) -> None:
    """One waveform between every pair of rates that the golden names; 5e-5 is the reference's own error."""
    cases = [name for name in tensors if name.startswith("out.")]
    assert cases
    for name in cases:
        orig, new = map(int, name.removeprefix("out.").split("_"))
        torch.testing.assert_close(resample(tensors["in.waveform"], orig, new), tensors[name], atol=5e-5, rtol=0)


CHECKS = {"ast-fbank": fbank, "audio-resample": audio_resample}
