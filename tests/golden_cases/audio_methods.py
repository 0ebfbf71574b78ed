"""Methods on the Audio Spectrogram Transformer, against the modules that the published study ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Place, Tensors, group
from peft_suite.audio.models.classifier import AudioClassifier

Places = dict[str, list[Place]]
BRANCHES = {"MHSA": "attn", "FFN": "mlp"}
MODULES = {"attn": "attention", "mlp": "mlp"}
NORMS = {"attn": "layernorm_before", "mlp": "layernorm_after"}
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


@dataclass
class Described:
    """A golden's method: its configuration, where the reference's trained tensors are, and what its probes see."""

    method: dict[str, Any]
    places: Places
    probes: dict[str, str] = field(default_factory=dict)  # probe -> key of our part
    added: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor] = lambda part, given, made: made - sum(given)
    buffers: Places = field(default_factory=dict)


def encoder_keys(state: Tensors) -> Tensors:
    """Keys of transformers 4 to those in memory of transformers 5."""
    moves = (
        (r"^model\.", ""),
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{ATTENTION[m[1]]}."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
    renamed = {}
    for key, value in state.items():
        for old, new in moves:
            key = re.sub(old, new, key)  # type: ignore[call-overload]
        renamed[key] = value
    return renamed


def audio_classifier(spec: Config, state: Tensors) -> AudioClassifier:
    """Our classifier on transformers' encoder of the golden's sizes, frozen weights loaded strictly."""
    from transformers import ASTConfig, ASTModel

    sizes = dict(spec["backbone"])
    if sizes.pop("dropout", 0.0) or not str(sizes.pop("hidden_act", "gelu")).startswith("gelu"):
        raise NotCoveredError(f"backbone {spec['backbone']}")
    encoder = ASTModel(ASTConfig(**{"layer_norm_eps": 1e-12, **sizes}))
    ours = encoder_keys(state)
    encoder.load_state_dict({k: ours[k] for k in encoder.state_dict() if k in ours}, strict=True)
    pooling = spec.get("pooling", "mean over all tokens")
    if not ("mean over all" in pooling or "cls" in pooling.lower()):
        raise NotCoveredError(f"pooling {pooling!r}")
    model = AudioClassifier(encoder, spec["num_labels"], "mean" if "mean over all" in pooling else "cls")
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.head, name).copy_(state[f"classification_head.{name}"])
    return model.eval()


def trained_norms(spec: Config, branches: tuple[str, ...]) -> Places:
    return {
        f"encoder.layer.{i}.{NORMS[branch]}.{name}": [Place(f"encoder.layers.{i}.{NORMS[branch]}.trained.{name}")]
        for i in layers(spec)
        for branch in branches
        for name in ("weight", "bias")
    }


def head() -> Places:
    return {
        **{f"classification_head.{n}": [Place(f"head.trained.{n}")] for n in ("weight", "bias")},
        **{f"layernorm.{n}": [Place(f"encoder.layernorm.trained.{n}")] for n in ("weight", "bias")},
    }


def layers(spec: Config) -> range:
    return range(spec["backbone"]["num_hidden_layers"])


def compare(spec: Config, tensors: Tensors, described: Described) -> None:
    """Outputs, inner outputs, every gradient, and train mode where the golden has it."""
    state = {k.removeprefix("model."): v for k, v in group(tensors, "sd.").items()}
    model = audio_classifier(spec, state)
    seen: dict[str, Any] = {}
    listen(model, "encoder.embeddings", "embeddings", seen)  # before adapters change it, as the reference shows it
    ps.adapt(model, described.method)
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    give(adapter, state, described.places | head(), described.buffers)
    for i in layers(spec):
        listen(model, f"encoder.layers.{i}", f"layer{i}", seen)
    listen(model, "encoder.layernorm", "final_norm", seen)
    for probe, key in described.probes.items():
        adapter.get_submodule(key).register_forward_hook(
            lambda part, given, made, probe=probe: seen.__setitem__(f"probe.{probe}", (part, given, made))
        )
    for probe, path in spec["probes"].items():
        if probe.endswith("attention"):
            place = f"encoder.layers.{path.split('.')[2]}.attention"
            listen(model, place, f"probe.{probe}.in", seen, of_input=True)
            inner = probe == "self_attention"  # without the output projection
            listen(model, f"{place}.o_proj" if inner else place, f"probe.{probe}.out", seen, of_input=inner)

    check_training(spec, described)
    logits = model(tensors["in.input_values"])
    loss = F.cross_entropy(logits, tensors["in.labels"])
    loss.backward()
    near(logits, tensors["out.logits"], "out.logits")
    near(loss.reshape(1), tensors["out.loss"], "out.loss")
    for name in ("embeddings", *(f"layer{i}" for i in layers(spec)), "final_norm"):
        near(seen[name], tensors[f"out.{name}"], f"out.{name}")
    for key in described.probes:
        part, given, made = seen[f"probe.{key}"]
        given = tuple(g for g in given if isinstance(g, Tensor))  # without the block's notes
        near(given[-1], tensors[f"probe.{key}.in"], f"probe.{key}.in")
        near(described.added(part, given, made), tensors[f"probe.{key}.out"], f"probe.{key}.out")
    for key in (k for k in tensors if k.startswith("probe.") and k in seen):
        near(seen[key], tensors[key], key)
    check_gradients(adapter, tensors, described)
    check_train_mode(model, tensors, described)


def check_training(spec: Config, described: Described) -> None:
    """We train what the reference trains, but for what reaches no output."""
    dead = {k.removeprefix("model.") for k in spec["trainable_without_gradient"]}
    live = {k.removeprefix("model.") for k in spec["trainable"]} - dead
    wanted = set(described.places) | set(head())
    assert live - wanted == set(), f"the reference also trains {sorted(live - wanted)}"
    assert wanted - live == set(), f"we also train {sorted(wanted - live)}"


def give(adapter: nn.Module, state: Tensors, places: Places, buffers: Places) -> None:
    """Reference tensors to their places; every value of ours gets one."""
    ours = adapter.state_dict()
    covered = {k: torch.zeros_like(p, dtype=torch.bool) for k, p in ours.items()}
    with torch.no_grad():
        for reference, found in {**places, **buffers}.items():
            for place in found:
                target = ours[place.name][place.ours]
                ours[place.name][place.ours] = state[reference][place.theirs].reshape(target.shape)
                covered[place.name][place.ours] = True
    lost = [k for k, c in covered.items() if not bool(c.all())]
    assert not lost, f"values of ours without a counterpart in the reference: {lost}"


def check_gradients(adapter: nn.Module, tensors: Tensors, described: Described) -> None:
    ours = dict(adapter.named_parameters())
    places = described.places | head()
    grads = {k.removeprefix("model."): v for k, v in group(tensors, "grad.").items()}
    assert set(grads) == set(places)
    for reference, found in places.items():
        for place in found:
            gradient = ours[place.name].grad
            assert gradient is not None, place.name
            wanted = grads[reference][place.theirs]
            gap = float((gradient[place.ours].reshape(wanted.shape) - wanted).abs().max())
            assert gap <= 1e-5 * max(float(wanted.abs().max()), 1e-2), f"grad.{reference}: {gap:.2e}"


def check_train_mode(model: nn.Module, tensors: Tensors, described: Described) -> None:
    if "out.logits_train" not in tensors:
        return
    with torch.no_grad():
        near(model.train()(tensors["in.input_values"]), tensors["out.logits_train"], "out.logits_train")
    after = {k.removeprefix("model."): v for k, v in group(tensors, "out.after_train.").items()}
    assert after
    ours = model.adapters["default"].state_dict()  # type: ignore[index, union-attr, operator]
    for reference, wanted in after.items():
        (place,) = described.buffers[reference]
        near(ours[place.name], wanted, f"out.after_train.{reference}")


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    gap = float((got.detach() - wanted).abs().max())
    assert gap < 1e-5, f"{what}: {gap:.2e}"


def listen(model: nn.Module, path: str, name: str, seen: dict[str, Any], of_input: bool = False) -> None:
    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
        seen[name] = (value[0] if isinstance(value, tuple) else value).detach()

    model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)


def in_branches(kind: str, single: str = "mlp") -> tuple[str, ...]:
    """Where adapters of a published type sit."""
    if kind not in ("Houlsby", "Pfeiffer"):
        raise NotCoveredError(f"adapter_type {kind!r}")
    return ("attn", "mlp") if kind == "Houlsby" else (single,)


def beside(branch: str, insertion: str) -> str:
    """Path, below a block, of the module that an adapter listens to."""
    return "attention.o_proj" if (branch, insertion) == ("attn", "sequential") else MODULES[branch]


def bottleneck(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    given = spec["method"]
    if given.get("act", "GELU (erf)") != "GELU (erf)":
        raise NotCoveredError(f"act {given['act']!r}")
    branches = in_branches(given["adapter_type"])
    insertion = given["seq_or_par"]
    method = {
        "name": "ast-houlsby" if len(branches) == 2 else "ast-pfeiffer",
        "bottleneck": given["bottleneck"],
        "insertion": insertion,
        "residual": given["apply_residual"],
    }
    places, probes = trained_norms(spec, branches), {}
    for branch in branches:
        here = {"attn": "MHSA", "mlp": "FFN"}[branch]
        for i in layers(spec):
            key = f"encoder.layers.{i}.{beside(branch, insertion)}.adapter_{branch}"
            for theirs, ours in {"linear_downsample": "down", "linear_upsample": "up"}.items():
                for n in ("weight", "bias"):
                    places[f"encoder.layer.{i}.adapter_module_{here}.{theirs}.{n}"] = [Place(f"{key}.{ours}.{n}")]
        probes.update(probed(spec, f"adapter_module_{here}", f"{beside(branch, insertion)}.adapter_{branch}"))
    compare(spec, tensors, Described(method, places, probes, adapter_alone(insertion, given["apply_residual"])))


def probed(spec: Config, module: str, key: str) -> dict[str, str]:
    """Probes of the reference's module of that name -> key of our part."""
    return {
        probe: f"encoder.layers.{path.split('.')[2]}.{key}"
        for probe, path in spec["probes"].items()
        if path.endswith(f".{module}")
    }


def adapter_alone(insertion: str, residual: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """The adapter's own output, without what it is added to."""

    def added(part: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        if insertion == "parallel":
            made = made - given[0]
        return made - given[-1] if residual else made

    return added


def placements(config: Config, tensors: Tensors) -> None:
    """One adapter per layer, eight ways; outputs only."""
    spec = config["spec"]
    state = {k.removeprefix("model."): v for k, v in group(tensors, "sd.").items()}
    width = round(spec["backbone"]["hidden_size"] / spec["reduction_rate"])
    for case in spec["cases"]:
        location, mode, order = case.split(".")
        branch = BRANCHES[location]
        method: dict[str, Any] = {"name": "ast-pfeiffer", "bottleneck": width, "position": branch}
        if order == "after":
            method["insertion"] = "sequential"
        elif mode == "sequential":
            method.update(insertion="before", residual=False)
        insertion = method.get("insertion", "parallel")
        places = trained_norms(spec, (branch,)) | head()
        for i in layers(spec):
            key = f"encoder.layers.{i}.{beside(branch, insertion)}.adapter_{branch}"
            for theirs, ours in {"linear_downsample": "down", "linear_upsample": "up"}.items():
                for n in ("weight", "bias"):
                    places[f"encoder.layer.{i}.adapter_module.{theirs}.{n}"] = [Place(f"{key}.{ours}.{n}")]
        model = ps.adapt(audio_classifier(spec, state), method)
        give(model.adapters["default"], state, places, {})
        seen: dict[str, Any] = {}
        wanted = {k: v for k, v in tensors.items() if k.startswith("out.layer") and k.endswith(case)}
        for key in wanted:
            number = re.fullmatch(r"out\.layer(\d+)\..*", key)
            assert number is not None
            listen(model, f"encoder.layers.{number[1]}", key, seen)
        with torch.no_grad():
            near(model(tensors["in.input_values"]), tensors[f"out.logits.{case}"], f"out.logits.{case}")
        for key, value in wanted.items():
            near(seen[key], value, key)


def conformer(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    given = spec["method"]
    branches, insertion = in_branches(given["adapter_type"]), given["seq_or_par"]
    method = {
        "name": "conformer",
        "bottleneck": given["bottleneck"],
        "kernel": given["kernel_size"],
        "position": "both" if len(branches) == 2 else branches[0],
        "insertion": insertion,
        "residual": given["apply_residual"],
    }
    places, probes, buffers = trained_norms(spec, branches), {}, {}
    names = {"pwise_conv1": "down", "dwise_conv": "conv", "bnorm": "batch_norm", "pwise_conv2": "up"}
    for branch in branches:
        here = {"attn": "MHSA", "mlp": "FFN"}[branch]
        for i in layers(spec):
            key = f"encoder.layers.{i}.{beside(branch, insertion)}.conformer_{branch}"
            there = f"encoder.layer.{i}.adapter_module_{here}"
            for theirs, ours in names.items():
                for n in ("weight", "bias"):
                    places[f"{there}.{theirs}.{n}"] = [Place(f"{key}.{ours}.{n}")]
            for n in ("running_mean", "running_var", "num_batches_tracked"):
                buffers[f"{there}.bnorm.{n}"] = [Place(f"{key}.batch_norm.{n}")]
        probes.update(probed(spec, f"adapter_module_{here}", f"{beside(branch, insertion)}.conformer_{branch}"))
    added = adapter_alone(insertion, given["apply_residual"])
    compare(spec, tensors, Described(method, places, probes, added, buffers))


def mixtures(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    given = spec["method"]
    soft = given["kind"].startswith("Soft")
    branches = in_branches(given["adapter_type"], BRANCHES[given["location"]])
    twice = branches == ("attn",)  # what the published code does there
    convpass = given["expert"].startswith("convpass")
    method = {
        "name": "soft-moa" if soft else "dense-moa",
        "bottleneck": given["bottleneck"],
        "experts": given["num_adapters"],
        "position": "both" if len(branches) == 2 else branches[0],
        "expert": "convpass" if convpass else "bottleneck",
        "convolution": False,
        "double_add": twice,
    }
    if soft:
        method |= {"slots": given["num_slots"], "normalize": "official" if given.get("normalize") else "none"}
    places, probes = trained_norms(spec, branches), {}
    label = method["name"].replace("-", "_")
    for branch in branches:
        suffix = {"attn": "_mhsa", "mlp": "_ffn"}[branch] if len(branches) == 2 else ""
        below = f"{label}_{branch}" if twice else f"{MODULES[branch]}.{label}_{branch}"
        inner = f"{below}.inner" if twice else below
        for i in layers(spec):
            places.update(experts(f"encoder.layer.{i}", suffix, f"encoder.layers.{i}.{inner}", given, tensors, soft))
        probes.update(probed(spec, f"moa{suffix}", below))
    if not soft:
        tensors = mixed(spec, tensors)
    added = lambda part, args, made: (made[0] if twice else made) - args[0]  # noqa: E731
    compare(spec, tensors, Described(method, places, probes, added))


def experts(there: str, suffix: str, key: str, given: Config, tensors: Tensors, soft: bool) -> Places:
    """Separate experts of the reference, stacked ones of ours."""
    r = given["bottleneck"]
    convpass = given["expert"].startswith("convpass")
    down, up = ("adapter_down", "adapter_up") if convpass else ("linear_downsample", "linear_upsample")
    d = tensors[f"sd.model.{there}.moa{suffix}.moa.0.{up}.bias"].numel()
    places: Places = {}
    for n in range(given["num_adapters"]):
        expert, rows = f"{there}.moa{suffix}.moa.{n}", slice(n * r, (n + 1) * r)
        places[f"{expert}.{down}.weight"] = [Place(f"{key}.experts.down.weight", rows)]
        places[f"{expert}.{down}.bias"] = [Place(f"{key}.experts.down.bias", rows)]
        places[f"{expert}.{up}.weight"] = [Place(f"{key}.experts.up.weight", (slice(None), rows))]
        places[f"{expert}.{up}.bias"] = [Place(f"{key}.experts.up_bias", slice(n * d, (n + 1) * d))]
    if not soft:
        for n in ("weight", "bias"):
            places[f"{there}.router{suffix}.ff.{n}"] = [Place(f"{key}.router.{n}")]
        return places
    places[f"{there}.moa{suffix}.slot_params"] = [Place(f"{key}.phi")]
    if given.get("normalize"):
        places[f"{there}.moa{suffix}.scale"] = [Place(f"{key}.scale", theirs=None)]
    return places


def mixed(spec: Config, tensors: Tensors) -> Tensors:
    """The dense reference's probes, experts' outputs ``[B, L, d, N]`` and router's weights, mixed as it mixes them."""
    made = dict(tensors)
    for probe, path in spec["probes"].items():
        router = next((p for p, other in spec["probes"].items() if other == path.replace("moa", "router")), None)
        if ".moa" in path and router is not None:
            weights = tensors[f"probe.{router}.out"].unsqueeze(2)
            made[f"probe.{probe}.out"] = (weights * tensors[f"probe.{probe}.out"]).sum(-1)
    return made


def lora(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    given = spec["method"]
    found = re.compile(r"encoder\.layer\.(\d+)\.attention\.(?:attention|output)\.lora_(down|up)_(\w)\.weight")
    places, roles = {}, []
    for name in spec["trainable"]:
        if match := found.search(name):
            i, half, role = match[1], match[2], match[3].lower()
            roles += [role] if role not in roles else []
            part = f"encoder.layers.{i}.attention.{role}_proj.lora.lora_{'A' if half == 'down' else 'B'}"
            places[name.removeprefix("model.")] = [Place(part)]
    scale = given["scaling"]
    method = {"name": "lora", "rank": given["rank"], "alpha": scale * given["rank"], "targets": sorted(roles)}
    compare(spec, tensors, Described(method, places))


def prompts(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    given = spec["method"]
    inputs = {
        "ALL": "all",
        "CLS": "class_token",
        "PROMPTS": "prompts",
        "SPEECH": "patches",
        "PROMPTS+SPEECH": "prompts_and_patches",
    }
    method = {
        "name": "audio-prompts",
        "num_tokens": given["num_tokens"],
        "deep": given["deep"],
        "head_input": inputs[given["final_output"]],
    }
    spec = {**spec, "pooling": "mean over all tokens"}  # the method chooses
    places = {"prompt_embeddings": [Place("encoder.embeddings.prompts.prompt", theirs=0)]}
    if given["deep"]:
        places["deep_prompt_embeddings"] = [
            Place(f"encoder.layers.{i}.prompts.prompt", theirs=i - 1) for i in layers(spec) if i
        ]
    compare(spec, tensors, Described(method, places))


def prefix(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    places = {
        f"encoder.layer.{i}.attention.attention.{role}_tokens": [
            Place(f"encoder.layers.{i}.attention.prefix.prefix", ours=half, theirs=0)
        ]
        for i in layers(spec)
        for half, role in enumerate(("key", "value"))
    }
    compare(spec, tensors, Described({"name": "prefix", "num_tokens": spec["method"]["num_tokens"]}, places))


CHECKS = {
    **{
        f"ast-adapter-{kind}-{where}": bottleneck
        for kind in ("houlsby", "pfeiffer")
        for where in ("parallel", "sequential")
    },
    **{
        f"ast-conformer-{kind}-{where}": conformer
        for kind in ("houlsby", "pfeiffer")
        for where in ("parallel", "sequential")
    },
    "ast-adapter-placements": placements,
    **{f"ast-softmoa-{kind}": mixtures for kind in ("mhsa", "ffn", "houlsby", "convpass")},
    "ast-densemoa": mixtures,
    "ast-lora": lora,
    "ast-lora-qkvo": lora,
    "ast-prompt-deep": prompts,
    "ast-prompt-shallow": prompts,
    "ast-prefix": prefix,
}
