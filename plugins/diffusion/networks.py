"""Networks that look at images for the metrics, from files that are already here; nothing is downloaded.

=====================  =====================================================================================
``JUDGE.safetensors``  a classifier that :func:`peft_suite.diffusion.judge.save_judge` wrote
``inception:FILE``     Inception v3 of FID, through torch-fidelity: ``weights-inception-2015-12-05-6726825d.pth``
``clip:FOLDER``        the image side of a CLIP model of transformers
``pixels``             no network: the pixels themselves, for images of a few hundred values
=====================  =====================================================================================
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_suite.errors import ConfigError, DataError, FileFormatError, MissingExtraError

__all__ = ["Network", "clip_score", "network_of"]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_AT = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Network:
    """``call(uint8 [N, H, W, C]) -> [N, D]``, and what a report must say of it: library, weights, how it resizes."""

    name: str
    library: str
    weights: str
    resize: str
    call: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """``[N, D]``, in batches."""
        parts = images.split(batch_size)  # type: ignore[no-untyped-call]
        return torch.cat([self.call(part).float().cpu() for part in parts])

    def facts(self) -> dict[str, str]:
        """For reports."""
        return {"network": self.name, "library": self.library, "weights": self.weights, "resize": self.resize}


def network_of(text: str) -> Network:
    """The network of a line of the table above.

    Raises:
        ConfigError: nothing of the kind, or a file that is not here: which one and where it comes from.
    """
    kind, _, where = text.partition(":")
    if text == "pixels":
        return Network("pixels", "none", "none", "none", lambda images: images.flatten(1).float().div(255))
    if kind == "inception":
        return _inception(where)
    if kind == "clip" and where:
        model, processor = _clip(where)
        return Network(
            "CLIP image features",
            _version("transformers"),
            where,
            "the model's own processor",
            lambda images: _projected(model.get_image_features(**_pixels(processor, images))),
        )
    if Path(text).is_file():
        from peft_suite.diffusion.judge import load_judge

        judge = load_judge(Path(text))
        return Network("judge", "peft-suite", text, "none", judge.features)
    raise ConfigError(
        f"--features {text!r}: no such file. Give a judge's .safetensors, inception:FILE, clip:FOLDER, or pixels."
    )


def _inception(where: str) -> Network:
    if not where or not Path(where).is_file():
        raise ConfigError(
            f"Inception's weights are not at {where!r}, and nothing is downloaded. Fetch {_INCEPTION_AT} and give "
            f"inception:PATH/{INCEPTION}."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtraError("Inception features need torch-fidelity. Run: pip install torch-fidelity") from error
    try:
        state = torch.load(where, map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)  # torch-fidelity unpickles what it is given, so it is given plain tensors
        buffer.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = " ".join(str(error).split())[:300]
        raise FileFormatError(f"{where} holds no Inception weights: {reason}") from error

    def call(images: Tensor) -> Tensor:
        three = images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images
        found: Tensor = network(three.permute(0, 3, 1, 2).contiguous())[0]
        return found

    resize = "bilinear to 299x299 as TensorFlow 1 does, without antialiasing"
    return Network("Inception v3, 2048", _version("torch-fidelity"), Path(where).name, resize, call)


def _clip(where: str) -> tuple[Any, Any]:
    if not Path(where).is_dir():
        raise ConfigError(
            f"CLIP is not at {where!r}, and nothing is downloaded. Fetch it (`hf download {_CLIP} --local-dir "
            "FOLDER`) and give the folder."
        )
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(where, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(where, local_files_only=True)
    except Exception as error:  # whatever missing or damaged files make transformers raise
        reason = " ".join(str(error).split())[:300]
        raise FileFormatError(f"{where} cannot be read as a CLIP model with its processor: {reason}") from error
    model.eval()  # type: ignore[no-untyped-call]
    return model, processor


def _pixels(processor: Any, images: Tensor) -> dict[str, Tensor]:
    three = images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images
    return {"pixel_values": processor.image_processor(images=list(three.numpy()), return_tensors="pt").pixel_values}


def _projected(output: Any) -> Tensor:
    """transformers 5 wraps what earlier versions returned as a tensor."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


@torch.no_grad()
def clip_score(
    images: Tensor, texts: Sequence[str], where: str, *, side: int = 512, batch_size: int = 16
) -> tuple[float, dict[str, str]]:
    """Mean of 100 times the cosine between each image and its text, and what to report of it.

    Args:
        images: uint8 ``[N, H, W, C]``.
        texts: N texts.
        where: folder of a CLIP model; papers use ``openai/clip-vit-large-patch14``.
        side: images are resized to this side first (bicubic), as the SaRA evaluation does; 0 leaves it out.

    Raises:
        DataError: not one text per image.
    """
    if len(texts) != len(images):
        raise DataError(f"{len(images)} images and {len(texts)} texts: the CLIP score needs one text per image.")
    model, processor = _clip(where)
    from peft_suite.diffusion.pipelines import check_tokenizer

    check_tokenizer(processor.tokenizer, where)
    found = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        if side:
            part = _resized(part, side)
        tokens = processor.tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"
        )
        seen = _projected(model.get_image_features(**_pixels(processor, part)))
        read = _projected(
            model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )
        found.append(100 * torch.nn.functional.cosine_similarity(seen, read))
    resize = f"bicubic to {side}, then the model's own processor" if side else "the model's own processor"
    return float(torch.cat(found).mean()), {
        "network": "CLIP",
        "library": _version("transformers"),
        "weights": where,
        "resize": resize,
    }


def _resized(images: Tensor, side: int) -> Tensor:
    x = images.permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _version(name: str) -> str:
    from importlib.metadata import version

    return f"{name} {version(name)}"
