"""Prompts of OpenAI's text completions: texts or ids, gaps to fill, and what the model makes of the prompt itself."""

from collections.abc import Sequence
from typing import Any

from fastapi import Request

from ..core.chat import Finish, Step, Token
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.model_prompt import Prompt
from ..loaders.text.fill_in_middle import fill_in_middle
from .answer_stream import WholeAnswer
from .openai_logprobs import number, text_logprobs
from .problems import Problem
from .prompt_fit import FittedPrompt, Source, prompt_of
from .service import MOST_ANSWERS, Service
from .token_texts import TokenTexts


def sources_of(loaded: LoadedModel, body: Any, field: str = "prompt") -> tuple[list[Source], tuple[int, ...]]:
    """(the prompts of a request: texts, or lists of ids, which are used as given; ids that end their answers).

    Raises Problem, which names `field`: also for more prompts than are answered, before any of them is read.
    """
    prompt = body.prompt
    if body.suffix:
        if not isinstance(prompt, str):
            raise Problem("invalid", "A prompt with a suffix must be one text.", "suffix")
        ids, ends = fill_in_middle(loaded.codec, prompt, body.suffix)
        return [Prompt(prompt, tuple(ids))], ends
    if isinstance(prompt, str):
        return [prompt], ()
    if not prompt:
        raise Problem("invalid", "The prompt is empty. Send some text.", "prompt")
    if not isinstance(prompt[0], int) and len(prompt) > MOST_ANSWERS:
        raise Problem("invalid", f"One request may have up to {MOST_ANSWERS} prompts; found {len(prompt):,}.", field)
    if isinstance(prompt[0], str):
        return list(prompt), ()
    lists = [prompt] if isinstance(prompt[0], int) else prompt
    return [prompt_of(loaded, each) for each in lists], ()


def limit_of(limit: int | None, otherwise: int | None, *, least: int = 1) -> int | None:
    """The longest answer in tokens; None: as long as the context has room, which -1 means too. Raises Problem."""
    if limit is not None and 0 <= limit < least:
        raise Problem("invalid", "max_tokens must be greater than 0, or -1 for as many as fit.", "max_tokens")
    return otherwise if limit is None else None if limit == -1 else limit


def scored(body: Any) -> int | None:
    """How many likeliest tokens are wanted with each of the prompt's; None: its log-probabilities are not wanted."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((each for each in wanted if each is not None), default=None)


async def scores_of(
    service: Service, request: Request, protocol: str, prompts: Sequence[FittedPrompt], params: Any, top: int
) -> list[list[Token]]:
    """The tokens of each prompt with their log-probabilities. Raises Problem."""
    if "logprobs" not in prompts[0].loaded.can:
        raise Problem(
            "unsupported",
            f"The loader of {prompts[0].loaded.model.name} reports no log-probabilities. Leave them out.",
            "logprobs",
        )
    running = await service.answer(request, protocol, prompts, params, scored=top)
    return [each.tokens for each in await running.whole()]


def nothing_after(prompts: Sequence[FittedPrompt], n: int) -> list[WholeAnswer]:
    """The answers of no tokens at all: `max_tokens: 0`."""
    return [WholeAnswer(finish=Finish("length", prompt_tokens=len(each.prompt.ids))) for each in prompts for _ in range(n)]


def best_of(answers: list[WholeAnswer], n: int, made: int) -> list[WholeAnswer]:
    """Of `made` answers to each prompt the n with the highest log-probability of a token."""
    groups = [answers[at : at + made] for at in range(0, len(answers), made)]
    return [each for group in groups for each in sorted(group, key=mean_logprob, reverse=True)[:n]]


def mean_logprob(answer: WholeAnswer) -> float:
    found = [each.logprob for each in answer.tokens if each.logprob is not None]
    return sum(found) / len(found) if found else float("-inf")


def echo_logprobs(texts: TokenTexts, prompt: list[Token], answer: WholeAnswer) -> dict[str, Any]:
    """OpenAI's lists over the prompt and its answer. The end token is there, too, as lm-eval and others count on it."""
    return text_logprobs(texts, [*prompt, *answer.tokens, *_end(answer.finish.end)], own=True)


def _end(step: Step | None) -> list[Token]:
    return [Token(step.id, "", step.logprob, step.top)] if step is not None else []


def prompt_logprobs(texts: TokenTexts, prompt: list[Token]) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token of the prompt the likeliest and its own, by id; the first has none."""
    found: list[dict[str, Any] | None] = []
    for each in prompt:
        if each.logprob is None:
            found.append(None)
            continue
        ranked = {id: (logprob, at + 1) for at, (id, logprob) in enumerate(each.top)}
        ranked.setdefault(each.id, (each.logprob, None))  # type: ignore[arg-type]
        found.append(
            {
                str(id): {"logprob": number(logprob), "rank": rank, "decoded_token": texts.text(id)}
                for id, (logprob, rank) in ranked.items()
            }
        )
    return found
