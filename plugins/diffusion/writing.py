"""A pipeline with a trained component in it, in memory and as a plain folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_suite.diffusion.pipelines import load_rest, quiet
from peft_suite.errors import MergeError

if TYPE_CHECKING:
    from peft_suite.train.opening import Opened

__all__ = ["check_reloads", "facts_of", "open_with", "write_pipeline"]


def facts_of(opened: Opened) -> dict[str, Any]:
    """What training stored about the model, with its pipeline where it lies now: it may have moved or been merged."""
    stored: dict[str, Any] = dict(opened.metadata["preprocessing"])
    here = getattr(opened.model, "suite_facts", {}) if stored.get("pipeline") else {}
    return {**stored, **{key: here[key] for key in ("pipeline", "config") if key in here}}


def open_with(model: Any, facts: Mapping[str, Any]) -> Any:
    """The pipeline with ``model`` in its component's place, on its device; a word that it has learnt is known.

    Raises:
        FileFormatError: missing or damaged files.
    """
    learned = {"tokenizer": model.suite_tokenizer} if facts.get("placeholder") else {}
    return load_rest(facts, **{str(facts["component"]): model}, **learned).to(next(model.parameters()).device)


def check_reloads(model: Any) -> None:
    """Refuse a merged model with tensors that its configuration knows nothing of: loading would drop them silently.

    Raises:
        MergeError: names them.
    """
    import torch

    cls = type(model)
    with torch.device("meta"):
        plain = cls.from_config(model.config) if hasattr(cls, "from_config") else cls(model.config)
    added = sorted(set(model.state_dict()) - set(plain.state_dict()))
    if added:
        more = f" and {len(added) - 4} more" if added[4:] else ""
        raise MergeError(
            f"Merging gave {cls.__name__} {len(added)} tensors that its configuration has no place for, and "
            f"from_pretrained would drop them: {', '.join(added[:4])}{more}. Nothing was written. Keep the adapter "
            "beside the model instead (peft_suite.load, or `sample ADAPTER`)."
        )


def write_pipeline(model: Any, facts: Mapping[str, Any], folder: Path) -> None:
    """A plain pipeline folder with ``model`` in its component's place; a bare UNet becomes a DDPM pipeline.

    Raises:
        MergeError: the model does not fit its configuration.
    """
    check_reloads(model)
    if facts.get("pipeline"):
        with quiet():
            open_with(model, facts).save_pretrained(folder)
        return
    import diffusers

    config = {k: v for k, v in facts["scheduler"].items() if not k.startswith("_")}
    scheduler = getattr(diffusers, str(facts["scheduler"]["_class_name"])).from_config(config)
    cls: Any = diffusers.DDPMPipeline
    with quiet():
        cls(unet=model, scheduler=scheduler).save_pretrained(folder)
