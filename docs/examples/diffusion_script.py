"""Fine-tune a text-to-image pipeline as diffusers' scripts do, with one changed line: SaRA trains single weights.

    python diffusion_script.py PIPELINE IMAGES --prompt "a photo of sks dog" --steps 400 --out dog

PIPELINE is a local folder of Stable Diffusion, IMAGES a folder of images. The line is marked; whatever method stands in
it, the loop below stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch.nn import functional

import peft_suite as ps
from peft_suite.diffusion.images import EXTENSIONS, fit, open_image


def images_of(folder: Path, size: int) -> torch.Tensor:
    """``[N, 3, size, size]`` between -1 and 1."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
    views = [torch.from_numpy(fit(open_image(p), (size, size), 3).pixels) for p in files]
    return torch.stack(views).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline")
    parser.add_argument("images", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--method", default="sara(budget='5M')")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    ps.adapt(pipe.unet, args.method)  # <- the changed line: freezes the UNet and opens what the method trains

    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=args.steps)
    events = ps.events(pipe.unet)  # what a method does around steps: re-selection, penalties
    events.begin(args.steps)

    with torch.no_grad():
        pixels = images_of(args.images, args.resolution).to(device)
        moments = [pipe.vae.encode(x[None]).latent_dist for x in pixels]
        states, _ = pipe.encode_prompt(args.prompt, device, 1, False)

    pipe.unet.train()
    for step in range(args.steps):
        rows = torch.randint(len(moments), (args.batch_size,)).tolist()
        latents = torch.cat([moments[i].sample() for i in rows]) * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), device=device)
        goal = noise
        if scheduler.config.prediction_type == "v_prediction":
            goal = scheduler.get_velocity(latents, noise, times)
        noisy = scheduler.add_noise(latents, noise, times)
        said = pipe.unet(noisy, times, states.expand(len(rows), -1, -1)).sample
        loss = functional.mse_loss(said.float(), goal.float())
        penalty = events.penalty()
        (loss if penalty is None else loss + penalty).backward()
        events.before_step(step, optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        events.after_step(step, optimizer)
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    events.finish()

    ps.save(pipe.unet, args.out)  # ps.load(another_pipe.unet, args.out) puts it on a plain pipeline
    print(ps.summary(pipe.unet))
    pipe.unet.eval()
    side = {"height": args.resolution, "width": args.resolution}
    generator = torch.Generator("cpu").manual_seed(args.seed)
    image = pipe(args.prompt, num_inference_steps=25, generator=generator, **side).images[0]
    image.save(args.out / "sample.png")


if __name__ == "__main__":
    main()
