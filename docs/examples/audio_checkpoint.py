"""What a checkpoint says before anything is trained on it.

    python audio_checkpoint.py audioset_10_10_0.4593.pth                       # what loads, what is missing, positions
    python audio_checkpoint.py audioset_10_10_0.4593.pth max_length=500        # for clips of 5 s
    python audio_checkpoint.py pretrain.pth --backbone ssast-tiny max_length=500
    python audio_checkpoint.py --make ast.pth                                  # a file to try it with, random weights

``--make`` writes random weights in the original layout of AST, of the published size or with ``--layers`` of fewer
blocks; ``--like ssast`` in that of SSAST; a name without ``.pth`` a folder of transformers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch

from peft_suite.audio.backbones import backbones
from peft_suite.audio.checkpoints import convert, load, measure, read
from peft_suite.errors import PeftSuiteError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help=".pth, .safetensors, or a folder of transformers")
    parser.add_argument("options", nargs="*", help="of the backbone, such as max_length=500")
    parser.add_argument("--backbone", default="ast-base", help="a name of `peft-suite audio backbones`")
    parser.add_argument("--classes", type=int, default=50, help="of your data")
    parser.add_argument("--pos-embed", choices=("interpolate", "zeros"), default="interpolate")
    parser.add_argument("--make", action="store_true", help="write the file instead of reading it")
    parser.add_argument("--like", choices=("ast", "ssast"), default="ast", help="layout, for --make")
    parser.add_argument("--layers", type=int, default=12, help="blocks, for --make")
    options = parser.parse_intermixed_args()
    if options.make:
        make(options.file, options.backbone, options.like, options.layers)
        return
    try:
        state, layout, *_ = convert(read(options.file))
        sizes = measure(state)
        print(f"layout: {layout}; sizes: {', '.join(f'{k} {v}' for k, v in sizes.items())}")
        values: dict[str, Any] = {"num_hidden_layers": sizes["num_hidden_layers"]}
        values |= {k: int(v) for k, v in (word.split("=") for word in options.options)}
        model = backbones.build(options.backbone, options.classes, pretrained=False, checkpoint="", options=values)
        report = load(model, options.file, pos_embed=options.pos_embed)
    except PeftSuiteError as error:
        raise SystemExit(f"Error: {error}") from error
    print("fresh here, not in the file:", grouped(report.missing))
    print("in the file, not used here: ", grouped(report.unexpected))
    print("head of other classes:      ", grouped(report.reshaped))
    print("positions:                  ", report.positions)


def grouped(keys: tuple[str, ...]) -> str:
    """Keys by their first names, with counts."""
    counts = Counter(".".join(key.removeprefix("module.").split(".")[:2]) for key in keys)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items()) or "nothing"


def make(file: str, backbone: str, like: str, layers: int) -> None:
    """Random weights of a backbone in the layout that its authors publish."""
    torch.manual_seed(0)
    model = backbones.build(
        backbone,
        527,
        pretrained=False,
        checkpoint="",
        options={"num_hidden_layers": layers, "pool": "tokens", "head": "norm"},
    )
    if not file.endswith(".pth"):
        model.encoder.save_pretrained(file)
        print(f"folder of transformers: {file}")
        return
    state: dict[str, torch.Tensor] = {}
    own = model.state_dict()
    names = {"cls_token": "cls_token", "distillation_token": "dist_token", "position_embeddings": "pos_embed"}
    for key, value in own.items():
        name = key.removeprefix("encoder.")
        if name.startswith("embeddings.patch_embeddings.projection."):
            state[f"module.v.patch_embed.proj.{name.rpartition('.')[2]}"] = value
        elif name.startswith("embeddings."):
            state[f"module.v.{names[name.partition('.')[2]]}"] = value
        elif name.startswith("layers."):
            name = name.replace("layers.", "module.v.blocks.").replace("layernorm_before", "norm1")
            name = name.replace("layernorm_after", "norm2").replace("attention.o_proj", "attn.proj")
            if "attention.q_proj" in name:
                qkv = [own[key.replace("q_proj", f"{role}_proj")] for role in "qkv"]
                state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(qkv)
            elif "attention." not in name:
                state[name] = value
        elif name.startswith("layernorm."):
            state[f"module.v.norm.{name.rpartition('.')[2]}"] = value
    dim = model.encoder.config.hidden_size
    state |= {f"module.v.{head}.bias": torch.zeros(1000) for head in ("head", "head_dist")}
    if like == "ssast":
        state |= {"module.mask_embed": torch.zeros(1, 1, dim), "module.cpredlayer.0.weight": torch.zeros(256, dim)}
        state |= {"module.gpredlayer.0.weight": torch.zeros(256, dim)}
        state |= {"module.p_input_fdim": torch.tensor(128.0), "module.p_input_tdim": torch.tensor(1024.0)}
    else:
        for key, value in own.items():
            if key.startswith(("norm.", "head.")):
                place = {"norm": "0", "head": "1"}[key.partition(".")[0]]
                state[f"module.mlp_head.{place}.{key.partition('.')[2]}"] = value
    torch.save(state, file)
    print(f"{len(state)} tensors in the layout of {like.upper()}, width {dim}, {layers} blocks: {file}")


if __name__ == "__main__":
    main()
