"""What the model reads of a conversation: its system prompt, its messages, and the files attached to them."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from ..core.chat import Message
from ..core.chat_record import ChatInfo, StoredMessage, files_of, pictures_of
from ..core.errors import BadParameter
from ..core.grammar import Grammar, Kind
from ..core.params import GenerationParams
from ..core.picture import is_picture
from . import character_prompt
from .answer import Answer
from .engine import Engine

_MARK = "\N{WHITE SQUARE}user\N{WHITE SQUARE}line\N{WHITE SQUARE}"  # no template changes it


def messages_of(info: ChatInfo, path: Iterable[StoredMessage]) -> list[Message]:
    """The messages for the engine, with what the conversation's character adds to them."""
    chat = [
        Message(each.role, with_files(each.text, each.details), pictures=tuple(url for _name, url in pictures_of(each.details)))
        for each in path
    ]
    return character_prompt.messages(info.character, info.system, chat)


def with_files(text: str, details: Mapping[str, Any]) -> str:
    """A message with the text of its files before it; pictures are no texts."""
    parts = []
    for name, words in files_of(details):
        if is_picture(words):
            continue
        fence = "```"
        while fence in words:
            fence += "`"
        parts.append(f"{name}:\n{fence}\n{words.rstrip()}\n{fence}")
    return "\n\n".join([*parts, text]) if parts else text


def own_params(info: ChatInfo, params: GenerationParams) -> GenerationParams:
    """The parameters of the page, changed by those of the conversation, and its LoRA adapters. Raises BadParameter."""
    if not info.parameters:
        return replace(params, adapters=info.adapters) if info.adapters else params
    own = dict(info.parameters)
    if isinstance(form := own.get("grammar"), Mapping):
        kind: Kind | None = next((each for each in get_args(Kind) if each == form.get("kind")), None)
        if kind is None:
            found = str(form.get("kind"))[:40]
            raise BadParameter(f"The form of this conversation's answers is unknown: {found!r}. Set it anew.", "grammar")
        own["grammar"] = Grammar(kind, str(form.get("text", "")))
    changed = GenerationParams.from_dict({name: value for name, _row, value in GenerationParams.table(params)} | own)
    return replace(changed, adapters=info.adapters)


def kept_params(params: GenerationParams) -> dict[str, Any]:
    """Parameters as ChatInfo keeps them: all of them, so that later changes in the page do not reach the conversation."""
    found = {name: value for name, _row, value in GenerationParams.table(params)}
    if params.grammar is not None:
        found["grammar"] = {"kind": params.grammar.kind, "text": params.grammar.text}
    return found


def users_line(
    engine: Engine, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event, template: str = ""
) -> Answer:
    """The user's next message as the model would write it, streamed: the prompt ends where the user's turn begins.

    Raises NotLoaded, PromptTooLong, BadParameter.
    """
    loaded = engine.ready()
    if loaded.is_remote:
        raise BadParameter("A model on another machine writes only its own lines. Load a model on this machine for yours.")
    asked = [*messages, Message("user", _MARK)]
    prompt = engine.conversation.window(loaded, asked, params.max_new_tokens, template=template).prompt
    opening, mark, _rest = prompt.text.rpartition(_MARK)
    if not mark:
        raise BadParameter("The chat template of this model cannot begin a message of the user. Choose another template.")
    return engine.answer(replace(loaded.prompt(opening), stop=prompt.stop), params, cancel)
