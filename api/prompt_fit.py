"""Prompts of requests: made once, and refused before they cost memory if they cannot fit.

Everything here renders a template or tokenises, which may take seconds: it runs on a thread, never on the event loop.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.chat import Message
from ..core.tools import ToolUse
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.model_prompt import Prompt
from .problems import Problem

Source = str | Sequence[Message] | Prompt  # a text, a conversation, or a prompt that is already made

MOST_NEW_TOKENS = 32768
_REMOTE_NEW_TOKENS = 512  # where a remote engine does not say how long its context is
_LONGEST_TOKEN = 128  # characters
_COUNTED_CONTEXTS = 4  # a text that is only counted or listed may be longer than a prompt
_CHECKED_BYTES = 150_000  # tokenising takes about 450 bytes for each byte of a text; longer ones are counted in slices first
_SLICE = 16_384  # characters
_MOST_FOR_TOOLS = 4  # the part of the context that tools may take in the prompt of a model that was not taught them

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits into the context, with room for its answer."""

    loaded: LoadedModel  # that made it
    prompt: Prompt
    max_new_tokens: int


def fit(
    loaded: LoadedModel,
    source: Source,
    max_new_tokens: int | None,
    *,
    trim: bool = False,
    max_input_tokens: int | None = None,
    tools: ToolUse | None = None,
    options: Mapping[str, Any] | None = None,
) -> FittedPrompt:
    """Make a prompt; of a conversation, with the tools that the answer may call and `options` for its template.

    With `trim`, the answer is cut to the room that is left; `max_new_tokens` None is all of that room.

    Raises Problem too_long, or invalid for an empty prompt; BadParameter if the template cannot show the conversation.
    """
    if loaded.is_remote:
        prompt = source if isinstance(source, Prompt) else loaded.prompt(source, tools, options=options)
        return FittedPrompt(loaded, prompt, max_new_tokens or _REMOTE_NEW_TOKENS)
    context = loaded.context_tokens
    if not isinstance(source, Prompt):
        require_length(loaded, source if isinstance(source, str) else _words(source, tools), context)
        source = _made(loaded, source, tools, options)
    count = len(source.ids)
    if count == 0:
        raise Problem("invalid", "The prompt is empty. Send some text.", "prompt")
    if max_input_tokens is not None and count > max_input_tokens:
        raise Problem("too_long", f"The prompt has {count:,} tokens; this server takes prompts of up to {max_input_tokens:,}.")
    room = context - count
    wanted = max_new_tokens if max_new_tokens is not None else room
    if room < min(1, wanted) or (wanted > room and not trim):
        requested = f" and {max_new_tokens:,} are requested" if max_new_tokens is not None else ""
        raise Problem(
            "too_long",
            f"The context of the loaded model is {context:,} tokens. The prompt has {count:,}{requested}. "
            "Shorten one of them, or load the model with a longer context.",
        )
    return FittedPrompt(loaded, source, max(1, min(wanted, room, MOST_NEW_TOKENS)))


def _made(
    loaded: LoadedModel, source: str | Sequence[Message], tools: ToolUse | None, options: Mapping[str, Any] | None
) -> Prompt:
    """The prompt. A model that was not taught tools is not shown more of them than a quarter of its context holds.

    Open WebUI offers some 40 tools with every message: they would leave a small model no room, and it seldom calls one.
    """
    prompt, most = loaded.prompt(source, tools, options=options), loaded.context_tokens // _MOST_FOR_TOOLS
    calls = prompt.calls
    if calls is None or calls.has_skill or calls.use.is_forced or len(prompt.ids) <= most:
        return prompt
    bare = loaded.prompt(source, options=options)
    if len(prompt.ids) - len(bare.ids) <= most:
        return prompt
    log.info(
        "%s was not taught tools: %d tools take %d tokens, more than a quarter of its context, and are left out",
        loaded.model.name,
        len(calls.use.tools),
        len(prompt.ids) - len(bare.ids),
    )
    return bare


def _words(messages: Sequence[Message], tools: ToolUse | None) -> str:
    """All that the template will show."""
    calls = [call.arguments for each in messages for call in each.tool_calls]
    offered = [each.description + each.parameters for each in tools.tools] if tools is not None else []
    return "".join([*(each.text for each in messages), *calls, *offered])


def require_length(loaded: LoadedModel, text: str, most_tokens: int) -> None:
    """Raises Problem too_long for a text that surely has more tokens. Memory is bounded: all of 4 MB at once takes 1.9 GB."""
    if len(text) > most_tokens * _LONGEST_TOKEN or _has_more_tokens(loaded, text, most_tokens):
        raise Problem(
            "too_long", f"The text has {len(text):,} characters, which are more than {most_tokens:,} tokens. Shorten it."
        )


def _has_more_tokens(loaded: LoadedModel, text: str, most_tokens: int) -> bool:
    if len(text) * 4 <= _CHECKED_BYTES or len(text.encode()) <= _CHECKED_BYTES:
        return False
    count = 0
    for start in range(0, len(text), _SLICE):
        count += len(loaded.encode(text[start : start + _SLICE], bos=False)) - 4  # a cut may add tokens, and splits one
        if count > most_tokens:
            return True
    return False


def encode(loaded: LoadedModel, text: str, *, bos: bool = True) -> list[int]:
    """Raises Problem for a text that is far too long, BadParameter for a remote engine."""
    require_length(loaded, text, loaded.context_tokens * _COUNTED_CONTEXTS)
    return loaded.encode(text, bos=bos)


def decode(loaded: LoadedModel, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included. Raises Problem for ids that the model does not have, or far too many."""
    if loaded.is_remote:
        raise Problem("unsupported", "The loaded model takes text, not token ids. Send the text.")
    if len(ids) > loaded.context_tokens * _COUNTED_CONTEXTS:
        raise Problem("too_long", f"{len(ids):,} token ids are more than {_COUNTED_CONTEXTS} contexts. Send fewer.")
    size = loaded.codec.size
    if any(not 0 <= each < size for each in ids):
        raise Problem("invalid", f"Token ids of this model go from 0 to {size - 1}.")
    return loaded.decode(ids, special=True)


def prompt_of(loaded: LoadedModel, ids: Sequence[int]) -> Prompt:
    """A prompt of exactly these ids. Raises Problem."""
    return Prompt(decode(loaded, ids), tuple(ids))


def last_tokens(loaded: LoadedModel, text: str, most: int) -> str:
    """The end of a text that has at most so many tokens; all of it if it fits."""
    text = text[-most * _LONGEST_TOKEN :]
    if len(text) * 4 > _CHECKED_BYTES:
        text = _last_slices(loaded, text, most)
    ids = loaded.encode(text)
    while len(ids) > most:
        plain = loaded.encode(text, bos=False)
        keep = most - (len(ids) - len(plain))
        text = loaded.decode(plain[-max(1, keep) :], special=True)
        most_before = len(ids)
        ids = loaded.encode(text)
        if len(ids) >= most_before:  # a text whose tokens grow when they are read again
            text = text[len(text) // 10 + 1 :]
            ids = loaded.encode(text)
    return text


def _last_slices(loaded: LoadedModel, text: str, most: int) -> str:
    """The end of a long text, with a slice more than so many tokens."""
    count, start = 0, len(text)
    while start > 0 and count <= most:
        end, start = start, max(0, start - _SLICE)
        count += len(loaded.encode(text[start:end], bos=False))
    return text[start:]
