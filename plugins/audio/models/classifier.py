"""A classifier of sounds: an encoder of transformers, pooled tokens, a head.

    tokens  = encoder(input_values)               [B, N, D], after the final norm
    feature = pool(tokens)                        [B, D]
    logits  = head(norm(feature))                 [B, C]

Pooling of the Audio Spectrogram Transformer: its own code takes the mean of the class and the distillation token (Gong
et al., Interspeech 2021) and puts a LayerNorm before the last Linear; the study of parameter-efficient methods takes
the mean over all tokens, both special ones included, and a plain Linear (Cappellazzo et al., MLSP 2024). SSAST takes
the mean over the patches (Gong et al., AAAI 2022).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peft_suite.audio.models.patches import patch_of, reshape_patches
from peft_suite.edits import Beside
from peft_suite.errors import AdapterError, ConfigError, FileFormatError

__all__ = ["AudioClassifier", "Pool", "Pooling", "pool_forward"]

Pooling = Literal["mean", "tokens", "cls", "patches"]
_WEIGHTS, _SETTINGS = "classifier.safetensors", "classifier.json"


class Pool(nn.Module):
    """``[B, N, D] -> [B, D]``; no parameters.

    Args:
        kind: "mean" of all tokens; "tokens", of the ``prefix`` first ones; "cls", the first; "patches", of the others.
        prefix: tokens before the patches.
    """

    def __init__(self, kind: Pooling = "mean", prefix: int = 2) -> None:
        super().__init__()
        if kind not in get_args(Pooling):
            raise ConfigError(f"pool = {kind!r}: choose one of {', '.join(get_args(Pooling))}.")
        if not prefix and kind in ("tokens", "cls"):
            raise ConfigError(f"pool = {kind!r} needs special tokens, and this encoder has none. Choose 'mean'.")
        self.kind, self.prefix = kind, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens: [B, N, D]``, normed."""
        if self.kind == "cls":
            return tokens[:, 0]
        if self.kind == "tokens":
            return tokens[:, : self.prefix].mean(1)
        return (tokens[:, self.prefix :] if self.kind == "patches" else tokens).mean(1)

    def extra_repr(self) -> str:
        return self.kind


def pool_forward(pool: Any, beside: Beside, tokens: Tensor) -> Tensor:
    """The described forward of :class:`Pool`: at "pool", parts get and give the feature and the tokens."""
    return beside.through("pool", Pool.forward(pool, tokens), tokens)[0]


class AudioClassifier(nn.Module):
    """``input_values`` (log-mel ``[B, T, F]``, or the waveform ``[B, samples]`` for wav2vec 2.0) to ``[B, C]``.

    Args:
        encoder: transformers' ``ASTModel`` or ``Wav2Vec2Model``; its output must have ``last_hidden_state``.
        num_classes: C; 0 leaves the head away and gives the feature ``[B, D]``.
        pool: see :class:`Pool`.
        head: "linear"; or "norm", a LayerNorm before it, as in the original classifier.
        train_norm: the encoder's final norm counts as part of the head, so that every method trains it (2D values more
            than the head), as in the study's code.
        norm_eps: of the head's LayerNorm.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        pool: Pooling = "mean",
        *,
        head: Literal["linear", "norm"] = "linear",
        train_norm: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ConfigError(f"num_classes = {num_classes}: must be 0 (no head) or more.")
        if head not in ("linear", "norm"):
            raise ConfigError(f"head = {head!r}: choose 'linear' or 'norm'.")
        config: Any = encoder.config
        dim = int(config.hidden_size)
        prefix = 2 if hasattr(getattr(encoder, "embeddings", None), "distillation_token") else 0
        self.num_classes, self.train_norm = num_classes, train_norm
        self.encoder = encoder
        self.pool = Pool(pool, prefix)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if head == "norm" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, input_values: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        feature = self.norm(self.pool(self.forward_features(input_values)))
        logits: Tensor = self.head(feature)
        return logits

    def forward_features(self, input_values: Tensor) -> Tensor:
        """Normed tokens ``[B, N, D]``."""
        tokens: Tensor = self.encoder(input_values).last_hidden_state
        return tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in backward instead of keeping what is inside them."""
        encoder: Any = self.encoder
        new = hasattr(encoder, "activation_checkpointing_enable")
        kind = "activation" if new else "gradient"
        if enable:
            getattr(encoder, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(encoder, f"{kind}_checkpointing_disable")()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder in transformers' layout, which its own ``from_pretrained`` reads, and the head beside it.

        Raises:
            AdapterError: adapters are attached; they have files of their own.
        """
        from safetensors.torch import save_file

        if "adapters" in self._modules:
            raise AdapterError(
                "save_pretrained() writes a model without adapters. Fold them in with merge(model), or write them with "
                "save(model, folder)."
            )
        encoder: Any = self.encoder
        encoder.save_pretrained(folder)
        state = {k: v.contiguous() for k, v in self.state_dict().items() if k.startswith(("norm.", "head."))}
        settings = {
            "num_classes": self.num_classes,
            "pool": self.pool.kind,
            "head": "linear" if isinstance(self.norm, nn.Identity) else "norm",
            "train_norm": self.train_norm,
            "norm_eps": getattr(self.norm, "eps", 1e-5),
            "patch": patch_of(encoder),
        }
        save_file(state, Path(folder) / _WEIGHTS)
        (Path(folder) / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> AudioClassifier:
        """Read what :meth:`save_pretrained` wrote; ``options`` go to transformers.

        Raises:
            FileFormatError: the folder holds no classifier of this package.
        """
        from safetensors.torch import load_file

        try:
            settings = json.loads((Path(folder) / _SETTINGS).read_text(encoding="utf-8"))
            state = load_file(Path(folder) / _WEIGHTS)
        except (OSError, ValueError) as error:
            raise FileFormatError(
                f"{str(folder)!r} holds no AudioClassifier ({_SETTINGS}, {_WEIGHTS}): {error}. Folders of transformers "
                "alone are read with checkpoint=FOLDER."
            ) from error
        model = cls(_encoder(str(folder), settings.pop("patch", None), options), **settings)
        missing = [k for k in model.state_dict() if k.startswith(("norm.", "head.")) and k not in state]
        if missing:
            raise FileFormatError(f"{_WEIGHTS} in {str(folder)!r} lacks {', '.join(missing)}.")
        with torch.no_grad():
            model.load_state_dict(state, strict=False)
        return model.eval()


def _encoder(folder: str, patch: list[int] | None, options: dict[str, Any]) -> nn.Module:
    """transformers' own reading, but for patches that its configuration cannot tell."""
    import transformers

    if patch is None:
        loaded: nn.Module = transformers.AutoModel.from_pretrained(folder, **options)
        return loaded
    from peft_suite.audio.checkpoints import convert, read

    encoder: nn.Module = transformers.ASTModel(transformers.AutoConfig.from_pretrained(folder, **options))
    reshape_patches(encoder, (patch[0], patch[1]))
    encoder.load_state_dict(convert(read(folder)).state)
    return encoder
