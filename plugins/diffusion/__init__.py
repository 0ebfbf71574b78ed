"""Diffusion: parameter-efficient fine-tuning of diffusers models. Importing it imports neither torch nor diffusers."""

from __future__ import annotations

from peft_suite.plugins import AnatomyEntry, DatasetEntry, FlagEntry, MethodEntry, Plugin, VerbEntry

__all__ = ["plugin"]

_AT = "peft_suite.diffusion.anatomies"
_METHODS = "peft_suite.diffusion.methods"
_LORA = "peft_suite.methods.lora:LoRA"
_ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
_ADDED = ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj", "*.attn.to_add_out")
_JOINT = ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.to_out.0", *_ADDED)
_TEXT = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
_DIFFUSERS = "diffusers.models"
_CLIP = "transformers.models.clip.modeling_clip"

plugin = Plugin(
    name="diffusion",
    summary="Image generation with diffusers models: UNets, SD3, FLUX and DiT.",
    extra="diffusion",
    requires=("diffusers", "transformers", "PIL"),
    methods=(
        MethodEntry(
            "sara", f"{_METHODS}.sara:SaRA", "the weights that are nearly zero, one by one", "Hu et al., ICLR 2025"
        ),
        MethodEntry(
            "lt-sft",
            f"{_METHODS}.lt_sft:LTSFT",
            "the weights that move most in full fine-tuning, one by one",
            "Ansell et al., ACL 2022",
        ),
        MethodEntry(
            "difffit",
            f"{_METHODS}.difffit:DiffFit",
            "biases, norms, class embeddings and a scale for what every sub-layer gives",
            "Xie et al., ICCV 2023",
        ),
        MethodEntry(
            "textual-inversion",
            f"{_METHODS}.textual_inversion:TextualInversion",
            "embeddings of a new word in the text encoder",
            "Gal et al., ICLR 2023",
        ),
        MethodEntry(
            "diffusers-lora",
            _LORA,
            "lora as in diffusers' scripts: rank 4 on q, k, v and out of every attention",
            "Hu et al., ICLR 2022",
            {"rank": 4, "targets": _ATTENTION, "init": "gaussian"},
        ),
        MethodEntry(
            "diffusers-dora",
            _LORA,
            "the same with lengths and directions apart",
            "Liu et al., ICML 2024",
            {"rank": 4, "targets": _ATTENTION, "init": "gaussian", "dora": True},
        ),
        MethodEntry(
            "diffusers-lora-sd3",
            _LORA,
            "lora as in diffusers' SD3 scripts: the text's projections in joint attention as well",
            "Hu et al., ICLR 2022",
            {"rank": 4, "targets": _JOINT, "init": "gaussian"},
        ),
        MethodEntry(
            "diffusers-lora-text",
            _LORA,
            "lora as in diffusers' DreamBooth scripts, for the text encoder",
            "Hu et al., ICLR 2022",
            {"rank": 4, "targets": _TEXT, "init": "gaussian"},
        ),
        MethodEntry(
            "subset",
            f"{_METHODS}.subset:Subset",
            "another method in a part of its places only, as memcontrol finds it",
            "Dutt et al., WACV 2025",
        ),
    ),
    anatomies=(
        AnatomyEntry(
            "diffusers-unet",
            (f"{_DIFFUSERS}.unets.unet_2d_condition.UNet2DConditionModel",),
            f"{_AT}.unet:describe",
            (f"{_AT}.unet:example",),
        ),
        AnatomyEntry(
            "diffusers-unet2d",
            (f"{_DIFFUSERS}.unets.unet_2d.UNet2DModel",),
            f"{_AT}.unet:describe",
            (f"{_AT}.unet:example_pixels",),
            kin="diffusers-unet",
        ),
        AnatomyEntry(
            "diffusers-dit",
            (f"{_DIFFUSERS}.transformers.dit_transformer_2d.DiTTransformer2DModel",),
            f"{_AT}.dit:describe",
            (f"{_AT}.dit:example",),
            kin="diffusers-unet",
        ),
        AnatomyEntry(
            "diffusers-sd3",
            (f"{_DIFFUSERS}.transformers.transformer_sd3.SD3Transformer2DModel",),
            f"{_AT}.joint:describe_sd3",
            (f"{_AT}.joint:example_sd3",),
            kin="diffusers-unet",
        ),
        AnatomyEntry(
            "diffusers-flux",
            (f"{_DIFFUSERS}.transformers.transformer_flux.FluxTransformer2DModel",),
            f"{_AT}.joint:describe_flux",
            (f"{_AT}.joint:example_flux",),
            kin="diffusers-unet",
        ),
        AnatomyEntry(
            "clip-text",
            (f"{_CLIP}.CLIPTextModel", f"{_CLIP}.CLIPTextModelWithProjection"),
            f"{_AT}.text:describe_clip",
            (f"{_AT}.text:example_clip",),
            kin="diffusers-unet",
        ),
        AnatomyEntry(
            "t5-encoder",
            ("transformers.models.t5.modeling_t5.T5EncoderModel",),
            f"{_AT}.text:describe_t5",
            (f"{_AT}.text:example_t5",),
            kin="diffusers-unet",
        ),
    ),
    datasets=(
        DatasetEntry("metadata", "images beside metadata.jsonl or metadata.csv: file_name and a caption column"),
        DatasetEntry("classes", "ROOT/CLASS/IMAGE or ROOT/SPLIT/CLASS/IMAGE, also in an uncompressed tar file"),
        DatasetEntry("images", "a bare folder; text models take data.instance_prompt for every image"),
        DatasetEntry("digits-shifted", "built in: digits that lie on their side, 8x8, for the embedded backbone"),
    ),
    verbs=(
        VerbEntry("sample", "peft_suite.diffusion.sample_verb:sample", "Draw images of an adapter or a backbone."),
        VerbEntry(
            "metrics",
            "peft_suite.diffusion.metrics_verb:metrics",
            "Compare a folder of generated images with real ones: distances, memory, CLIP score.",
        ),
        VerbEntry(
            "export-lora",
            "peft_suite.diffusion.lora_verb:export_lora",
            "Write adapters as a LoRA file of diffusers or kohya.",
        ),
        VerbEntry(
            "import-lora",
            "peft_suite.diffusion.lora_verb:import_lora",
            "Turn a LoRA file of another program into an adapter.",
        ),
        VerbEntry(
            "memcontrol",
            "peft_suite.diffusion.memcontrol_verb:memcontrol",
            "Search which blocks may train, against what the model memorises; writes the Pareto front.",
            "--backbone micro-unet --data digits-shifted --method 'lora(rank=4)' --trials 20 --out runs/search",
        ),
    ),
    backbones="peft_suite.diffusion.backbones:backbones",
    data="peft_suite.diffusion.data:source",
    demo="peft_suite.diffusion.demo:run",
    example=("micro-unet", "digits-shifted"),
    use="sample {adapter} --out samples",
    flags=(
        FlagEntry("instance-prompt", "data.instance_prompt", "Caption of every image that has none (DreamBooth)."),
        FlagEntry("class-prompt", "data.class_prompt", "Prior preservation: what the base model draws."),
        FlagEntry("class-data-dir", "data.class_data_dir", "Prior preservation: where its drawings are."),
        FlagEntry("caption-column", "data.caption_column", "Column of metadata.jsonl or metadata.csv."),
        FlagEntry("resolution", "data.resolution", "Side of the images in pixels.", "value"),
        FlagEntry("snr-gamma", "data.snr_gamma", "min-SNR weights, usually 5.", "value"),
        FlagEntry("component", "backbone.options.component", "unet, transformer or text_encoder."),
        FlagEntry(
            "gradient-checkpointing", "backbone.options.gradient_checkpointing", "Less memory, more time.", "switch"
        ),
        FlagEntry("max-train-steps", "recipe.max_steps", "Optimizer steps; overrides the epochs.", "value"),
    ),
)
