"""Any2Point (Tang et al., ECCV 2024): a frozen transformer of images, text or sound that reads point clouds.

    tokens  = 3D tokenizer(points)                          [B, G, D]      trained
    pos     = the source's positions under the tokens, mean over six virtual projections
    x       = [class ; tokens]                              [B, 1 + G, D]
    x       = block(x + pos)  for every block of the source
    feature = [x_class ; max over tokens] of norm(x)        [B, 2 D]

Tokenizer, class token and its position, final norm and head are trained by every method; the method of the same name
adds the adapters of the paper. Class token and norm start at the source's where it has them.

==================  ============================================  =======================================
backbone            source, and what its library calls it         published weights
==================  ============================================  =======================================
any2point-vision    DINOv2 ViT-B/14, or another plain ViT         timm: ``vit_base_patch14_dinov2``
any2point-language  CLIP's text encoder                           transformers: ``openai/clip-vit-large-patch14``
any2point-audio     audio spectrogram transformer (AST)           transformers: ``MIT/ast-finetuned-audioset-...``
==================  ============================================  =======================================

The paper's audio source is ImageBind, which no package installs; AST takes its place, so numbers of that row are not
the paper's.

``official=True`` projects as the published code does (see :mod:`peft_suite.pointcloud.models.any2point_positions`) and
adds positions as it does: for text once more before the first block, for sound before the first block only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_suite.errors import ConfigError
from peft_suite.pointcloud.models.any2point_blocks import SourceBlock
from peft_suite.pointcloud.models.any2point_positions import Projection
from peft_suite.pointcloud.models.any2point_sources import (
    AUDIO,
    LANGUAGE,
    VISION,
    Source,
    from_audio,
    from_language,
    from_vision,
)
from peft_suite.pointcloud.models.any2point_tokenizer import PointTokenizer, Pyramid
from peft_suite.pointcloud.models.geometry import Geometry
from peft_suite.pointcloud.models.layers import Pool, growing, new_token
from peft_suite.pointcloud.models.transformer import Blocks, classifier

__all__ = ["Any2Point", "audio", "language", "vision"]

Modality = Literal["vision", "language", "audio"]


class Any2Point(nn.Module):
    """Classifier of clouds: ``[B, N, 3 + C] -> [B, num_classes]``.

    Args:
        num_classes: outputs; 0 leaves the head away and gives the feature ``[B, 2 D]``.
        source: the parts of the source.
        modality: of the source.
        groups: G, tokens; the published networks read clouds of 8 G points.
        group_size: neighbours in every stage of the tokenizer.
        last_width: inner width of the tokenizer's last stage.
        channels: of a point: 3 coordinates, and what comes with them.
        drop_path: of the last block; it grows linearly from 0.
        head: "mlp", three layers with batch norm; "short", two without; "linear".
        distance: of the virtual cameras from the origin.
        official: see the module's text.
        rule: of farthest point sampling.

    Raises:
        ConfigError: sizes that no model can have.
    """

    def __init__(
        self,
        num_classes: int,
        source: Source,
        modality: Modality,
        *,
        groups: int = 128,
        group_size: int = 64,
        last_width: int = 32,
        channels: int = 3,
        drop_path: float = 0.0,
        head: Literal["mlp", "short", "linear"] = "mlp",
        distance: float = 1.8,
        official: bool = False,
        rule: Literal["standard", "pointnet2"] = "standard",
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ConfigError(f"drop_path = {drop_path}: must be at least 0 and below 1.")
        dim = source.table.shape[1]
        self.embed_dim, self.modality, self.official = dim, modality, official
        self.group_divider = Pyramid(groups, group_size, rule)
        self.project = Projection(source.table, source.grid, modality, source.pixels, distance, official)
        self.encoder = PointTokenizer(dim, channels, last_width)
        self.cls_token, self.cls_pos = new_token(dim), new_token(dim)
        if source.class_token is not None:
            self.cls_token = nn.Parameter(source.class_token.detach().clone())
        self.embed = nn.Identity()  # [B, 1 + G, D]: what enters block 0
        blocks: list[nn.Module] = list(source.blocks)
        for block, rate in zip(source.blocks, growing(drop_path, len(blocks)), strict=True):
            block.drop_path1.drop_prob = block.drop_path2.drop_prob = rate
        self.blocks = Blocks(blocks)
        self.norm = source.norm
        self.pool = Pool(prefix=1)
        self.cls_head_finetune = classifier(head, 2 * dim, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """``points: [B, N, 3 + C]``."""
        geometry = self.geometry(points)
        logits: Tensor = self.cls_head_finetune(self.pool(self.forward_tokens(points, geometry), geometry))
        return logits

    def forward_features(self, points: Tensor) -> Tensor:
        """Normed tokens ``[B, 1 + G, D]``."""
        return self.forward_tokens(points, self.geometry(points))

    def geometry(self, points: Tensor) -> Geometry:
        """Centres, neighbours of every stage, and where the views see the tokens."""
        geometry: Geometry = self.project(self.group_divider(points))
        return geometry

    def forward_tokens(self, points: Tensor, geometry: Geometry) -> Tensor:
        """Normed tokens ``[B, 1 + G, D]`` of a geometry."""
        batch, dtype = points.shape[0], self.cls_token.dtype
        tokens = self.encoder(points.to(dtype), geometry)
        pos = self.project.positions(geometry).to(tokens.dtype)
        x = self.embed(torch.cat((self.cls_token.expand(batch, -1, -1).to(tokens.dtype), tokens), dim=1))
        pos = torch.cat((self.cls_pos.expand(batch, -1, -1).to(pos.dtype), pos), dim=1)
        if self.official and self.modality != "vision":
            x = x + pos
            pos = torch.zeros_like(pos) if self.modality == "audio" else pos
        out: Tensor = self.norm(self.blocks(x, pos, geometry))
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        self.blocks.checkpointing = enable

    @property
    def source_blocks(self) -> list[SourceBlock]:
        """The source's blocks, in order."""
        return [b for b in self.blocks.blocks if isinstance(b, SourceBlock)]


def vision(
    num_classes: int = 40,
    *,
    source: str = VISION,
    source_options: Mapping[str, Any] | None = None,
    weights: str = "",
    pretrained: bool = False,
    **options: Any,
) -> Any2Point:
    """Any2Point on a ViT of timm, with the options of :class:`Any2Point`.

    Args:
        num_classes: outputs.
        source, source_options, weights, pretrained: see
            :func:`peft_suite.pointcloud.models.any2point_sources.from_vision`.
        options: of the class.
    """
    parts = from_vision(source, source_options or {}, weights, pretrained and not weights)
    return Any2Point(num_classes, parts, "vision", **options)


def language(
    num_classes: int = 40,
    *,
    source: str = LANGUAGE,
    source_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    **options: Any,
) -> Any2Point:
    """Any2Point on CLIP's text encoder; ``source`` may be the folder of a saved one. Otherwise as :func:`vision`."""
    return Any2Point(num_classes, from_language(source, source_options or {}, pretrained), "language", **options)


def audio(
    num_classes: int = 40,
    *,
    source: str = AUDIO,
    source_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    distance: float = 1.4,
    **options: Any,
) -> Any2Point:
    """Any2Point on an audio spectrogram transformer; ``source`` may be the folder of a saved one."""
    parts = from_audio(source, source_options or {}, pretrained)
    return Any2Point(num_classes, parts, "audio", distance=distance, **options)
