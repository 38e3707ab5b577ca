"""A conversation, and the events an answer is made of.

An answer is a stream: `Step`s (ids) inside a loader, `Token`s (certain text) for everybody
else, and one `Finish` at the end of either. `Reading` is not an event of the stream: read it when you need it.
"""

from dataclasses import dataclass
from typing import Literal

from .tools import CallPart, ToolCall

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]


@dataclass(frozen=True)
class Message:
    role: Role
    text: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str = ""  # of a tool's message: the call that it answers
    name: str = ""  # of a tool's message: the tool
    pictures: tuple[str, ...] = ()  # URLs, mostly of the kind data:; only for a model that sees them


@dataclass(frozen=True)
class Step:
    """One sampled token, as a back-end yields it."""

    id: int
    logprob: float | None = None  # natural log, of the model's own distribution: before penalties and temperature
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first; both only with `logprobs`


@dataclass(frozen=True)
class Token:
    """One sampled token and the text that became certain with it (often its own, sometimes none)."""

    id: int  # -1: text without a token, which was kept back until the end
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    call: CallPart | None = None  # a piece of a tool call instead of text; only where the prompt offered tools
    thought: str = ""  # what the model thinks before it answers, where it was told apart from the text


@dataclass(frozen=True)
class Reading:
    """How much of an answer's prompt is read."""

    read_tokens: int
    prompt_tokens: int
    began: float  # on the clock of time.monotonic()


@dataclass(frozen=True)
class Finish:
    """The last event of an answer: why it ended and what it cost."""

    reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from an earlier turn and not computed again
    new_tokens: int = 0
    prefill_s: float = 0.0  # from the first computation to the first token
    generate_s: float = 0.0  # from the first token to the last
    wait_s: float = 0.0  # in the queue, before the first computation
    dropped_turns: int = 0  # oldest messages that no longer fitted and were left out of the prompt
    end: Step | None = None  # the end token that was sampled; its text is no part of the answer
    stop_string: str = ""  # the one that ended the answer; it is not part of the text

    @property
    def tokens_per_s(self) -> float:
        """Decoding rate: tokens after the first over the time they took; 0.0 if there are too few to say."""
        return (self.new_tokens - 1) / self.generate_s if self.new_tokens > 1 and self.generate_s > 0 else 0.0

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to the first token."""
        return self.wait_s + self.prefill_s
