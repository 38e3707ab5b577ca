"""Log-probabilities in OpenAI's two shapes. They are of the model's own distribution, before penalties and temperature."""

from collections.abc import Sequence
from typing import Any

from ..core.chat import Token
from .token_texts import TokenTexts

_LOWEST = -9999.0  # JSON has no minus infinity; OpenAI uses this number


def number(logprob: float | None) -> float | None:
    """As JSON can contain it."""
    return None if logprob is None else max(_LOWEST, min(0.0, logprob))


def chat_logprobs(texts: TokenTexts, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        raw = texts.raw(id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": number(logprob), "bytes": list(raw)}

    content = [
        {**entry(each.id, each.logprob), "top_logprobs": [entry(id, logprob) for id, logprob in each.top]} for each in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(texts: TokenTexts, tokens: Sequence[Token], offset: int = 0, *, own: bool = False) -> dict[str, Any]:
    """`own`: each token is among the likeliest even where it is not one, and one without a number has none."""

    def likeliest(each: Token) -> dict[str, float | None] | None:
        if own and each.logprob is None:
            return None
        pairs = [*each.top, *([(each.id, each.logprob)] if own and each.id not in {id for id, _ in each.top} else [])]
        return {texts.text(id): number(logprob) for id, logprob in reversed(pairs)}  # of equal texts the likeliest counts

    tokens_as_text = [texts.text(each.id) for each in tokens]
    offsets: list[int] = []
    for text in tokens_as_text:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens_as_text,
        "token_logprobs": [number(each.logprob) for each in tokens],
        "top_logprobs": [likeliest(each) for each in tokens],
        "text_offset": offsets,
    }
