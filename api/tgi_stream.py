"""TGI's stream: one event a token, the last of which has the whole text."""

import json
from collections.abc import Callable
from typing import Any

from ..core.chat import Finish, Token


class TokenEvents:
    """Encodes a stream. The last event has the whole text, so a token that may be the last waits for the next one."""

    def __init__(
        self,
        token: Callable[[Token, str], dict[str, Any]],  # as TGI writes one, with this text
        last: Callable[[Finish, str], dict[str, Any]],  # what the last event has besides, from the end and the whole text
        top: Callable[[Token], list[dict[str, Any]]] | None,  # the likeliest tokens in its place
        *,
        end_id: int,
        max_new_tokens: int,
        has_stop: bool,
        is_remote: bool,
    ) -> None:
        self._token, self._last_fields, self._top = token, last, top
        self._end_id, self._max_new_tokens = end_id, max_new_tokens
        self._has_stop, self._is_remote = has_stop, is_remote
        self._text = ""
        self._index = 0
        self._waiting: Token | None = None

    def encode(self, _at: int, event: Token | Finish) -> bytes:
        if isinstance(event, Finish):
            return self._last(event)
        self._text += event.text
        if event.id < 0 and not self._is_remote:  # text that was held back belongs to the last token
            last = self._waiting
            self._waiting = Token(last.id, last.text + event.text, last.logprob, last.top) if last else event
            return b""
        out = self._event(self._waiting) if self._waiting is not None else b""
        self._waiting = None
        if self._has_stop or self._index + 1 >= self._max_new_tokens or not event.text:
            self._waiting = event
            return out
        return out + self._event(event)

    def _event(self, token: Token, more: dict[str, Any] | None = None, text: str | None = None) -> bytes:
        self._index += 1
        body: dict[str, Any] = {"index": self._index, "token": self._token(token, token.text if text is None else text)}
        if self._top is not None:
            body["top_tokens"] = self._top(token)
        body |= more or {"generated_text": None, "details": None}
        return b"data:" + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def _last(self, finish: Finish) -> bytes:
        more = self._last_fields(finish, self._text + finish.stop_string)
        last = self._waiting
        if last is not None and (finish.stop_string or finish.reason != "stop"):
            return self._event(last, more, last.text + finish.stop_string)
        out = self._event(last) if last is not None else b""
        return out + self._event(Token(self._end_id, ""), more)
