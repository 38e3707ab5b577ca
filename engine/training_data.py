"""Texts that an adapter is trained on: conversations, instructions or plain text out of a file, as token ids.

A conversation is written with the template that the chat uses, and only its answers count in the loss. Kinds of entries (.jsonl,
a line each, or .json, a list): `messages` (role, content), `conversations` (from, value: ShareGPT), `instruction`, `input`,
`output` (Alpaca), `prompt` and `completion`, `text`. A .txt file is plain text.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.chat import Message
from ..core.errors import BadParameter
from ..core.models import LocalModel
from ..core.units import plural
from ..gptq.training_recipe import Example
from ..loaders.text import chat_template
from ..loaders.text.chat_template import ChatTemplate
from ..loaders.text.renderers import TemplateFault, TemplateLimit
from ..loaders.text.token_codec import TokenCodec

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
_KNOWN = ("system", "user", "assistant")
_LARGEST_BYTES = 1 << 30

Messages = list[dict[str, str]]


def read_examples(path: Path, model: LocalModel, tokenizer: Any, length: int, say: Callable[[str], None]) -> list[Example]:
    """The texts of a file, each cut to `length` tokens. `say` hears what was cut or left out, and which template is used.

    Raises BadParameter if the file is missing, damaged or holds nothing to learn.
    """
    codec = TokenCodec(tokenizer)
    template = chat_template.find(model.folder, tokenizer, model.architecture)
    try:
        found = list(_Reader(path, template, codec).examples(length))
    finally:
        template.close()
    cut = sum(len(each.ids) > length for each in found)
    kept = [Example(each.ids[:length], each.learned[:length]) for each in found]
    kept = [each for each in kept if any(each.learned[1:])]
    if not kept:
        raise BadParameter(
            f"{path.name} holds no answer that fits into {length} tokens. Give another file, or a larger cutoff (--length)."
        )
    if cut:
        gone = f", {len(found) - len(kept)} of them left out" if len(kept) < len(found) else ""
        say(f"{cut} of {plural(len(found), 'text')} are longer than {length} tokens and are cut{gone}.")
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
                    yield from self._conversation(entry)
                except (TemplateFault, TemplateLimit, BadParameter) as error:
                    raise BadParameter(f"{where} cannot be shown as a chat: {error} Correct it, or remove it.") from None

    def _entries(self) -> Iterator[tuple[str, str | Messages]]:
        """(where it is, a plain text or a conversation)."""
        path = self._path
        if not path.is_file():
            raise BadParameter(f"There is no file {path}. Give a .jsonl, .json or .txt file.")
        if path.stat().st_size > _LARGEST_BYTES:
            raise BadParameter(f"{path.name} is larger than 1 GiB. Give a part of it.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise BadParameter(f"{path.name} is not text in UTF-8. Save it as UTF-8 and try again.") from None
        if path.suffix not in (".json", ".jsonl"):
            yield path.name, text
            return
        for where, values in self._objects(text):
            yield where, entry_of(values, where)

    def _objects(self, text: str) -> Iterator[tuple[str, Any]]:
        if self._path.suffix == ".json":
            values = _json(text, self._path.name)
            if not isinstance(values, list):
                raise BadParameter(f"{self._path.name} must be a list of entries. Write them in [ ], or a line each into .jsonl.")
            yield from ((f"Entry {at} of {self._path.name}", each) for at, each in enumerate(values, 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"Line {number} of {self._path.name}"
                yield where, _json(line, where)

    def _plain(self, text: str, length: int) -> Iterator[Example]:
        """Pieces of a text, all of which is learned."""
        ids = self._codec.encode(text)
        if self._codec.end_id is not None:
            ids = [*ids, self._codec.end_id]
        for at in range(0, len(ids), length):
            piece = ids[at : at + length]
            yield Example(piece, [True] * len(piece))

    def _conversation(self, messages: Messages) -> Iterator[Example]:
        """One text where the template writes a longer conversation as the shorter one and more, else one for each answer."""
        tokenizer = self._codec.tokenizer
        whole = self._template.whole(messages, tokenizer)
        answers = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        spans = []
        for at in answers:
            before = self._template.render([Message(each["role"], each["content"]) for each in messages[:at]], tokenizer)  # type: ignore[arg-type]
            after = self._template.whole(messages[: at + 1], tokenizer) if at + 1 < len(messages) else whole
            spans.append((before, after))
        found = self._codec.encode_with_offsets(whole)
        if found is not None and all(whole.startswith(before) and whole.startswith(after) for before, after in spans):
            ids, offsets = found
            learned = [False] * len(ids)
            for before, after in spans:
                learned = [was or len(before) <= start < len(after) for was, (start, _end) in zip(learned, offsets, strict=True)]
            yield self._with_bos(ids, learned)
            return
        for at, (before, after) in zip(answers, spans, strict=True):
            head = self._codec.encode(before, bos=False)
            if after.startswith(before):
                tail = self._codec.encode(after[len(before) :], bos=False)
            else:
                end = [self._codec.end_id] if self._codec.end_id is not None else []
                tail = [*self._codec.encode(messages[at]["content"], bos=False), *end]
            yield self._with_bos([*head, *tail], [False] * len(head) + [True] * len(tail))

    def _with_bos(self, ids: list[int], learned: list[bool]) -> Example:
        begun = self._codec.with_bos(ids)
        return Example(begun, [False] * (len(begun) - len(ids)) + learned)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadParameter(f"{where} is not JSON. Each entry must be an object.") from None


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
