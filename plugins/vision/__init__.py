"""Vision: timm transformers, image data, VPT and SSF. Importing this package imports neither torch nor timm."""

from __future__ import annotations

from peft_suite.plugins import AnatomyEntry, DatasetEntry, MethodEntry, Plugin

__all__ = ["plugin"]

_VIT = "peft_suite.vision.anatomies.timm_vit"

plugin = Plugin(
    name="vision",
    summary="Image classification with timm vision transformers.",
    extra="vision",
    requires=("timm", "torchvision"),
    methods=(
        MethodEntry(
            "ssf",
            "peft_suite.vision.methods.ssf:SSF",
            "Scale and shift the features after every operation; folds into the weights.",
            "Lian et al., NeurIPS 2022",
        ),
        MethodEntry(
            "vpt",
            "peft_suite.vision.methods.vpt:VPT",
            "Learned prompt tokens at the input (shallow) or at every block (deep).",
            "Jia et al., ECCV 2022",
        ),
    ),
    anatomies=(
        AnatomyEntry(
            "timm-vit",
            ("timm.models.vision_transformer.VisionTransformer",),
            f"{_VIT}:describe",
            (f"{_VIT}:example", f"{_VIT}:example_deit", f"{_VIT}:example_registers"),
        ),
    ),
    datasets=(
        DatasetEntry("folder", "ROOT/CLASS/IMAGE, or ROOT/train, ROOT/val and ROOT/test of that form"),
        DatasetEntry("list", "CSV, TSV, JSON, JSON lines or 'path label' text files; several labels per image allowed"),
        DatasetEntry("huggingface", "a directory saved by the datasets library, or hf:NAME to download one"),
        DatasetEntry(
            "digits-shifted", "built in: scikit-learn's digits, upside down, inverted, in colour (the demo's task)"
        ),
    ),
    backbones="peft_suite.vision.backbones:backbones",
    data="peft_suite.vision.data:source",
    demo="peft_suite.vision.demo:run",
    example=("micro-vit", "digits-shifted"),
)
