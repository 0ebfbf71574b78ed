"""Audio: Audio Spectrogram Transformers and their methods. Importing it imports neither torch nor transformers."""

from __future__ import annotations

from peft_suite.plugins import AnatomyEntry, DatasetEntry, MethodEntry, Plugin, VerbEntry

__all__ = ["plugin"]

_AT = "peft_suite.audio.anatomies"
_HF = "transformers.models"
_AST = f"{_HF}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer"
_WAV = f"{_HF}.wav2vec2.modeling_wav2vec2"
_METHODS = "peft_suite.audio.methods"
_BOTTLENECK = "peft_suite.methods.bottleneck:Bottleneck"
_STUDY = "Cappellazzo et al., MLSP 2024"
_PARALLEL = {"insertion": "parallel", "activation": "gelu", "norms": True, "bottleneck": 12}

plugin = Plugin(
    name="audio",
    summary="Classification of sounds with Audio Spectrogram Transformers.",
    extra="audio",
    requires=("transformers", "soundfile"),
    doctor="peft_suite.audio.frontend.logmel:examine",
    methods=(
        MethodEntry(
            "conformer",
            f"{_METHODS}.conformer:Conformer",
            "A narrow convolution along the token sequence beside the MLP.",
            _STUDY,
        ),
        MethodEntry(
            "soft-moa",
            f"{_METHODS}.moa:SoftMoA",
            "A mixture of small adapters, each on slots: weighted means of all tokens.",
            "Cappellazzo et al., Interspeech 2024",
        ),
        MethodEntry(
            "dense-moa",
            f"{_METHODS}.moa:DenseMoA",
            "A mixture of small adapters, weighted per token by a router.",
            "Cappellazzo et al., Interspeech 2024",
        ),
        MethodEntry(
            "audio-prompts",
            f"{_METHODS}.prompts:AudioPrompts",
            "Prompt tokens in the place of the distillation token, read by the head too.",
            _STUDY,
        ),
        MethodEntry(
            "prefix",
            f"{_METHODS}.prefix:PrefixTuning",
            "Learned keys and values in the attention of every block.",
            "Li and Liang, ACL 2021",
        ),
        MethodEntry(
            "ast-pfeiffer",
            _BOTTLENECK,
            "adapter as in the audio study: one bottleneck parallel to the MLP, with its norm.",
            _STUDY,
            {"position": "mlp", **_PARALLEL},
        ),
        MethodEntry(
            "ast-houlsby",
            _BOTTLENECK,
            "adapter as in the audio study: bottlenecks parallel to attention and MLP, with their norms.",
            _STUDY,
            {"position": "both", **_PARALLEL},
        ),
        MethodEntry(
            "ast-lora",
            "peft_suite.methods.lora:LoRA",
            "lora as in the audio study: rank 6 on q and v, scale 1/8.",
            _STUDY,
            {"rank": 6, "alpha": 0.75},
        ),
        MethodEntry(
            "ast-bitfit",
            "peft_suite.methods.bitfit:BitFit",
            "bitfit as in the audio study: the patch embedding's bias stays frozen.",
            _STUDY,
            {"embed": False},
        ),
    ),
    anatomies=(
        AnatomyEntry(
            "ast",
            ("peft_suite.audio.models.classifier.AudioClassifier",),
            f"{_AT}.classifier:describe",
            (f"{_AT}.ast:example", f"{_AT}.ast:example_original"),
        ),
        AnatomyEntry(
            "ast",
            (f"{_AST}.ASTModel", f"{_AST}.ASTForAudioClassification"),
            f"{_AT}.ast:describe",
            (f"{_AT}.ast:example_huggingface", f"{_AT}.ast:example_encoder"),
        ),
        AnatomyEntry(
            "wav2vec2",
            (f"{_WAV}.Wav2Vec2Model", f"{_WAV}.Wav2Vec2ForSequenceClassification"),
            f"{_AT}.wav2vec2:describe",
            (f"{_AT}.wav2vec2:example", f"{_AT}.wav2vec2:example_huggingface"),
            kin="ast",
        ),
    ),
    datasets=(
        DatasetEntry("folder", "ROOT/CLASS/SOUND, ROOT/SPLIT/CLASS/SOUND or ROOT/CLASS/SPLIT/SOUND"),
        DatasetEntry("csv", "a table with path and label, optionally split, fold, speaker; several labels for mAP"),
        DatasetEntry("esc50", "50 classes of sounds, 5 folds (data.fold, crossval)"),
        DatasetEntry("urbansound8k", "10 classes of city sounds, 10 folds"),
        DatasetEntry("speech-commands", "version 2: 35 words, official lists"),
        DatasetEntry("fluent-speech", "31 intents of spoken commands"),
        DatasetEntry("fsdd", "spoken digits by name; data.speaker_out tests on a speaker"),
        DatasetEntry("sounds-shifted", "built in: ten classes that the embedded backbone never heard, in noisy rooms"),
    ),
    verbs=(
        VerbEntry(
            "predict",
            "peft_suite.audio.predict_verb:predict",
            "Predict classes of sounds; long recordings by sliding windows, with times.",
        ),
        VerbEntry(
            "crossval", "peft_suite.audio.crossval_verb:crossval", "Every fold tests once; mean and spread over them."
        ),
    ),
    backbones="peft_suite.audio.backbones:backbones",
    recipes="peft_suite.audio.recipes:book",
    data="peft_suite.audio.data:source",
    demo="peft_suite.audio.demo:run",
    example=("micro-ast", "sounds-shifted"),
)
