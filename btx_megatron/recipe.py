"""One recipe: a YAML file, typed, with overrides from the command line.

Every key is a field of a dataclass below, and the text under a field is its documentation
(docs/recipe.md is made from it). Names are Megatron's wherever Megatron has a flag for the thing.

recipe_file reads it, recipe_checks says what the values must satisfy together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from btx_megatron.errors import UserError
from btx_megatron.recipe_compare import Compare as Compare
from btx_megatron.recipe_data import Clusters as Clusters
from btx_megatron.recipe_data import Data as Data
from btx_megatron.recipe_data import Domain as Domain
from btx_megatron.recipe_data import Source as Source
from btx_megatron.recipe_data import Tokenizer as Tokenizer
from btx_megatron.recipe_layout import Layout as Layout
from btx_megatron.recipe_mix import MEASURED_FROM_SEED as MEASURED_FROM_SEED
from btx_megatron.recipe_mix import ROUTERS_FROM_TEXT as ROUTERS_FROM_TEXT
from btx_megatron.recipe_mix import Mix as Mix
from btx_megatron.recipe_slurm import Slurm as Slurm
from btx_megatron.recipe_slurm import SlurmJob as SlurmJob
from btx_megatron.recipe_tasks import TaskFile as TaskFile
from btx_megatron.recipe_training import Training as Training
from btx_megatron.times import TimeWindow, parse_time_window

GROWN_FROM = "grown_from"
"""The stage that brings in the mixture which ``mix.grow_from`` names."""
SEED = "seed"  # the name of the seed model's expert; no domain may have it
MOE_STAGES = (GROWN_FROM, "mix", "finetune", "upcycle", "sparse_upcycling_dm", "sparse_upcycling_cm")
"""Stages whose model is a mixture of experts."""
MATCHED_STAGES = ("dense", "sparse_upcycling_dm", "sparse_upcycling_cm")
"""Stages that train as long as btx does, if the recipe does not say how long."""


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
    use_rope_scaling: bool = False
    """RoPE scaled as in Llama 3.1 and later (low frequency factor 1, high 4, trained on 8192 tokens)."""
    rope_scaling_factor: float = 8.0
    """The factor of that scaling: 8 in Llama 3.1, 32 in 3.2; means nothing without ``use_rope_scaling``."""
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

    moe_router_type: Literal["top_k", "switch", "soft", "sample_top1"] = "top_k"
    """top_k: each token takes its best ``moe_router_topk`` experts. switch: the best one, with softmax over
    all and a capacity. soft: all of them, in training and evaluation. sample_top1: one that is sampled by a
    Gumbel-softmax; the first layer is soft (paper, appendix)."""
    moe_router_topk: int = 2
    """Experts a token takes, with ``top_k``; the other types have their own number."""
    moe_router_pre_softmax: bool = False
    """With ``top_k``. False: softmax over the chosen k, the paper's SoftMax(TopK). True: softmax over all,
    then top-k."""
    moe_expert_capacity_factor: float | None = None
    """An expert takes at most this multiple of its even share of a micro-batch's routes (of each rank's part
    of it); later tokens are dropped there. Null: 1.5 with ``switch``, as in the paper, else no bound."""
    moe_router_temperature_decay: float = 1e-4
    """r of ``sample_top1``: the temperature in step t is exp(-r t), and no less than the minimum."""
    moe_router_temperature_min: float = 0.5
    """The least temperature of ``sample_top1``."""
    moe_router_seed: int = 1234
    """Seed of the noise of ``sample_top1``."""
    moe_router_inference: Literal["sample", "argmax"] = "sample"
    """How ``sample_top1`` chooses in evaluation: by a sample, as in the paper, or the most likely expert."""
    moe_router_logit_norm_scale: float | None = None
    """Router logits are normalised over the experts of each token to mean 0 and this standard deviation
    (Skywork-MoE's gating logit normalization); null: they stay as they are."""
    moe_router_one_per_group: bool = False
    """A token takes at most one expert of each domain, where a domain has several (``mix.experts`` split or
    copies); needs at least as many domains as experts a token."""
    moe_router_time_mask: bool = False
    """TiMoE's mask: a token takes no expert whose domain ends (``end``) after its own domain does; every
    domain needs a start and an end."""
    moe_router_load_balancing_type: Literal["btx", "aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = (
        "btx"
    )
    """btx: the paper's loss, with the mean gate value as u (soft). aux_loss: Switch's, with the share
    of dispatched tokens as u (hard). seq_aux_loss: Switch's over each sequence. global_aux_loss: Switch's,
    u over the whole batch so far. none: no balancing."""
    moe_aux_loss_coeff: float = 0.01
    """Weight alpha of the balancing loss of each layer."""
    moe_aux_loss_adaptive: bool = False
    """Each layer's alpha follows its own balance (Skywork-MoE): a moving average of a fifth of the share of
    routes beyond an even load, and at most ``moe_aux_loss_coeff``, where it starts."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router z-loss; null: none, as in the paper."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's logits and softmax."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""
    moe_grouped_gemm: bool | None = None
    """True: one grouped matrix product for all experts of a rank, which Transformer Engine has; false: one
    expert after the other. Null: grouped where the build can."""

    def topk(self, experts: int) -> int:
        """Experts a token takes, of so many; of ``sample_top1`` in all layers but the first."""
        return {"top_k": self.moe_router_topk, "soft": experts}.get(self.moe_router_type, 1)

    def mean_topk(self, experts: int, layers: int) -> float:
        """As ``topk``, the mean over so many layers."""
        if self.moe_router_type != "sample_top1":
            return self.topk(experts)
        return (experts + layers - 1) / layers

    def router_text(self, experts: int) -> str:
        """``top-2``, ``switch top-1``, ``soft``, ``sample top-1``."""
        name = {"top_k": "", "switch": "switch ", "sample_top1": "sample "}.get(self.moe_router_type)
        return "soft" if name is None else f"{name}top-{self.topk(experts)}"

    @property
    def capacity_factor(self) -> float | None:
        """``moe_expert_capacity_factor``, or what the type has where that is null."""
        if self.moe_expert_capacity_factor is None and self.moe_router_type == "switch":
            return 1.5
        return self.moe_expert_capacity_factor


@dataclass
class Stage:
    """One training stage."""

    training: Training = field(default_factory=Training)
    """Overrides of the top-level ``training`` (all of it is inherited, but for a baseline's train_iters)."""
    layout: Layout = field(default_factory=Layout)
    """Overrides of the top-level ``layout``."""
    blend: dict[str, float] = field(default_factory=dict)
    """Sampling weight of each domain. Empty: an expert takes its own domain alone, every other stage
    takes all domains alike."""
    pretrained_checkpoint: str | None = None
    """For ``seed`` and experts: a checkpoint of any format that takes the place of this stage; its weights
    are converted, nothing is trained. ``model`` must describe it. A relative path starts at the recipe."""


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
    sparse_upcycling_dm: Stage = field(default_factory=Stage)
    """Sparse upcycling, data-matched: copies of the seed as experts, trained on the MoE stage's blend."""
    sparse_upcycling_cm: Stage = field(default_factory=Stage)
    """Sparse upcycling, compute-matched."""


@dataclass
class Evaluate:
    """Held-out loss, in nats a token, of every model."""

    micro_batch_size: int = 8
    """Windows a rank takes at once."""
    layout: Layout = field(default_factory=Layout)
    """The layout of the evaluation; experts and ensembles alike."""
    opt_out: list[str] = field(default_factory=list)
    """Domains (or ``seed``, where it joins the mix) whose experts are opted out of the MoE, one at a time: a
    row ``without:DOMAIN`` each, of the same weights with those experts masked."""
    tasks: list[TaskFile] = field(default_factory=list)
    """Tasks in local files that every model is asked, too; ensembles, which are no models, are not."""
    execute_code: bool = False
    """Programs that a model writes for humaneval and mbpp may run here, in processes with limits."""


@dataclass
class Export:
    """The method's model in another format, at the end of the run."""

    to: Literal["hf", "megatron", "megatron-legacy"] | None = None
    """hf: a Hugging Face folder, Llama or Mixtral, with the tokenizer. Null: nothing is exported."""
    approximate: bool = False
    """Also what a Mixtral cannot say exactly (a router that drops tokens, ...); recorded in its config."""


@dataclass
class Launch:
    """Running here, on one machine."""

    device: Literal["auto", "cpu"] = "auto"
    """auto: one GPU a rank where this machine has GPUs, else CPU cores. cpu: CPU cores in any case."""
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    """What layers are built from: Megatron's own modules, or Transformer Engine's, which need a GPU and have
    FP8 and grouped matrix products. Checkpoints are the same. Null: transformer_engine where it is
    installed, ranks run on GPUs and compute in bf16; else local."""
    max_parallel_experts: int = 0
    """Experts trained side by side; 0: as many as the cores (or GPUs) allow."""
    threads_per_rank: int = 0
    """CPU threads of one rank; 0: the cores shared out over the ranks that run at once."""
    peak_tflops: float | None = None
    """TFLOP/s that one rank's device can do at most in the precision of the run, for the MFU (the share of it
    that training reaches). Null: the data sheet's, of A100, H100, H200, GH200 and B200 with bf16; for any
    other device no MFU is told."""


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
    clusters: Clusters = field(default_factory=Clusters)
    """Domains without labels, for ``method: cbtm``."""
    method: Literal["btx", "sparse_upcycling", "dense", "btm", "cbtm", "timoe"] = "btx"
    """What is made of the seed. btx: experts, mixed and finetuned. sparse_upcycling: a MoE of copies of the
    seed, trained on all domains; it has the shape that ``mix`` gives btx. dense: the seed, trained on. btm,
    cbtm, timoe: experts that are not mixed; their probabilities are. The stages of btx say what the baselines
    are matched to."""
    upcycling_match: Literal["data", "compute"] = "data"
    """What ``method: sparse_upcycling`` takes as much of as btx would: tokens (``sparse_upcycling_dm``) or
    training FLOPs (``sparse_upcycling_cm``)."""
    baselines: list[Literal["dense", "sparse_upcycling_dm", "sparse_upcycling_cm", "btm"]] = field(
        default_factory=lambda: ["dense"]
    )
    """Baselines to train beside the method; ``btm`` needs no training, the experts are there."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """The evaluation."""
    export: Export = field(default_factory=Export)
    """The export."""
    compare: Compare = field(default_factory=Compare)
    """Variants beside each other, by ``btx compare``."""
    launch: Launch = field(default_factory=Launch)
    """Running on this machine."""
    slurm: Slurm = field(default_factory=Slurm)
    """Running on a cluster, by ``btx submit``."""

    @property
    def domain_names(self) -> list[str]:
        """Domains in the recipe's order."""
        return [domain.name for domain in self.data.domains]

    @property
    def cluster_names(self) -> list[str]:
        """Domains that c-BTM finds; [] with the other methods."""
        return cluster_names(self.method, self.clusters.number)

    def domains_of(self, stage: str) -> list[Domain]:
        """What text a training stage may draw: the recipe's domains; of c-BTM's experts, the clusters."""
        if stage.startswith("expert:") and self.cluster_names:
            return [Domain(name, [Source()]) for name in self.cluster_names]
        return self.data.domains

    @property
    def joining_names(self) -> list[str]:
        """The models that are mixed: one a domain that has an expert, then the seed, where it joins.

        Into a mixture that is grown: those that it has no expert of.
        """
        domains = [domain.name for domain in self.data.domains if domain.expert]
        names = (self.cluster_names or domains) + ([SEED] if self.mix.include_seed else [])
        return [name for name in names if name not in self.mix.grow_experts]

    @property
    def source_names(self) -> list[str]:
        """Where experts come from: those kept of a mixture that is grown, then the models that join.

        Sparse upcycling puts the seed in the place of each: seed.0, seed.1, ...
        """
        names = self.mix.kept_experts + self.joining_names
        if self.method == "sparse_upcycling":
            return [f"{SEED}.{number}" for number in range(len(names))]
        return names

    @property
    def time_windows(self) -> dict[str, TimeWindow]:
        """Span of each domain's text. Raises UserError where one is missing or is none."""
        spans = {}
        for domain in self.data.domains:
            where = f"data.domains.{domain.name}"
            if domain.start is None or domain.end is None:
                raise UserError(
                    f"{where}: the start and the end of its text are missing; masks by time need them"
                )
            spans[domain.name] = parse_time_window(domain.start, domain.end, where)
        return spans

    @property
    def expert_names(self) -> list[str]:
        """Experts of the MoE: router row i is expert i."""
        return self.mix.expert_names(self.source_names)

    @property
    def expert_groups(self) -> list[int]:
        """The domain that each expert of the MoE comes from, by number; [] with blend: from all of them."""
        return self.mix.expert_groups(len(self.source_names))

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Feed-forward width of one expert of the MoE."""
        return self.mix.expert_width(self.model.ffn_hidden_size)

    def num_experts(self, stage: str) -> int | None:
        """Experts of a stage's model; None: it is dense."""
        if stage == GROWN_FROM:
            return len(self.mix.grow_experts)
        return len(self.expert_names) if stage in MOE_STAGES else None

    @property
    def expert_stages(self) -> list[str]:
        """The stages that train an expert apart, with the methods that have such."""
        apart = self.method not in ("sparse_upcycling", "dense")
        return [f"expert:{name}" for name in self.joining_names if name != SEED] if apart else []

    @property
    def imported_stages(self) -> list[str]:
        """Stages whose model is a checkpoint that the recipe names; they do not train."""
        stages = (SEED, GROWN_FROM, *self.expert_stages)
        return [name for name in stages if self.stage(name).pretrained_checkpoint is not None]

    def stage(self, name: str) -> Stage:
        """The stage ``seed``, ``finetune``, a baseline or ``expert:DOMAIN``."""
        kind, _, domain = name.partition(":")
        if kind == GROWN_FROM:
            return Stage(self.training, self.layout, pretrained_checkpoint=self.mix.grow_from)
        return self.stages.experts[domain] if kind == "expert" else getattr(self.stages, kind)


def cluster_names(method: str, number: int) -> list[str]:
    """Domains that a method finds: of so many clusters c-BTM's, [] of the others."""
    width = len(str(number - 1))
    return [f"cluster{i:0{width}}" for i in range(number)] if method == "cbtm" else []
