"""Agreement with tensors that the official implementations produced: outputs and every gradient.

Reads each ``*.json`` + ``*.safetensors`` of ``PEFT_SUITE_GOLDENS`` (default: the project's own copies) and builds
everything from the JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case, NotCoveredError, case_of, check_of
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_suite as ps

FOLDER = Path(os.environ.get("PEFT_SUITE_GOLDENS") or Path(__file__).parent / "goldens")
NAMES = sorted(p.stem for p in FOLDER.glob("*.json") if p.with_suffix(".safetensors").exists())


def test_goldens_are_there() -> None:
    assert NAMES, f"no goldens in {FOLDER}"


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    spec = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    config = {**spec.get("config", {}), "spec": spec}  # what is not configuration: expected allocations and the like
    try:
        if check := check_of(name):
            check(config, tensors)
            return
        case = case_of(name, config, tensors)
    except NotCoveredError as reason:
        pytest.xfail(f"not covered: {reason}")
    model = ps.adapt(case.backbone, case.method)
    adapter = model.adapters["default"]
    ours = dict(adapter.named_parameters())
    covered = {k: torch.zeros_like(p, dtype=torch.bool) for k, p in ours.items()}
    source = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    with torch.no_grad():
        for reference, places in case.places.items():
            for place in places:
                ours[place.name][place.ours] = source[reference][place.theirs].reshape(
                    ours[place.name][place.ours].shape
                )
                covered[place.name][place.ours] = True
    assert all(bool(c.all()) for c in covered.values()), "a trained value of ours has no counterpart in the reference"
    assert set(spec["trainable"]) == set(case.places), "the reference trains other tensors"
    seen = listen(adapter, case)

    logits = model(tensors["input.x"])
    torch.testing.assert_close(logits, tensors["output.logits"], atol=1e-5, rtol=0)
    (logits * tensors["loss.R"]).sum().backward()
    largest = max(float(tensors[f"grad.{reference}"].norm()) for reference in case.places)
    for reference, places in case.places.items():
        wanted = tensors[f"grad.{reference}"]
        for place in places:
            gradient = ours[place.name].grad
            assert gradient is not None
            close(
                gradient[place.ours].flatten(),
                wanted[place.theirs].flatten(),
                1e-4,
                f"grad.{reference}",
                1e-3 * largest,
            )
    for inter, key in case.taps.items():
        given, made = seen[key]
        close(given, tensors[f"inter.{inter}.in"], 1e-5, f"inter.{inter}.in")
        close(case.tapped(given, made), tensors[f"inter.{inter}.out"], 1e-5, f"inter.{inter}.out")
    if case.more is not None:
        case.more(model)
    if "output.encoded" in tensors:
        encoded_prefix_and_patches(model, case, tensors)
    if case.mergeable:
        ps.merge(model)
        torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], atol=1e-5, rtol=0)


def listen(adapter: nn.Module, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(key: str) -> Any:
        return lambda module, args, output: seen.__setitem__(key, (args[-1].detach(), output.detach()))

    for key in case.taps.values():
        adapter.get_submodule(key).register_forward_hook(keep(key))
    return seen


def encoded_prefix_and_patches(model: nn.Module, case: Case, tensors: dict[str, Tensor]) -> None:
    """The reference keeps its prompts up to the end; ours come off before the final norm. The other tokens agree."""
    count = case.method["num_tokens"]
    wanted = tensors["output.encoded"]
    kept = torch.cat((wanted[:, :1], wanted[:, 1 + count :]), dim=1)
    with torch.no_grad():
        close(model.forward_features(tensors["input.x"]), kept, 1e-5, "output.encoded")


def relative(got: Tensor, wanted: Tensor, least: float = 1e-30) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(least))


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str, least: float = 1e-30) -> None:
    """``least``: a norm below which a tensor is the rounding of larger ones (1e-4 of 1e-3 is float32's step)."""
    error = relative(got, wanted, least)
    assert error < tolerance, f"{what}: relative error {error:.2e}"
