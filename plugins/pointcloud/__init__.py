"""Point clouds: pre-trained 3D transformers and their methods. Importing it imports neither torch nor h5py."""

from __future__ import annotations

from peft_suite.plugins import AnatomyEntry, DatasetEntry, MethodEntry, Plugin, TaskEntry, VerbEntry

__all__ = ["plugin"]

_AT = "peft_suite.pointcloud.anatomies"
_MODELS = "peft_suite.pointcloud.models"

plugin = Plugin(
    name="pointcloud",
    summary="Classification and part segmentation of point clouds with pre-trained 3D transformers.",
    extra="pointcloud",
    requires=("h5py", "trimesh", "plotly"),
    anatomies=(
        AnatomyEntry(
            "point-transformer",
            (f"{_MODELS}.transformer.PointTransformer",),
            f"{_AT}.point_transformer:describe",
            (f"{_AT}.point_transformer:example", f"{_AT}.point_transformer:example_bert"),
        ),
        AnatomyEntry(
            "point-segmenter",
            (f"{_MODELS}.segmentation.PartSegmenter", f"{_MODELS}.bert_parts.BertPartSegmenter"),
            f"{_AT}.segmenter:describe",
            (f"{_AT}.segmenter:example", f"{_AT}.segmenter:example_bert"),
            kin="point-transformer",
        ),
        AnatomyEntry(
            "recon",
            (f"{_MODELS}.recon.ReCon",),
            f"{_AT}.recon:describe",
            (f"{_AT}.recon:example",),
            kin="point-transformer",
        ),
        AnatomyEntry(
            "pointgpt",
            (f"{_MODELS}.pointgpt.PointGPT",),
            f"{_AT}.pointgpt:describe",
            (f"{_AT}.pointgpt:example",),
            kin="point-transformer",
        ),
        AnatomyEntry(
            "any2point",
            (f"{_MODELS}.any2point.Any2Point",),
            f"{_AT}.any2point:describe",
            (f"{_AT}.any2point:example", f"{_AT}.any2point:example_language", f"{_AT}.any2point:example_audio"),
            kin="point-transformer",
        ),
    ),
    methods=(
        MethodEntry(
            "idpt",
            "peft_suite.pointcloud.methods.idpt:IDPT",
            "One prompt token per cloud, generated from its patches by a small graph network.",
            "Zha et al., ICCV 2023",
        ),
        MethodEntry(
            "dapt",
            "peft_suite.pointcloud.methods.dapt:DAPT",
            "Adapters gated per token, whose output becomes the next prompt, and scale and shift everywhere.",
            "Zhou et al., CVPR 2024",
        ),
        MethodEntry(
            "point-peft",
            "peft_suite.pointcloud.methods.point_peft:PointPEFT",
            "Prompts recalled from a memory of the training clouds, and adapters over neighbourhoods of patches.",
            "Tang et al., AAAI 2024",
        ),
        MethodEntry(
            "pointgst",
            "peft_suite.pointcloud.methods.pointgst:PointGST",
            "Adapters in the spectrum of a graph over the patch centres, of the cloud and of runs of it.",
            "Liang et al., TPAMI 2025",
        ),
        MethodEntry(
            "any2point",
            "peft_suite.pointcloud.methods.any2point:Any2Point",
            "Adapters guided by voxels and by virtual projections, for a source of another modality.",
            "Tang et al., ECCV 2024",
        ),
    ),
    datasets=(
        DatasetEntry("folder", "ROOT/CLASS/CLOUD, ROOT/SPLIT/CLASS/CLOUD or ROOT/CLASS/SPLIT/CLOUD"),
        DatasetEntry("modelnet", "ModelNet40 and 10: text with normals, .dat pickles (read safely), HDF5"),
        DatasetEntry("scanobjectnn", "obj-bg, obj-only, pb-t50-rs (data.variant)"),
        DatasetEntry("few-shot", "published episodes; data.way draws one from any other layout"),
        DatasetEntry("shapenetpart", "16 categories; their parts with task=segmentation"),
        DatasetEntry("hdf5", "a file, or train*/val*/test* files, with data and label"),
        DatasetEntry("mesh-views", "one mesh per class, seen from two halves of the view sphere"),
        DatasetEntry("solids-shifted", "built in: furniture and tools, scanned poorly"),
    ),
    verbs=(
        VerbEntry(
            "vote",
            "peft_suite.pointcloud.vote_verb:vote",
            "Measure the mean of several random views; says its protocol.",
        ),
        VerbEntry(
            "view",
            "peft_suite.pointcloud.view_verb:view",
            "Show clouds, predictions, patches, attention or a spectral basis as one HTML page.",
        ),
    ),
    backbones="peft_suite.pointcloud.backbones:backbones",
    data="peft_suite.pointcloud.data:source",
    recipes="peft_suite.pointcloud.recipes:book",
    demo="peft_suite.pointcloud.demo:run",
    example=("micro-points", "solids-shifted"),
    tasks=(
        TaskEntry(
            "segmentation",
            "A part for every point.",
            "peft_suite.pointcloud.backbones:part_backbones",
            "peft_suite.pointcloud.parts:source",
        ),
    ),
)
