"""Parts of VPT that act on tokens: insert and take off, add, and carry beside a windowed map."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError


class Prompt(Part):
    """P learned tokens of width ``dim``, or of width ``project`` and mapped by a Linear that all prompts share.

    ``like`` owns that Linear, and with ``tied`` the tokens too. ``forward`` inserts them at place ``at`` of the
    sequence (None: the end), ``[B, N, d] -> [B, N + P, d]``.
    """

    decay = False

    def __init__(
        self,
        count: int,
        dim: int,
        bound: float,
        *,
        project: int | None = None,
        dropout: float = 0.0,
        init: str = "uniform",
        at: int | None = None,
        like: Prompt | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.count, self.at = count, at
        self.like = (self if like is None else like,)  # a tuple: the owner, outside the module tree
        self.proj: nn.Linear | None = None
        self.prompt: nn.Parameter | None = None
        if project is not None and like is None:
            self.proj = nn.Linear(project, dim)
            nn.init.kaiming_normal_(self.proj.weight, a=0, mode="fan_out")
        self.dropout = nn.Dropout(dropout) if dropout else None
        if like is not None and tied:
            return
        self.prompt = nn.Parameter(torch.zeros(count, project or dim))
        if init == "uniform":
            nn.init.uniform_(self.prompt, -bound, bound)
        elif init == "normal":
            nn.init.normal_(self.prompt, std=0.02)

    def tokens(self, batch: int) -> Tensor:
        """``[B, P, d]``, after projection and dropout."""
        owner = self.like[0]
        own = owner.prompt if self.prompt is None else self.prompt
        assert own is not None
        tokens: Tensor = own if owner.proj is None else owner.proj(own)
        tokens = tokens.expand(batch, -1, -1)
        return tokens if self.dropout is None else self.dropout(tokens)

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, d]``."""
        prompt = self.tokens(x.shape[0])
        if self.at is None:
            return torch.cat((x, prompt), dim=1)
        return torch.cat((x[:, : self.at], prompt, x[:, self.at :]), dim=1)

    def extra_repr(self) -> str:
        return f"tokens={self.count}, at={'end' if self.at is None else self.at}"


class Replace(Prompt):
    """Takes the P tokens of an earlier prompt off and puts its own in their place."""

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N + P, d]``."""
        return super().forward(strip(x, self.count, self.at))


class WithPosition(Prompt):
    """Prompts with learned positions, for blocks that are given the stream and its positions apart.

    ``forward`` puts both in, ``[B, N, d], [B, N, d] -> [B, N + P, d], [B, N + P, d]``. Positions start at N(0, 0.02).
    """

    def __init__(self, count: int, dim: int, bound: float, **options: Any) -> None:
        super().__init__(count, dim, bound, **options)
        self.position: nn.Parameter | None = None
        if self.prompt is not None:  # not tied
            self.position = nn.Parameter(torch.zeros(count, dim))
            if options.get("init") != "zero":
                nn.init.normal_(self.position, std=0.02)

    def place(self, pos: Tensor) -> Tensor:
        """``pos`` with the prompts' positions in it."""
        owner = self if self.position is not None else cast(WithPosition, self.like[0])
        assert owner.position is not None
        own = owner.position.expand(pos.shape[0], -1, -1)
        if self.at is None:
            return torch.cat((pos, own), dim=1)
        return torch.cat((pos[:, : self.at], own, pos[:, self.at :]), dim=1)

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x, pos: [B, N, d]``."""
        return super().forward(x), self.place(pos)


class ReplaceWithPosition(WithPosition):
    """The same in the place of the P prompts that came with the stream."""

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x: [B, N + P, d], pos: [B, N, d]``."""
        return super().forward(strip(x, self.count, self.at), pos)


class Position(Part):
    """Prompts that flow on from an earlier block: their positions again, ``[B, N, d] -> [B, N + P, d]``."""

    def __init__(self, owner: WithPosition) -> None:
        super().__init__()
        self.owner = (owner,)  # a tuple: outside the module tree

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, N + P, d], pos: [B, N, d]``."""
        return x, self.owner[0].place(pos)


class Add(Prompt):
    """Adds its tokens to the sequence: one to every token, or one to each."""

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, d]``."""
        if self.count not in (1, x.shape[1]):
            raise UnsupportedError(
                f"vpt(location='add') has {self.count} prompts, one for each token of the size that the backbone was "
                f"built for, and got {x.shape[1]} tokens. Resize the images, or use location='add-1'."
            )
        return x + self.tokens(x.shape[0])


class Strip(Part):
    """Takes the P tokens off again: ``[B, N + P, d] -> [B, N, d]``."""

    def __init__(self, count: int, at: int | None) -> None:
        super().__init__()
        self.count, self.at = count, at

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N + P, d]``."""
        return strip(x, self.count, self.at)


def strip(x: Tensor, count: int, at: int | None) -> Tensor:
    """``x`` without ``count`` tokens at place ``at`` (None: the end)."""
    if at is None:
        return x[:, :-count]
    return torch.cat((x[:, :at], x[:, at + count :]), dim=1) if at else x[:, count:]


class Carry(Part):
    """Separates prompts from a packed map, ``[B, 1, H*W + P, C] -> [B, H, W, C], [B, P, C]``."""

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.count, self.size = count, size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` packed."""
        if x.shape[2] != self.size[0] * self.size[1] + self.count:
            raise UnsupportedError(
                f"vpt on a windowed backbone expects a map of {self.size[0]}x{self.size[1]} tokens here, the size that "
                f"the backbone was built for, and got {x.shape[2] - self.count} tokens. Resize the images."
            )
        return x[:, 0, : -self.count].reshape(x.shape[0], *self.size, x.shape[3]), x[:, 0, -self.count :]


class Enter(Prompt):
    """Puts its prompts beside the map; with ``packed``, in place of those that came with it."""

    def __init__(
        self, count: int, dim: int, bound: float, size: tuple[int, int], packed: bool, **options: object
    ) -> None:
        super().__init__(count, dim, bound, **options)  # type: ignore[arg-type]
        self.carry = Carry(count, size) if packed else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x: [B, H, W, C]``, or packed."""
        return (x if self.carry is None else self.carry(x)[0]), self.tokens(x.shape[0])
