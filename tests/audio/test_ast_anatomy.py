"""Anatomies of AST and wav2vec 2.0: classical methods act, places are where their formulas say, heads train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.adapter import Adapter
from peft_suite.anatomy import Point, anatomy_of
from peft_suite.edits import Part
from peft_suite.errors import BackboneError, ConfigError, UnsupportedError
from peft_suite.lifecycle import install
from peft_suite.method import Editor, make_method

transformers = pytest.importorskip("transformers")

from peft_suite.audio.anatomies import ast, wav2vec2  # noqa: E402
from peft_suite.audio.models.classifier import AudioClassifier, Pool  # noqa: E402

EXAMPLES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ours": ast.example,
    "original": ast.example_original,
    "huggingface": ast.example_huggingface,
    "encoder": ast.example_encoder,
    "wav2vec2": wav2vec2.example,
    "wav2vec2-stable": wav2vec2.example_huggingface,
}
CLASSICAL = (
    "full",
    "bitfit",
    "norm",
    "vpt(num_tokens=2)",
    "vpt(num_tokens=2, deep=True)",
    "lora(rank=2)",
    "lora(rank=2, targets=[q, k, v, o, fc1, fc2])",
    "houlsby(bottleneck=2)",
    "pfeiffer(bottleneck=2)",
    "parallel-adapter(bottleneck=2)",
    "adaptformer(bottleneck=2)",
    "ssf",
    "ia3",
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(model: nn.Module, batch: Any) -> Tensor:
    out: Any = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out.last_hidden_state


def attach(model: nn.Module, edits: Callable[[Editor], None]) -> None:
    """An adapter of hand-made edits."""
    editor = Editor(model, anatomy_of(model), torch.device("cpu"))
    edits(editor)
    install(model, Adapter("default", make_method("lora"), editor.finish()))


class Applies(Part):
    """A function as a part."""

    def __init__(self, function: Callable[..., Any], notes: bool = False) -> None:
        super().__init__()
        self.function, self.needs_context = function, notes

    def forward(self, *values: Any) -> Any:
        return self.function(*values)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("method", CLASSICAL)
def test_classical_methods_train_everything_they_add(name: str, method: str) -> None:
    model, batch = EXAMPLES[name]()
    base = run(model, batch).detach()
    ps.adapt(model, method)
    ps.verify(model, batch)
    if not method.startswith(("vpt", "ssf")):
        torch.testing.assert_close(run(model, batch), base, atol=1e-5, rtol=0)
    ps.remove(model)
    assert torch.equal(run(model, batch), base)


@pytest.mark.parametrize("name", EXAMPLES)
def test_described_forwards_equal_the_models(name: str) -> None:
    model, batch = EXAMPLES[name]()
    base = run(model, batch)

    def nothing(editor: Editor) -> None:
        for block in anatomy_of(model).blocks:
            for place, count in (("attn_in", 1), ("attn_out", 2), ("mlp_in", 1), ("mlp_out", 2), ("end", 1)):
                part = Applies(lambda *values: values)
                editor.inside(block.point, place, part, f"{place}{count}")
            editor.inside(block.points["attn"], "prefix", Applies(lambda k, v: (k, v)), "prefix")
        for path in editor.having("pool"):
            editor.inside(Point(path, 24), "pool", Applies(lambda f, t: (f, t)), "pool")

    attach(model, nothing)
    for adapters in ((), ("default",)):
        ps.activate(model, *adapters)
        torch.testing.assert_close(run(model, batch), base, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_paths_of_the_description_exist(name: str) -> None:
    model, batch = EXAMPLES[name]()
    anatomy = anatomy_of(model)
    modules = dict(model.named_modules())
    points = [p for p in (anatomy.embed, anatomy.norm, anatomy.head, *anatomy.stem, *anatomy.tail) if p is not None]
    for block in anatomy.blocks:
        points += [block.point, *block.points.values(), *block.affine]
        assert {"q", "k", "v", "o", "fc1", "fc2"} == set(block.weights)
        assert all(w.path in modules and w.rows is None for w in block.weights.values())
        assert {"norm1", "attn", "attn_out", "drop1", "norm2", "mlp", "drop2"} == set(block.points)
    assert all(point.path in modules for point in points)
    assert set(anatomy.fresh) <= {n for n, _ in model.named_parameters()}
    seen: dict[str, Tensor] = {}
    assert anatomy.embed is not None
    modules[anatomy.embed.path].register_forward_hook(lambda m, a, out: seen.__setitem__("tokens", out))
    run(model, batch)
    if anatomy.grid is not None:
        rows, columns = anatomy.grid
        assert seen["tokens"].shape == (3, anatomy.prefix_tokens + rows * columns, anatomy.dim)
    affine = {n for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    described = {p.path for p in (*anatomy.stem, *anatomy.tail, *(p for b in anatomy.blocks for p in b.affine))}
    rest = {n for n in affine - described if f"{n}.weight" not in anatomy.fresh}
    assert all(n.endswith("pos_conv_embed.conv") for n in rest), f"affine operations that nothing names: {rest}"


def block_of(model: nn.Module, index: int = 0) -> Any:
    return model.get_submodule(anatomy_of(model).blocks[index].point.path)


def test_places_of_a_block() -> None:
    """Every place against the formula, with a linear map A in the middle of a block."""
    weight = torch.randn(24, 24) / 5

    def a(x: Tensor) -> Tensor:
        return x @ weight

    def wanted(block: Any, x: Tensor, place: str) -> Tensor:
        u = block.layernorm_before(x)
        u = u + a(u) if place == "attn_in" else u
        y = block.attention(u)[0]
        y = y + a(u) if place == "attn_out" else y
        x = x + y + (a(u) if place == "attn normed" else a(x) if place == "attn" else 0)
        z = block.layernorm_after(x)
        z = z + a(z) if place == "mlp_in" else z
        f = block.mlp(z)
        f = f + a(z) if place == "mlp_out" else f
        x = x + f + (a(z) if place == "mlp normed" else a(x) if place == "mlp" else 0)
        return x + a(x) if place == "end" else x

    for place in ("attn_in", "attn_out", "mlp_in", "mlp_out", "end", "attn", "attn normed", "mlp", "mlp normed"):
        model = ast.tiny()
        block, x = block_of(model), torch.randn(2, 10, 24)
        with torch.no_grad():
            goal = wanted(block, x, place)

        def edits(editor: Editor, place: str = place, model: nn.Module = model) -> None:
            described = anatomy_of(model).blocks[0]
            if place.split()[0] in ("attn", "mlp"):
                normed = place.endswith("normed")
                editor.branch(described, place.split()[0], Applies(a), "test", normed=normed)
            elif place.endswith("out"):
                editor.inside(described.point, place, Applies(lambda y, n: (y + a(n), n)), "test")
            else:
                editor.inside(described.point, place, Applies(lambda n: (n + a(n),)), "test")

        attach(model, edits)
        with torch.no_grad():
            torch.testing.assert_close(block(x), goal, atol=1e-4, rtol=1e-5, msg=place)


def test_post_norm_blocks_of_wav2vec2() -> None:
    model = wav2vec2.tiny()
    block, x = block_of(model), torch.randn(2, 7, 24)
    with torch.no_grad():
        h = x + block.attention(x)[0] + 2 * x  # the branch reads the block's input
        h = block.layer_norm(h)
        goal = block.final_layer_norm(h + block.feed_forward(h) + 3 * h)

    def edits(editor: Editor) -> None:
        described = anatomy_of(model).blocks[0]
        editor.branch(described, "attn", Applies(lambda v: 2 * v), "first")
        editor.branch(described, "mlp", Applies(lambda v: 3 * v), "second")

    attach(model, edits)
    with torch.no_grad():
        torch.testing.assert_close(block(x), goal, atol=1e-5, rtol=0)


def test_notes_live_for_one_call_of_a_block() -> None:
    model, batch = ast.example()
    log: list[bool] = []

    def leave(y: Tensor, n: Tensor, notes: dict[str, Any]) -> tuple[Tensor, Tensor]:
        log.append("left" in notes)
        notes["left"] = n
        return y, n

    def find(x: Tensor, notes: dict[str, Any]) -> tuple[Tensor]:
        return (x + notes["left"],)

    def edits(editor: Editor) -> None:
        for block in anatomy_of(model).blocks:
            editor.inside(block.point, "attn_out", Applies(leave, notes=True), "leave")
            editor.inside(block.point, "end", Applies(find, notes=True), "find")

    base = run(model, batch)
    attach(model, edits)
    for _ in range(2):
        assert not torch.equal(run(model, batch), base)
    assert log == [False] * 4
    model.train()
    model.encoder.embeddings.cls_token.requires_grad_(True)  # type: ignore[union-attr]
    model.set_grad_checkpointing()  # type: ignore[operator]
    run(model, batch).sum().backward()
    model.set_grad_checkpointing(False)  # type: ignore[operator]
    assert not any(log) and len(log) == 8, "each block once more in backward"


@pytest.mark.parametrize("name", ["ours", "huggingface", "wav2vec2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_in_front(name: str, attention: str) -> None:
    """One more key and value: attention over N + 1, by hand."""
    model, batch = EXAMPLES[name]()
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(attention)  # type: ignore[operator]
            break
    described = anatomy_of(model).blocks[0]
    attn: Any = model.get_submodule(described.points["attn"].path)
    key, value = torch.randn(2, 1, 2, 1, 12).unbind(0)
    x = torch.randn(3, 6, 24)
    with torch.no_grad():
        q, k, v = (getattr(attn, f"{r}_proj")(x).view(3, 6, 2, 12).transpose(1, 2) for r in "qkv")
        k, v = (torch.cat((m.expand(3, -1, -1, -1), t), 2) for m, t in ((key, k), (value, v)))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 6, 24)
        goal = model.get_submodule(described.weights["o"].path)(mixed)

    def more(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (t.expand(len(k), -1, -1, -1) for t in (key, value))
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)

    plain = run(model, batch)
    attach(model, lambda editor: editor.inside(described.points["attn"], "prefix", Applies(more), "prefix"))
    assert not torch.allclose(run(model, batch), plain)
    with torch.no_grad():
        torch.testing.assert_close(attn(x)[0], goal, atol=1e-5, rtol=0)


def test_masked_waveforms_with_more_keys() -> None:
    """Padding stays unseen where keys are added."""
    model, batch = wav2vec2.example_huggingface()
    x, mask = batch["input_values"], torch.ones(3, 240, dtype=torch.long)
    mask[:, 160:] = 0
    described = anatomy_of(model).blocks

    def edits(editor: Editor) -> None:
        for i, block in enumerate(described):
            part = Applies(lambda k, v: (torch.cat((k[:, :, :1], k), 2), torch.cat((v[:, :, :1], v), 2)))
            editor.inside(block.points["attn"], "prefix", part, f"prefix{i}")

    attach(model, edits)
    other = x.clone()
    other[:, 180:] = torch.randn(3, 60)  # behind what the last valid frame sees
    with torch.no_grad():
        one, two = (model(v, attention_mask=mask).logits for v in (x, other))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ours", "original", "huggingface", "encoder"])
def test_prompts_take_the_place_of_the_distillation_token(name: str) -> None:
    model, batch = EXAMPLES[name]()
    anatomy = anatomy_of(model)
    prompt = torch.randn(1, 3, 24)
    shapes: list[tuple[int, ...]] = []

    def edits(editor: Editor) -> None:
        def put(x: Tensor) -> Tensor:
            return torch.cat((x[:, :1], prompt.expand(len(x), -1, -1), x[:, 2:]), 1)

        def pooled(feature: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(tokens.shape))
            return tokens[:, 1:4].mean(1), tokens

        assert anatomy.embed is not None
        editor.after(anatomy.embed, Applies(put), "prompt")
        (path,) = editor.having("pool")
        editor.inside(Point(path, 24), "pool", Applies(pooled), "pool")

    attach(model, edits)
    before = run(model, batch)
    feature = model(**batch).pooler_output if name == "encoder" else None
    assert shapes[0] == (3, 2 - 1 + 3 + 8 - 0, 24)
    if feature is not None:
        tokens = run(model, batch)
        torch.testing.assert_close(feature, tokens[:, 1:4].mean(1))
    with torch.no_grad():
        table = next(p for n, p in model.named_parameters() if n.endswith("distillation_token"))
        table.add_(1.0)
    assert torch.equal(run(model, batch), before), "the output depends on the dropped token"


def test_pool_of_transformers_as_a_tuple() -> None:
    model, batch = ast.example_encoder()
    wanted = model(**batch).pooler_output
    attach(model, lambda editor: editor.inside(Point("", 24), "pool", Applies(lambda f, t: (2 * f, t)), "pool"))
    torch.testing.assert_close(model(**batch, return_dict=False)[1], 2 * wanted)
    torch.testing.assert_close(model(**batch).pooler_output, 2 * wanted)


def test_pooling() -> None:
    tokens = torch.randn(2, 6, 4)
    made = {kind: Pool(kind)(tokens) for kind in ("mean", "tokens", "cls", "patches")}  # type: ignore[arg-type]
    assert torch.equal(made["mean"], tokens.mean(1)) and torch.equal(made["cls"], tokens[:, 0])
    torch.testing.assert_close(made["tokens"], (tokens[:, 0] + tokens[:, 1]) / 2)
    torch.testing.assert_close(made["patches"], tokens[:, 2:].mean(1))
    with pytest.raises(ConfigError, match="'max'"):
        Pool("max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs special tokens"):
        AudioClassifier(wav2vec2.tiny(), 3, "tokens")


def test_ours_equals_transformers_own_classifier() -> None:
    theirs, batch = ast.example_huggingface()
    ours = AudioClassifier(theirs.audio_spectrogram_transformer, 5, "tokens", head="norm", norm_eps=1e-12)
    ours.norm.load_state_dict(theirs.classifier.layernorm.state_dict())  # type: ignore[union-attr]
    ours.head.load_state_dict(theirs.classifier.dense.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(ours.eval()(batch["input_values"]), theirs(**batch).logits, atol=1e-6, rtol=0)


def test_what_every_method_trains() -> None:
    norm = ("encoder.layernorm.weight", "encoder.layernorm.bias")
    assert anatomy_of(ast.example()[0]).fresh == (*norm, "head.weight", "head.bias")
    assert not set(norm) & set(anatomy_of(ast.example_original()[0]).fresh)
    bare = AudioClassifier(ast.tiny(), 0, train_norm=False)
    assert bare(ast.spectrograms()).shape == (3, 24) and anatomy_of(bare).fresh == ()
    with pytest.raises(UnsupportedError, match="has none"):
        ps.adapt(bare, "linear")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    other = AudioClassifier(transformers.ViTModel(config), 2)
    with pytest.raises(BackboneError, match="holds a ViTModel"):
        anatomy_of(other)


def test_counts_on_ast_base() -> None:
    from peft_suite.audio.backbones import backbones

    with torch.device("meta"):
        model = backbones.build("ast-base", 50, pretrained=False, checkpoint="", options={"max_length": 500})
    shared = 769 * 50 + 2 * 768  # head and final norm
    patch_bias, norm_weight = 768, 768  # the study's bitfit trains neither
    counts = {"linear": 0, "lora(rank=6)": 221_184, "bitfit": 101_376 + patch_bias - norm_weight}
    for method, core in counts.items():
        plan = ps.plan(model, method)
        assert sum(row.parameters for row in plan.rows) == core + shared, method


@pytest.mark.parametrize("name", ["ours", "huggingface", "wav2vec2"])
def test_reentrant_checkpointing_is_refused(name: str) -> None:
    model, _ = EXAMPLES[name]()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
            break
    with pytest.raises(UnsupportedError, match="reentrant"):
        ps.adapt(model, "lora(rank=2)")


def test_bitfit_trains_the_whole_head_where_no_norm_stands_behind_the_blocks() -> None:
    config = transformers.Wav2Vec2Config(**wav2vec2.SIZE, num_labels=5)
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    anatomy = anatomy_of(model)
    assert anatomy.norm is not None and anatomy.norm.path == "projector"
    ps.adapt(model, "bitfit")
    owned = {n for n, _ in model.adapters["default"].named_parameters()}
    assert {"projector.trained.weight", "projector.trained.bias", "classifier.trained.weight"} <= owned
