"""What a checkpoint says before anything is trained on it.

    python pointcloud_checkpoint.py pretrain.pth --backbone point-mae            # what loads, what is missing
    python pointcloud_checkpoint.py --make pretrain.pth                          # a file to try it with, random weights

``--make`` writes random weights of the published size under the keys of Point-MAE's ``pretrain.pth``, in its wrapper.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch

from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.checkpoints import convert, load, measure, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help=".pth or .safetensors")
    parser.add_argument("--backbone", default="point-mae", help="a name of `peft-suite pointcloud backbones`")
    parser.add_argument("--classes", type=int, default=15, help="of your data")
    parser.add_argument("--make", action="store_true", help="write the file instead of reading it")
    parser.add_argument("--embed-dim", type=int, default=384, help="width, for --make")
    options = parser.parse_args()
    if options.make:
        make(options.file, options.embed_dim)
        return
    state, layout, _ = convert(read(options.file))
    print(f"layout: {layout}; sizes: {', '.join(f'{k} {v}' for k, v in measure(state).items())}")
    model = backbones.build(options.backbone, options.classes, pretrained=False, checkpoint="", options={})
    report = load(model, options.file)
    print("fresh here, not in the file:", grouped(report.missing))
    print("in the file, not used here: ", grouped(report.unexpected))
    print("head of other classes:      ", grouped(report.reshaped))


def grouped(keys: tuple[str, ...]) -> str:
    """Keys by their first name, with counts."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items()) or "nothing"


def make(file: str, dim: int) -> None:
    """The encoder under ``MAE_encoder.``, a mask token and a decoder beside it, all in "base_model"."""
    options: dict[str, Any] = {"embed_dim": dim}
    model = backbones.build("point-mae", 1, pretrained=False, checkpoint="", options=options)
    fresh = ("cls_token", "cls_pos", "cls_head_finetune.")
    body = {k: v for k, v in model.state_dict().items() if not k.startswith(fresh)}
    state = {f"module.MAE_encoder.{k}": v for k, v in body.items()}
    state["module.mask_token"] = torch.zeros(1, 1, dim)
    block = {k.removeprefix("blocks.blocks.0."): v for k, v in body.items() if k.startswith("blocks.blocks.0.")}
    state |= {f"module.MAE_decoder.blocks.0.{k}": v.clone() for k, v in block.items()}
    torch.save({"base_model": state, "epoch": 300}, file)
    print(f"{len(state)} tensors in Point-MAE's layout, width {dim}: {file}")


if __name__ == "__main__":
    main()
