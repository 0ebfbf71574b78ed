"""A transformer of a few lines that takes keyword arguments and returns a dictionary, and its description."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import Anatomy, Block, Point, Weight


class Layer(nn.Module):
    """Attention without biases and an MLP; takes and returns the stream by name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, *, tokens: Tensor, scale: float) -> tuple[Tensor, float]:
        """``tokens: [B, N, dim]``."""
        x = self.norm1(tokens)
        h = tokens + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=scale))
        return h + self.mlp(self.norm2(h)), scale


class TinyFormer(nn.Module):
    """``values: [B, N, 4]`` -> ``{"scores": [B, classes]}``."""

    def __init__(self, dim: int = 12, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        x, scale = self.embed(values), 0.3
        for layer in self.layers:
            x, scale = layer(tokens=x, scale=scale)
        return {"scores": self.classify(self.norm(x).mean(1))}


def describe(model: TinyFormer) -> Anatomy:
    """Where everything is."""
    dim = model.embed.out_features
    return Anatomy(
        family="tiny-former",
        dim=dim,
        blocks=tuple(_block(f"layers.{i}", dim) for i in range(len(model.layers))),
        embed=Point("embed", dim),
        stem=(Point("embed", dim),),
        norm=Point("norm", dim),
        tail=(Point("norm", dim),),
        norms=tuple(
            n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and not n.startswith("adapters.")
        ),
        fresh=("classify.weight", "classify.bias"),
        patch_values=4,
    )


def _block(path: str, dim: int) -> Block:
    widths = {"norm1": dim, "q": dim, "k": dim, "v": dim, "o": dim, "norm2": dim, "mlp.0": 2 * dim, "mlp.2": dim}
    return Block(
        point=Point(path, dim, argument="tokens", output=0),
        points={
            "norm1": Point(f"{path}.norm1", dim),
            "attn_out": Point(f"{path}.o", dim),
            "norm2": Point(f"{path}.norm2", dim),
            "mlp": Point(f"{path}.mlp", dim),
        },
        weights={role: Weight(f"{path}.{role}") for role in "qkvo"}
        | {"fc1": Weight(f"{path}.mlp.0"), "fc2": Weight(f"{path}.mlp.2")},
        affine=tuple(Point(f"{path}.{site}", width) for site, width in widths.items()),
    )


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    """A random model and a batch of keyword arguments."""
    return TinyFormer(), {"values": torch.randn(3, 6, 4)}
