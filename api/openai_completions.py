"""OpenAI's text completions: what follows a text, or what the model makes of the text itself."""

from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..core.chat import Token
from ..core.params import GenerationParams
from ..loaders.contract.base import LoadedModel
from . import openai_prompts as prompts_of_openai
from .openai_logprobs import text_logprobs
from .openai_models import Completion, CompletionRequest, TextChoice
from .openai_prompts import best_of, echo_logprobs, limit_of, nothing_after, prompt_logprobs, scores_of, sources_of
from .openai_streams import AnswerHead, finish_reason, said, text_stream, usage_of
from .problems import Problem
from .routes import Json
from .service import Service

_DEFAULT_LENGTH = 16  # OpenAI's


async def complete(
    service: Service, request: Request, protocol: str, loaded: LoadedModel, params: GenerationParams, body: CompletionRequest
) -> Response:
    """Raises Problem, QueueFull, BadParameter."""
    n, made = body.n or 1, body.best_of or body.n or 1
    _require(body, n, made)
    limit = limit_of(body.max_tokens, _DEFAULT_LENGTH, least=0)
    sources, ends = await service.run_for(request, sources_of, loaded, body)
    params = _with(params, ends, made > n)
    prompts = [await service.fit(request, each, limit, loaded=loaded) for each in sources]
    wanted = prompts_of_openai.scored(body)
    scores = await scores_of(service, request, protocol, prompts, params, wanted) if wanted is not None else []
    head = AnswerHead("cmpl-", "text_completion", loaded.model.name)
    texts = service.token_texts(loaded)

    def begin(at: int) -> dict[str, Any]:
        """What the answer `at` has of its prompt."""
        prompt = prompts[at // n].prompt
        found: dict[str, Any] = {"text": prompt.text if body.echo else ""}
        if body.return_token_ids:
            found["prompt_token_ids"] = list(prompt.ids)
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(texts, scores[at // n])
        return found

    if body.stream:
        running = await service.answer(request, protocol, prompts, params, n=n)
        await running.begun()
        before = await service.run(lambda: [begin(at) | _echoed(texts, body, scores, at // n) for at in range(running.count)])
        return text_stream(service, loaded, running, head, body, before, len(prompts))
    if limit == 0:
        answers = nothing_after(prompts, n)
    else:
        running = await service.answer(request, protocol, prompts, params, n=made)
        answers = best_of(await running.whole(), n, made) if made > n else await running.whole()

    def choice(at: int) -> TextChoice:
        each, before = answers[at], begin(at)
        logprobs = None
        if body.logprobs is not None:
            logprobs = echo_logprobs(texts, scores[at // n], each) if body.echo else text_logprobs(texts, each.tokens)
        if body.return_token_ids:
            before["token_ids"] = [token.id for token in each.tokens]
        before["text"] += said(each, body)
        return TextChoice(index=at, logprobs=logprobs, finish_reason=finish_reason(each.finish), **before)

    choices = await service.run(lambda: [choice(at) for at in range(len(answers))])
    usage = usage_of(len(prompts), answers)
    answer = Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage)
    return Json(answer.model_dump())


def _require(body: CompletionRequest, n: int, made: int) -> None:
    if made < n:
        raise Problem("invalid", f"best_of must be at least n, which is {n}; found {made}.", "best_of")
    if body.stream and made > n:
        raise Problem("invalid", "best_of is chosen when all answers are complete. Leave it out, or do not stream.", "best_of")
    if body.stream and body.max_tokens == 0:
        raise Problem("invalid", "An answer of no tokens is not streamed. Leave `stream` out.", "max_tokens")
    if body.echo and body.suffix:
        raise Problem("invalid", "echo and suffix exclude each other. Leave one out.", "echo")


def _with(params: GenerationParams, ends: tuple[int, ...], compared: bool) -> GenerationParams:
    if ends:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
    return replace(params, logprobs=0) if compared and params.logprobs is None else params


def _echoed(texts: Any, body: CompletionRequest, scores: list[list[Token]], at: int) -> dict[str, Any]:
    if not body.echo or body.logprobs is None:
        return {}
    return {"logprobs": text_logprobs(texts, scores[at], own=True)}
