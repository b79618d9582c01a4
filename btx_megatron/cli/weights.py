"""Commands that take checkpoints of any format; ``mix`` takes a recipe, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from btx_megatron.cli.app import Overrides, app, run_alone
from btx_megatron.errors import UserError
from btx_megatron.quick_import import quick_import

Approximate = Annotated[bool, typer.Option("--approximate", help="Towards hf: also what no Mixtral is.")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Bound on all buffers together, as 500M or 2G.")
]
TargetExpert = Annotated[int, typer.Option(metavar="E", help="Each EP rank's experts in files of their own.")]
VocabularyMultiple = Annotated[
    int | None, typer.Option(metavar="N", help="Pad the vocabulary's rows to a multiple of N x T.")
]


@app.command()
def mix(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, a YAML file.")
    ] = None,
    overrides: Overrides = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Without a recipe: an expert; once for each."),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="PATH", help="Where the mixture goes.")] = None,
    moe: Annotated[Path | None, typer.Option(metavar="PATH", help="A mixture to grow or shrink.")] = None,
    add_expert: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="With --moe: the expert that joins it.")
    ] = None,
    drop_expert: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="With --moe: the expert that leaves it.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--lambda", metavar="L", help="With --moe: the new one's share of the rest; 1/(N+1)."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="What base, ties and dare measure from; nobody's expert."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="hf, megatron or megatron-legacy; else the experts' own.")
    ] = None,
    average: Annotated[
        str, typer.Option(help="Of all but experts: mean, weighted, base, ties, dare.")
    ] = "mean",
    weight: Annotated[
        list[str] | None, typer.Option(metavar="NAME=W", help="Weight in the average; 1 where not given.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of the entries that ties and dare keep.")] = 0.5,
    experts: Annotated[str, typer.Option(help="stack, split, blend, copies or virtual.")] = "stack",
    chunks: Annotated[int, typer.Option(help="Chunks of each feed-forward (split, virtual).")] = 1,
    copies: Annotated[int, typer.Option(help="Copies of each expert (copies, virtual).")] = 1,
    drop_ratio: Annotated[float, typer.Option(help="Share of each expert's units to draw anew.")] = 0.0,
    router_init: Annotated[
        str, typer.Option(help="normal, zero; or from text (needs Megatron): centroid, ridge.")
    ] = "normal",
    router_text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="For centroid and ridge: a text of each expert."),
    ] = None,
    tokenizer_model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For --router-text; else the one beside the expert.")
    ] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of a normal router.")] = 0.02,
    router_topk: Annotated[int, typer.Option(help="Experts a token takes.")] = 2,
    router_pre_softmax: Annotated[
        bool, typer.Option("--router-pre-softmax", help="Softmax before top-k.")
    ] = False,
    target_tensor_model_parallel_size: Annotated[int, typer.Option(metavar="T", help="Legacy shards.")] = 1,
    target_pipeline_model_parallel_size: Annotated[int, typer.Option(metavar="P", help="Legacy shards.")] = 1,
    target_expert_model_parallel_size: TargetExpert = 1,
    make_vocab_size_divisible_by: VocabularyMultiple = None,
    random_seed: Annotated[int, typer.Option(help="Of the router, dare and drop.")] = 1234,
    workers: Annotated[int, typer.Option(help="Threads; 0: one a core.")] = 0,
    max_memory: MaxMemory = None,
    tokenizer: Annotated[str, typer.Option(help="base: all have one; union: added tokens stay.")] = "base",
    approximate: Approximate = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
) -> None:
    """Merge the experts into a mixture of experts, and (the baseline) into their average.

    With a RECIPE: that stage of the pipeline. With --expert and --output: checkpoints of any format.
    """
    with quick_import():
        from btx_megatron.mixing import command, option_checks

    option_checks.check_mix_options(_given(context), context.params)
    if recipe is not None:
        run_alone(recipe, overrides, "mix")
        return
    if output is None or not (expert or moe):
        raise UserError("mix: give a RECIPE, or --expert NAME=PATH (once for each) and --output PATH")

    effort = command.effort(workers, max_memory)
    options = command.mix_options(
        average=average,
        weights=command.named_numbers("--weight", weight or []),
        density=density,
        experts=experts,
        chunks=chunks,
        copies=copies,
        drop_ratio=drop_ratio,
        router_init=router_init,
        router_std=router_std,
        router_topk=router_topk,
        router_pre_softmax=router_pre_softmax,
        random_seed=random_seed,
        tokenizer=tokenizer,
    )
    parallel = command.parallel(context.params)
    if moe is not None:
        added = command.named_paths("--add-expert", add_expert or [])
        command.run_grow(
            moe, added, drop_expert, output, to, parallel, share, options, effort, dry_run, approximate
        )
        return
    sources = command.named_paths("--expert", expert or [])
    text = command.router_text(router_text or [], tokenizer_model)
    command.run_mix(sources, base, output, to, parallel, options, effort, dry_run, text, approximate)


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any format.")],
    output: Annotated[Path, typer.Argument(metavar="DST", help="Where the new one goes.")],
    to: Annotated[str, typer.Option(help="hf, megatron or megatron-legacy.")],
    target_tensor_model_parallel_size: Annotated[int, typer.Option(metavar="T", help="Legacy shards.")] = 1,
    target_pipeline_model_parallel_size: Annotated[int, typer.Option(metavar="P", help="Legacy shards.")] = 1,
    target_expert_model_parallel_size: TargetExpert = 1,
    make_vocab_size_divisible_by: VocabularyMultiple = None,
    workers: Annotated[int, typer.Option(help="Threads; 0: one a core.")] = 0,
    max_memory: MaxMemory = None,
    approximate: Approximate = False,
) -> None:
    """Write a checkpoint, dense or MoE, in another format, bit for bit."""
    with quick_import():
        from btx_megatron.mixing import command

    parallel = command.parallel(context.params)
    command.run_convert(source, output, to, parallel, command.effort(workers, max_memory), approximate)


@app.command()
def inspect(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="Checkpoint folders of any format.")
    ],
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="What they branched from; else the first CKPT.")
    ] = None,
    sample: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the entries to read; else what takes seconds.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there.")] = None,
) -> None:
    """Say what a checkpoint is; of several, how they differ and how far they moved from their base."""
    with quick_import():
        from btx_megatron.mixing.inspect_output import run_inspect

    run_inspect(checkpoints, base, sample, json)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder of any format.")],
    loss: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also its loss on this text (needs Megatron).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For --loss: tokenizer.json or a SentencePiece model.")
    ] = None,
    seq_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="For --loss: tokens a window; 512, or the model's context if less."
        ),
    ] = None,
) -> None:
    """Re-read a checkpoint: shapes, finite values, distinct experts, hashes."""
    with quick_import():
        from btx_megatron.mixing.verify import verify as verify_checkpoint

    found = verify_checkpoint(checkpoint)
    if loss is not None:
        from btx_megatron.evaluation.step0 import checkpoint_loss

        found |= checkpoint_loss(checkpoint, loss, tokenizer, seq_length)
    for what, value in found.items():
        print(f"{what}: {value}")


@app.command()
def tasks(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint folder of any format.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT=FILE", help="gsm8k, humaneval, mbpp, multiple_choice or nq; repeatable."
        ),
    ] = None,
    fewshot: Annotated[
        list[str] | None, typer.Option(metavar="FORMAT=FILE", help="Examples to show, for that format.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(metavar="N", help="How many; the benchmark's.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Ask the first documents only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of a generated answer.")] = 256,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Programs of the model may run here (humaneval, mbpp).")
    ] = False,
    through: Annotated[str, typer.Option(help="megatron, or hf: transformers, of an export.")] = "megatron",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="tokenizer.json or a SentencePiece model.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens read at once; the checkpoint's.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there.")] = None,
) -> None:
    """Ask a checkpoint tasks from local files, with the lm-evaluation-harness."""
    from btx_megatron.evaluation.ask import ask_tasks, told_tasks

    told = told_tasks(task or [], fewshot or [], num_fewshot, limit, max_new_tokens)
    ask_tasks(
        checkpoint,
        told,
        execute_code=execute_code,
        through=through,
        tokenizer=tokenizer,
        seq_length=seq_length,
        out=json,
    )


def _given(context: typer.Context) -> set[str]:
    """Options and arguments that the command line names, others have their default; ``--lambda`` as that."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    named = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    return {"lambda" if name == "share" else name for name in named}
