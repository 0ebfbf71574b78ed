"""Pipelines of diffusers on disk: where they are, one component of them, and all others around it. Nothing is fetched.

A pipeline is a folder that ``save_pretrained`` wrote, or a single file (``.safetensors``, ``.ckpt``), which diffusers
reads with the configuration of a folder beside it (``config``). Weights are safetensors, or torch files read without
unpickling.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_suite.errors import ConfigError, FileFormatError, UnknownNameError, UnsupportedError

__all__ = [
    "COMPONENTS",
    "check_tokenizer",
    "index_of",
    "is_single_file",
    "load_component",
    "load_rest",
    "load_tokenizer",
    "locate",
    "quiet",
    "scheduler_config",
    "single_config",
]

COMPONENTS = ("unet", "transformer", "text_encoder")
INDEX = "model_index.json"
SINGLE = (".safetensors", ".ckpt", ".pt", ".bin")
_UNUSED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def locate(name: str) -> Path:
    """The folder or file that ``name`` is; a name on the hub counts where it was downloaded before.

    Raises:
        ConfigError: there is no such thing here; how to get it.
        FileFormatError: a folder that is no pipeline, or a file of another kind.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise FileFormatError(
                f"{path} has no {INDEX}, so it is no diffusers pipeline. Give the folder that save_pretrained wrote."
            )
        return path
    if path.is_file():
        if path.suffix.lower() not in SINGLE:
            raise FileFormatError(f"{path} is no weights file ({', '.join(SINGLE)}) and no pipeline folder.")
        return path
    if name.count("/") == 1 and not name.startswith((".", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            pass
        raise ConfigError(
            f"{name!r} is neither a folder nor a file here, and nothing is downloaded by itself. "
            f"Fetch it with `hf download {name}`, or give the path of a pipeline folder."
        )
    raise ConfigError(
        f"{name!r} does not exist. Give a diffusers pipeline folder, a single-file checkpoint, or micro-unet."
    )


def is_single_file(path: str | Path) -> bool:
    """Is it one file and not a folder?"""
    return Path(path).is_file()


def index_of(path: Path) -> Mapping[str, Any]:
    """``model_index.json`` of a folder.

    Raises:
        FileFormatError: it cannot be read.
    """
    try:
        index = json.loads((path / INDEX).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path / INDEX} cannot be read: {error}.") from error
    if not isinstance(index, dict):
        raise FileFormatError(f"{path / INDEX} holds no mapping.")
    return index


def pick_component(index: Mapping[str, Any], wanted: str, path: Path) -> str:
    """``wanted``, or what denoises in this pipeline.

    Raises:
        UnknownNameError: the pipeline has no such component.
    """
    there = [c for c in (*COMPONENTS, "text_encoder_2", "text_encoder_3") if _present(index, c)]
    if not wanted:
        for name in COMPONENTS[:2]:
            if name in there:
                return name
        raise FileFormatError(f"{path} has neither a unet nor a transformer: there is nothing to train.")
    if wanted not in there:
        raise UnknownNameError("component", wanted, there, f"These are in {path}.")
    return wanted


def _present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry[0])


def load_component(
    path: Path, component: str, *, pretrained: bool = True, dtype: Any = None, config: str = "", weights: str = ""
) -> tuple[Any, Mapping[str, Any]]:
    """(the module, the scheduler's config) of a pipeline.

    Args:
        weights: a single file with the component's weights, in its authors' or in diffusers' keys, where they are not
            those of the folder.

    Raises:
        FileFormatError: missing or damaged files.
    """
    if is_single_file(path):
        pipeline = open_single(path, single_config(path, config), dtype)
        module = getattr(pipeline, component, None)
        if module is None:
            raise UnknownNameError("component", component, [c for c in COMPONENTS if hasattr(pipeline, c)])
        return module, {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    from safetensors import SafetensorError

    index = index_of(path)
    library, name = index[component]
    cls = _class(library, name)
    try:
        options = {"torch_dtype": dtype} if dtype is not None else {}
        if weights:
            with quiet():
                module = cls.from_single_file(
                    weights, config=str(path), subfolder=component, local_files_only=True, **options
                )
        elif pretrained:
            with quiet():
                module = cls.from_pretrained(path / component, local_files_only=True, **options)
        elif hasattr(cls, "load_config"):
            module = cls.from_config(cls.load_config(path / component))
        else:
            module = cls(cls.config_class.from_pretrained(path / component))
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        raise FileFormatError(f"{weights or path / component} cannot be read: {_short(error)}") from error
    return module, scheduler_config(path)


def _class(library: str, name: str) -> Any:
    import diffusers
    import transformers

    for module in (diffusers, transformers):
        if hasattr(module, name):
            return getattr(module, name)
    raise UnsupportedError(f"The class {name} of {library} is in neither diffusers nor transformers as installed here.")


def scheduler_config(path: Path) -> Mapping[str, Any]:
    """The scheduler's config of a pipeline folder."""
    file = path / "scheduler" / "scheduler_config.json"
    try:
        config: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{file} cannot be read: {error}. A pipeline's scheduler says how it trains.") from error
    return config


def single_config(path: Path, config: str = "") -> Path:
    """The pipeline folder with the configuration of a single file: ``config``, or the one of its kind, if it is here.

    diffusers itself would download what it does not find, also where it is told to read local files only.

    Raises:
        ConfigError: it is not here.
        FileFormatError: the file is damaged.
    """
    from diffusers.loaders import single_file_utils

    if config:
        return locate(config)
    reading: Any = single_file_utils
    try:
        checkpoint = reading.load_single_file_checkpoint(str(path), local_files_only=True)
        name = str(reading.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"])
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise FileFormatError(f"{path} cannot be read as a checkpoint: {_short(error)}") from error
    try:
        return locate(name)
    except ConfigError as error:
        raise ConfigError(
            f"{path} holds weights only, and their configuration, that of {name}, is not here; nothing is downloaded "
            f"by itself. Give the folder of a pipeline like it, backbone.options.config=FOLDER, or fetch it: "
            f"hf download {name} --exclude '*.safetensors' --exclude '*.bin' --exclude '*.ckpt'"
        ) from error


def open_single(path: Path, config: Path, dtype: Any = None) -> Any:
    """The pipeline of a single-file checkpoint, of the class that the folder ``config`` names.

    Raises:
        FileFormatError: diffusers does not know its keys, or it lacks components.
    """
    import torch

    index = index_of(config)
    name = str(index.get("_class_name"))
    unused = {k: v for k, v in _UNUSED.items() if k in index}
    try:
        with quiet():
            return _class("diffusers", name).from_single_file(
                str(path), config=str(config), local_files_only=True, torch_dtype=dtype or torch.float32, **unused
            )
    except Exception as error:  # whatever other keys and shapes make the converters raise
        raise FileFormatError(
            f"{path} cannot be opened as the {name} of {config}: {_short(error)} Is the configuration that of this "
            "model? A file with one component only goes beside the folder of all others: --backbone FOLDER "
            "--checkpoint FILE."
        ) from error


def load_rest(facts: Mapping[str, Any], without: Sequence[str] = (), **given: Any) -> Any:
    """The pipeline of ``facts["pipeline"]`` without some components, and with those that are ``given``.

    Raises:
        FileFormatError: missing or damaged files.
    """
    import diffusers

    cls: Any = diffusers.DiffusionPipeline
    path = Path(str(facts["pipeline"]))
    if is_single_file(path):
        pipeline = open_single(path, single_config(path, str(facts.get("config") or "")))
        pipeline.register_modules(**{**dict.fromkeys(n for n in without if hasattr(pipeline, n)), **given})
        return pipeline
    index = index_of(locate(str(path)))
    absent = {k: None for k, v in index.items() if isinstance(v, list) and not v[0]}  # saved without them
    left_out = {**absent, **{name: None for name in without if _present(index, name)}}
    unused = {k: v for k, v in _UNUSED.items() if k in index}
    try:
        with quiet():
            pipeline = cls.from_pretrained(path, local_files_only=True, **{**unused, **left_out, **given})
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{path} cannot be read as a pipeline: {_short(error)}") from error
    learns = facts.get("scheduler", {}).get("prediction_type")
    if learns and learns != pipeline.scheduler.config.get("prediction_type", learns):  # training has changed it
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=learns)
    return pipeline


def load_tokenizer(path: Path) -> Any:
    """The first tokenizer of a pipeline folder.

    Raises:
        FileFormatError: there is none, or one without a vocabulary.
    """
    index = index_of(path)
    if not _present(index, "tokenizer"):
        raise FileFormatError(f"{path} has no tokenizer.")
    tokenizer = _class(*index["tokenizer"]).from_pretrained(path / "tokenizer", local_files_only=True)
    check_tokenizer(tokenizer, str(path))
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers about files on the disk."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    ours: Any = diffusers_logging
    theirs: Any = transformers_logging
    shown = ours.is_progress_bar_enabled(), theirs.is_progress_bar_enabled()
    ours.disable_progress_bar()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        for was, library in zip(shown, (ours, theirs), strict=True):
            if was:
                library.enable_progress_bar()


def check_tokenizer(tokenizer: Any, where: str) -> None:
    """Raise FileFormatError for a tokenizer to which every text is the same.

    transformers 5 gives such a one, of two tokens, without a word when it does not find the vocabulary it is told.
    """
    known = len(tokenizer)
    ids = tokenizer("a photo of a dog", add_special_tokens=False).input_ids if known >= 3 else []
    unknown = getattr(tokenizer, "unk_token_id", None)
    if known < 3 or not ids or all(i == unknown for i in ids):
        raise FileFormatError(
            f"The tokenizer of {where} knows {known} tokens and cannot tell texts apart: its vocabulary was not found. "
            "Look for tokenizer.json, or vocab.json and merges.txt, in its folder."
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
