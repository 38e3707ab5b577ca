"""Two models answer one prompt, one after the other: what each says, how fast it is, and what memory it needs.

Both are in memory at once where they fit beside the loaded model, which stays. Where they do not, the loaded model makes
room and comes back afterwards. A blind comparison has its answers in a random order, and names no model before the vote.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.chat import Finish, Message
from ..core.errors import AnswerFailed, BadParameter, Busy, GptqWebuiError, LoadCancelled, NotEnoughMemory
from ..core.params import GenerationParams
from ..core.units import format_bytes
from ..loaders.contract.base import LoadedModel, StopFlag
from ..loaders.machine.memory_fit import MACHINE, Memory
from ..loaders.machine.memory_release import free_memory
from .available_memory import available_memory
from .conversation import Conversation
from .engine import Engine
from .load_request import LoadPlan, LoadRequest
from .slot import Status, loaded_as_planned

VOTES = {"first": "Answer 1 is better", "second": "Answer 2 is better", "tie": "Both are good", "neither": "Both are bad"}

_BUSY = "Two models are being compared."
_HIDDEN = "Both models are at work; their answers come together"


@dataclass
class Side:
    """One of the two answers."""

    name: str  # of the model
    badge: str  # "GPTQ 4-bit, group 128"
    needs_bytes: int  # weights, conversation and computing, as planned before the load; 0: on another machine
    text: str = ""
    finish: Finish | None = None  # once the answer has ended

    @property
    def figures(self) -> list[tuple[str, str]]:
        """What the answer cost, as (name, value)."""
        if self.finish is None:
            return []
        rate = self.finish.tokens_per_s
        return [
            ("Tokens/s", f"{rate:.1f}" if rate else "too short to say"),
            ("First token", f"{self.finish.first_token_s:.2f} s"),
            ("Tokens", str(self.finish.new_tokens)),
            ("Memory", format_bytes(self.needs_bytes) if self.needs_bytes else "on another machine"),
        ]


@dataclass
class Comparison:
    """What a comparison has so far. `sides` are in the order in which they are shown."""

    prompt: str
    sides: tuple[Side, Side]
    blind: bool
    vote: str = ""  # of VOTES
    note: str = ""  # what else the user should know

    @property
    def is_done(self) -> bool:
        return all(side.finish is not None for side in self.sides)

    @property
    def is_open(self) -> bool:
        """Whether names and figures may be shown."""
        return not self.blind or bool(self.vote)

    @property
    def waits_for_vote(self) -> bool:
        return self.is_done and not self.is_open

    def markdown(self) -> str:
        """To share. Raises BadParameter before the vote of a blind comparison."""
        if not self.is_open:
            raise BadParameter("The names are hidden until you vote. Press one of the buttons below the answers.")
        titles = [f"Answer {at}: {side.name}" for at, side in enumerate(self.sides, 1)]
        first, second = (dict(side.figures) for side in self.sides)
        rows = [("Model", *(side.badge for side in self.sides)), *((each, first[each], second.get(each, "")) for each in first)]
        lines = ["# Two models, one prompt", "", _quoted(self.prompt), ""]
        lines += [f"| | {' | '.join(_cell(each) for each in titles)} |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(_cell(each) for each in row)} |" for row in rows]
        for title, side in zip(titles, self.sides, strict=True):
            lines += ["", f"## {title}", "", _quoted(side.text)]
        if self.vote:
            lines += ["", f"Blind vote: {VOTES[self.vote]}."]
        return "\n".join(lines) + "\n"


class Comparer:
    """Runs comparisons on one engine, one at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(
        self,
        names: Sequence[str],
        prompt: str,
        params: GenerationParams,
        cancel: threading.Event,
        *,
        blind: bool,
        begun: Callable[[Comparison], None] = lambda comparison: None,  # hears of it before anything is loaded
        say: Callable[[str], None] = lambda text: None,  # hears the current step
    ) -> Comparison:
        """Ask the two models of the library. The comparison that `begun` gets fills meanwhile.

        Raises BadParameter, NoSuchModel, LoadRefused, NotEnoughMemory, Busy (the model is loading, or must make room and is
        answering), LoadCancelled (`cancel`), and what loading and answering raise. A blind one raises
        GptqWebuiError once it has begun, and its sentence names no model.
        """
        if len(names) != 2 or len(set(names)) != 2 or not all(names):
            raise BadParameter("Choose two different models.")
        if not prompt.strip():
            raise BadParameter("Write a prompt that both models answer.")
        plans = [self._engine.planner.plan(LoadRequest(self._engine.library.get(name))) for name in names]
        if blind and secrets.randbelow(2):
            plans.reverse()
        first, second = (Side(each.model.name, each.model.badge, each.fit.needs_bytes if each.fit else 0) for each in plans)
        comparison = Comparison(prompt, (first, second), blind)
        begun(comparison)
        run = _Run(self._engine, comparison, params, cancel, (lambda text: say(_HIDDEN)) if blind else say)
        try:
            if not (self._fit_together(plans) and run.together(plans)):
                run.in_turn(plans)
        except GptqWebuiError as error:
            if not blind:
                raise
            raise GptqWebuiError(without_names(str(error), names)) from None
        if blind:
            comparison.note = without_names(comparison.note, names)
        return comparison

    def _fit_together(self, plans: Sequence[LoadPlan]) -> bool:
        """Whether both fit beside what is loaded, with the contexts that they would have alone."""
        memory = available_memory()
        for plan in plans:
            if plan.fit is None or _is_loaded(self._engine, plan):
                continue
            fit = plan.choice.loader.fit(plan.model, plan.choice.options, memory)
            if not fit.fits or fit.context_tokens < plan.fit.context_tokens:
                return False
            on_machine = fit.device == MACHINE
            memory = Memory(
                memory.ram - (fit.needs_bytes if on_machine else 0),
                memory.gpu if on_machine or memory.gpu is None else memory.gpu - fit.needs_bytes,
            )
        return True


class _Run:
    """One comparison on its way."""

    def __init__(
        self,
        engine: Engine,
        comparison: Comparison,
        params: GenerationParams,
        cancel: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._comparison, self._params, self._cancel, self._say = engine, comparison, params, cancel, say

    def together(self, plans: Sequence[LoadPlan]) -> bool:
        """Load both, then ask both. False if the memory was not enough after all: then nothing was asked."""
        loaded: list[LoadedModel] = []
        own: list[LoadedModel] = []  # to be closed
        try:
            with self._engine.slot.change(_BUSY) as stop:
                flag = _Either(stop, self._cancel)
                for plan in plans:
                    if _is_loaded(self._engine, plan) and (there := self._engine.loaded) is not None:
                        loaded.append(there)
                        continue
                    try:
                        own.append(self._load(plan, flag))
                    except NotEnoughMemory:
                        return False
                    loaded.append(own[-1])
                for side, each in zip(self._comparison.sides, loaded, strict=True):
                    self._ask(side, each, flag)
                return True
        finally:
            for each in own:
                each.close()
            if own:
                free_memory()

    def in_turn(self, plans: Sequence[LoadPlan]) -> None:
        """Load and ask one after the other. The loaded model makes room and is loaded again afterwards."""
        slot = self._engine.slot
        before: LoadRequest | None = None
        stopped = False
        try:
            with slot.change(_BUSY) as stop:
                flag = _Either(stop, self._cancel)
                if slot.loaded is not None and slot.plan is not None:
                    if slot.loaded.waiting:
                        raise Busy("The loaded model must make room, and it is answering. Wait for its answer, then compare.")
                    before = slot.plan.request
                    slot.unload()
                idle = slot.status
                slot.say(Status("loading", "A comparison of two models", "Both answer the same prompt", making=True))
                try:
                    for plan, side in zip(plans, self._comparison.sides, strict=True):
                        model = self._load(plan, flag)
                        try:
                            self._ask(side, model, flag)
                        finally:
                            model.close()
                            free_memory()
                finally:
                    stopped = stop.is_set()  # by whoever wants all memory free
                    slot.say(idle)
        finally:
            if before is not None and not stopped:
                self._bring_back(before)

    def _bring_back(self, request: LoadRequest) -> None:
        self._say(f"Loading {request.model.name} again")
        try:
            with contextlib.suppress(Busy):  # somebody loads another model: that one is wanted now
                self._engine.load_again(request)
        except GptqWebuiError as error:
            self._comparison.note = f"{request.model.name} could not be loaded again: {error}"

    def _load(self, plan: LoadPlan, flag: threading.Event) -> LoadedModel:
        name = plan.model.name
        self._say(f"Loading {name}")
        return loaded_as_planned(plan, lambda share, text: self._say(f"Loading {name}: {text}"), flag).loaded

    def _ask(self, side: Side, model: LoadedModel, flag: threading.Event) -> None:
        self._say(f"{side.name} answers")
        window = Conversation().window(model, [Message("user", self._comparison.prompt)], self._params.max_new_tokens)
        stream = model.answer(window.prompt, self._params, StopFlag(flag))
        try:
            for event in stream:
                if not isinstance(event, Finish):
                    side.text += event.text
                elif event.reason == "cancelled":
                    if flag.is_set():
                        raise LoadCancelled("Stopped. Nothing was compared; press Compare to begin again.")
                    raise AnswerFailed(f"{side.name} was unloaded while it answered. Compare again.")
                else:
                    side.finish = event
        finally:
            stream.close()


class _Either(StopFlag):
    """Set as soon as one of two flags is."""

    def __init__(self, one: threading.Event, other: threading.Event) -> None:
        super().__init__(one)
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or self._other.is_set()


def without_names(text: str, names: Sequence[str]) -> str:
    """A sentence about a blind comparison, with no model in it."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "one of the two models")
    return text


def _is_loaded(engine: Engine, plan: LoadPlan) -> bool:
    return engine.loaded is not None and engine.loaded.model.folder == plan.model.folder


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines() or [""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
