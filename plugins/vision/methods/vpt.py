"""VPT (Jia et al., ECCV 2022): learned prompts in the input of a frozen backbone.

Prepended (the paper's choice): P tokens enter once at the embedding output and flow through all blocks (shallow), or
every block gets its own P tokens, and what the previous block made of its prompts is dropped (deep). Prompts carry no
position embedding.

    z = [class ; drop(proj(P)) ; patches]

Blocks see tokens as a set, so where the prompts stand changes nothing but rounding; at the end of the sequence they
come off without a copy. On Swin every window of an image attends to all prompts of that image, and what the windows
make of a prompt is averaged. Point transformers add positions again before every block; there prompts bring learned
positions of their own. Other places of the paper's ablation: added to the tokens, around the image, below it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.pixel_prompts import Below, Border
from peft_suite.vision.methods.prompts import (
    Add,
    Carry,
    Enter,
    Position,
    Prompt,
    Replace,
    ReplaceWithPosition,
    Strip,
    WithPosition,
)


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """VPT.

    Attributes:
        num_tokens: P, per block when deep; the width of the border for "pad", channels for "below"; "add" has one
            prompt per token, "add-1" one for all, whatever this says.
        deep: own prompts for every block instead of once at the input.
        location: "prepend"; "add", "add-1" to the tokens; "pad", a border of pixels around the image (inside it, around
            the scaled image, where a backbone's input size is fixed); "below", more input channels.
        first_block, num_blocks: deep prompts only for this range of blocks (None: to the last); a negative first_block
            counts from the end: -3 is the paper's REVERSE_DEEP with three layers.
        flow: let the prompts of the last prompted block flow on to the end, as NUM_DEEP_LAYERS of the paper's code
            does, instead of taking them off behind it.
        shared: one set of prompts for all deep blocks (DEEP_SHARED).
        project: prompts of this width, mapped by one shared Linear to the model's; None uses the model's width.
        dropout: on the prompts (the paper's deep runs use 0.1).
        position: "end" (of a causal backbone: "start"), "after_prefix" (behind class and register tokens, the paper's
            order) or "start".
        init: "uniform": U(-v, v) with v = sqrt(6 / (patch inputs + prompt width)), the paper's; "normal": N(0, 0.02);
            "zero". Pixels start uniform in [0, 1].
        image_size: size at which pixels are learned on backbones that take images of any size; at other sizes they are
            scaled.
    """

    method: ClassVar[str] = "vpt"
    num_tokens: int = 10
    deep: bool = False
    location: Literal["prepend", "add", "add-1", "pad", "below"] = "prepend"
    first_block: int = 0
    num_blocks: int | None = None
    flow: bool = False
    shared: bool = False
    project: int | None = None
    dropout: float = 0.0
    position: Literal["end", "after_prefix", "start"] = "end"
    init: Literal["uniform", "normal", "zero"] = "uniform"
    image_size: int = 224

    def validate(self) -> None:
        self.require("num_tokens", self.num_tokens >= 1, "must be at least 1")
        self.require("project", self.project is None or self.project >= 1, "must be at least 1 or None")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("num_blocks", self.num_blocks is None or self.num_blocks >= 1, "must be at least 1 or None")
        self.require("deep", not (self.deep and self.location in ("pad", "below")), "pixels enter once, set deep=False")
        for name in ("shared", "flow"):
            self.require(name, self.deep or not getattr(self, name), "is an option of deep prompts, set deep=True")
        self.require("flow", not self.flow or self.location == "prepend", "is an option of prepended prompts")


class VPT(Method[VPTConfig]):
    """Put prompts where the configuration says, and take tokens off again where others would stumble over them.

    Prepended: ``P*d`` parameters shallow, ``L*P*d`` deep, on Swin with the width of each stage, on point transformers
    twice as many for the positions. The backbone's dropout
    and drop path stay off, as in the paper's code. Deep prompts leave intermediate features as they are for others;
    shallow ones are part of them. Pooling is the backbone's: the paper's pooling of patch tokens is a backbone built
    with ``global_pool="avg"``.
    """

    config_class = VPTConfig
    examples = (
        "vpt(num_tokens=3)",
        "vpt(num_tokens=3, deep=True)",
        "vpt(num_tokens=2, deep=True, first_block=-1, flow=True)",
        "vpt(num_tokens=2, deep=True, shared=True, project=5)",
        "vpt(location=add)",
        "vpt(location='add-1', deep=True)",
        "vpt(location=pad, num_tokens=3, image_size=32)",
        "vpt(location=below, num_tokens=2, image_size=32)",
    )

    @property
    def capabilities(self) -> Capabilities:
        adds, zero = self.config.location in ("add", "add-1"), self.config.init == "zero"
        longer = self.config.location == "prepend"
        return Capabilities(identity_at_init=adds and zero, changes_sequence=longer, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the prompts.

        Raises:
            UnsupportedError: the backbone cannot carry extra tokens or pixels, or has fewer blocks than asked for.
        """
        if self.config.location in ("pad", "below"):
            self._pixels(anatomy, edit)
        elif self.config.location == "prepend" and any("prompts" in names for names in anatomy.places.values()):
            self._windows(anatomy, edit)
        elif self.config.location == "prepend" and any("tokens" in names for names in anatomy.places.values()):
            self._positioned(anatomy, edit)
        else:
            self._tokens(anatomy, edit)

    def _tokens(self, anatomy: Anatomy, edit: Editor) -> None:
        config = self.config
        blocks = anatomy.need_blocks("vpt")
        if anatomy.no_prompts or anatomy.embed is None or anatomy.norm is None:
            raise UnsupportedError(
                f"vpt cannot add tokens to {anatomy.family}: {anatomy.no_prompts or 'it names no token sequence'}."
            )
        at = {"end": None, "after_prefix": anatomy.prefix_tokens, "start": 0}[config.position]
        options = self._options(anatomy.dim, anatomy) | {"at": at}
        start, stop = self._range(len(blocks), anatomy.family) if config.deep else (0, 1)
        first: Prompt | None = None
        for i, block in enumerate(blocks[start:stop], start):
            part = self._kind(anatomy, replaces=config.flow and i > start)(**options, like=first, tied=config.shared)
            first = first or part
            if i == 0:
                edit.after(anatomy.embed, part, "vpt")
            else:
                edit.before(block.point, part, "vpt")
            if config.location == "prepend" and config.deep and not config.flow:
                edit.after(block.point, Strip(config.num_tokens, at), "vpt_strip")
        if config.location == "prepend" and (config.flow or not config.deep):
            edit.before(anatomy.norm, Strip(config.num_tokens, at), "vpt_strip")

    def _positioned(self, anatomy: Anatomy, edit: Editor) -> None:
        """Blocks that add positions themselves: prompts and their own positions enter before the sum of both."""
        config = self.config
        blocks = anatomy.need_blocks("vpt")
        if anatomy.no_prompts or anatomy.norm is None:
            raise UnsupportedError(
                f"vpt cannot add tokens to {anatomy.family}: {anatomy.no_prompts or 'it names no final norm'}."
            )
        end = 0 if anatomy.causal else None  # behind a causal sequence prompts would be seen by nothing
        at = {"end": end, "after_prefix": anatomy.prefix_tokens, "start": 0}[config.position]
        options = self._options(anatomy.dim, anatomy) | {"at": at}
        start, stop = self._range(len(blocks), anatomy.family) if config.deep else (0, 1)
        flows = config.flow or not config.deep
        if at == 0 and anatomy.queries:
            raise UnsupportedError(
                f"vpt(position=start): {anatomy.family} finds its queries at the start. Choose end or after_prefix."
            )
        if flows and start and anatomy.taps:
            raise UnsupportedError(
                f"vpt(flow=True) from block {start} on: {anatomy.family} reads the outputs of several blocks, whose "
                "lengths would differ. Choose flow=False, or first_block=0."
            )
        first: WithPosition | None = None
        last: WithPosition | None = None
        for i, block in enumerate(blocks[start:], start):
            if i < stop:
                kind = ReplaceWithPosition if config.flow and i > start else WithPosition
                last = kind(**options, like=first, tied=config.shared)
                first = first or last
                edit.inside(block.point, "tokens", last, "vpt")
                if not flows:
                    edit.after(block.point, Strip(config.num_tokens, at), "vpt_strip")
            elif flows and last is not None:
                edit.inside(block.point, "tokens", Position(last), "vpt")
        if flows:
            edit.before(anatomy.norm, Strip(config.num_tokens, at), "vpt_strip")

    def _kind(self, anatomy: Anatomy, replaces: bool) -> Any:
        if self.config.location == "prepend":
            return Replace if replaces else Prompt
        if self.config.location == "add" and anatomy.grid is None:
            raise UnsupportedError(f"vpt(location='add') has one prompt per token, and {anatomy.family} names no grid.")
        return Add

    def _options(self, dim: int, anatomy: Anatomy) -> dict[str, Any]:
        config = self.config
        count = config.num_tokens
        if config.location != "prepend":
            rows, columns = anatomy.grid or (0, 0)
            count = 1 if config.location == "add-1" else anatomy.prefix_tokens + rows * columns
        bound = math.sqrt(6.0 / (anatomy.patch_values + (config.project or anatomy.dim)))
        return {
            "count": count,
            "dim": dim,
            "bound": bound,
            "project": config.project,
            "dropout": config.dropout,
            "init": config.init,
        }

    def _range(self, depth: int, family: str) -> tuple[int, int]:
        start = self.config.first_block
        first = start + depth if start < 0 else start
        stop = depth if self.config.num_blocks is None else first + self.config.num_blocks
        if not 0 <= first < stop <= depth:
            raise UnsupportedError(f"vpt: blocks {first} to {stop - 1} were asked for; {family} has {depth}.")
        return first, stop

    def _windows(self, anatomy: Anatomy, edit: Editor) -> None:
        """Swin: prompts enter the first block beside the map, and pass patch merging with it."""
        config = self.config
        whole = config.first_block == 0 and config.num_blocks is None and not (config.flow or config.shared)
        if not whole or config.project is not None or anatomy.grid is None:
            raise UnsupportedError(
                f"On {anatomy.family}, vpt puts prompts of each stage's own width at the input or at every block: keep "
                "first_block, num_blocks, flow, shared and project at their defaults."
            )
        mergings = list(dict.fromkeys(point.path.rpartition(".")[0] for point in anatomy.between))
        size, width = anatomy.grid, anatomy.dim
        for i, block in enumerate(anatomy.need_blocks("vpt")):
            if block.point.width != width:
                edit.inside(Point(mergings.pop(0), block.point.width), "prompts", Carry(config.num_tokens, size), "vpt")
                size, width = (-(-size[0] // 2), -(-size[1] // 2)), block.point.width
            if i == 0 or config.deep:
                part: Any = Enter(**self._options(width, anatomy), size=size, packed=i > 0)
            else:
                part = Carry(config.num_tokens, size)
            edit.inside(block.point, "prompts", part, "vpt")

    def _pixels(self, anatomy: Anatomy, edit: Editor) -> None:
        config, image = self.config, anatomy.image
        if image is None:
            raise UnsupportedError(
                f"vpt(location={config.location!r}) needs to know where the image enters {anatomy.family}."
            )
        size = anatomy.image_size or (config.image_size, config.image_size)
        if config.location == "pad":
            inside = anatomy.image_size is not None
            if inside and 2 * config.num_tokens >= min(size):
                raise UnsupportedError(f"vpt: a border of {config.num_tokens} pixels leaves nothing of {size} images.")
            edit.before(image, Border(config.num_tokens, size, inside), "vpt")
            return
        first = next(((n, m) for n, m in edit.module(image.path).named_modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise UnsupportedError(
                f"vpt(location='below') widens the first convolution, and {anatomy.family} has none."
            )
        path = f"{image.path}.{first[0]}" if first[0] else image.path
        edit.beside(Point(path, first[1].out_channels, "first"), Below(config.num_tokens, size, first[1]), "vpt")
