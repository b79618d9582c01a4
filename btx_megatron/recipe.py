"""One recipe: a YAML file, typed, with overrides from the command line.

Every key is a field of a dataclass below, and the text under a field is its documentation
(docs/recipe.md is made from it). Names are Megatron's wherever Megatron has a flag for the thing.

recipe_file reads it, recipe_checks says what the values must satisfy together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SEED = "seed"  # the name of the seed model's expert; no domain may have it


@dataclass
class Source:
    """One collection of documents: files below a folder, one document a file."""

    name: str = "text"
    """Names the dataset on disk: letters, digits, '-' and '_'."""
    path: str = ""
    """A folder or a file; ``package:NAME/sub/folder`` looks inside an installed Python package,
    ``stdlib:`` is the interpreter's own standard library, ``docstrings:NAME`` are the docstrings of
    an installed Python package, one document a module. A relative path starts at the recipe."""
    include: list[str] = field(default_factory=lambda: ["**/*"])
    """Glob patterns, relative to ``path``; a file is a document if one of them matches."""
    exclude: list[str] = field(default_factory=list)
    """Glob patterns of files to leave out."""
    weight: float = 1.0
    """Sampling weight within the domain; the weights of a domain need not sum to 1."""
    max_bytes: int | None = None
    """Take documents, in a shuffled order that depends on ``data.random_seed`` alone, until so many
    bytes of text are reached; null takes all."""


@dataclass
class Domain:
    """A domain of text; one expert is trained on each."""

    name: str = ""
    """Names the expert: letters, digits, '-' and '_'."""
    sources: list[Source] = field(default_factory=list)
    """Where its text comes from."""


@dataclass
class Tokenizer:
    """The tokenizer that all models share."""

    tokenizer_type: Literal["SentencePieceTokenizer"] = "SentencePieceTokenizer"
    """Megatron's name of the kind."""
    tokenizer_model: str | None = None
    """A SentencePiece ``.model`` file to use; null trains one on the union of the domains."""
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
    """What to do with a document that is not UTF-8: stop and name it, or skip and count it."""
    random_seed: int = 1234
    """Seed of the document shuffle and of the train / held-out split."""
    num_workers: int = 0
    """Processes that tokenize; 0 takes one a CPU core."""


@dataclass
class Model:
    """The Llama-shaped model that every expert shares (Megatron's flags of the same names)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 384
    """Width of the feed-forward (SwiGLU) of each expert."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); null means one for each query head."""
    kv_channels: int | None = None
    """Width of one head; null is hidden_size / num_attention_heads."""
    seq_length: int = 256
    """Tokens a sample."""
    rotary_base: float = 10_000.0
    """RoPE theta."""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the normal initialisation of the seed."""
    untie_embeddings_and_output_weights: bool = True
    """Output head separate from the word embeddings."""
    attention_dropout: float = 0.0
    """Dropout probability on the attention weights."""
    hidden_dropout: float = 0.0
    """Dropout probability on the residual branches."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this; it does not depend on the layout, so that
    checkpoints of every layout have one shape. Must be a multiple of every tensor parallel size."""


@dataclass
class Moe:
    """The mixture-of-experts layer and its balancing (paper, section 3.3)."""

    moe_router_topk: int = 2
    """Experts a token takes."""
    moe_router_pre_softmax: bool = False
    """False: softmax over the chosen k, the paper's SoftMax(TopK). True: softmax over all, then top-k."""
    moe_router_load_balancing_type: Literal["btx", "aux_loss", "none"] = "btx"
    """btx: the paper's loss, with the mean gate value as u (soft). aux_loss: Switch's, with the share
    of dispatched tokens as u (hard). none: no balancing."""
    moe_aux_loss_coeff: float = 0.01
    """Weight alpha of the balancing loss of each layer."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router z-loss; null: none, as in the paper."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's logits and softmax."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""


@dataclass
class Mix:
    """N dense experts become one MoE (paper, section 3.2)."""

    average: Literal["mean"] = "mean"
    """How all weights but the experts' are merged: the equal-weight mean, in fp32, rounded once."""
    include_seed: bool = True
    """The seed joins as one more expert, the generalist, and takes part in the mean."""
    router_init: Literal["normal"] = "normal"
    """normal: N(0, router_std), drawn per layer from ``random_seed``."""
    router_std: float = 0.02
    """Standard deviation of the new router. Small, so that training, not chance, decides the routes:
    after an RMSNorm the logits' spread is about router_std * sqrt(hidden_size)."""
    random_seed: int = 1234
    """Seed of the router's initialisation."""


@dataclass
class Layout:
    """How one stage lies on its ranks. ranks = TP x PP x DP."""

    tensor_model_parallel_size: int = 1
    """TP: each matrix is cut over so many ranks."""
    pipeline_model_parallel_size: int = 1
    """PP: the layers are cut over so many ranks."""
    data_parallel_size: int = 1
    """DP: so many copies of the model, each with its own share of every batch."""
    expert_model_parallel_size: int = 1
    """EP: the experts of the MoE are shared out over so many ranks; divides TP x DP."""
    expert_tensor_parallel_size: int | None = None
    """ETP: tensor parallel size inside an expert; null is TP."""
    sequence_parallel: bool = False
    """Norms and residuals cut along the sequence over the TP ranks; a MoE with TP > 1 needs it."""
    use_distributed_optimizer: bool = False
    """Optimizer state cut over the DP ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Gradient reduction runs during the backward pass."""
    overlap_param_gather: bool = False
    """Parameter gathering runs during the forward pass; needs the distributed optimizer."""

    @property
    def world_size(self) -> int:
        """Number of ranks, one process each."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.data_parallel_size

    def __str__(self) -> str:
        """``TP2 SP``, ``DP2 EP2``, ``1 rank``, ...: the parts that are not the default."""
        sizes = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "DP": self.data_parallel_size,
            "EP": self.expert_model_parallel_size,
            "ETP": self.expert_tensor_parallel_size or 1,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        parts += ["SP"] if self.sequence_parallel else []
        parts += ["distributed optimizer"] if self.use_distributed_optimizer else []
        return " ".join(parts) or "1 rank"


@dataclass
class Training:
    """The optimizer and its schedule. Defaults are the paper's (section 4.1), where it states them."""

    train_iters: int | None = None
    """Steps. Null is allowed for ``stages.dense`` alone: as many tokens as all experts and the
    MoE stage together (rounded up to a step)."""
    micro_batch_size: int = 1
    """Samples a rank takes at once."""
    global_batch_size: int = 8
    """Samples a step, over all ranks."""
    optimizer: Literal["adam"] = "adam"
    """AdamW (Megatron calls it adam)."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule; null is a tenth of the peak."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the schedule after warm-up."""
    lr_warmup_iters: int = 100
    """Steps of linear warm-up; the first step has learning rate 0, as in Megatron."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices (the router's too); norms and biases are left out."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    adam_eps: float = 1e-5
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 master weights and fp32 gradient reduction."""
    seed: int = 1234
    """Random seed of initialisation, data order and dropout."""
    save_interval: int = 100
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int = 1
    """How many checkpoints of a stage to keep."""
    log_interval: int = 10
    """Steps between log lines."""


@dataclass
class Stage:
    """One training stage."""

    training: Training = field(default_factory=Training)
    """Overrides of the top-level ``training`` (all of it is inherited, but for ``dense``'s train_iters)."""
    layout: Layout = field(default_factory=Layout)
    """Overrides of the top-level ``layout``."""
    blend: dict[str, float] = field(default_factory=dict)
    """Sampling weight of each domain. Empty: an expert takes its own domain alone, every other stage
    takes all domains alike."""


@dataclass
class Stages:
    """The paper's stages: branch, train, mix."""

    seed: Stage = field(default_factory=Stage)
    """The seed, trained from scratch."""
    experts: dict[str, Stage] = field(default_factory=dict)
    """One stage a domain, by the domain's name; a domain that is not named takes the defaults."""
    finetune: Stage = field(default_factory=Stage)
    """The MoE stage."""
    dense: Stage = field(default_factory=Stage)
    """The baseline ``dense``: the seed continued on the MoE stage's blend (unless it has its own)."""


@dataclass
class Evaluate:
    """Held-out loss, in nats a token, of every model."""

    micro_batch_size: int = 8
    """Windows a rank takes at once."""
    layout: Layout = field(default_factory=Layout)
    """The layout of the evaluation; experts and ensembles alike."""


@dataclass
class Launch:
    """Running here, on one machine."""

    device: Literal["auto", "cpu"] = "auto"
    """auto: one GPU a rank where this machine has GPUs, else CPU cores. cpu: CPU cores in any case."""
    max_parallel_experts: int = 0
    """Experts trained side by side; 0: as many as the cores (or GPUs) allow."""
    threads_per_rank: int = 0
    """CPU threads of one rank; 0: the cores shared out over the ranks that run at once."""


@dataclass
class Recipe:
    """Everything that one run depends on."""

    name: str = "run"
    """Names the run in reports."""
    run_folder: str = "runs/run"
    """Where everything is written; relative to the working directory."""
    data: Data = field(default_factory=Data)
    """Domains and their text."""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    """The tokenizer."""
    model: Model = field(default_factory=Model)
    """The shape of the seed and of every expert."""
    moe: Moe = field(default_factory=Moe)
    """The MoE layer."""
    mix: Mix = field(default_factory=Mix)
    """The merge."""
    training: Training = field(default_factory=Training)
    """Defaults of every stage's ``training``."""
    layout: Layout = field(default_factory=Layout)
    """Defaults of every stage's ``layout``."""
    stages: Stages = field(default_factory=Stages)
    """The training stages."""
    baselines: list[Literal["dense"]] = field(default_factory=lambda: ["dense"])
    """Baselines to train beside the method."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """The evaluation."""
    launch: Launch = field(default_factory=Launch)
    """Running on this machine."""

    @property
    def domain_names(self) -> list[str]:
        """Domains in the recipe's order."""
        return [domain.name for domain in self.data.domains]

    @property
    def expert_names(self) -> list[str]:
        """Experts of the MoE: router row i is expert i; the seed, where it joins, is last."""
        return self.domain_names + ([SEED] if self.mix.include_seed else [])

    def stage(self, name: str) -> Stage:
        """The stage ``seed``, ``finetune``, ``dense`` or ``expert:DOMAIN``."""
        kind, _, domain = name.partition(":")
        return self.stages.experts[domain] if kind == "expert" else getattr(self.stages, kind)
