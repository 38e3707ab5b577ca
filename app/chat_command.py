"""`gptq-webui chat`: in a terminal with history and /commands, from a pipe one answer for each line.

Answers go to stdout, everything else to stderr.
"""

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..core.errors import BadParameter, GptqWebuiError, LoadCancelled, NoSuchModel, NotLoaded
from ..core.params import PRESETS, GenerationParams
from ..engine.chat_service import ChatService
from ..engine.chat_store import ChatStore
from ..engine.engine import Engine
from .chat_input import Reader, first_interrupt
from .chat_session import ChatSession
from .chat_slash import Quit, SlashCommands, find
from .engine_commands import StatusLine, finish_as_json, load_model, load_options, loading_line, make_engine, params_of, summary
from .exit_codes import DONE, INTERRUPTED, OTHER
from .markdown_writer import PlainWriter, Writer, writer

_TWICE_S = 1.0  # a Ctrl+C so soon after the one that stopped an answer is its second


def chat(options: argparse.Namespace) -> int:
    """Raises GptqWebuiError for what is wrong before the first question."""
    given = params_of(options)
    interactive = sys.stdin.isatty()
    if options.json and interactive:
        raise BadParameter("--json is for questions from a pipe: echo QUESTION | gptq-webui chat --json.")
    engine = make_engine(options)
    chats = ChatService(engine, ChatStore(Path(":memory:")) if options.forget else None)
    try:
        make_writer: Callable[[], Writer] = _Silent if options.json else PlainWriter
        if interactive:
            make_writer = lambda: writer(options.plain)  # noqa: E731
        usual = {name: value for name, _row, value in GenerationParams.table(PRESETS["Precise"])} if options.demo else {}
        line = StatusLine() if interactive else None
        session = ChatSession(chats, options.user, {**usual, **given}, make_writer, line)
        _open(session, options)
        return _Terminal(session, options).run() if interactive else _pipe(session, options)
    finally:
        chats.close()
        engine.unload()


def _open(session: ChatSession, options: argparse.Namespace) -> None:
    if options.go_on:
        if not (found := session.store.listed(session.owner)):
            raise BadParameter("There is no conversation to continue yet. Start one without --continue.")
        session.open(max(found, key=lambda each: each.changed).id)
    elif options.open:
        session.open(find(session, options.open).id)
    if options.system is not None:
        session.set(system=options.system)


def _load(engine: Engine, load: Callable[[], object]) -> None:
    """Load while the status line shows how far it is; Ctrl+C stops it. Raises GptqWebuiError, KeyboardInterrupt."""
    line, errors = StatusLine(), []

    def run() -> None:
        try:
            load()
        except GptqWebuiError as error:
            errors.append(error)

    watcher = lambda status: line.show(loading_line(status))  # noqa: E731
    engine.slot.watchers.append(watcher)
    thread = threading.Thread(target=run, name="gptq-webui load", daemon=True)
    try:
        with first_interrupt(engine.cancel_load):
            thread.start()
            while thread.is_alive():
                thread.join(0.2)
    finally:
        engine.slot.watchers.remove(watcher)
        line.end()
    if errors:
        raise errors[0]


def _pipe(session: ChatSession, options: argparse.Namespace) -> int:
    """One answer for each line; the conversation goes on from line to line."""
    try:
        _load(session.engine, lambda: load_model(session.engine, options))
    except LoadCancelled:
        return INTERRUPTED
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    code = DONE
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            finish = session.ask(line.rstrip("\r\n"))
        except GptqWebuiError as error:
            code = OTHER
            print(f"gptq-webui: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
            continue
        if options.json:
            print(json.dumps({"answer": session.last_text, **finish_as_json(finish)}), flush=True)
        if finish.reason == "cancelled":
            return INTERRUPTED
    return code


class _Silent:
    """With --json an answer is shown when it is complete."""

    def add(self, text: str) -> None:
        pass

    def end(self) -> None:
        pass


class _Terminal:
    """Reads lines until the user leaves."""

    def __init__(self, session: ChatSession, options: argparse.Namespace) -> None:
        self._session, self._options = session, options
        self._commands = SlashCommands(session, self._load_named, self._read_text)
        self._reader = Reader(self._commands.complete, keep_history=not options.forget)
        self._stopped_at = -math.inf  # when an answer was stopped, on time.monotonic()

    def run(self) -> int:
        try:
            self._load_first()
        except LoadCancelled as error:
            _say(str(error))
            return INTERRUPTED
        if not self._session.is_new:
            self._commands.show_latest()
        text, interrupted = "", False
        while True:
            try:
                line, text = self._reader.read(text=text).strip(), ""
            except EOFError:
                print(file=sys.stderr)
                return DONE
            except KeyboardInterrupt:
                if interrupted or time.monotonic() - self._stopped_at < _TWICE_S:
                    return INTERRUPTED
                interrupted = True
                _say("Ctrl+C once more, or Ctrl+D, leaves.")
                continue
            interrupted = False
            try:
                text = self._do(line) if line else ""
            except Quit:
                return DONE
            except KeyboardInterrupt:  # the second one during an answer
                return INTERRUPTED

    def _do(self, line: str) -> str:
        """Obey a command or ask the model. Returns the text that shall stand on the next line."""
        is_command = line.startswith("/") and not line.startswith("//")
        try:
            finish = self._commands.run(line) if is_command else self._session.ask(line[1:] if line[:2] == "//" else line)
        except NotLoaded:
            _say("No model is loaded. /model lists the models, /model NAME loads one.")
        except LoadCancelled:
            _say("The load was stopped.")
        except GptqWebuiError as error:
            _say(str(error))
        else:
            if finish is not None:
                if finish.reason == "cancelled":
                    self._stopped_at = time.monotonic()
                _say(("Stopped. " if finish.reason == "cancelled" else "") + summary(finish))
            return ""
        return "" if is_command else line

    def _read_text(self, prompt: str, text: str) -> str:
        """A text for a command, "" if the user gives it up."""
        try:
            return self._reader.read(prompt, text)
        except (EOFError, KeyboardInterrupt):
            return ""

    def _load_first(self) -> None:
        engine = self._session.engine
        try:
            _load(engine, lambda: load_model(engine, self._options))
        except NoSuchModel as error:
            if self._options.model:
                raise
            _say(f"{str(error).replace('--model NAME', '/model NAME')}")
            return
        self._welcome()

    def _load_named(self, name: str) -> None:
        engine, options = self._session.engine, self._options
        engine.library.get(name)  # a misspelt name does not unload the model that is loaded
        _load(engine, lambda: engine.load(name, options.loader, load_options(options)))
        self._welcome()

    def _welcome(self) -> None:
        loaded = self._session.engine.loaded
        if loaded is not None:
            said = f"{loaded.model.name}, context {loaded.context_tokens} tokens. /help lists the commands."
            _say(f"{said} {loaded.template.warning}".strip())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
