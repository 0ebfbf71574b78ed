"""The diffusion plugin's data source: images, what is said about them, and how they are noised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft_suite.diffusion.images import INTERPOLATIONS
from peft_suite.diffusion.listing import FORMATS, Listing, Sample, read_layout
from peft_suite.errors import ConfigError, DataError, UnknownNameError
from peft_suite.train import splitting
from peft_suite.train.contracts import DataConfig, DataSplits

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


__all__ = ["DiffusionDataConfig", "DiffusionSource", "own", "source"]

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class DiffusionDataConfig(DataConfig):
    """Layouts are told in :mod:`peft_suite.diffusion.listing`; names follow diffusers' training scripts.

    Attributes:
        format: "auto", "metadata", "classes", "images" or "digits-shifted".
        caption_column: of metadata.
        instance_prompt: caption of images without one; ``{}`` stands for the class's name.
        classes: class names in index order; () takes the folders'.
        only: train on these classes alone, counted from 0 in this order.
        labels: label of each class in the model; () counts from 0.
        resolution: side of the images; 0 takes the backbone's.
        center_crop: False draws the place of the crop in every epoch. Latents are then encoded anew each time; the
            scripts of diffusers crop at random by default, here the centre is the default so that latents can be kept.
        random_flip: mirror half of the draws.
        interpolation: "lanczos", "bilinear", "bicubic", "nearest" or "box".
        buckets: keep aspect ratios, see :mod:`peft_suite.diffusion.buckets`; ``bucket_ratio`` is the longest side over
            the shortest.
        condition_dropout: share of training samples without caption or class, for guidance; -1 takes 0.1 for class
            labels with a null class, 0 for captions. Models that drop labels themselves (DiT) get none.
        cache: folder for latents and text embeddings; "" keeps them in memory only.
        cache_mib: a split whose pixels or latents take at most this much stays in memory.
        encode_device: where VAE and text encoders run before training.
        text_length: tokens of T5; 0 takes the pipeline's usual number.
        guidance: embedded guidance that FLUX is told in training.
        repeats: how often every image counts in an epoch.
        val_draws: noisy versions that a validation measures at least; few images are measured several times.
        prediction_type: what is learnt instead of the scheduler's own, for checkpoints that are meant to change.
        snr_gamma: min-SNR weights (5 is usual), 0 for none.
        noise_offset: adds so much of one number per channel to the noise (0.1 lets SD draw dark images).
        input_perturbation: adds so much more noise to the input than to the target (Ning et al., ICML 2023).
        density: of timesteps in flow matching: "auto" (logit_normal there, uniform elsewhere), "uniform",
            "logit_normal" with ``logit_mean`` and ``logit_std``, "mode" with ``mode_scale``.
        weighting: in flow matching: "none", "sigma_sqrt", "cosmap".
        precondition: in flow matching, measure the error of the clean latents.
        class_data_dir, class_prompt, num_class_images, prior_weight: prior preservation (DreamBooth): images that the
            base model draws for ``class_prompt`` are added to ``class_data_dir`` until there are so many, and train
            beside the instances with this weight.
        prior_steps, prior_guidance: how they are drawn.
        concept: of textual inversion: "object" or "style" chooses the sentences that the new word stands in.
        validation_prompt: texts of the pictures in the report; () takes up to four captions of the data.
        pictures: how many are drawn; 0 for none, -1 for 20 of pixel models and 4 of pipelines. ``picture_steps`` and
            ``picture_guidance`` say how; guidance 0 takes 7.5 for prompts and 1 for classes.
    """

    caption_column: str = "text"
    instance_prompt: str = ""
    classes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    resolution: int = 0
    center_crop: bool = True
    random_flip: bool = False
    interpolation: str = "lanczos"
    buckets: bool = False
    bucket_ratio: float = 2.0
    condition_dropout: float = -1.0
    cache: str = ""
    cache_mib: int = 1024
    encode_device: str = "auto"
    text_length: int = 0
    guidance: float = 1.0
    repeats: int = 1
    val_draws: int = 32
    prediction_type: str = ""
    snr_gamma: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    density: Literal["auto", "uniform", "logit_normal", "mode"] = "auto"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    precondition: bool = False
    class_data_dir: str = ""
    class_prompt: str = ""
    num_class_images: int = 100
    prior_weight: float = 1.0
    prior_steps: int = 50
    prior_guidance: float = 7.5
    concept: Literal["object", "style"] = "object"
    validation_prompt: tuple[str, ...] = ()
    pictures: int = -1
    picture_steps: int = 25
    picture_guidance: float = 0.0

    def validate(self) -> None:
        super().validate()
        if self.format not in FORMATS:
            raise UnknownNameError("data format", self.format, FORMATS)
        if self.interpolation not in INTERPOLATIONS:
            raise UnknownNameError("interpolation", self.interpolation, INTERPOLATIONS)
        self.require("augment", self.augment == "none", "must be none; use random_flip and center_crop")
        for name in ("resolution", "cache_mib", "snr_gamma", "noise_offset", "input_perturbation", "prior_weight"):
            self.require(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("repeats", "val_draws", "num_class_images", "picture_steps", "prior_steps"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1")
        self.require("pictures", self.pictures >= -1, "must be at least 0, or -1 for the usual number")
        self.require("logit_std", self.logit_std > 0, "must be above 0")
        self.require("bucket_ratio", self.bucket_ratio >= 1, "must be at least 1")
        self.require("condition_dropout", self.condition_dropout <= 1, "must be at most 1, or -1 for the usual")
        self.require("classes", len(set(self.classes)) == len(self.classes), "names a class twice")
        prior = bool(self.class_prompt) + bool(self.class_data_dir)
        self.require("class_prompt", prior != 1, "prior preservation needs class_prompt and class_data_dir")
        self.require("buckets", not (self.buckets and prior), "cannot be used with prior preservation")
        self.require("random_flip", not (self.buckets and not self.center_crop), "buckets crop the centre only")


class DiffusionSource:
    """See :class:`peft_suite.train.DataSource`."""

    config: type[DataConfig] = DiffusionDataConfig

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """Class names; () for captions and bare folders."""
        return read_layout(own(config)).classes, False

    def load(self, config: DataConfig, preprocessing: Facts) -> DataSplits:
        """Checked splits with their task. VAE and text encoders run here, once, and are let go.

        Raises:
            DataError: no images, no captions, unusable files, labels that the model does not have.
            ConfigError: settings that do not fit the model or one another.
            FileFormatError: parts of the pipeline that are missing, a tokenizer without a vocabulary.
        """
        from peft_suite.diffusion.assembling import assemble

        config = own(config)
        listing = _arranged(config)
        return assemble(config, listing, preprocessing)

    def inputs(self, paths: Sequence[str], preprocessing: Facts) -> tuple[list[str], Dataset[Tensor]]:
        """Generators predict nothing of files.

        Raises:
            ConfigError: always; what to call instead.
        """
        raise ConfigError("A generator predicts nothing about files. Draw images: peft-suite diffusion sample ADAPTER")


source = DiffusionSource()


def own(config: DataConfig) -> DiffusionDataConfig:
    """The configuration as this plugin's own class."""
    return config if isinstance(config, DiffusionDataConfig) else DiffusionDataConfig.from_dict(config.to_dict())


def _arranged(config: DiffusionDataConfig) -> Listing:
    """The layout with few shots drawn and a validation split held out."""
    listing = read_layout(config)
    train = listing.splits["train"]
    if config.shots and listing.layout != "digits-shifted":
        train = _few(train, config)
    if "val" not in listing.splits and config.val_fraction and len(train) > 1:
        groups: dict[int, list[Sample]] = {}
        for sample in train:
            groups.setdefault(sample.label, []).append(sample)
        held, left = splitting.hold_out(groups, config.val_fraction, f"diffusion/{config.split_seed}")
        order = {sample: i for i, sample in enumerate(train)}
        listing.splits["val"] = sorted(held, key=order.__getitem__)
        train = sorted(left, key=order.__getitem__)
    listing.splits["train"] = train
    listing.splits = {split: part for split, part in listing.splits.items() if part}
    return listing


def _few(samples: Sequence[Sample], config: DiffusionDataConfig) -> list[Sample]:
    """``shots`` of every class, in their order; one group where there are no classes."""
    import random

    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.label, []).append(sample)
    kept = set()
    for label, group in groups.items():
        if len(group) < config.shots:
            raise DataError(f"data.shots = {config.shots}: class {label} has only {len(group)} images.")
        shuffled = list(group)
        random.Random(f"diffusion/{config.split_seed}/{label}").shuffle(shuffled)
        kept |= set(shuffled[: config.shots])
    return [s for s in samples if s in kept]
