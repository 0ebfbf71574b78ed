"""The same numbers on a GPU as on the CPU; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import peft_suite as ps
from peft_suite.vision.anatomies.timm_vit import example

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

METHODS = [
    "linear",
    "full",
    "bitfit",
    "norm",
    "lora",
    "lora(dora=True)",
    "houlsby",
    "adaptformer",
    "ssf",
    "vpt(deep=True)",
]


@pytest.mark.parametrize("method", METHODS)
def test_gpu_agrees_with_cpu(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = example()
    ps.adapt(model, method)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model(x).square().sum().backward()
    twin = copy.deepcopy(model).cuda()
    twin.zero_grad()
    out = twin(x.cuda())
    out.square().sum().backward()
    torch.testing.assert_close(out.cpu(), model(x), atol=1e-4, rtol=1e-3)
    for (name, a), b in zip(twin.adapters.named_parameters(), model.adapters.parameters(), strict=True):
        assert a.is_cuda
        assert float((a.grad.cpu() - b.grad).norm() / b.grad.norm()) < 1e-3, name
    ps.save(twin, tmp_path)
    ps.remove(twin)
    ps.load(twin, tmp_path)
    torch.testing.assert_close(twin(x.cuda()), out)
    with torch.autocast("cuda", torch.bfloat16):
        assert bool(torch.isfinite(twin(x.cuda())).all())
