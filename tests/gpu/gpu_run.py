"""Small models on one GPU, trained in this process: any build, any precision, dense or a mixture."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx_megatron.recipe import Launch, Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks

STEPS, VOCABULARY, EXPERTS = 20, 512, 4
LOCAL, TE = "local", "transformer_engine"
MODEL = Model(
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=128,
)
TRAINING = Training(
    train_iters=STEPS, micro_batch_size=4, global_batch_size=8, lr=1e-3, lr_warmup_iters=2, bf16=True
)


@dataclass
class Run:
    """One training run from random weights, which are the same for every build and precision.

    Its groups end where the next one is made: take all that is wanted of a run before that.
    """

    impl: str = TE
    experts: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    model: dict[str, Any] = field(default_factory=dict)
    consumed: int = 0

    def __post_init__(self) -> None:
        asked = replace(TRAINING, **self.training)
        # its layers draw their weights each in its own way: it gets the local ones'
        weights = local_weights(self.experts) if self.impl == TE else None
        _forget_fp8()
        ranks.set_layout(self.layout, seed=7, cuda_graphs=asked.cuda_graph_impl != "none")
        from btx_megatron.training.checkpoint import TrainingState
        from btx_megatron.training.trainer import Trainer

        recipe = Recipe(
            model=replace(MODEL, **self.model),
            training=asked,
            moe=replace(Moe(), **self.moe),
            launch=Launch(transformer_impl=self.impl),  # type: ignore[arg-type]
        )
        stage = Stage(training=asked, layout=self.layout)
        self.trainer = Trainer(recipe, stage, padded_vocab_size=VOCABULARY, num_experts=self.experts)
        t = self.trainer
        self.state = TrainingState(t.model, t.optimizer, t.scheduler, self.layout)
        if weights:
            self.load(weights)

    def steps(self, count: int = STEPS) -> list[float]:
        """Losses of the next steps."""
        losses = [self.trainer.step(self._batches(self.state.iteration + i)).lm_loss for i in range(count)]
        self.state.iteration += count
        self.state.consumed_samples += count * TRAINING.global_batch_size
        return losses

    def _batches(self, step: int) -> Iterator[dict[str, Any]]:
        for part in range(TRAINING.global_batch_size // TRAINING.micro_batch_size):
            yield micro_batch(step, part)

    def logits(self) -> Tensor:
        """Of one micro-batch, without dropout."""
        from btx_megatron.training.trainer import evaluating

        batch = micro_batch(0, 0)
        device = ranks.device()
        with evaluating(self.trainer.model):
            return self.trainer.model[0](
                batch["tokens"].to(device), batch["position_ids"].to(device), attention_mask=None
            ).float()

    def load(self, folder: Path) -> None:
        """Weights, as from one stage to the next."""
        from btx_megatron.training.checkpoint import load_weights

        weights = load_weights(folder, self.trainer.model)
        fp8 = self.trainer.stage.training.fp8_param_gather
        self.trainer.optimizer.reload_model_params(weights if fp8 else None)

    def save(self, folder: Path) -> None:
        """Everything."""
        from btx_megatron.training.saver import save

        save(folder, self.state, {}, keep=1)

    def resume(self, folder: Path) -> None:
        from btx_megatron.training.checkpoint import resume

        assert resume(folder, self.state)


@cache
def local_weights(experts: int | None) -> Path:
    """A checkpoint of the random weights of the local build."""
    from megatron.core import dist_checkpointing

    from btx_megatron.checkpoints.tracker import write_tracker
    from btx_megatron.model.build import unwrap
    from btx_megatron.training.checkpoint import _metadata

    folder = Path(tempfile.mkdtemp())
    path = folder / "iter_0000001"
    path.mkdir()
    model = unwrap(Run(LOCAL, experts).trainer.model[0])
    state = {"model": {"0": model.sharded_state_dict(metadata=_metadata())}}  # type: ignore[operator]
    dist_checkpointing.save(state, str(path))
    write_tracker(folder, "1")
    return folder


def _forget_fp8() -> None:
    """Transformer Engine would go on with the scales of models that are gone."""
    if find_spec("transformer_engine"):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


def micro_batch(step: int, part: int) -> dict[str, Any]:
    """Tokens with some structure to learn, by their number alone."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    strides = torch.randint(1, 4, (TRAINING.micro_batch_size, MODEL.seq_length + 1), generator=generator)
    tokens = strides.cumsum(1) % VOCABULARY
    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(inputs.shape),
        "position_ids": torch.arange(inputs.shape[1]).expand_as(inputs),
        "sample_index": torch.arange(len(inputs)) + TRAINING.global_batch_size * step,
        "step": step,
    }


def tail(losses: list[float]) -> float:
    """Mean of the last five."""
    return sum(losses[-5:]) / 5
