"""A recipe's mistakes, each refused with one line that names key, numbers and fix."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.estimate import parameter_counts, recipe_parameter_counts, stage_tokens, vocab_size
from btx_megatron.matching import matched_train_iters
from btx_megatron.recipe import Model, Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import load_recipe, parse_recipe, recipe_to_dict
from btx_megatron.run_folder import RunFolder

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"

GOOD: dict[str, Any] = {
    "data": {
        "domains": [
            {"name": "prose", "sources": [{"name": "text", "path": "text"}]},
            {"name": "code", "sources": [{"name": "text", "path": "text"}]},
            {"name": "math", "sources": [{"name": "text", "path": "text"}]},
        ]
    },
    "training": {"train_iters": 10, "lr_warmup_iters": 2},
}
TP2 = {"tensor_model_parallel_size": 2}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    # names
    ({"data.domains.0.name": "a b"}, "data.domains: the name 'a b' must be made of letters, digits"),
    ({"data.domains.0.name": "../x"}, "data.domains: the name '../x' must be made of letters, digits"),
    ({"data.domains.0.name": "seed"}, "data.domains: the name 'seed' is reserved"),
    ({"data.domains.0.name": "code"}, "data.domains: the name 'code' is given 2 times"),
    ({"data.domains.0.sources.0.name": "a/b"}, "data.domains.prose.sources: the name 'a/b' must be made of"),
    # data
    ({"data.domains": []}, "data.domains is empty; give at least one domain"),
    ({"data.domains.0.sources": []}, "data.domains.prose.sources is empty"),
    ({"data.domains.0.sources.0.path": ""}, "data.domains.prose.sources.text.path is missing"),
    ({"data.domains.0.sources.0.include": []}, "data.domains.prose.sources.text.include is empty"),
    ({"data.domains.0.sources.0.max_bytes": 0}, "data.domains.prose.sources.text.max_bytes 0: must be"),
    ({"data.domains.0.sources.0.weight": -1.0}, "data.domains.prose.sources.text.weight -1.0: a weight is"),
    ({"data.domains.0.sources.0.weight": 0.0}, "data.domains.prose.sources: all weights are 0"),
    ({"data.held_out_fraction": 0.0}, "data.held_out_fraction 0.0: must lie between 0 and 1"),
    ({"data.held_out_fraction": 1.0}, "data.held_out_fraction 1.0: must lie between 0 and 1"),
    ({"data.held_out_max_tokens": 0}, "data.held_out_max_tokens 0: must be at least 1"),
    ({"data.num_workers": -1}, "data.num_workers -1: must be at least 0"),
    ({"tokenizer.vocab_size": 0}, "tokenizer.vocab_size 0: must be at least 1"),
    ({"run_folder": ""}, "run_folder is empty"),
    # model
    ({"model.num_layers": 0}, "model.num_layers 0: must be at least 1"),
    ({"model.num_query_groups": 3}, "model.num_query_groups 3 must divide model.num_attention_heads 4"),
    ({"model.hidden_size": 130}, "model.hidden_size 130 is not divisible by model.num_attention_heads 4"),
    ({"model.kv_channels": 33}, "the width of a head is 33"),
    ({"model.hidden_size": 4}, "the width of a head is 1"),
    ({"model.attention_dropout": 1.0}, "model.attention_dropout 1.0: a probability"),
    ({"model.norm_epsilon": 0.0}, "model.norm_epsilon 0.0: must be above 0"),
    # mixture
    (
        {"moe.moe_router_topk": 5},
        "moe.moe_router_topk 5 is more than the 4 experts (prose, code, math, seed)",
    ),
    ({"moe.moe_router_topk": 0}, "moe.moe_router_topk 0: must be at least 1"),
    ({"moe.moe_router_topk": 1}, "set moe_router_type: switch or sample_top1"),
    ({"moe.moe_aux_loss_coeff": -0.1}, "moe.moe_aux_loss_coeff -0.1: must be at least 0"),
    ({"mix.router_std": 0.0}, "mix.router_std 0.0: must be above 0"),
    # stages
    (
        {"stages.experts.maths": {}},
        "stages.experts.maths: no expert of that name; there are prose, code, math",
    ),
    ({"stages.seed.training.train_iters": None}, "stages.seed.training.train_iters is missing"),
    ({"stages.experts.math.training.train_iters": 0}, "stages.experts.math.training.train_iters 0: must be"),
    ({"stages.finetune.blend": {"codes": 1.0}}, "stages.finetune.blend.codes: no such domain"),
    ({"stages.finetune.blend": {"code": -1.0}}, "stages.finetune.blend.code -1.0: a weight is a number"),
    ({"stages.finetune.blend": {"code": 0.0}}, "stages.finetune.blend: all weights are 0"),
    (
        {"stages.seed.layout.data_parallel_size": 3},
        "stages.seed.training.global_batch_size 8 is not divisible by micro_batch_size 1 x "
        "data_parallel_size 3 = 3; make it a multiple of 3",
    ),
    ({"training.lr": 0.0}, "stages.seed.training.lr 0.0: must be above 0"),
    ({"training.lr": float("nan")}, "stages.seed.training.lr nan: must be above 0"),
    ({"training.min_lr": 1.0}, "stages.seed.training.min_lr 1.0 is above lr 0.0001"),
    (
        {"training.lr_warmup_iters": 10},
        "stages.seed.training.lr_warmup_iters 10 must be below train_iters 10",
    ),
    (
        {"training.save_retain_interval": 0},
        "stages.seed.training.save_retain_interval 0: must be at least 1",
    ),
    (
        {"training.distributed_timeout_minutes": 0},
        "stages.seed.training.distributed_timeout_minutes 0.0: must be above 0",
    ),
    (
        {"training.max_consecutive_skipped_steps": -1},
        "stages.seed.training.max_consecutive_skipped_steps -1: must be at least 0",
    ),
    (
        {"training.loss_spike_factor": 0.5},
        "stages.seed.training.loss_spike_factor 0.5: must be at least 1",
    ),
    ({"training.adam_beta2": 1.0}, "stages.seed.training.adam_beta2 1.0: must be at least 0 and below 1"),
    ({"stages.dense.training.lr_warmup_iters": 10}, "stages.dense.training.lr_warmup_iters 10 must be below"),
    (
        {"stages.experts.math.training": {"bf16": True}},
        "stages.experts.math.training.bf16 differs from training",
    ),
    ({"evaluate.micro_batch_size": 0}, "evaluate.micro_batch_size 0: must be at least 1"),
    ({"launch.threads_per_rank": -1}, "launch.threads_per_rank -1: must be at least 0"),
    # layouts
    (
        {"stages.seed.layout.data_parallel_size": 0},
        "stages.seed.layout.data_parallel_size 0: must be at least 1",
    ),
    (
        {"stages.experts.math.layout.tensor_model_parallel_size": 3},
        "stages.experts.math.layout.tensor_model_parallel_size 3 must divide model.num_attention_heads 4",
    ),
    (
        {"stages.seed.layout": TP2, "model.ffn_hidden_size": 333},
        "stages.seed.layout.tensor_model_parallel_size 2 must divide model.ffn_hidden_size 333",
    ),
    (
        {"stages.seed.layout": TP2, "model.make_vocab_size_divisible_by": 1},
        "stages.seed.layout.tensor_model_parallel_size 2 must divide model.make_vocab_size_divisible_by 1",
    ),
    (
        {
            "model.num_attention_heads": 12,
            "model.num_query_groups": 3,
            "model.hidden_size": 48,
            "stages.seed.layout": TP2,
        },
        "stages.seed.layout.tensor_model_parallel_size 2 must divide model.num_query_groups 3, or be",
    ),
    (
        {"stages.seed.layout.pipeline_model_parallel_size": 3},
        "stages.seed.layout.pipeline_model_parallel_size 3 must divide model.num_layers 4",
    ),
    ({"stages.seed.layout.sequence_parallel": True}, "stages.seed.layout.sequence_parallel true needs"),
    (
        {"model.seq_length": 255, "stages.seed.layout": TP2 | {"sequence_parallel": True}},
        "stages.seed.layout.sequence_parallel: tensor_model_parallel_size 2 must divide model.seq_length 255",
    ),
    (
        {"model.seq_length": 254, "stages.seed.layout.context_parallel_size": 2},
        "stages.seed.layout.context_parallel_size 2: model.seq_length 254 is cut into 2 x 2 pieces, and "
        "must be a multiple of 4",
    ),
    (
        {
            "model.seq_length": 12,
            "model.num_attention_heads": 4,
            "stages.seed.layout": {
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
                "context_parallel_size": 2,
            },
        },
        "stages.seed.layout.context_parallel_size 2: model.seq_length 12 / 2 must be a multiple of "
        "tensor_model_parallel_size 4",
    ),
    (
        {"evaluate.layout.context_parallel_size": 2},
        "evaluate.layout.context_parallel_size 2: held-out losses are computed over whole "
        "sequences; set it to 1",
    ),
    (
        {"stages.finetune.layout": {"expert_model_parallel_size": 4, "context_parallel_size": 2}},
        "stages.finetune.layout: tensor_model_parallel_size 1 x context_parallel_size 2 x data_parallel_size "
        "1 = 2 ranks are not divisible by expert_tensor_parallel_size 1 x expert_model_parallel_size 4",
    ),
    (
        {"stages.seed.layout.overlap_param_gather": True},
        "stages.seed.layout.overlap_param_gather needs use_distributed_optimizer: true",
    ),
    (
        {"stages.seed.layout.expert_model_parallel_size": 2},
        "stages.seed.layout.expert_model_parallel_size 2: this stage trains a dense model",
    ),
    (
        {"stages.experts.code.layout.expert_tensor_parallel_size": 2},
        "stages.experts.code.layout.expert_tensor_parallel_size 2: this stage trains a dense model",
    ),
    (
        {"stages.finetune.layout": {"expert_model_parallel_size": 3, "data_parallel_size": 3}},
        "stages.finetune.layout.expert_model_parallel_size 3 must divide the number of experts 4",
    ),
    (
        {"stages.finetune.layout.expert_model_parallel_size": 2},
        "stages.finetune.layout: tensor_model_parallel_size 1 x data_parallel_size 1 = 1 ranks are not "
        "divisible by expert_tensor_parallel_size 1 x expert_model_parallel_size 2 = 2",
    ),
    (
        {"stages.finetune.layout": {"expert_tensor_parallel_size": 5, "data_parallel_size": 5}},
        "stages.finetune.layout.expert_tensor_parallel_size 5 must divide model.ffn_hidden_size 384",
    ),
    (
        {"stages.finetune.layout": TP2},
        "stages.finetune.layout.tensor_model_parallel_size 2: a mixture of experts under tensor parallelism "
        "needs sequence_parallel: true",
    ),
    ({"evaluate.layout": TP2}, "evaluate.layout.tensor_model_parallel_size 2: a mixture of experts under"),
    (
        {"evaluate.layout.pipeline_model_parallel_size": 3},
        "evaluate.layout.pipeline_model_parallel_size 3 must",
    ),
]


def put(tree: Any, key: str, value: Any) -> None:
    """Set ``a.0.b`` in a tree of lists and mappings."""
    *path, last = key.split(".")
    for part in path:
        tree = tree[int(part)] if isinstance(tree, list) else tree.setdefault(part, {})
    tree[last] = value


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(GOOD)
    for key, value in changes.items():
        put(tree, key, value)
    if any(key.startswith("stages.dense.training.lr_warmup") for key in changes):
        tree["stages"]["dense"]["training"]["train_iters"] = 10
    return tree


def load(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path, list(overrides))


def test_the_good_recipe_is_good(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).expert_names == ["prose", "code", "math", "seed"]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_each_mistake_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, changed(changes))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'recipe.yaml'}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"moe.moe_router_topk": 1, "moe.moe_router_pre_softmax": True},
        {"model.num_query_groups": 1, "stages.seed.layout": TP2},  # fewer groups than TP: shared
        {"stages.finetune.layout": {"data_parallel_size": 2, "expert_model_parallel_size": 2}},
        {"stages.finetune.layout": {"context_parallel_size": 2, "expert_model_parallel_size": 2}},
        {
            "stages.finetune.layout": TP2
            | {"expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2, "sequence_parallel": True}
        },
        {"baselines": [], "stages.dense.layout.tensor_model_parallel_size": 3},  # not trained, not checked
        {"model.kv_channels": 32, "model.hidden_size": 100},
        {"mix.include_seed": False, "moe.moe_router_topk": 3},
    ],
)
def test_what_is_allowed(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(tmp_path, changed(changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown key 'modle'; did you mean 'model'?"),
        ("model: {num_layer: 3}", "unknown key 'model.num_layer'; did you mean 'num_layers'?"),
        ("model: {num_layers: many}", "key 'model.num_layers'"),
        ("mix: {average: median}", "key 'mix.average'"),
        ("a: [1, 2", "broken YAML"),
        ("- 1", "a recipe is a mapping of keys, this is a list"),
        ("", "data.domains is empty"),
        ("name: a\nname: b", "found duplicate key name"),
        ("model: {num_layers: 2, num_layers: 3}", "found duplicate key num_layers"),
        ("training: 5", "key 'training': is 5, must be a mapping"),
        ("layout:", "key 'layout': is empty, must be a mapping"),
        ("data:", "key 'data': is empty, must be a mapping"),
        ("data: {domains: {prose: {}}}", "key 'data.domains': is a mapping, must be a list"),
        ("data: {domains: [prose]}", "key 'data.domains[0]': is 'prose', must be a mapping"),
        ("data: {domains: [{nam: prose}]}", "unknown key 'data.domains[0].nam'; did you mean 'name'?"),
        ("stages: {experts: [code]}", "key 'stages.experts': is a list, must be a mapping"),
        ("stages: {seed: {layot: {}}}", "unknown key 'stages.seed.layot'; did you mean 'layout'?"),
        ("baselines: dense", "key 'baselines': is 'dense', must be a list"),
        (
            "layout: {recompute_modules: mlp}",
            "key 'layout.recompute_modules': is 'mlp', must be a list",
        ),
        ("training: {lr: [1]}", "key 'training.lr': is a list, must be a single value"),
        ("&a [*a]", "broken YAML: an anchor holds itself"),
        ("text", "a recipe is a mapping of keys, this is 'text'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_are_what_is_written(tmp_path: Path) -> None:
    """YAML 1.1 would read a number of seconds, a boolean, an octal number; OmegaConf would look for a key."""
    text = """
name: 2024_12_01
data: {domains: [{name: no, sources: [{path: x}]}, {name: 2020, sources: [{path: y}]}]}
stages: {experts: {2020: {training: {lr: 1e-4}}, no: {training: {lr: 0.5}}}}
training: {train_iters: 1_000, lr: 1e-3, wandb_project: 'of ${USER}'}
mix: {include_seed: false}
slurm:
  time: 24:00:00
  account: 0123
  partition: yes
  environment: {NCCL_DEBUG: on, X: 010, PATH: '/x:${PATH}'}
  setup: ['source ${SCRATCH}/bin/activate', 'echo \\${A}', 'echo ${B:-${C}']
"""
    (tmp_path / "recipe.yaml").write_text(text)
    overrides = ["slurm.cpu.time=12:30:00", "slurm.stages.expert:no.time=10:00:00", "slurm.cpu.account=${ME}"]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    slurm = recipe.slurm
    assert (recipe.name, recipe.domain_names) == ("2024_12_01", ["no", "2020"])
    assert [recipe.stage(f"expert:{name}").training.lr for name in ("no", "2020")] == [0.5, 1e-4]
    assert recipe.training.train_iters == 1000
    assert {recipe.stage(name).training.wandb_project for name in ("seed", "dense")} == {"of ${USER}"}
    assert recipe.mix.include_seed is False
    assert (slurm.time, slurm.account, slurm.partition) == ("24:00:00", "0123", "yes")
    assert slurm.environment == {"NCCL_DEBUG": "on", "X": "010", "PATH": "/x:${PATH}"}
    assert slurm.setup == ["source ${SCRATCH}/bin/activate", r"echo \${A}", "echo ${B:-${C}"]
    assert (slurm.cpu.time, slurm.cpu.account) == ("12:30:00", "${ME}")
    assert slurm.stages["expert:no"].time == "10:00:00"
    run = RunFolder(tmp_path / "run")
    run.claim(recipe)  # what jobs read
    assert run.recipe().slurm == slurm
    assert parse_recipe(recipe_to_dict(recipe)) == recipe


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="Is a directory; a recipe is a YAML file that can be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(UserError, match="Not a directory; a recipe is a YAML file"):
        load_recipe(tmp_path / "latin.yaml" / "recipe.yaml")
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8 text \(byte 6\)"):
        load_recipe(tmp_path / "latin.yaml")


def test_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "training.lr=0.5", "stages.experts.math.training.lr=0.25")
    assert recipe.stage("seed").training.lr == 0.5
    assert recipe.stage("expert:math").training.lr == 0.25
    recipe = load(
        tmp_path,
        GOOD,
        "data.domains[1].name=poems",
        "layout={data_parallel_size: 2}",
        "name=",
        "run_folder=~/x",
    )
    assert recipe.domain_names == ["prose", "poems", "math"]
    assert recipe.stage("seed").layout.data_parallel_size == 2
    assert recipe.name == ""
    assert recipe.run_folder == str(Path.home() / "x")
    for override, message in (
        ("training.lr", "override 'training.lr': write it as key.sub=value"),
        ("training.learning_rate=1", "unknown key 'training.learning_rate'"),
        ("training.lr=fast", "key 'training.lr'"),
        ("training..lr=1", "override 'training..lr=1': write it as key.sub=value"),
        ("data.domains[9].name=x", "override 'data.domains[9].name=x': list index out of range"),
        ("baselines=[dense,dense]", "baselines: 'dense' is given 2 times"),
        ("training.lr=0", "stages.seed.training.lr 0.0: must be above 0"),
        ("data.domains[0].sources[0].path=~nobody-of-this-name/x", "nobody's home is known by this name"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load(tmp_path, GOOD, override)


def test_stages_inherit_and_paths_start_at_the_recipe(tmp_path: Path) -> None:
    tree = changed({"training.lr": 0.5, "stages.seed.training": {"train_iters": 7}})
    recipe = load(tmp_path, tree)
    assert (recipe.stages.seed.training.lr, recipe.stages.seed.training.train_iters) == (0.5, 7)
    assert recipe.stage("expert:code").training.train_iters == 10
    assert recipe.data.domains[0].sources[0].path == str(tmp_path / "text")


def test_dense_takes_as_many_tokens_as_experts_and_moe_stage(tmp_path: Path) -> None:
    tree = changed(
        {
            "stages.dense.training": {"train_iters": None, "global_batch_size": 24},
            "stages.experts.math.training": {"train_iters": 11},
        }
    )
    recipe = load(tmp_path, tree)
    spent = 10 + 10 + 11 + 10  # steps of 8 samples
    assert recipe.stages.dense.training.train_iters == -(-spent * 8 // 24) == 14
    assert stage_tokens(recipe, "dense") == 14 * 24 * 256 >= spent * 8 * 256
    assert load_recipe(QUICKSTART).stages.dense.training.train_iters == matched_train_iters(
        load_recipe(QUICKSTART), "dense"
    )


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    resolved = recipe_to_dict(load_recipe(QUICKSTART))
    assert recipe_to_dict(parse_recipe(resolved)) == resolved


numbers = st.one_of(st.integers(-2, 16), st.sampled_from([32, 48, 64, 128, 1000]))
layout_keys = st.sampled_from(
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ]
)
model_keys = st.sampled_from(
    ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"]
)


@settings(max_examples=300)
@given(
    st.dictionaries(model_keys, numbers, max_size=3),
    st.dictionaries(layout_keys, numbers, max_size=3),
    st.sampled_from(["seed", "finetune", "expert:code", "evaluate"]),
    st.booleans(),
)
def test_numbers_are_refused_politely_or_divide(
    model: dict[str, int], layout: dict[str, int], stage: str, sequence_parallel: bool
) -> None:
    """Whatever the numbers: a UserError, or a layout whose shards are whole."""
    recipe = copy.deepcopy(BASE)
    for key, value in model.items():
        setattr(recipe.model, key, value)
    target = recipe.evaluate.layout if stage == "evaluate" else recipe.stage(stage).layout
    target.sequence_parallel = sequence_parallel
    for key, value in layout.items():
        setattr(target, key, value)
    try:
        check_recipe(recipe, "here")
    except UserError:
        return
    tp, ep = target.tensor_model_parallel_size, target.expert_model_parallel_size
    groups = recipe.model.num_query_groups or recipe.model.num_attention_heads
    assert (
        recipe.model.num_attention_heads % tp
        == recipe.model.num_layers % target.pipeline_model_parallel_size
        == 0
    )
    assert recipe.model.num_attention_heads % groups == 0
    assert min(groups % tp, tp % groups) == 0
    experts = (target.expert_tensor_parallel_size or tp) * ep
    assert (tp * target.data_parallel_size) % experts == 0 or stage not in ("finetune", "evaluate")
    assert len(recipe.expert_names) % ep == 0


BASE = parse_recipe(GOOD)


def test_parameter_counts_by_hand() -> None:
    model = Model(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,
    )
    attention = 8 * 24 + 2 * 8 * 12 + 24 * 8
    feed_forward = 3 * 8 * 12
    shared = 2 * 100 * 8 + 8 + 2 * (attention + 2 * 8)
    counts = parameter_counts(model, vocab_size=100, num_experts=4, topk=2)
    assert counts.dense == shared + 2 * feed_forward
    assert counts.moe_total == shared + 2 * (4 * feed_forward + 8 * 4)
    assert counts.moe_active == shared + 2 * (2 * feed_forward + 8 * 4)
    model.untie_embeddings_and_output_weights = False
    assert parameter_counts(model, 100, 4, 2).dense == counts.dense - 100 * 8


def test_parameter_counts_of_the_paper() -> None:
    """Llama-2 7B; four experts, top-2: 11.1B active, 19.7B in all (paper, section 4.1)."""
    llama = Model(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)
    counts = parameter_counts(llama, vocab_size=32000, num_experts=4, topk=2)
    assert counts.dense == 6_738_415_616
    assert round(counts.moe_active / 1e9, 1) == 11.1
    assert round(counts.moe_total / 1e9, 1) == 19.7


def test_the_dense_baseline_does_not_inherit_the_number_of_steps() -> None:
    recipe = parse_recipe({"training": {"train_iters": 20, "lr": 0.5}})
    assert recipe.stages.seed.training.train_iters == 20
    assert recipe.stages.dense.training.train_iters is None
    assert recipe.stages.dense.training.lr == 0.5


def test_a_mixture_of_fewer_experts_is_counted_as_such(tmp_path: Path) -> None:
    """As the one that a run grows from: with a soft router all its experts are active."""
    recipe = load(tmp_path, GOOD, "moe.moe_router_type=soft")
    whole, two = recipe_parameter_counts(recipe), recipe_parameter_counts(recipe, 2)
    assert two == parameter_counts(recipe.model, vocab_size(recipe), 2, 2)
    assert two.moe_active == two.moe_total < whole.moe_active == whole.moe_total
