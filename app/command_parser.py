"""The parser of the command line: which word is the command, and the nearest name for a misspelt one."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .exit_codes import HELP, USAGE

_ASKED = ("-h", "--help", "--version")


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and names the nearest option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"epilog": HELP, **settings})

    def error(self, message: str) -> NoReturn:
        sentence = message if message.endswith((".", "?")) else f"{message}."
        self.exit(USAGE, f"{self.prog}: {sentence}\n`{self.prog} --help` lists the options.\n")

    def unknown(self, words: Sequence[str], commands: Sequence[str]) -> NoReturn:
        """End the program: these words have no meaning here."""
        for word in words:
            if word.startswith("-"):
                known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
                self.error(f"there is no option {word.partition('=')[0]}.{_nearest(word.partition('=')[0], known)}")
        command = next((word for word in words if word in commands), "")
        if command:
            self.error(f"the command comes first: gptq-webui {command} … (only --models-dir and -v may stand before it)")
        many = "these words have" if len(words) > 1 else "this word has"
        self.error(f"{many} no meaning here: {' '.join(words)}. Put a text of several words into quotation marks")


def parse(parser: CommandParser, by_command: dict[str, CommandParser], given: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """(command, its options). Ends the program with exit code 2 for what it does not understand."""
    words = _command_first(list(given), tuple(by_command))
    if words[0] not in by_command and words[0] not in _ASKED:
        if not words[0].startswith("-"):
            folder = f" For a folder of models: gptq-webui --models-dir {words[0]}." if Path(words[0]).is_dir() else ""
            parser.error(f"there is no command {words[0]!r}.{_nearest(words[0], tuple(by_command))}{folder}")
        words.insert(0, "serve")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        by_command[words[0]].unknown(unknown, tuple(by_command))
    return words[0], options


def _command_first(words: list[str], commands: Sequence[str]) -> list[str]:
    """`--models-dir a b COMMAND …` as `COMMAND --models-dir=a --models-dir=b …`; other words as they are.

    The first word after --models-dir is a folder whatever its name is. `serve` where there is nothing.
    """
    moved, at = [], 0
    while at < len(words):
        if words[at] in ("-v", "--verbose") or words[at].startswith("--models-dir="):
            moved.append(words[at])
            at += 1
        elif words[at] == "--models-dir" and at + 1 < len(words):
            at += 1
            first = at
            while at < len(words) and not words[at].startswith("-") and (at == first or words[at] not in commands):
                moved.append(f"--models-dir={words[at]}")
                at += 1
            if at == first:
                return words
        else:
            break
    if moved and at < len(words) and words[at] in commands:
        return [words[at], *moved, *words[at + 1 :]]
    return words or ["serve"]


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f" Did you mean {found[0]}?" if found else ""


def add_models(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """With `several`, more than one folder may follow one flag. Only for commands that have no other positional argument."""
    action: dict[str, Any] = {"action": "extend", "nargs": "+"} if several else {"action": "append"}
    parser.add_argument(
        "--models-dir", type=Path, metavar="DIR", help="folders with models; downloads go into the first", **action
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show more on the terminal")


def add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remote",
        action="append",
        metavar="URL",
        help="also use the models of this engine on another machine (vLLM, TGI …); repeat it for engines that share the work",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    add_remote(parser)
    parser.add_argument("--dtype", type=_dtype, help="number format for computing: auto, fp16, bf16, fp32")
    parser.add_argument("--loader", metavar="NAME", help="open the model with this loader, for example transformers")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="context length (default: what fits, up to 8192)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write the result as JSON on stdout")


def _dtype(text: str) -> str:
    """TGI's float16 is our fp16."""
    name = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(text, text)
    if name not in ("auto", "fp16", "bf16", "fp32"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from auto, fp16, bf16, fp32")
    return name
