"""Our :class:`AudioClassifier`: described by the family of its encoder."""

from __future__ import annotations

from peft_suite.anatomy import Anatomy
from peft_suite.audio.anatomies import ast, wav2vec2
from peft_suite.audio.models.classifier import AudioClassifier
from peft_suite.describing import under
from peft_suite.errors import BackboneError


def describe(model: AudioClassifier) -> Anatomy:
    """The anatomy of one model. The head is fresh; so is the encoder's final norm, where the model says so.

    Raises:
        BackboneError: an encoder of another kind.
    """
    kinds = {"ASTModel": ast.describe_encoder, "Wav2Vec2Model": wav2vec2.describe_encoder}
    for cls in type(model.encoder).__mro__:
        if cls.__name__ in kinds:
            return kinds[cls.__name__](model, "encoder.", under(model, "norm.", "head."))
    raise BackboneError(f"AudioClassifier holds a {type(model.encoder).__name__}; described are {' and '.join(kinds)}.")
