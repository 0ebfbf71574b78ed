"""PointGST: the graph by itself, and the classifier on the bases that the golden brings."""

from __future__ import annotations

import torch

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Tensors, group
from golden_cases.pointcloud import close, compare, loss_of, point_transformer, reference_state, tap
from peft_suite import kernels
from peft_suite.pointcloud.methods.pointgst import Spectrum, official_laplacian

_NAMES = {"down": "down", "up": "up", "adapt1": "mix", "norm_ly1": "norm_global", "norm_ly2": "norm_local"}


def pointgst(config: Config, tensors: Tensors) -> None:
    if config.get("tsne"):
        raise NotCoveredError("tsne returns features instead of logits")
    state = reference_state(config, tensors)
    model = point_transformer(config, state)
    seen = tap(model, {"geometry": "group_divider", **{f"block{i}": f"blocks.blocks.{i}" for i in blocks(config)}})
    method = {"name": "pointgst", "rank": config["rank"], "local": config["local"], "official": True}
    ps.adapt(model, method)
    adapter = model.adapters["default"]  # type: ignore[index]
    ours = dict(adapter.named_parameters())
    keys = {"cls_token": "direct.cls_token", "cls_pos": "direct.cls_pos"}
    for i in blocks(config):
        for theirs, mine in _NAMES.items():
            for kind in ("weight", "bias"):
                keys[f"blocks.blocks.{i}.gft_adapter.{theirs}.{kind}"] = f"blocks.blocks.{i}.pointgst.{mine}.{kind}"
    with torch.no_grad():
        for theirs, mine in keys.items():
            ours[mine].copy_(state[theirs].reshape(ours[mine].shape))
    spectrum = next(e.part for e in adapter.edits if isinstance(e.part, Spectrum))
    spectrum.bases = lambda centers: (tensors["in.U"], tensors["in.sub_U"], tensors["in.idx0"])  # type: ignore[method-assign]
    for i in blocks(config):
        part = adapter.get_submodule(f"blocks.blocks.{i}.pointgst")
        part.register_forward_hook(
            lambda module, args, out, i=i: seen.update({f"adapter{i}": out, f"adapter{i}.in": args[0]})
        )
    loss_of(model(tensors["in.points"]), tensors).backward()
    centers = seen.pop("geometry").centers
    close(centers, tensors["out.center"], "centers", 1e-7)
    graph(config, tensors)
    for i in blocks(config):
        close(seen.pop(f"adapter{i}.in"), tensors[f"in.adapter{i}"], f"in.adapter{i}")
    compare(seen, tensors)
    for key, wanted in group(tensors, "grad.").items():
        gradient = ours[keys[key]].grad
        assert gradient is not None, key
        close(gradient.flatten(), wanted.flatten(), f"grad.{key}")


def graph(config: Config, tensors: Tensors) -> None:
    """Laplacians, the space that the eigenvectors span with their eigenvalues, and the order along the curve."""
    centers = tensors["out.center"]
    order = kernels.morton_order(centers)
    assert torch.equal(order.order, tensors["in.idx0"]) and torch.equal(order.inverse, tensors["in.idx1"])
    runs = kernels.gather_points(centers, order.order).view(-1, config["local"], 3)
    for points, prefix in ((centers, ""), (runs, "sub_")):
        wanted = tensors[f"out.{prefix}laplacian"]
        basis = kernels.graph_fourier_basis(points, delta="batch")
        close(kernels.graph_laplacian(points, delta="batch"), wanted, f"{prefix}laplacian")
        close(basis.v @ torch.diag_embed(basis.w) @ basis.v.mT, wanted, f"{prefix}U diag(w) U'")
        close(official_laplacian(points), wanted, f"official {prefix}laplacian")


def blocks(config: Config) -> range:
    return range(config["depth"])


CHECKS = {"pointgst-classifier": pointgst}
