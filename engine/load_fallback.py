"""A load with a fallback: if one loader fails, the next one is tried, once.

A loader fails by lack of memory, by an import that breaks, by an error in a kernel, or by gibberish (sanity_check.py).
There is no fallback for damaged files, which another loader might open without complaint, for wrong options, and for a
loader that the user chose.
"""

import logging
import threading
import traceback
from dataclasses import dataclass

from ..core.errors import (
    AnswerFailed,
    BadParameter,
    GptqWebuiError,
    LoadCancelled,
    LoadFailed,
    LoadRefused,
    ModelError,
    NotEnoughMemory,
)
from ..core.foreign_errors import in_words, trace
from ..core.models import LocalModel
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel, LoadProgress
from ..loaders.machine.memory_fit import is_out_of_memory
from ..loaders.machine.memory_release import free_memory
from . import checked_folders, sanity_check
from .load_request import LoadPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOutcome:
    """The result of a load: the model, and the loader that failed before, if one did."""

    loaded: LoadedModel
    choice: Choice  # that worked
    failed: str = ""  # name of the loader that was tried first and failed
    why: str = ""  # its error
    lacked_memory: bool = False  # whether that error was a lack of memory


def load(plan: LoadPlan, progress: LoadProgress, cancel: threading.Event) -> LoadOutcome:
    """Load as planned; if that fails, load with the alternative. Raises GptqWebuiError and frees all memory."""
    model, choice = plan.model, plan.choice
    name = choice.loader.name
    second = _alternative(plan)
    try:
        return LoadOutcome(attempt(model, choice, progress, cancel, chosen=plan.chosen, last=second is None), choice)
    except GptqWebuiError as error:
        if second is None or cancel.is_set() or not _may_fall_back(error):
            raise
        first = error
    log.warning("%s failed with %s (%s); trying %s", model.name, name, str(first), second.loader.name)
    progress(0.0, f"{name} failed: {first} Trying {second.loader.name} instead")
    try:
        loaded = attempt(model, second, progress, cancel, chosen=False, last=True)
    except LoadCancelled:
        raise
    except GptqWebuiError as error:
        both = f"{model.name} could not be loaded. {name}: {first} {second.loader.name}: {error}"
        lacked = is_out_of_memory(first) or is_out_of_memory(error)
        raise (NotEnoughMemory if lacked else LoadFailed)(both) from error
    note = (
        f"{name} failed with this model here ({str(first).rstrip('.')}), so {second.loader.name} was used instead. "
        f"The next load remembers that; to try {name} again, choose it under Custom settings."
    )
    loaded.notes = (*loaded.notes, note)
    return LoadOutcome(loaded, second, name, str(first), is_out_of_memory(first))


def _alternative(plan: LoadPlan) -> Choice | None:
    """What is tried if the planned loader fails; None if nothing else can open the model."""
    if plan.alternative is None:
        return None
    try:
        return plan.alternative((plan.choice.loader.name,))
    except (LoadRefused, BadParameter):
        return None


def attempt(
    model: LocalModel, choice: Choice, progress: LoadProgress, cancel: threading.Event, *, chosen: bool, last: bool
) -> LoadedModel:
    """Load with one loader and check the result. Raises GptqWebuiError.

    `chosen`: the user chose the loader, so the model is kept with a note whatever the check finds. `last`: no other
    loader would be tried, so a model that only looks wrong is kept with a note.
    """

    def step(share: float, text: str) -> None:
        if cancel.is_set():
            raise LoadCancelled(f"Loading {model.name} was stopped.")
        progress(share, text)

    loaded: LoadedModel | None = None
    try:
        loaded = choice.loader.load(model, choice.options, lambda share, text: step(0.97 * share, text))
        verdict = checked_folders.known(loaded, choice)
        if verdict is None:
            step(0.98, "Trying a few words")
            verdict = sanity_check.check(loaded, cancel)
            if not cancel.is_set():
                checked_folders.remember(loaded, choice, verdict)
        step(1.0, "Ready")
        wrong = "" if chosen else verdict.broken or ("" if last else verdict.suspect)
        if wrong:
            raise LoadFailed(f"It was loaded, but {wrong}: it would write gibberish.")
        loaded.notes = (*loaded.notes, *_notes(verdict, choice))
        return loaded
    except Exception as error:
        if loaded is not None:
            loaded.close()
        loaded = None
        shown = _as_message(model, choice, error, cancel)
        _release(error)
        if shown is error:
            raise
        raise shown from error


def _notes(verdict: sanity_check.Verdict, choice: Choice) -> list[str]:
    wrong = verdict.broken or verdict.suspect
    found = f"A check after loading found that {wrong}. If its answers are gibberish, choose another loader than "
    return [text for text in (f"{found}{choice.loader.name}." if wrong else "", verdict.note) if text]


def _as_message(model: LocalModel, choice: Choice, error: BaseException, cancel: threading.Event) -> GptqWebuiError:
    """Any error as a GptqWebuiError with a message for the user."""
    if cancel.is_set():
        return LoadCancelled(f"Loading {model.name} was stopped.")
    if is_out_of_memory(error) and not isinstance(error, NotEnoughMemory):
        return NotEnoughMemory(
            f"There was not enough memory for {model.name} with {choice.loader.name}. "
            "Take a smaller context, close other programs, or choose a smaller branch (fewer bits, larger group)."
        )
    if isinstance(error, GptqWebuiError) and not isinstance(error, AnswerFailed):
        return error
    error = error.__cause__ if isinstance(error, AnswerFailed) and error.__cause__ is not None else error
    log.error("loading %s with %s failed\n%s", model.name, choice.loader.name, trace(error))
    return LoadFailed(
        f"{model.name} could not be loaded with {choice.loader.name}: {in_words(error)}. Choose another loader, or download "
        "the model again; the log has the details."
    )


def _may_fall_back(error: GptqWebuiError) -> bool:
    if isinstance(error, ModelError):
        return isinstance(error.__cause__, ImportError)  # the files are whole, a package is not
    return not isinstance(error, (BadParameter, LoadCancelled))


def _release(error: BaseException) -> None:
    """Free what a failed load holds: the frames of its error keep every tensor that was alive in them."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    free_memory()
