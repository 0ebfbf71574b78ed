"""Low-bit adapters: outputs and gradients, code books, quantised weights and packed bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from golden_cases import Case, Config, NotCoveredError, Place, Tensors, blocks, group, head, vit


def _method(name: str, config: Config) -> dict[str, object]:
    if config["bits"] not in (1, 2, 4, 8):
        raise NotCoveredError(f"{config['bits']} bits")
    keys = ("bottleneck", "bits", "dropout", "bi_head")
    return {"name": name, "scale": float(config["scale"]), **{k: config[k] for k in keys}}


def _head(config: Config) -> dict[str, list[Place]]:
    return {"head.weight": [Place("head.bi_head.matrix.weight")]} if config["bi_head"] else head()


def _backbone(config: Config, tensors: Tensors) -> nn.Module:
    state = group(tensors, "state.")
    state.setdefault("head.bias", torch.zeros(config["num_classes"]))
    return vit(config, state)


def _storage(tensors: Tensors, ours: dict[str, str]) -> Callable[[nn.Module], None]:
    """Compare what each matrix of the reference becomes with that of ours, by the path of our matrix."""

    def compare(model: nn.Module) -> None:
        adapter = model.adapters["default"]
        files = adapter.stored()
        for reference, path in ours.items():
            matrix = adapter.get_submodule(path)
            if (wanted := tensors.get(f"quant.{reference}")) is not None:
                torch.testing.assert_close(matrix.quantised().detach(), wanted, atol=1e-6, rtol=1e-5)
            if (wanted := tensors.get(f"code.{reference}")) is not None:
                torch.testing.assert_close(torch.tensor(matrix.book[0]), wanted.sort().values, atol=1e-5, rtol=1e-5)
            if (wanted := tensors.get(f"dump.{reference}.bytes")) is not None:
                assert torch.equal(files[f"{path}.codes"], wanted), f"packed bytes of {reference}"
                stored = torch.stack((files[f"{path}.mean"], files[f"{path}.std"]))
                torch.testing.assert_close(stored, tensors[f"dump.{reference}.mean_std"], atol=1e-7, rtol=1e-5)
        inputs = {k.removesuffix(".in"): v for k, v in group(tensors, "inter.").items() if k.endswith(".in")}
        for reference, x in inputs.items():
            down, up = (f"{reference}.adapter_{n}" for n in ("down", "up"))
            _tap(adapter, (ours[down], ours[up]), "lora" in reference, x, tensors[f"inter.{reference}.out"])

    return compare


def _tap(adapter: nn.Module, pair: tuple[str, str], linear: bool, x: Tensor, wanted: Tensor) -> None:
    down, up = (adapter.get_submodule(path) for path in pair)
    h = down(x)
    torch.testing.assert_close(up(h if linear else h.relu()).detach(), wanted, atol=1e-5, rtol=1e-4)


def adaptformer(config: Config, tensors: Tensors) -> Case:
    places, ours = _head(config), {"head": "head.bi_head.matrix"} if config["bi_head"] else {}
    for i in blocks(config):
        for n in ("down", "up"):
            reference, path = f"blocks.{i}.adapter_mlp.adapter_{n}", f"blocks.{i}.bi_adapter.{n}"
            places[f"{reference}.weight"], ours[reference] = [Place(f"{path}.weight")], path
    return Case(_backbone(config, tensors), _method("bi-adaptformer", config), places, more=_storage(tensors, ours))


def lora(config: Config, tensors: Tensors) -> Case:
    places, ours = _head(config), {"head": "head.bi_head.matrix"} if config["bi_head"] else {}
    for i in blocks(config):
        for s, role in enumerate("qv"):
            for n in ("down", "up"):
                reference, path = f"blocks.{i}.attn.lora_{role}.adapter_{n}", f"blocks.{i}.attn.qkv.bi_lora.{n}.{s}"
                places[f"{reference}.weight"], ours[reference] = [Place(f"{path}.weight")], path
    return Case(
        _backbone(config, tensors), _method("bi-lora", config), places, mergeable=True, more=_storage(tensors, ours)
    )


CASES = {
    f"vision-{n}": adaptformer
    for n in ("bi-adaptformer", "bi-adaptformer-bihead", "adaptformer-2bit", "adaptformer-4bit", "adaptformer-8bit")
}
CASES |= {f"vision-{n}": lora for n in ("bi-lora", "bi-lora-bihead", "lora-2bit", "lora-4bit", "lora-8bit")}
