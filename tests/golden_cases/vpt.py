"""VPT."""

from __future__ import annotations

from golden_cases import Case, Config, Place, Tensors, blocks, group, head, vit


def vpt(config: Config, tensors: Tensors) -> Case:
    project = None if config["project"] < 0 else config["project"]
    method = {
        "name": "vpt",
        "num_tokens": config["num_tokens"],
        "deep": config["deep"],
        "project": project,
        "dropout": config["prompt_dropout"],
        "position": "after_prefix",
    }
    places = {**head(), "transformer.prompt_embeddings": [Place("norm_pre.vpt.prompt", theirs=0)]}
    if config["deep"]:
        places["transformer.deep_prompt_embeddings"] = [
            Place(f"blocks.{i}.vpt.prompt", theirs=i - 1) for i in blocks(config) if i
        ]
    if project is not None:
        for n in ("weight", "bias"):
            places[f"transformer.prompt_proj.{n}"] = [Place(f"norm_pre.vpt.proj.{n}")]
    return Case(vit(config, group(tensors, "timm.")), method, places)


CASES = {"vision-vpt-shallow": vpt, "vision-vpt-deep": vpt}
