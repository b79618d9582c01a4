"""``btx mix`` and ``btx convert`` without a recipe: what the command line says, checked; what it prints."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from btx_megatron.checkpoints.formats import FORMATS, Format, Parallel, config_of, format_of, open_checkpoint
from btx_megatron.checkpoints.published import check_free
from btx_megatron.checkpoints.stream import Effort
from btx_megatron.errors import UserError
from btx_megatron.manifest import read_manifest
from btx_megatron.mixing.dry_run import dry_run_text
from btx_megatron.mixing.experts import Kind
from btx_megatron.mixing.flags import megatron_flags
from btx_megatron.mixing.grow import count_experts
from btx_megatron.mixing.mix import (
    Job,
    Output,
    check_apart,
    convert,
    drop,
    drop_job,
    grow,
    grow_job,
    mix,
    mix_job,
)
from btx_megatron.mixing.option_checks import check_target_options, option_name
from btx_megatron.mixing.plan import Average, MixOptions, RouterInit, TokenizerOf
from btx_megatron.mixing.router_text import RouterText

_EMBEDDING = "embedding.word_embeddings.weight"


def named_paths(option: str, values: list[str]) -> dict[str, Path]:
    """``NAME=PATH`` of every value. Raises UserError for one that is not, or a name given twice."""
    paths: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UserError(f"{option} {value}: write it as NAME=PATH")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{option} {value}: a name has letters, digits, '_', '-' and '.' only")
        if name in paths:
            raise UserError(f"{option} {value}: the name {name} is given twice; names must differ")
        paths[name] = Path(path)
    return paths


def named_numbers(option: str, values: list[str]) -> dict[str, float]:
    """``NAME=NUMBER`` of every value. Raises UserError for one that is not."""
    numbers: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name in numbers:
            raise UserError(f"{option} {value}: the name {name} is given twice")
        try:
            numbers[name] = float(number)
        except ValueError:
            raise UserError(f"{option} {value}: write it as NAME=NUMBER") from None
    return numbers


def router_text(texts: list[str], tokenizer: Path | None) -> RouterText | None:
    """``--router-text`` and ``--tokenizer-model``. Raises UserError for the latter alone."""
    if not texts and tokenizer is not None:
        raise UserError("--tokenizer-model is for --router-text; leave it out")
    return RouterText(named_paths("--router-text", texts), tokenizer) if texts else None


def mix_options(**values: Any) -> MixOptions:
    """The options, their words checked."""
    words = {"average": Average, "experts": Kind, "router_init": RouterInit, "tokenizer": TokenizerOf}
    for key, known in words.items():
        _check_word(f"--{key.replace('_', '-')}", values[key], get_args(known))
    if not 0 <= values["random_seed"] < 1 << 32:
        raise UserError(f"--random-seed {values['random_seed']}: must be from 0 to {(1 << 32) - 1}")
    return MixOptions(**values)


def effort(workers: int, max_memory: str | None) -> Effort:
    """``--workers`` and ``--max-memory``, which may end in K, M or G (1024s). Raises UserError for others."""
    if workers < 0:
        raise UserError(f"--workers {workers}: must be at least 0")
    if max_memory is None:
        return Effort(workers)
    match = re.fullmatch(r"(\d+)([KMG]?)B?", max_memory.upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-memory {max_memory}: write it as 500M or 2G")
    return Effort(workers, int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])


def parallel(options: Mapping[str, Any]) -> Parallel:
    """``--target-...-model-parallel-size`` and ``--make-vocab-size-divisible-by``, by parameter.

    Raises UserError for one that is no size.
    """
    names = [f"target_{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert")]
    sizes = [options[name] for name in (*names, "make_vocab_size_divisible_by")]
    for name, size in zip((*names, "make_vocab_size_divisible_by"), sizes, strict=True):
        if size is not None and size < 1:
            raise UserError(f"{option_name(name)} {size}: must be at least 1")
    return Parallel(*sizes)


def _check_word(option: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UserError(f"{option} {word}: not known; there are {', '.join(known)}")


def _format(to: str | None, first: Path, parallel: Parallel, approximate: bool) -> Format:
    """The target's: ``--to``, or that of the first source; and it knows the options."""
    if to is not None:
        _check_word("--to", to, FORMATS)
    kind: Format = to or format_of(first)  # type: ignore[assignment]
    check_target_options(kind, parallel, approximate)
    return kind


def run_mix(
    sources: dict[str, Path],
    base: Path | None,
    output: Path,
    to: str | None,
    parallel: Parallel,
    options: MixOptions,
    effort: Effort,
    dry_run: bool,
    text: RouterText | None = None,
    approximate: bool = False,
) -> None:
    """Mix, and print where the result is and how Megatron-LM loads it."""
    kind = _format(to, next(iter(sources.values())), parallel, approximate)
    if dry_run:
        job = mix_job(sources, options, base, text, look=True)
        _dry_run(job, output, kind, parallel, effort, approximate)
        return
    started = time.perf_counter()
    progress = _TerminalProgress() if sys.stderr.isatty() else None
    target = Output(output, kind, parallel, effort, manifest=True, approximate=approximate, progress=progress)
    table = mix(sources, target, options, base, text)
    print(f"{output}: {len(table)} tensors in {time.perf_counter() - started:.1f} s, {kind}")
    _print_notes(output)
    _print_flags(output, kind, parallel)


def run_grow(
    moe: Path,
    add: dict[str, Path],
    dropped: int | None,
    output: Path,
    to: str | None,
    parallel: Parallel,
    share: float | None,
    options: MixOptions,
    effort: Effort,
    dry_run: bool,
    approximate: bool = False,
) -> None:
    """Add an expert to a mixture, or drop one."""
    kind = _format(to, moe, parallel, approximate)
    name, path = next(iter(add.items()), ("", Path()))
    if dry_run:
        job = (
            drop_job(moe, dropped)
            if dropped is not None
            else grow_job(moe, name, path, share=share, options=options, look=True)
        )
        _dry_run(job, output, kind, parallel, effort, approximate)
        return
    target = Output(output, kind, parallel, effort, manifest=True, approximate=approximate)
    if dropped is not None:
        drop(moe, dropped, target)
    else:
        grow(moe, name, path, target, share=share, options=options)
    print(f"{output}: {count_experts(open_checkpoint(output))} experts, {kind}")
    _print_notes(output)
    _print_flags(output, kind, parallel)


def _dry_run(
    job: Job, output: Path, kind: Format, parallel: Parallel, effort: Effort, approximate: bool
) -> None:
    check_free(output)
    check_apart(output, job.opened)
    print(dry_run_text(job, kind, parallel, effort, approximate))


def run_convert(
    source: Path, output: Path, to: str, parallel: Parallel, effort: Effort, approximate: bool = False
) -> None:
    """Convert, and print where the result is and how Megatron-LM loads it."""
    kind = _format(to, source, parallel, approximate)
    started = time.perf_counter()
    progress = _TerminalProgress() if sys.stderr.isatty() else None
    target = Output(output, kind, parallel, effort, manifest=True, approximate=approximate, progress=progress)
    table = convert(source, target)
    print(f"{output}: {len(table)} tensors in {time.perf_counter() - started:.1f} s, {kind}")
    _print_notes(output)
    _print_flags(output, kind, parallel)


def _print_notes(output: Path) -> None:
    """What of the result is not exactly what its sources are; by its manifest, where that is kept, too."""
    manifest = read_manifest(output)
    settings = manifest.recipe if manifest is not None else {}
    for line in settings.get("approximate", []):
        print(f"approximate: {line}")
    if "tokenizer_note" in settings:
        print(f"tokenizer: {settings['tokenizer_note']}")


def _print_flags(output: Path, kind: Format, parallel: Parallel) -> None:
    if kind == "hf":
        return
    result = open_checkpoint(output)
    try:
        config = config_of(result)
    except UserError:
        return  # its sources did not say what model they are
    print("Megatron-LM loads it with:")
    for flag in megatron_flags(config, result.tensors[_EMBEDDING].shape[0], output, kind, parallel):
        print(f"  {flag} \\")
    for key, value in config.moe_router:
        if key != "moe_expert_capacity_factor":
            print(f"Megatron-LM does not know {key} {value}: it will route otherwise")


class _TerminalProgress:
    """One line that is drawn over."""

    def update(self, phase: str, done: int, total: int, text: str = "") -> None:
        end = "\n" if done == total else ""
        print(f"\r{phase} {done}/{total}", end=end, file=sys.stderr, flush=True)
