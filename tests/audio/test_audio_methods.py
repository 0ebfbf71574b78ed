"""Audio methods: counts on AST-base, what each method promises, and its formula written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.audio.anatomies.ast import spectrograms, tiny
from peft_suite.audio.methods.conformer import ConformerConfig, ConformerPart
from peft_suite.audio.methods.moa import DenseMixture, DenseMoAConfig, SoftMixture, SoftMoAConfig
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.errors import ConfigError, UnsupportedError

D, L, C = 768, 12, 50
NORM, COMMON = 2 * D, 2 * D + C * D + C  # one LayerNorm; the final one and the head
COUNTS = {
    "linear": 0,
    "full": 85_708_032 - NORM,
    "bitfit": L * 11 * D + D - D,  # the patch embedding's more, the final norm's scale less
    "ast-bitfit": 101_376 - D,
    "lora(rank=6)": 221_184,
    "ast-lora": 221_184,
    "lora(rank=12)": 442_368,
    "lora(rank=6, targets=[q, k, v, o])": 442_368,
    "ast-pfeiffer": 248_976,
    "pfeiffer(bottleneck=12, norms=True)": 248_976,
    "ast-houlsby": 497_952,
    "houlsby(bottleneck=12, norms=True)": 497_952,
    "conformer(pre_norm=True)": 270_720,
    "conformer": 270_720 - L * NORM,  # the published count has a LayerNorm that nothing reads
    "conformer(kernel=8, pre_norm=True)": 268_512,
    "conformer(position=both, pre_norm=True)": 541_440,
    "soft-moa": 922_104,
    "soft-moa(position=both)": 1_844_208,
    "soft-moa(expert=convpass)": 931_680,
    "dense-moa": 922_188,
    "dense-moa(position=both)": 1_844_376,
    "audio-prompts": 230_400,
    "audio-prompts(num_tokens=300, deep=False)": 230_400,
    "prefix": 221_184,
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    from transformers import ASTConfig, ASTModel

    with torch.device("meta"):
        return AudioClassifier(ASTModel(ASTConfig(max_length=500)), C)


@pytest.mark.parametrize("method", COUNTS)
def test_counts_on_ast_base(base: nn.Module, method: str) -> None:
    assert ps.plan(base, method).trainable == COUNTS[method] + COMMON


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    return AudioClassifier(tiny(**options), 5).eval()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return spectrograms()


def randomised(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.adapters["default"].parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def part(model: Any, key: str) -> Any:
    return model.adapters["default"].get_submodule(key)


IDENTITIES = (
    "ast-pfeiffer",
    "ast-houlsby",
    "ast-houlsby(insertion=sequential)",
    "ast-houlsby(insertion=before)",
    "ast-houlsby(insertion=hydra)",
    "conformer(position=both)",
    "conformer(position=both, insertion=sequential, pre_norm=True)",
    "soft-moa(position=both, slots=2)",
    "soft-moa(expert=convpass, slots=2, double_add=True)",
    "dense-moa(position=both)",
    "ast-lora",
    "ast-bitfit",
)


@pytest.mark.parametrize("method", IDENTITIES)
def test_identity_at_the_start_and_nothing_dead(method: str, x: Tensor) -> None:
    model = classifier()
    want = model(x)
    ps.adapt(model, method)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    randomised(model).train()
    assert (model(x) - want).abs().max() > 1e-3
    F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    for name, p in model.adapters["default"].named_parameters():
        assert p.grad is not None and bool(p.grad.abs().max() > 0), name


@pytest.mark.parametrize(
    ("method", "identity"),
    [
        ("ast-pfeiffer(residual=True)", False),
        ("ast-pfeiffer(insertion=sequential, residual=False)", False),
        ("ast-pfeiffer(insertion=before, residual=False)", False),
        ("ast-pfeiffer(init=official)", False),
        ("ast-pfeiffer(residual=False)", True),
        ("conformer(residual=True)", False),
        ("conformer(init=official)", False),
        ("soft-moa(init=official)", False),
    ],
)
def test_what_a_residual_and_the_official_start_do(method: str, identity: bool, x: Tensor) -> None:
    model = classifier()
    want = model(x)
    ps.adapt(model, method)
    assert model.adapters["default"].method.capabilities.identity_at_init is identity
    assert bool((model(x) - want).abs().max() < 1e-5) is identity


def test_the_norms_that_train_are_those_of_the_adapted_sublayers() -> None:
    for method, norms in {
        "ast-pfeiffer": ["layernorm_after"],
        "ast-houlsby": ["layernorm_before", "layernorm_after"],
        "ast-pfeiffer(norms=False)": [],
        "soft-moa": ["layernorm_before"],
        "conformer": ["layernorm_after"],
    }.items():
        model = ps.adapt(classifier(), method)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        found = {n.split(".trained")[0].rpartition(".")[2] for n in trained if ".layers." in n and ".trained." in n}
        assert found == set(norms), method
        assert {n.rpartition(".")[0] for n in trained if ".layers." not in n} == {
            "adapters.default.encoder.layernorm.trained",
            "adapters.default.head.trained",
        }


def test_sequential_without_residual_takes_the_place_of_the_sublayer(x: Tensor) -> None:
    model = ps.adapt(classifier(), "ast-pfeiffer(insertion=sequential, residual=False)")  # starts with zero output
    bare = classifier()
    for layer in bare.encoder.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5)


def test_two_at_one_place_are_a_sequential_and_a_parallel_one(x: Tensor) -> None:
    model = randomised(ps.adapt(classifier(), "ast-pfeiffer(insertion=hydra, norms=False)"))
    seen: dict[str, Tensor] = {}
    model.encoder.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.update(z=args[0], y=out))
    model(x)
    f = type(model.encoder.layers[0].mlp).forward(model.encoder.layers[0].mlp, seen["z"])
    after, beside = (part(model, f"encoder.layers.0.mlp.adapter_mlp{n}") for n in ("", "_parallel"))

    def bottleneck(of: Any, v: Tensor) -> Tensor:
        return of.up(F.gelu(of.down(v)))

    torch.testing.assert_close(seen["y"], f + bottleneck(after, f) + bottleneck(beside, seen["z"]))


def test_conformer_is_the_published_module() -> None:
    torch.manual_seed(0)
    d, r, k = 12, 4, 8
    ours = ConformerPart(d, ConformerConfig(bottleneck=r, kernel=k, init="official"))
    one, deep, two, norm = nn.Conv1d(d, 2 * r, 1), nn.Conv1d(r, r, k, groups=r), nn.Conv1d(r, d, 1), nn.BatchNorm1d(r)
    with torch.no_grad():
        for theirs, mine in ((one, ours.down), (deep, ours.conv), (two, ours.up)):
            mine.weight.copy_(theirs.weight.view(mine.weight.shape))
            mine.bias.copy_(theirs.bias)
    x = torch.randn(2, 9, d)
    h = F.glu(one(x.transpose(1, 2)), dim=1)
    h = deep(F.pad(h, (3, 4)))  # an even kernel: three tokens back, four ahead
    want = two(F.silu(norm(h))).transpose(1, 2)
    torch.testing.assert_close(ours(x), want)
    torch.testing.assert_close(ours.batch_norm.running_var, norm.running_var)
    torch.testing.assert_close(ours.eval()(x)[:1], ours(x[:1]))  # whatever else is in the batch


def test_conformer_sees_the_order_of_tokens_and_moves_its_statistics(x: Tensor, tmp_path: Path) -> None:
    model = ps.adapt(classifier(), "conformer(bottleneck=4, kernel=3, init=official)")
    found = part(model, "encoder.layers.1.mlp.conformer_mlp")
    tokens = torch.randn(2, 7, 24)
    order = torch.randperm(7)
    assert (found.delta(tokens[:, order]) - found.delta(tokens)[:, order]).abs().max() > 1e-3
    before = found.batch_norm.running_mean.clone()
    model.train()(x)
    assert found.batch_norm.num_batches_tracked == 1 and (found.batch_norm.running_mean - before).abs().max() > 0
    ps.save(model, tmp_path / "a")
    again = ps.load(classifier(), tmp_path / "a").eval()
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def by_hand(experts: Any, n: int, z: Tensor, convpass: bool) -> Tensor:
    """Expert n applied to ``z: [B, M, d]``."""
    r, d = experts.width, z.shape[-1]
    rows = slice(n * r, (n + 1) * r)
    h = F.linear(z, experts.down.weight[rows], experts.down.bias[rows])
    if convpass:
        h = h * torch.sigmoid(1.702 * h)
        h = F.conv1d(h.transpose(1, 2), experts.conv.weight[rows], experts.conv.bias[rows], padding=1).transpose(1, 2)
        h = h * torch.sigmoid(1.702 * h)
    else:
        h = F.gelu(h)
    return F.linear(h, experts.up.weight[:, rows], experts.up_bias[n * d : (n + 1) * d])


@pytest.mark.parametrize("expert", ["bottleneck", "convpass"])
@pytest.mark.parametrize("normalize", ["none", "soft-moe", "official"])
def test_soft_moa_is_its_formula(expert: Any, normalize: Any) -> None:
    torch.manual_seed(0)
    n, p, d = 3, 2, 10
    config = SoftMoAConfig(bottleneck=4, experts=n, slots=p, expert=expert, normalize=normalize, init="official")
    mix = SoftMixture(d, config).eval()
    with torch.no_grad():
        for q in mix.parameters():
            q.add_(0.3 * torch.randn_like(q))
    z = torch.randn(2, 7, d, requires_grad=True)
    units = z / (z.square().sum(-1, keepdim=True).sqrt() + 1e-6)
    axis = {"soft-moe": 0, "official": 1}.get(normalize, 0)
    phi = (
        mix.phi / (mix.phi.square().sum(axis, keepdim=True).sqrt() + 1e-6) * mix.scale
        if mix.scale is not None
        else mix.phi
    )
    scores = torch.einsum("bmd,dnp->bmnp", z if normalize == "none" else units, phi)
    dispatch = scores.softmax(1)
    combine = scores.flatten(2).softmax(2).view(scores.shape)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, n, p))
    torch.testing.assert_close(combine.sum((2, 3)), torch.ones(2, 7))
    slots = torch.einsum("bmd,bmnp->bnpd", units if normalize == "official" else z, dispatch)
    made = torch.stack([by_hand(mix.experts, i, slots[:, i], expert == "convpass") for i in range(n)], dim=1)
    want = torch.einsum("bnpd,bmnp->bmd", made, combine)
    torch.testing.assert_close(mix.mixture(z), want)
    order = torch.randperm(7)
    torch.testing.assert_close(mix.mixture(z[:, order]), mix.mixture(z)[:, order])
    mix.mixture(z).square().sum().backward()
    assert mix.experts.down.weight.grad is not None
    assert bool((mix.experts.down.weight.grad.view(n, -1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("expert", ["bottleneck", "convpass"])
def test_dense_moa_mixes_before_the_up_projection(expert: Any) -> None:
    torch.manual_seed(0)
    n, d = 5, 16
    mix = DenseMixture(d, DenseMoAConfig(bottleneck=2, experts=n, expert=expert, init="official")).eval()
    with torch.no_grad():
        for q in mix.parameters():
            q.add_(0.3 * torch.randn_like(q))
    z = torch.randn(2, 7, d, requires_grad=True)
    weights = F.linear(z, mix.router.weight, mix.router.bias).softmax(-1)
    each = torch.stack([by_hand(mix.experts, i, z, expert == "convpass") for i in range(n)], dim=-1)
    want = (weights.unsqueeze(2) * each).sum(-1)
    sizes: list[int] = []

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        got = mix.mixture(z)
    torch.testing.assert_close(got, want)
    assert max(sizes) <= 2 * 7 * d < 2 * 7 * d * n  # no expert's output is kept
    direction = torch.randn_like(got)
    leaves = [z, *mix.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * direction).sum(), leaves),
        torch.autograd.grad((want * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["soft-moa", "dense-moa"])
def test_added_once_or_as_published_twice(name: str, x: Tensor) -> None:
    once, twice = (
        randomised(ps.adapt(classifier(), f"{name}(norms=False{more})")) for more in ("", ", double_add=True")
    )
    layer = once.encoder.layers[0]
    label = name.replace("-", "_")
    mixture = part(once, f"encoder.layers.0.attention.{label}_attn").mixture
    h = once.encoder.embeddings(x)
    u = layer.layernorm_before(h)
    added = mixture(u)
    x1 = h + type(layer.attention).forward(layer.attention, u)[0] + added
    y = x1 + layer.mlp(layer.layernorm_after(x1))
    torch.testing.assert_close(layer(h), y)
    torch.testing.assert_close(twice.encoder.layers[0](h), y + added)


def test_prompts_take_the_distillation_tokens_place(x: Tensor) -> None:
    model = ps.adapt(classifier(), "audio-prompts(num_tokens=4)")
    tokens = model.forward_features(x)
    assert tokens.shape[1] == classifier().forward_features(x).shape[1] + 4 - 1
    torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
    want = model(x)
    with torch.no_grad():
        model.encoder.embeddings.distillation_token.add_(5.0)
        model.encoder.embeddings.position_embeddings[:, 1].add_(5.0)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    model(x).square().sum().backward()
    prompts = {n: p for n, p in model.adapters["default"].named_parameters() if n.endswith("prompt")}
    assert len(prompts) == 2
    for p in prompts.values():
        assert bool((p.grad.abs().amax(1) > 0).all())
        assert 0 < p.abs().max() <= (6 / (3 * 256 + 24)) ** 0.5


@pytest.mark.parametrize("deep", [True, False])
def test_what_the_head_reads(deep: bool, x: Tensor) -> None:
    chosen = {
        "all": slice(None),
        "class_token": slice(1),
        "prompts": slice(1, 4),
        "patches": slice(4, None),
        "prompts_and_patches": slice(1, None),
    }
    for head_input, tokens in chosen.items():
        model = ps.adapt(classifier(), f"audio-prompts(num_tokens=3, deep={deep}, head_input={head_input})")
        torch.testing.assert_close(model(x), model.head(model.forward_features(x)[:, tokens].mean(1)))


def test_prompts_reach_transformers_own_classifier() -> None:
    from peft_suite.audio.anatomies.ast import example_huggingface

    model, batch = example_huggingface()
    ps.adapt(model, "audio-prompts(num_tokens=3, head_input=patches)")
    body: Any = model.audio_spectrogram_transformer
    tokens = body(**batch).last_hidden_state
    torch.testing.assert_close(model(**batch).logits, model.classifier(tokens[:, 4:].mean(1)))


def test_prefixes_are_keys_and_values_anywhere_in_the_row(x: Tensor) -> None:
    model = randomised(ps.adapt(classifier(), "prefix(num_tokens=6)"))
    attention = model.encoder.layers[0].attention
    rows = part(model, "encoder.layers.0.attention.prefix").prefix.detach()
    u = torch.randn(2, 5, 24)
    q, k, v = (getattr(attention, f"{n}_proj")(u) for n in "qkv")
    for at in (0, 1, 5):  # the published code: behind the class token
        keys, values = (
            torch.cat((t[:, :at], p.expand(2, -1, -1), t[:, at:]), 1) for t, p in zip((k, v), rows, strict=True)
        )
        heads = [t.view(2, -1, 2, 12).transpose(1, 2) for t in (q, keys, values)]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 5, 24)
        torch.testing.assert_close(attention(u)[0], attention.o_proj(mixed))
    fresh = part(ps.adapt(classifier(), "prefix"), "encoder.layers.0.attention.prefix").prefix
    assert fresh.shape == (2, 12, 24) and 0 < fresh.abs().max() <= (6 / (3 * 256 + 24)) ** 0.5


def test_lora_merges_and_comes_apart(x: Tensor) -> None:
    model = classifier()
    base = model(x)
    randomised(ps.adapt(model, "ast-lora(targets=[q, k, v, o])"))
    assert part(model, "encoder.layers.0.attention.q_proj.lora").scale == 0.125
    want = model(x)
    ps.merge(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
    assert (want - base).abs().max() > 1e-3


def test_bitfit_trains_biases_alone() -> None:
    for method, patches in {"bitfit": True, "ast-bitfit": False}.items():
        names = {n for n, _ in ps.adapt(classifier(), method).adapters["default"].named_parameters()}
        assert {n for n in names if not n.endswith("bias")} == {"head.trained.weight"}
        assert any("patch_embeddings" in n for n in names) is patches


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("conformer(kernel=0)", "kernel"),
        ("soft-moa(slots=0)", "slots"),
        ("dense-moa(experts=0)", "experts"),
        ("soft-moa(double_add=True, position=mlp)", "position=attn"),
        ("prefix(num_tokens=5)", "even"),
        ("audio-prompts(num_tokens=0)", "num_tokens"),
        ("adapter(insertion=hydra, residual=True)", "leave it None"),
        ("adapter(insertion=before, outside=True)", "sequential"),
    ],
)
def test_bad_options(method: str, message: str) -> None:
    model = classifier()
    with pytest.raises(ConfigError, match=message):
        ps.adapt(model, method)
    assert not hasattr(model, "adapters")


def test_backbones_without_a_distillation_token_are_refused() -> None:
    from peft_suite.audio.anatomies.wav2vec2 import example, example_huggingface

    for make in (example, example_huggingface):
        model = make()[0]
        with pytest.raises(UnsupportedError, match="Use vpt"):
            ps.adapt(model, "audio-prompts")
        assert not hasattr(model, "adapters")


def test_a_norm_beside_a_parallel_adapter_keeps_its_output(x: Tensor) -> None:
    from peft_suite.methods.trained_norm import TrainedNorm

    gradients, sizes = [], []
    for drowned in (False, True):  # a large bias: the norm works as usual
        model = randomised(ps.adapt(classifier(), "ast-houlsby(bottleneck=3)"))
        norms = [p for _, p in model.adapters["default"].parts() if isinstance(p, TrainedNorm)]
        assert len(norms) == 4
        if drowned:
            for norm in norms:
                norm.direct = lambda *_: False
        assert all(norm.direct(norm.weight) is not drowned for norm in norms)
        kept: dict[int, int] = {}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(x).square().sum()
        sizes.append(sum(kept.values()))
        loss.backward()
        gradients.append([p.grad for p in model.adapters["default"].parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    tokens = 4 * 3 * (2 + 2 * 4) * 24  # bytes of one stream: 3 clips, 10 tokens, width 24
    assert sizes[1] - sizes[0] >= 3 * tokens


def test_the_kept_output_differentiates_twice_and_guards_itself() -> None:
    from peft_suite.methods.trained_norm import TrainedNorm, _KeepOutput

    torch.manual_seed(0)
    x, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 6), (6,)))
    w = torch.rand(6, dtype=torch.double).add(0.5).requires_grad_()
    torch.autograd.gradgradcheck(lambda *args: _KeepOutput.apply(*args, 1e-6)[0], (x, w, b))
    part = TrainedNorm(nn.LayerNorm(6), None)
    assert part.direct(part.weight)
    with torch.no_grad():
        assert not part.direct(part.weight)
        part.weight[2] = 1e-3
    assert not part.direct(part.weight)
    with torch.no_grad():
        part.weight[2] = 1.0
        part.bias[1] = 50.0
    assert not part.direct(part.weight)
    assert not part.direct(torch.ones(6, dtype=torch.bfloat16))
