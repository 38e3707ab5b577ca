"""What can be wrong with a request, by kind. Each protocol has its own status and shape for a kind.

Only sentences go into an answer, never a traceback, a path or a key.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from ..core.errors import (
    AnswerFailed,
    BadModelName,
    BadParameter,
    Busy,
    GptqWebuiError,
    HubError,
    LoadFailed,
    LoadRefused,
    ModelError,
    NoSuchModel,
    NotLoaded,
    PromptTooLong,
    QueueFull,
)
from ..loaders.machine.memory_fit import is_out_of_memory

Kind = Literal[
    "invalid",  # a field has a wrong value
    "unsupported",  # a known request that this server cannot do
    "too_long",  # the prompt, with the answer, does not fit into the context
    "too_large",  # the body
    "too_slow",  # the body
    "no_key",
    "guessing",  # too many wrong keys
    "forbidden",  # the key is known but may not do this
    "not_found",
    "overloaded",  # the queue is full
    "not_loaded",
    "busy",  # a model is being loaded or unloaded
    "failed",  # the model or the server failed
    "no_memory",  # the model or an answer does not fit into the memory
    "elsewhere",  # the Hub, or a download
]

STATUS: dict[Kind, int] = {
    "invalid": 400,
    "unsupported": 400,
    "too_long": 400,
    "too_large": 413,
    "too_slow": 408,
    "no_key": 401,
    "guessing": 429,
    "forbidden": 403,
    "not_found": 404,
    "overloaded": 429,
    "not_loaded": 503,
    "busy": 503,
    "failed": 500,
    "no_memory": 500,
    "elsewhere": 502,
}

_KINDS: list[tuple[type[GptqWebuiError], Kind]] = [  # the first that matches
    (QueueFull, "overloaded"),
    (Busy, "busy"),
    (NotLoaded, "not_loaded"),
    (PromptTooLong, "too_long"),
    (BadParameter, "invalid"),
    (BadModelName, "invalid"),
    (NoSuchModel, "not_found"),
    (LoadRefused, "invalid"),
    (LoadFailed, "failed"),
    (ModelError, "invalid"),
    (HubError, "elsewhere"),
    (AnswerFailed, "failed"),
]


class Problem(Exception):
    def __init__(
        self,
        kind: Kind,
        message: str,
        field: str | None = None,
        fields: dict[str, list[str]] | None = None,
        retry_after_s: float = 5.0,  # for kinds that pass
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self._retry_after_s = retry_after_s
        self.field = field  # the wrong one, if there is one
        self.fields = fields or ({field: [message]} if field else {})  # sentences by field, as KoboldAI lists them

    @property
    def status(self) -> int:
        return STATUS[self.kind]

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"retry-after": str(math.ceil(self._retry_after_s))}
        return {"www-authenticate": "Bearer"} if self.kind == "no_key" else {}


def of_error(error: GptqWebuiError) -> Problem:
    kind: Kind = next((kind for family, kind in _KINDS if isinstance(error, family)), "failed")
    if kind == "failed" and is_out_of_memory(error):
        kind = "no_memory"
    message = "There is no model of that name on this server." if isinstance(error, NoSuchModel) else str(error)
    if isinstance(error, QueueFull):
        return Problem(kind, message, retry_after_s=error.retry_after_s)
    return Problem(kind, message, error.field if isinstance(error, BadParameter) else None)


def of_validation(errors: Sequence[Any]) -> Problem:
    """What pydantic found: the field and the sentence, never the value that was sent."""
    fields: dict[str, list[str]] = {}
    for each in errors:
        field = ".".join(str(part)[:80] for part in each.get("loc", ()) if _is_named(part)) or "body"
        if each.get("type") == "json_invalid":
            return Problem("invalid", "The body is not JSON. Send a JSON object.", "body")
        said = _PYTHONS.sub("an object", str(each.get("msg", "is not valid"))).removeprefix("Value error, ")
        fields.setdefault(field, []).append(said)
    fields = {field: _joined(texts) for field, texts in fields.items()}
    first = next(iter(fields), "body")
    message = "; ".join(f"{field}: {', '.join(texts)}" for field, texts in list(fields.items())[:5])
    return Problem("invalid", message or "The request is not valid.", first, fields)


_SHOULD = "Input should be "
_PYTHONS = re.compile(
    r"(a valid dictionary|an object)( or (an )?(instance of \w+|object to extract fields from))?|an instance of \w+"
)
_TYPES = frozenset(("str", "int", "float", "bool", "none", "any", "body", "query", "path"))


def _is_named(part: Any) -> bool:
    """Whether a part of a place is a name that the client knows: where a field takes several types, the library names them."""
    text = str(part)
    return text not in _TYPES and not text[:1].isupper() and not re.search(r"[\[(]|^(constrained|function)-", text)


def _joined(texts: Sequence[str]) -> list[str]:
    """What one field's sentences say, those of several types in one."""
    each_once = list(dict.fromkeys(texts))
    wanted = [text.removeprefix(_SHOULD) for text in each_once if text.startswith(_SHOULD)]
    if len(wanted) < 2:
        return each_once
    return [_SHOULD + ", ".join(wanted[:-1]) + f" or {wanted[-1]}", *(text for text in each_once if not text.startswith(_SHOULD))]
