"""A model behind the lm-evaluation-harness's interface, and what its tasks say of it.

The harness's own model class for Hugging Face folders is the measure: texts are cut and filled as there, so
that a checkpoint has the scores of the folder that it is exported to. Imports the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from btx_megatron.data.tokenizer import AnyTokenizer
from btx_megatron.errors import UserError
from btx_megatron.evaluation.tasks import FORMATS, make_task
from btx_megatron.recipe_tasks import TaskFile

if TYPE_CHECKING:
    from btx_megatron.evaluation.scoring import Score

_MAX_NEW_TOKENS = 256  # the harness's, where a task does not say


def task_scores(model: Any, tasks: Sequence[TaskFile], execute_code: bool = False) -> dict[str, Any]:
    """Task -> what the harness makes of a model's answers: ``metric``, ``value``, ``documents``, ``all``.

    ``model``: any model of the harness. ``all`` holds every metric, with its standard error. Raises UserError
    as make_task.
    """
    scores = {}
    still_here = getattr(model, "still_here", lambda: None)
    for told in tasks:
        task = make_task(told, execute_code, still_here)
        answered = evaluate(
            model, {"tasks": {told.name: task}, "groups": {}}, limit=told.limit, log_samples=False
        )
        found = answered["results"][told.name]
        metrics = {key: float(value) for key, value in found.items() if _is_metric(key, value)}
        metric = FORMATS[told.format].metric
        scores[told.name] = {
            "metric": metric,
            "value": metrics[metric],
            "documents": answered["n-samples"][told.name]["effective"],
            "num_fewshot": task.config.num_fewshot,
            "all": metrics,
        }
    return scores


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and isinstance(value, int | float)


@dataclass
class _Answer:
    """A text that grows."""

    prompt: list[int]
    most: int
    stops: list[str]
    tokens: list[int] = field(default_factory=list)


class ScoredModel(TemplateLM):  # type: ignore[misc]
    """The harness's model of a function that scores token sequences (scoring.py).

    ``seq_length``: tokens that the model reads at once; longer texts lose their beginning.
    """

    def __init__(self, score: Score, tokenizer: AnyTokenizer, seq_length: int) -> None:
        super().__init__()
        self._score, self._tokenizer, self._seq_length = score, tokenizer, seq_length

    def still_here(self) -> None:
        """Ask nothing, so that ranks which wait for questions go on waiting."""
        self._score([])

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Before a text without context."""
        return self._tokenizer.bos if self._tokenizer.bos >= 0 else self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; what the tokenizer's file puts before a text, too, unless ``add_special_tokens`` is
        false."""
        ids = self._tokenizer.encode([string])[0]
        before = [] if add_special_tokens is False else self._tokenizer.prefix
        return ids if ids[: len(before)] == before else [*before, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, ids in requests:
            if not ids:
                raise UserError(
                    f"'{continuation}' behind '{context[-40:]}' has no token; leave that document out"
                )
            if len(ids) > self._seq_length:
                raise UserError(
                    f"'{continuation[:40]}...' has {len(ids)} tokens, more than the {self._seq_length} that "
                    "the model reads at once; leave that document out, or give a longer sequence"
                )
        sequences = [[*context, *ids][-self._seq_length - 1 :] for _, context, ids in requests]
        answers = []
        for sequence, (_, _, ids), scores in zip(sequences, requests, self._score(sequences), strict=True):
            count = len(ids)
            greedy = scores.best[len(sequence) - 1 - count : -1].tolist() == sequence[-count:]
            answers.append((float(scores.log_p[-count:].sum(dtype="float64")), greedy))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows without overlap."""
        asked: list[tuple[tuple[str, str], list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._seq_length, context_len=1
            )
            its = [make_disjoint_window(window) for window in windows]
            asked += [(("", ""), context, ids) for context, ids in its]
            counts.append(len(its))
        answers = iter(self._loglikelihood_tokens(asked))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, all side by side; a pass over all that are not finished for each token."""
        answers = [self._begun(*request.args) for request in requests]
        growing = list(answers)
        while growing:
            scores = self._score([[*answer.prompt, *answer.tokens] for answer in growing])
            for answer, its in zip(growing, scores, strict=True):
                answer.tokens.append(int(its.best[-1]))
            growing = [answer for answer in growing if not self._is_finished(answer)]
        return [self._text(answer) for answer in answers]

    def _begun(self, context: str, generation: dict[str, Any]) -> _Answer:
        wanted = normalize_gen_kwargs(generation, _MAX_NEW_TOKENS)
        if wanted["do_sample"]:
            raise UserError("a task asks for sampled answers; here they are greedy")
        most = wanted["max_gen_toks"]
        if most >= self._seq_length:
            raise UserError(
                f"answers of {most} tokens leave no room for a question in the {self._seq_length} that the "
                "model reads at once; lower max_new_tokens"
            )
        stops = handle_stop_sequences(wanted["until"], eos=self._tokenizer.decode([self.eot_token_id]))
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        return _Answer(prompt[most - self._seq_length :], most, stops)

    def _is_finished(self, answer: _Answer) -> bool:
        if len(answer.tokens) == answer.most or answer.tokens[-1] == self.eot_token_id:
            return True
        text = self._decoded(answer)
        return any(stop in text for stop in answer.stops if stop)

    def _text(self, answer: _Answer) -> str:
        return str(postprocess_generated_text(self._decoded(answer), answer.stops, think_end_token=None))

    def _decoded(self, answer: _Answer) -> str:
        """Behind the prompt's last token: Llama's tokenizer drops a space where a text begins, and with it
        programs would lose an indentation."""
        before, whole = (
            self._tokenizer.decode([*answer.prompt[-1:], *tokens], skip_special_tokens=True)
            for tokens in ([], answer.tokens)
        )
        return whole[len(before) :]
