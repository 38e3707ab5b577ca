"""How a conversation becomes the one text that a model was taught to read.

Looked for in this order: the tokenizer's own template (chat_template.jinja or
tokenizer_config.json), the `prompt_template` in the front matter of the folder's README.md
(TheBloke's cards), the model's name, its architecture. A model with none of them is no chat
model; it gets a plain transcript and is labelled so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.chat import Message
from ...core.errors import BadParameter
from .built_in_templates import BUILT_IN, BY_ARCHITECTURE, BY_CARD, BY_NAME, PLAIN, PLAIN_JINJA, labelled


@dataclass(frozen=True)
class ChatTemplate:
    jinja: str
    name: str  # "ChatML", or "the model's own"
    source: str  # where it was found: "chat_template.jinja", "the model card" …
    stop: tuple[str, ...] = ()  # role markers: text that means the model speaks for somebody else
    stop_ids: tuple[int, ...] = ()  # the same where they are special tokens
    is_chat: bool = True  # False: the model was not taught to chat

    def render(self, messages: Sequence[Message], tokenizer: Any = None) -> str:
        """The prompt for the next assistant message; one that ends in an assistant's message is continued.

        A template that knows no system role gets the system text before the first user message.
        Raises BadParameter if the template cannot show the conversation.
        """
        chat = _merged(messages)
        resume = bool(chat) and chat[-1]["role"] == "assistant"
        try:
            return _render(self.jinja, chat, tokenizer, resume)
        except Exception as first:
            try:
                return _render(self.jinja, _system_into_user(chat), tokenizer, resume)
            except Exception:
                raise BadParameter(
                    f"The chat template of this model ({self.name}) cannot show this conversation: {first}. "
                    "Choose another template in the Chat tab."
                ) from None

    def bound(self, tokenizer: Any) -> "ChatTemplate":
        """With the role markers of this template as this tokenizer sees them."""
        stop, ids = _markers(self, tokenizer)
        return replace(self, stop=stop, stop_ids=ids)


def find(folder: Path, tokenizer: Any, architecture: str) -> ChatTemplate:
    """The template of a model folder; its `source` says where it came from."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    if own:
        source = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
        return ChatTemplate(own, "the model's own", source).bound(tokenizer)
    if gpu := card_template(folder):
        return from_card(gpu).bound(tokenizer)
    name = folder.name.lower()
    for pattern, built_in in BY_NAME:
        if re.search(pattern, name):
            return named(built_in, "the model's name").bound(tokenizer)
    if architecture in BY_ARCHITECTURE and re.search(r"chat|instruct", name):
        return named(BY_ARCHITECTURE[architecture], "the model's architecture").bound(tokenizer)
    return ChatTemplate(PLAIN_JINJA, PLAIN, "none found: not a chat model", is_chat=False).bound(tokenizer)


def named(name: str, source: str = "your choice") -> ChatTemplate:
    """One of the built-in templates. Raises BadParameter if there is none of that name."""
    if name == PLAIN:
        return ChatTemplate(PLAIN_JINJA, PLAIN, source, is_chat=False)
    if name not in BUILT_IN:
        raise BadParameter(f"There is no chat template called {name!r}. There are: {', '.join(BUILT_IN)}.")
    return ChatTemplate(BUILT_IN[name], name, source)


def card_template(folder: Path) -> str | None:
    """`prompt_template` from the front matter of README.md, None if there is none."""
    gpu = folder / "README.md"
    if not gpu.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        template = (metadata_load(gpu) or {}).get("prompt_template")
    except Exception:
        return None  # a card that cannot be read is a card without a template
    return template if isinstance(template, str) and "{prompt}" in template else None


def from_card(gpu: str) -> ChatTemplate:
    """A card's `… {prompt} …` as a template for whole conversations."""
    for marks, built_in in BY_CARD:
        if all(mark in gpu for mark in marks):
            return named(built_in, "the model card")
    before, _, after = gpu.partition("{prompt}")
    before = before.removeprefix("<s>")
    head, cut, user = before.rstrip("\n").rpartition("\n")
    user = (user if cut else before.rstrip("\n")) + before[len(before.rstrip("\n")) :]
    head = (head + cut).replace("{system_message}", "{s}")
    answer = after.lstrip()
    between = after[: len(after) - len(answer)]
    default = "" if "{s}" in head else head.strip()
    system = head if "{s}" in head else "{s}\n\n"
    jinja = labelled(system, user, answer, between, default)
    return ChatTemplate(jinja, "the card's own", "the model card")


def _merged(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Neighbours of one role become one message: templates insist that roles alternate."""
    chat: list[dict[str, str]] = []
    for message in messages:
        if chat and chat[-1]["role"] == message.role:
            chat[-1]["content"] += "\n\n" + message.text
        else:
            chat.append({"role": message.role, "content": message.text})
    return chat


def _system_into_user(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    if not chat or chat[0]["role"] != "system":
        return chat
    system, rest = chat[0]["content"], [dict(each) for each in chat[1:]]
    for each in rest:
        if each["role"] == "user":
            each["content"] = f"{system}\n\n{each['content']}"
            break
    return rest


def _render(jinja: str, chat: list[dict[str, str]], tokenizer: Any, resume: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = getattr(tokenizer, "special_tokens_map", None) or {}
    tokens: dict[str, Any] = {name: str(value) for name, value in special.items() if isinstance(value, str)}
    for name in ("bos_token", "eos_token"):
        tokens.setdefault(name, str(getattr(tokenizer, name, "") or ""))
    rendered: Any = render_jinja_template(
        conversations=[chat],
        chat_template=jinja,
        add_generation_prompt=not resume,
        continue_final_message=resume,
        **tokens,
    )
    return str(rendered[0][0])  # (one text a conversation, masks)


def _markers(template: ChatTemplate, tokenizer: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What stands between the messages of a probe conversation: there the model must stop."""
    probe = [Message("user", "Aa1q"), Message("assistant", "Bb2q"), Message("user", "Cc3q")]
    try:
        text = template.render(probe, tokenizer)
    except BadParameter:
        return (), ()
    if not all(each.text in text for each in probe):
        return (), ()
    gaps = (text.split("Bb2q", 1)[1].split("Cc3q", 1)[0], text.split("Cc3q", 1)[1])
    special = {str(name): id for name, id in _special_tokens(tokenizer).items()}
    stop: list[str] = []
    ids: list[int] = []
    for at, gap in enumerate(gaps):
        for token, id in special.items():
            if token and token in gap:
                if at == 0 and id not in ids:
                    ids.append(id)  # only what may end an answer, not what begins one
                gap = gap.replace(token, "\n")
        for name in ("eos_token", "bos_token"):
            gap = gap.replace(getattr(tokenizer, name, None) or "\n", "\n")
        for line in gap.splitlines():
            marker = line.strip()
            if len(marker) >= 3 and re.search(r"[^\w\s]", marker) and marker not in stop:
                stop.append(marker)
    bos = getattr(tokenizer, "bos_token_id", None)
    return tuple(stop), tuple(id for id in ids if id != bos)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every token that decoding leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: id for id, token in added.items() if token.special}
