"""The vocabulary is padded to what Megatron-LM's own function computes from the flags that are printed."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mixing"))

from llamas import read_ours, run_btx, write_llama

from btx_megatron.checkpoints.vocabulary import EMBEDDING, padded_rows
from btx_megatron.runtime import cpu_backend


def by_megatron(tokens: int, number: int, tensor_parallel: int) -> int:
    cpu_backend.install()
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    args = Namespace(make_vocab_size_divisible_by=number, tensor_model_parallel_size=tensor_parallel, rank=0)
    return vocab_size_with_padding(tokens, args, logging_enabled=False)


def test_the_arithmetic_is_megatrons() -> None:
    for tokens in (1, 127, 128, 129, 32000, 50257, 128_256):
        for number in (1, 7, 64, 128, 1000):
            for tensor_parallel in (1, 2, 8):
                expected = by_megatron(tokens, number, tensor_parallel)
                assert padded_rows(tokens, number, tensor_parallel) == expected


@pytest.mark.parametrize(
    ("tokens", "options", "tensor_parallel"),
    [
        (37, ["--to", "megatron"], 1),
        (37, ["--to", "megatron", "--make-vocab-size-divisible-by", 128], 1),
        (38, ["--to", "megatron-legacy", "--target-tensor-model-parallel-size", 2], 2),
        (37, ["--to", "megatron-legacy", "--target-tensor-model-parallel-size", 2,
              "--make-vocab-size-divisible-by", 12], 2),
        (48, ["--to", "megatron-legacy"], 1),
    ],
)  # fmt: skip
def test_the_printed_flag_gives_the_rows_that_were_written(
    tmp_path: Path, tokens: int, options: list[object], tensor_parallel: int
) -> None:
    source = write_llama(tmp_path / "hf", vocabulary=tokens)
    code, out, err = run_btx("convert", source, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "--make-vocab-size-divisible-by" in line]
    rows = read_ours(tmp_path / "out")[EMBEDDING].shape[0]
    assert by_megatron(tokens, int(line.split()[1]), tensor_parallel) == rows
