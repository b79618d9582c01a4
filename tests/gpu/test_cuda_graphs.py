"""CUDA graphs, in a file of their own: what they leave behind in a process is not for other tests."""

from __future__ import annotations

import pytest
import torch
from gpu_run import TE, Run


def test_cuda_graphs_change_nothing() -> None:
    plain = Run(TE).steps(8)
    try:
        assert Run(TE, training={"cuda_graph_impl": "local"}).steps(8) == pytest.approx(plain, rel=0.01)
    finally:
        from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

        delete_cuda_graphs()
        torch.cuda.set_stream(torch.cuda.default_stream())
