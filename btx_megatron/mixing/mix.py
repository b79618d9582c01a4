"""The mix itself: sources, a plan, one pass over the weights, a checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import (
    ONE_RANK,
    Format,
    Parallel,
    approximations,
    format_of,
    open_checkpoint,
    write_checkpoint,
)
from btx_megatron.checkpoints.names import DENSE_TO_MOE
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.checkpoints.published import partial_of
from btx_megatron.checkpoints.stream import (
    NO_BOUND,
    Effort,
    NotFinite,
    PlannedTensor,
    Reporter,
    Watched,
    copy_plan,
    is_finite,
)
from btx_megatron.checkpoints.tracker import TRACKER
from btx_megatron.errors import UserError
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.mixing.experts import expert_width
from btx_megatron.mixing.grow import (
    MIXTURE,
    check_fingerprints,
    count_experts,
    is_as_mixed,
    manifest_of_mix,
    plan_drop,
    plan_grow,
    remix_sources,
)
from btx_megatron.mixing.plan import (
    BASE,
    FROM_TEXT,
    MixOptions,
    num_experts,
    plan_average,
    plan_mix,
)
from btx_megatron.mixing.router_text import RouterText, RouterTokens, check_router_text
from btx_megatron.mixing.sources import Opened, open_sources, source_bytes


@dataclass(frozen=True)
class Output:
    """Where the result goes, and how it is written."""

    path: Path
    to: Format | None = None
    """None: the first source's own format."""
    parallel: Parallel = ONE_RANK
    effort: Effort = NO_BOUND
    recipe: Mapping[str, Any] | None = None
    """Travels in a torch_dist checkpoint."""
    manifest: bool = False
    """Write ``manifest.json`` into it (a stage of a run has one of its own)."""
    approximate: bool = False
    """Write as a Mixtral what a Mixtral is not exactly."""
    progress: Reporter | None = None


@dataclass(frozen=True)
class Job:
    """What is going to be written, and from what; nothing but headers and tokenizers is read yet."""

    stage: str
    opened: Opened
    plan: list[PlannedTensor]
    config: ModelConfig | None
    """Of the result."""
    options: MixOptions | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    """Goes beside the tensors of a torch_dist checkpoint."""
    router_text: RouterText | RouterTokens | None = None
    read_before: int = 0
    """Bytes that are read before, to see that mixture and sources are what they were."""


def mix(
    sources: Mapping[str, Path],
    output: Output,
    options: MixOptions,
    base: Path | None = None,
    router_text: RouterText | RouterTokens | None = None,
) -> dict[str, Any]:
    """Mix dense checkpoints into a MoE checkpoint; returns its tensors' table.

    Expert i is source i, and so is row i of the router. Raises UserError if the sources do not fit together
    or hold values that are not finite; then there is no output.
    """
    return _write(mix_job(sources, options, base, router_text), output)


def mix_job(
    sources: Mapping[str, Path],
    options: MixOptions,
    base: Path | None = None,
    router_text: RouterText | RouterTokens | None = None,
    look: bool = False,
) -> Job:
    """What ``mix`` writes. ``look``: it will not be, so a router from text need not be made."""
    opened = open_sources(sources, base, options.tokenizer)
    check_router_text(sources, options, router_text)
    rows = None if look else _router_rows(sources, base, options, router_text)
    plan = plan_mix(opened.sources, options, opened.base, rows, opened.tokenizer.union)
    config = opened.config
    if config is not None:
        width = expert_width(options.experts, len(sources), config.ffn_hidden_size, options.chunks)
        count = num_experts(len(sources), options)
        config = config.as_moe(count, width, options.router_topk, options.router_pre_softmax)
    common = {"mixed_from": list(sources), "moe_router_topk": options.router_topk}
    return Job("mix", opened, plan, config, options, common, router_text)


def _router_rows(
    sources: Mapping[str, Path],
    base: Path | None,
    options: MixOptions,
    text: RouterText | RouterTokens | None,
) -> Tensor | None:
    """[layers, sources, hidden] of a router that is made from text; None for the others."""
    if text is None:
        return None
    from btx_megatron.evaluation.alone import need_megatron
    from btx_megatron.evaluation.text import tokenizer_file

    need_megatron(f"--router-init {options.router_init}")
    opened = open_sources(sources, base, options.tokenizer)  # anew: the mix's are watched from its start
    plan_mix(
        opened.sources, options, opened.base, union=opened.tokenizer.union
    )  # all that is wrong with the options, before the work
    first = next(iter(opened.sources.values()))
    if opened.config is None:
        raise UserError(f"{first.folder}: says nothing of its model, which --router-init needs")
    from btx_megatron.mixing.router_features import rows_from_text, rows_from_tokens

    plan = plan_average(opened.sources, options, opened.base)
    if isinstance(text, RouterTokens):
        tokens = [text.tokens[name] for name in sources]
        return rows_from_tokens(options.router_init, plan, opened.config, tokens)
    tokenizer = tokenizer_file(first.folder, text.tokenizer, "--tokenizer-model")
    texts = {name: text.texts[name] for name in sources}
    return rows_from_text(options.router_init, plan, opened.config, texts, tokenizer)


def average(
    sources: Mapping[str, Path], output: Output, options: MixOptions, base: Path | None = None
) -> dict[str, Any]:
    """The whole model averaged over the sources, feed-forwards too: the baseline ``average``."""
    opened = open_sources(sources, base)
    plan = plan_average(opened.sources, options, opened.base)
    common = {"averaged_from": list(sources)}
    return _write(Job("average", opened, plan, opened.config, options, common), output)


def convert(source: Path, output: Output) -> dict[str, Any]:
    """Write a checkpoint, dense or MoE, in another format; every weight bit for bit."""
    opened = open_sources({"source": source}, None)
    plan = copy_plan(opened.sources["source"])
    return _write(Job("convert", opened, plan, opened.config), output)


def grow(
    moe: Path, name: str, new: Path, output: Output, *, share: float | None, options: MixOptions
) -> dict[str, Any]:
    """A mixture with one expert more. ``share`` is lambda, of a trained one (see mixing.grow).

    A mixture whose weights are those that ``btx mix`` wrote is mixed again, from its sources and the new one,
    as it was mixed; those must be what they were. Raises UserError as mix does.
    """
    return _write(grow_job(moe, name, new, share=share, options=options), output)


def grow_job(
    moe: Path, name: str, new: Path, *, share: float | None, options: MixOptions, look: bool = False
) -> Job:
    """What ``grow`` writes. ``look``: it will not be, so the sources' fingerprints need not be checked."""
    if share is not None:
        return _growing(moe, None, {name: new}, share, options)
    manifest = manifest_of_mix(moe)
    read_before = source_bytes(open_checkpoint(moe)) if manifest is not None else 0
    if manifest is not None and is_as_mixed(moe, manifest):
        sources = remix_sources(manifest)
        if name in sources:
            raise UserError(f"--add-expert {name}: the mixture has an expert of this name; choose another")
        base = sources.pop(BASE, None)
        of_mixture = {key: Watched(open_checkpoint(path)) for key, path in sources.items()}
        if base is not None:
            of_mixture[BASE] = Watched(open_checkpoint(base))
        if not look:
            check_fingerprints(of_mixture, manifest)
        read_before += sum(map(source_bytes, of_mixture.values()))
        again = MixOptions(**manifest.recipe["options"])
        if again.router_init in FROM_TEXT:
            raise UserError(
                f"--moe {moe}: its router was made from the experts' text, so it cannot be mixed again with "
                "one more; mix all with --expert and --router-text, or give --lambda to keep its weights"
            )
        job = mix_job({**sources, name: new}, again, base)
    else:
        job = _growing(moe, None, {name: new}, share, options)
    return replace(job, read_before=read_before)


def grow_trained(
    moe: Path,
    kept: Sequence[int],
    new: Mapping[str, Path],
    output: Output,
    *,
    share: float | None,
    options: MixOptions,
) -> dict[str, Any]:
    """A trained mixture's experts ``kept``, by number, then the ``new`` ones (see mixing.grow).

    Raises UserError as mix does.
    """
    return _write(_growing(moe, kept, new, share, options), output)


def _growing(
    moe: Path, kept: Sequence[int] | None, new: Mapping[str, Path], share: float | None, options: MixOptions
) -> Job:
    opened = open_sources({MIXTURE: moe, **new}, None)
    sources = dict(opened.sources)
    mixture = sources.pop(MIXTURE)
    kept = range(count_experts(mixture)) if kept is None else kept
    plan = plan_grow(mixture, kept, sources, share, options.router_std, options.random_seed)
    config = opened.config and replace(opened.config, num_experts=len(kept) + len(new))
    return Job("grow", opened, plan, config, options)


def drop(moe: Path, dropped: int, output: Output) -> dict[str, Any]:
    """A mixture without expert number ``dropped``; every other weight bit for bit."""
    return _write(drop_job(moe, dropped), output)


def drop_job(moe: Path, dropped: int) -> Job:
    """What ``drop`` writes."""
    opened = open_sources({MIXTURE: moe}, None)
    mixture = opened.sources[MIXTURE]
    plan, config = plan_drop(mixture, dropped), opened.config
    if config is not None:
        left = count_experts(mixture) - 1
        if config.moe_router_topk > left:
            raise UserError(
                f"--drop-expert {dropped}: a token takes {config.moe_router_topk} experts, and {left} "
                "would be left"
            )
        config = replace(config, num_experts=left)
    return Job("drop", opened, plan, config)


def _write(job: Job, output: Output) -> dict[str, Any]:
    opened, config, options, text = job.opened, job.config, job.options, job.router_text
    first = next(iter(opened.sources.values()))
    to = output.to or format_of(first.folder)
    if config is None and to != "megatron":
        raise UserError(
            f"{first.folder}: says nothing of its model (no args, no recipe), which --to {to} needs"
        )
    check_apart(output.path, opened)
    recipe = {"recipe": dict(output.recipe)} if output.recipe else {}
    started = time.perf_counter()

    def manifest(table: dict[str, Any]) -> str:
        settings: dict[str, Any] = {
            "format": to,
            "options": asdict(options) if options is not None else None,
            "sources": {name: str(source.folder.absolute()) for name, source in opened.all.items()},
        }
        if isinstance(text, RouterText):
            settings["router_text"] = {name: _file_facts(path) for name, path in text.texts.items()}
        settings |= opened.tokenizer.facts()
        if to == "hf" and config is not None and (differs := approximations(config)):
            settings["approximate"] = differs
        inputs = {name: source.fingerprint() for name, source in opened.all.items()}
        seconds = time.perf_counter() - started
        return manifest_text(make_manifest(job.stage, settings, inputs, {"tensors": table}, None, seconds))

    try:
        return write_checkpoint(
            output.path,
            to,
            job.plan,
            config,
            parallel=output.parallel,
            common={**recipe, **job.common},
            tokenizer_files=opened.tokenizer.files if not recipe else {},  # a run has it once, for all stages
            approximate=output.approximate,
            effort=output.effort,
            progress=output.progress,
            manifest=manifest if output.manifest else None,
        )
    except NotFinite as error:
        raise _blamed(error, opened) from None


def _file_facts(path: Path) -> dict[str, str]:
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def check_apart(output: Path, opened: Opened) -> None:
    """Raise UserError where the output would lie in a source, or take the place of one."""
    for target in (output.resolve(), partial_of(output).resolve()):
        for source in opened.all.values():
            tracked = (source.folder.parent / TRACKER).exists()
            folder = (source.folder.parent if tracked else source.folder).resolve()
            if target.is_relative_to(folder) or folder.is_relative_to(target):
                raise UserError(f"{output}: lies in a source, or around one ({folder}); name another output")


def _blamed(error: NotFinite, opened: Opened) -> UserError:
    """The error with the source that the values come from; searched for only now, for it takes a reading."""
    names = [error.name, *(dense for dense, moe in DENSE_TO_MOE.items() if moe == error.name)]
    for who, source in opened.all.items():
        for name in set(names) & set(source.tensors):
            for index in indices_of(name, source.tensors[name]):
                if index[:1] == error.index[:1] and not is_finite(read_part(source.source, name, index)):
                    return UserError(
                        f"{error.name} {list(error.index)}: NaN or infinite values come from "
                        f"{_called(who, opened)} ({source.folder}); leave it out, or train it again"
                    )
    return UserError(
        f"{error.name} {list(error.index)}: the sources' values are finite, what the rule makes of them is "
        "not: too large for the type; choose another rule, or store the sources in a wider type"
    )


def _called(who: str, opened: Opened) -> str:
    return f"expert {who}" if who in opened.sources and len(opened.sources) > 1 else who.strip("()")
