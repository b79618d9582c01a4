"""A run is grown under its own tokenizer: another one is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sentencepiece import SentencePieceTrainer
from tiny import HIDDEN, LAYERS, WIDTH, random_weights, write_dense

from btx_megatron.errors import UserError
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.mixing.mix import Output, average, mix
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.mixing.pretrained import check_pretrained
from btx_megatron.recipe_file import load_recipe, parse_recipe, recipe_to_dict


def write_tokenizer(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "text").write_text(text * 50)
    SentencePieceTrainer.train(
        input=str(path.parent / "text"),
        model_prefix=str(path.with_suffix("")),
        vocab_size=14,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "num_attention_heads": 2}
    model |= {"num_query_groups": 1, "make_vocab_size_divisible_by": 16}
    tree = {
        "data": {"domains": [{"name": name, "sources": [{"path": "/x"}]} for name in "ab"]},
        "model": model,
        "training": {"train_iters": 5, "lr_warmup_iters": 1},
        "baselines": [],
    }
    recipe = recipe_to_dict(parse_recipe(tree))
    run = tmp_path / "run"
    sources = {name: write_dense(tmp_path / name, random_weights(i)) for i, name in enumerate("abs")}
    for stage in ("seed", "finetune"):
        (run / stage).mkdir(parents=True)
        (run / stage / "manifest.json").write_text(manifest_text(make_manifest(stage, {}, {}, {}, 1, 1.0)))
    average({"s": sources["s"]}, Output(run / "seed" / "checkpoints", recipe=recipe), MixOptions())
    mix(sources, Output(run / "finetune" / "checkpoints", recipe=recipe), MixOptions())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_tokenizer(run / "data" / "tokenizer" / "tokenizer.model", "abc abd\n")
    write_tokenizer(tmp_path / "other" / "tokenizer.model", "xyz yzy\n")
    more = {"data": {"domains": [{"name": name, "sources": [{"path": "/x"}]} for name in "abc"]}}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(tree | more | {"mix": {"grow_from": "run"}}))
    check_pretrained(load_recipe(tmp_path / "new.yaml"))  # the run's own
    other = "tokenizer.tokenizer_model=other/tokenizer.model"
    with pytest.raises(UserError, match="was trained with another tokenizer than"):
        check_pretrained(load_recipe(tmp_path / "new.yaml", [other]))
