"""Texts that an adapter is trained on: conversations, instructions or plain text out of a file, as token ids.

A conversation is written with the template that the chat uses, and only its answers count in the loss. Kinds of entries (.jsonl,
a line each, or .json, a list): `messages` (role, content), `conversations` (from, value: ShareGPT), `instruction`, `input`,
`output` (Alpaca), `prompt` and `completion`, `text`. A .txt file is plain text.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.chat import Message
from ..core.errors import BadParameter
from ..core.folder_files import shown_name
from ..core.models import LocalModel
from ..core.units import plural
from ..gptq.training_recipe import Example
from ..loaders.text import chat_template
from ..loaders.text.chat_template import ChatTemplate
from ..loaders.text.renderers import TemplateFault, TemplateLimit
from ..loaders.text.token_codec import TokenCodec
from .dataset_file import LARGEST_BYTES, json_of, lines_of, pieces_of, text_of

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant")
_LARGEST_LIST_BYTES = 64 << 20  # of a .json, whose objects are in memory at once
_WANTED = "each entry must be an object"
_EVERY_S = 5.0  # between two words about how far the reading is

Messages = list[dict[str, str]]


def read_examples(path: Path, model: LocalModel, tokenizer: Any, length: int, say: Callable[[str], None]) -> list[Example]:
    """The texts of a file, each cut to `length` tokens. `say` hears how far it is, what was cut or left out, and which template
    is used; what it raises ends the reading.

    Raises BadParameter if the file is missing, damaged or holds nothing to learn.
    """
    codec = TokenCodec(tokenizer)
    template = chat_template.find(model.folder, tokenizer, model.architecture)
    kept: list[Example] = []
    count = cut = 0
    said_s = time.monotonic()
    try:
        for found in _Reader(path, template, codec).examples(length):
            count += 1
            cut += len(found.ids) > length
            example = Example(found.ids[:length], found.learned[:length])
            if any(example.learned[1:]):
                kept.append(example)
            if time.monotonic() - said_s > _EVERY_S:
                said_s = time.monotonic()
                say(f"Reading {shown_name(path)}: {plural(count, 'text')} so far.")
    finally:
        template.close()
    if not kept:
        raise BadParameter(
            f"{shown_name(path)} holds no answer that fits into {length} tokens. Give another file, or a larger cutoff "
            "(--length)."
        )
    if cut:
        gone = f", {count - len(kept)} of them left out" if len(kept) < count else ""
        say(f"{cut} of {plural(count, 'text')} are longer than {length} tokens and are cut{gone}.")
    learned = sum(sum(each.learned) for each in kept)
    say(f"{plural(len(kept), 'text')}, {learned:,} tokens to learn; chat template: {template.name}.")
    return kept


class _Reader:
    def __init__(self, path: Path, template: ChatTemplate, codec: TokenCodec) -> None:
        self._path, self._template, self._codec = path, template, codec

    def examples(self, length: int) -> Iterator[Example]:
        for where, entry in self._entries():
            if isinstance(entry, str):
                yield from self._plain(entry, length)
            else:
                try:
                    yield from self._conversation(entry, length)
                except (TemplateFault, TemplateLimit, BadParameter) as error:
                    raise BadParameter(f"{where} cannot be shown as a chat: {error} Correct it, or remove it.") from None

    def _entries(self) -> Iterator[tuple[str, str | Messages]]:
        """(where it is, a plain text or a conversation)."""
        path, of = self._path, "the training"
        if path.is_file() and path.stat().st_size > LARGEST_BYTES:
            raise BadParameter(f"{shown_name(path)} is larger than {LARGEST_BYTES >> 20} MiB. Give a part of it.")
        if path.suffix == ".jsonl":
            for where, line in lines_of(path, of):
                yield where, entry_of(json_of(line, where, _WANTED), where)
        elif path.suffix == ".json":
            if path.is_file() and path.stat().st_size > _LARGEST_LIST_BYTES:
                raise BadParameter(
                    f"{shown_name(path)} is larger than {_LARGEST_LIST_BYTES >> 20} MiB. Write it as .jsonl, a line each."
                )
            name = shown_name(path)
            values = json_of(text_of(path, of), name, _WANTED)
            if not isinstance(values, list):
                raise BadParameter(f"{name} must be a list of entries. Write them in [ ], or a line each into .jsonl.")
            for at, each in enumerate(values, 1):
                yield f"Entry {at} of {name}", entry_of(each, f"Entry {at} of {name}")
        else:
            yield shown_name(path), text_of(path, of)

    def _plain(self, text: str, length: int) -> Iterator[Example]:
        """Pieces of a text, all of which is learned."""
        ids: list[int] = []
        for at, piece in enumerate(pieces_of(text)):
            ids += self._codec.encode(piece, bos=at == 0)
        if self._codec.end_id is not None:
            ids = [*ids, self._codec.end_id]
        for at in range(0, len(ids), length):
            part = ids[at : at + length]
            yield Example(part, [True] * len(part))

    def _conversation(self, messages: Messages, length: int) -> Iterator[Example]:
        """One text where the template writes a longer conversation as the shorter one and more, else one for each answer.

        Answers that begin behind the first `length` tokens are not looked at: to write a conversation of thousands of messages
        up to each of them would take minutes.
        """
        tokenizer = self._codec.tokenizer
        whole = self._template.whole(messages, tokenizer)
        answers = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        found = self._codec.encode_with_offsets(whole)
        if found is not None:
            ids, offsets = found
            end = offsets[length][0] if len(offsets) > length else len(whole)
            learned = [False] * len(ids)
            for at in answers:
                before, after = self._around(messages, at, whole)
                if not (whole.startswith(before) and whole.startswith(after)):
                    break
                if len(before) >= end:
                    yield self._with_bos(ids, learned)
                    return
                learned = [was or len(before) <= start < len(after) for was, (start, _end) in zip(learned, offsets, strict=True)]
            else:
                yield self._with_bos(ids, learned)
                return
        for at in answers:
            before, after = self._around(messages, at, whole)
            head = self._codec.encode(before, bos=False)
            if after.startswith(before):
                tail = self._codec.encode(after[len(before) :], bos=False)
            else:
                ended = [self._codec.end_id] if self._codec.end_id is not None else []
                tail = [*self._codec.encode(messages[at]["content"], bos=False), *ended]
            yield self._with_bos([*head, *tail], [False] * len(head) + [True] * len(tail))
            if len(head) > length:
                return

    def _around(self, messages: Messages, at: int, whole: str) -> tuple[str, str]:
        """What the template writes before the answer with that number, and up to its end."""
        tokenizer = self._codec.tokenizer
        before = self._template.render([Message(each["role"], each["content"]) for each in messages[:at]], tokenizer)  # type: ignore[arg-type]
        after = self._template.whole(messages[: at + 1], tokenizer) if at + 1 < len(messages) else whole
        return before, after

    def _with_bos(self, ids: list[int], learned: list[bool]) -> Example:
        begun = self._codec.with_bos(ids)
        return Example(begun, [False] * (len(begun) - len(ids)) + learned)


def entry_of(values: Any, where: str) -> str | Messages:
    """A plain text or a conversation out of one entry of a data set. Raises BadParameter."""
    if isinstance(values, Mapping):
        if isinstance(given := values.get("messages"), list):
            return _chat(((each.get("role"), each.get("content")) for each in _objects(given, where)), where)
        if isinstance(given := values.get("conversations"), list):
            turns = _objects(given, where)
            return _chat(((each.get("from", each.get("role")), each.get("value", each.get("content"))) for each in turns), where)
        for question, answer in (("instruction", "output"), ("instruction", "response"), ("prompt", "completion")):
            if isinstance(values.get(question), str) and isinstance(values.get(answer), str):
                asked = "\n\n".join(filter(None, (values[question], str(values.get("input") or ""))))
                system = [("system", values["system"])] if isinstance(values.get("system"), str) and values["system"] else []
                return _chat([*system, ("user", asked), ("assistant", values[answer])], where)
        if isinstance(values.get("text"), str):
            return str(values["text"])
    raise BadParameter(f"{where} has neither messages, conversations, instruction and output, nor text. Add one of them.")


def _objects(given: list[Any], where: str) -> list[Mapping[str, Any]]:
    if not all(isinstance(each, Mapping) for each in given):
        raise BadParameter(f"{where} has a message that is no object. Write role and content of each.")
    return given


def _chat(turns: Iterable[tuple[Any, Any]], where: str) -> Messages:
    messages = []
    for role, content in turns:
        role = _ROLES.get(str(role).lower(), str(role).lower())
        if role not in _KNOWN or not isinstance(content, str):
            raise BadParameter(f"{where} has a message that is not a text of system, user or assistant. Correct it.")
        messages.append({"role": role, "content": content})
    if not any(each["role"] == "assistant" and each["content"] for each in messages):
        raise BadParameter(f"{where} has no answer of the assistant, so there is nothing to learn. Add one, or remove it.")
    return messages
