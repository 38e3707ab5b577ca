"""OpenAI's answers as server-sent events: chunks of a chat message, chunks of a text."""

import json
import time
from typing import Any

from ..core.chat import Finish, Token
from ..loaders.contract.base import LoadedModel
from . import tool_requests
from .answer_stream import EventStream, Running, WholeAnswer
from .identifiers import new_id
from .openai_logprobs import chat_logprobs, text_logprobs
from .openai_models import FINGERPRINT, Usage
from .problems import Problem
from .routes import openai_error
from .service import Service


class AnswerHead:
    """What all chunks of an answer begin with."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = prefix + new_id()
        self.created = int(time.time())
        self.kind, self.model = kind, model

    def chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        body = {**head, "system_fingerprint": FINGERPRINT, "choices": choices, **extra}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class _Chunks:
    """The events of a stream as chunks, and the usage at its end."""

    def __init__(self, head: AnswerHead, body: Any, prompts: int, older: bool = False) -> None:
        self._head, self._prompts = head, prompts
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._extra: dict[str, Any] = {"usage": None} if self._with_usage else {}
        self._finishes: list[WholeAnswer] = []
        self._older = older

    def choice(self, at: int, content: dict[str, Any], logprobs: Any = None, finish: Finish | None = None) -> bytes:
        if finish is not None:
            self._finishes.append(WholeAnswer(finish=finish))
        reason = finish_reason(finish, self._older) if finish is not None else None
        return self._head.chunk([{"index": at, **content, "logprobs": logprobs, "finish_reason": reason}], self._extra)

    def closing(self) -> bytes:
        usage = {"usage": usage_of(self._prompts, self._finishes).model_dump()}
        return (self._head.chunk([], usage) if self._with_usage else b"") + b"data: [DONE]\n\n"


def chat_stream(service: Service, loaded: LoadedModel, running: Running, head: AnswerHead, body: Any) -> EventStream:
    head.kind = "chat.completion.chunk"
    older = is_older(body)
    chunks = _Chunks(head, body, 1, older)

    def encode(at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            kept = event.stop_string if body.include_stop_str_in_output else ""
            return chunks.choice(at, {"delta": {"content": kept} if kept else {}}, finish=event)
        if (part := event.call) is not None:
            piece = tool_requests.delta(part)
            return chunks.choice(at, {"delta": {"function_call": piece["function"]} if older else {"tool_calls": [piece]}})
        logprobs = chat_logprobs(service.token_texts(loaded), [event]) if body.logprobs and event.id >= 0 else None
        ids = {"token_ids": [event.id]} if body.return_token_ids and event.id >= 0 else {}
        thought = event.thought if body.include_reasoning is not False else ""
        said: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        if event.text or not said:
            said["content"] = event.text
        return chunks.choice(at, {"delta": said, **ids}, logprobs) if event.text or thought or logprobs or ids else b""

    opening = b"".join(chunks.choice(at, {"delta": {"role": "assistant", "content": ""}}) for at in range(running.count))
    run = service.run if body.logprobs else None
    return EventStream(running, encode, opening=opening, closing=chunks.closing, failing=_failing, run=run)


def text_stream(
    service: Service,
    loaded: LoadedModel,
    running: Running,
    head: AnswerHead,
    body: Any,
    before: list[dict[str, Any]],
    prompts: int,
) -> EventStream:
    """`before` is what each answer begins with: `text` and `logprobs` of the prompt with `echo`, its ids."""
    chunks = _Chunks(head, body, prompts)
    lengths = [len(each["text"]) for each in before]

    def encode(at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            return chunks.choice(at, {"text": event.stop_string if body.include_stop_str_in_output else ""}, finish=event)
        logprobs = None
        if body.logprobs is not None and event.id >= 0:
            logprobs = text_logprobs(service.token_texts(loaded), [event], lengths[at])
            lengths[at] += len(logprobs["tokens"][0])
        ids = {"token_ids": [event.id]} if body.return_token_ids and event.id >= 0 else {}
        return chunks.choice(at, {"text": event.text, **ids}, logprobs) if event.text or logprobs or ids else b""

    opening = b"".join(
        chunks.choice(at, {name: value for name, value in each.items() if name != "logprobs"}, each.get("logprobs"))
        for at, each in enumerate(before)
        if each["text"] or len(each) > 1
    )
    run = service.run if body.logprobs is not None else None
    return EventStream(running, encode, opening=opening, closing=chunks.closing, failing=_failing, run=run)


def said(answer: WholeAnswer, body: Any) -> str:
    """The text of an answer; with the stop string that ended it where the request wants that."""
    return answer.text + (answer.finish.stop_string if body.include_stop_str_in_output else "")


def is_older(body: Any) -> bool:
    """Whether a request for a chat names its tools as OpenAI did in 2023: `functions`."""
    return body.functions is not None and body.tools is None


def finish_reason(finish: Finish, older: bool = False) -> str:
    if finish.reason == "tool_calls":
        return "function_call" if older else "tool_calls"
    return "length" if finish.reason == "length" else "stop"


def usage_of(prompts: int, answers: list[WholeAnswer]) -> Usage:
    """The tokens of so many prompts and of all their answers."""
    finishes = [each.finish for each in answers]
    step = max(1, len(answers) // max(1, prompts))  # n answers to a prompt count its tokens once
    prompt = sum(each.prompt_tokens for each in finishes[::step])
    new = sum(each.new_tokens for each in finishes)
    cached = {"cached_tokens": sum(each.cached_tokens for each in finishes[::step])}
    return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=cached)


def _failing(problem: Problem) -> bytes:
    return b"data: " + openai_error(problem).body + b"\n\ndata: [DONE]\n\n"
