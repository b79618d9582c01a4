"""``btx mix --dry-run``: what a mix would write, read, hold in memory and take, before it does any of it.

Bytes follow from the plan. Memory is what the process grows by at most (see ``peak_bytes``): a thread makes
one part at a time, in blocks of rows, or whole where the rule must see all of it (TIES trims by the largest
entries of a part); so the peak is what the largest jobs take that can run at once. Python with torch, about
0.3 GB, was there before. Time is only estimated: the bytes at the rate at which a little of the first source
was read just now, and a slow rule's arithmetic from a small case.
"""

from __future__ import annotations

import math
import time

import torch

from btx_megatron.checkpoints.formats import Format, Parallel, check_target, fitted
from btx_megatron.checkpoints.names import DENSE
from btx_megatron.checkpoints.pieces import Source, dtype_name, indices_of, matrix_shape, part_info, read_rows
from btx_megatron.checkpoints.stream import BLOCK_BYTES, Effort, PlannedTensor, block_rows, peak_bytes
from btx_megatron.columns import columns
from btx_megatron.mixing.average import dare, ties
from btx_megatron.mixing.experts import expert_units
from btx_megatron.mixing.mix import Job
from btx_megatron.mixing.plan import MixOptions, num_experts
from btx_megatron.mixing.sources import Opened, source_bytes

READ_AT_MOST = 64 << 20
"""Bytes that are read to see how fast the source is."""

_FC1, _FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
_CASE = 1 << 22  # entries of the small case that a rule is timed on


def dry_run_text(job: Job, to: Format, parallel: Parallel, effort: Effort, approximate: bool = False) -> str:
    """A row for every tensor, then totals. Raises UserError where the mix would, but for bad values."""
    plan, config = fitted(job.plan, job.config, to, parallel)
    check_target(plan, config, to, parallel, approximate)
    sources = job.opened.sources
    rows = [["tensor", "rule", "inputs", "shape", "dtype", "bytes"]]
    rows += [_row(tensor, len(sources)) for tensor in plan]
    written, read = sum(map(_bytes, plan)), read_bytes(job)
    threads, block = effort.fit(plan)
    rate = read_rate(next(iter(sources.values())))
    arithmetic = rule_seconds(job, threads)
    totals = [
        ["written", f"{written:,} bytes"],
        ["read", f"{read:,} bytes"],
        ["memory", f"{peak_bytes(plan, threads, block):,} bytes at the peak, {threads} threads"],
        ["time", f"{_clock((read + written) / rate + arithmetic)}, an estimate: {_basis(rate, arithmetic)}"],
    ]
    return columns(rows, right=(5,)) + "\n\n" + columns(totals)


def _row(tensor: PlannedTensor, sources: int) -> list[str]:
    inputs = ", ".join(tensor.inputs) or "-"
    if len(tensor.inputs) > 4 and len(tensor.inputs) >= sources:
        inputs = f"all {sources}" + (", base" if len(tensor.inputs) > sources else "")
    shape = "x".join(map(str, tensor.info.shape))
    return [tensor.name, tensor.rule, inputs, shape, dtype_name(tensor.info.dtype), f"{_bytes(tensor):,}"]


def _bytes(tensor: PlannedTensor) -> int:
    return math.prod(tensor.info.shape) * tensor.info.dtype.itemsize


def _basis(rate: float, arithmetic: float) -> str:
    text = f"reading and writing at the {rate / 1e9:.2f} GB/s of a short read just now"
    return text + (f", and {_clock(arithmetic)} of arithmetic" if arithmetic else "")


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def read_bytes(job: Job) -> int:
    """Bytes that are read: by the rules, and once more where a rule does not read a part from start to end.

    Every source is fingerprinted whole; what a rule reads in one go is hashed on the way.
    """
    if job.stage == "mix":
        assert job.options is not None
        return job.read_before + _read_by_mix(job.opened, job.options)
    return job.read_before + sum(map(source_bytes, job.opened.all.values()))


def _read_by_mix(opened: Opened, options: MixOptions) -> int:
    """A split expert's columns lie in all rows, so these are read for each of its chunks."""
    first = next(iter(opened.sources.values()))
    count, sources = num_experts(len(opened.sources), options), len(opened.sources)
    read = 0
    for name, info in first.tensors.items():
        size = math.prod(info.shape) * info.dtype.itemsize
        if DENSE[name][0] != "feed_forward":
            infos = [source.tensors[name] for source in opened.all.values()]  # rows may differ
            read += sum(math.prod(of.shape) * of.dtype.itemsize for of in infos)  # by rule or fingerprint
            continue
        read += size * len(opened.all)
        width = info.shape[2] if name == _FC2 else info.shape[1] // 2
        units = [
            expert_units(options.experts, expert, sources, width, options.chunks, options.copies)
            for expert in range(count)
        ]
        if name == _FC2:
            read += size * (sum(len({unit.source for unit in of}) for of in units) - sources)
        else:
            rows = sum(unit.stop - unit.start for of in units for unit in of)
            in_one_go = options.experts in ("stack", "copies")
            read += size * rows // width - (size * sources if in_one_go else 0)
    return read


def read_rate(source: Source) -> float:
    """Bytes a second at which the source gives up to ``READ_AT_MOST`` bytes, in blocks as a mix reads."""
    started, read = time.perf_counter(), 0
    largest = sorted(source.tensors.items(), key=lambda item: -math.prod(item[1].shape))
    for name, info in largest:
        for index in indices_of(name, info):
            part, pieces = part_info(info, index), source.pieces(name, index)
            rows, cols = matrix_shape(part.shape)
            step = block_rows(cols * info.dtype.itemsize, BLOCK_BYTES)
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                if read + (stop - start) * cols * info.dtype.itemsize > READ_AT_MOST and read:
                    return read / (time.perf_counter() - started)
                read_rows(source.files, pieces, part, start, stop)
                read += (stop - start) * cols * info.dtype.itemsize
    return read / (time.perf_counter() - started)


def rule_seconds(job: Job, threads: int) -> float:
    """Seconds of TIES or DARE over the plan, from a small case; of other rules 0, for the disk is slower."""
    entries = sum(math.prod(tensor.info.shape) for tensor in job.plan if tensor.rule in ("ties", "dare"))
    if not entries:
        return 0.0
    options, sources = job.options, len(job.opened.sources)
    assert options is not None
    torch.set_num_threads(1)  # as in the engine, where threads work on parts
    base, *models = torch.randn(sources + 1, _CASE, generator=torch.Generator().manual_seed(1)).bfloat16()
    started = time.perf_counter()
    if options.average == "ties":
        ties(models, base, [1.0] * sources, options.density)
    else:
        dare(models, base, [1.0] * sources, options.density, torch.Generator())
    return (time.perf_counter() - started) * entries / _CASE / threads
