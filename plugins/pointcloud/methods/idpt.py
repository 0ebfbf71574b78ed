"""IDPT (Zha et al., ICCV 2023): one prompt token per cloud, generated from its patches before a late block.

    y      = patch tokens that enter block p, without positions                 [B, G, D]
    prompt = g(y)                                                               [B, 1, D]
    x      = [class ; prompt ; patches],  pos = [class_pos ; prompt_pos ; pos]
    feature of the classifier = [class ; prompt ; max over patches]

The generator g is a small DGCNN whose graph is made anew in feature space before every layer:

    EdgeConv(x)_i = max over neighbours j of  LeakyReLU(BN(W [x_j - x_i ; x_i]))
    prompt        = max over i of  LeakyReLU(BN(W5 [x1 ; x2 ; x3]_i))

No edge is ever kept. With ``W = [W1 ; W2]`` an edge is ``a_j + c_i``, where ``a = W1 x`` and ``c = (W2 - W1) x`` are
products of the nodes. Batch norm and LeakyReLU are monotone per channel, rising or falling with the sign of the norm's
weight, so the maximum is the edge with the largest (or smallest) ``a_j``. The mean and variance that the norm needs in
train mode are sums over edges; they follow from a, c and the neighbours' adjacency matrix.

Below a part-segmentation head there is a prompt at each of the three blocks that the head reads; see
:mod:`peft_suite.pointcloud.methods.idpt_parts`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method
from peft_suite.pointcloud.methods.features import (
    Pooling,
    give_feature,
    insert,
    need_cloud_classifier,
    place_of_prompts,
)
from peft_suite.pointcloud.methods.idpt_parts import place_prompts
from peft_suite.pointcloud.models.layers import Block

SLOPE = 0.2
_EDGE_LAYERS = {"dgcnn": 3, "dgcnn_light2": 2, "dgcnn_light": 1, "mlp": 0}


@dataclass(frozen=True)
class IDPTConfig(MethodConfig):
    """IDPT.

    Attributes:
        generator: "dgcnn", three edge layers; "dgcnn_light2", two; "dgcnn_light", one; "mlp", none; "transformer", one
            block on patches and positions, then the maximum. "auto" is the published one: "dgcnn" for a classifier,
            "mlp" for parts.
        prompt_layer: block p before which the prompt enters, from 0; negative ones count from the end. The paper's is
            the last of 12. For parts it is fixed by the head.
        cls_type: what the classifier reads: "all"; "promptcls", class and prompt; "pointcls", class and patches;
            "promptonly". For parts it is fixed.
        neighbors: k of the graphs, a node itself among them; all nodes where there are fewer.
        train_position: train the prompt's position. None is as in the official code, and so in every published number:
            for a classifier it stays the random vector that it starts as, for parts it trains.
    """

    method: ClassVar[str] = "idpt"
    generator: Literal["auto", "dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer"] = "auto"
    prompt_layer: int = -1
    cls_type: Literal["all", "promptcls", "pointcls", "promptonly"] = "all"
    neighbors: int = 20
    train_position: bool | None = None

    def validate(self) -> None:
        self.require("neighbors", self.neighbors >= 1, "must be at least 1")


def nearest(x: Tensor, k: int) -> Tensor:
    """The k nearest nodes of every node, itself among them: ``[B, G, D] -> [B, G, k]`` int64."""
    with torch.no_grad():
        near = 2 * x @ x.transpose(1, 2) - x.square().sum(2).unsqueeze(1)  # -|a - b|^2 + |a|^2, constant in a row
        return near.topk(min(k, x.shape[1]), dim=2).indices


def edge_moments(a: Tensor, c: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of ``a[idx[i, j]] + c[i]`` over all edges: ``a, c: [B, G, D]``, two ``[D]``.

    The variance is that inside the neighbourhoods plus that between their means.
    """
    k = idx.shape[2]
    adjacency = a.new_zeros(*idx.shape[:2], a.shape[1]).scatter_(2, idx, 1.0 / k)  # [B, G, G], rows add up to 1
    shift = a.detach().mean((0, 1))
    a = a - shift  # small numbers to square
    near = adjacency @ a  # a neighbourhood's mean
    share = adjacency.sum(1).unsqueeze(2)  # in how many neighbourhoods a node lies, over k
    center = near + c
    mean = center.mean((0, 1))
    inside = (share * a.square()).mean((0, 1)) - near.square().mean((0, 1))
    return mean + shift, inside.clamp_min(0) + (center - mean).square().mean((0, 1))


class EdgeConv(nn.Module):
    """``max_j LeakyReLU(BN(W [x_j - x_i ; x_i]))``, without the edges: ``[B, G, D] -> [B, G, D]``."""

    def __init__(self, dim: int, neighbors: int) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.conv = nn.Linear(2 * dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, G, D]``."""
        idx = nearest(x, self.neighbors)
        of_difference, of_center = self.conv.weight.chunk(2, dim=1)
        a, c = F.linear(x, torch.cat((of_difference, of_center - of_difference))).chunk(2, dim=2)
        mean, var = self.statistics(a, c, idx)
        with torch.no_grad():  # which neighbour wins, per channel
            rising = torch.where(self.norm.weight < 0, -a, a)
            winner = idx.gather(2, kernels.group_points(rising, idx).max(2).indices)  # [B, G, D]
        edge = a.gather(1, winner) + c - mean
        return F.leaky_relu(edge * ((var + self.norm.eps).rsqrt() * self.norm.weight) + self.norm.bias, SLOPE)

    def statistics(self, a: Tensor, c: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """The norm's mean and variance: its own in eval mode, in train mode the edges', which move its own."""
        norm: Any = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        mean, var = edge_moments(a, c, idx)
        with torch.no_grad():
            edges = idx.numel()
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (edges / max(edges - 1, 1)), norm.momentum)
        return mean, var


class GraphGenerator(nn.Module):
    """Edge layers, then a layer over all their outputs and the maximum over nodes: ``[B, G, D] -> [B, 1, D]``."""

    def __init__(self, dim: int, layers: int, neighbors: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(EdgeConv(dim, neighbors) for _ in range(layers))
        self.mix = nn.Linear(max(layers, 1) * dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """``x: [B, G, D]``; the positions are not used."""
        levels = []
        for edge in self.edges:
            x = edge(x)
            levels.append(x)
        h = self.mix(torch.cat(levels, dim=2) if levels else x)
        h = F.leaky_relu(self.norm(h.flatten(0, 1)), SLOPE).view_as(h)
        return h.max(1, keepdim=True).values


class BlockGenerator(nn.Module):
    """One transformer block on patches and positions, then the maximum: ``[B, G, D] -> [B, 1, D]``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.block = Block(dim, num_heads)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """``x, pos: [B, G, D]``."""
        h: Tensor = self.block(x, pos, None)
        return h.max(1, keepdim=True).values


class InstancePrompt(Part):
    """Generates the prompt and puts it, with its position, into the sequence of ``prefix`` tokens and patches."""

    def __init__(self, generator: nn.Module, dim: int, prefix: int, at: int, train_position: bool) -> None:
        super().__init__()
        self.prefix, self.at = prefix, at
        self.generator = generator
        position = nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02)
        if train_position:
            self.position: Tensor = nn.Parameter(position)
        else:
            self.register_buffer("position", position)

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``x, pos: [B, P + G, D] -> [B, P + 1 + G, D]``."""
        half = torch.is_autocast_enabled(x.device.type)
        exact: Any = torch.autocast(x.device.type, enabled=False) if half else nullcontext()
        with exact:  # distances and variances in full precision
            patches, places = (t[:, self.prefix :].to(self.position.dtype) for t in (x, pos))
            prompt = self.generator(patches, places)
        return insert(x, prompt, self.at), self.place(pos)

    def place(self, pos: Tensor) -> Tensor:
        """``pos`` with the prompt's position in it."""
        return insert(pos, self.position.expand(pos.shape[0], -1, -1), self.at)


class PromptPosition(Part):
    """Blocks behind: the prompt's position again, ``[B, P + G, D] -> [B, P + 1 + G, D]``."""

    def __init__(self, owner: InstancePrompt) -> None:
        super().__init__()
        self.owner = (owner,)  # a tuple: outside the module tree

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, P + 1 + G, D], pos: [B, P + G, D]``."""
        return x, self.owner[0].place(pos)


class IDPT(Method[IDPTConfig]):
    """A generator before one block; from there on the sequence is one token longer, up to the classifier.

    On Point-MAE with 15 classes 1,696,783 parameters are trained ("dgcnn"), of which the generator has 1,330,176. The
    official counts of "dgcnn_light" and "mlp" are 2D = 768 higher: a batch norm that is never called. On PointGPT the
    prompt stands in front of all tokens, where causal attention lets them see it. With Point-MAE's part-segmentation
    head 5,683,762 are trained, the official count less three such norms.
    """

    config_class = IDPTConfig
    examples = (
        "idpt(neighbors=3)",
        "idpt(generator=dgcnn_light, neighbors=3, prompt_layer=0, cls_type=pointcls, train_position=True)",
        "idpt(generator=mlp, cls_type=promptonly)",
        "idpt(generator=transformer, cls_type=promptcls)",
        "idpt(generator=transformer, neighbors=3, train_position=False)",
    )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(identity_at_init=False, changes_sequence=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Place the generator and widen the classifier; or the generators of a part-segmentation head.

        Raises:
            UnsupportedError: no point transformer with a classifier and a class token, or with a head that reads
                features of the whole cloud; fewer blocks than asked for; a classifier's options for such a head.
        """
        config = self.config
        if edit.having("summary"):
            self._build_parts(anatomy, edit)
            return
        need_cloud_classifier(anatomy, edit, "idpt")
        blocks = anatomy.need_blocks("idpt")
        layer = config.prompt_layer + (len(blocks) if config.prompt_layer < 0 else 0)
        if not 0 <= layer < len(blocks):
            raise UnsupportedError(
                f"idpt: block {config.prompt_layer} was asked for, and {anatomy.family} has {len(blocks)} blocks: "
                f"choose {-len(blocks)} to {len(blocks) - 1}."
            )
        part = InstancePrompt(
            self._generator(anatomy, edit, layer),
            anatomy.dim,
            anatomy.prefix_tokens,
            place_of_prompts(anatomy),
            bool(config.train_position),
        )
        edit.inside(blocks[layer].point, "tokens", part, "idpt")
        for block in blocks[layer + 1 :]:
            edit.inside(block.point, "tokens", PromptPosition(part), "idpt")
        prompts: Pooling = None if config.cls_type == "pointcls" else "max"  # of the one prompt: itself
        patches: Pooling = "max" if config.cls_type in ("all", "pointcls") else None
        whole = config.cls_type != "promptonly"
        give_feature(anatomy, edit, "idpt", 1, class_token=whole, prompts=prompts, patches=patches)

    def _build_parts(self, anatomy: Anatomy, edit: Editor) -> None:
        config, usual = self.config, IDPTConfig()
        for name in ("prompt_layer", "cls_type"):
            if (value := getattr(config, name)) != getattr(usual, name):
                raise UnsupportedError(
                    f"idpt: {name} = {value!r} is for classifiers; a part-segmentation head says itself where prompts "
                    f"enter and what it reads. Leave {name} out."
                )
        (path,) = edit.having("summary")
        taps = sorted(set(edit.module(path).taps))  # type: ignore[arg-type]
        generators = [self._generator(anatomy, edit, tap, "mlp") for tap in taps]
        place_prompts(anatomy, edit, "idpt", generators, taps, config.train_position is not False)

    def _generator(self, anatomy: Anatomy, edit: Editor, layer: int, usual: str = "dgcnn") -> nn.Module:
        config = self.config
        kind = usual if config.generator == "auto" else config.generator
        if kind == "transformer":
            attention: Any = edit.module(anatomy.need_point(anatomy.blocks[layer], "attn", "idpt").path)
            return BlockGenerator(anatomy.dim, attention.num_heads)
        return GraphGenerator(anatomy.dim, _EDGE_LAYERS[kind], config.neighbors)
