"""Textual inversion: a new word trains, the rest keeps its bits, and stock pipelines read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusion_parts as made
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_suite as ps
from peft_suite.diffusion.inversion import load_inversion, prepare_tokens, save_inversion, spelled
from peft_suite.diffusion.templates import OBJECT, STYLE, sentence, sentences
from peft_suite.errors import BackboneMismatchError, ConfigError, FileFormatError, UnsupportedError

WORD = "<toy>"


def prepared(vectors: int = 2, start: str = "a") -> tuple[Any, Any]:
    """A tiny pipeline whose text encoder has a new word under an adapter, and the configuration."""
    pipe = made.tiny_pipeline()
    config = prepare_tokens(pipe.tokenizer, pipe.text_encoder, WORD, start, vectors)
    ps.adapt(pipe.text_encoder, config)
    return pipe, config


def ids(pipe: Any, text: str) -> torch.Tensor:
    return pipe.tokenizer([spelled(text, WORD, 2)], return_tensors="pt").input_ids


def trained(pipe: Any, steps: int = 3) -> None:
    moving = [p for p in pipe.text_encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.5, weight_decay=0.1)
    for _ in range(steps):
        pipe.text_encoder(ids(pipe, "the <toy> b")).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_the_new_rows_train() -> None:
    """Weight decay on: every bit of the model stays, the two rows move, and texts without the word read the same."""
    pipe, config = prepared()
    assert config.ids == (514, 515) and pipe.tokenizer.convert_ids_to_tokens([514, 515]) == [WORD, f"{WORD}_1"]
    base = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    table = pipe.text_encoder.get_input_embeddings()
    start = pipe.tokenizer.encode("a", add_special_tokens=False)
    assert torch.equal(table.weight[514], table.weight[start[0]]) and torch.equal(table.weight[515], table.weight[514])
    assert sum(p.numel() for p in pipe.text_encoder.parameters() if p.requires_grad) == 2 * 32
    with torch.no_grad():
        other = pipe.text_encoder(ids(pipe, "a b")).last_hidden_state
        before = pipe.text_encoder(ids(pipe, "the <toy> b")).last_hidden_state
        with ps.disabled(pipe.text_encoder):
            assert torch.equal(pipe.text_encoder(ids(pipe, "the <toy> b")).last_hidden_state, before)
    trained(pipe)
    after = pipe.text_encoder.state_dict()
    moved = [k for k, v in after.items() if not torch.equal(v, base[k])]
    assert moved == ["adapters.default.embeddings.token_embedding.rows.vectors"]
    with torch.no_grad():
        assert torch.equal(pipe.text_encoder(ids(pipe, "a b")).last_hidden_state, other)
        assert not torch.equal(pipe.text_encoder(ids(pipe, "the <toy> b")).last_hidden_state, before)


def test_no_second_table_is_made() -> None:
    """Nothing of the table's size is kept for backward, and the frozen table gets no gradient."""
    pipe, _ = prepared()
    table = pipe.text_encoder.get_input_embeddings()
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() != table.weight.data_ptr():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        table(ids(pipe, "the <toy> b")).sum().backward()
    rows = pipe.text_encoder.adapters["default"]
    (vectors,) = rows.parameters()
    assert max(sizes, default=0) < table.weight.numel() // 8
    assert torch.equal(vectors.grad, torch.ones(2, 32)) and table.weight.grad is None


def test_gradient_equals_that_of_the_whole_table() -> None:
    """The rows' gradient is what these rows of a fully trained table would get."""
    pipe, config = prepared()
    other = made.tiny_pipeline()
    prepare_tokens(other.tokenizer, other.text_encoder, WORD, "a", 2)
    whole = other.text_encoder
    whole.requires_grad_(False)
    whole.get_input_embeddings().weight.requires_grad_(True)
    for model in (pipe.text_encoder, whole):
        model(ids(pipe, "the <toy> b <toy>")).last_hidden_state.square().sum().backward()
    (vectors,) = pipe.text_encoder.adapters["default"].parameters()
    expected = whole.get_input_embeddings().weight.grad[list(config.ids)]
    assert expected.abs().max() > 0
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-5, atol=1e-7)


def test_stock_pipeline_reads_the_file_and_so_do_we(tmp_path: Path) -> None:
    """Images from ``load_textual_inversion`` equal ours, to the bit; our reader and our adapter directory as well."""
    pipe, _ = prepared()
    trained(pipe)
    image = made.draw(pipe, "a <toy> on a b")
    save_inversion(pipe.text_encoder, tmp_path)
    (held,) = load_file(tmp_path / "learned_embeds.safetensors").items()
    assert held[0] == WORD and held[1].shape == (2, 32)

    stock = made.tiny_pipeline()
    before = made.draw(stock, "a <toy> on a b")
    stock.load_textual_inversion(str(tmp_path))
    assert abs(made.draw(stock, "a <toy> on a b") - image).max() == 0
    assert abs(before - image).max() > 1e-4

    ps.save(pipe.text_encoder, tmp_path / "adapter")
    for source in (tmp_path, tmp_path / "learned_embeds.safetensors", tmp_path / "adapter"):
        again = made.tiny_pipeline()
        config = load_inversion(again.tokenizer, again.text_encoder, source)
        assert (config.placeholder, config.num_vectors) == (WORD, 2)
        assert config.initializer == ("a" if source.name == "adapter" else "")
        assert abs(made.draw(again, "a <toy> on a b") - image).max() == 0
        assert not any(p.requires_grad for p in again.text_encoder.adapters.parameters())
    renamed = made.tiny_pipeline()
    load_inversion(renamed.tokenizer, renamed.text_encoder, tmp_path, placeholder="<it>", train=True)
    assert abs(made.draw(renamed, "a <it> on a b") - image).max() == 0
    assert sum(p.numel() for p in renamed.text_encoder.parameters() if p.requires_grad) == 64

    ready = made.tiny_pipeline()
    prepare_tokens(ready.tokenizer, ready.text_encoder, WORD, "a", 2)
    ps.load(ready.text_encoder, tmp_path / "adapter")
    assert abs(made.draw(ready, "a <toy> on a b") - image).max() == 0


def test_merges_into_a_plain_pipeline_folder(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe, _ = prepared()
    trained(pipe)
    image = made.draw(pipe, "a <toy>")
    ps.merge(pipe.text_encoder)
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert abs(made.draw(plain, "a <toy>") - image).max() == 0


def test_what_cannot_be_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    pipe = made.tiny_pipeline()
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    empty = CLIPTokenizer(vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"))
    assert len(empty) == 2  # what transformers 5 makes of these arguments
    with pytest.raises(ConfigError, match="The tokenizer is empty: all of its 2 tokens"):
        prepare_tokens(empty, pipe.text_encoder, WORD, "a")
    for word, start, text in (
        (WORD, "ab", r"'ab' must be one token that the tokenizer knows, and is 2"),
        (WORD, "", "must be one token"),
        ("a</w>", "a", "has the word 'a</w>' already"),
        (" ", "a", "give the word"),
    ):
        with pytest.raises(ConfigError, match=text):
            prepare_tokens(pipe.tokenizer, pipe.text_encoder, word, start)
    assert len(pipe.tokenizer) == pipe.text_encoder.get_input_embeddings().num_embeddings == 514
    with pytest.raises(UnsupportedError, match="Add them first: config = prepare_tokens"):
        ps.adapt(pipe.text_encoder, "textual-inversion")
    with pytest.raises(UnsupportedError, match=r"token 900 .* not in the table of 514 rows"):
        ps.adapt(pipe.text_encoder, "textual-inversion(ids=[900])")
    with pytest.raises(UnsupportedError, match="reads no tokens"):
        ps.adapt(pipe.unet, "textual-inversion(ids=[3])")
    with pytest.raises(ConfigError, match="must be 2 ids"):
        ps.adapt(pipe.text_encoder, "textual-inversion(ids=[3], num_vectors=2)")
    save_file({WORD: torch.zeros(1, 7)}, tmp_path / "wide.safetensors")
    save_file({"emb_params": torch.zeros(1, 32)}, tmp_path / "nameless.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name, error, text in (
        ("wide", BackboneMismatchError, "width 7"),
        ("nameless", ConfigError, "does not say which word"),
        ("two", FileFormatError, "holds 2 tensors"),
        ("none", FileFormatError, r"no \.safetensors file"),
    ):
        with pytest.raises(error, match=text):
            load_inversion(pipe.tokenizer, pipe.text_encoder, tmp_path / f"{name}.safetensors")
    ps.adapt(pipe.text_encoder, "diffusers-lora-text")
    with pytest.raises(UnsupportedError, match="carries adapters"):
        prepare_tokens(pipe.tokenizer, pipe.text_encoder, WORD, "a")
    with pytest.raises(UnsupportedError, match="learned no word"):
        save_inversion(pipe.text_encoder, tmp_path)
    small = made.tiny_text_encoder()
    small.resize_token_embeddings(100, mean_resizing=False)
    with pytest.raises(BackboneMismatchError, match="514 tokens and the text encoder 100"):
        prepare_tokens(pipe.tokenizer, small, WORD, "a")


def test_warns_where_the_end_of_a_text_is_its_largest_id() -> None:
    pipe = made.tiny_pipeline()
    pipe.text_encoder.config.eos_token_id = 2
    with pytest.warns(UserWarning, match="pooled output would be wrong"):
        prepare_tokens(pipe.tokenizer, pipe.text_encoder, WORD, "a")


def test_templates_name_the_word_once() -> None:
    for kind, listed in (("object", OBJECT), ("style", STYLE)):
        assert tuple(sentences(kind)) == listed and len(set(listed)) == len(listed)  # type: ignore[arg-type]
        assert all(line.count("{}") == 1 for line in listed)
    assert sentence("object", len(OBJECT) + 1, "<toy> <toy>_1") == OBJECT[1].format("<toy> <toy>_1")
    with pytest.raises(ConfigError, match="choose object or style"):
        sentences("thing")  # type: ignore[arg-type]
