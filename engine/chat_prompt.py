"""What the model reads of a conversation: its system prompt, its messages, and the files attached to them."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.chat import Message
from ..core.chat_record import ChatInfo, StoredMessage
from ..core.errors import BadParameter
from ..core.params import GenerationParams
from . import character_prompt
from .answer import Answer
from .engine import Engine

FILES = "files"  # in the details of a message: [{"name": …, "text": …}]
_MARK = "\N{WHITE SQUARE}user\N{WHITE SQUARE}line\N{WHITE SQUARE}"  # no template changes it


def messages_of(info: ChatInfo, path: Iterable[StoredMessage]) -> list[Message]:
    """The messages for the engine, with what the conversation's character adds to them."""
    chat = [Message(each.role, with_files(each.text, each.details)) for each in path]
    return character_prompt.messages(info.character, info.system, chat)


def with_files(text: str, details: Mapping[str, Any]) -> str:
    """A message with the text of its files before it."""
    parts = []
    for name, words in files_of(details):
        fence = "```"
        while fence in words:
            fence += "`"
        parts.append(f"{name}:\n{fence}\n{words.rstrip()}\n{fence}")
    return "\n\n".join([*parts, text]) if parts else text


def files_of(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each attached file; what is none is left out."""
    found = details.get(FILES)
    if not isinstance(found, list):
        return []
    pairs = [(each.get("name"), each.get("text")) for each in found if isinstance(each, dict)]
    return [(name, text) for name, text in pairs if isinstance(name, str) and isinstance(text, str)]


def own_params(info: ChatInfo, params: GenerationParams) -> GenerationParams:
    """The parameters of the page, changed by those of the conversation. Raises BadParameter."""
    if not info.parameters:
        return params
    return GenerationParams.from_dict(
        {name: value for name, _row, value in GenerationParams.table(params)} | dict(info.parameters)
    )


def users_line(engine: Engine, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event) -> Answer:
    """The user's next message as the model would write it, streamed: the prompt ends where the user's turn begins.

    Raises NotLoaded, PromptTooLong, BadParameter.
    """
    loaded = engine.ready()
    if loaded.is_remote:
        raise BadParameter("A model on another machine writes only its own lines. Load a model on this machine for yours.")
    prompt = engine.conversation.window(loaded, [*messages, Message("user", _MARK)], params.max_new_tokens).prompt
    opening, mark, _rest = prompt.text.rpartition(_MARK)
    if not mark:
        raise BadParameter("The chat template of this model cannot begin a message of the user. Choose another template.")
    return engine.answer(replace(loaded.prompt(opening), stop=prompt.stop), params, cancel)
