"""Low-bit adapters: Bi-AdaptFormer and Bi-LoRA (Jie et al., ICCV 2023, "Revisiting the Parameter Efficiency ...").

Full-precision shadow weights train; the computation uses values of 1, 2, 4 or 8 bits, and only these are stored:

    w = (W - mu) / (sigma + 1e-5)      W_q = Q(w) * sigma + mu      y = x W_q^T

mu, sigma: mean and unbiased deviation of the whole matrix, not detached. Q: the nearest of 2^bits fixed levels,
straight through in the gradient. Levels: each is the median of a standard normal inside its cell, cells end midway
between levels; one bit has +-0.6745. No biases.

    Bi-AdaptFormer   x <- x + mlp(norm(x)) + s * U_q drop(relu(D_q x))       x: un-normalised input of the MLP branch
    Bi-LoRA          q <- q + s * U_q drop(D_q x), v likewise                D: [h, in]   U: [out, h]

A file holds packed codes and two floats a matrix: 73,920 bytes for Bi-AdaptFormer with h = 32 on ViT-B/16. A loaded
adapter computes with exactly the stored values. The shadow weights are not in the file: training on restarts them
inside the cells that they were in (see :meth:`QuantisedLinear.thaw`), through the event ``before_step``.

For 32 bits take ``adapter(insertion=parallel, source=residual, bias=False)`` or ``lora``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy, Point, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.kernels import pack_bits, unpack_bits
from peft_suite.method import Capabilities, Editor, Method

EPSILON = 1e-5
Rows = tuple[int, int]
Book = tuple[tuple[float, ...], tuple[float, ...]]  # levels, borders


@dataclass(frozen=True)
class BinaryConfig(MethodConfig):
    """What both methods share.

    Attributes:
        bottleneck: h; the paper's 1-bit adapters have 32, or 1 for the smallest file.
        bits: of every adapter weight: 1, 2, 4 or 8.
        scale: s; the only value the paper searched for each task, over 0.01, 0.1, 1 and 10.
        dropout: between the projections.
        bi_head: a 1-bit classifier without bias as well.
    """

    bottleneck: int = 32
    bits: int = 1
    scale: float = 1.0
    dropout: float = 0.1
    bi_head: bool = False

    def validate(self) -> None:
        self.require("bottleneck", self.bottleneck >= 1, "must be at least 1")
        self.require("bits", self.bits in (1, 2, 4, 8), "must be 1, 2, 4 or 8; for 32 use adapter(...) or lora(...)")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")


@dataclass(frozen=True)
class BiAdaptFormerConfig(BinaryConfig):
    """Bi-AdaptFormer; see :class:`BinaryConfig`."""

    method: ClassVar[str] = "bi-adaptformer"


@dataclass(frozen=True)
class BiLoRAConfig(BinaryConfig):
    """Bi-LoRA; see :class:`BinaryConfig`.

    Attributes:
        targets: roles of the anatomy; the paper adapts q and v.
    """

    method: ClassVar[str] = "bi-lora"
    targets: tuple[str, ...] = ("q", "v")

    def validate(self) -> None:
        super().validate()
        self.require("targets", bool(self.targets), "name at least one matrix, for example q")


@functools.cache
def codebook(bits: int) -> Book:
    """(levels [2^bits], borders [2^bits - 1]): the fixed point that the paper's code finds by 500 iterations."""
    count = 1 << bits
    with torch.device("cpu"):
        levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
        for _ in range(500):
            borders = (levels[1:] + levels[:-1]) / 2
            ends = torch.cat((torch.zeros(1), torch.special.ndtr(borders), torch.ones(1)))
            levels = torch.special.ndtri((ends[1:] + ends[:-1]) / 2)
        levels = (levels - levels.flip(0)) / 2
        return tuple(levels.tolist()), tuple(((levels[1:] + levels[:-1]) / 2).tolist())


def _statistics(weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, sigma): the fixed ones where there are, else those of the matrix."""
    fixed = stats[1] > 0
    return torch.where(fixed, stats[0], weight.mean()), torch.where(fixed, stats[1], weight.std())


def _codes(weight: Tensor, mean: Tensor, std: Tensor, book: Book) -> Tensor:
    """Cell of every entry, int64."""
    w = (weight - mean) / (std + EPSILON)
    if len(book[1]) == 1:
        return (w > 0).long()
    return torch.bucketize(w, torch.tensor(book[1], dtype=w.dtype, device=w.device))


def _levels(codes: Tensor, book: Book, like: Tensor) -> Tensor:
    return torch.tensor(book[0], dtype=like.dtype, device=like.device)[codes]


class _Quantise(torch.autograd.Function):
    """``W_q = Q(w) * sigma + mu``; saves W itself. The gradient is autograd's through w, mu and sigma, Q constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, stats: Tensor, book: Book) -> Tensor:  # type: ignore[override]
        mean, std = _statistics(weight, stats)
        return _levels(_codes(weight, mean, std, book), book, weight) * std + mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, stats, ctx.book = inputs
        ctx.save_for_backward(weight, stats)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, stats = ctx.saved_tensors
        mean, std = _statistics(weight, stats)
        q = _levels(_codes(weight, mean, std, ctx.book), ctx.book, weight)
        live = (stats[1] <= 0).to(weight.dtype)
        ratio = std / (std + EPSILON)
        centred = weight - mean
        to_std = (grad * q).sum() - ratio * (grad * centred).sum() / (std + EPSILON)
        to_mean = (1 - ratio) * grad.sum()
        moments = to_std * centred / ((weight.numel() - 1) * std) + to_mean / weight.numel()
        return grad * ratio + live * moments, None, None


class QuantisedLinear(nn.Module):
    """``x W_q^T``. ``weight: [out, in]`` is the shadow; ``stats: [2]`` is zero, or the mu and sigma of a file."""

    stats: Tensor

    def __init__(self, fan_in: int, out: int, bits: int) -> None:
        super().__init__()
        self.bits, self.book, self.fixed = bits, codebook(bits), False
        self.weight = nn.Parameter(torch.empty(out, fan_in))
        self.register_buffer("stats", torch.zeros(2))

    def quantised(self) -> Tensor:
        """W_q: ``[out, in]``."""
        return cast(Tensor, _Quantise.apply(self.weight, self.stats, self.book))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., in]``."""
        return F.linear(x, self.quantised())

    def packed(self, weight: Tensor, stats: Tensor) -> dict[str, Tensor]:
        """Codes, row by row, the first in the lowest bits of a byte; mu; sigma."""
        mean, std = _statistics(weight, stats)
        codes = _codes(weight, mean, std, self.book).to(torch.uint8)
        return {"codes": pack_bits(codes.flatten(), self.bits), "mean": mean, "std": std}

    def unpacked(self, codes: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        """Shadow weights in the middle of their cells, and the statistics that make them exact."""
        self.fixed = True
        levels = _levels(unpack_bits(codes, self.weight.numel(), self.bits).long(), self.book, mean)
        return {"weight": (levels * std + mean).view(self.weight.shape), "stats": torch.stack((mean, std))}

    @torch.no_grad()
    def thaw(self) -> None:
        """Let mu and sigma follow the weights again, which keep their codes.

        Values in the middle of the cells vary less than what they stand for: the outermost ones move outward until mean
        and deviation are those of the file. Where that is not possible (an outermost cell is empty) all are stretched.
        """
        self.fixed = False
        if not self.stats[1] > 0:
            return
        mean, std = _statistics(self.weight, self.stats)
        codes = _codes(self.weight, mean, std, self.book)
        values = torch.tensor(self.book[0], dtype=torch.float64)
        counts = torch.bincount(codes.flatten().cpu(), minlength=1 << self.bits).double()
        a, b = float(counts[0]), float(counts[-1])
        first = float((counts * values)[1:-1].sum())
        second = float(counts.sum()) - 1 - float((counts * values.square())[1:-1].sum())
        square = b * b / a + b if a else 0.0
        root = (first * b / a) ** 2 - square * (first**2 / a - second) if a and b else -1.0
        if root > 0:
            high = (math.sqrt(root) - first * b / a) / square
            values[0], values[-1] = -(first + b * high) / a, high
        w = values.to(self.weight)[codes]
        if root <= 0:
            w = (w - w.mean()) / w.std().clamp_min(EPSILON)
        self.weight.copy_(w * std + mean)
        self.stats.zero_()


class QuantisedPart(Part):
    """A part whose matrices are stored as codes."""

    def linears(self) -> Iterator[tuple[str, QuantisedLinear]]:
        """(name, matrix) pairs."""
        for name, module in self.named_modules():
            if isinstance(module, QuantisedLinear):
                yield name, module

    def stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``codes``, ``mean`` and ``std`` of every matrix."""
        return {
            f"{name}.{key}": tensor
            for name, linear in self.linears()
            for key, tensor in linear.packed(state[f"{name}.weight"], state[f"{name}.stats"]).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights that compute what the codes say; tensors of another size are left for the loader to report."""
        state = dict(tensors)
        for name, linear in self.linears():
            found = [tensors.get(f"{name}.{key}") for key in ("codes", "mean", "std")]
            codes, mean, std = found
            if (
                codes is None
                or mean is None
                or std is None
                or codes.numel() != -(-linear.weight.numel() * linear.bits // 8)
            ):
                continue
            for key in ("codes", "mean", "std"):
                del state[f"{name}.{key}"]
            state |= {f"{name}.{key}": tensor for key, tensor in linear.unpacked(codes, mean, std).items()}
        return state


def _pair(fan_in: int, out: int, config: BinaryConfig) -> tuple[QuantisedLinear, QuantisedLinear]:
    """(down, up). A zero matrix has no deviation, so up starts at 0.001: a fresh adapter is no exact identity."""
    down = QuantisedLinear(fan_in, config.bottleneck, config.bits)
    up = QuantisedLinear(config.bottleneck, out, config.bits)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.trunc_normal_(up.weight, std=0.001, a=-0.002, b=0.002)
    return down, up


class QuantisedBottleneck(QuantisedPart):
    """``s * U_q drop(relu(D_q x))``: ``[..., d] -> [..., d]``."""

    def __init__(self, dim: int, config: BinaryConfig) -> None:
        super().__init__()
        self.down, self.up = _pair(dim, dim, config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., d]``."""
        h = F.relu(self.down(x))
        h = h if self.dropout is None else self.dropout(h)
        return cast(Tensor, self.up(h)) * self.scale


class QuantisedLoRA(QuantisedPart):
    """``y + s * U_q drop(D_q x)`` in the given rows of a Linear layer's output, each with its own U and D."""

    foldable = True

    def __init__(self, fan_in: int, out: int, slices: Sequence[Rows | None], config: BinaryConfig) -> None:
        super().__init__()
        self.out, self.scale = out, config.scale
        self.slices: tuple[Rows, ...] = tuple(sorted((0, out) if s is None else s for s in slices))
        pairs = [_pair(fan_in, stop - start, config) for start, stop in self.slices]
        self.down, self.up = nn.ModuleList(p[0] for p in pairs), nn.ModuleList(p[1] for p in pairs)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y: [..., out]``, ``x: [..., in]``."""
        pieces, at = [], 0
        for (start, stop), down, up in zip(self.slices, self.down, self.up, strict=True):
            h = down(x)
            h = h if self.dropout is None else self.dropout(h)
            pieces += [y[..., at:start], torch.add(y[..., start:stop], cast(Tensor, up(h)), alpha=self.scale)]
            at = stop
        pieces = [p for p in (*pieces, y[..., at:]) if p.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s U_q D_q`` in the adapted rows."""
        weight = weight.clone()
        for (start, stop), down, up in zip(self.slices, self.down, self.up, strict=True):
            weight[start:stop].addmm_(
                cast(QuantisedLinear, up).quantised(), cast(QuantisedLinear, down).quantised(), alpha=self.scale
            )
        return weight, bias

    def extra_repr(self) -> str:
        return f"rows={list(self.slices)} of {self.out}"


class QuantisedHead(QuantisedPart):
    """A classifier of 1-bit weights, without bias; starts at the model's own weight."""

    foldable = True

    def __init__(self, module: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.matrix = QuantisedLinear(module.in_features, module.out_features, 1)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.matrix.weight, a=math.sqrt(5))
            if not module.weight.is_meta and not self.matrix.weight.is_meta and bool(module.weight.std() > 0):
                self.matrix.weight.copy_(module.weight)
        self.replaces = module.weight.numel() + (0 if module.bias is None else module.bias.numel())

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        """W_q and no bias."""
        return self.matrix.quantised(), None

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Replace the base values; a bias becomes zero."""
        return self.matrix.quantised(), None if bias is None else torch.zeros_like(bias)


B = TypeVar("B", bound=BinaryConfig)


class _Binary(Method[B], Generic[B]):
    """What both methods share: the head, and thawing."""

    def head(self, anatomy: Anatomy, edit: Editor) -> None:
        """Bi-Head, when asked for."""
        paths = {name.rpartition(".")[0]: None for name in anatomy.fresh} if self.config.bi_head else {}
        for path in paths:
            module = edit.module(path)
            if not isinstance(module, nn.Linear):
                continue
            edit.leave((f"{path}.weight", f"{path}.bias"))
            edit.reweigh(Weight(path), QuantisedHead(module, edit.device), "bi_head")

    def before_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Before its first step a loaded adapter gets shadow weights."""
        for _, part in adapter.parts():
            for _, linear in part.linears() if isinstance(part, QuantisedPart) else ():
                if linear.fixed and linear.weight.requires_grad:
                    linear.thaw()


class BiAdaptFormer(_Binary[BiAdaptFormerConfig]):
    """One bottleneck beside the MLP of every block: ``L * 2dh`` weights, 589,824 on ViT-B/16 with h = 32."""

    config_class = BiAdaptFormerConfig
    examples = (
        "bi-adaptformer(bottleneck=5)",
        "bi-adaptformer(bottleneck=4, bits=2, bi_head=True)",
    )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the bottlenecks.

        Raises:
            UnsupportedError: a block hides the residual stream of its MLP.
        """
        for block in anatomy.need_blocks("bi-adaptformer"):
            edit.branch(block, "mlp", QuantisedBottleneck(block.point.width, self.config), "bi_adapter")
        self.head(anatomy, edit)


class BiLoRA(_Binary[BiLoRAConfig]):
    """An update of q and v in every block: ``L * 2 * 2dh`` weights, 1,179,648 on ViT-B/16 with h = 32."""

    config_class = BiLoRAConfig
    examples = ("bi-lora(bottleneck=5)", "bi-lora(bottleneck=4, bits=4, targets=[fc1], bi_head=True)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, identity_at_init=False)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Group the targets by module and attach.

        Raises:
            UnsupportedError: a block has no such matrix, or it is no Linear layer.
        """
        groups: dict[str, list[Rows | None]] = {}
        for block in anatomy.need_blocks("bi-lora"):
            for role in self.config.targets:
                weight = anatomy.need_weight(block, role, "bi-lora")
                groups.setdefault(weight.path, []).append(weight.rows)
        for path, slices in groups.items():
            module = edit.module(path)
            if not isinstance(module, nn.Linear):
                raise UnsupportedError(f"bi-lora updates Linear layers; {path} is a {type(module).__name__}.")
            part = QuantisedLoRA(module.in_features, module.out_features, slices, self.config)
            edit.beside(Point(path, module.out_features), part, "bi_lora")
        self.head(anatomy, edit)
