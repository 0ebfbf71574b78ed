"""Audio Spectrogram Transformers by themselves: files of the original code, and position tables."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from golden_cases import Config, Tensors, group
from peft_suite.audio.checkpoints import load
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.audio.positions import adapt_positions, patch_grid


def near(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Fail unless every value agrees to ``tolerance``, absolutely."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    gap = float((got.detach() - wanted).abs().max())
    assert gap <= tolerance, f"{what}: off by {gap:.2e}"


def original(config: Config, tensors: Tensors) -> None:
    """A released file of the original code: loaded, compared, and once more through transformers' own classes."""
    from transformers import ASTConfig, ASTForAudioClassification, ASTModel

    sizes = ASTConfig(
        hidden_size=config["dim"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["heads"],
        intermediate_size=int(config["dim"] * config["mlp_ratio"]),
        patch_size=config["patch"],
        num_mel_bins=config["fdim"],
        max_length=config["tdim"],
        frequency_stride=config["fstride"],
        time_stride=config["tstride"],
        num_labels=config["label"],
    )
    ours = AudioClassifier(ASTModel(sizes), config["label"], "tokens", head="norm")
    theirs = ASTForAudioClassification(sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "audio.pth")
        torch.save(group(tensors, "sd."), path)
        for model in (ours, theirs):
            report = load(model.eval(), str(path))
            assert not report.missing and not report.reshaped, report
            assert {k.split(".")[1] for k in report.unexpected} <= {"head", "head_dist"}, report
        assert ours.encoder.layers[0].layernorm_before.eps == config["norm_eps"]  # type: ignore[union-attr,index]
        assert ours.norm.eps == config["head_norm_eps"]
        theirs.save_pretrained(folder)
        again = ASTForAudioClassification.from_pretrained(folder).eval()
    x = tensors["in.input"]
    seen: dict[str, Tensor] = {}
    for name, path_ in (("block0", "encoder.layers.0"), ("norm", "encoder.layernorm"), ("pooled", "pool")):
        ours.get_submodule(path_).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        near(ours(x), tensors["out.logits"], "logits", 5e-5)
        near(theirs(x).logits, tensors["out.logits"], "logits of transformers", 5e-5)
        near(again(x).logits, tensors["out.logits"], "logits after save_pretrained", 5e-5)
    for name, made in seen.items():
        near(made, tensors[f"out.{name}"], name, 5e-5)


def positions(config: Config, tensors: Tensors) -> None:
    """Position tables cropped and stretched."""
    spec = config["spec"]
    rows, columns = spec["source_grid"]
    assert patch_grid(128, 1024) == (12, 101)
    table = tensors["in.pos_embed"]
    for case in spec["cases"]:
        f, t = case["f_dim"], case["t_dim"]
        made = adapt_positions(table, (rows, columns), (f, t))
        near(made, tensors[f"out.f{f}.t{t}"], f"f{f}.t{t}", float(spec["tolerance"]))


CHECKS = {"ast-original": original, "ast-posembed": positions}
