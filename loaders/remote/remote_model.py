"""A model on other machines. It takes and returns text, so it has no tokenizer and no template of its own."""

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from ...core.chat import Finish, FinishReason, Message, Step, Token
from ...core.errors import AnswerFailed, BadParameter, PromptTooLong
from ...core.grammar import Grammar
from ...core.models import LocalModel
from ...core.params import GenerationParams, changed_in, obeyed_by
from ...core.tools import ToolUse
from ..contract.base import LoadedModel
from ..contract.model_prompt import Prompt
from ..contract.worker import Stream
from ..text.chat_template import ChatTemplate
from ..text.stop_strings import StopStrings
from ..text.tool_formats import GENERAL
from ..text.tool_prompts import ToolPrompt
from .remote_pool import Endpoint, Pool, in_words
from .remote_thread import EventLoop
from .remote_tools import RemoteCalls, fields_of, messages_of

_MOST_STOPS = 4  # that OpenAI and TGI take; the others are found here
_PARALLEL = 64  # answers under way at once; the engines do their own queueing


class RemoteModel(LoadedModel):
    can = obeyed_by("remote")
    is_remote = True

    def __init__(
        self,
        model: LocalModel,
        name: str,
        pool: Pool,
        loop: EventLoop,
        context_tokens: int,
        context_reason: str,
        notes: tuple[str, ...],
        sees_pictures: bool = False,
    ) -> None:
        super().__init__(
            model,
            None,
            ChatTemplate("", "the engine's own", pool.endpoints[0].url),
            context_tokens=context_tokens,
            context_reason=context_reason,
            notes=notes,
            device="other machines",
            parallel=_PARALLEL,
        )
        self.name, self._pool, self._loop, self.sees_pictures = name, pool, loop, sees_pictures
        loop.spawn(pool.watch())

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish]:
        raise BadParameter("A model on another machine takes text, not token ids. Send the text.")

    def prompt(
        self,
        source: str | Sequence[Message],
        tools: ToolUse | None = None,
        *,
        template: ChatTemplate | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        if isinstance(source, str):
            return Prompt(source)
        calls = ToolPrompt(tools, GENERAL, True) if tools is not None else None
        return Prompt("", messages=tuple(source), calls=calls, options=options)

    def answer(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        if prompt.messages is None:
            return self._answer("text", {"prompt": prompt.text}, params, cancel, False)
        offered = fields_of(prompt.calls.use if prompt.calls is not None else None)
        body = {"messages": messages_of(prompt.messages), **offered}
        if prompt.options:
            body["extra_body"] = {"chat_template_kwargs": dict(prompt.options)}  # as vLLM, SGLang and llama.cpp call them
        return self._answer("chat", body, params, cancel, not prompt.begins_answer)

    def close(self) -> None:
        super().close()
        self._loop.close(self._pool.close)

    def check(self, params: GenerationParams) -> None:
        if params.grammar is not None and params.grammar.kind not in ("json", "json_schema"):
            raise BadParameter(
                "A remote engine is asked in OpenAI's protocol, which has JSON and schemas, and no other grammar. "
                "Use one of these."
            )

    @property
    def waiting(self) -> int:
        return self._loop.waiting

    def _answer(
        self, kind: str, body: dict[str, Any], params: GenerationParams, cancel: threading.Event, resume: bool
    ) -> Stream[Token | Finish]:
        self.check(params)
        count = _Count()

        def answer() -> AsyncIterator[Token | Finish]:
            return self._events(kind, body, params, resume, count)

        return self._loop.stream(answer, cancel, lambda: count.finish("cancelled"))

    async def _events(
        self, kind: str, body: dict[str, Any], params: GenerationParams, resume: bool, count: "_Count"
    ) -> AsyncIterator[Token | Finish]:
        """The answer of the least busy engine; of the next one if the first cannot even begin."""
        tried: list[Endpoint] = []
        while True:
            endpoint = await self._pool.least_busy(tried)
            tried.append(endpoint)
            endpoint.answering += 1
            try:
                async for event in self._of(endpoint, kind, body, params, resume, count):
                    yield event
                return
            except AnswerFailed:
                raise
            except Exception as error:
                if _is_ours(error):
                    raise _asked_wrongly(error, endpoint) from error
                endpoint.fail(error)
                if count.tokens or count.began:
                    others = [each.url for each in self._pool.endpoints if each.well]
                    then = f"The next answer goes to {others[0]}." if others else "No other engine answers; start it again."
                    raise AnswerFailed(
                        f"The engine at {endpoint.url} stopped in the middle of the answer ({in_words(error)}). {then}"
                    ) from None
            finally:
                endpoint.answering -= 1

    async def _of(
        self, endpoint: Endpoint, kind: str, body: dict[str, Any], params: GenerationParams, resume: bool, count: "_Count"
    ) -> AsyncIterator[Token | Finish]:
        """One engine's answer. Raises what openai raises."""
        stop = StopStrings(params.stop)
        reason: FinishReason = "stop"
        ended = False
        calls = RemoteCalls()
        count.asked()
        async with await self._ask(endpoint, kind, body, params, resume) as stream:
            async for chunk in stream:
                count.usage(getattr(chunk, "usage", None))
                if not chunk.choices or stop.found:
                    continue
                choice = chunk.choices[0]
                for event in calls.tokens((kind == "chat" and choice.delta.tool_calls) or ()):
                    count.token()
                    yield event
                text = choice.text if kind == "text" else choice.delta.content
                if text:
                    count.token()
                    if (certain := stop.feed(text)) or not stop.found:
                        yield Token(-1, certain)
                if choice.finish_reason:
                    ended = True
                    reason = choice.finish_reason if choice.finish_reason in ("length", "tool_calls") else "stop"
                if stop.found:
                    break
        if not (ended or stop.found):
            raise ConnectionError("the stream ended without a reason")
        if left := stop.end():
            yield Token(-1, left)
        yield count.finish("stop" if stop.found else reason)

    async def _ask(self, endpoint: Endpoint, kind: str, body: dict[str, Any], params: GenerationParams, resume: bool) -> Any:
        """The open stream; a strict engine is asked again with OpenAI's own parameters only."""
        from openai import BadRequestError, UnprocessableEntityError

        create = endpoint.client.completions.create if kind == "text" else endpoint.client.chat.completions.create
        for strict in (False, True) if not endpoint.strict else (True,):
            try:
                return await create(model=self.name, stream=True, **_merged(body, arguments(params, resume, strict), strict))
            except (BadRequestError, UnprocessableEntityError) as error:
                if strict or _is_too_long(error):
                    raise
                endpoint.strict = True
        raise AssertionError("unreachable")


def _merged(body: dict[str, Any], given: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Both, with what each adds to OpenAI's fields; unless `strict`, where only the answer's form is added."""
    extra = {**({} if strict else body.get("extra_body", {})), **given.get("extra_body", {})}
    return {**body, **given, "extra_body": extra}


def arguments(params: GenerationParams, resume: bool, strict: bool) -> dict[str, Any]:
    """What OpenAI's protocol calls the parameters; unless `strict`, with what vLLM, SGLang, TGI and llama.cpp add to it."""
    given: dict[str, Any] = {"max_tokens": params.max_new_tokens, "temperature": params.temperature, "top_p": params.top_p}
    if params.stop:
        given["stop"] = list(params.stop[:_MOST_STOPS])
    if params.seed is not None:
        given["seed"] = params.seed
    given |= changed_in("remote", params)
    if params.logit_bias:
        given["logit_bias"] = {str(id): bias for id, bias in params.logit_bias}
    if params.grammar is not None:  # never left out; in the body, since completions have it too
        given["extra_body"] = {"response_format": response_format(params.grammar)}
    if strict:
        return given
    given["stream_options"] = {"include_usage": True}
    more: dict[str, Any] = {"repetition_penalty": params.repetition_penalty, "repeat_penalty": params.repetition_penalty}
    more |= {"min_p": params.min_p, **changed_in("remote_extra", params)}
    if resume:
        more |= {"continue_final_message": True, "add_generation_prompt": False, "continue_": True}
    return given | {"extra_body": given.get("extra_body", {}) | more}


def response_format(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(grammar.text), "strict": True}}


class _Count:
    """Times and tokens of one answer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.began = False
        self._asked = self._last = time.perf_counter()
        self._wanted = self._asked
        self._first: float | None = None
        self._usage: Any = None

    def asked(self) -> None:
        self._asked = time.perf_counter()

    def token(self) -> None:
        self.tokens += 1
        self.began = True
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def usage(self, usage: Any) -> None:
        self._usage = usage or self._usage

    def finish(self, reason: FinishReason) -> Finish:
        usage = self._usage
        details = getattr(usage, "prompt_tokens_details", None)
        first = self._first or time.perf_counter()
        return Finish(
            reason,
            prompt_tokens=getattr(usage, "prompt_tokens", 0) or 0,
            cached_tokens=getattr(details, "cached_tokens", 0) or 0,
            new_tokens=getattr(usage, "completion_tokens", 0) or self.tokens,
            prefill_s=first - self._asked,
            generate_s=self._last - first if self._first else 0.0,
            wait_s=self._asked - self._wanted,
        )


def _is_ours(error: Exception) -> bool:
    """Whether the engine works and the request was wrong."""
    status = getattr(error, "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)


def _is_too_long(error: Exception) -> bool:
    text = str(error).lower()
    return "context" in text and ("length" in text or "exceed" in text or "longer" in text or "maximum" in text)


def _asked_wrongly(error: Exception, endpoint: Endpoint) -> AnswerFailed | PromptTooLong:
    if _is_too_long(error):
        return PromptTooLong(
            f"The chat is too long for the engine at {endpoint.url} ({in_words(error)}). Clear the chat, or shorten it."
        )
    return AnswerFailed(
        f"The engine at {endpoint.url} refuses this request ({in_words(error)}). Change the request, or load another model."
    )
