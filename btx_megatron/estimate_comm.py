"""Bytes that the ranks send each other in a training step, by closed formulas, before anything runs.

What "bytes" means is said in btx_megatron.traffic. The formulas follow what Megatron-Core 0.19 does, and are
checked against the meter's count (tests/functional/test_communication.py). L layers on the rank, h hidden, w
width of a token's keys (or values), T tokens of a micro-batch (of its part under context parallelism), m
micro-batches a step and rank, k experts a token, t, c and d the sizes of TP, CP and DP x CP; "act" is T x h
in the compute type, whose numbers have e bytes (fp32 4, bf16 2). Handed in by one rank in a step:

| group | when | collective | bytes |
|---|---|---|---|
| tp, no SP | a layer: two forward, two backward; embedding; head | all_reduce | m (4 L + 2) act |
| tp, SP | attention, dense feed-forward, each | all_gather, reduce_scatter | m L 3 act / t, m L 2 act |
| tp, SP | embedding, forward and backward | reduce_scatter, all_gather | m act, m act / t |
| tp, SP | head, forward and backward | all_gather, reduce_scatter | m 2 act / t, m act |
| tp | cross entropy: maximum, logit of the label, sum | all_reduce | m 3 T x 4 |
| tp, SP | gradients of norms and router, which see a slice each | all_reduce | 4 a weight, once |
| cp | keys and values of all positions, forward | all_gather | m L 2 T w e / t |
| cp | their gradients, backward | reduce_scatter | c times that |
| pp | to the next stage, and back | send | m act each way (SP: / t) |
| dp | gradients in fp32 | all_reduce | 4 a weight, once a step, whatever m |
| dp | ... with the distributed optimizer | reduce_scatter | 4 a weight, padded |
| dp | ... its new weights | all_gather | 4 or 2 a weight, / d |
| edp | the same for the experts of this rank, over the ranks that hold the same ones [1] | | |
| ep | alltoall: rows out and back, forward and backward | all_to_all | m L (4 k act + 2 k T x 4), / t |
| etp | alltoall: the rows over the ranks of an expert | all_gather, reduce_scatter | see _expert_tensor |
| etp x ep | allgather: rows, gates, routes out; sums back | all_gather, reduce_scatter | see _allgather |

[1] Under EP, or with ETP other than TP; else the experts are reduced with the rest.

So data parallelism costs by the step, the others by the token. Where experts are reduced apart, without
``overlap_param_gather``, all new weights are gathered twice: Megatron steps one distributed optimizer for the
experts and one for the rest, and each of them gathers for both.

Left out, together below 0.1 % of any model worth training: scalars (loss, token count, gradient norm), the
token counts of the dispatcher, the router's balancing sums. Routes are taken as even over the experts: what
is handed in does not depend on that, the wire bytes of an all-to-all do. Not covered: interleaved pipelines,
activation recomputation (it repeats the forward collectives of tp, cp and ep). With context parallelism
Transformer Engine's attention passes keys and values round a ring instead, and their gradients with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage
from btx_megatron.traffic import Line, Traffic, amount_of, summed

_GRADIENT = 4  # bytes: gradients are reduced in fp32
_FLOAT = 4


@dataclass(frozen=True)
class Setup:
    """What a step's traffic depends on."""

    model: Model
    layout: Layout
    padded_vocab_size: int
    micro_batch_size: int
    global_batch_size: int
    bf16: bool = True
    num_experts: int | None = None
    """None: a dense model."""
    moe: Moe = field(default_factory=Moe)
    expert_width: int | None = None
    """Of an expert's feed-forward; None: the model's."""
    freeze: tuple[str, ...] = ()
    """Weights that take no gradient, as in the recipe. (The traffic here counts them as if they did.)"""

    def layers(self, place: int) -> int:
        """Layers on a rank at a place of the pipeline, counted from 0."""
        return self.layout.pipeline_layers(self.model.num_layers)[place]

    @property
    def element(self) -> int:
        """Bytes of an activation's or a weight's number."""
        return 2 if self.bf16 else 4

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.layout.data_parallel_size)

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.global_batch_size * self.model.seq_length


def setup_of(recipe: Recipe, stage: Stage, padded_vocab_size: int, num_experts: int | None) -> Setup:
    """The setup of a recipe's stage."""
    training = stage.training
    return Setup(
        model=recipe.model,
        layout=stage.layout,
        padded_vocab_size=padded_vocab_size,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        bf16=training.bf16,
        num_experts=num_experts,
        moe=recipe.moe,
        expert_width=recipe.expert_ffn_hidden_size,
        freeze=tuple(training.freeze),
    )


def step_traffic(setup: Setup, ranks_per_node: int) -> Traffic:
    """Traffic of one step, summed over all ranks."""
    return summed(_Rank(setup, rank, ranks_per_node).step() for rank in range(setup.layout.world_size))


class _Rank:
    """One rank: its groups (Megatron's order of ranks: TP fastest, then CP, DP, PP) and what it hands in."""

    def __init__(self, setup: Setup, rank: int, ranks_per_node: int) -> None:
        self.setup, self.rank, self.ranks_per_node = setup, rank, ranks_per_node
        layout = setup.layout
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        cp = layout.context_parallel_size
        dp = cp * layout.data_parallel_size  # gradients are reduced over both
        moe = setup.num_experts is not None
        ep = layout.expert_model_parallel_size if moe else 1
        etp = (layout.expert_tensor_parallel_size or tp) if moe else 1
        self.experts_apart = ep > 1 or etp != tp
        self.stage, inner = divmod(rank, tp * dp)
        first = self.stage * tp * dp
        of_tp, of_etp = inner % tp, inner % etp
        of_dp, of_ep = inner // tp, inner // etp % ep
        of_edp = inner // (etp * ep)
        edp = tp * dp // (etp * ep)
        self.groups: dict[str, list[int]] = {
            "tp": [first + of_dp * tp + i for i in range(tp)],
            "cp": [first + (of_dp // cp * cp + i) * tp + of_tp for i in range(cp)],
            "dp": [first + i * tp + of_tp for i in range(dp)],
            "pp": [i * tp * dp + inner for i in range(pp)],
            "etp": [first + (of_edp * ep + of_ep) * etp + i for i in range(etp)],
            "ep": [first + (of_edp * ep + i) * etp + of_etp for i in range(ep)],
            "etp x ep": [first + of_edp * ep * etp + i for i in range(ep * etp)],
            "edp": [first + (i * ep + of_ep) * etp + of_etp for i in range(edp)],
            "embedding": [inner, (pp - 1) * tp * dp + inner] if pp > 1 else [rank],
        }
        self.first_stage, self.last_stage = self.stage == 0, self.stage == pp - 1
        self.layers = setup.layers(self.stage)
        tokens = setup.micro_batch_size * setup.model.seq_length // cp
        self.slices = tp if layout.sequence_parallel else 1
        self.tokens = tokens // self.slices  # of a micro-batch, on this rank, between the matrices
        self.row = setup.model.hidden_size * setup.element
        self.traffic = Traffic()

    def step(self) -> Traffic:
        """What this rank hands in during a step."""
        if len(self.groups["tp"]) > 1:
            self._tensor()
        self._context()
        self._pipeline()
        dense, experts = dense_weights(self.setup, self.stage), expert_weights(self.setup, self.stage)
        if self.experts_apart:
            self._data("dp", dense)
            self._data("edp", experts)
        else:
            self._data("dp", dense + experts)
        if self.setup.num_experts is not None:
            self._experts()
        return self.traffic

    def _book(self, group: str, collective: str, payload: int, times: int = 1, root: int = 0) -> None:
        ranks: Sequence[int] = self.groups[group]
        if len(ranks) > 1 and times and payload:
            amount = amount_of(
                collective, payload, ranks, ranks.index(self.rank), self.ranks_per_node, root=root
            )
            self.traffic.add(Line(group, len(ranks), collective), amount, times)

    def _tensor(self) -> None:
        setup, batches = self.setup, self.setup.micro_batches
        whole = self.tokens * self.slices
        act, piece = whole * self.row, self.tokens * self.row
        ends = self.first_stage + self.last_stage
        if setup.layout.sequence_parallel:
            blocks = self.layers * (1 if setup.num_experts else 2)  # a MoE's experts have their own groups
            gathers = 3 * blocks + self.first_stage + 2 * self.last_stage
            self._book("tp", "all_gather", piece, batches * gathers)
            self._book("tp", "reduce_scatter", act, batches * (2 * blocks + ends))
            self._book("tp", "all_reduce", _GRADIENT * self._sliced_weights())
        else:
            self._book("tp", "all_reduce", act, batches * (4 * self.layers + ends))
        if self.last_stage:
            self._book("tp", "all_reduce", whole * _FLOAT, batches * 3)

    def _sliced_weights(self) -> int:
        hidden = self.setup.model.hidden_size
        a_layer = 2 * hidden + hidden * (self.setup.num_experts or 0)
        return self.layers * a_layer + hidden * self.last_stage

    def _context(self) -> None:
        setup, ranks = self.setup, len(self.groups["cp"])
        width = _kv_width(setup.model) // setup.layout.tensor_model_parallel_size
        piece = self.tokens * self.slices * width * setup.element
        times = 2 * setup.micro_batches * self.layers  # keys and values
        self._book("cp", "all_gather", piece, times)
        self._book("cp", "reduce_scatter", ranks * piece, times)

    def _pipeline(self) -> None:
        act = self.tokens * self.row
        if not self.last_stage:
            self._book("pp", "send", act, self.setup.micro_batches, root=self.stage + 1)
        if not self.first_stage:
            self._book("pp", "send", act, self.setup.micro_batches, root=self.stage - 1)
        if (self.first_stage or self.last_stage) and not _untied(self.setup):
            self._book("embedding", "all_reduce", _GRADIENT * _vocabulary_weights(self.setup))

    def _data(self, group: str, weights: list[int]) -> None:
        setup, ranks = self.setup, len(self.groups[group])
        if not setup.layout.use_distributed_optimizer:
            self._book(group, "all_reduce", _GRADIENT * sum(weights))
            return
        padded = _padded(weights, ranks)
        optimizers = 2 if self.experts_apart and not setup.layout.overlap_param_gather else 1
        self._book(group, "reduce_scatter", _GRADIENT * padded)
        self._book(group, "all_gather", setup.element * padded // ranks, times=optimizers)

    def _experts(self) -> None:
        if self.setup.moe.moe_token_dispatcher_type == "allgather":
            self._allgather(self.setup.micro_batches * self.layers)
            return
        for topk, layers in self._taken():
            routes, times = self.tokens * topk, self.setup.micro_batches * layers
            self._book("ep", "all_to_all", routes * self.row, 4 * times)
            self._book("ep", "all_to_all", routes * _FLOAT, 2 * times)
            self._expert_tensor(routes, times)

    def _taken(self) -> list[tuple[int, int]]:
        """Experts that a token takes, in so many of this rank's layers."""
        moe, experts = self.setup.moe, self.setup.num_experts or 1
        if moe.moe_router_type == "sample_top1" and self.first_stage:  # all in the first layer
            return [(experts, 1), (moe.topk(experts), self.layers - 1)]
        return [(moe.topk(experts), self.layers)]

    def _expert_tensor(self, routes: int, times: int) -> None:
        """Rows and gates to all ranks of an expert, sums back in the gates' fp32; backward the other way."""
        ranks = len(self.groups["etp"])
        sums = routes * self.setup.model.hidden_size * _FLOAT
        for rows in (routes * self.row, routes * _FLOAT):
            self._book("etp", "all_gather", rows, times)
            self._book("etp", "reduce_scatter", ranks * rows, times)
        self._book("etp", "reduce_scatter", ranks * sums, times)
        self._book("etp", "all_gather", sums, times)

    def _allgather(self, times: int) -> None:
        """All rows, gates and routes to all ranks that share the experts, sums back; backward likewise."""
        ranks, experts = len(self.groups["etp x ep"]), self.setup.num_experts or 0
        sums = self.tokens * self.setup.model.hidden_size * _FLOAT
        for rows in (self.tokens * self.row, self.tokens * experts * _FLOAT):
            self._book("etp x ep", "all_gather", rows, times)
            self._book("etp x ep", "reduce_scatter", ranks * rows, times)
        self._book("etp x ep", "reduce_scatter", ranks * sums, times)
        self._book("etp x ep", "all_gather", sums, times)
        self._book("etp x ep", "all_gather", self.tokens * experts, times)  # the routes, one byte each


def dense_weights(setup: Setup, stage: int) -> list[int]:
    """Numbers in each weight on a rank of a pipeline stage, the experts' left out, last layer first."""
    model, layout = setup.model, setup.layout
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    hidden = model.hidden_size
    queries = model.num_attention_heads * _head_width(model)
    projections = queries + 2 * _kv_width(model)
    layer = [hidden, hidden, projections * hidden // tp, queries * hidden // tp]
    if setup.num_experts is None:
        layer += [2 * model.ffn_hidden_size * hidden // tp, model.ffn_hidden_size * hidden // tp]
    else:
        layer += [setup.num_experts * hidden]
    first, last = stage == 0, stage == pp - 1
    vocabulary = [_vocabulary_weights(setup)] * (first + (last and (_untied(setup) or not first)))
    return layer * setup.layers(stage) + vocabulary + [hidden] * last


def expert_weights(setup: Setup, stage: int) -> list[int]:
    """Numbers in each weight of the experts on a rank of a pipeline stage."""
    model, layout = setup.model, setup.layout
    etp = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    matrix = (setup.expert_width or model.ffn_hidden_size) * model.hidden_size // etp
    experts = (setup.num_experts or 0) // layout.expert_model_parallel_size
    return [2 * matrix, matrix] * (experts * setup.layers(stage))


def _head_width(model: Model) -> int:
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def _kv_width(model: Model) -> int:
    """Of the keys of one token, all groups together; the values' too."""
    return (model.num_query_groups or model.num_attention_heads) * _head_width(model)


def _untied(setup: Setup) -> bool:
    return setup.model.untie_embeddings_and_output_weights


def _vocabulary_weights(setup: Setup) -> int:
    layout = setup.layout
    return setup.padded_vocab_size * setup.model.hidden_size // layout.tensor_model_parallel_size


def _padded(weights: list[int], ranks: int) -> int:
    """Numbers in the distributed optimizer's buffer: each weight starts at a multiple of 64, the end is one
    of 128 and of the ranks. (Overlapped reduction cuts the buffer and pads each part: negligible.)"""
    end = 0
    for weight in weights:
        end = math.ceil(end / 64) * 64 + weight
    unit = math.lcm(ranks, 128)
    return math.ceil(end / unit) * unit
