"""From files and a pipeline to splits ready to train on: readers, conditions, noise, the task and its pictures."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peft_suite.diffusion import conditions, priors
from peft_suite.diffusion.buckets import bucket_sizes
from peft_suite.diffusion.conditioning import EMPTY, Condition, check_condition, labels_of
from peft_suite.diffusion.conditions import Texts
from peft_suite.diffusion.data import DiffusionDataConfig
from peft_suite.diffusion.denoising import Denoising
from peft_suite.diffusion.drawing import Draws, Noise, Pairs
from peft_suite.diffusion.images import thumbnail
from peft_suite.diffusion.listing import Listing, Sample
from peft_suite.diffusion.pipelines import load_rest
from peft_suite.diffusion.reading import Reader, Viewing, as_info
from peft_suite.diffusion.schedules import read_schedule
from peft_suite.diffusion.sentences import Sentences
from peft_suite.errors import ConfigError, DataError
from peft_suite.train import splitting
from peft_suite.train.contracts import DataSplits
from peft_suite.train.evaluation import pick_device

__all__ = ["assemble", "noise_of", "viewing_of"]

Facts = Mapping[str, Any]


def assemble(config: DiffusionDataConfig, listing: Listing, facts: Facts) -> DataSplits:
    """The splits; see :meth:`peft_suite.diffusion.data.DiffusionSource.load`."""
    if config.prediction_type:  # what draws later must know
        facts = {**facts, "scheduler": {**facts["scheduler"], "prediction_type": config.prediction_type}}
    noise = noise_of(config, facts)
    viewing = viewing_of(config, facts)
    kind, component = str(facts["kind"]), str(facts["component"])
    check_condition(config, listing, facts)
    device = pick_device(config.encode_device)
    pipeline = _open(facts, device) if facts.get("pipeline") else None
    vae = getattr(pipeline, "vae", None)
    sentences = Sentences(config, pipeline, facts) if component.startswith("text_encoder") else None
    limit = config.cache_mib * 2**20
    readers = {split: Reader(viewing, vae, config.cache, limit) for split in listing.splits}
    skipped = []
    for split, reader in readers.items():
        skipped += as_info(reader.read(listing.splits[split], split, skip=config.skip_bad), split)
        listing.splits[split] = reader.samples
        if not reader.samples:
            raise DataError(f"No usable {split} image is left: all {len(skipped)} were left out. {_first(skipped)}")
    texts = Texts(pipeline, config.cache, config.text_length) if kind == "text" and sentences is None else None
    condition = sentences or Condition(config, facts, listing, texts)
    prior = priors.prior_samples(config, facts, pipeline) if config.class_prompt else []
    if texts is not None:
        said = [text for part in listing.splits.values() for s in part for text in condition.captions(s)]
        texts.add([EMPTY, *said, *([config.class_prompt] if prior else [])])
    sets: dict[str, Any] = {}
    for split, reader in readers.items():
        train = split == "train"
        sets[split] = Draws(
            reader.samples,
            reader.clean,
            condition,
            noise,
            train=train,
            drop=condition.drop if train else 0.0,
            groups=reader.groups(),
            repeats=config.repeats if train else -(-config.val_draws // len(reader.samples)),
            seed=config.split_seed,
        )
    if prior:
        reader = Reader(viewing, vae, config.cache, limit)
        reader.read(prior, "class", skip=False)
        others = Draws(reader.samples, reader.clean, condition, noise, train=True, seed=config.split_seed + 1)
        sets["train"] = Pairs(sets["train"], others, config.prior_weight)
    lazily = any(r.kept is None for r in readers.values()) and vae is not None
    if lazily and config.workers and device.type == "cuda":
        raise ConfigError(
            "Latents are encoded while training (random crops, or more than data.cache_mib): set data.workers=0, "
            "center_crop=true, or encode_device=cpu."
        )
    if texts is not None:
        texts.release()
    task = Denoising(
        classes=listing.classes if kind == "class" else (),
        kind=str(facts["model"]),
        steps=noise.schedule.steps,
        frozen=sentences.denoiser if sentences else None,
        encode=conditions.encoder_states if sentences else None,
        artist=functools.partial(_illustrate, config, facts, listing, condition),
    )
    return DataSplits(
        sets["train"],
        sets.get("val"),
        sets.get("test"),
        listing.classes,
        _fingerprint(listing, prior),
        info=_info(config, listing, facts, noise, viewing, skipped, len(prior)),
        thumbnail=lambda dataset, index: thumbnail(_reader_of(dataset).pixels(index % len(dataset.samples))),
        sample_name=lambda dataset, index: str(dataset.samples[index % len(dataset.samples)].name),
        task=task,
    )


def noise_of(config: DiffusionDataConfig, facts: Facts) -> Noise:
    """How the pipeline's scheduler and the configuration want noise drawn.

    Raises:
        UnknownNameError, ConfigError: as :func:`peft_suite.diffusion.schedules.read_schedule` and ``weight``.
    """
    schedule = read_schedule(facts["scheduler"], config.prediction_type)
    density = config.density
    if density == "auto":
        density = "logit_normal" if schedule.family == "flow" else "uniform"
    elif density != "uniform" and schedule.family != "flow":
        raise ConfigError(f"data.density = {density!r} is for flow matching; this schedule is {schedule.family}.")
    noise = Noise(
        schedule,
        density,
        config.logit_mean,
        config.logit_std,
        config.mode_scale,
        config.snr_gamma,
        config.weighting,
        config.precondition,
        config.noise_offset,
        config.input_perturbation,
    )
    noise.weight(torch.tensor(0))  # refuses weights of another family
    return noise


def viewing_of(config: DiffusionDataConfig, facts: Facts) -> Viewing:
    """Size and channels of the images.

    Raises:
        ConfigError: a resolution that the model cannot take.
        DataError: a model of neither 1 nor 3 channels.
    """
    factor = int(facts.get("factor") or 1)
    patch = 2 if str(facts["model"]) != "UNet2DModel" else 1
    step = factor * patch
    side = config.resolution or int(facts["size"])
    if side % step or side < step:
        near = max(step, round(side / step) * step)
        raise ConfigError(f"data.resolution = {side}: must be a multiple of {step} for this model, such as {near}.")
    if side != int(facts["size"]) and str(facts["model"]) == "DiTTransformer2DModel":
        raise ConfigError(f"data.resolution = {side}: {facts['model']} reads images of {facts['size']} only.")
    channels = int(facts["channels"])
    if channels not in (1, 3):
        raise DataError(f"The model reads images of {channels} channels; images have 1 or 3.")
    buckets = bucket_sizes(side, _bucket_step(step, side), config.bucket_ratio) if config.buckets else ()
    return Viewing((side, side), channels, config.interpolation, buckets, not config.center_crop, config.random_flip)


def _bucket_step(step: int, side: int) -> int:
    """Multiples of 64 pixels as everywhere, of fewer for small models."""
    return max(step, min(64, side // 4 // step * step))


def _first(skipped: Sequence[Mapping[str, str]]) -> str:
    return f"The first, {skipped[0]['name']!r}, {skipped[0]['reason']}." if skipped else ""


def _open(facts: Facts, device: torch.device) -> Any:
    """The pipeline without what trains elsewhere; its text encoder and VAE on ``device``."""
    skip = () if str(facts["component"]).startswith("text_encoder") else (str(facts["denoiser"]),)
    pipeline = load_rest(facts, without=skip)
    for name in skip:  # some pipelines look up widths in the denoiser's config while they encode
        pipeline.__dict__[name] = _Described(facts)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval().to(device)
    return pipeline


class _Described:
    """The config of a denoiser that is not loaded here."""

    def __init__(self, facts: Facts) -> None:
        self.config = SimpleNamespace(**facts.get("widths", {}))


def _reader_of(dataset: Any) -> Reader:
    draws = dataset.instances if isinstance(dataset, Pairs) else dataset
    clean: Any = draws.clean
    reader: Reader = clean.__self__
    return reader


def _illustrate(
    config: DiffusionDataConfig, facts: Facts, listing: Listing, condition: Any, model: nn.Module, folder: Path
) -> list[dict[str, Any]]:
    """Pictures for the report."""
    if not config.pictures:
        return []
    from peft_suite.diffusion.pictures import sheet

    return sheet(config, facts, listing, condition, model, folder)


def _info(
    config: DiffusionDataConfig,
    listing: Listing,
    facts: Facts,
    noise: Noise,
    viewing: Viewing,
    skipped: Sequence[Mapping[str, str]],
    prior: int,
) -> dict[str, Any]:
    counts = {}
    for split, part in listing.splits.items():
        tally = Counter(sample.label for sample in part)
        counts[split] = {name: tally[i] for i, name in enumerate(listing.classes)}
    found: dict[str, Any] = {
        "layout": listing.layout,
        "sizes": {split: len(part) for split, part in listing.splits.items()},
        "counts": counts if listing.classes else {},
        "learns": noise.schedule.family,
        "timesteps": noise.density,
        "resolution": viewing.size[0],
        "buckets": [f"{h}x{w}" for h, w in viewing.buckets],
        "class_images": prior or None,
        "skipped": len(skipped),
        "skipped_files": list(skipped[:100]),
        "preprocessing": {**facts, "size": viewing.size[0], "labels": list(labels_of(config, listing, facts))},
        **listing.notes,
    }
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _fingerprint(listing: Listing, prior: Sequence[Sample]) -> str:
    """sha256 over (split, name, label, captions, size of the file)."""
    parts = {**listing.splits, "class": prior}
    return splitting.digest_of(
        (split, s.name, f"{s.label} {' | '.join(s.captions)}", str(s.size or _size(s.path)))
        for split, part in parts.items()
        for s in part
    )


def _size(path: str) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else -1
