"""What can be chosen by name. One row adds a thing; its module is imported when it is used."""

from __future__ import annotations

from typing import Any

from preflight.core.registry import Registry

ACTIVATIONS: Registry[Any] = Registry(
    "--activation",
    {
        "gelu": "torch.nn.functional:gelu",
        "gelu_tanh": "preflight.models.activations:gelu_tanh",
        "relu": "torch.nn.functional:relu",
        "relu_squared": "preflight.models.activations:relu_squared",
        "silu": "torch.nn.functional:silu",
        "tanh": "torch:tanh",
    },
)
# A LanguageModel: a class built from (ModelConfig, gradient_checkpointing=...). The parts that a
# family prefers are in MODEL_FAMILIES (settings/model.py).
_TRANSFORMER = "transformer_model:DecoderOnlyTransformer"
MODELS: Registry[Any] = Registry(
    "--model-family",
    {
        "gpt2": _TRANSFORMER,
        "llama": _TRANSFORMER,
        "modern": _TRANSFORMER,
        "mlp": "preflight.models.ngram_mlp:NgramMLP",
    },
)
# Parts of the transformer. A norm is built from (size, eps=..., bias=...), the others from
# (ModelConfig).
NORMS: Registry[Any] = Registry(
    "--norm", {"layer": "torch.nn:LayerNorm", "rms": "preflight.models.norms:RMSNorm"}
)
POSITIONS: Registry[Any] = Registry(
    "--positions",
    {
        "learned": "preflight.models.positions:LearnedPositions",
        "rope": "preflight.models.positions:RotaryPositions",
    },
)
FEED_FORWARDS: Registry[Any] = Registry(
    "--feed-forward",
    {
        "mlp": "preflight.models.mlp:MLP",
        "swiglu": "preflight.models.mlp:SwiGLU",
        "geglu": "preflight.models.mlp:GeGLU",
        "reglu": "preflight.models.mlp:ReGLU",
    },
)
# An OptimizerSpec: how it is built, its state's size, and whether it skips an update by itself.
OPTIMIZERS: Registry[Any] = Registry(
    "--optimizer",
    {
        "adamw": "preflight.training.optimizers:ADAMW",
        "adam": "preflight.training.optimizers:ADAM",
        "sgd": "preflight.training.optimizers:SGD",
        "muon": "preflight.training.optimizers:MUON",
    },
)
# (step, plan) -> learning rate.
SCHEDULES: Registry[Any] = Registry(
    "--scheduler",
    {
        "cosine": "preflight.training.schedules:cosine",
        "linear": "preflight.training.schedules:linear",
        "onecycle": "preflight.training.schedules:onecycle",
        "wsd": "preflight.training.schedules:warmup_stable_decay",
        "none": "preflight.training.schedules:constant",
    },
)
# A kind of tokenizer: a class with `load(name)` or `train(text, vocab_size)`, and with
# `load_saved(folder, facts)`.
_TIKTOKEN = "preflight.tokenization.tiktoken_bpe:TiktokenTokenizer"
TOKENIZERS: Registry[Any] = Registry(
    "--tokenizer",
    {
        "gpt2": _TIKTOKEN,
        "r50k_base": _TIKTOKEN,
        "p50k_base": _TIKTOKEN,
        "p50k_edit": _TIKTOKEN,
        "cl100k_base": _TIKTOKEN,
        "o200k_base": _TIKTOKEN,
        "o200k_harmony": _TIKTOKEN,
        "bpe": "preflight.tokenization.own_bpe:OwnBpeTokenizer",
        "char": "preflight.tokenization.characters:CharTokenizer",
        "byte": "preflight.tokenization.raw_bytes:ByteTokenizer",
    },
)
# Kinds of tokenizers that ``--tokenizer`` names by a file, by the end of the file's name.
TOKENIZER_FILES: Registry[Any] = Registry(
    "--tokenizer",
    {
        ".json": "preflight.tokenization.huggingface:HuggingFaceTokenizer",
        ".model": "preflight.tokenization.sentencepiece_model:SentencePieceTokenizer",
    },
)
# (a value of the flag, or None; settings) -> list[Source], or None if it is not for this kind.
# The last row is asked first; text files take what no other kind takes.
SOURCES: Registry[Any] = Registry(
    "--text-file",
    {
        "text": "preflight.corpus.sources.text:find",
        "table": "preflight.corpus.sources.tables:find",
        "parquet": "preflight.corpus.sources.parquet:find",
        "wiki": "preflight.corpus.sources.wiki_dump:find",
        "enterprise": "preflight.corpus.sources.wiki_enterprise:find",
        "tokens": "preflight.corpus.sources.token_arrays:find",
        "pipe": "preflight.corpus.sources.pipe:find",
        "builtin": "preflight.corpus.sources.builtin:find",
        "hub": "preflight.corpus.sources.hub:find",
    },
)
# (text) -> clean text; empty where nothing is left. Worker processes call it.
CLEANERS: Registry[Any] = Registry(
    "--clean",
    {
        "none": "preflight.corpus.cleaning.plain:keep",
        "unicode": "preflight.corpus.cleaning.plain:clean_unicode",
        "html": "preflight.corpus.cleaning.html:clean_html",
        "wiki": "preflight.corpus.cleaning.wiki:clean_wiki",
    },
)
# (document) -> its text, changed or not, and why it is dropped: see `preflight.corpus.filtering`.
FILTERS: Registry[Any] = Registry(
    "--filter",
    {
        "gopher_quality": "preflight.corpus.filtering.gopher:judge_quality",
        "gopher_repetition": "preflight.corpus.filtering.gopher:judge_repetition",
        "c4": "preflight.corpus.filtering.c4:judge_lines",
        "fineweb": "preflight.corpus.filtering.fineweb:judge_lines",
    },
)
# An `Importer` and an `Exporter` (formats/protocol.py) for each format, as classes without
# arguments. Each is asked in turn whether a path is for it.
IMPORTERS: Registry[Any] = Registry(
    "--import",
    {
        "huggingface": "preflight.formats.hf_import:HuggingFaceImporter",
        "gguf": "preflight.formats.gguf_import:GgufImporter",
        "state-dict": "preflight.formats.state_dict_import:StateDictImporter",
    },
)
EXPORTERS: Registry[Any] = Registry(
    "--export",
    {
        "gguf": "preflight.formats.gguf_export:GgufExporter",
        "huggingface": "preflight.formats.hf_export:HuggingFaceExporter",
    },
)
# (output_dir) -> Tracker. A run logs to all of them, but to one whose name is a flag only with it.
TRACKERS: Registry[Any] = Registry(
    "tracker",
    {
        "metrics.jsonl": "preflight.training.metrics:open_metrics",
        "tensorboard": "preflight.training.tensorboard:TensorBoardLog",
    },
)
# (config) -> exit code, by the flag that chooses the mode.
MODES: Registry[Any] = Registry(
    "mode",
    {
        "check": "preflight.modes.check:run",
        "validate-only": "preflight.modes.validate:run",
        "prepare": "preflight.modes.prepare:run",
        "train": "preflight.modes.train:run",
        "finetune": "preflight.modes.finetune:run",
        "get-optimal-bs": "preflight.modes.find_batch_size:run",
        "find-lr": "preflight.modes.find_lr:run",
        "sweep": "preflight.modes.sweep:run",
        "forecast": "preflight.modes.forecast:run",
        "generate": "preflight.modes.generate:run",
        "serve": "preflight.modes.serve:run",
        "evaluate": "preflight.modes.evaluate:run",
        "compare": "preflight.modes.compare:run",
        "import": "preflight.modes.import_model:run",
        "export": "preflight.modes.export_model:run",
        "report": "preflight.modes.run_report:run",
        "tokenize": "preflight.modes.tokenize:run_tokenize",
        "detokenize": "preflight.modes.tokenize:run_detokenize",
    },
)
# () -> exit code: what a call without any flag shows on a terminal.
MENUS: Registry[Any] = Registry("menu", {"menu": "preflight.modes.menu:run_menu"})
MODE_SUMMARIES = {
    "check": "predict memory, time, cost and learning of a run before it starts",
    "validate-only": "run every part of a run once, as numbered checks",
    "prepare": "prepare the data alone, with a report of what is in it",
    "train": "prepare the data where needed, then train",
    "finetune": "teach a trained model to answer, from a file of chats",
    "get-optimal-bs": "find the largest batch size that fits, and the fastest",
    "find-lr": "find a good learning rate by a range test",
    "sweep": "compare values by short trainings: --sweep learning_rate=1e-3,2e-3",
    "forecast": "predict the bits per byte of a run from three short trainings",
    "generate": "generate text from a checkpoint",
    "serve": "serve checkpoints to chat with: a page, and the OpenAI interface",
    "evaluate": "measure a checkpoint on text and on tasks such as LAMBADA",
    "compare": "complete the same prompts with several checkpoints, side by side",
    "import": "take in a model of another tool: --import FOLDER or model.gguf",
    "export": "write and prove a model for another tool: --export FOLDER or model.gguf",
    "report": "make one page of a run: plan, outcome, curves, evaluations",
    "tokenize": "show the tokens of a text, piece by piece",
    "detokenize": "show the text that token ids stand for: --detokenize 1,2,3",
}
