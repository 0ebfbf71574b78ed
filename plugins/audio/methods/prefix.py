"""Prefix tuning (Li and Liang, ACL 2021) without reparametrisation: learned keys and values in every block.

    K = [P_k ; K]    V = [P_v ; V]                   P_k, P_v: [n/2, d] per block, seen by every query

Queries and the length of the sequence stay. Where the rows stand does not matter: attention sees keys as a set. It is
the first half of ``mam``, which also has a reparametrisation and adds an adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.mam import MAMConfig, Prefix


@dataclass(frozen=True)
class PrefixConfig(MethodConfig):
    """How many rows.

    Attributes:
        num_tokens: n per block, even: half of them keys, half values.
        init: "uniform": +-sqrt(6 / (3 p^2 + d)) for patches of p x p, as in the audio study; "normal": N(0, 0.02).
        dropout: on the rows.
    """

    method: ClassVar[str] = "prefix"
    num_tokens: int = 24
    init: Literal["uniform", "normal"] = "uniform"
    dropout: float = 0.0

    def validate(self) -> None:
        even = self.num_tokens >= 2 and self.num_tokens % 2 == 0
        self.require("num_tokens", even, "must be even and at least 2, half of them are keys and half values")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")


class PrefixTuning(Method[PrefixConfig]):
    """``Lnd`` parameters, 221,184 on AST-base. Not mergeable."""

    config_class = PrefixConfig
    examples = ("prefix(num_tokens=4)",)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Put rows in front of every block's keys and values.

        Raises:
            UnsupportedError: the backbone's attention takes no further keys and values.
        """
        config = self.config
        shape = MAMConfig(prefix=config.num_tokens // 2, prefix_dropout=config.dropout, bottleneck=0)
        bound = math.sqrt(6.0 / (3 * anatomy.patch_values + anatomy.dim))
        for block in anatomy.need_blocks("prefix"):
            rows = anatomy.need_weight(block, "k", "prefix").rows
            point = anatomy.need_point(block, "attn", "prefix")
            part = Prefix(point.width if rows is None else rows[1] - rows[0], anatomy.dim, shape, None)
            if config.init == "uniform":
                assert part.prefix is not None
                nn.init.uniform_(part.prefix, -bound, bound)
            edit.inside(point, "prefix", part, "prefix")
