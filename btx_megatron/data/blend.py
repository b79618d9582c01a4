"""Training samples and batches: Megatron's blended datasets, in one order under every layout.

Sample i of a stage is the same on every rank and under every layout: Megatron shuffles documents and
samples from the seed, and draws from the sources by weight. A batch is a run of consecutive samples,
cut over micro-batches and data-parallel ranks. So resuming is a matter of counting consumed samples,
and the data-parallel size may change in between.

The order does depend on the number of samples asked for, because Megatron shuffles whole epochs: a
resumed run must ask for as many as the first one did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from btx_megatron.data.folder import read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import tokenizer_path
from btx_megatron.data.tokenizer import open_tokenizer
from btx_megatron.data.weights import source_weights
from btx_megatron.errors import UserError
from btx_megatron.recipe import Domain

MIN_SURPLUS = 0.005  # Megatron's default


class Samples(Protocol):
    """Anything with a length whose item i holds ``tokens`` and ``labels``, LongTensor [s] each."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]: ...


class TrainingSamples:
    """The samples of one training stage, over Megatron's GPTDataset and BlendedDataset.

    ``blend`` holds the sampling weight of each domain; one that it does not name is not drawn. Where
    torch.distributed is initialised every rank must make this object: rank 0 writes the sample order
    to ``cache`` while the others wait at a barrier. ``cache`` must be a folder that all ranks see and
    no other stage uses. ``epochs["domain/source"]`` says how often the source's tokens are seen.

    Raises UserError for a blend without weight and for sources that are not in ``data_folder``.
    """

    def __init__(
        self,
        data_folder: Path,
        domains: list[Domain],
        blend: dict[str, float],
        seq_length: int,
        num_samples: int,
        random_seed: int,
        cache: Path,
    ) -> None:
        weights = source_weights(domains, blend)
        prepared = _prepared_sources(data_folder, list(weights))
        # Megatron's cache goes by path, not by content: text prepared anew must not meet an old order.
        content = "".join(source["idx_sha256"] for source in prepared)
        cache = cache / hashlib.sha256(content.encode()).hexdigest()[:16]
        config = {
            "random_seed": random_seed,
            "sequence_length": seq_length,
            "path_to_cache": str(cache),
            "tokenizer": open_tokenizer(tokenizer_path(data_folder)),
            "mid_level_dataset_surplus": surplus(list(weights.values()), num_samples),
        }
        prefixes = [str(token_prefix(data_folder, "train", *key)) for key in weights]
        for prefix in prefixes:
            IndexedTokens(Path(prefix))  # refuses files that are missing or cut short; Megatron reads on
        remove_broken_arrays(cache)
        self._samples = _build(prefixes, list(weights.values()), num_samples, config)
        self._num_samples = num_samples
        names = [domain.name for domain in domains]
        self._domain_of_source = np.array([names.index(domain) for domain, _ in weights])
        drawn = _samples_by_source(self._samples, len(weights), num_samples)
        self.epochs = {
            "/".join(key): count * seq_length / source["tokens"]
            for key, source, count in zip(weights, prepared, drawn, strict=True)
        }

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Sample i: ``tokens`` and ``labels``, LongTensor [s]; a label is the token that follows."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        sample = self._samples[i]
        return {"tokens": sample["tokens"], "labels": sample["labels"]}

    def domain_numbers(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of ``domains`` each of these samples is drawn from, by number."""
        if len(self._domain_of_source) == 1:
            return np.full(len(numbers), self._domain_of_source[0])
        return self._domain_of_source[self._samples.dataset_index[numbers]]


def batches(
    samples: Samples,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[dict[str, Any]]:
    """One dict a micro-batch for this rank, from ``consumed_samples`` to the last whole batch.

    Step g takes samples [g*GBS, (g+1)*GBS); its micro-batch m gives rank r the MBS samples from
    g*GBS + m*MBS*DP + r*MBS on. Keys: ``tokens``, ``labels``, ``position_ids`` LongTensor [b, s];
    ``loss_mask`` float [b, s], all 1; ``sample_index`` LongTensor [b], the number of each sample in
    the training order; ``step`` int.
    """
    options = (consumed_samples, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    for step, numbers in sample_numbers(len(samples), *options):
        items = [samples[i] for i in numbers]
        tokens = torch.stack([item["tokens"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        yield micro_batch(tokens, labels, numbers, step)


def sample_numbers(
    count: int,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[tuple[int, range]]:
    """Step and sample numbers of each micro-batch of a rank; see batches. Every loader goes by it."""
    across = micro_batch_size * data_parallel_size
    if global_batch_size % across or consumed_samples % global_batch_size:
        raise ValueError(
            f"consumed_samples {consumed_samples} must be whole batches of {global_batch_size}, and these "
            f"whole micro-batches of {micro_batch_size} x {data_parallel_size}"
        )
    for step in range(consumed_samples // global_batch_size, count // global_batch_size):
        for first in range(step * global_batch_size, (step + 1) * global_batch_size, across):
            mine = first + data_parallel_rank * micro_batch_size
            yield step, range(mine, mine + micro_batch_size)


def micro_batch(tokens: torch.Tensor, labels: torch.Tensor, numbers: range, step: int) -> dict[str, Any]:
    """One micro-batch, made where its tokens lie; see batches."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(tokens.shape, dtype=torch.float, device=tokens.device),
        "position_ids": positions.expand(tokens.shape).contiguous(),
        "sample_index": torch.tensor(numbers),
        "step": step,
    }


def surplus(weights: list[float], num_samples: int) -> float:
    """Share of spare samples with which no source of the blend runs dry (Megatron stops if one does).

    Megatron asks of each source for ceil(ceil(n w) (1 + surplus)) samples and then blends a few more
    than n, as it rounds every source up; drawing the source that lags most takes at most
    w (size - 1) + 1 from one. Its default, 0.5 %, is too little for many sources and few samples.
    """
    asked = [math.ceil(num_samples * weight) for weight in weights]
    drawn = [math.floor(weight * (sum(asked) - 1) + 1) for weight in weights]
    spare = MIN_SURPLUS
    while any(math.ceil(a * (1 + spare)) < d for a, d in zip(asked, drawn, strict=True)):
        spare *= 2
    return spare


def remove_broken_arrays(cache: Path) -> None:
    """Remove arrays that a killed run left half written: Megatron takes every file that exists.

    Rank 0 alone does it, before it builds; the others read after the builder's barrier.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for path in cache.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()


def _prepared_sources(data_folder: Path, keys: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The statistics of the training text of each (domain, source)."""
    domains = read_statistics(data_folder)["domains"]
    for domain, source in keys:
        if source not in domains.get(domain, {}):
            raise UserError(
                f"{data_folder}: domain '{domain}', source '{source}' is not there; run `btx prepare`"
            )
    return [domains[domain][source]["train"] for domain, source in keys]


def _build(prefixes: list[str], weights: list[float], num_samples: int, options: dict[str, Any]) -> Any:
    """Megatron's dataset: a GPTDataset for one source, else a BlendedDataset of several."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        blend_per_split=[(prefixes, weights), None, None],
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **options,
    )
    sizes = [num_samples, 0, 0]  # training, validation, test; only the first is built
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def _samples_by_source(dataset: Any, sources: int, num_samples: int) -> list[int]:
    """How many of the first ``num_samples`` samples each source gives."""
    if sources == 1:
        return [num_samples]
    return np.bincount(dataset.dataset_index[:num_samples], minlength=sources).tolist()
