"""What the engine learns from loads and answers: speeds, failures, and the trouble of too little memory."""

import sys
import traceback
from collections.abc import Callable, Sequence

from ..core.chat import Finish
from ..core.errors import GptqWebuiError, LoadCancelled
from ..core.models import LocalModel
from ..loaders.choose import Choice
from ..loaders.contract.base import LoadedModel
from ..loaders.machine.gpus import available_gpu_bytes
from ..loaders.machine.memory_fit import is_out_of_memory
from ..loaders.machine.memory_release import free_memory
from . import load_failures, measured_speeds
from .load_fallback import LoadOutcome
from .load_request import LoadPlan
from .remedies import Trouble, remedies
from .settings import Settings


class Recovery:
    """Keeps the last error and the last trouble, and writes what was learnt into the settings.

    `models` returns the models on disk, for a remedy that loads a smaller one.
    """

    def __init__(self, settings: Settings, models: Callable[[], Sequence[LocalModel]]) -> None:
        self.trouble: Trouble | None = None  # memory was not enough, and what may help
        self.last_error = ""  # with its traceback, for the report
        self._settings = settings
        self._models = models

    def load_failed(self, error: GptqWebuiError, plan: LoadPlan) -> None:
        if isinstance(error, LoadCancelled):
            return
        self.last_error = "".join(traceback.format_exception(error))
        if is_out_of_memory(error):
            context_tokens = plan.fit.context_tokens if plan.fit is not None else 0
            self.note_trouble(str(error), plan, plan.choice, context_tokens)

    def load_succeeded(self, plan: LoadPlan, outcome: LoadOutcome) -> None:
        """Remember a loader that failed first; forget the failures of one that the user chose and that works."""
        if outcome.failed:
            free_bytes = plan.fit.free_bytes if plan.fit is not None and outcome.lacked_memory else None
            load_failures.remember(self._settings, plan.model, outcome.failed, outcome.why, free_bytes)
        elif plan.chosen:
            load_failures.forget(self._settings, plan.model, outcome.choice.loader.name)

    def answer_failed(self, error: GptqWebuiError, loaded: LoadedModel, plan: LoadPlan, choice: Choice) -> None:
        self.last_error = "".join(traceback.format_exception(error))
        if is_out_of_memory(error):
            free_memory()
            self.note_trouble(str(error), plan, choice, loaded.context_tokens)

    def answer_ended(self, finish: Finish, loaded: LoadedModel, plan: LoadPlan, choice: Choice) -> None:
        """Remember the speed, and notice a GPU whose memory overflows into the system's."""
        if loaded.is_remote:
            return  # an engine elsewhere: neither its speed nor its memory is this machine's
        settings, model, name = self._settings, loaded.model, choice.loader.name
        best = measured_speeds.measured(settings, model, plan.fingerprint).get(name, 0.0)
        free_bytes = available_gpu_bytes() if loaded.device.startswith("cuda") else None
        if slow := measured_speeds.collapsed(finish, model.size_bytes, best, free_bytes, sys.platform == "win32"):
            self.note_trouble(slow, plan, choice, loaded.context_tokens)
        measured_speeds.note(settings, model, name, finish, plan.fingerprint)

    def note_trouble(self, text: str, plan: LoadPlan, choice: Choice, context_tokens: int) -> None:
        found = remedies(plan.request, choice.loader, choice.options, context_tokens, self._models())
        self.trouble = Trouble(text, plan.request, found)

    def clear(self) -> None:
        self.trouble = None
