"""Anatomy: where a backbone family's tokens, blocks, norms, projections and head are.

A plugin describes each family once; methods are written against the description and never name a model library.
Everything here is names and numbers: an anatomy holds no module and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft_suite.errors import BackboneError, UnsupportedError, closest
from peft_suite.plugins import families, resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Anatomy", "Block", "Point", "Weight", "anatomy_of"]

Functional = Callable[..., "Tensor"]  # (module, x, weight or None, bias or None), and further inputs where a class has


@dataclass(frozen=True)
class Point:
    """A module that a part can listen to.

    Attributes:
        path: module path from the root.
        width: channels of the module's output (of its input for ``before``).
        layout: "last" for ``[..., C]``, "first" for ``[B, C, ...]``.
        argument: position or keyword of the stream among the module's inputs.
        output: index of the stream when the module returns a tuple.
    """

    path: str
    width: int
    layout: Literal["last", "first"] = "last"
    argument: int | str = 0
    output: int | None = None


@dataclass(frozen=True)
class Weight:
    """A logical matrix: the whole weight of a module, or the rows ``[start, stop)`` of a fused one."""

    path: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        point: the block itself; its input and output are the residual stream.
        points: role -> point. Roles: ``norm1 attn attn_out drop1 norm2 mlp drop2`` where ``attn`` and ``mlp`` are the
            whole sub-layers, ``attn_out`` the output projection, ``drop1/drop2`` the last module of a residual branch.
            Blocks of one backbone may differ, and descriptions may name further roles.
        weights: logical matrices ``q k v o fc1 fc2``, and further roles of the description.
        affine: every affine operation in the order of data flow.
        branches: names among ``attn mlp`` whose un-normalised input and residual sum a part can reach (``beside`` with
            ``source="residual"``); needs the block's forward in ``Anatomy.block_forwards``.
    """

    point: Point
    points: Mapping[str, Point]
    weights: Mapping[str, Weight]
    affine: tuple[Point, ...] = ()
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """A described backbone.

    Attributes:
        family: name of the description.
        dim: width of the first block's stream.
        blocks: residual blocks in order.
        embed: module whose output is the token sequence ``[B, N, dim]`` that enters block 0.
        stem: affine operations before the blocks.
        norm: final norm over the tokens, or what stands in its place: the first module after the blocks.
        tail: affine operations between the blocks and the head.
        between: affine operations between stages: patch merging, downsampling, projected shortcuts.
        norms: module paths of all normalisation layers.
        fresh: full names of parameters that every method trains: the head and what belongs to it.
        prefix_tokens: tokens before the grid (class, distillation, registers).
        class_token: full name of the class token's parameter; empty when there is none.
        patch_values: inputs per patch position, ``p_h * p_w * channels`` (fan-in of the patch embedding).
        functionals: forward function of a class -> ``f(module, x, weight, bias)`` with the same meaning, for classes
            with their own forward whose weights methods may replace.
        block_forwards: forward function of a block class, or of another class with named places -> ``f(module, beside,
            *args, **kwargs)``; see :class:`peft_suite.edits.Beside`.
        places: forward function of a class in ``block_forwards`` -> names of the places inside it where parts can act:
            "prefix", keys and values ``[B, heads, N, head width]`` before attention; "prompts", extra tokens of a
            windowed backbone.
        image: the module whose input is the image ``[B, 3, H, W]``.
        image_size: (height, width) that the model insists on; None where any will do.
        grid: (rows, columns) of the patches behind the prefix tokens at the size the model was built for; None where
            tokens lie on no grid.
        head: the one classifier whose output is the model's output, layout "first" for a map ``[B, C, H, W]``.
        read_directly: modules whose parameters the model reads without calling them: no edit would ever fire there, so
            methods are refused, and copies of their parameters stand in for them by name.
        idle: full names of parameters that do not reach the output; no method trains them.
        tied: full name of a parameter -> another name of the same one, under the module that the model calls.
        no_prompts: why extra tokens cannot be carried; empty when they can.
        causal: a token sees itself and earlier ones only, so that what comes last is seen by nothing.
        queries: blocks treat the prefix tokens by their place, so nothing may stand before them.
        taps: the outputs of several blocks are read together, so tokens that enter late may not flow on.
        reentrant: the model is set to reentrant gradient checkpointing, which loses gradients of adapters.
    """

    family: str
    dim: int
    blocks: tuple[Block, ...]
    embed: Point | None = None
    stem: tuple[Point, ...] = ()
    norm: Point | None = None
    tail: tuple[Point, ...] = ()
    between: tuple[Point, ...] = ()
    norms: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    prefix_tokens: int = 0
    class_token: str = ""
    patch_values: int = 0
    functionals: Mapping[Callable[..., Any], Functional] = field(default_factory=dict)
    block_forwards: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)
    places: Mapping[Callable[..., Any], tuple[str, ...]] = field(default_factory=dict)
    image: Point | None = None
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    head: Point | None = None
    read_directly: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    no_prompts: str = ""
    causal: bool = False
    queries: bool = False
    taps: bool = False
    reentrant: bool = False

    def need_blocks(self, method: str) -> tuple[Block, ...]:
        """The blocks, or UnsupportedError in one sentence."""
        if not self.blocks:
            raise UnsupportedError(f"{method} works on residual blocks, and {self.family} describes none.")
        return self.blocks

    def with_weight(self, role: str, method: str) -> tuple[Block, ...]:
        """The blocks that have a matrix of ``role``, or UnsupportedError in one sentence where none has."""
        blocks = self.need_blocks(method)
        found = tuple(block for block in blocks if role in block.weights)
        if not found:
            roles = dict.fromkeys(known for block in blocks for known in block.weights)
            raise UnsupportedError(
                f"{method} targets {role!r}, and no block of {self.family}, from {blocks[0].point.path} on, has such a "
                f"matrix ({closest(role, roles)})"
            )
        return found

    def need_point(self, block: Block, role: str, method: str) -> Point:
        """The point of ``role``, or UnsupportedError in one sentence."""
        if role not in block.points:
            raise UnsupportedError(
                f"{method} needs the point {role!r} of every block, and {block.point.path} of {self.family} has none "
                f"({closest(role, block.points)})"
            )
        return block.points[role]

    def need_weight(self, block: Block, role: str, method: str) -> Weight:
        """The logical matrix of ``role``, or UnsupportedError in one sentence."""
        if role not in block.weights:
            raise UnsupportedError(
                f"{method} targets {role!r}, and {block.point.path} of {self.family} has no such matrix "
                f"({closest(role, block.weights)})"
            )
        return block.weights[role]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe ``model`` through the first class of its hierarchy that a plugin knows.

    Raises:
        BackboneError: no installed plugin describes the model.
    """
    table = families()
    for cls in type(model).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in table:
            entry, plugin = table[name]
            anatomy = resolve(entry.target, plugin)(model)
            if not isinstance(anatomy, Anatomy):
                raise BackboneError(
                    f"{entry.target} of plugin {plugin.name!r} returned {type(anatomy).__name__}, not Anatomy."
                )
            return anatomy
    known = sorted({entry.family for entry, _ in table.values()})
    raise BackboneError(
        f"No anatomy describes {type(model).__module__}.{type(model).__qualname__}. "
        f"{closest(type(model).__name__, known)} "
        "Pass anatomy=Anatomy(...) to describe it yourself, or install the plugin for its family."
    )
