"""Finds what a model thought before it answered, by the marks of today's reasoning models.

An opening mark counts at the beginning of a line and outside of fenced code; elsewhere it is a word that somebody writes
about. Some templates open the thought in the prompt: the answer then holds the closing mark alone.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_CLOSING = {  # by the opening mark; from the models' chat templates
    "<think>": "</think>",  # DeepSeek R1, Qwen3, GLM, MiniMax …
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<longcat_think>": "</longcat_think>",
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel|>analysis<|message|>": "<|end|>",  # GPT-OSS
    "<|channel|>commentary<|message|>": "<|end|>",
}
_PLAIN = {opening: closing for opening, closing in _CLOSING.items() if "channel|>" not in opening or closing == "<channel|>"}
_LONGEST_MARK = max(len(each) for pair in _CLOSING.items() for each in pair)
_AROUND = re.compile(  # around what is said, and no part of it
    r"<\|start\|>assistant|<\|channel\|>final(?: ?<\|constrain\|>\w+)?<\|message\|>|<\|return\|>"
    r"|<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>"
)


def _any_of(marks: Sequence[str]) -> str:
    return "|".join(re.escape(each) for each in marks)


_MARK = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})"
    rf"|(?:^[ \t]*|(?<=[>\]▷])\s*|(?<=<\|start\|>assistant))(?P<opening>{_any_of(list(_CLOSING))})"
    rf"|(?<![`'\"])(?P<closing>{_any_of([each for each in _CLOSING.values() if each != '<|end|>'])})",
    re.M,
)
_HINT = re.compile("|".join(("think", "THINK", "hought", "easoning", r"\|>", r"\|channel>", "channel", "inner_")))


@dataclass(frozen=True)
class Part:
    """A piece of an answer."""

    text: str
    is_thought: bool = False
    is_open: bool = False  # a thought that has not ended


def marks_in(template: str) -> tuple[str, ...]:
    """The marks around thoughts that a chat template names: its model thinks aloud. Channels have a reader of their own."""
    return tuple(each for pair in _PLAIN.items() if pair[0] in template or pair[1] in template for each in pair)


def begun_by(prompt: str) -> bool:
    """Whether a prompt ends inside of a thought, so that the answer begins with it."""
    return prompt.rstrip().endswith(tuple(_CLOSING))


class ThoughtTimer:
    """How long an answer thinks before it says something, told from its text as it grows. A look costs what is new in it."""

    def __init__(self, before: str = "", *, begun: bool = False, seconds: float | None = None) -> None:
        """`begun`: the prompt opened a thought. `before` is the beginning that is continued, which took `seconds` to think."""
        self.seconds = seconds  # None: it has not thought
        self._begun, self._read = begun, len(before)
        self._earlier_s = seconds or 0.0
        self._since: float | None = None
        parts = parts_of(before, begun=begun) if before.strip() else []
        self._state = "new" if not parts else "thinking" if parts[-1].is_open else "over"

    def look(self, text: str, now: float) -> None:
        """`text` is the whole answer so far, `now` a time in seconds. Call it with every piece, and once at the end."""
        if self._state == "over" or not text:
            return
        if self._since is None:
            self._since = now
        if self._state == "new":
            said = text.lstrip()
            if self._begun or said.startswith(tuple(_CLOSING)):
                self._state = "thinking"
            elif len(said) > _LONGEST_MARK:
                self._state = "over"
                return
            else:
                return
        new = text[max(0, self._read - _LONGEST_MARK) :]
        self._read = len(text)
        self.seconds = self._earlier_s + now - self._since
        if any(each in new for each in _CLOSING.values()) and not parts_of(text, begun=self._begun)[-1].is_open:
            self._state = "over"


def parts_of(text: str, *, begun: bool = False) -> list[Part]:
    """The thoughts of an answer and what it says, in order; empty ones are left out.

    `begun`: the prompt has opened a thought.
    """
    found: list[Part] = []
    at = 0
    first = next(_marks(text, 0), None) if begun or _HINT.search(text) else None
    if first is not None and first["closing"]:
        at = _add_thought(text, 0, first["closing"], found)
    elif begun and (first is None or text[: first.start()].strip()):
        at = _add_thought(text, 0, "</think>", found)
    while at < len(text):
        opening = next((each for each in _marks(text, at) if each["opening"]), None) if first is not None else None
        _add_words(text[at : opening.start() if opening else len(text)], found)
        at = _add_thought(text, opening.end(), _CLOSING[opening["opening"]], found) if opening else len(text)
    return found


class ThoughtReader:
    """Tells the thought that begins an answer from what is said after it, while the answer streams.

    A mark later in the answer is a word of it. `prompt`: what the model was given, which may have opened the thought.
    """

    def __init__(self, prompt: str = "") -> None:
        end = prompt.rstrip()
        self._closing = next((closing for opening, closing in _PLAIN.items() if end.endswith(opening)), "")
        self._begun = bool(self._closing)  # a model may repeat the mark that the prompt has
        self._held, self._space = "", ""
        self._is_said = self._is_after = self._has_thought = False

    def feed(self, text: str) -> tuple[str, str]:
        """(what is said, what is thought) that is certain with this text."""
        said, thought = "", ""
        self._held += text
        while self._held and not self._is_said:
            if not self._closing or self._begun:
                if not self._opens():
                    return said, thought
                continue
            found = self._held.find(self._closing)
            if found < 0:
                cut = len(_without_half(self._held, self._closing))
                thought += self._thought(self._held[:cut])
                self._held = self._held[cut:]
                return said, thought
            thought += self._thought(self._held[:found])
            self._held = self._held[found + len(self._closing) :]
            self._closing, self._space, self._is_after = "", "", True
        said, self._held = self._held, ""
        return said, thought

    def end(self) -> tuple[str, str]:
        """What is left when the answer ends."""
        held, self._held = self._held, ""
        if self._closing:
            return "", self._thought(held)
        return held.lstrip() if self._is_after else held, ""

    def _opens(self) -> bool:
        """Look for the mark that opens a thought. Returns whether it is certain what comes."""
        start = self._held.lstrip()
        marks = [self._closing_of(each) for each in _PLAIN if start.startswith(each)]
        if marks:
            self._closing, self._held = marks[0][1], start[len(marks[0][0]) :]
            self._begun = False
            return True
        if not start or any(each.startswith(start) for each in _PLAIN):
            return False
        if self._begun:
            self._begun = False
            return True
        self._is_said = True
        self._held = start if self._is_after else self._held
        return True

    @staticmethod
    def _closing_of(opening: str) -> tuple[str, str]:
        return opening, _PLAIN[opening]

    def _thought(self, text: str) -> str:
        """Without the white space around a thought."""
        text = self._space + text
        if not self._has_thought:
            text = text.lstrip()
        bare = text.rstrip()
        self._space = text[len(bare) :] if bare or self._has_thought else ""
        self._has_thought = self._has_thought or bool(bare)
        return bare


def without_thoughts(text: str, *, begun: bool = False) -> str:
    """What an answer says."""
    return "\n\n".join(each.text.strip() for each in parts_of(text, begun=begun) if not each.is_thought)


def _marks(text: str, at: int) -> Iterator[re.Match[str]]:
    """The marks outside of fenced code, from a place on."""
    while (mark := _MARK.search(text, at)) is not None:
        at = mark.end()
        if not (sign := mark["fence"]):
            yield mark
            continue
        end = re.compile(rf"^ {{0,3}}{sign}{sign[0]}*[ \t]*$", re.M).search(text, at)
        if end is None:
            return
        at = end.end()


def _add_thought(text: str, at: int, closing: str, found: list[Part]) -> int:
    """The thought that begins there; returns where it has ended."""
    end = text.find(closing, at)
    if end >= 0:
        if thought := text[at:end].strip():
            found.append(Part(thought, True))
        return end + len(closing)
    found.append(Part(_without_half(text[at:], closing).strip(), True, True))
    return len(text)


def _without_half(text: str, closing: str) -> str:
    """Without the beginning of a closing mark that is still being written."""
    length = next((each for each in range(len(closing) - 1, 0, -1) if text.endswith(closing[:each])), 0)
    return text[: len(text) - length]


def _add_words(text: str, found: list[Part]) -> None:
    text = _AROUND.sub("", text)
    if text.strip():
        found.append(Part(text.lstrip("\n") if found else text))
