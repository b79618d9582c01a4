"""The recipe's ``training``: how one stage trains, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Training:
    """The optimizer and its schedule. Defaults are the paper's (section 4.1), where it states them."""

    train_iters: int | None = None
    """Steps. Null is allowed for the baselines' stages alone, ``dense`` and ``sparse_upcycling_...``: as many
    tokens (``_cm``: FLOPs) as all experts and the MoE stage together, rounded up to a step."""
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
    freeze: list[Literal["experts", "router", "shared"]] = field(default_factory=list)
    """Weights that keep their values: the experts' feed-forwards, the routers, or everything else (attention,
    norms, embeddings, output head). They get no gradient and no optimizer state. For stages.finetune; an
    expert may freeze ``shared``, which leaves its feed-forwards to train."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 master weights and fp32 gradient reduction."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Matrix products of the layers in FP8, through Transformer Engine; all else as with ``bf16``, which it
    needs. hybrid: E4M3 forward and E5M2 for gradients; e4m3: E4M3 for both. Null: none. Router, softmax,
    attention, embedding and output head stay as they are; held-out losses are computed without FP8."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    """How FP8 is scaled. delayed: one scale a tensor, from the largest values of past steps, which the
    checkpoint keeps. tensorwise: one scale a tensor, from its own largest value. blockwise: one scale for
    each 128 values (weights: 128 x 128), as DeepSeek-V3 does; compute capability 9.0."""
    fp8_amax_history_len: int = 1024
    """Steps that ``delayed`` looks back on."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """What ``delayed`` takes from those steps: the largest value, or the last step's."""
    fp8_param_gather: bool = False
    """Weights are kept and gathered in FP8 beside their fp32 masters; needs the distributed optimizer. These
    rounded weights are what is mixed, evaluated and exported from the stage."""
    num_layers_at_start_in_bf16: int = 0
    """The first so many layers compute in bfloat16; not with ``delayed``."""
    num_layers_at_end_in_bf16: int = 0
    """The last so many layers compute in bfloat16; not with ``delayed``."""
    cuda_graph_impl: Literal["none", "local"] = "none"
    """local: Megatron captures the layers of a dense stage as CUDA graphs, which saves the CPU the launches
    of small models. Needs a GPU and Transformer Engine; no full recomputation."""
    seed: int = 1234
    """Random seed of initialisation, dropout and data order; each stage has an order of its own by it."""
    save_interval: int = 100
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int = 1
    """How many checkpoints of a stage to keep: the latest ones."""
    save_retain_interval: int | None = None
    """Checkpoints whose step is a multiple of this are kept as well; null: none."""
    async_save: bool = True
    """Training goes on while a checkpoint is written; false: it waits for the disk."""
    max_consecutive_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped: no weight moves. After more than so many
    in a row the stage stops; 0 stops at the first."""
    loss_spike_factor: float = 2.0
    """A loss above this multiple of the median of the last 100 steps is told in the log."""
    distributed_timeout_minutes: float = 10.0
    """A stage that ends no step and no save for so long hangs: it is ended, and the rank to blame named."""
    log_interval: int = 10
    """Steps between log lines, and between readings of memory and expert load (one small collective)."""
    tensorboard: bool = True
    """Curves for TensorBoard, in the stage's folder: ``tensorboard --logdir RUN_FOLDER`` shows all stages."""
    wandb_project: str | None = None
    """The Weights & Biases project that gets the curves too; null: none. Needs the extra ``wandb``, and a
    login or WANDB_MODE=offline; WANDB_ENTITY names a team."""
    log_communication: bool = False
    """Count what the ranks send each other: bytes and calls of each collective and process group, inside and
    between nodes. comm.json beside losses.jsonl, and a table at the end of the stage's log."""
