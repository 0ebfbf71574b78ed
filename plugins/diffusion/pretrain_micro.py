"""Make the weights of the embedded micro UNet: ``python -m peft_suite.diffusion.pretrain_micro``.

Class-conditional denoising of 1,100 upright digits of scikit-learn:

    loss = || e - unet(sqrt(a_t) x + sqrt(1 - a_t) e, t, class) ||^2     a_t: squaredcos_cap_v2, 1000 steps

where every tenth class is replaced by "none"; AdamW without decay and a running mean of the weights. A batch depends
on seed and step alone. What is interrupted goes on with ``--resume``. About two minutes on one core. At the end, the
loss on the 697 other digits tells what was learnt.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from peft_suite.diffusion import micro, shifted
from peft_suite.diffusion.schedules import Schedule, noisy, read_schedule
from peft_suite.storage import write_bytes
from peft_suite.train import pretraining

BATCH = 64
DROPPED = 0.1  # share of classes that are replaced by "none"
EMA = 0.995
ROUND = 100  # steps between lines, and between checkpoints


class Denoise(nn.Module):
    """The loss of a batch."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timestep: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, of the shape of ``noisy`` ``[B, C, H, W]``."""
        return functional.mse_loss(self.unet(noisy, timestep, class_labels=labels).sample, noise)


def batches(seed: int) -> Callable[[int], pretraining.Batch]:
    """``step -> (noisy, timestep, class, noise)``."""
    images, labels = shifted.source()

    def batch(step: int) -> pretraining.Batch:
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < DROPPED
        return noised(images[rows], torch.where(dropped, micro.NULL, labels[rows]), draw)

    return batch


def noised(images: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 ``[B, 8, 8, 1]`` at random times: noisy ``[B, 1, 8, 8]``, timestep, class, noise."""
    x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    schedule = _schedule()
    when = torch.randint(schedule.steps, (len(x),), generator=draw)
    noise = torch.randn(x.shape, generator=draw)
    return noisy(schedule, x, noise, when), when, labels, noise


@functools.cache
def _schedule() -> Schedule:
    return read_schedule(micro.SCHEDULER)


@torch.no_grad()
def held_out_loss(unet: nn.Module, images: Tensor, labels: Tensor, seed: int = 0, draws: int = 4) -> float:
    """The loss on uint8 ``[N, 8, 8, 1]``, ``draws`` times each; the same seed draws the same noise."""
    draw, model = torch.Generator().manual_seed(seed), Denoise(unet)
    return float(torch.stack([model(*noised(images, labels, draw)) for _ in range(draws)]).mean())


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m peft_suite.diffusion.pretrain_micro", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--resume", action="store_true", help="go on from OUT's .partial.pt, if there is one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / micro.ASSET)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one summation order on every machine with the same instruction set
    torch.manual_seed(options.seed)
    begun = time.perf_counter()
    unet = micro.build(pretrained=False)
    model = Denoise(unet)
    partial = options.out.with_suffix(".partial.pt")
    state = pretraining.read_partial(partial, options.seed) if options.resume else None
    steps = state["steps"] if state else options.steps
    pretraining.pretrain(
        model,
        batches(options.seed),
        partial,
        seed=options.seed,
        steps=steps,
        lr=options.lr,
        state=state,
        every=ROUND,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        ema=EMA,
    )
    tensors = pretraining.half(unet.state_dict())
    unet.load_state_dict({k: v.float() for k, v in tensors.items()})
    unet.eval()
    loss = held_out_loss(unet, *shifted.upright())
    metadata = {
        "format": "pt",
        "model": f"UNet2DModel {dict(micro.ARCHITECTURE)}",
        "made_by": f"python -m peft_suite.diffusion.pretrain_micro --seed {options.seed} --steps {steps}",
        "data": f"the first {shifted.SOURCE} of scikit-learn's digits (UCI, CC BY 4.0)",
        "weights_licence": "Apache-2.0",
        "seed": str(options.seed),
        "steps": str(steps),
        "held_out_loss": f"{loss:.4f}",
        "torch": torch.__version__,
    }
    write_bytes(options.out, save(tensors, metadata))
    partial.unlink(missing_ok=True)
    print(f"loss on digits that were not trained on: {loss:.4f}")
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {steps} steps, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
