"""The recipe's ``layout``: how a stage lies on its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class Layout:
    """How one stage lies on its ranks. ranks = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = 1
    """TP: each matrix is cut over so many ranks."""
    pipeline_model_parallel_size: int = 1
    """PP: the layers are cut over so many ranks."""
    data_parallel_size: int = 1
    """DP: so many copies of the model, each with its own share of every batch."""
    expert_model_parallel_size: int = 1
    """EP: the experts of the MoE are shared out over so many ranks; divides TP x CP x DP."""
    expert_tensor_parallel_size: int | None = None
    """ETP: tensor parallel size inside an expert; null is TP."""
    context_parallel_size: int = 1
    """CP: each sample is cut along the sequence over so many ranks, attention included, whose keys and values
    travel. For training; an evaluation reads whole sequences."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline: each rank holds several chunks of so many layers, from different depths, which
    shrinks the pipeline's bubble. Null: one chunk a rank."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first rank of a pipeline that is cut unevenly (the embedding lies there too); null: as
    many as the others."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last rank of a pipeline that is cut unevenly (the output head lies there too); null: as
    many as the others."""
    sequence_parallel: bool = False
    """Norms and residuals cut along the sequence over the TP ranks; a MoE with TP > 1 needs it."""
    use_distributed_optimizer: bool = False
    """Optimizer state cut over the DP ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Gradient reduction runs during the backward pass."""
    overlap_param_gather: bool = False
    """Parameter gathering runs during the forward pass; needs the distributed optimizer."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to compute again in the backward pass instead of keeping them. full: of whole layers,
    which keeps the layers' inputs alone. selective: of the parts in ``recompute_modules``. Null: none."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: uniform groups all layers of a rank by ``recompute_num_layers`` and keeps the input of
    each group; block recomputes the first ``recompute_num_layers`` one by one, and none of the rest."""
    recompute_num_layers: int | None = None
    """With full: see ``recompute_method``."""
    recompute_modules: list[Literal["core_attn", "mlp", "moe", "layernorm"]] | None = None
    """With selective: core_attn, the attention between its projections; mlp, the feed-forward of dense
    models; moe, router and experts; layernorm, both norms of a layer (needs Transformer Engine). Null:
    core_attn."""

    @property
    def world_size(self) -> int:
        """Number of ranks, one process each."""
        sizes = (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
            self.data_parallel_size,
        )
        return math.prod(sizes)

    def pipeline_layers(self, num_layers: int) -> list[int]:
        """Layers on each rank of the pipeline, first to last, as Megatron cuts them.

        Raises ValueError, with the numbers that clash, where ``num_layers`` cannot be cut so.
        """
        pp = self.pipeline_model_parallel_size
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        rest = num_layers - (first or 0) - (last or 0)
        ranks = pp - (first is not None) - (last is not None)
        if rest < ranks or ranks < 0 or (rest and not ranks) or (ranks and rest % ranks):
            raise ValueError(f"{rest} layers are left for {ranks} of {pp} ranks")
        middle = [rest // ranks] * ranks if ranks else []
        return [*([first] if first else []), *middle, *([last] if last else [])]

    def __str__(self) -> str:
        """``TP2 SP``, ``DP2 EP2``, ``1 rank``, ...: the parts that are not the default."""
        sizes = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "CP": self.context_parallel_size,
            "DP": self.data_parallel_size,
            "EP": self.expert_model_parallel_size,
            "ETP": self.expert_tensor_parallel_size or 1,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        parts += ["interleaved"] if self.num_layers_per_virtual_pipeline_stage else []
        parts += ["SP"] if self.sequence_parallel else []
        parts += ["distributed optimizer"] if self.use_distributed_optimizer else []
        return " ".join(parts) or "1 rank"
