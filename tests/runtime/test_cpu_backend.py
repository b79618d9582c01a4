"""The redirects change what Megatron asks of CUDA, and nothing else in the process."""

from __future__ import annotations

import os
import subprocess
import sys


def run(program: str) -> str:
    """Output of a program in a process of its own: the redirects last as long as their process."""
    start = "import torch\nfrom btx_megatron.runtime import cpu_backend\ncpu_backend.install()\n"
    command = [sys.executable, "-c", start + program]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_a_device_context_still_holds() -> None:
    """transformers builds models under one: without it they would keep their initial weights."""
    program = """
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.full((2,), 1.0), torch.arange(2),
            torch.rand(2), torch.randn(2), torch.tensor([1.0])]
print({tensor.device.type for tensor in made})
"""
    assert run(program) == "{'meta'}"


def test_a_request_for_cuda_is_met_on_the_cpu() -> None:
    program = """
made = [torch.empty(2, device="cuda"), torch.zeros(2, device="cuda:0"), torch.tensor([1.0], device="cuda"),
        torch.arange(3, device=torch.cuda.current_device()), torch.ones(1).cuda()]
print({tensor.device.type for tensor in made})
"""
    assert run(program) == "{'cpu'}"


def test_ranks_start_without_the_compiler() -> None:
    """To load it would take a quarter of the start, and it would compile nothing."""
    program = """
import sys
import btx_megatron.training.trainer
from megatron.core import jit
from megatron.core.transformer.moe import router
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__, jit.jit_fuser.__name__)
"""
    assert run(program) == "False torch noop_decorator"


def test_groups_share_one_thread_that_polls() -> None:
    """They would have one each; what they compute is the same."""
    program = """
import os
from btx_megatron.runtime import ranks
with ranks.joined_ranks():
    groups = [torch.distributed.new_group([0]) for _ in range(8)]
    before = len(os.listdir("/proc/self/task"))
    more = [torch.distributed.new_group([0]) for _ in range(8)]
    ones = torch.ones(3)
    for group in groups + more:
        torch.distributed.all_reduce(ones, group=group)
    print(len(os.listdir("/proc/self/task")) - before, ones.tolist())  # two threads a group wait for work
"""
    assert run(program) == "16 [1.0, 1.0, 1.0]"
