"""What this distribution adds to peft-suite: pure data, nothing heavy is imported."""

from peft_suite import AnatomyEntry, MethodEntry, Plugin

plugin = Plugin(
    name="example",
    summary="A third party's method and backbone",
    methods=(MethodEntry("gate", "peft_suite_example.gate:Gate", "A gain on every channel that an MLP puts out"),),
    anatomies=(
        AnatomyEntry(
            "tiny-former",
            ("peft_suite_example.tiny_former.TinyFormer",),
            "peft_suite_example.tiny_former:describe",
            ("peft_suite_example.tiny_former:example",),
        ),
    ),
)
