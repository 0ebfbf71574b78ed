"""Vision: timm's and transformers' backbones, image data, methods. Importing it imports neither torch nor timm."""

from __future__ import annotations

from peft_suite.plugins import AnatomyEntry, DatasetEntry, MethodEntry, Plugin, TaskEntry

__all__ = ["plugin"]

_AT = "peft_suite.vision.anatomies"
_TRANSFORMERS = f"{_AT}.transformers_vit"


def _transformers(models: str, *classes: str) -> tuple[str, ...]:
    return tuple(f"transformers.models.{models}.modeling_{models}.{name}" for name in classes)


plugin = Plugin(
    name="vision",
    summary="Image classification and segmentation with timm and transformers backbones.",
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
            "ia3",
            "peft_suite.vision.methods.ia3:IA3",
            "Learned vectors that scale keys, values and the MLP's inner activations; folds into the weights.",
            "Liu et al., NeurIPS 2022",
        ),
        MethodEntry(
            "convpass",
            "peft_suite.vision.methods.convpass:Convpass",
            "A small convolution over the patch grid beside attention and MLP.",
            "Jie and Deng, 2022",
        ),
        MethodEntry(
            "convpass-attn",
            "peft_suite.vision.methods.convpass:Convpass",
            "Convpass beside attention only.",
            "Jie and Deng, 2022",
            preset={"position": "attn", "xavier": True},
        ),
        MethodEntry(
            "hst",
            "peft_suite.vision.methods.hst:HST",
            "A small pyramid network beside the backbone, fed by one meta token per block.",
            "arXiv 2310.05393, 2023",
        ),
        MethodEntry(
            "mam",
            "peft_suite.vision.methods.mam:MAM",
            "Learned keys and values in attention plus a scaled parallel adapter at the MLP.",
            "He et al., ICLR 2022",
        ),
        MethodEntry(
            "spt-lora",
            "peft_suite.vision.methods.spt:SPTLoRA",
            "Trains what the task is sensitive to: LoRA where much lies in one matrix, else single entries; folds.",
            "He et al., ICCV 2023",
        ),
        MethodEntry(
            "spt-adapter",
            "peft_suite.vision.methods.spt:SPTAdapter",
            "As spt-lora, with bottleneck adapters for the structured part.",
            "He et al., ICCV 2023",
        ),
        MethodEntry(
            "snell",
            "peft_suite.vision.methods.snell:SNELL",
            "Sparse updates from a distance kernel of thin matrices; folds into the weights.",
            "Shen et al., NeurIPS 2024",
        ),
        MethodEntry(
            "snella",
            "peft_suite.vision.methods.snell:SNELLA",
            "SNELL with a wider kernel that moves sparsity between matrices; folds into the weights.",
            "Shen et al., 2025",
        ),
        MethodEntry(
            "bi-adaptformer",
            "peft_suite.vision.methods.binary:BiAdaptFormer",
            "AdaptFormer whose weights are 1 to 8 bits in forward and file.",
            "Jie et al., ICCV 2023",
        ),
        MethodEntry(
            "bi-lora",
            "peft_suite.vision.methods.binary:BiLoRA",
            "LoRA on q and v whose weights are 1 to 8 bits in forward and file.",
            "Jie et al., ICCV 2023",
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
            f"{_AT}.timm_vit:describe",
            (f"{_AT}.timm_vit:example", f"{_AT}.timm_vit:example_deit", f"{_AT}.timm_vit:example_registers"),
        ),
        AnatomyEntry(
            "timm-vit-segmenter",
            ("peft_suite.vision.segmentation_models.Segmenter",),
            "peft_suite.vision.segmentation_models:describe",
            ("peft_suite.vision.segmentation_models:example", "peft_suite.vision.segmentation_models:example_up"),
        ),
        AnatomyEntry(
            "timm-swin",
            (
                "timm.models.swin_transformer.SwinTransformer",
                "timm.models.swin_transformer_v2.SwinTransformerV2",
            ),
            f"{_AT}.timm_swin:describe",
            (f"{_AT}.timm_swin:example", f"{_AT}.timm_swin:example_v2"),
        ),
        AnatomyEntry(
            "timm-convnext",
            ("timm.models.convnext.ConvNeXt",),
            f"{_AT}.timm_convnext:describe",
            (f"{_AT}.timm_convnext:example", f"{_AT}.timm_convnext:example_v2"),
        ),
        AnatomyEntry(
            "timm-mixer",
            ("timm.models.mlp_mixer.MlpMixer",),
            f"{_AT}.timm_mixer:describe",
            (f"{_AT}.timm_mixer:example", f"{_AT}.timm_mixer:example_resmlp"),
        ),
        AnatomyEntry(
            "timm-resnet",
            ("timm.models.resnet.ResNet",),
            f"{_AT}.timm_resnet:describe",
            (f"{_AT}.timm_resnet:example",),
        ),
        AnatomyEntry(
            "transformers-vit",
            _transformers("vit", "ViTModel", "ViTForImageClassification"),
            f"{_TRANSFORMERS}:describe_vit",
            (f"{_TRANSFORMERS}:example",),
        ),
        AnatomyEntry(
            "transformers-dinov2",
            (
                *_transformers("dinov2", "Dinov2Model", "Dinov2ForImageClassification"),
                *_transformers(
                    "dinov2_with_registers",
                    "Dinov2WithRegistersModel",
                    "Dinov2WithRegistersForImageClassification",
                ),
            ),
            f"{_TRANSFORMERS}:describe_dinov2",
            (f"{_TRANSFORMERS}:example_registers",),
            kin="transformers-vit",
        ),
        AnatomyEntry(
            "transformers-clip",
            _transformers("clip", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
            f"{_TRANSFORMERS}:describe_clip",
            (f"{_TRANSFORMERS}:example_classifier", f"{_TRANSFORMERS}:example_projection"),
            kin="transformers-vit",
        ),
    ),
    datasets=(
        DatasetEntry("folder", "ROOT/CLASS/IMAGE, or ROOT/train, ROOT/val and ROOT/test of that form"),
        DatasetEntry("list", "CSV, TSV, JSON, JSON lines or 'path label' text files; several labels per image allowed"),
        DatasetEntry("huggingface", "a directory saved by the datasets library, or hf:NAME to download one"),
        DatasetEntry("vtab", "VTAB-1k: ROOT/TASK/{train800,val200,train800val200,test}.txt and images; 19 tasks"),
        DatasetEntry("fgvc", "CUB, NABirds, Flowers, Dogs, Cars with VPT's JSON splits, or their official ones"),
        DatasetEntry("few-shot", "NOAH's few-shot lists of five fine-grained data sets, 1 to 16 images per class"),
        DatasetEntry("cifar-binary", "CIFAR-10 or CIFAR-100, the binary version (*.bin)"),
        DatasetEntry(
            "digits-shifted", "built in: scikit-learn's digits, upside down, inverted, in colour (the demo's task)"
        ),
    ),
    tasks=(
        TaskEntry(
            "segmentation",
            "A class for every pixel: images with index masks, a vision transformer with a light decoder.",
            "peft_suite.vision.segmentation_models:backbones",
            "peft_suite.vision.segmentation_data:source",
        ),
    ),
    backbones="peft_suite.vision.backbones:backbones",
    data="peft_suite.vision.data:source",
    recipes="peft_suite.vision.recipes:book",
    demo="peft_suite.vision.demo:run",
    example=("micro-vit", "digits-shifted"),
)
