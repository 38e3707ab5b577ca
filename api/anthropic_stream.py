"""Anthropic's answers: whole, and as the events of a stream."""

import json
from typing import Any

from ..core.chat import Finish, Token
from .answer_stream import WholeAnswer
from .anthropic_models import their_id
from .identifiers import new_id


class AnthropicAnswer:
    """One answer on its way. `prompt_tokens` is what is known before it begins; `thoughts`: they are sent, too."""

    def __init__(self, model: str, prompt_tokens: int, thoughts: bool = False) -> None:
        self._thoughts = thoughts
        self.id = "msg_" + new_id()
        self.model, self.prompt_tokens = model, prompt_tokens
        self._at = -1  # the block that is being sent
        self._kind = ""  # of that block; "": none is open

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        if answer.thought and self._thoughts:
            blocks.append({"type": "thinking", "thinking": answer.thought, "signature": ""})
        if answer.text:
            blocks.append({"type": "text", "text": answer.text})
        for call in answer.calls:
            block = {"type": "tool_use", "id": their_id(call.id), "name": call.name, "input": _input(call.arguments)}
            blocks.append(block)
        reason = {"stop_reason": stop_reason(answer.finish), "stop_sequence": answer.finish.stop_string or None}
        return {**self._head(), "content": blocks, **reason, "usage": usage_of(answer.finish)}

    def opening(self) -> bytes:
        usage = {"input_tokens": self.prompt_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        reason = {"stop_reason": None, "stop_sequence": None}
        message = {**self._head(), "content": [], **reason, "usage": {**usage, "output_tokens": 0}}
        return event("message_start", message=message) + event("ping")

    def encode(self, _at: int, found: Token | Finish) -> bytes:
        if isinstance(found, Finish):
            reason = {"stop_reason": stop_reason(found), "stop_sequence": found.stop_string or None}
            return self._close() + event("message_delta", delta=reason, usage=usage_of(found)) + event("message_stop")
        if (part := found.call) is None:
            sent = b""
            if found.thought and self._thoughts:
                sent += b"" if self._kind == "thinking" else self._open({"type": "thinking", "thinking": "", "signature": ""})
                sent += self._delta({"type": "thinking_delta", "thinking": found.thought})
            if found.text:
                sent += b"" if self._kind == "text" else self._open({"type": "text", "text": ""})
                sent += self._delta({"type": "text_delta", "text": found.text})
            return sent
        begin = b""
        if part.id:
            begin = self._open({"type": "tool_use", "id": their_id(part.id), "name": part.name, "input": {}})
        piece = self._delta({"type": "input_json_delta", "partial_json": part.arguments}) if part.arguments else b""
        return begin + piece

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model}

    def _open(self, block: dict[str, Any]) -> bytes:
        closing = self._close()
        self._at, self._kind = self._at + 1, block["type"]
        return closing + event("content_block_start", index=self._at, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._at, delta=delta)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": ""}) if self._kind == "thinking" else b""
        self._kind = ""
        return signed + event("content_block_stop", index=self._at)


def event(name: str, **fields: Any) -> bytes:
    body = json.dumps({"type": name, **fields}, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n".encode()


def stop_reason(finish: Finish) -> str:
    if finish.reason == "tool_calls":
        return "tool_use"
    if finish.reason == "length":
        return "max_tokens"
    return "stop_sequence" if finish.stop_string else "end_turn"


def usage_of(finish: Finish) -> dict[str, int]:
    """As Anthropic counts: tokens of the prompt that were computed before are not among the input tokens."""
    return {
        "input_tokens": finish.prompt_tokens - finish.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finish.cached_tokens,
        "output_tokens": finish.new_tokens,
    }


def _input(arguments: str) -> dict[str, Any]:
    """Of a call that the limit of tokens cut off: an empty object."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
