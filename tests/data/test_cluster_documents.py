"""c-BTM's clusters as token files: every training document in exactly one, the same bytes each time."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
from corpora import small_recipe, write_files

from btx_megatron.data.folder import read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import prepare
from btx_megatron.ensembles.cluster_documents import cluster_documents, load_found
from btx_megatron.errors import UserError
from btx_megatron.recipe import Clusters, Domain, Recipe, Source, cluster_names

SOURCES = [("formats", "json"), ("formats", "email"), ("loops", "asyncio")]


def recipe_of(number: int) -> Recipe:
    clusters = Clusters(number=number, random_seed=1)
    return dataclasses.replace(small_recipe(), method="cbtm", clusters=clusters)


def names_of(number: int) -> list[str]:
    return cluster_names("cbtm", number)


def documents(folder: Path, sources: list[tuple[str, str]]) -> Counter[bytes]:
    files = [IndexedTokens(token_prefix(folder, "train", *source)) for source in sources]
    return Counter(file[i].tobytes() for file in files for i in range(len(file)))


def test_every_training_document_is_in_exactly_one_cluster(data_folder: Path, tmp_path: Path) -> None:
    cluster_documents(recipe_of(3), data_folder, tmp_path)
    clusters = [(name, "text") for name in names_of(3)]
    assert documents(tmp_path, clusters) == documents(data_folder, SOURCES)
    assert not (tmp_path / "held_out").exists()
    found, before = read_statistics(tmp_path), read_statistics(data_folder)["domains"]
    for key in ("documents", "tokens"):
        total = sum(found["domains"][name]["text"]["train"][key] for name in names_of(3))
        assert total == sum(before[domain][source]["train"][key] for domain, source in SOURCES)
    clusters, documents_of = load_found(tmp_path)
    assert len(clusters.centres_KC) == 3
    for domain in ("formats", "loops"):
        total = sum(documents_of[name].get(domain, 0) for name in names_of(3))
        assert total == sum(source["train"]["documents"] for source in before[domain].values())


@pytest.mark.usefixtures("megatron_datasets")
def test_an_expert_can_train_on_a_cluster(data_folder: Path, tmp_path: Path) -> None:
    from btx_megatron.data.blend import TrainingSamples

    cluster_documents(recipe_of(3), data_folder, tmp_path)
    domains = recipe_of(3).domains_of("expert:cluster1")
    assert domains[1] == Domain("cluster1", [Source("text")])
    samples = TrainingSamples(tmp_path, domains, {"cluster1": 1.0}, 32, 8, 1, tmp_path / "cache")
    assert samples[7]["tokens"].shape == (32,)
    assert list(samples.epochs) == ["cluster1/text"]


def test_started_again_it_writes_the_same_bytes(data_folder: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        cluster_documents(recipe_of(2), data_folder, folder)
    first = {path.relative_to(tmp_path / "a"): path for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(first) == 2 * 2 + 2 + 1 + 1
    for name, path in first.items():
        assert (tmp_path / "b" / name).read_bytes() == path.read_bytes()


def test_more_clusters_than_documents_is_an_error(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clusters.number 9999: there are \d+ training documents; lower it"):
        cluster_documents(recipe_of(9999), data_folder, tmp_path)


def test_names_sort_by_number() -> None:
    assert names_of(2) == ["cluster0", "cluster1"]
    assert names_of(11) == sorted(names_of(11))
    assert names_of(11)[10] == "cluster10"


WORDS = {
    "sea": ["ship", "sail", "harbour", "anchor", "wave", "tide", "captain", "deck", "storm", "island"],
    "kitchen": ["bread", "flour", "oven", "butter", "sugar", "recipe", "spoon", "dough", "salt", "yeast"],
}


def test_two_different_domains_are_told_apart(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts: dict[str, str | bytes] = {
        f"{name}/{i}.txt": " ".join(draw.choices(WORDS[name], k=60)) for name in WORDS for i in range(50)
    }
    write_files(tmp_path / "text", texts)
    domains = [
        {"name": name, "sources": [{"name": name, "path": str(tmp_path / "text" / name)}]} for name in WORDS
    ]
    prepared, folder = tmp_path / "prepared", tmp_path / "clustered"
    recipe = small_recipe(domains=domains)
    recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, vocab_size=300))
    prepare(recipe, prepared, lambda phase, done, total: None)
    clustered = dataclasses.replace(recipe, method="cbtm", clusters=Clusters(number=2))
    cluster_documents(clustered, prepared, folder)
    pure = sum(
        max((documents(folder, [(name, "text")]) & documents(prepared, [(d, d)])).total() for d in WORDS)
        for name in names_of(2)
    )
    count = documents(prepared, [(d, d) for d in WORDS]).total()
    assert count >= 60
    assert pure / count > 0.9  # dealt equally: what one domain has more of goes over
    words = load_found(folder)[0].words()
    assert {len(set(words[k]) & set(WORDS[name])) for k in (0, 1) for name in WORDS} == {0, 10}
