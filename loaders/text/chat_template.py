"""How a conversation becomes the one text that a model was taught to read.

The template comes from the first of: the tokenizer's own (chat_template.jinja or tokenizer_config.json), the
`prompt_template` in the front matter of the folder's README.md (TheBloke's model cards), the model's name, its
architecture. A model with none of them is no chat model. It gets a plain transcript and a label that says so.
"""

import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core import thinking
from ...core.chat import Message
from ...core.errors import BadFile, BadParameter
from ...core.folder_files import printable, read_json, read_text
from ...core.tools import Tool
from ...hub.model_card import read_model_card
from . import templates_of_2023, tool_formats, tool_prompts
from .built_in_templates import BUILT_IN, BY_ARCHITECTURE, BY_MODEL_CARD, BY_NAME, OWN, PLAIN, PLAIN_JINJA, is_jinja, labelled
from .content_parts import in_parts, marked
from .message_order import orders, without_empty_end
from .renderers import LimitedRenderer, OwnRenderer, Renderer, Task, TemplateFault, TemplateLimit, one_call
from .tool_formats import CHANNELS_END, MISTRAL, ToolFormat

log = logging.getLogger(__name__)

_FOLDERS = "the model's own"  # name of the template that a folder brings
_MOST_OWN = 200_000  # characters
_MOST_OF_FOLDER = 1_000_000  # the longest known has 30,000
_MOST_NOTES = 20
_README_BYTES = 2_000_000
_SHOWN_NAMES, _SHOWN_NAME = 8, 40  # names of templates in a sentence, and their characters
_TRIAL_S = 1.0  # for all conversations that a template is tried on when a model is loaded


@dataclass(frozen=True)
class Shown:
    text: str
    has_skill: bool  # the template showed the tools itself


@dataclass(frozen=True)
class ChatTemplate:
    jinja: str
    name: str  # "ChatML", or "the model's own"
    source: str  # where it was found: "chat_template.jinja", "the model card" …
    stop: tuple[str, ...] = ()  # role markers: text that means the model speaks for somebody else
    stop_ids: tuple[int, ...] = ()  # the same where they are special tokens
    is_chat: bool = True  # False: the model was not taught to chat
    note: str = ""  # what the user should know about it
    tool_jinja: str = ""  # another template, for chats with tools
    parts: bool = False  # it shows messages only as lists of parts, as models that see pictures have them
    renderer: Renderer = field(default_factory=OwnRenderer, repr=False, compare=False)
    _noted: set[str] = field(default_factory=set, repr=False, compare=False)  # what the log has

    @property
    def is_of_folder(self) -> bool:
        """Whether it is the template that the model's folder brings."""
        return self.name == _FOLDERS

    @property
    def is_quick(self) -> bool:
        """Whether rendering never waits: the template is ours, not the folder's."""
        return self.renderer.is_quick

    @property
    def warning(self) -> str:
        """What to say before the first answer, "" if nothing: why the folder's template is not used, or that there is none."""
        return self.note or ("" if self.is_chat else "It is not a chat model; it gets a plain transcript.")

    def render(self, messages: Sequence[Message], tokenizer: Any = None) -> str:
        """The prompt for the next assistant message, as `show` makes it."""
        return self.show(messages, tokenizer).text

    def show(
        self,
        messages: Sequence[Message],
        tokenizer: Any = None,
        tools: Sequence[Tool] = (),
        options: Mapping[str, Any] | None = None,
    ) -> "Shown":
        """The prompt for the next assistant message; one that ends in an assistant's message is continued.

        The template is given the chat as it is. One that refuses it gets the same words in fewer messages, until user and
        assistant alternate; one that knows no tools gets them in the system prompt. `options` are more values for the
        template, by name. Takes two seconds at most. Raises
        BadParameter if the template cannot show the conversation.
        """
        with one_call():
            return self._show(marked(messages), tokenizer, tools, options or {})

    def whole(self, messages: Sequence[dict[str, Any]], tokenizer: Any) -> str:
        """A finished conversation, given as a data set has it. Raises TemplateFault, TemplateLimit."""
        with one_call():
            return self.renderer.render(
                Task(self.jinja, in_parts(messages, self.parts), _tokens(tokenizer), False, is_whole=True)
            )

    def _show(self, messages: Sequence[Message], tokenizer: Any, tools: Sequence[Tool], options: Mapping[str, Any]) -> Shown:
        first: TemplateFault | None = None
        try:
            for at, (task, has_skill) in enumerate(self._tasks(messages, _tokens(tokenizer), tools)):
                try:
                    task = replace(task, options=options)
                    text = self.renderer.render(task)
                except TemplateFault as fault:
                    first = first or fault
                    continue
                if has_skill and not self._shows(tools, text, task):
                    continue  # it names `tools` and does not show these
                if at and first is not None:
                    self._note(str(first))
                return Shown(text, has_skill)
            raise first or TemplateFault("there is no message")
        except (TemplateFault, TemplateLimit) as error:
            raise BadParameter(
                f"The chat template of this model ({self.name}) cannot show this conversation: {error}. "
                "Choose another template in the Chat tab."
            ) from None

    def _tasks(self, messages: Sequence[Message], tokens: dict[str, str], tools: Sequence[Tool]) -> Iterator[tuple[Task, bool]]:
        """What to try, in order; and whether the template itself is given the tools."""
        messages = without_empty_end(messages)
        calls = any(each.tool_calls for each in messages)
        uses_tools = bool(tools) or tool_prompts.uses_tools(messages)
        if uses_tools and self.tool_format is not None:
            shown = tuple(each.described() for each in tools)
            alone = orders(tool_prompts.one_by_one(messages)) if any(len(each.tool_calls) > 1 for each in messages) else ()
            together = () if alone and self.tool_format.is_channels else orders(messages)  # GPT-OSS's shows the first call only
            short, named = self.tool_format is MISTRAL, self.tool_format.ids
            for order in (*together, *alone):
                for as_text in (False, True) if calls else (False,):
                    chat = tool_prompts.as_given(order, arguments_as_text=as_text, short_ids=short, named_ids=named)
                    chat = in_parts(chat, self.parts)
                    yield Task(self.tool_jinja or self.jinja, chat, tokens, _is_continued(order), shown), True
        for order in orders(tool_prompts.described(messages, tools) if uses_tools else messages):
            chat = in_parts([{"role": each.role, "content": each.text} for each in order], self.parts)
            yield Task(self.jinja, chat, tokens, _is_continued(order)), False

    def _shows(self, tools: Sequence[Tool], text: str, task: Task) -> bool:
        """Whether a rendered text has the tools; earlier calls have their names, too."""
        if not all(each.name in text for each in tools):
            return False
        if not tools or not any(each.get("tool_calls") for each in task.chat):
            return True
        try:
            return self.renderer.render(replace(task, tools=())) != text
        except TemplateFault:
            return True

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model was taught to write calls; None if its template teaches none that is known here."""
        jinja = self.tool_jinja or self.jinja
        return tool_formats.of_template(jinja) if tool_prompts.knows_tools(jinja) else None

    @property
    def channels(self) -> ToolFormat | None:
        """Its format, where the model writes every answer in channels (GPT-OSS)."""
        format = self.tool_format if "<|channel|>" in self.jinja else None
        return format if format is not None and format.is_channels else None

    @cached_property
    def thought_marks(self) -> tuple[str, ...]:
        """The marks around what the model thinks before it answers; empty for one that was not taught to think aloud."""
        return thinking.marks_in(self.jinja + self.tool_jinja)

    def _note(self, why: str) -> None:
        if why not in self._noted and len(self._noted) < _MOST_NOTES:
            self._noted.add(why)
            log.info("the chat template (%s) refuses such a chat (%s): its messages were folded", self.name, why)

    def bound(self, tokenizer: Any) -> "ChatTemplate":
        """With the role markers of this template as this tokenizer sees them."""
        if self.channels is not None:  # what is between two messages is between two channels of one answer, too
            special = _special_tokens(tokenizer)
            return replace(self, stop=(), stop_ids=tuple(special[each] for each in CHANNELS_END if each in special))
        stop, ids = _markers(self, tokenizer)
        return replace(self, stop=stop, stop_ids=ids)

    def close(self) -> None:
        """End the processes that it was rendered in. It can be used again."""
        self.renderer.close()


def find(folder: Path, tokenizer: Any, architecture: str) -> ChatTemplate:
    """The template of a model folder. Its `source` says where it came from, its `note` why the folder's own is not used."""
    own, why = _own(folder, tokenizer)
    if own is not None:
        return own.bound(tokenizer)
    found = _other(folder, tokenizer, architecture)
    return replace(found, note=f"{why} {found.name} is used instead." if why else "").bound(tokenizer)


def _own(folder: Path, tokenizer: Any) -> tuple[ChatTemplate | None, str]:
    """(the template that the folder brings, None if it cannot be used; then a sentence that says why, "" without one)."""
    given = getattr(tokenizer, "chat_template", None)
    note, tool_jinja = "", ""
    if isinstance(given, dict):
        known = {name: text for name, text in given.items() if isinstance(text, str) and text}
        name = "default" if "default" in known else next(iter(known), "")
        given, tool_jinja = known.get(name), known.get("tool_use", "")
        if given and name != "default":
            names = ", ".join(printable(each)[:_SHOWN_NAME] for each in list(known)[:_SHOWN_NAMES])
            more = f" and {len(known) - _SHOWN_NAMES} more" if len(known) > _SHOWN_NAMES else ""
            note = f"The folder has chat templates called {names}{more}, and none called default: "
            note += f"{printable(name)[:_SHOWN_NAME]} is used."
    source = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
    if not given:  # of the processor of a model that sees pictures
        source = "chat_template.json"
        try:
            given = read_json(folder / source).get("chat_template")
        except BadFile as error:
            return None, str(error)
    if not isinstance(given, str) or not given:
        return None, ""
    if max(len(given), len(tool_jinja)) > _MOST_OF_FOLDER:
        return None, f"The chat template of the folder ({source}) has more than {_MOST_OF_FOLDER:,} characters."
    template = ChatTemplate(given, _FOLDERS, source, note=note, tool_jinja=tool_jinja, renderer=LimitedRenderer())
    if problem := _problem(template, tokenizer):
        in_parts_only = replace(template, parts=True)
        if not _problem(in_parts_only, tokenizer):
            return in_parts_only, ""
        template.close()
        return None, f"The chat template of the folder ({source}) cannot be used: {problem}."
    return template, ""


def _problem(template: ChatTemplate, tokenizer: Any) -> str:
    """Why a template is no use, tried on a few conversations; "" if it is.

    The words are random, so that no template can recognise the trial.
    """
    try:
        template.renderer.start()
    except TemplateLimit as error:
        return str(error)
    until = time.monotonic() + _TRIAL_S
    words = [f"{secrets.choice(('What', 'How', 'Why'))} {secrets.token_hex(4)}?" for _ in range(5)]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(words)]
    system = {"role": "system", "content": secrets.token_hex(4)}
    for chat in (turns[:1], turns[:2], turns[:3], turns, [system, *turns[:1]]):
        try:
            shown = in_parts(chat, template.parts)
            task = Task(template.jinja, shown, _tokens(tokenizer), chat[-1]["role"] == "assistant")
            text = template.renderer.render(task, max(0.1, until - time.monotonic()))
        except TemplateLimit as error:
            count = "one message" if len(chat) == 1 else f"{len(chat)} messages"
            return f"{error}, for {count}"
        except TemplateFault as error:
            if len(chat) == 1:
                return f"it cannot show one message ({error})"
            continue  # many refuse a system prompt, or an answer that is continued
        if len(chat) == 1 and not text.strip():
            return "its prompt for one message is empty"
        if len(chat) == 1 and words[0] not in text:
            return "its prompt for one message does not contain the message"
    return ""


def _other(folder: Path, tokenizer: Any, architecture: str) -> ChatTemplate:
    """The template that the model card, the name or the architecture of a folder point to."""
    if text := model_card_template(folder):
        return from_model_card(text)
    if of_2023 := templates_of_2023.of_folder(folder, tokenizer, architecture):
        return ChatTemplate(*of_2023, "the model's architecture")
    name = folder.name.lower()
    for pattern, built_in in BY_NAME:
        if re.search(pattern, name):
            return named(built_in, "the model's name")
    if architecture in BY_ARCHITECTURE and re.search(r"chat|instruct", name):
        return named(BY_ARCHITECTURE[architecture], "the model's architecture")
    return ChatTemplate(PLAIN_JINJA, PLAIN, "none found: not a chat model", is_chat=False)


def require_usable(template: ChatTemplate, tokenizer: Any) -> None:
    """Raises BadParameter for a template that cannot show the simplest conversation; takes a second at most."""
    if problem := _problem(template, tokenizer):
        template.close()
        raise BadParameter(f"This chat template cannot be used: {problem}. Correct it, or choose another one.")


def named(name: str, source: str = "your choice") -> ChatTemplate:
    """A built-in template by its name, or the text of a Jinja template. Raises BadParameter if there is none."""
    if is_jinja(name):
        if len(name) > _MOST_OWN:
            raise BadParameter(f"The chat template has {len(name):,} characters; {_MOST_OWN:,} are the limit. Shorten it.")
        return ChatTemplate(name, OWN, source, renderer=LimitedRenderer())
    if name == PLAIN:
        return ChatTemplate(PLAIN_JINJA, PLAIN, source, is_chat=False)
    if name not in BUILT_IN:
        raise BadParameter(f"There is no chat template called {name!r}. There are: {', '.join(BUILT_IN)}.")
    return ChatTemplate(BUILT_IN[name], name, source)


def model_card_template(folder: Path) -> str | None:
    """`prompt_template` from the front matter of README.md, None if there is none."""
    try:
        template = read_model_card(read_text(folder / "README.md", _README_BYTES)).front.get("prompt_template")
    except (OSError, BadFile):
        return None  # a model card that cannot be read has no template
    return template if isinstance(template, str) and "{prompt}" in template else None


def from_model_card(text: str) -> ChatTemplate:
    """A model card's `… {prompt} …` as a template for whole conversations."""
    for marks, built_in in BY_MODEL_CARD:
        if all(mark in text for mark in marks):
            return named(built_in, "the model card")
    before, _, after = text.partition("{prompt}")
    before = before.removeprefix("<s>")
    head, cut, user = before.rstrip("\n").rpartition("\n")
    user = (user if cut else before.rstrip("\n")) + before[len(before.rstrip("\n")) :]
    head = (head + cut).replace("{system_message}", "{s}")
    answer = after.lstrip()
    between = after[: len(after) - len(answer)]
    default = "" if "{s}" in head else head.strip()
    system = head if "{s}" in head else "{s}\n\n"
    return ChatTemplate(labelled(system, user, answer, between, default), "the model card's own", "the model card")


def _is_continued(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls


def _tokens(tokenizer: Any) -> dict[str, str]:
    """Special tokens by name, as templates call them."""
    special = getattr(tokenizer, "special_tokens_map", None) or {}
    tokens = {name: value for name, value in special.items() if isinstance(value, str)}
    for name in ("bos_token", "eos_token"):
        tokens.setdefault(name, str(getattr(tokenizer, name, "") or ""))
    return {name: str(value) for name, value in tokens.items()}


def _markers(template: ChatTemplate, tokenizer: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What is between the messages of a probe conversation: there the model must stop."""
    probe = [Message(role, f"Q{secrets.token_hex(4)}") for role in ("user", "assistant", "user")]
    try:
        text = template.render(probe, tokenizer)
    except BadParameter:
        return (), ()
    if not all(each.text in text for each in probe):
        return (), ()
    _before, after = text.split(probe[1].text, 1)
    gaps = after.split(probe[2].text, 1)
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
