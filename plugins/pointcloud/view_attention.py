"""What the class token of a point transformer looks at: one row of one block's attention.

    a = mean over heads of softmax(q_class kᵀ / sqrt(width))        over all keys; G of them are patches

Queries and keys are those of the very call that the block makes, so whatever an adapter does to them (changed weights,
further tokens, prefixes) is in them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peft_suite.anatomy import Anatomy
from peft_suite.edits import Part
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.lifecycle import described

__all__ = ["Attended", "attention"]


class Attended(NamedTuple):
    """``patches``: ``[G]`` in the order of the patches. ``itself`` is the share of the class token (0 where it is no
    key), ``others`` that of prompts and prefixes; all add up to 1."""

    patches: Tensor
    itself: float
    others: float


@torch.no_grad()
def attention(model: nn.Module, points: Tensor, block: int) -> Attended:
    """The class token's attention in block ``block``, counted from 0.

    Args:
        model: a backbone, adapted or not, in eval mode.
        points: one cloud ``[1, N, 3 + C]``.

    Raises:
        UnsupportedError: no class token, one that sees no patches, or tokens that cannot be told apart.
        ConfigError: there is no such block.
    """
    anatomy = described(model)
    _refuse(anatomy, block)
    watch = _Watch(model, model.get_submodule(anatomy.blocks[block].point.path))
    with watch.hooks(), watch:
        model(points)
    own, first, count = watch.places(anatomy)
    query, key = watch.query[0].float(), watch.key[0].float()  # [heads, tokens, width]
    scores = torch.einsum("hd,hnd->hn", query[:, own], key) / query.shape[2] ** 0.5
    shares = scores.softmax(1).mean(0)  # [keys]
    skipped = key.shape[1] - watch.tokens  # prefixes stand in front; a cross-attention's keys begin behind the queries
    patches = shares[skipped + first : skipped + first + count]
    itself = float(shares[skipped + own]) if skipped + own >= 0 else 0.0
    return Attended(patches, itself, max(float(1 - patches.sum()) - itself, 0.0))


def _refuse(anatomy: Anatomy, block: int) -> None:
    if not anatomy.class_token:
        raise UnsupportedError(
            f"A {anatomy.family} has no class token, so there is no attention of one. Use --show groups or basis."
        )
    if anatomy.causal:
        raise UnsupportedError(
            f"The class token of a {anatomy.family} stands before the patches and, as its blocks are causal, sees none "
            "of them. Use --show groups or basis."
        )
    if not 0 <= block < len(anatomy.blocks):
        raise ConfigError(f"--block {block}: the backbone has the blocks 0 to {len(anatomy.blocks) - 1}.")


class _Watch(TorchFunctionMode):
    """Keeps query and key of one attention, and the positions of the tokens that it saw.

    Tokens are told apart by their positions: those of the patches and of the class token are known, and every method
    that adds tokens brings positions for them.
    """

    query: Tensor
    key: Tensor
    tokens: int  # of the block; of a cross-attention its keys' number and the queries that are no keys

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.model, self.block = model, block
        crossed = getattr(block, "attn_contrast", None)  # ReCon: the class token asks, only patches answer
        self.attn: nn.Module = block.attn if crossed is None else crossed  # type: ignore[assignment]
        self.crossed = crossed is not None
        self.inside = self.listening = False
        self.positions: Tensor | None = None
        self.of_patches: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and func is F.scaled_dot_product_attention:
            self.query, self.key = args[:2]
        return func(*args, **(kwargs or {}))

    def hooks(self) -> ExitStack:
        """Hooks on the model; they go with the stack."""
        stack = ExitStack()

        def on(module: nn.Module, before: Any = None, after: Any = None) -> None:
            if before is not None:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after).remove)

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            self.positions, self.listening = args[1], True

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            self.inside, self.listening = True, False

        def end(module: Any, args: Any, output: Any) -> None:
            self.inside = False

        def moved(module: Any, args: Any, output: Any) -> None:
            pair = isinstance(output, tuple) and len(output) == 2
            if self.listening and pair and output[1].ndim == 3:  # stream and positions, with tokens added
                self.positions = output[1]

        def placed(module: Any, args: Any, output: Any) -> None:
            self.of_patches = output

        on(self.block, before=enter)
        on(self.attn, before=begin, after=end)
        on(self.model.get_submodule("pos_embed"), after=placed)
        for module in self.model.modules():
            if isinstance(module, Part):
                on(module, after=moved)
        return stack

    def places(self, anatomy: Anatomy) -> tuple[int, int, int]:
        """(the class token's place among the block's tokens, the first patch's, patches)."""
        assert self.positions is not None and self.of_patches is not None
        pos, patches = self.positions[0], self.of_patches[0]  # [n, D], [G, D]
        self.tokens, count = len(pos), len(patches)
        first = _find(pos, patches)
        own = _find(pos, self.model.cls_pos[0].detach())  # type: ignore[index]
        if len(pos) == anatomy.prefix_tokens + count:
            own, first = 0, anatomy.prefix_tokens
        if own is None or first is None or own >= self.query.shape[2]:
            raise UnsupportedError(
                f"This adapter changes the positions of the {len(pos)} tokens of the block, so its {count} patches "
                "cannot be told from the rest. Choose another --block."
            )
        return own, first, count


def _find(rows: Tensor, wanted: Tensor) -> int | None:
    """Where the rows ``wanted`` stand in ``rows``, in one piece."""
    for at in range(len(rows) - len(wanted) + 1):
        if torch.allclose(rows[at : at + len(wanted)], wanted.to(rows.dtype), atol=1e-5):
            return at
    return None
