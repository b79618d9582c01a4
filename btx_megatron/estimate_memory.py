"""Bytes of memory that training keeps on a rank, by closed formulas, before anything runs.

The formulas follow what Megatron-Core 0.19's local build does with the layers of ``model/``, and are checked
against what a run keeps (tests/functional/test_memory_estimate.py). On the rank: L layers; of a
micro-batch: T tokens (of its part under context parallelism), U of them between the matrices (T / t with
sequence parallelism, else T). h hidden, n heads and g key/value groups of width d, f feed-forward (of one
expert), k of E experts a token, V padded vocabulary; t, x sizes of TP and ETP; e bytes of a number in the
compute type (fp32 4, bf16 2).

| part | bytes |
|---|---|
| weights | e a weight of the rank |
| gradients | 4 a weight that is trained: Megatron's buffers are fp32 |
| optimizer | 8 a weight that is trained (Adam's moments); bf16 12, with fp32 masters |
| ... distributed | that / (DP CP); of experts / the ranks that hold the same ones |
| a layer: two norms, input and output of each | 4 U h e + 8 U |
| ... attention: queries and keys turned, all three as they came, output | T 3 (n + g) d e / t + 4 T n / t |
| ... with CP: keys and values of all positions, output twice | T (3 n + 2 g CP) d e / t + 4 T n / t |
| ... dense feed-forward: gate and up, silu(gate), their product | T 4 f e / t |
| ... experts, with R = U k x rows: input, gate and up, silu, product, gated product | R (h + 5 f / x) e |
| ... router and dispatcher: gates and indices | U (4 E + 40 k) |
| ... frozen: less what its matrices take | shared U h e, also on the last stage; experts R (h + f / x) e |
| last stage: final norm, softmax over the vocabulary in fp32 | 2 U h e + 4 T V / t |
| ... once, whatever is in flight: tables of the angles | 2 S d e / CP a layer (not core_attn); S sequence |
| recompute full, uniform by c | U h e for c layers; and c layers whole, once |
| recompute full, block of c | the same for each of the first c layers, which come last; others whole |
| recompute selective, core_attn | T (n + 2 g) d e / t before it, T n d e / t after, and queries where n > g |
| recompute selective, mlp, moe, layernorm | nothing of it but its input; the largest of these once, whole |
| pipeline, place p of P from 0 | the layers' part times min(m, P - p), m micro-batches a step |
| ... interleaved, v chunks | of L / v layers, times min(m v, 2 (P - p - 1) + (v - 1) P + 1) |
| working at the head: passing copies of logits | 8 T V; with TP 2 T V / t in bf16, 0 in fp32 |
| working in a layer: its gradients | dense T 4 f e / t; experts, in fp32: 4 R h, and 16 R f / x of one |
| working: outputs sent on, until they are back | U h e for each micro-batch in flight, not on the last |

"working" is what lives beside what autograd keeps. Head and layers have their turns: the peak is in the one
that comes to more, with what is kept or recomputed at that time.

Routes are taken as even over the experts, and none as dropped; a rank whose experts are liked holds more.
Not covered: what the allocator loses to fragments, the CUDA context, buffers of collectives (NCCL's, gathered
sequences), dropout's masks, cuBLAS's workspaces, context parallelism's masks of attention, which torch makes
on a CPU alone. A build on Transformer Engine, which fuses and keeps other things, is not measured.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from btx_megatron.estimate_comm import Setup, dense_weights, expert_weights
from btx_megatron.recipe import Layout

_GRADIENT, _MOMENTS, _MASTER, _FLOAT = 4, 8, 4, 4
_RECOMPUTED_BY_DEFAULT = ("core_attn",)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What autograd keeps, at its peak."""
    working: float

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(astuple(self)))


def fullest_rank(setup: Setup) -> Memory:
    """Memory of the rank, of all places in the pipeline, that holds the most."""
    places = range(setup.layout.pipeline_model_parallel_size)
    return max((rank_memory(setup, place) for place in places), key=lambda memory: memory.total)


def rank_memory(setup: Setup, place: int) -> Memory:
    """Memory of a rank at a place of the pipeline, counted from 0."""
    layout = setup.layout
    dense, experts = trained_weights(setup, place)
    state = _MOMENTS + (_MASTER if setup.bf16 else 0)
    over = layout.data_parallel_size * layout.context_parallel_size, expert_data_parallel_size(setup)
    ranks = over if layout.use_distributed_optimizer else (1, 1)
    weights = sum(dense_weights(setup, place)) + sum(expert_weights(setup, place))
    activations = _Activations(setup, place)
    return Memory(
        weights=setup.element * weights,
        gradients=_GRADIENT * (dense + experts),
        optimizer=state * (dense / ranks[0] + experts / ranks[1]),
        activations=activations.kept(),
        working=activations.working(),
    )


def expert_data_parallel_size(setup: Setup) -> int:
    """Ranks that hold the same experts."""
    layout = setup.layout
    if setup.num_experts is None:
        return 1
    tp = layout.tensor_model_parallel_size
    etp = layout.expert_tensor_parallel_size or tp
    ranks = tp * layout.context_parallel_size * layout.data_parallel_size
    return ranks // (etp * layout.expert_model_parallel_size)


def trained_weights(setup: Setup, place: int) -> tuple[int, int]:
    """Numbers in the weights on a rank that take a gradient: all but the experts', and the experts'."""
    model = setup.model
    layers = setup.layers(place)
    dense, experts, router = sum(dense_weights(setup, place)), sum(expert_weights(setup, place)), 0
    if setup.num_experts is None:  # the feed-forward is what an expert has for itself
        feed_forward = 3 * model.ffn_hidden_size * model.hidden_size
        own = layers * feed_forward // setup.layout.tensor_model_parallel_size
        parts = {"experts": own, "router": 0, "shared": dense - own}
        return sum(size for part, size in parts.items() if part not in setup.freeze), 0
    router = layers * setup.num_experts * model.hidden_size
    parts = {"router": router, "shared": dense - router}
    trained = sum(size for part, size in parts.items() if part not in setup.freeze)
    return trained, 0 if "experts" in setup.freeze else experts


def checkpoint_bytes(setup: Setup) -> tuple[int, int]:
    """Bytes on disk of the weights alone, and of a training checkpoint with both moments.

    bf16 and the distributed optimizer keep an fp32 copy of each trained weight there too.
    """
    whole = replace(setup, layout=Layout())
    weights = setup.element * (sum(dense_weights(whole, 0)) + sum(expert_weights(whole, 0)))
    copies = setup.bf16 or setup.layout.use_distributed_optimizer
    return weights, weights + (_MOMENTS + _MASTER * copies) * sum(trained_weights(whole, 0))


class _Activations:
    """What one rank keeps for the backward pass; names as in the table above."""

    def __init__(self, setup: Setup, place: int) -> None:
        self.setup, self.layout, self.place = setup, setup.layout, place
        model, layout = setup.model, setup.layout
        self.tp, self.pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        self.tokens = setup.micro_batch_size * model.seq_length / layout.context_parallel_size
        self.between = self.tokens / (self.tp if layout.sequence_parallel else 1)
        self.row = self.between * model.hidden_size * setup.element
        self.head_width = model.kv_channels or model.hidden_size // model.num_attention_heads
        self.last = place == self.pp - 1
        modules = layout.recompute_modules or _RECOMPUTED_BY_DEFAULT
        self.modules = modules if layout.recompute_granularity == "selective" else ()
        self.layers = setup.layers(place)
        self.chunk = layout.num_layers_per_virtual_pipeline_stage or self.layers
        self.costs = [self._layer(first_of_all=place == number == 0) for number in range(self.layers)]

    def kept(self) -> float:
        """Bytes that autograd keeps at most: micro-batches in flight, and the head or what is recomputed."""
        layers, chunk = self.layers, self.chunk
        in_flight = self._in_all_layers() / (layers / chunk) * self._chunks_in_flight(layers // chunk)
        return in_flight + max(self._recomputed(), self._head()) + layers * self._tables()

    def working(self) -> float:
        """Bytes beside those: at the head its passing copies, in a layer its gradients on their way."""
        at_head = self._head() + self._copies_of_logits()
        in_layer = self._recomputed() + self._gradients_of_layer()
        outputs = 0 if self.last else self.row * min(self.setup.micro_batches, self.pp - self.place)
        return max(at_head, in_layer) - max(self._head(), self._recomputed()) + outputs

    def _chunks_in_flight(self, chunks: int) -> int:
        batches, behind = self.setup.micro_batches, self.pp - self.place - 1
        if chunks == 1:
            return min(batches, behind + 1)
        return min(batches * chunks, 2 * behind + (chunks - 1) * self.pp + 1)

    def _in_all_layers(self) -> float:
        """Of one micro-batch in each of the rank's layers."""
        costs, count = self.costs, self.layout.recompute_num_layers or 1
        if self.layout.recompute_granularity != "full":
            return sum(costs)
        if self.layout.recompute_method == "block":
            return sum(self.row if n % self.chunk < count else cost for n, cost in enumerate(costs))
        return self.row * math.ceil(self.chunk / count) * (self.layers // self.chunk)

    def _recomputed(self) -> float:
        """On top of that while a piece is recomputed, whose input is there.

        In a block the layers that were kept come later in the forward pass, and are done with by then.
        """
        costs, count = self.costs, min(self.layout.recompute_num_layers or 1, self.chunk)
        if self.layout.recompute_granularity != "full":
            return self._recomputed_modules()
        if self.layout.recompute_method == "block":
            return max(0.0, max(costs) - self.row - sum(costs[count : self.chunk]))
        return max(sum(costs[first : first + count]) for first in range(0, self.layers, count)) - self.row

    def _head(self) -> float:
        if not self.last:
            return 0.0
        rows = 1 if "shared" in self.setup.freeze else 2
        return rows * self.row + self.tokens * self.setup.padded_vocab_size / self.tp * _FLOAT

    def _copies_of_logits(self) -> float:
        """Logits in the compute type and in fp32, and the gradient: Megatron's cut loss works in place."""
        if not self.last:
            return 0.0
        logits = self.tokens * self.setup.padded_vocab_size / self.tp
        return logits * (8 if self.tp == 1 else 2 if self.setup.bf16 else 0)

    def _gradients_of_layer(self) -> float:
        setup, model = self.setup, self.setup.model
        if setup.num_experts is None:
            return self.tokens * 4 * model.ffn_hidden_size * setup.element / self.tp
        rows, width = self._rows_of_experts(self.place == 0)
        here = setup.num_experts / self.layout.expert_model_parallel_size  # one expert after the other
        return rows * (model.hidden_size + 4 * width / here) * _FLOAT

    def _rows_of_experts(self, first_of_all: bool) -> tuple[float, float]:
        """Rows that the rank's experts take together, and the width of their feed-forward on this rank."""
        setup = self.setup
        etp = self.layout.expert_tensor_parallel_size or self.tp
        width = setup.expert_width or setup.model.ffn_hidden_size
        return self.between * self._topk(first_of_all) * etp, width / etp

    def _topk(self, first_of_all: bool) -> int:
        experts, moe = self.setup.num_experts or 1, self.setup.moe
        soft_at_first = moe.moe_router_type == "sample_top1" and first_of_all
        return experts if soft_at_first else moe.topk(experts)

    def _layer(self, first_of_all: bool) -> float:
        rows = 4 - 2 * ("layernorm" in self.modules) - ("shared" in self.setup.freeze)
        norms = rows * self.row + 2 * self.between * _FLOAT
        feed_forward = self._feed_forward(first_of_all)
        recomputed = "mlp" if self.setup.num_experts is None else "moe"
        return norms + self._attention() + (0 if recomputed in self.modules else feed_forward)

    def _tables(self) -> float:
        if "core_attn" in self.modules:
            return 0.0
        positions = self.setup.model.seq_length / self.layout.context_parallel_size
        return 2 * positions * self.head_width * self.setup.element

    def _attention(self) -> float:
        whole, around = self._attention_parts()
        return around if "core_attn" in self.modules else whole

    def _attention_parts(self) -> tuple[float, float]:
        """Bytes of all of it, and of what is left with the core recomputed."""
        heads = self.setup.model.num_attention_heads
        groups = self.setup.model.num_query_groups or heads
        number = self.tokens * self.head_width * self.setup.element / self.tp
        cp = self.layout.context_parallel_size
        kept = 3 * (heads + groups) if cp == 1 else 3 * heads + 2 * groups * cp
        whole = kept * number + self.tokens * heads * _FLOAT / self.tp
        copied = heads if groups != heads else 0  # queries of several heads a group are no view
        return whole, (2 * heads + 2 * groups + copied) * number

    def _feed_forward(self, first_of_all: bool = False) -> float:
        setup, model = self.setup, self.setup.model
        if setup.num_experts is None:
            number = 3 if "experts" in setup.freeze else 4
            return self.tokens * number * model.ffn_hidden_size * setup.element / self.tp
        rows, width = self._rows_of_experts(first_of_all)
        # no gradient of a frozen matrix needs what went into it
        inside = 4 * width if "experts" in setup.freeze else model.hidden_size + 5 * width
        dispatch = self.between * (4 * setup.num_experts + 40 * self._topk(first_of_all))
        return rows * inside * setup.element + dispatch

    def _recomputed_modules(self) -> float:
        """The largest piece that is recomputed at once."""
        pieces = {"core_attn": self._attention_parts()[0] - self._attention_parts()[1]}
        pieces |= dict.fromkeys(("mlp", "moe"), self._feed_forward(first_of_all=self.place == 0))
        pieces["layernorm"] = self.row
        return max((pieces[module] for module in self.modules), default=0.0)
