"""The recipe's ``data``, ``tokenizer`` and ``clusters``: what text there is, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Source:
    """One collection of documents: the files below a folder, one document a file, line or row."""

    name: str = "text"
    """Names the dataset on disk: letters, digits, '-' and '_'."""
    path: str = ""
    """A folder or a file; ``package:NAME/sub/folder`` looks inside an installed Python package,
    ``stdlib:`` is the interpreter's own standard library, ``docstrings:NAME`` are the docstrings of
    an installed Python package, one document a module. A relative path starts at the recipe."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """text: a file is a document. jsonl: a line is (also packed as .gz, .bz2, .xz or .zst). parquet: a
    row is. auto goes by each file's name: .jsonl, .jsonl.gz, ..., .parquet, and text for all others."""
    text_key: str = "text"
    """Key of a JSON line, or column of a Parquet file, that holds the text."""
    include: list[str] = field(default_factory=lambda: ["**/*"])
    """Glob patterns, relative to ``path``; a file belongs to the source if one of them matches."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to leave out."""
    weight: float = 1.0
    """Sampling weight within the domain; the weights of a domain need not sum to 1."""
    max_bytes: int | None = None
    """Take documents until so many bytes of text are reached; null takes all. Files come in a shuffled
    order that depends on ``data.random_seed`` alone, the lines or rows of one in their own."""


@dataclass
class Domain:
    """A domain of text, and the expert of it."""

    name: str = ""
    """Names the expert: letters, digits, '-' and '_'."""
    sources: list[Source] = field(default_factory=list)
    """Where its text comes from."""
    expert: bool = True
    """Whether an expert is trained on it. False: text for the seed, the MoE stage and the baselines alone, as
    the seed's own data in the paper's MoE stage."""
    start: str | None = None
    """The earliest time of its text, a number (year) or a date YYYY-MM-DD; for ``method: timoe`` and
    ``moe.moe_router_time_mask``."""
    end: str | None = None
    """The latest time of its text; queries of earlier times do not see its expert."""


@dataclass
class Tokenizer:
    """The tokenizer that all models share."""

    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = "SentencePieceTokenizer"
    """Megatron's name of the kind. HuggingFaceTokenizer needs the extra ``hf``."""
    tokenizer_model: str | None = None
    """The tokenizer to use: a SentencePiece ``.model`` file, or a Hugging Face ``tokenizer.json`` or a
    folder that has one. null trains a SentencePiece model on the union of the domains. A relative path
    starts at the recipe."""
    eod_token: str | None = None
    """The token that ends every document, of a HuggingFaceTokenizer; null: the eos_token that the
    ``tokenizer_config.json`` beside it names."""
    vocab_size: int = 4096
    """Pieces to train; ignored where ``tokenizer_model`` is given."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm, for training. Llama-2 used bpe."""
    training_bytes: int = 4_000_000
    """Bytes of text to train it on, the same share from each domain."""


@dataclass
class Data:
    """Text in, token files (``.bin/.idx``) out."""

    domains: list[Domain] = field(default_factory=list)
    """The domains, in order: expert i is domain i, and router row i is expert i; the seed is last."""
    held_out_fraction: float = 0.05
    """Share of the documents of each source (by bytes) that no model trains on: the held-out text."""
    held_out_max_tokens: int | None = None
    """Evaluate on at most so many held-out tokens of each domain; null takes all."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do with a document that is bad (not UTF-8, not JSON, without the text's key, larger than
    1 GiB): stop and name it, or skip and count it."""
    random_seed: int = 1234
    """Seed of the document shuffle and of the train / held-out split."""
    num_workers: int = 0
    """Processes that read and tokenize; 0 takes one a CPU core."""
    loader: Literal["megatron", "dali"] = "megatron"
    """Who brings the samples to the model: Megatron's datasets, in the training process; or NVIDIA DALI
    on top of them (extra ``dali``), which has batches ready before they are asked for, on the GPU where
    there is one. Both give the same samples in the same order, so a run may change it and go on."""


@dataclass
class Clusters:
    """c-BTM: domains that are found in the training text itself, for ``method: cbtm`` (arXiv 2303.14177)."""

    number: int = 4
    """Clusters, and experts: ``cluster0``, ``cluster1``, ..."""
    dimensions: int = 100
    """Main directions of the documents' tf-idf vectors that distances are measured in."""
    temperature: float = 0.1
    """T of the ensemble's weights exp(-distance^2 / T)."""
    random_seed: int = 1234
    """Seed of the sample that is clustered, of k-means, and of the order in which documents are dealt."""
