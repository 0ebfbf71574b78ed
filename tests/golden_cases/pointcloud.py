"""Point transformers: the plain classifier by itself, and with VPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Tensors, group
from peft_suite.pointcloud.models.transformer import PointTransformer

TOLERANCE = 1e-4  # relative to the largest value; index tensors exact


def reference_state(config: Config, tensors: Tensors) -> Tensors:
    """The reference's weights; int8 ones times their power of two."""
    scale = config["spec"].get("int8_scale", {})
    state = group(tensors, "state.")
    return {k: v.float() * scale[k] if v.dtype == torch.int8 else v for k, v in state.items()}


def point_transformer(config: Config, state: Tensors) -> PointTransformer:
    """Our model of the golden's sizes with the reference's weights, loaded strictly; keys that are not ours are the
    method's."""
    known = ("with_color", "type", "npoints", "batch")
    if extra := {k for k in known[:2] if config.get(k)}:
        raise NotCoveredError(f"config fields {sorted(extra)}")
    heads = {9: "mlp", 4: "short", 1: "linear"}
    layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("cls_head_finetune."))
    model = PointTransformer(
        config["cls_dim"],
        embed_dim=config["trans_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        groups=config["num_group"],
        group_size=config["group_size"],
        encoder_dim=config["encoder_dims"],
        drop_path=config.get("drop_path", config.get("drop_path_rate", 0.0)),
        head=heads[layers],  # type: ignore[arg-type]
    )
    wanted = model.state_dict()
    model.load_state_dict({k: state[k] for k in wanted if k in state}, strict=True)
    return model.eval()


def close(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Fail unless every value agrees to ``tolerance`` of the largest one."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    gap = float((got.detach() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    assert gap < tolerance, f"{what}: {gap:.2e} of the largest value"


def tap(model: nn.Module, paths: dict[str, str]) -> dict[str, Any]:
    """What the modules at ``paths`` give, by name, filled by the next forward."""
    seen: dict[str, Any] = {}
    for name, path in paths.items():
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
    return seen


def compare(seen: dict[str, Any], tensors: Tensors) -> None:
    """Every ``out.*`` of the golden that was tapped."""
    for name, made in seen.items():
        if f"out.{name}" in tensors:
            close(made, tensors[f"out.{name}"], name)


def loss_of(logits: Tensor, tensors: Tensors) -> Tensor:
    """Compares the logits and the loss, and gives the loss."""
    close(logits, tensors["out.logits"], "logits")
    loss = torch.nn.functional.cross_entropy(logits, tensors["in.label"])
    close(loss.reshape(1), tensors["out.loss"].reshape(1), "loss")
    return loss


def pointmae(config: Config, tensors: Tensors) -> None:
    model = point_transformer(config, reference_state(config, tensors))
    blocks = {f"block{i}": f"blocks.blocks.{i}" for i in range(config["depth"])}
    paths = {"geometry": "group_divider", "tokens": "encoder", "pos": "pos_embed", "norm": "norm", **blocks}
    seen = tap(model, paths)
    loss_of(model(tensors["in.points"]), tensors).backward()
    geometry = seen.pop("geometry")
    assert torch.equal(geometry.picks, tensors["out.fps_idx"].long()), "farthest points"
    close(geometry.centers, tensors["out.center"], "centers", 1e-7)
    close(geometry.groups, tensors["out.neighborhood"], "groups", 1e-6)
    compare(seen, tensors)
    ours = dict(model.named_parameters())
    for key, wanted in group(tensors, "grad.").items():
        gradient = ours[key].grad
        assert gradient is not None, key
        close(gradient, wanted, f"grad.{key}")


def pointvpt(config: Config, tensors: Tensors) -> None:
    state = reference_state(config, tensors)
    model = point_transformer(config, state)
    blocks = {f"block{i}": f"blocks.blocks.{i}" for i in range(config["depth"])}
    seen = tap(model, {"head_input": "pool", **blocks})  # before adapting: the blocks' outputs with their prompts
    ps.adapt(model, {"name": "vpt", "num_tokens": config["prompt_nums"], "deep": True})
    adapter = model.adapters["default"]  # type: ignore[index]
    ours = dict(adapter.named_parameters())
    keys = {"cls_token": "direct.cls_token", "cls_pos": "direct.cls_pos"}
    for i in range(config["depth"]):
        keys[f"cls_prompt_list.{i}"] = f"blocks.blocks.{i}.vpt.prompt"
        keys[f"cls_prompt_pos_list.{i}"] = f"blocks.blocks.{i}.vpt.position"
    with torch.no_grad():
        for theirs, mine in keys.items():
            ours[mine].copy_(state[theirs].reshape(ours[mine].shape))
    loss_of(model(tensors["in.points"]), tensors).backward()
    compare(seen, tensors)
    for key, wanted in group(tensors, "grad.").items():
        gradient = ours[keys[key]].grad
        assert gradient is not None, key
        close(gradient.flatten(), wanted.flatten(), f"grad.{key}")


CHECKS = {"pointmae-classifier": pointmae, "pointvpt-deep-classifier": pointvpt}
