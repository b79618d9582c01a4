import dataclasses
import multiprocessing
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from corpora import small_recipe
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btx_megatron.data.blend import TrainingSamples, batches, surplus
from btx_megatron.data.folder import token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import prepare
from btx_megatron.data.weights import source_weights
from btx_megatron.errors import UserError
from btx_megatron.recipe import Domain, Source

SEQUENCE = 64


def samples_of(
    data_folder: Path, cache: Path, blend: dict[str, float], count: int, seed: int = 1
) -> TrainingSamples:
    return TrainingSamples(data_folder, small_recipe().data.domains, blend, SEQUENCE, count, seed, cache)


def tokens_of(data_folder: Path, domain: str, source: str) -> np.ndarray[Any, Any]:
    reader = IndexedTokens(token_prefix(data_folder, "train", domain, source))
    return reader.first(reader.total_tokens)


@dataclasses.dataclass
class Numbered:
    """Sample i holds the number i, so that a batch tells which samples it took."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        return {"tokens": torch.full((4,), i), "labels": torch.full((4,), i + 1)}


layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # mbs, dp, micro-batches


@given(layouts, st.integers(0, 4), st.integers(0, 7), st.integers(0, 4))
def test_ranks_and_micro_batches_together_give_every_global_batch(
    layout: tuple[int, int, int], steps: int, rest: int, resumed_at: int
) -> None:
    size, ranks, micro_batches = layout
    batch = size * ranks * micro_batches
    streams = [
        list(
            batches(
                Numbered(steps * batch + rest % batch),
                consumed_samples=resumed_at * batch,
                micro_batch_size=size,
                global_batch_size=batch,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
        )
        for rank in range(ranks)
    ]
    assert {len(stream) for stream in streams} == {max(steps - resumed_at, 0) * micro_batches}
    for i, at_once in enumerate(zip(*streams, strict=True)):
        step, micro_batch = resumed_at + i // micro_batches, i % micro_batches
        first = step * batch + micro_batch * size * ranks
        taken = torch.cat([part["sample_index"] for part in at_once])
        assert taken.tolist() == list(range(first, first + size * ranks))
        for part in at_once:
            assert part["step"] == step
            assert (part["tokens"] == part["sample_index"][:, None]).all()
            assert (part["labels"] == part["tokens"] + 1).all()


def test_the_shapes_of_a_micro_batch() -> None:
    stream = batches(
        Numbered(8),
        consumed_samples=4,
        micro_batch_size=2,
        global_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    part = next(stream)
    for key, kind in [
        ("tokens", torch.int64),
        ("labels", torch.int64),
        ("position_ids", torch.int64),
        ("loss_mask", torch.float32),
    ]:
        assert part[key].shape == (2, 4)
        assert part[key].dtype == kind
        assert part[key].is_contiguous()
    assert part["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert part["loss_mask"].all()
    assert part["sample_index"].dtype == torch.int64


def test_consuming_part_of_a_batch_is_refused() -> None:
    options = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 2}
    for consumed, batch in [(3, 8), (0, 6)]:
        with pytest.raises(ValueError, match="whole"):
            next(batches(Numbered(64), consumed_samples=consumed, global_batch_size=batch, **options))


def test_weights_of_sources() -> None:
    domains = [
        Domain("a", [Source("x", weight=1.0), Source("y", weight=3.0), Source("z", weight=0.0)]),
        Domain("b", [Source("x", weight=5.0)]),
        Domain("c", [Source("x")]),
    ]
    weights = source_weights(domains, {"a": 1.0, "b": 3.0, "c": 0.0})
    assert weights == {("a", "x"): 1 / 16, ("a", "y"): 3 / 16, ("b", "x"): 3 / 4}
    with pytest.raises(UserError, match="no domain 'd'; there are a, b, c"):
        source_weights(domains, {"d": 1.0})
    with pytest.raises(UserError, match="every weight is 0"):
        source_weights(domains, {"c": 0.0})


def test_a_label_is_the_token_that_follows(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    samples = samples_of(data_folder, tmp_path, {"loops": 1.0}, 30)
    assert len(samples) == 30
    for i in range(30):
        sample = samples[i]
        assert sample["tokens"].shape == sample["labels"].shape == (SEQUENCE,)
        assert sample["tokens"].dtype == torch.int64
        assert (sample["tokens"][1:] == sample["labels"][:-1]).all()
    with pytest.raises(IndexError):
        samples[30]


def test_one_epoch_is_the_text_and_epochs_say_so(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    text = tokens_of(data_folder, "loops", "asyncio")
    count = (len(text) - 1) // SEQUENCE
    samples = samples_of(data_folder, tmp_path, {"loops": 1.0}, count)
    assert samples.epochs == {"loops/asyncio": pytest.approx(1.0, abs=SEQUENCE / len(text))}
    drawn = np.concatenate([samples[i]["tokens"].numpy() for i in range(count)])
    # The same tokens, however shuffled: all but the fraction of a sample at the end.
    missing = np.bincount(text, minlength=600) - np.bincount(drawn, minlength=600)
    assert (missing >= 0).all()
    assert missing.sum() == len(text) - count * SEQUENCE


def test_sources_are_drawn_by_weight_over_several_epochs(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    samples = samples_of(data_folder, tmp_path, {"formats": 1.0, "loops": 3.0}, 4000)
    seen = {
        key: samples.epochs[key] * len(tokens_of(data_folder, *key.split("/"))) / SEQUENCE / 4000
        for key in samples.epochs
    }
    assert seen == pytest.approx(
        {"formats/json": 1 / 16, "formats/email": 3 / 16, "loops/asyncio": 3 / 4}, abs=1e-3
    )


def test_a_sample_tells_its_domain(data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType) -> None:
    sources = {"formats": ("json", "email"), "loops": ("asyncio",)}
    texts = {
        domain: [tokens_of(data_folder, domain, source).astype(np.int64).tobytes() for source in names]
        for domain, names in sources.items()
    }
    names = small_recipe().domain_names
    for blend in ({"formats": 1.0, "loops": 1.0}, {"loops": 1.0}):
        samples = samples_of(data_folder, tmp_path, blend, 40)
        numbers = np.arange(40)[::-1]  # in any order
        domains = [names[number] for number in samples.domain_numbers(numbers)]
        assert set(domains) == set(blend)
        found = 0
        for number, domain in zip(numbers, domains, strict=True):
            # a few tokens in its middle: documents are shuffled, and one may end there
            part = samples[int(number)]["tokens"].numpy()[20:28].astype(np.int64).tobytes()
            within = {name for name in names if any(part in text for text in texts[name])}
            found += bool(within)
            assert not within or domain in within
        assert found > 30


def test_the_order_follows_from_the_seed_and_survives_the_cache(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    blend = {"formats": 1.0, "loops": 1.0}

    def order(cache: str, seed: int) -> torch.Tensor:
        samples = samples_of(data_folder, tmp_path / cache, blend, 50, seed)
        return torch.stack([samples[i]["tokens"] for i in range(50)])

    first = order("a", 1)
    assert torch.equal(first, order("a", 1))
    assert torch.equal(first, order("b", 1))
    assert not torch.equal(first, order("a", 2))


def test_a_half_written_cache_is_built_anew(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    blend = {"formats": 1.0, "loops": 1.0}
    before = samples_of(data_folder, tmp_path, blend, 50)
    arrays = sorted(tmp_path.rglob("*.npy"))
    assert len(arrays) == 3 * 3 + 2
    for i, array in enumerate(arrays):
        array.write_bytes(array.read_bytes()[: [-1, 100, 0][i % 3]])
    after = samples_of(data_folder, tmp_path, blend, 50)
    assert all(torch.equal(before[i]["tokens"], after[i]["tokens"]) for i in range(50))


def test_data_prepared_anew_does_not_meet_an_old_cache(tmp_path: Path, megatron_datasets: ModuleType) -> None:
    epochs = []
    for seed in (1, 2):
        prepare(small_recipe(random_seed=seed), tmp_path / "data", lambda phase, done, total: None)
        samples = samples_of(tmp_path / "data", tmp_path / "cache", {"loops": 1.0}, 50)
        for i in range(50):
            assert samples[i]["tokens"].shape == (SEQUENCE,)
        epochs.append(samples.epochs)
    assert epochs[0] != epochs[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_token_files_that_are_gone_or_cut_short_are_named(data_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data_folder, copy)
    domain = small_recipe().data.domains[0]
    bin_file = token_prefix(copy, "train", domain.name, domain.sources[0].name).with_suffix(".bin")
    with bin_file.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="a sequence lies outside the 100 bytes of"):
        samples_of(copy, tmp_path / "cache", {domain.name: 1.0}, 10)
    bin_file.unlink()
    with pytest.raises(UserError, match=r"\.bin: cannot be read \(No such file"):
        samples_of(copy, tmp_path / "cache", {domain.name: 1.0}, 10)


def test_a_source_that_was_not_prepared_is_refused(data_folder: Path, tmp_path: Path) -> None:
    domains = [*small_recipe().data.domains, Domain("poems", [Source("odes")])]
    with pytest.raises(UserError, match="domain 'poems', source 'odes' is not there; run `btx prepare`"):
        TrainingSamples(data_folder, domains, {"poems": 1.0}, SEQUENCE, 10, 1, tmp_path)


@settings(max_examples=60)
@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=60), st.integers(1, 500))
@example([1.0] + [0.001] * 59, 50)  # Megatron's default surplus is too little here
def test_no_source_runs_dry(megatron_datasets: ModuleType, raw: list[float], num_samples: int) -> None:
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset

    weights = [weight / sum(raw) for weight in raw]
    size = sum(row[0] for row in _get_size_per_split_per_dataset(weights, [num_samples]))
    built = _get_size_per_split_per_dataset(weights, [num_samples], surplus=surplus(weights, num_samples))
    index, within = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(index, within, weights, len(weights), size, False)
    drawn = np.bincount(index, minlength=len(weights))
    assert all(drawn[i] <= built[i][0] for i in range(len(weights)))


def _rank(rank: int, folder: str, data_folder: Path, answers: Any) -> None:
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        time.sleep(1)  # rank 1 must wait for the cache, not build its own or fail
    samples = samples_of(data_folder, Path(folder, "cache"), {"formats": 1.0, "loops": 1.0}, 20)
    answers.put((rank, [samples[i]["tokens"].tolist() for i in range(20)]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes import Megatron
def test_ranks_wait_for_the_order_that_rank_0_builds(
    data_folder: Path, tmp_path: Path, megatron_datasets: ModuleType
) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path), data_folder, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    told = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    alone = samples_of(data_folder, tmp_path / "alone", {"formats": 1.0, "loops": 1.0}, 20)
    assert told[0] == told[1] == [alone[i]["tokens"].tolist() for i in range(20)]
