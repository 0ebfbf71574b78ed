"""Methods are written against the anatomy: SSF, VPT and the rest serve a transformers AST that the suite never saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peft_suite as ps

transformers = pytest.importorskip("transformers")


def describe(model: Any) -> ps.Anatomy:
    """An anatomy for the audio transformer: separate q, k, v, two prefix tokens, a layer norm before the head."""
    dim, inner = model.config.hidden_size, model.config.intermediate_size
    root = "audio_spectrogram_transformer"
    names = dict(model.named_modules())
    layers = next(p for p in (f"{root}.layers", f"{root}.encoder.layer") if p in names)
    blocks = []
    for i in range(model.config.num_hidden_layers):
        path = f"{layers}.{i}"
        linear = {
            n.removeprefix(path + "."): m
            for n, m in names.items()
            if isinstance(m, torch.nn.Linear) and n.startswith(path)
        }
        q, k, v = (
            (next(n for n in linear if n.endswith(e)) for e in ("q_proj", "k_proj", "v_proj"))
            if any(n.endswith("q_proj") for n in linear)
            else (next(n for n in linear if n.endswith(e)) for e in ("query", "key", "value"))
        )
        o, fc1, fc2 = [n for n in linear if n not in (q, k, v)]
        sites = ["layernorm_before", q, k, v, o, "layernorm_after", fc1, fc2]
        widths = [dim] * 6 + [inner, dim]
        blocks.append(
            ps.Block(
                ps.Point(path, dim),
                {"attn_out": ps.Point(f"{path}.{o}", dim), "mlp": ps.Point(f"{path}.{fc2}", dim)},
                {
                    r: ps.Weight(f"{path}.{n}")
                    for r, n in zip(("q", "k", "v", "o", "fc1", "fc2"), (q, k, v, o, fc1, fc2), strict=True)
                },
                tuple(ps.Point(f"{path}.{s}", w) for s, w in zip(sites, widths, strict=True)),
            )
        )
    projection = f"{root}.embeddings.patch_embeddings.projection"
    return ps.Anatomy(
        family="test-ast",
        dim=dim,
        blocks=tuple(blocks),
        embed=ps.Point(f"{root}.embeddings", dim),
        stem=(ps.Point(projection, dim, "first"),),
        norm=ps.Point(f"{root}.layernorm", dim),
        tail=(ps.Point(f"{root}.layernorm", dim),),
        norms=tuple(n for n, m in names.items() if isinstance(m, torch.nn.LayerNorm)),
        fresh=tuple(n for n, _ in model.named_parameters() if n.startswith("classifier.")),
        prefix_tokens=2,
        patch_values=names[projection].weight[0].numel(),
    )


@pytest.fixture
def ast() -> Any:
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=5,
    )
    return transformers.ASTForAudioClassification(config).eval()


METHODS = [
    "linear",
    "full",
    "bitfit",
    "norm",
    "lora",
    "pfeiffer",
    "houlsby",
    "ssf",
    "vpt(num_tokens=3)",
    "vpt(num_tokens=3, deep=True)",
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_on_ast(ast: Any, method: str) -> None:
    batch = {"input_values": torch.randn(2, 32, 16)}
    with torch.no_grad():
        base = ast(**batch).logits
    ps.adapt(ast, method, anatomy=describe(ast))
    ps.verify(ast, batch)
    with torch.no_grad():
        for p in ast.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        adapted = ast(**batch).logits
        assert not torch.allclose(adapted, base, atol=1e-4)
        with ps.disabled(ast):
            assert torch.equal(ast(**batch).logits, base)
    if ast.adapters["default"].method.capabilities.mergeable:
        ps.merge(ast)
        with torch.no_grad():
            assert float((ast(**batch).logits - adapted).norm() / adapted.norm()) < 1e-5
    else:
        ps.remove(ast)
        with torch.no_grad():
            assert torch.equal(ast(**batch).logits, base)
