"""Textual inversion around the method: tokens added, prompts spelled out, embeddings written and read.

config = prepare_tokens(pipe.tokenizer, pipe.text_encoder, "<cat-toy>", "toy")
ps.adapt(pipe.text_encoder, config)                                     # train it
save_inversion(pipe.text_encoder, "out")                                # pipe.load_textual_inversion("out")
load_inversion(pipe.tokenizer, pipe.text_encoder, "out")                # or an adapter directory of ours
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_suite.adapter import adapters_of
from peft_suite.anatomy import Anatomy
from peft_suite.diffusion.methods.textual_inversion import TextualInversionConfig, TokenRows
from peft_suite.errors import BackboneMismatchError, ConfigError, FileFormatError, UnsupportedError
from peft_suite.files import TENSORS, only_name, read_config
from peft_suite.lifecycle import adapt, trainable
from peft_suite.storage import write_bytes

__all__ = ["FILE", "load_inversion", "prepare_tokens", "save_inversion", "spelled", "tokens_of"]

FILE = "learned_embeds.safetensors"


def tokens_of(placeholder: str, count: int) -> list[str]:
    """The tokens of a placeholder with several vectors, named as diffusers names them: ``<a>``, ``<a>_1``, ..."""
    return [placeholder, *(f"{placeholder}_{i}" for i in range(1, count))]


def spelled(text: str, placeholder: str, count: int) -> str:
    """A prompt in which the placeholder stands for all of its tokens; pipelines do the same to theirs."""
    return text.replace(placeholder, " ".join(tokens_of(placeholder, count)))


def prepare_tokens(
    tokenizer: Any, text_encoder: nn.Module, placeholder: str, initializer: str, num_vectors: int = 1
) -> TextualInversionConfig:
    """Add a placeholder's tokens to the tokenizer and rows to the table of embeddings, before ``adapt``.

    The new rows are copies of the initializer's, so the same call gives the same model.

    Args:
        tokenizer: of the pipeline; changed in place.
        text_encoder: of the pipeline, without an adapter; changed in place.
        placeholder: a word that the tokenizer does not have, such as ``<cat-toy>``.
        initializer: an existing word of one token.
        num_vectors: tokens that the placeholder stands for.

    Returns:
        The method's configuration, with the ids.

    Raises:
        ConfigError: the tokenizer is empty, the initializer is not one token, or the placeholder exists.
        BackboneMismatchError: tokenizer and text encoder do not belong together.
        UnsupportedError: the text encoder carries adapters. Nothing is changed before any error.
    """
    config = TextualInversionConfig(placeholder=placeholder, initializer=initializer, num_vectors=num_vectors)
    table = _usable(tokenizer, text_encoder)
    found = tokenizer.encode(initializer, add_special_tokens=False)
    if len(found) != 1 or found[0] == tokenizer.unk_token_id:
        pieces = ", ".join(map(str, tokenizer.convert_ids_to_tokens(found)[:6]))
        raise ConfigError(
            f"The initializer {initializer!r} must be one token that the tokenizer knows, and is {len(found)} "
            f"({pieces}). Choose a common short word for the kind of thing, such as 'dog' or 'painting'."
        )
    ids = _add(tokenizer, text_encoder, tokens_of(placeholder, num_vectors), table.weight[found[0]].detach().clone())
    return config.replace(ids=ids)


def save_inversion(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write a word's embeddings as diffusers' ``learned_embeds.safetensors``: ``{placeholder: [num_vectors, d]}``.

    Args:
        model: the adapted text encoder.
        path: a folder, or a file that ends in ``.safetensors``.
        name: which adapter; may be omitted when exactly one is active.

    Raises:
        UnsupportedError: the adapter is no textual inversion.
        StorageError: the disk refuses; an older file is intact.
    """
    from safetensors.torch import save as to_bytes

    adapters = adapters_of(model)
    adapter = adapters[only_name(adapters, name)]
    rows = [part for _, part in adapter.parts() if isinstance(part, TokenRows)]
    if len(rows) != 1:
        raise UnsupportedError(f"{adapter.method.name} has learned no word: there are no embeddings to write.")
    target = Path(path)
    target = target if target.suffix == ".safetensors" else target / FILE
    vectors = rows[0].vectors.detach().cpu().contiguous()
    return write_bytes(target, to_bytes({adapter.method.config.placeholder: vectors}, metadata={"format": "pt"}))


def load_inversion(
    tokenizer: Any,
    text_encoder: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    placeholder: str = "",
    train: bool = False,
    anatomy: Anatomy | None = None,
) -> TextualInversionConfig:
    """Add a learned word to a plain pipeline: its tokens, its rows, and the adapter that holds them.

    Args:
        tokenizer, text_encoder: of the pipeline; changed in place.
        path: ``learned_embeds.safetensors`` or its folder, or an adapter directory of ours.
        name: of the adapter on this model.
        placeholder: the word, where it should be another than the file says, or the file does not say.
        train: let it train on.
        anatomy: description of the model, where no plugin has one.

    Returns:
        The method's configuration, with the ids.

    Raises:
        FileFormatError: no readable embeddings.
        BackboneMismatchError: another width, or a tokenizer that does not belong to the model.
        ConfigError: the word exists already. Nothing is changed before any error.
    """
    table = _usable(tokenizer, text_encoder)
    said, initializer, vectors = _read(Path(path))
    word = placeholder or said
    if not word:
        raise ConfigError(f"{path} does not say which word it holds. Give one: placeholder='<concept>'.")
    if vectors.shape[1] != table.embedding_dim:
        raise BackboneMismatchError(
            f"{path} holds embeddings of width {vectors.shape[1]}, and this {type(text_encoder).__name__} has "
            f"{table.embedding_dim}. Use the text encoder that the word was learned with."
        )
    ids = _add(tokenizer, text_encoder, tokens_of(word, len(vectors)), vectors)
    config = TextualInversionConfig(placeholder=word, initializer=initializer, num_vectors=len(vectors), ids=ids)
    adapt(text_encoder, config, name=name, anatomy=anatomy)
    if not train:
        trainable(text_encoder)
    return config


def _usable(tokenizer: Any, text_encoder: nn.Module) -> nn.Embedding:
    """The table of embeddings, after all checks that need no word."""
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise ConfigError(
            f"The tokenizer is empty: all of its {len(tokenizer)} tokens are special ones, so every word would be "
            "unknown. transformers 5 makes one without a word from vocab_file= and merges_file=; use "
            "CLIPTokenizer.from_pretrained(folder)."
        )
    if "adapters" in text_encoder._modules:
        raise UnsupportedError(
            "The text encoder carries adapters, and its table of embeddings cannot grow under them. Add tokens first, "
            "or remove(text_encoder)."
        )
    table = cast(Any, text_encoder).get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        raise BackboneMismatchError(
            f"The tokenizer has {len(tokenizer)} tokens and the text encoder {table.num_embeddings} embeddings. "
            "Use both from one pipeline."
        )
    if getattr(cast(Any, text_encoder).config, "eos_token_id", None) == 2:
        warnings.warn(
            "This text encoder finds the end of a text by its largest id (eos_token_id 2 in its configuration), and "
            "new tokens are larger: its pooled output would be wrong. Where that is used (SDXL, SD3), set eos_token_id "
            f"of the configuration and of the module that pools to {tokenizer.eos_token_id} first.",
            stacklevel=3,
        )
    return cast(nn.Embedding, table)


def _add(tokenizer: Any, text_encoder: nn.Module, tokens: list[str], rows: Tensor) -> tuple[int, ...]:
    """New tokens with these embeddings, ``[n, d]`` or one for all ``[d]``; their ids."""
    if taken := [t for t in tokens if t in tokenizer.get_vocab()]:
        raise ConfigError(
            f"The tokenizer has the word {taken[0]!r} already. Choose another placeholder, such as '<my-{taken[0]}>'."
        )
    tokenizer.add_tokens(tokens)
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(tokens))
    model = cast(Any, text_encoder)
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        frozen = not model.get_input_embeddings().weight.requires_grad
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.requires_grad_(not frozen)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[list(ids)] = rows.to(weight)
    return ids


def _read(path: Path) -> tuple[str, str, Tensor]:
    """(word or "", initializer or "", ``[n, d]``) of a file."""
    from safetensors import SafetensorError, safe_open

    said, initializer = "", ""
    if (path / TENSORS).is_file():
        config = read_config(path)
        if config["method"] != TextualInversionConfig.method:
            raise FileFormatError(f"{path} holds a {config['method']} adapter. Load it with peft_suite.load().")
        said, initializer = (str(config["method_config"].get(k, "")) for k in ("placeholder", "initializer"))
        file = path / TENSORS
    else:
        file = path / FILE if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileFormatError(f"{file} is no .safetensors file. Give {FILE}, its folder, or an adapter directory.")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{file} is truncated or no safetensors file ({error}). Get it again.") from error
    if len(tensors) != 1 or (found := next(iter(tensors.items())))[1].ndim not in (1, 2):
        raise FileFormatError(
            f"{file} holds {len(tensors)} tensors ({list(tensors)[:4]}) and not one word's embeddings."
        )
    key, vectors = found
    word = said or ("" if key == "emb_params" else key)  # the name that other programs give to any word
    return word, initializer, vectors.view(-1, vectors.shape[-1])
