"""An adapted AST inside a transformers program: adapt, train, save, load, merge, and a plain model in the end.

    python audio_pipeline.py                              # a small AST built from a configuration, generated sounds
    python audio_pipeline.py MODEL --out adapted          # a folder that transformers wrote, or a name on the hub
    python audio_pipeline.py --front-end transformers     # ASTFeatureExtractor in the place of our filter bank
    python audio_pipeline.py --trainer                    # transformers.Trainer in the place of the loop

The last folder holds nothing of peft-suite: ``ASTForAudioClassification.from_pretrained`` reads it. Needs
``pip install 'peft-suite[audio]'``; no network, unless MODEL is a name on the hub.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

import peft_suite as ps
from peft_suite.audio.frontend.logmel import LogMel, measure_statistics

RATE = 16_000
CLASSES = ("tone", "chirp", "knock", "hiss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or name of an AST; without it a small one is built")
    parser.add_argument("--method", default="ast-lora(rank=8, alpha=8)", help="one that folds into the weights")
    parser.add_argument("--front-end", choices=("peft-suite", "transformers"), default="peft-suite")
    parser.add_argument("--trainer", action="store_true", help="train with transformers.Trainer")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for adapter and merged model; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work(options, options.out or Path(temporary))


def work(options: argparse.Namespace, out: Path) -> None:
    torch.manual_seed(options.seed)
    sounds, labels = generate(30, seed=options.seed)
    test_sounds, test_labels = generate(15, seed=options.seed + 1)

    model = build(options.model)
    front = FrontEnd(options.front_end, model.config, sounds)
    x, x_test = front(sounds), front(test_sounds)  # [B, T, F]
    print(f"{front.told}: {list(x.shape)}, mean {x.mean():.3f}")

    # An adapter, and the head beside it; everything else stays frozen.
    ps.adapt(model, options.method, name="sounds")
    print(ps.summary(model))
    before = accuracy(model, x_test, test_labels)
    train_with = by_trainer if options.trainer else by_hand
    train_with(model, x, labels, options)
    print(f"accuracy {before:.3f} before, {accuracy(model, x_test, test_labels):.3f} after {options.epochs} epochs")

    # The adapter as files of its own, on a fresh copy of the same backbone.
    ps.save(model, out / "adapter", metadata={"classes": list(CLASSES)})
    torch.manual_seed(options.seed)
    fresh = build(options.model)
    ps.load(fresh, out / "adapter")
    print(f"adapter loaded again: {difference(model, fresh, x_test):.1e} between logits")

    # Folded into the weights: a plain model of transformers.
    adapted = logits(model, x_test)
    ps.merge(model)
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {name: index for index, name in enumerate(CLASSES)}
    model.save_pretrained(out / "merged")
    front.extractor.save_pretrained(out / "merged")
    plain = ASTForAudioClassification.from_pretrained(out / "merged")
    gap = float((logits(plain, x_test) - adapted).abs().max())
    print(f"merged, saved, from_pretrained: {gap:.1e} between logits")
    assert gap < 1e-4, "a merged model computes what the adapted one does"
    assert not any("adapters" in key for key in plain.state_dict())
    kept = ASTFeatureExtractor.from_pretrained(out / "merged")
    name = plain.config.id2label[int(logits(plain, x_test[:1]).argmax())]
    print(f"first test sound: {name} (truth {CLASSES[int(test_labels[0])]}); mean of the extractor {kept.mean:.3f}")
    if out.exists() and options.out:
        print(f"{out / 'adapter'} and {out / 'merged'} written")


# ---- model and front end -------------------------------------------------------------------------------------------


def build(source: str | None) -> ASTForAudioClassification:
    """The AST of a folder with a fresh head, or a small one with random weights for sounds of one second."""
    if source:
        return ASTForAudioClassification.from_pretrained(
            source, num_labels=len(CLASSES), ignore_mismatched_sizes=True
        ).eval()
    sizes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 192, "max_length": 98, "num_mel_bins": 64}
    return ASTForAudioClassification(ASTConfig(**sizes, num_labels=len(CLASSES))).eval()


class FrontEnd:
    """Waveforms to what the model reads, by our filter bank or by transformers', with the same numbers."""

    def __init__(self, kind: str, config: ASTConfig, sounds: list[Tensor]) -> None:
        shape = {"num_mel_bins": config.num_mel_bins}
        raw = LogMel(config.max_length, **shape)
        mean, std = measure_statistics([raw.features(sounds)])
        self.ours = LogMel(config.max_length, mean, std, **shape)
        self.extractor = ASTFeatureExtractor(
            sampling_rate=RATE, max_length=config.max_length, mean=mean, std=std, **shape
        )
        self.kind = kind
        self.told = {"peft-suite": "LogMel", "transformers": "ASTFeatureExtractor"}[kind]

    def __call__(self, sounds: list[Tensor]) -> Tensor:
        """``[B, T, F]`` of B mono waveforms."""
        if self.kind == "peft-suite":
            features: Tensor = self.ours(sounds)
            return features
        arrays = [sound.numpy() for sound in sounds]
        return self.extractor(arrays, sampling_rate=RATE, return_tensors="pt")["input_values"]


# ---- training ------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """An ordinary loop: only what requires a gradient goes to the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    model.train()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x)).split(20):
            loss = nn.functional.cross_entropy(model(x[rows]).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    print(f"last loss {loss.item():.3f}")


def by_trainer(model: nn.Module, x: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """The same by transformers.Trainer (pip install accelerate)."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_values": a, "labels": int(b)} for a, b in zip(x, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=20,
            learning_rate=options.lr,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=options.seed,
        )
        result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval()
    print(f"mean loss {result.training_loss:.3f}")


@torch.inference_mode()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    scores: Tensor = model(x).logits
    return scores


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((logits(model, x).argmax(-1) == labels).float().mean())


def difference(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    return float((logits(first, x) - logits(second, x)).abs().max())


# ---- sounds to try it on -------------------------------------------------------------------------------------------


def generate(each: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """``each`` sounds of every class, 0.5 to 1 s, with noise; (waveforms, labels)."""
    rng = np.random.default_rng(seed)
    sounds, labels = [], []
    for number in range(each * len(CLASSES)):
        label = number % len(CLASSES)
        t = np.arange(int(rng.uniform(0.5, 1.0) * RATE)) / RATE
        pitch = rng.uniform(200, 1200)
        wave = {
            "tone": lambda t=t, pitch=pitch: np.sin(2 * np.pi * pitch * t),
            "chirp": lambda t=t, pitch=pitch: np.sin(2 * np.pi * (pitch * t + 1500 * t**2)),
            "knock": lambda t=t, pitch=pitch: np.sin(2 * np.pi * pitch * t) * np.exp(-60 * (t % 0.2)),
            "hiss": lambda t=t: rng.standard_normal(len(t)),
        }[CLASSES[label]]()
        wave = 0.3 * wave + 0.02 * rng.standard_normal(len(t))
        sounds.append(torch.from_numpy(wave.astype(np.float32)))
        labels.append(label)
    return sounds, torch.tensor(labels)


if __name__ == "__main__":
    main()
