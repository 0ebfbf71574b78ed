"""The core's own plugin: the classical methods that every modality needs. Imports no torch."""

from __future__ import annotations

from peft_suite.plugins import MethodEntry, Plugin

_BOTTLENECK = "peft_suite.methods.bottleneck:Bottleneck"

plugin = Plugin(
    name="core",
    summary="Methods for every modality",
    methods=(
        MethodEntry("linear", "peft_suite.methods.linear:Linear", "Linear probe: the head alone"),
        MethodEntry("full", "peft_suite.methods.full:Full", "Full fine-tuning: every parameter"),
        MethodEntry("bitfit", "peft_suite.methods.bitfit:BitFit", "Bias vectors only", "Ben Zaken et al., ACL 2022"),
        MethodEntry("norm", "peft_suite.methods.norm:Norm", "Scales and shifts of the normalisation layers"),
        MethodEntry(
            "lora",
            "peft_suite.methods.lora:LoRA",
            "Low-rank updates of chosen matrices; DoRA and rsLoRA as options",
            "Hu et al., ICLR 2022",
        ),
        MethodEntry("adapter", _BOTTLENECK, "Bottleneck adapters, every placement", "He et al., ICLR 2022"),
        MethodEntry(
            "houlsby",
            _BOTTLENECK,
            "Bottlenecks after attention and after the MLP",
            "Houlsby et al., ICML 2019",
            {"position": "both", "insertion": "sequential", "activation": "gelu"},
        ),
        MethodEntry(
            "pfeiffer",
            _BOTTLENECK,
            "One bottleneck after the MLP",
            "Pfeiffer et al., EACL 2021",
            {"position": "mlp", "insertion": "sequential", "activation": "gelu"},
        ),
        MethodEntry(
            "parallel-adapter",
            _BOTTLENECK,
            "Scaled bottleneck parallel to the MLP, reading the MLP's input",
            "He et al., ICLR 2022",
            {"position": "mlp", "insertion": "parallel", "source": "sublayer", "scale": 4.0, "bottleneck": 64},
        ),
        MethodEntry(
            "adaptformer",
            _BOTTLENECK,
            "Scaled bottleneck parallel to the MLP, reading the residual stream",
            "Chen et al., NeurIPS 2022",
            {
                "position": "mlp",
                "insertion": "parallel",
                "source": "residual",
                "scale": 0.1,
                "dropout": 0.1,
                "bottleneck": 64,
            },
        ),
    ),
)
