"""A second sight of frozen modules: what they compute without any adapter, while adapters are attached.

The view of a module is an object of its class that holds the very same dictionaries of parameters and buffers, and
nothing that was attached to the module: no hooks, no replaced forward, no stand-ins for parameters. It is always in
eval mode. So it costs no memory, follows every ``to()``, load and swap of the parameters, and switches nothing on or
off: running it in the middle of the model's forward, in threads or in a compiled graph disturbs nobody.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["FrozenView", "view"]


def view(module: nn.Module) -> nn.Module:
    """The module as it is without adapters, in eval mode, on the same tensors."""
    cls = type(module)
    twin: Any = cls.__new__(cls)
    nn.Module.__init__(twin)
    own = {*twin.__dict__, *module._parameters, "forward", "train"}
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    twin.__dict__.update(_parameters=module._parameters, _buffers=module._buffers, training=False)
    twin.__dict__["_modules"] = {n: None if m is None else view(m) for n, m in module._modules.items()}
    found: nn.Module = twin
    return found


class FrozenView:
    """``view(module)``, called like the module. Kept by parts as a plain attribute, outside the module tree.

    Under FSDP2 the module's tensors are gathered for the call, as the module itself would have them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.twin = module, view(module)

    def __call__(self, *args: Any) -> Any:
        """What the module without adapters makes of the arguments."""
        sharded: Any = self.module if hasattr(self.module, "unshard") else None
        if sharded is not None:
            sharded.unshard()
        out = self.twin(*args)
        if sharded is not None:
            sharded.reshard()
        return out
