"""What one GPU has: memory, and bfloat16 matrix products a second, of NVIDIA's data sheets.

A gigabyte is 1e9 bytes here. The cards hold a little more than their names say (an H100 of 80 GB about 85e9
bytes); what is left over pays for what no formula here counts: the CUDA context, the buffers of collectives,
fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

from btx_megatron.errors import UserError
from btx_megatron.estimate_flops import known_peak_tflops

_MEMORY_GB = {
    "A100": 80,
    "H100": 80,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H200": 141,
    "H200 NVL": 141,
    "GH200": 96,
    "B200": 180,
}


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 FLOP/s."""


def gpu_named(name: str) -> Gpu:
    """The GPU of a name as ``h100``, in any case. Raises UserError where it is not known."""
    for known, gigabytes in _MEMORY_GB.items():
        if known.lower() == name.lower():
            tflops = known_peak_tflops(known)
            assert tflops is not None
            return Gpu(known, gigabytes * 1e9, tflops * 1e12)
    raise UserError(f"--gpu-type '{name}': not known; one of {', '.join(_MEMORY_GB)}")
