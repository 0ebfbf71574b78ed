"""IDPT on the plain point transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Tensors, group
from golden_cases.pointcloud import close, compare, loss_of, point_transformer, reference_state, tap


def narrowed(config: Config, state: Tensors) -> Tensors:
    """The state with a first layer of the width that the plain model has; the method brings its own."""
    weight, width = state["cls_head_finetune.0.weight"], 2 * config["trans_dim"]
    fitting = torch.zeros(weight.shape[0], width)
    fitting[:, : weight.shape[1]] = weight[:, :width]
    return {**state, "cls_head_finetune.0.weight": fitting}


def give(model: nn.Module, state: Tensors, keys: dict[str, str]) -> None:
    """Reference tensors to the adapter's places: every trained value and every buffer of the method gets one."""
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    ours = adapter.state_dict()
    lost = {n for n in ours if n not in keys.values() and not n.endswith("num_batches_tracked")}
    assert not lost, f"values of ours without a counterpart in the reference: {sorted(lost)}"
    with torch.no_grad():
        for theirs, mine in keys.items():
            ours[mine].copy_(state[theirs].reshape(ours[mine].shape))


def head_keys(state: Tensors, first: str) -> dict[str, str]:
    """The classifier's tensors; ``first`` is the label of its first layer."""
    keys = {}
    for key in state:
        path, _, name = key.rpartition(".")
        if path.startswith("cls_head_finetune") and name != "num_batches_tracked":
            label = "statistics" if name.startswith("running") else first if path.endswith(".0") else "trained"
            keys[key] = f"{path}.{label}.{name}"
    return keys


def compare_gradients(model: nn.Module, tensors: Tensors, keys: dict[str, str]) -> None:
    ours = dict(model.adapters["default"].named_parameters())  # type: ignore[index,union-attr]
    wanted = group(tensors, "grad.")
    assert wanted
    for key, gradient in wanted.items():
        if key not in keys and key.startswith("blocks.cls.bn"):
            continue  # of a batch norm that is never called
        found = ours[keys[key]].grad
        assert found is not None, key
        close(found.flatten(), gradient.flatten(), f"grad.{key}")


def generator_keys(config: Config, state: Tensors, part: str) -> dict[str, str]:
    """The generator's tensors by the names of the sequences, which are the modules that are called."""
    if config["prompt_module"] == "transformer":
        return {
            key: f"{part}.generator.block.{key.removeprefix('blocks.cls.blocks.blocks.0.')}"
            for key in state
            if key.startswith("blocks.cls.blocks.blocks.0.")
        }
    keys = {}
    for number in ("1", "2", "3", "5"):
        place = f"{part}.generator" if number == "5" else f"{part}.generator.edges.{int(number) - 1}"
        theirs = f"blocks.cls.conv{number}"
        if f"{theirs}.0.weight" in state:
            keys[f"{theirs}.0.weight"] = f"{place}.{'mix' if number == '5' else 'conv'}.weight"
            for name in ("weight", "bias", "running_mean", "running_var"):
                keys[f"{theirs}.1.{name}"] = f"{place}.norm.{name}"
    return keys


def idpt(config: Config, tensors: Tensors) -> None:
    known = {"dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer"}
    if config["prompt_module"] not in known:
        raise NotCoveredError(f"prompt_module {config['prompt_module']!r}")
    state, layer = reference_state(config, tensors), config["prompt_layer"]
    model = point_transformer(config, narrowed(config, state))
    seen = tap(model, {f"block{i}": f"blocks.blocks.{i}" for i in range(config["depth"])})
    method = {
        "name": "idpt",
        "generator": config["prompt_module"],
        "prompt_layer": layer,
        "cls_type": config["cls_type"],
        "neighbors": config.get("k", 20),
    }
    ps.adapt(model, method)
    part = f"blocks.blocks.{layer}.idpt"
    wide = state["cls_head_finetune.0.weight"].shape[1] != 2 * config["trans_dim"]
    keys = {
        "cls_token": "direct.cls_token",
        "cls_pos": "direct.cls_pos",
        "prompt_pos": f"{part}.position",
        **generator_keys(config, state, part),
        **head_keys(state, "idpt_head" if wide else "trained"),
    }
    give(model, state, keys)
    generator = model.adapters["default"].get_submodule(f"{part}.generator")  # type: ignore[index,union-attr]
    made: dict[str, Tensor] = {}
    generator.register_forward_hook(lambda module, args, output: made.update({"in": args[0], "out": output}))
    loss_of(model(tensors["in.points"]), tensors).backward()
    compare(seen, tensors)
    close(made["in"].transpose(1, 2), tensors["in.prompt_generator"], "in.prompt_generator")
    close(made["out"], tensors["out.prompt"], "out.prompt")
    # batch norms have two names in the reference, their own and that of the sequence they are called in
    for key, mine in list(keys.items()):
        if key.startswith("blocks.cls.conv") and ".1." in key:
            alias = key.replace(".conv", ".bn").replace(".1.", ".")
            if alias in state and torch.equal(state[alias], state[key]):
                keys[alias] = mine
    compare_gradients(model, tensors, keys)


CHECKS = {"idpt-classifier": idpt}
