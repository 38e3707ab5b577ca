"""OpenAI's Responses: the answer as it grows, item by item, and the events that tell of it in the protocol's order."""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from ..core.chat import Finish, Message, Token
from ..core.tools import ToolCall
from .problems import Problem
from .responses_models import new_item_id


class ResponseAnswer:
    """One answer. Each method returns the events of a step; who wants the whole answer leaves them alone."""

    def __init__(self, model: str, request: dict[str, Any], ended: Callable[["ResponseAnswer"], None]) -> None:
        self.id = f"resp_{secrets.token_hex(12)}"  # whoever has it may read the answer again
        self._head = {"id": self.id, "object": "response", "created_at": int(time.time()), "model": model, **request}
        self._number = 0
        self._ended = ended  # called before the last event
        self.status = "in_progress"
        self.items: list[dict[str, Any]] = []
        self._text = ""  # of the open item
        self._is_open = False
        self._thought_tokens = 0  # that showed something of a thought
        self._finish: Finish | None = None
        self._error: dict[str, str] | None = None

    def response(self) -> dict[str, Any]:
        finish = self._finish
        usage = None
        if finish is not None:
            usage = {
                "input_tokens": finish.prompt_tokens,
                "input_tokens_details": {"cached_tokens": finish.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": finish.new_tokens,
                "output_tokens_details": {"reasoning_tokens": min(self._thought_tokens, finish.new_tokens)},
                "total_tokens": finish.prompt_tokens + finish.new_tokens,
            }
        reason = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        state = {"status": self.status, "error": self._error, "incomplete_details": reason}
        return {**self._head, **state, "output": self.items if self.status != "in_progress" else [], "usage": usage}

    def message(self) -> Message:
        """The answer as a turn of the conversation."""
        texts = [part["text"] for each in self.items if each["type"] == "message" for part in each["content"]]
        calls = [each for each in self.items if each["type"] == "function_call"]
        found = tuple(ToolCall(each["name"], each["arguments"], each["call_id"]) for each in calls)
        return Message("assistant", "\n".join(texts), found)

    def opening(self) -> bytes:
        return self._event("response.created", response=self.response()) + self._event(
            "response.in_progress", response=self.response()
        )

    def encode(self, _at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            return self._end(event)
        if (part := event.call) is None:
            return (self._think(event.thought) if event.thought else b"") + (self._say(event.text) if event.text else b"")
        sent = b""
        if part.id:
            sent = self._close("completed")
            call = {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}
            sent += self._open({"id": new_item_id("fc"), **call, "status": "in_progress"})
        if part.arguments:
            self._text += part.arguments
            sent += self._event("response.function_call_arguments.delta", **self._where, delta=part.arguments)
        return sent

    def failing(self, problem: Problem) -> bytes:
        """The end of a stream that an error ends."""
        sent = self._close("incomplete")
        self.status = "failed"
        self._error = {"code": "server_error", "message": problem.message}
        self._ended(self)
        return sent + self._event("response.failed", response=self.response())

    def _say(self, text: str) -> bytes:
        sent = b""
        if not self._is_open or self.items[-1]["type"] != "message":
            sent = self._close("completed")
            message = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
            sent += self._open({"id": new_item_id("msg"), **message})
            sent += self._event("response.content_part.added", **self._where, content_index=0, part=_part(""))
        self._text += text
        return sent + self._event("response.output_text.delta", **self._where, content_index=0, delta=text, logprobs=[])

    def _think(self, thought: str) -> bytes:
        sent = b""
        if not self._is_open or self.items[-1]["type"] != "reasoning":
            sent = self._close("completed")
            sent += self._open(
                {"id": new_item_id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
            )
            sent += self._event("response.content_part.added", **self._where, content_index=0, part=_thought(""))
        self._text += thought
        self._thought_tokens += 1
        return sent + self._event("response.reasoning_text.delta", **self._where, content_index=0, delta=thought)

    def _end(self, finish: Finish) -> bytes:
        sent = (
            b"" if any(each["type"] != "reasoning" for each in self.items) else self._say("")
        )  # an answer of nothing is an empty message
        cut = finish.reason == "length"
        sent += self._close("incomplete" if cut else "completed")
        self._finish = finish
        self.status = "incomplete" if cut else "cancelled" if finish.reason == "cancelled" else "completed"
        self._ended(self)
        name = "response.incomplete" if self.status != "completed" else "response.completed"
        return sent + self._event(name, response=self.response())

    def _open(self, item: dict[str, Any]) -> bytes:
        self.items.append(item)
        self._text, self._is_open = "", True
        return self._event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _close(self, status: str) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item, text = self.items[-1], self._text
        if item["type"] == "message":
            sent = self._event("response.output_text.done", **self._where, content_index=0, text=text, logprobs=[])
            sent += self._event("response.content_part.done", **self._where, content_index=0, part=_part(text))
            done = {**item, "content": [_part(text)], "status": status}
        elif item["type"] == "reasoning":
            sent = self._event("response.reasoning_text.done", **self._where, content_index=0, text=text)
            sent += self._event("response.content_part.done", **self._where, content_index=0, part=_thought(text))
            done = {**item, "content": [_thought(text)], "status": status}
        else:
            sent = self._event("response.function_call_arguments.done", **self._where, name=item["name"], arguments=text)
            done = {**item, "arguments": text, "status": status}
        self.items[-1] = done
        return sent + self._event("response.output_item.done", output_index=len(self.items) - 1, item=done)

    @property
    def _where(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _event(self, name: str, /, **fields: Any) -> bytes:
        body = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {name}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
