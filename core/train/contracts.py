"""What a plugin hands to the training loop: backbones and data. Every modality speaks this one language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from peft_suite.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from peft_suite.train.task import Task

__all__ = ["Backbones", "BackboneInfo", "DataConfig", "DataSource", "DataSplits"]


@dataclass(frozen=True)
class BackboneInfo:
    """One line of ``peft-suite PLUGIN backbones``. ``parameters`` is None where it is not known without building."""

    name: str
    family: str
    summary: str = ""
    parameters: int | None = None


class Backbones(Protocol):
    """The object behind ``Plugin.backbones``.

    It may have ``prepare(model, method) -> method``, which readies a model for a method before it is adapted and may
    fill in the method's configuration, and ``write_merged(opened, folder) -> files``, how a merged model is written
    where that is no single file of weights: ``peft_suite.json`` in the folder holds its metadata, and the folder is a
    name that :meth:`build` knows.
    """

    def list(self, pattern: str = "*") -> Sequence[BackboneInfo]:
        """Backbones whose name matches a glob."""
        ...

    def build(
        self, name: str, num_outputs: int, *, pretrained: bool, checkpoint: str, options: Mapping[str, Any]
    ) -> nn.Module:
        """A backbone with a fresh head of ``num_outputs``.

        Args:
            name: a name of :meth:`list`; unknown names raise UnknownNameError with the closest.
            pretrained: load the published weights.
            checkpoint: local weights file instead (safetensors, or ``weights_only`` torch files); "" for none.
            options: extra keyword arguments of the model.
        """
        ...

    def preprocessing(self, name: str, model: nn.Module) -> dict[str, Any]:
        """JSON-ready input description (size, mean, std, ...) that the data source turns into transforms."""
        ...


@dataclass(frozen=True)
class DataConfig(Config):
    """Fields that every modality's data configuration shares; a plugin subclasses it to add its own.

    Attributes:
        root: folder, list file, or the name of a data set.
        format: layout; "auto" looks at ``root``.
        val_fraction: share of train held out, per class and by ``split_seed``, when there is no validation split.
        shots: keep this many training samples per class (0 keeps all), drawn by ``split_seed``.
        skip_bad: leave unreadable files out with a count instead of stopping.
    """

    root: str = ""
    format: str = "auto"
    val_fraction: float = 0.2
    shots: int = 0
    split_seed: int = 0
    augment: str = "none"
    skip_bad: bool = False
    workers: int = 0

    def validate(self) -> None:
        self.require("val_fraction", 0 <= self.val_fraction < 1, "must be at least 0 and below 1")
        self.require("shots", self.shots >= 0, "must not be negative")
        self.require("workers", self.workers >= 0, "must not be negative")


@dataclass
class DataSplits:
    """Data ready to train on. Samples are ``(input tensor, target)``.

    A data set may have ``target(index)`` (labels without decoding), ``set_epoch(epoch)`` (augmentation then depends
    on epoch and index only, so that a resumed run sees the same samples) and ``group(index)`` (hashable: a batch holds
    samples of one group only, for inputs of different shapes).

    ``target`` is an int class index, or for ``multi_label`` a float tensor ``[C]`` of 0 and 1.

    Attributes:
        train, val, test: map-style data sets; val and test may be None.
        classes: class names in index order.
        fingerprint: hash of the file list, labels and sizes, for ``run.json``.
        info: JSON-ready facts for the report (counts per class and split, skipped files, preprocessing);
            ``"no_validation"`` says in one sentence why there cannot be validation data.
        thumbnail: ``thumbnail(dataset, index) -> PNG bytes`` of the sample as a person would look at it.
        task: what is learnt, where it is not classification: a :class:`peft_suite.train.Task`.
        picture: ``picture(dataset, index, map) -> PNG bytes`` of a sample beside what the model drew for it.
        sample_name: ``sample_name(dataset, index) -> str``, a file name or id.
        sound: ``sound(dataset, index) -> WAV or Ogg bytes`` of a few seconds, for the players of the report.
    """

    train: Dataset[Any] | None
    val: Dataset[Any] | None
    test: Dataset[Any] | None
    classes: tuple[str, ...]
    fingerprint: str
    multi_label: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    thumbnail: Callable[[Any, int], bytes] | None = None
    sample_name: Callable[[Any, int], str] | None = None
    task: Task | None = None
    picture: Callable[[Any, int, Tensor], bytes] | None = None
    sound: Callable[[Any, int], bytes] | None = None


class DataSource(Protocol):
    """The object behind ``Plugin.data``.

    A dense task's source has one more method, which the verb ``predict`` calls with the outputs of :meth:`inputs`:
    ``write(names, outputs, folder, classes) -> rows`` puts one file per input into ``folder`` while ``outputs`` (an
    iterator of batches) runs, and returns a JSON-ready row per input, with at least ``file`` and ``written``.
    """

    config: type[DataConfig]

    def classes(self, config: DataConfig) -> tuple[tuple[str, ...], bool]:
        """(class names in index order, multi-label?) without decoding samples: sizes the head."""
        ...

    def load(self, config: DataConfig, preprocessing: Mapping[str, Any]) -> DataSplits:
        """The splits. Raises DataError: empty folders, classes without samples, broken files, labels out of range."""
        ...

    def inputs(self, paths: Sequence[str], preprocessing: Mapping[str, Any]) -> tuple[list[str], Dataset[Tensor]]:
        """(names, data set of input tensors) for ``predict``: files and folders, searched recursively, in order."""
        ...
