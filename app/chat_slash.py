"""The /commands of `gptq-webui chat`. Each is a row of COMMANDS and a method of the same name."""

import difflib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.chat import Finish
from ..core.chat_record import ChatInfo
from ..core.errors import BadParameter
from ..core.params import PRESETS, GenerationParams
from ..core.units import plural
from ..engine import chat_export
from .chat_session import ChatSession

_MOST_LISTED = 20
_EVERYDAY = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")
_ALIASES = {
    "exit": "quit", "q": "quit", "retry": "regenerate", "chats": "list", "models": "model", "?": "help", "parameters": "params",
}  # fmt: skip
COMMANDS = {  # name -> (what follows it, what it does)
    "help": ("", "show this"),
    "model": ("[NAME]", "load another model, or list them"),
    "system": ("[TEXT]", "set the system prompt of this conversation, or show it; - for none"),
    "new": ("", "begin a new conversation"),
    "list": ("[WORDS]", "list conversations, or those with these words"),
    "open": ("N or WORDS", "go on with a conversation of /list, or the latest with these words"),
    "show": ("", "show this conversation"),
    "edit": ("[TEXT]", "ask the last question again with another text"),
    "regenerate": ("", "answer the last question again; both answers are kept"),
    "continue": ("", "go on with the last answer"),
    "version": ("[N]", "show version N of the last answer (default: the one before)"),
    "delete": ("[N or chat]", "delete the last question and its answer; conversation N of /list; this conversation"),
    "undo": ("", "take back the last deletion"),
    "params": ("[NAME VALUE …]", "change parameters, or show them; a preset's name, or reset"),
    "save": ("[FILE]", "write this conversation: .md, .json, .jsonl (SillyTavern), .tgwui.json"),
    "quit": ("", "leave"),
}
_BY_ENDING = {ending: name for name, (ending, _write) in sorted(chat_export.FORMATS.items(), key=lambda each: len(each[1][0]))}


class Quit(Exception):
    """The user leaves."""


class SlashCommands:
    """Runs one line that begins with "/". Texts go to stderr, answers where answers go."""

    def __init__(self, session: ChatSession, load: Callable[[str], None], read: Callable[[str, str], str]) -> None:
        """`load` loads a model by name; `read(prompt, text)` lets the user edit a text."""
        self._session, self._load, self._read = session, load, read
        self._listed: Sequence[ChatInfo] = ()

    def run(self, line: str) -> Finish | None:
        """Returns the Finish of a command that answers. Raises GptqWebuiError, Quit."""
        name, _space, rest = line[1:].partition(" ")
        name = _ALIASES.get(name, name)
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            guess = f" Did you mean /{near[0]}?" if near else " /help lists them."
            raise BadParameter(f"There is no command /{name}.{guess} To send a text that begins with /, write // first.")
        found: Finish | None = getattr(self, f"_{name}")(rest.strip())
        return found

    def complete(self, typed: str) -> Sequence[str]:
        """What a beginning of a command may become; for /model the names of the models."""
        if typed.startswith("/model "):
            return [f"/model {each}" for each in self._models() if each.startswith(typed[7:])]
        return [f"/{each}" for each in COMMANDS if f"/{each}".startswith(typed)] if typed.startswith("/") else []

    # --- the commands ------------------------------------------------------------------------------

    def _help(self, rest: str) -> None:
        for name, (usage, what) in COMMANDS.items():
            _say(f"  {f'/{name} {usage}':<26} {what}")
        _say("  Enter sends, Alt+Enter begins a new line. Ctrl+C stops an answer, Ctrl+D leaves.")

    def _model(self, rest: str) -> None:
        if rest:
            self._load(rest)
            return
        loaded = self._session.engine.loaded
        for each in self._models():
            _say(f"{'*' if loaded is not None and loaded.model.name == each else ' '} {each}")
        if not self._models():
            _say("There is no model yet: gptq-webui download owner/name:branch")

    def _system(self, rest: str) -> None:
        if rest:
            self._session.set(system="" if rest == "-" else rest)
        _say(f"System prompt: {self._session.info.system or 'none'}")

    def _new(self, rest: str) -> None:
        self._session.new()
        _say("New conversation.")

    def _list(self, rest: str) -> None:
        self._listed = self._session.store.listed(self._session.owner, rest)[:_MOST_LISTED]
        for at, each in enumerate(self._listed, 1):
            _say(f"{at:3}  {_ago(each.changed)}  {each.title or '(no title)'}")
        if not self._listed:
            _say("There is no conversation with these words." if rest else "There is no conversation yet.")

    def _open(self, rest: str) -> None:
        self._session.open(self._found(rest).id)
        self.show_latest()

    def _show(self, rest: str) -> None:
        for each in self._session.path:
            version = f" ({each.version}/{each.versions})" if each.versions > 1 else ""
            print(f"{'You' if each.role == 'user' else 'Model'}{version}: {each.text}\n")

    def _edit(self, rest: str) -> Finish | None:
        question = self._session.last_question
        if not rest and question is not None:
            rest = self._read("edit> ", question.text).strip()
        return self._session.edit(rest) if rest or question is None else None

    def _regenerate(self, rest: str) -> Finish | None:
        return self._session.regenerate()

    def _continue(self, rest: str) -> Finish | None:
        return self._session.go_on()

    def _version(self, rest: str) -> None:
        last = self._session.path[-1] if self._session.path else None
        if last is None or last.versions < 2:
            raise BadParameter("The last message has one version only. /regenerate makes another.")
        if rest and not rest.isdecimal():
            raise BadParameter(f"{rest!r} is not a number. The last message has versions 1 to {last.versions}.")
        wanted = int(rest) if rest else (last.version - 2) % last.versions + 1
        if not 1 <= wanted <= last.versions:
            raise BadParameter(f"There is no version {wanted}. The last message has versions 1 to {last.versions}.")
        self._session.store.show_version(self._session.owner, self._session.info.id, last.id, wanted - last.version)
        self.show_latest()

    def _delete(self, rest: str) -> None:
        if not rest:
            deleted = self._session.delete_turn()
            _say(
                "The last question and its answer are deleted. /undo brings them back."
                if deleted
                else "There is no question yet."
            )
            return
        found = self._session.info if rest == "chat" else self._numbered(rest)
        self._session.delete_chat(found.id)
        _say(f"Deleted: {found.title or '(no title)'}. /undo brings it back.")

    def _undo(self, rest: str) -> None:
        undone = self._session.undo()
        _say(f"Taken back: {undone}." if undone else "There is nothing to take back.")

    def _params(self, rest: str) -> None:
        words = rest.replace("=", " ").split()
        presets = {name.lower(): values for name, values in PRESETS.items()}
        if rest.lower() == "reset":
            self._session.reset_params()
        elif rest.lower() in presets:
            self._session.change_params({name: value for name, _row, value in GenerationParams.table(presets[rest.lower()])})
        elif words:
            self._session.change_params(_read_params(words))
        now = self._session.params()
        for name, row, value in GenerationParams.table(now):
            if name in _EVERYDAY or value != getattr(GenerationParams(), name):
                _say(f"  {name:<20} {'random' if name == 'seed' and value is None else value!s:<8}  {row.help}")

    def _save(self, rest: str) -> None:
        if self._session.is_new:
            raise BadParameter("There is nothing to save yet.")
        ending = next((each for each in sorted(_BY_ENDING, key=len, reverse=True) if rest.lower().endswith(each)), "")
        if rest and not ending:
            raise BadParameter(f"{rest!r} has no known ending. There are: {', '.join(_BY_ENDING)}.")
        name, text = chat_export.write(
            self._session.store, self._session.owner, self._session.info.id, _BY_ENDING[ending or ".md"]
        )
        path = Path(rest).expanduser() if rest else _free_name(Path(name))
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise BadParameter(f"{path} exists already. Choose another name.") from None
        except OSError as error:
            raise BadParameter(f"{path} cannot be written ({error.strerror}). Choose another place.") from None
        _say(f"Saved: {path.absolute()}")

    def _quit(self, rest: str) -> None:
        raise Quit

    # --- inside ------------------------------------------------------------------------------------

    def show_latest(self) -> None:
        """The title and the last question with its answer."""
        path = self._session.path
        _say(f"{self._session.info.title or '(no title)'} ({plural(len(path), 'message')}; /show shows all)")
        for each in path[-2:]:
            print(f"{'You' if each.role == 'user' else 'Model'}: {each.text}\n")

    def _found(self, rest: str) -> ChatInfo:
        """By its number in /list, or the latest with these words."""
        if rest.isdecimal():
            return self._numbered(rest)
        return find(self._session, rest)

    def _numbered(self, rest: str) -> ChatInfo:
        if not self._listed:
            self._listed = self._session.store.listed(self._session.owner)[:_MOST_LISTED]
        if not rest.isdecimal() or not 1 <= int(rest) <= len(self._listed):
            raise BadParameter(f"There is no conversation {rest!r}. /list shows their numbers, 1 to {len(self._listed)}.")
        return self._listed[int(rest) - 1]

    def _models(self) -> list[str]:
        return [each.name for each in self._session.engine.library.models() if each.is_packed or each.kind in ("plain", "remote")]


def find(session: ChatSession, words: str) -> ChatInfo:
    """The conversation of this id, or the latest with these words. Raises BadParameter."""
    if not words:
        raise BadParameter("Name a conversation: its number in /list, or words that are in it.")
    found = session.store.listed(session.owner)
    by_id = [each for each in found if each.id == words]
    hits = by_id or sorted(session.store.listed(session.owner, words), key=lambda each: -each.changed)
    if not hits:
        raise BadParameter(f"There is no conversation with {words!r} in it. Look into /list.")
    return hits[0]


def _read_params(words: Sequence[str]) -> dict[str, Any]:
    """`temperature 0.2 top_p 1` as values. Raises BadParameter."""
    names = [name for name, _row, _default in GenerationParams.table()]
    found: dict[str, Any] = {}
    for name, value in zip(words[::2], [*words[1::2], *([""] if len(words) % 2 else [])], strict=True):
        known = name.replace("-", "_")
        if known not in names:
            near = difflib.get_close_matches(known, names, 1)
            raise BadParameter(
                f"There is no parameter {name}." + (f" Did you mean {near[0]}?" if near else " /params lists them.")
            )
        if not value:
            raise BadParameter(f"The value of {name} is missing: /params {name} VALUE.")
        try:
            found[known] = json.loads(value)
        except ValueError:
            found[known] = None if value in ("none", "random") else value
    return found


def _free_name(path: Path) -> Path:
    found, at = path, 2
    while found.exists():
        found, at = path.with_name(f"{path.stem} {at}{path.suffix}"), at + 1
    return found


def _ago(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
