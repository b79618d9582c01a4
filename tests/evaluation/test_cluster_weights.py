"""c-BTM's rows: which experts answer where, against a few lines of numpy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from btx_megatron.ensembles.cluster_files import save_clusters
from btx_megatron.ensembles.clusters import fit_clusters
from btx_megatron.ensembles.contexts import BLOCK
from btx_megatron.recipe import Clusters

WORDS = [["ship", "sail", "harbour"], ["bread", "flour", "oven"], ["queen", "rook", "pawn"]]
VOCABULARY = [word for words in WORDS for word in words]


class Words:
    """A tokenizer of nine words."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(VOCABULARY[i] for i in ids)


def test_rows_of_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    from btx_megatron.evaluation import ensembles  # and with it Megatron, behind the backend

    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, 20)) for words in WORDS for _ in range(10)]
    clusters = fit_clusters(texts, 3, random_seed=1)
    (tmp_path / "cluster").mkdir()
    save_clusters(clusters, tmp_path / "cluster")
    monkeypatch.setattr(ensembles, "open_tokenizer", lambda path: Words())
    recipe = SimpleNamespace(clusters=Clusters(number=3, temperature=0.5))
    job: Any = SimpleNamespace(data_folder=tmp_path, run_folder=tmp_path, recipe=recipe)
    tokens_WS = random.integers(0, 9, (4, 2 * BLOCK))
    found = ensembles._Clusters(job).weights(tokens_WS, np.ones(tokens_WS.shape))
    for window, tokens in enumerate(tokens_WS.tolist()):
        for block in (0, 1):  # routed by what stands before the block's first label
            point = clusters.points([Words().decode(tokens[: block * BLOCK + 1])])[0]
            squared = np.array([((point - centre) ** 2).sum() for centre in clusters.centres_KC])
            for row, kept in (("cbtm:top-1", 1), ("cbtm:top-2", 2), ("cbtm:all", 3)):
                weights = np.where(squared <= np.sort(squared)[kept - 1], np.exp(-squared / 0.5), 0)
                here = np.exp(found[row][:, window, block * BLOCK : (block + 1) * BLOCK])
                expected = np.broadcast_to((weights / weights.sum())[:, None], here.shape)
                np.testing.assert_allclose(here, expected, atol=1e-12)
