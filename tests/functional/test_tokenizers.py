"""Tokenizers that travel with a model, and become one where experts added tokens: asked of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from btx_megatron import recipe
from btx_megatron.checkpoints.formats import Format, config_of, open_checkpoint
from btx_megatron.cli import main
from btx_megatron.data.tokenizer import Tokenizer, train_tokenizer
from btx_megatron.errors import UserError
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.mix import Output, convert, grow, mix
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.mixing.verify import verify
from btx_megatron.recipe_file import recipe_to_dict

TEXT = "the cat sat on the mat and the dog ran to the tree " * 20
PADDED = 8  # rows of padding behind each expert's vocabulary
SHARED, OF_MATH, OF_CODE = "<|tool|>", ["<|math|>", "<|proof|>"], ["<|code|>"]
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def base_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with bos and eos; every text starts with bos."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def write_expert(folder: Path, seed: int, added: list[str], tied: bool, dtype: torch.dtype) -> Path:
    """A random Llama whose vocabulary was extended, with its tokenizer."""
    tokenizer = base_tokenizer()
    special, *plain = added
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=token == SHARED) for token in plain])
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer) + PADDED,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """math has two tokens and a shared one, code has one before the shared one."""
    added = {"math": [*OF_MATH, SHARED], "code": [*OF_CODE, SHARED]}
    return {
        name: write_expert(tmp_path / name, seed, tokens, request.param, torch.bfloat16)
        for seed, (name, tokens) in enumerate(added.items())
    }


def embeddings(folder: Path) -> tuple[Tensor, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data


def to_hf(folder: Path, output: Path) -> Path:
    convert(folder, Output(output, "hf"))
    return output


UNION = MixOptions(tokenizer="union")


@pytest.mark.parametrize("target", ["hf", "megatron", "megatron-legacy"])
def test_every_added_token_keeps_its_row(experts: dict[str, Path], tmp_path: Path, target: Format) -> None:
    mix(experts, Output(tmp_path / "moe", target, manifest=True), UNION)
    verify(tmp_path / "moe")
    folder = tmp_path / "moe" if target == "hf" else to_hf(tmp_path / "moe", tmp_path / "hf")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = {name: AutoTokenizer.from_pretrained(path) for name, path in experts.items()}
    common = len(base_tokenizer())
    numbers = {token: common + place for place, token in enumerate([*OF_MATH, SHARED, *OF_CODE])}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in numbers} == numbers
    assert len(tokenizer) == common + len(numbers)
    text = "the cat <|math|>sat<|code|> on<|tool|>"
    wanted = sources["math"].encode("the cat ")  # with bos
    wanted += [
        numbers["<|math|>"],
        *sources["math"].encode("sat", add_special_tokens=False),
        numbers["<|code|>"],
    ]
    wanted += [*sources["code"].encode(" on", add_special_tokens=False), numbers[SHARED]]
    assert tokenizer.encode(text) == wanted
    assert tokenizer.decode(wanted) == "<s>" + text
    assert tokenizer.decode(wanted, skip_special_tokens=True) == "the cat sat on"
    assert tokenizer.bos_token_id == sources["math"].bos_token_id

    model = MixtralForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config.vocab_size == len(tokenizer)
    for place in (0, 1):
        result = embeddings(folder)[place]
        of = {name: embeddings(path)[place] for name, path in experts.items()}
        mean = ((of["math"][:common].float() + of["code"][:common].float()) / 2).bfloat16()
        assert torch.equal(result[:common], mean)
        rows = {
            name: {t: source.convert_tokens_to_ids(t) for t in numbers} for name, source in sources.items()
        }
        for token in OF_MATH:
            assert torch.equal(result[numbers[token]], of["math"][rows["math"][token]])
        for token in OF_CODE:
            assert torch.equal(result[numbers[token]], of["code"][rows["code"][token]])
        both = (of["math"][rows["math"][SHARED]].float() + of["code"][rows["code"][SHARED]].float()) / 2
        assert torch.equal(result[numbers[SHARED]], both.bfloat16())
    logits = model(torch.tensor([wanted])).logits
    assert logits.shape[-1] == len(tokenizer)
    assert bool(logits.isfinite().all())


def test_common_rows_are_a_plain_mixs_to_the_bit(tmp_path: Path) -> None:
    """The same embeddings without added tokens, mixed as ever; and all other weights."""
    added = {"math": [*OF_MATH, SHARED], "code": [*OF_CODE, SHARED]}
    experts = {
        name: write_expert(tmp_path / name, seed, tokens, False, torch.bfloat16)
        for seed, (name, tokens) in enumerate(added.items())
    }
    plain = {}
    for name, path in experts.items():
        model = LlamaForCausalLM.from_pretrained(path, dtype="auto")
        model.resize_token_embeddings(len(base_tokenizer()))
        model.save_pretrained(tmp_path / f"plain {name}")
        base_tokenizer().save_pretrained(tmp_path / f"plain {name}")
        plain[name] = tmp_path / f"plain {name}"
    for average in ("mean", "weighted"):
        weights = {"math": 2.0} if average == "weighted" else {}
        mix(plain, Output(tmp_path / f"{average} plain"), MixOptions(average=average, weights=weights))  # type: ignore[arg-type]
        options = MixOptions(average=average, weights=weights, tokenizer="union")  # type: ignore[arg-type]
        mix(experts, Output(tmp_path / average), options)
        common = len(base_tokenizer())
        for mine, wanted in zip(
            embeddings(tmp_path / average), embeddings(tmp_path / f"{average} plain"), strict=True
        ):
            assert torch.equal(mine[:common], wanted)
        ours, theirs = hash_tensors(tmp_path / average), hash_tensors(tmp_path / f"{average} plain")
        changed = {name for name in ours if ours[name] != theirs[name]}
        assert changed == {"embedding.word_embeddings.weight", "output_layer.weight"}


def test_a_token_of_an_expert_that_weighs_nothing_keeps_its_row(
    experts: dict[str, Path], tmp_path: Path
) -> None:
    options = MixOptions(average="weighted", weights={"code": 0.0}, tokenizer="union")
    mix(experts, Output(tmp_path / "moe"), options)
    source = AutoTokenizer.from_pretrained(experts["code"])
    result, code = embeddings(tmp_path / "moe")[0], embeddings(experts["code"])[0]
    number = AutoTokenizer.from_pretrained(tmp_path / "moe").convert_tokens_to_ids("<|code|>")
    assert torch.equal(result[number], code[source.convert_tokens_to_ids("<|code|>")])


def test_the_manifest_says_whose_rows_are_whose_and_a_union_grows(
    experts: dict[str, Path], tmp_path: Path
) -> None:
    tied = config_of(open_checkpoint(experts["math"])).tied
    third = write_expert(tmp_path / "law", 7, ["<|code|>", "<|law|>"], tied, torch.bfloat16)
    mix(experts, Output(tmp_path / "moe", manifest=True), UNION)
    common = len(base_tokenizer())
    settings = json.loads((tmp_path / "moe" / "manifest.json").read_text())["recipe"]
    assert settings["options"]["tokenizer"] == "union"
    assert settings["vocabulary"] == [
        {"rows": [0, common], "from": {"math": 0, "code": 0}},
        {"rows": [common, common + 2], "from": {"math": common}},
        {"rows": [common + 2, common + 3], "from": {"math": common + 2, "code": common + 1}},
        {"rows": [common + 3, common + 4], "from": {"code": common}},
    ]
    grow(tmp_path / "moe", "law", third, Output(tmp_path / "grown"), share=None, options=UNION)
    mix({**experts, "law": third}, Output(tmp_path / "at once"), UNION)
    assert hash_tensors(tmp_path / "grown") == hash_tensors(tmp_path / "at once")
    assert AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids("<|law|>") == common + 4
    with pytest.raises(UserError, match=r"another tokenizer than the mixture's") as caught:
        grow(tmp_path / "moe", "law", third, Output(tmp_path / "no"), share=0.5, options=UNION)
    assert "--tokenizer" not in str(caught.value)


@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_files_name_every_token(experts: dict[str, Path], tmp_path: Path, cls: str) -> None:
    """``added_tokens_decoder``, lists of special tokens, ``added_tokens.json``: as older versions write."""
    for path in experts.values():
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        config = json.loads((path / "tokenizer_config.json").read_text()) | {"tokenizer_class": cls}
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: flag for key, flag in entry.items() if key != "id"}
            for entry in tokenizer["added_tokens"]
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        special = [entry["content"] for entry in tokenizer["added_tokens"] if entry["id"] >= 280 - 2]
        (path / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": "<s>", "additional_special_tokens": special[:1]})
        )
        (path / "added_tokens.json").write_text(
            json.dumps({entry["content"]: entry["id"] for entry in tokenizer["added_tokens"][2:]})
        )
    (experts["math"] / "generation_config.json").unlink()
    GenerationConfig(eos_token_id=1, max_new_tokens=400).save_pretrained(experts["code"])
    mix(experts, Output(tmp_path / "moe"), UNION)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    every = [*OF_MATH, SHARED, *OF_CODE]
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in every}
    assert json.loads((tmp_path / "moe" / "added_tokens.json").read_text()) == numbers
    config = json.loads((tmp_path / "moe" / "tokenizer_config.json").read_text())
    assert {entry["content"]: int(key) for key, entry in config["added_tokens_decoder"].items()}.items() >= (
        numbers.items()
    )
    special_map = json.loads((tmp_path / "moe" / "special_tokens_map.json").read_text())
    assert len(special_map["additional_special_tokens"]) == 2
    assert not (tmp_path / "moe" / "generation_config.json").exists()  # the first has none


def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: dict[str, Path], *more: object
) -> str:
    """The one line that a mix of the command line ends with."""
    arguments = [word for name, path in experts.items() for word in ("--expert", f"{name}={path}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["btx", "mix", *arguments, "--output", str(tmp_path / "no"), *map(str, more)]
        )
        assert main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert not (tmp_path / "no").exists()
    return err


def test_what_a_union_cannot_be_is_one_line(
    experts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(tmp_path, capsys, experts)
    assert "another tokenizer than expert math's" in line
    assert "they differ in added tokens alone: keep them all with --tokenizer union" in line
    for average in ("base", "ties", "dare"):
        more = ["--tokenizer", "union", "--average", average, "--base", experts["math"]]
        assert "the base lacks the rows of added tokens" in refused(tmp_path, capsys, experts, *more)
    text = ["--router-init", "centroid"]
    for name in experts:
        (tmp_path / f"{name}.txt").write_text(TEXT)
        text += ["--router-text", f"{name}={tmp_path / name}.txt"]
    line = refused(tmp_path, capsys, experts, "--tokenizer", "union", *text)
    assert "--tokenizer union with --router-init centroid" in line
    path = experts["code"] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["rstrip"] = True
    path.write_text(json.dumps(content))
    line = refused(tmp_path, capsys, experts, "--tokenizer", "union")
    assert f"added token '{SHARED}': rstrip is False in expert math, True in expert code" in line
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert "--tokenizer union" not in refused(tmp_path, capsys, experts)  # would not help
    assert "merges differs" in refused(tmp_path, capsys, experts, "--tokenizer", "union")
    path.unlink()
    line = refused(tmp_path, capsys, experts, "--tokenizer", "union")
    assert f"expert code ({experts['code']}) has no tokenizer.json" in line


def test_a_number_that_would_change_under_a_file_is_refused(
    experts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = experts["math"] / "tokenizer.json"
    content = json.loads(path.read_text())
    last = content["added_tokens"][-1]
    last["id"] += 3  # a hole before it
    old = last["id"]
    path.write_text(json.dumps(content))
    GenerationConfig(eos_token_id=[1, old], max_new_tokens=old).save_pretrained(experts["math"])
    line = refused(tmp_path, capsys, experts, "--tokenizer", "union")
    assert f"expert math's generation_config.json names the token '{SHARED}' by its number {old}" in line
    GenerationConfig(eos_token_id=1, max_new_tokens=old).save_pretrained(experts["math"])
    content["post_processor"]["special_tokens"] = {SHARED: {"id": SHARED, "ids": [old], "tokens": [SHARED]}}
    path.write_text(json.dumps(content))
    assert "expert math's post_processor names" in refused(tmp_path, capsys, experts, "--tokenizer", "union")


def test_a_dry_run_shows_the_rows_of_all(
    experts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for name, path in experts.items() for word in ("--expert", f"{name}={path}")]
    with pytest.MonkeyPatch.context() as patch:
        more = ["--tokenizer", "union", "--dry-run", "--output", str(tmp_path / "no")]
        patch.setattr("sys.argv", ["btx", "mix", *arguments, *more])
        assert main() == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding.")]
    assert row.split()[1] == "mean:union"
    assert f" {len(base_tokenizer()) + 4}x16 " in row
    assert not (tmp_path / "no").exists()


# files that travel


@pytest.mark.parametrize("through", ["megatron", "megatron-legacy"])
@pytest.mark.parametrize("eos", [1, [1, 280, 281]])
def test_files_and_special_ids_come_back_from_megatrons_formats(
    tmp_path: Path, through: Format, eos: int | list[int]
) -> None:
    source = write_expert(tmp_path / "source", 1, [*OF_MATH, SHARED], False, torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    GenerationConfig(eos_token_id=eos, temperature=0.5, do_sample=True).save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (source / "README.md").write_text("not ours")

    convert(source, Output(tmp_path / "there", through, manifest=True))
    AutoTokenizer.from_pretrained(tmp_path / "there" / "tokenizer")
    back = to_hf(tmp_path / "there", tmp_path / "back")
    mine = {path.name: path.read_bytes() for path in back.iterdir() if not path.name.endswith("safetensors")}
    theirs = {path.name: path.read_bytes() for path in source.iterdir() if path.name in mine}
    assert set(theirs) == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "generation_config.json",
    } == set(mine)  # fmt: skip
    assert {name: content for name, content in mine.items() if name != "config.json"} == {
        name: content for name, content in theirs.items() if name != "config.json"
    }
    again = json.loads(mine["config.json"])
    assert (again["bos_token_id"], again["eos_token_id"]) == (config["bos_token_id"], eos)
    assert hash_tensors(back) == hash_tensors(source)
    assert config_of(open_checkpoint(back)) == config_of(open_checkpoint(source))
    convert(tmp_path / "there", Output(tmp_path / "further", "megatron"))
    assert (tmp_path / "further" / "tokenizer" / "chat_template.jinja").exists()


def test_megatron_sources_of_other_tokenizers_are_found_out(tmp_path: Path) -> None:
    paths = {}
    for seed, name in enumerate(("math", "code")):
        folder = write_expert(tmp_path / name, seed, [f"<|{name}|>", SHARED], False, torch.float32)
        convert(folder, Output(tmp_path / f"{name} dist", "megatron"))
        paths[name] = tmp_path / f"{name} dist"
    with pytest.raises(
        UserError, match=r"code dist/tokenizer/tokenizer.json: another tokenizer than expert ma"
    ):
        mix(paths, Output(tmp_path / "moe"), MixOptions())
    mix(paths, Output(tmp_path / "moe"), UNION)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "moe" / "tokenizer")) == len(base_tokenizer()) + 3


SIGN = "\u2581"
ODD = [
    "", "    x = 1", "\tif x:\n\t\treturn  y \r\n", "a  b   c    ", f"a{SIGN}b {SIGN}{SIGN}", "🙂 é 漢\u2028",
    "</s> and <s><unk><0x0A>", "\n\n\n", "12345 6.5", TEXT,
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a tokenizer and a mixture, as its stages leave them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_tokenizer([TEXT, *ODD], recipe.Tokenizer(vocab_size=330), folder / "data/tokenizer/tokenizer.model")
    (folder / "recipe.yaml").write_text("")
    model = recipe.Model(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=64,
    )
    said = recipe_to_dict(recipe.Recipe(model=model))
    experts = {}
    for seed, name in enumerate(("prose", "code")):
        torch.manual_seed(seed)
        config = LlamaConfig(**SHAPE, vocab_size=384, rms_norm_eps=model.norm_epsilon)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder / f".{name}")
        experts[name] = folder / "experts" / name / "checkpoints"
        convert(folder / f".{name}", Output(experts[name], "megatron", recipe=said))
    mix(experts, Output(folder / "finetune" / "checkpoints", "megatron", recipe=said), MixOptions())
    return folder


@pytest.mark.parametrize("stage", ["finetune", "experts/code"])
@pytest.mark.parametrize("through", [None, "megatron", "megatron-legacy"])
def test_an_exported_stage_reads_text_as_its_run_did(
    run: Path, tmp_path: Path, stage: str, through: Format | None
) -> None:
    source = run / stage
    if through is not None:
        convert(source, Output(tmp_path / "there", through))
        source = tmp_path / "there"
    folder = to_hf(source, tmp_path / "hf")
    ours, theirs = Tokenizer(run / "data/tokenizer/tokenizer.model"), AutoTokenizer.from_pretrained(folder)
    for text in ODD:
        ids = ours.encode([text])[0]
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos) == (1, 2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    names = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert names <= {path.name for path in folder.iterdir()}


def test_a_stage_within_a_run_has_no_tokenizer_of_its_own(run: Path) -> None:
    assert not (run / "finetune" / "checkpoints" / "tokenizer").exists()
    assert (run / "finetune" / "checkpoints" / "release").exists()
