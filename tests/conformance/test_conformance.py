"""Every registered method on every registered backbone, and on a net with batch norm."""

from __future__ import annotations

import bn_testbed
import select_testbed

import peft_suite as ps
from peft_suite.plugins import plugins
from peft_suite.testing import conformance

for testbed in (bn_testbed, select_testbed):
    if testbed.plugin.name not in {p.name for p in plugins()}:
        ps.register(testbed.plugin)

# Configurations that take another path than the method's default.
EXTRA = (
    "lora(dora=True)",
    "lora(rank=2, alpha=4, rslora=True, shared_a=True)",
    "lora(rank=2, targets=[q, k, v, o, fc1, fc2])",
    "lora(rank=2, targets=['patch_embed.proj', 'blocks.*.mlp.fc1'])",
    "lora(rank=2, targets=['conv*'])",
    "lora(init=official, dropout=0.1)",
    "norm(bias=False)",
    "adapter(position=both, insertion=parallel, source=residual, learned_scale=True)",
    "adapter(outside=True, layernorm='in', bias=False, activation=gelu)",
    "adapter(position=attn, layernorm=out, init=bert)",
    "ssf(init=identity)",
    "vpt(num_tokens=3, deep=True)",
    "vpt(num_tokens=3, deep=True, first_block=1, position=after_prefix, project=7)",
    "vpt(num_tokens=3, position=start, dropout=0.1)",
)

test_conformance = conformance(extra=EXTRA)
