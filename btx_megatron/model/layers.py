"""What Megatron's local build lacks for this work, and the backend that offers it.

Shape legend: S sequence, B micro-batch, N heads, D head width, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from btx_megatron.model.context_parallel import all_positions, my_pieces
from btx_megatron.model.kernels import rms_norm, rotate, rotation_table, swiglu
from btx_megatron.model.routers import replace_quietly


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 inside (Zhang & Sennrich 2019).

    Megatron's own torch norm refuses sequence parallelism. All that needs is the mark on the weight:
    each rank sees a slice of the sequence, so Megatron must sum the weight's gradient over the TP ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class CausalAttention(DotProductAttention):
    """Causal core attention through torch's scaled_dot_product_attention.

    Megatron's local core attention builds the [B*N, S, S] score matrix; this one does not. It turns queries
    and keys itself, by the angles that RotaryAttention leaves here. Under context parallelism, which
    Megatron's refuses, keys and values of all ranks are gathered, and each rank's two pieces of queries see
    those before them.
    """

    _angles: Tensor | None = None
    _table: tuple[Tensor, Tensor]

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(replace_quietly(config, context_parallel_size=1), *args, **kwargs)

    def turn_by(self, angles_S11D: Tensor | None, dtype: torch.dtype) -> None:
        """Angles of the next forward pass: Megatron's table, the same object for each length."""
        if angles_S11D is not None and angles_S11D is not self._angles:
            self._table = rotation_table(angles_S11D, dtype)
        self._angles = angles_S11D

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, groups, D] -> [S, B, N*D]. The mask is always causal."""
        if self._angles is not None:
            query, key = rotate(query, *self._table), rotate(key, *self._table)
        if parallel_state.get_context_parallel_world_size() > 1:
            key, value = all_positions(key), all_positions(value)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.attention_dropout.p if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # without sequence parallelism TP ranks share one hidden stream but hold other heads:
            # each draws from its own generator, as Megatron's attention does
            with get_cuda_rng_tracker().fork():
                out_BNSD = self._attend(q_BNSD, k_BGSD, v_BGSD, dropout)
        else:
            out_BNSD = self._attend(q_BNSD, k_BGSD, v_BGSD, dropout)
        return out_BNSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        options: dict[str, Any] = {
            "dropout_p": dropout,
            "scale": self.softmax_scale,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        if q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        # context parallelism: two pieces of queries, from the front and from the back of the sequence
        parts = []
        for piece, number in zip(q.chunk(2, dim=2), my_pieces(), strict=True):
            length = piece.shape[2]
            end = (number + 1) * length
            mask = causal_lower_right(length, end)
            parts.append(F.scaled_dot_product_attention(piece, k[:, :, :end], v[:, :, :end], mask, **options))
        return torch.cat(parts, dim=2)


class RotaryAttention(SelfAttention):
    """Megatron's self-attention, but the rotation is left to the core attention (see ``kernels.rotate``)."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As Megatron's; ``rotary_pos_emb`` [S, 1, 1, D] are angles."""
        self.core_attention.turn_by(rotary_pos_emb, hidden_states.dtype)  # type: ignore[operator, union-attr]
        return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)


class SwiGLU(torch.nn.Module):
    """[..., 2F] -> [..., F], where Transformer Engine would put an activation of its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return swiglu(gate_and_up)


class LlamaModel(GPTModel):
    """Megatron's GPT model, with torch's own cross entropy where the vocabulary is not cut and nothing fuses
    it: Megatron's for the cut one takes twice as many passes over the logits."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V] -> losses [B, S]."""
        if self.config.tensor_model_parallel_size > 1 or self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.T.flatten(), reduction="none")
        return losses.view(labels.T.shape).T.contiguous()


class LocalBackend(LocalSpecProvider):
    """Megatron's local build with the layers above."""

    def activation_func(self) -> Any:
        return SwiGLU

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return RMSNorm

    def core_attention(self) -> type:
        return CausalAttention
