"""Jinja as chat templates use it. Also a program: a child process that renders one request a line until its input ends.

Needs jinja2 and nothing else of this package or of transformers, so that the child starts fast and stays small. The
environment is that of transformers.utils.chat_template_utils: a sandbox in which nothing that is given can be changed,
with `raise_exception`, `strftime_now`, `tojson`, loop controls and the tag `generation`.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a message that the model goes on with
_AFTER_S = 5  # processor time that one request may take, in case nobody is left to end the child

_LONGEST_REASON = 300  # characters of what a template says itself
_NO_REASON = "no reason was given"

Chat = list[dict[str, Any]]


def _continued(content: Any) -> Any:
    """The content of a message, a text or a list of parts, with the mark at its end."""
    if isinstance(content, str):
        return content + _CONTINUED
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CONTINUED}]


class OutputTooLong(ValueError):
    pass


class NotContinued(ValueError):
    pass


def render(
    source: str,
    chat: Chat,
    tokens: dict[str, str],
    resume: bool,
    most_characters: int,
    tools: list[Any] | None = None,
    options: dict[str, Any] | None = None,
    is_whole: bool = False,
) -> str:
    """The prompt for the next assistant message; with `resume`, one that ends inside of the last message; with `is_whole`,
    the conversation alone.

    `tokens` are the special tokens by name ("bos_token"), `tools` the functions that the model may
    call, as OpenAI has them; `options` more values for the
    template, like `enable_thinking`. Raises whatever a template raises, OutputTooLong, NotContinued.
    """
    if resume:
        chat = [*chat[:-1], {**chat[-1], "content": _continued(chat[-1]["content"])}]
    own = {"messages": chat, "tools": tools, "add_generation_prompt": not (resume or is_whole), **tokens}
    values = {"documents": None, **(options or {}), **own}
    parts: list[str] = []
    left = most_characters
    for part in _compiled(source).generate(values):
        left -= len(part)
        if left < 0:
            raise OutputTooLong(f"its prompt has more than {most_characters:,} characters")
        parts.append(part)
    text = "".join(parts)
    return _cut(text, _last_text(chat[-1]["content"])) if resume else text


def _last_text(content: Any) -> str:
    text = content if isinstance(content, str) else content[-1]["text"]
    return str(text)


def _cut(text: str, marked: str) -> str:
    """The text up to the mark. A template that trims messages trims the end of this one too."""
    before, found, after = text.rpartition(_CONTINUED.strip())
    if not found or marked.removesuffix(_CONTINUED).strip() not in text:
        raise NotContinued("it does not show the message that is to be continued")
    return before if after.startswith(_CONTINUED[-1]) else before.rstrip()


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _PlainDict(),
        "namespace": _PlainNamespace,
    }
    return environment.from_string(source)


class _Generation(Extension):
    """The tag `generation`, around what an assistant wrote: for training, where it is counted. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja wants it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _PlainDict:
    """`dict` without its class."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)


class _PlainNamespace(jinja2.utils.Namespace):
    """A namespace that takes no underscored names."""

    def __init__(*args: Any, **named: Any) -> None:
        self, values = args[0], dict(*args[1:], **named)
        for name in values:
            _require_plain(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def in_words(error: Exception) -> str:
    """Why a template shows no prompt: its own words where it refuses a conversation, else ours. To stand in a sentence."""
    known: tuple[tuple[type[Exception], str], ...] = (
        (jinja2.exceptions.SecurityError, "it asks for something that no template may use"),
        (RecursionError, "it is nested too deeply, or calls itself without an end"),
        (UnicodeError, "it writes half of a character (a lone surrogate)"),
        (OverflowError, "it counts further than a template may"),
        (ZeroDivisionError, "it divides by zero"),
    )
    text = next((words for kind, words in known if isinstance(error, kind)), "")
    if not text and isinstance(error, jinja2.TemplateSyntaxError):
        text = f"{error.message} (line {error.lineno})"
    elif not text and not isinstance(error, (jinja2.TemplateError, OutputTooLong, NotContinued)):
        text = "it does something with a value that is not possible with one of that kind"
    lines = " ".join((text or str(error)).split())[:_LONGEST_REASON].rstrip()
    lines = lines if lines.endswith("...") else lines.rstrip(". ")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in lines) or _NO_REASON


def main(memory_bytes: int) -> None:
    """Read requests, write answers; JSON, one a line."""
    limit_cpu = _limits(memory_bytes)
    print("{}", flush=True)
    for line in sys.stdin:
        done = limit_cpu()
        try:
            answer = {"text": render(**json.loads(line))}
        except MemoryError:
            answer = {"memory": ""}
        except OutputTooLong as error:
            answer = {"output": str(error)}
        except Exception as error:
            answer = {"error": in_words(error)}
        done()
        print(json.dumps(answer), flush=True)


def _limits(memory_bytes: int) -> Callable[[], Callable[[], None]]:
    """Limit the memory; returns what limits the time of one request."""
    try:
        import resource
    except ImportError:  # Windows
        return _limit_time
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        _soft, hard = resource.getrlimit(getattr(resource, name))
        try:
            resource.setrlimit(getattr(resource, name), (memory_bytes, hard))
        except (OSError, ValueError):  # macOS
            continue

    def limit_cpu() -> Callable[[], None]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + _AFTER_S, hard))
        return lambda: None

    return limit_cpu


def _limit_time() -> Callable[[], None]:
    timer = threading.Timer(_AFTER_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
    return timer.cancel


if __name__ == "__main__":
    main(int(sys.argv[1]))
