"""A load that heals itself: what fails with one loader is tried once with the next.

Failing is: no memory, an import that breaks, an error in a kernel, or gibberish (sanity.py). Not
healed are damaged files, which another loader might open and be silent about, wrong options, and a
loader that the user chose: that choice is obeyed.
"""

import contextlib
import ctypes
import gc
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Collection
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
from ..core.models import LocalModel
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel, LoadProgress
from ..loaders.machine import memory_fit
from . import sanity_check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Healed:
    """What came out of a load."""

    loaded: LoadedModel
    choice: Choice
    failed: str = ""  # the loader that was tried first and could not
    why: str = ""  # its sentence
    lacked_memory: bool = False


def load(
    model: LocalModel,
    choice: Choice,
    after: Callable[[Collection[str]], Choice] | None,
    progress: LoadProgress,
    cancel: threading.Event,
) -> Healed:
    """Load, and if that fails load with what `after` chooses without the loaders named to it.

    None for `after` means that the loader is the user's choice. Raises LoadFailed or another
    GptqWebuiError, and leaves no memory behind.
    """
    name = choice.loader.name
    second = _second(after, name)
    try:
        return Healed(attempt(model, choice, progress, cancel, chosen=after is None, last=second is None), choice)
    except GptqWebuiError as error:
        if second is None or cancel.is_set() or not _may_heal(error):
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
        lacked = memory_fit.is_out_of_memory(first) or memory_fit.is_out_of_memory(error)
        raise (NotEnoughMemory if lacked else LoadFailed)(both) from error
    return Healed(loaded, second, name, str(first), memory_fit.is_out_of_memory(first))


def _second(after: Callable[[Collection[str]], Choice] | None, failing: str) -> Choice | None:
    """What would be tried next; None if nothing else can open the model."""
    if after is None:
        return None
    try:
        return after((failing,))
    except (LoadRefused, BadParameter):
        return None


def attempt(
    model: LocalModel, choice: Choice, progress: LoadProgress, cancel: threading.Event, *, chosen: bool, last: bool
) -> LoadedModel:
    """One load with one loader, and the check after it. Raises GptqWebuiError.

    `chosen` by the user: kept with a note whatever the check says. `last`: nothing else would be
    tried, so what only looks wrong is kept with a note.
    """

    def tell(share: float, text: str) -> None:
        if cancel.is_set():
            raise LoadCancelled(f"Loading {model.name} was stopped.")
        progress(share, text)

    loaded: LoadedModel | None = None
    try:
        loaded = choice.loader.load(model, choice.options, lambda share, text: tell(0.97 * share, text))
        tell(0.98, "Trying a few words")
        verdict = sanity_check.check(loaded, cancel)
        tell(1.0, "Ready")
        wrong = "" if chosen else verdict.broken or ("" if last else verdict.suspect)
        if wrong:
            raise LoadFailed(f"It was loaded, but {wrong}: it would write gibberish.")
        loaded.notes = (*loaded.notes, *_notes(verdict, choice))
        return loaded
    except Exception as error:
        if loaded is not None:
            loaded.close()
        loaded = None
        told = _told(model, choice, error, cancel)
        _release(error)
        if told is error:
            raise
        raise told from error


def _notes(verdict: sanity_check.Verdict, choice: Choice) -> list[str]:
    wrong = verdict.broken or verdict.suspect
    said = f"A check after loading found that {wrong}. If its answers are gibberish, choose another loader than " if wrong else ""
    return [text for text in (said and f"{said}{choice.loader.name}.", verdict.note) if text]


def _told(model: LocalModel, choice: Choice, error: BaseException, cancel: threading.Event) -> GptqWebuiError:
    """Any error as a sentence of ours, of the class that the engine and the page go by."""
    if cancel.is_set():
        return LoadCancelled(f"Loading {model.name} was stopped.")
    if memory_fit.is_out_of_memory(error) and not isinstance(error, NotEnoughMemory):
        return NotEnoughMemory(
            f"There was not enough memory for {model.name} with {choice.loader.name}. "
            "Take a smaller context, close other programs, or choose a smaller branch (fewer bits, larger group)."
        )
    if isinstance(error, GptqWebuiError) and not isinstance(error, AnswerFailed):
        return error
    error = error.__cause__ if isinstance(error, AnswerFailed) and error.__cause__ is not None else error
    told = "".join(traceback.format_exception(error))  # a record that kept the error would keep its tensors
    log.error("loading %s with %s failed\n%s", model.name, choice.loader.name, told)
    why = (str(error).strip().splitlines() or ["no message"])[0]
    return LoadFailed(f"{model.name} could not be loaded with {choice.loader.name} ({type(error).__name__}: {why}).")


def _may_heal(error: GptqWebuiError) -> bool:
    if isinstance(error, ModelError):
        return isinstance(error.__cause__, ImportError)  # the files are whole, a package is not
    return not isinstance(error, (BadParameter, LoadCancelled))


def _release(error: BaseException) -> None:
    """Free what the failed load held: the frames of an error keep every tensor that was alive in them."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    free_memory()


def free_memory(collect: bool = True) -> None:
    """Hand what nobody uses any more back to the system, on every card. Without `collect`, what was freed already."""
    if collect:
        gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)  # what was freed in small pieces stays with the process otherwise
