"""The forward of transformers itself as a Stepper: every architecture, every placement. See transformers_memory.py."""

import inspect
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..core.errors import BadCheckpoint, GptqWebuiError
from ..core.foreign_errors import in_words
from .attention_backends import cudnn_attention
from .own_states import Kept, ModuleStates
from .rope_length import RopeLength
from .stepper import Memory, Stepper
from .token_ids import require_known
from .transformers_memory import CACHE_NAMES, TransformersMemory, cache_name, only_keys, undo

log = logging.getLogger(__name__)

_STATE_LIST = "state"  # which only a forward makes (RWKV)
GPU_CHUNK_TOKENS = 4096  # of a prompt at a time on a GPU, where its memory allows
SMALLEST_CHUNK_TOKENS = 128
_TRIAL = (5, 9, 2, 7, 3, 8, 4, 6)  # ids that an architecture is tried with
_CLOSE = 1e-3  # relative difference of logits that needs no better way
_FAR = 0.1  # relative difference of logits that no rounding makes
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, NameError, LookupError, ArithmeticError)


class PromptKernels(Protocol):
    """What computes parts of a model's forward of several tokens; see cuda/prompt_attention.py."""

    def reading(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


class TransformersStepper(Stepper):
    kernel: ClassVar[str] = "transformers"
    embedding_rows: int

    def __init__(self, model: Any) -> None:
        self._model = model  # a transformers causal LM in eval mode
        embedding = model.get_input_embeddings().weight
        self.device, self.embedding_rows = embedding.device, embedding.shape[0]
        config = model.config
        self._config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        taken = inspect.signature(model.forward).parameters
        self.cache_argument = next((each for each in CACHE_NAMES if each in taken), cache_name())
        self._keeps_cache = self.cache_argument in taken
        self._keeps_some = "logits_to_keep" in taken
        self._without_cache = {"use_cache": False} if "use_cache" in taken else {}  # some begin with old states otherwise
        own = getattr(model, "_supports_default_dynamic_cache", None)
        # of a class that only the model's own forward makes
        self._own_cache = self.cache_argument == _STATE_LIST or (own is not None and not own())
        self._module_states: ModuleStates | None = None
        if self.device.type == "cuda":
            self.chunk_tokens = GPU_CHUNK_TOKENS
        self._rope = RopeLength(model)
        self._rope.wrap()
        self._kernels: PromptKernels | None = None
        self.run_model: Any = model.forward  # as it is now: a stepper may take its place later (patched_forward.py)
        # a forward of several pieces that counts each from 0 is given its positions
        self.takes_positions, self.gives_positions = "position_ids" in taken, False
        # transformers 4 finds the positions of text after a picture by it
        self._gives_cache_position = "cache_position" in taken and hasattr(config, "vision_config")
        self._in_pieces = True  # several tokens can be put through at once after others
        if (
            self._own_cache
            or not self._keeps_cache
            or getattr(model, "_is_stateful", False)
            or not only_keys(self.begin()._cache)
        ):
            with torch.inference_mode():
                self._learn_what_continues()

    @property
    def model(self) -> Any:
        return self._model

    @property
    def text_config(self) -> Any:
        """Of the model, or its text part."""
        return self._config

    @property
    def masks_windows(self) -> bool:
        """Whether the model's code makes masks of sliding windows; some configs (Moshi's) name a window that nobody uses."""
        return any(hasattr(each, "create_sliding_window_causal_mask") for each in self._code())

    @property
    def names_windows(self) -> bool:
        """Whether the model's code knows of sliding windows: it may mask them in a way of its own."""
        try:
            return any("sliding_window" in inspect.getsource(each) for each in self._code())
        except (OSError, TypeError):  # code without a source
            return True

    def _code(self) -> list[ModuleType]:
        names = {type(each).__module__ for each in self._model.modules()}
        return [sys.modules[each] for each in names if not each.startswith(("torch.", __name__.partition(".gptq.")[0]))]

    def _learn_what_continues(self) -> None:
        """Some architectures forget their state when several tokens follow it at once, or keep it where no conversation can
        be known from another. Then tokens follow one by one, or all are computed again each time."""
        try:
            whole = self.prefill(self.begin(), _TRIAL).double()
        except _FAILURES as error:
            raise _cannot_compute(error) from error

        def continued(first: int, alone: bool) -> Tensor:
            memory = self.begin()
            self.prefill(memory, _TRIAL[:first])
            if not alone:
                self.prefill(self.begin(), _TRIAL[::-1])  # another conversation in between
            return self.prefill(memory, _TRIAL[first:]).double()

        def difference(first: int, alone: bool) -> float:
            return float((continued(first, alone) - whole).norm() / whole.norm())

        def tried(first: int, alone: bool = False) -> float:
            try:
                return difference(first, alone)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                log.info("a conversation cannot be continued: %s", error)
                return float("inf")

        if not self._keeps_cache:
            return
        one = tried(len(_TRIAL) - 1)
        if one > _CLOSE and self.takes_positions:  # some count the positions of every piece from 0 (Bamba)
            self.gives_positions = True
            given = tried(len(_TRIAL) - 1)
            self.gives_positions = given < one / 2  # rounding is the same where the positions are
            one = given if self.gives_positions else one

        def is_changed() -> bool:
            """By another conversation."""
            return all(tried(len(_TRIAL) - 1) > 3 * tried(len(_TRIAL) - 1, alone=True) for _again in range(2))

        def leaves_a_trace() -> bool:
            """Another conversation: the same tokens give other bits after it, where they give the same without it. By how much
            says nothing: two conversations can leave nearly the same, and 16 bits are coarse."""
            first = len(_TRIAL) - 1
            if one == float("inf"):
                return is_changed()
            alone, again = continued(first, True), continued(first, True)
            if not torch.equal(alone, again):  # sums in no fixed order
                return one > _CLOSE and is_changed()
            return not torch.equal(continued(first, False), alone)

        if leaves_a_trace():
            self._module_states = ModuleStates.changed_by(self._model, lambda: self.prefill(self.begin(), _TRIAL[::-1]))
            one = tried(len(_TRIAL) - 1)
        if one > _CLOSE and is_changed():
            log.info("all tokens are computed again for each: another conversation changes the state")
            self._module_states, self._keeps_cache = None, False
        elif not one < _FAR:
            log.info("all tokens are computed again for each: continuing differs by %.3g", one)
            self._keeps_cache = False
        elif not (several := tried(len(_TRIAL) - 3)) < 10 * one + 1e-5:
            log.info("tokens are put through one by one after a conversation: together they differ by %.3g", several)
            self._in_pieces = False
            self.chunk_tokens = 1 << 30

    def require_a_forward(self) -> None:
        """Compute two tokens. Raises BadCheckpoint if the numbers of config.json let the model's own code fail."""
        try:
            with torch.inference_mode():
                memory, ids = self.begin(), (0, min(1, self.embedding_rows - 1))
                self.prefill(memory, ids)
                if self._keeps_cache:
                    self._require_a_next_token(memory, ids[1])
        except _FAILURES as error:
            raise _cannot_compute(error) from error

    def _require_a_next_token(self, memory: TransformersMemory, id: int) -> None:
        """Some forwards fail when they continue their own cache (CPM-Ant): then all tokens are computed again each time."""
        try:
            self.prefill(memory, [id])
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            if "out of memory" in str(error).lower():
                raise
            log.info("a conversation cannot be continued, all tokens are computed again for each: %s", error)
            self._keeps_cache = False

    def use(self, kernels: PromptKernels) -> None:
        """Compute with them from now on, if they give what the forward gives without them."""
        with torch.inference_mode():
            wanted = self._of_trial()
            self._kernels = kernels
            try:
                difference = max(float((a - b).norm() / b.norm()) for a, b in zip(self._of_trial(), wanted, strict=True))
            except (GptqWebuiError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                log.info("prompts are read without kernels of ours: %s", error)
                difference = float("inf")
        if not difference < _FAR:
            log.info("prompts are read without kernels of ours: they differ by %.3g", difference)
            self._kernels = None
            kernels.close()

    def _of_trial(self) -> list[Tensor]:
        """Last logits of a prompt, and of its end behind its beginning: what such a piece sees is said by a mask."""
        found = [self.prefill(self.begin(), _TRIAL).double()]
        if self._keeps_cache and self._in_pieces:
            memory = self.begin()
            self.prefill(memory, _TRIAL[:3])
            found.append(self.prefill(memory, _TRIAL[3:]).double())
        return found

    def begin(self) -> TransformersMemory:
        return TransformersMemory(self._config)

    @property
    def length_dependent(self) -> bool:
        """Whether the model's rotary angles depend on the length of the text."""
        return bool(self._rope.kind)

    def angles_of(self, tokens: int) -> int:
        return self._rope.of(tokens)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        ids = self._rope.ready(memory, ids)
        with self._rope.using(memory.angles):
            return self._prefill(memory, ids)

    def _prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        assert isinstance(memory, TransformersMemory)
        if not self._keeps_cache:
            memory.ids += ids
            memory.grown(len(ids))
            return self._all_again(memory.ids)
        if not self._in_pieces and memory.length > 0:
            return [self._forward(memory, [id]) for id in ids][-1]
        if self.device.type != "cuda":
            return self._forward(memory, ids)
        at = 0
        logits: Tensor | None = None
        while at < len(ids):
            piece = ids[at : at + self.chunk_tokens]
            held = memory.length
            try:
                logits = self._forward(memory, piece)
                at += len(piece)
                continue
            except torch.OutOfMemoryError as error:
                full = torch.OutOfMemoryError(str(error))  # without the frames, which hold what did not fit
            undone = undo(memory, held)
            if len(piece) <= SMALLEST_CHUNK_TOKENS or not undone:
                raise full
            self.chunk_tokens = max(SMALLEST_CHUNK_TOKENS, len(piece) // 2)
            torch.cuda.empty_cache()
        assert logits is not None
        return logits

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._each(memory, ids, len(ids)).logits[0][-len(ids) :]

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        return self._each(memory, ids, 1, output_hidden_states=True).hidden_states[-1][0][-len(ids) :]

    def _each(self, memory: Memory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        """The model's output for ids that follow those in memory, and where it must be for the earlier ones too."""
        require_known(ids, self.embedding_rows)
        ids = self._rope.ready(memory, ids)
        with self._rope.using(memory.angles):
            return self._each_with(memory, ids, keep, **more)

    def _each_with(self, memory: Memory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        assert isinstance(memory, TransformersMemory)
        if self._keeps_cache and (self._in_pieces or memory.length == 0):
            if not self._in_pieces:
                memory.ids += ids
            return self._output(memory, ids, keep, **more)
        memory.ids += ids
        memory.grown(len(ids))
        kept = {"logits_to_keep": keep} if self._keeps_some else {}
        return self._run(input_ids=self._input(memory.ids), **self._without_cache, **kept, **more)

    def _output(self, memory: TransformersMemory, ids: Sequence[int], keep: int, **more: Any) -> Any:
        if self._own_cache and memory.length == 0:
            memory.cache = None
        given: dict[str, Any] = {self.cache_argument: memory.cache, **more}
        if self._keeps_some:
            given["logits_to_keep"] = keep
        if self.gives_positions:
            given["position_ids"] = torch.arange(memory.length, memory.length + len(ids), device=self.device)[None]
        if self._gives_cache_position:
            given["cache_position"] = torch.arange(memory.length, memory.length + len(ids), device=self.device)
        with self.keeping(memory.kept):
            output = self._run(input_ids=self._input(ids), use_cache=True, **given)
        if memory.cache is None:
            memory.cache = next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
            if memory.cache is None:  # the model keeps what it has read under another name, or not at all
                self._keeps_cache = False
                memory.ids += ids
        memory.grown(len(ids))
        return output

    def keeping(self, kept: Kept) -> AbstractContextManager[None]:
        """During a forward of a conversation: what the model's modules keep of it."""
        return nullcontext() if self._module_states is None else self._module_states.of(kept)

    def _run(self, **given: Any) -> Any:
        kernels = nullcontext() if self._kernels is None else self._kernels.reading()
        with cudnn_attention(allowed=False), kernels:  # every prompt has another length
            return self.run_model(**given)

    def _input(self, ids: Sequence[int]) -> Tensor:
        """[1, T] on the model's device."""
        return torch.tensor([list(ids)], device=self.device)

    def _forward(self, memory: TransformersMemory, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._output(memory, ids, 1).logits[:, -1, :]
        return logits

    def _all_again(self, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._run(input_ids=self._input(ids), **self._without_cache).logits[:, -1, :]
        return logits

    def close(self) -> None:
        self._model = self.run_model = self._module_states = None
        if self._kernels is not None:
            self._kernels.close()
            self._kernels = None


def _cannot_compute(error: Exception) -> Exception:
    """What a failure of the first forward is raised as: itself, where memory was short."""
    if "out of memory" in str(error).lower():
        return error
    log.error("the first forward failed", exc_info=error)
    return BadCheckpoint(
        f"transformers cannot compute this model: {in_words(error)}. Correct config.json, or download the model again."
    )
