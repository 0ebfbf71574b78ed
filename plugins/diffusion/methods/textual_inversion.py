"""Textual inversion (Gal et al., ICLR 2023): a new word for a concept, everything else frozen.

    embedding(i) = v_k  where i is the k-th placeholder token,  E[i]  elsewhere          v: [num_vectors, d]

The rows of the placeholder tokens train; they begin as the embedding of the initializer word. The official code and
diffusers' script train the whole table and write the other rows back after every step; here the table is never copied
and has no gradient, so the other rows keep their bits.

The tokens must exist before the adapter does: ``peft_suite.diffusion.inversion.prepare_tokens`` adds them to tokenizer
and table and returns the configuration with their ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Anatomy, Weight
from peft_suite.config import MethodConfig
from peft_suite.edits import Part
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method

__all__ = ["TextualInversion", "TextualInversionConfig", "TokenRows"]


@dataclass(frozen=True)
class TextualInversionConfig(MethodConfig):
    """The word and its tokens.

    Attributes:
        placeholder: the word that prompts will use.
        initializer: the existing word whose embedding all vectors begin with; it must be one token.
        num_vectors: tokens that the placeholder stands for.
        ids: their ids, which ``prepare_tokens`` finds out; not for users to set.
    """

    method: ClassVar[str] = "textual-inversion"
    placeholder: str = "<concept>"
    initializer: str = ""
    num_vectors: int = 1
    ids: tuple[int, ...] = ()

    def validate(self) -> None:
        self.require("placeholder", bool(self.placeholder.strip()), "give the word that prompts will use")
        self.require("num_vectors", self.num_vectors >= 1, "must be at least 1")
        self.require("ids", not self.ids or len(self.ids) == self.num_vectors, f"must be {self.num_vectors} ids")
        self.require("ids", len(set(self.ids)) == len(self.ids) and min(self.ids, default=0) >= 0, "must all differ")


class TokenRows(Part):
    """Rows of an embedding table, ``vectors: [n, d]`` for the token ids ``ids: [n]``."""

    foldable = True
    decay = False

    def __init__(self, table: nn.Embedding, ids: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        where = device or table.weight.device
        self.ids = ids
        dtype = torch.promote_types(table.weight.dtype, torch.float32)
        rows = table.weight.detach()[list(ids)].to(where, dtype, copy=True)
        self.vectors = nn.Parameter(rows)
        self.padding = table.padding_idx
        self.replaces = rows.numel()

    def direct(self, weight: Tensor | None, bias: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Always: tokens are looked up in the frozen table and replaced, no second table is made."""
        return weight is not None

    def forward(self, weight: Tensor, bias: Tensor | None, x: Tensor | None = None) -> Any:
        """(table with the rows in it, bias); with token ids ``x: [...]`` their embeddings ``[..., d]``."""
        if x is None:
            where = torch.tensor(self.ids, device=weight.device)
            return weight.index_copy(0, where, self.vectors.to(weight.dtype)), bias
        y = F.embedding(x, weight, self.padding)
        mine = x.unsqueeze(-1) == torch.tensor(self.ids, device=x.device)  # [..., n]
        rows = F.embedding(mine.to(torch.uint8).argmax(-1), self.vectors.to(y.dtype))
        return torch.where(mine.any(-1, keepdim=True), rows, y)

    def fold(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table with the rows in it."""
        return cast("tuple[Tensor, Tensor | None]", self(weight, bias))

    def extra_repr(self) -> str:
        return f"ids={list(self.ids)}"


class TextualInversion(Method[TextualInversionConfig]):
    """``num_vectors * d`` parameters: 768 for one vector on Stable Diffusion 1.5's text encoder."""

    config_class = TextualInversionConfig
    examples = ("textual-inversion(ids=[3])", "textual-inversion(ids=[3, 7], num_vectors=2)")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """One part at the embedding of tokens.

        Raises:
            UnsupportedError: no tokens were prepared, the table lacks them, or the model reads no tokens.
        """
        path = _table(edit.model, anatomy)
        if path is None:
            raise UnsupportedError(
                f"textual-inversion trains word embeddings, and this {anatomy.family} model reads no tokens. "
                "Adapt the pipeline's text encoder."
            )
        table = cast(nn.Embedding, edit.module(path))
        if not self.config.ids:
            raise UnsupportedError(
                "textual-inversion needs tokens of its own. Add them first: config = prepare_tokens(tokenizer, "
                "text_encoder, placeholder, initializer), then adapt(text_encoder, config)."
            )
        if max(self.config.ids) >= table.num_embeddings or table.max_norm is not None:
            raise UnsupportedError(
                f"textual-inversion's token {max(self.config.ids)} ({self.config.placeholder!r}) is not in the table "
                f"of {table.num_embeddings} rows at {path}, or the table rescales its rows. Add the tokens with "
                "prepare_tokens(tokenizer, text_encoder, ...), or load with load_inversion(...), which does."
            )
        edit.reweigh(Weight(path), TokenRows(table, self.config.ids, edit.device), "rows")


def _table(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Path of the module that embeds tokens; where one object has several paths, the first."""
    get = getattr(model, "get_input_embeddings", None)
    if not callable(get):
        return None
    try:
        found = get()
    except NotImplementedError:
        return None
    path = next((n for n, m in model.named_modules() if m is found and isinstance(m, nn.Embedding)), None)
    return None if path is None else anatomy.tied.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
