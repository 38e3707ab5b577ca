"""Ollama's answers: whole, and as lines of JSON. Calls come whole; thoughts come apart."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ..core.chat import Finish, Token
from ..core.tools import ToolCall
from .answer_stream import WholeAnswer
from .ollama_models import arguments_of


class OllamaAnswer:
    """One answer. `thoughts`: they are sent, apart from the text."""

    def __init__(self, model: str, write: Callable[[dict[str, Any]], dict[str, Any]], thoughts: bool) -> None:
        self._model, self._write, self._thoughts = model, write, thoughts
        self._began = time.perf_counter()
        self._answer = WholeAnswer()
        self._sent_calls = 0

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        fields: dict[str, Any] = {"content": answer.text}
        if answer.thought and self._thoughts:
            fields["thinking"] = answer.thought
        if answer.calls:
            fields["tool_calls"] = [written_call(each) for each in answer.calls]
        return self._line(fields, answer.finish)

    def encode(self, _at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            lines = self._calls(len(self._answer.calls))
            return b"".join(map(_json, [*lines, self._line({"content": ""}, event)]))
        if event.call is not None:
            self._answer.add(event)
            return b"".join(map(_json, self._calls(event.call.index)))
        lines = [self._line({"content": "", "thinking": event.thought})] if event.thought and self._thoughts else []
        return b"".join(map(_json, lines + ([self._line({"content": event.text})] if event.text else [])))

    def _calls(self, complete: int) -> list[dict[str, Any]]:
        """Those that are complete and not sent yet."""
        calls, self._sent_calls = self._answer.calls[self._sent_calls : complete], max(complete, self._sent_calls)
        return [self._line({"content": "", "tool_calls": [written_call(each)]}) for each in calls]

    def _line(self, fields: dict[str, Any], finish: Finish | None = None) -> dict[str, Any]:
        head = {"model": self._model, "created_at": now(), **self._write(fields), "done": finish is not None}
        return head if finish is None else head | self._counts(finish)

    def _counts(self, finish: Finish) -> dict[str, Any]:
        return {
            "done_reason": "length" if finish.reason == "length" else "stop",
            "total_duration": int((time.perf_counter() - self._began) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": finish.prompt_tokens,
            "prompt_eval_duration": int(finish.prefill_s * 1e9),
            "eval_count": finish.new_tokens,
            "eval_duration": int(finish.generate_s * 1e9),
        }


def of_chat(fields: dict[str, Any]) -> dict[str, Any]:
    return {"message": {"role": "assistant", **fields}}


def of_generate(fields: dict[str, Any]) -> dict[str, Any]:
    return {"response": fields["content"], **{name: value for name, value in fields.items() if name == "thinking"}}


def written_call(call: ToolCall) -> dict[str, Any]:
    return {"function": {"name": call.name, "arguments": arguments_of(call)}}


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _json(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"
