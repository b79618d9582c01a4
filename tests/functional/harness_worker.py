"""Both ways to ask a checkpoint the same requests of the harness; the answers go to stdout as JSON.

python harness_worker.py CHECKPOINT TOKENIZER SEQ_LENGTH
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from btx_megatron.evaluation.ask import by_megatron, by_transformers

CHOICES = [
    ("the quick brown", " fox"),
    ("the quick brown", " dog and runs away"),
    ("the lazy dog ", "runs"),
    ("", "fox runs"),
    ("fox " * 40, "dog dog"),  # longer than the model reads
    ("a", " dog " * 15),
    ("the quick", " brown"),
]
WORDS = ("dog", "and", "fox", "runs", "over", "a", "lazy")
# The second is read in three windows. They differ: of two alike that are cut otherwise into context and
# continuation the harness's class for transformers scores one wrong (0.4.13).
TEXTS = ["the quick brown fox", " ".join(random.Random(0).choices(WORDS, k=91))]
QUESTIONS = [
    ("the quick brown fox", {"until": ["."], "max_gen_toks": 12}),
    ("a lazy dog", {"until": ["."], "max_gen_toks": 12}),
    ("over and over from it", {"until": ["dog", "the", "it"], "max_gen_toks": 12}),
    ("fox " * 40, {"until": [], "max_gen_toks": 7}),
]


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def main() -> None:
    checkpoint, tokenizer, seq_length = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    told = {}
    for name, asked in (("megatron", by_megatron), ("hf", by_transformers)):
        with asked(checkpoint, tokenizer, seq_length) as model:
            told[name] = {
                "choices": model.loglikelihood(requests("loglikelihood", CHOICES)),
                "texts": model.loglikelihood_rolling(
                    requests("loglikelihood_rolling", [(text,) for text in TEXTS])
                ),
                "answers": model.generate_until(requests("generate_until", QUESTIONS)),
            }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
