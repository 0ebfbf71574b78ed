"""An exported model takes batches of any size: nothing in a part fixes the one that it was traced with."""

from __future__ import annotations

import pytest
import torch

import peft_suite as ps
from peft_suite.plugins import methods, resolve
from peft_suite.testing.runner import examples

POINTS = ("linear", "vpt", "idpt", "dapt", "point-peft", "pointgst")
CASES = [
    *(("point-transformer", name) for name in POINTS),
    ("any2point", "any2point"),
    *(("timm-vit", name) for name in ("vpt", "mam", "hst")),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_another_batch_size(family: str, name: str) -> None:
    model, batch = resolve(next(target for found, target in examples() if found == family))()
    declared = resolve(methods()[name][0].target).examples
    ps.adapt(model, next((e for e in declared if e.partition("(")[0] == name), name))
    model.eval()
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(model, (batch[:2],), dynamic_shapes=shapes).module()
        torch.testing.assert_close(program(batch), model(batch))
