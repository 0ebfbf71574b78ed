"""HST, hierarchical side-tuning (Lin et al., 2023): a small pyramid network beside a frozen ViT.

Every block gets one learned meta token in front of its sequence. What the block makes of it (g_i) and its patch map
(f_i) feed a side network with stages of stride 4, 8, 16, 32 and widths m_s, one side block per backbone block:

    v = resize(T_s(f_i))            M = [LN_i(T_s(g_i)) ; mean(v)]
    x = x + CrossAttn(LN x, M)      x = x + v      x = x + MLP(LN x)

T_s: [m_s, d] is shared within a stage. The head reads the mean of the last stage; the backbone's own class token, final
norm and head are not used. The LayerNorms of the blocks train too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.adapter import adapters_of
from peft_suite.anatomy import Anatomy, Point
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import AdapterError, UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.vision.methods.grids import Grid


@dataclass(frozen=True)
class HSTConfig(MethodConfig):
    """The side network.

    Attributes:
        dims: widths m_s of the stages; the backbone's blocks are shared out equally among them.
        heads: heads of the cross-attention per stage.
        drop_path: rate of the last side block, rising from 0 over the blocks.
        fuse: width in which a dense head adds up the stages; classification does without.
    """

    method: ClassVar[str] = "hst"
    dims: tuple[int, ...] = (32, 48, 64, 72)
    heads: tuple[int, ...] = (2, 4, 8, 12)
    drop_path: float = 0.0
    fuse: int = 72

    def validate(self) -> None:
        self.require("dims", len(self.dims) >= 1 and min(self.dims) >= 1, "give at least one width")
        self.require("heads", len(self.heads) == len(self.dims), f"give one number for each of {len(self.dims)} stages")
        divides = all(h >= 1 and m % h == 0 for m, h in zip(self.dims, self.heads, strict=True))
        self.require("heads", divides, "each must divide the width of its stage")
        self.require("drop_path", 0 <= self.drop_path < 1, "must be at least 0 and below 1")
        self.require("fuse", self.fuse >= 1, "must be at least 1")


class Taps:
    """What one forward leaves for the side network, by index; the head reads and clears it.

    Never copied or pickled: a forward that did not reach the head leaves tensors of its graph behind.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        self.image: Tensor | None = None

    def take(self, count: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The image and (g_i, f_i) of all blocks."""
        image, found = self.image, self.found
        self.image, self.found = None, {}
        if image is None or len(found) != count:
            raise AdapterError(
                f"hst saw {len(found)} of {count} blocks in this forward. Call the whole model and skip no layer."
            )
        return image, [found[i] for i in range(count)]

    def __getstate__(self) -> dict[str, Any]:
        return {"found": {}, "image": None}


class Image(Part):
    """Keeps the image ``[B, 3, H, W]`` for the stem."""

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        """The image, unchanged."""
        self.taps.image = x
        return x


class MetaToken(Part):
    """Puts the meta token in front: ``[B, N, d] -> [B, 1 + N, d]``."""

    decay = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.token)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, d]``."""
        return torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)


class Tap(Part):
    """Keeps token 0 and the patch map of a block's output, and takes the token off."""

    def __init__(self, taps: Taps, index: int, grid: Grid) -> None:
        super().__init__()
        self.taps, self.index, self.grid = taps, index, grid

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, 1 + N, d]``."""
        rest = x[:, 1:]
        # f_i comes from what the block returns: sharded blocks wait for gradients of their outputs
        self.taps.found[self.index] = (x[:, :1].contiguous(), self.grid.split(rest)[1])
        return rest


class SideBlock(nn.Module):
    """Cross-attention from the side map to two memory tokens, injection of the patch map, MLP."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        """``x, v: [B, H*W, m]``, ``g: [B, 1, m]``."""
        memory = torch.cat((g, v.mean(1, keepdim=True)), dim=1)
        x = x + self._drop(self._attend(self.norm1(x), memory)) + v
        return x + self._drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _attend(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(memory), self.v(memory))
        )
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _drop(self, h: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return h
        return h * (torch.rand(len(h), 1, 1, device=h.device) >= self.drop_path) / (1 - self.drop_path)


class SideNetwork(nn.Module):
    """From the image and the taps to one map per stage, ``[B, m_s, H/(4*2^s), W/(4*2^s)]``."""

    def __init__(self, dim: int, depth: int, config: HSTConfig) -> None:
        super().__init__()
        dims = config.dims
        per, first = depth // len(dims), dims[0]
        rates = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, first, 2, stride=2),
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(dims))
        self.down_norms = nn.ModuleList(nn.LayerNorm(m, eps=1e-6) for m in dims)
        self.bridges = nn.ModuleList(nn.Linear(dim, m) for m in dims)
        self.meta_norms = nn.ModuleList(nn.LayerNorm(dims[i // per]) for i in range(depth))
        self.blocks = nn.ModuleList(SideBlock(dims[i // per], config.heads[i // per], rates[i]) for i in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(m, eps=1e-6) for m in dims)
        self.per = per
        self.apply(_initialise)

    def forward(self, image: Tensor, taps: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """``image: [B, 3, H, W]``; taps ``(g_i [B, 1, d], f_i [B, d, h, w])`` of every block."""
        maps: list[Tensor] = []
        for s, bridge in enumerate(self.bridges):
            x = self.stem(image) if s == 0 else self.downs[s - 1](maps[-1])
            size = x.shape[2:]
            x = self.down_norms[s](x.flatten(2).transpose(1, 2))
            for i in range(s * self.per, (s + 1) * self.per):
                g, f = taps[i]
                # T_s first: resizing is linear with weights that sum to 1, and m_s channels are fewer than d
                v = bridge(f.movedim(1, -1)).movedim(-1, 1)
                v = F.interpolate(v, size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
                x = self.blocks[i](x, self.meta_norms[i](bridge(g)), v)
            maps.append(self.norms[s](x).transpose(1, 2).unflatten(2, size))
        return maps


class SideHead(Part):
    """Runs the side network and gives its class scores in place of the backbone's: ``[B, C]`` or ``[B, C, h, w]``."""

    def __init__(self, taps: Taps, dim: int, depth: int, config: HSTConfig, head: Point) -> None:
        super().__init__()
        self.taps, self.depth = taps, depth
        self.network = SideNetwork(dim, depth, config)
        last = config.dims[-1]
        self.lateral: nn.ModuleList | None = None
        if head.layout == "first":
            self.lateral = nn.ModuleList(nn.Conv2d(m, config.fuse, 1) for m in config.dims)
            self.norm: nn.Module = nn.BatchNorm2d(config.fuse)
            self.head: nn.Module = nn.Conv2d(config.fuse, head.width, 1)
            self.lateral.apply(_initialise)
        else:
            self.norm = nn.BatchNorm1d(last, affine=False, eps=1e-6)
            self.head = nn.Linear(last, head.width)
        nn.init.trunc_normal_(self.head.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, y: Tensor) -> Tensor:
        """``y``, the backbone's scores, are dropped."""
        maps: list[Tensor] = self.network(*self.taps.take(self.depth))
        if self.lateral is None:
            x = self.norm(maps[-1].flatten(2).mean(2))
        else:
            whole = maps[0].shape[2:]
            laterals = [conv(m) for conv, m in zip(self.lateral, maps, strict=True)]
            laterals = [F.interpolate(m, whole, mode="bilinear", align_corners=False) for m in laterals]
            x = F.relu(self.norm(torch.stack(laterals).sum(0)))
        out: Tensor = self.head(x)
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class HST(Method[HSTConfig]):
    """Meta tokens, taps, block norms and the side network with its own head.

    764,840 parameters on ViT-B/16 and ``72C + C`` for the head. Backward still runs through the backbone (meta tokens
    and norms lie inside), so memory is not that of a detached side network. Buffers of its batch norms belong to the
    adapter and move with training.
    """

    config_class = HSTConfig
    examples = ("hst(dims=[8, 12], heads=[2, 3])",)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, changes_sequence=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place meta tokens, taps and the side network.

        Raises:
            UnsupportedError: no token sequence over a grid, no single head, or blocks that stages cannot share.
        """
        blocks, config = anatomy.need_blocks("hst"), self.config
        plain = not anatomy.no_prompts and anatomy.embed is not None
        if not plain or anatomy.grid is None or anatomy.image is None:
            raise UnsupportedError(
                f"hst reads plain vision transformers, one grid of tokens throughout; {anatomy.family} is none."
            )
        if anatomy.head is None:
            raise UnsupportedError(f"hst replaces the classifier, and this {anatomy.family} model has none or several.")
        if len(blocks) % len(config.dims):
            raise UnsupportedError(
                f"hst shares blocks equally among {len(config.dims)} stages, and {anatomy.family} has {len(blocks)}. "
                "Give dims and heads of another length."
            )
        taps, grid = Taps(), Grid(anatomy.grid, anatomy.prefix_tokens)
        edit.before(anatomy.image, Image(taps), "hst_image")
        for i, block in enumerate(blocks):
            token = MetaToken(anatomy.dim)
            if i == 0 and anatomy.embed is not None:
                edit.after(anatomy.embed, token, "hst_meta")
            else:
                edit.before(block.point, token, "hst_meta")
            edit.after(block.point, Tap(taps, i, grid), "hst_tap")
            paths = {block.points[role].path for role in ("norm1", "norm2") if role in block.points}
            for path in sorted(paths):
                edit.own(f"{path}.{name}" for name, _ in edit.module(path).named_parameters())
        edit.after(anatomy.head, SideHead(taps, anatomy.dim, len(blocks), config, anatomy.head), "hst")
        edit.leave(anatomy.fresh)


def pyramid(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Feature maps of the active HST adapter at strides 4, 8, 16, 32, for dense prediction: ``[B, m_s, H_s, W_s]``.

    Raises:
        AdapterError: no active HST adapter.
    """
    adapters = adapters_of(model)
    side = [m for name in adapters.active for m in adapters[name].modules() if isinstance(m, SideNetwork)]
    if not side:
        raise AdapterError("No active adapter of this model is an HST. Attach one with adapt(model, 'hst').")
    found: list[Tensor] = []
    handle = side[0].register_forward_hook(lambda module, args, output: found.extend(output))
    try:
        model(images)
    finally:
        handle.remove()
    return found
