"""Which text the similarity of a context to an expert is learnt from: what the expert was trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from btx_megatron.data.prepare import prepare
from btx_megatron.recipe_file import load_recipe

SHARES = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from btx_megatron.runtime import cpu_backend
cpu_backend.install()
from btx_megatron.evaluation import ensembles
from btx_megatron.evaluation.ensembles import _Similarity
from btx_megatron.recipe_file import load_recipe

ensembles._SIMILARITY_TOKENS = 3000
folder = Path(sys.argv[1])
job = SimpleNamespace(recipe=load_recipe(folder / "recipe.yaml"), data_folder=folder / "data")
similarity, shares = _Similarity(job), {}
for source in job.recipe.source_names:
    text = " ".join(similarity._sample(job, source))
    birds, stones = text.count("bird"), text.count("stone")
    shares[source] = stones / (birds + stones)
print(json.dumps(shares))
"""


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({}, {"one": 0.0, "two": 1.0, "seed": 0.5}),
        (
            {"seed": {"blend": {"one": 1}}, "experts": {"two": {"blend": {"one": 3, "two": 1}}}},
            {"one": 0.0, "two": 0.25, "seed": 0.0},
        ),
    ],
)
def test_text_is_drawn_by_the_stages_blend(
    tmp_path: Path, stages: dict[str, Any], expected: dict[str, float]
) -> None:
    """Shares of the second domain's text."""
    domains = []
    for name, words in (("one", "bird egg nest"), ("two", "stone sand rock")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(40):
            (folder / f"{number}.txt").write_text(f"{words} {number} " * 40)
        domains.append({"name": name, "sources": [{"path": str(folder)}]})
    data = {"domains": domains, "num_workers": 1, "held_out_fraction": 0.1}
    training = {"train_iters": 10, "lr_warmup_iters": 0}
    recipe = {"data": data, "tokenizer": {"vocab_size": 300}, "method": "btm", "baselines": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"training": training, "stages": stages}))
    prepare(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "data", lambda *step: None)
    done = subprocess.run(
        [sys.executable, "-c", SHARES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=0.05)
