"""Tiny diffusion models built from configurations only; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = 514


def characters() -> list[str]:
    """The 256 printable stand-ins of bytes that byte-level BPE uses, in the order of its table."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def tiny_tokenizer(length: int = 77) -> Any:
    """A CLIP tokenizer of single bytes: 512 of them, then 512 (start) and 513 (end)."""
    from transformers import CLIPTokenizer

    letters = characters()
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={e: i for i, e in enumerate(entries)}, merges=[], model_max_length=length)
    assert len(tokenizer) == WORDS
    return tokenizer


def tiny_text_encoder(hidden: int = 32, layers: int = 2, length: int = 77) -> Any:
    """A CLIP text model over the tokens of ``tiny_tokenizer``; 36,064 parameters by default."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_hidden_layers=layers,
        max_position_embeddings=length,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config).eval()


def tiny_unet(channels: tuple[int, int] = (32, 64), groups: int = 8, condition: int = 32, **changes: Any) -> Any:
    """A conditional UNet with one attention level; 985,444 parameters, or 18,464 with ``channels=(4, 8), groups=2``."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": condition,
        "attention_head_dim": 8 if channels[0] >= 8 else 2,
        "norm_num_groups": groups,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def tiny_sdxl_unet() -> Any:
    """One that reads sizes and a pooled text of 16 numbers too."""
    return tiny_unet(
        (8, 16),
        groups=2,
        condition=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def tiny_sd3(layers: int = 1, **changes: Any) -> Any:
    """A Stable Diffusion 3 transformer: 4 heads of 8, latents of 8x8, 40,848 parameters."""
    from diffusers import SD3Transformer2DModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    }
    return SD3Transformer2DModel(**{**settings, **changes}).eval()


def tiny_flux(**changes: Any) -> Any:
    """A FLUX transformer with one double and one single block; 68,484 parameters."""
    from diffusers import FluxTransformer2DModel

    settings: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**{**settings, **changes}).eval()


def tiny_dit(layers: int = 2, **changes: Any) -> Any:
    """A class-conditional DiT of width 32 on 8x8 single-channel images, 10 classes and a null class."""
    from diffusers import DiTTransformer2DModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": layers,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 1,
    }
    return DiTTransformer2DModel(**{**settings, **changes}).eval()


def tiny_vae(channels: tuple[int, int] = (16, 32), groups: int = 8) -> Any:
    """An autoencoder with 4 latent channels that halves each side; 167,959 parameters by default."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=list(channels),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=32,
    ).eval()


def tiny_scheduler(**changes: Any) -> Any:
    """DDIM with Stable Diffusion's betas."""
    from diffusers import DDIMScheduler

    settings: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


def tiny_pipeline(folder: str | Path | None = None, *, small: bool = True, seed: int = 0) -> Any:
    """A Stable Diffusion pipeline with random weights; also saved as a pipeline folder when one is given.

    Args:
        folder: where ``save_pretrained`` writes it; None writes nothing.
        small: UNet channels (8, 16) instead of (32, 64), for tests that only need the structure.
        seed: of the weights.
    """
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet((8, 16), groups=2) if small else tiny_unet()
        vae = tiny_vae((8, 16), groups=2) if small else tiny_vae()
        text = tiny_text_encoder()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(str(folder))
    return pipeline


def tiny_t5(width: int = 32) -> tuple[Any, Any]:
    """A T5 encoder and a tokenizer of single characters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = ["\u2581", *map(chr, range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=32)


def tiny_family(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """A whole pipeline with random weights in ``folder``: "sdxl", "sd3", "flux" or "dit" (3 classes)."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    def projecting(width: int = 16) -> Any:
        config = tiny_text_encoder().config
        config.projection_dim = width
        return CLIPTextModelWithProjection(config).eval()

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = tiny_vae((8, 16), groups=2)
        one, two = {"tokenizer": tiny_tokenizer()}, {"tokenizer_2": tiny_tokenizer()}
        flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if kind in ("sd3", "flux"):
            vae.register_to_config(shift_factor=0.1)
        if kind == "sdxl":
            unet = tiny_sdxl_unet()
            encoders = {"text_encoder": tiny_text_encoder(), "text_encoder_2": projecting()}
            scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
            pipe = diffusers.StableDiffusionXLPipeline(
                vae=vae, unet=unet, scheduler=scheduler, **encoders, **one, **two
            )
        elif kind == "sd3":
            third, tokenizer = tiny_t5(64)
            encoders = {"text_encoder": projecting(), "text_encoder_2": projecting(), "text_encoder_3": third}
            transformer = tiny_sd3(layers=2, joint_attention_dim=64, pooled_projection_dim=32)
            pipe = diffusers.StableDiffusion3Pipeline(
                transformer=transformer, scheduler=flow, vae=vae, tokenizer_3=tokenizer, **encoders, **one, **two
            )
        elif kind == "flux":
            second, tokenizer = tiny_t5()
            encoders = {"text_encoder": tiny_text_encoder(), "text_encoder_2": second, "tokenizer_2": tokenizer}
            pipe = diffusers.FluxPipeline(
                scheduler=flow, vae=vae, transformer=tiny_flux(in_channels=16), **encoders, **one
            )
        else:
            dit = tiny_dit(in_channels=4, out_channels=8, num_embeds_ada_norm=3)
            names = dict(enumerate("abc"))
            pipe = diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler(), id2label=names)
    pipe.save_pretrained(str(folder))
    return Path(folder)


def draw(pipeline: Any, prompt: str = "a dog", *, steps: int = 2, side: int = 32, seed: int = 0, **options: Any) -> Any:
    """One image as ``[H, W, C]`` numbers in 0..1, always the same for the same weights."""
    noise = torch.Generator("cpu").manual_seed(seed)
    made = pipeline(
        prompt, num_inference_steps=steps, height=side, width=side, generator=noise, output_type="np", **options
    )
    return made.images[0]
