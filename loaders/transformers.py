"""Transformers with our own packed layers (gptq/): every GPTQ width and layout, and 16-bit models.

Runs wherever torch does. torch and transformers are imported when a model is loaded, not before.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.chat import Finish, Step
from ..core.errors import BadCheckpoint, BadParameter, LoadFailed, NotEnoughMemory
from ..core.models import LocalModel
from ..core.params import GenerationParams
from ..core.units import format_bytes
from . import chat_template, fit
from .base import LoadedModel, LoadProgress, Refusal
from .machine import Machine, look
from .refusals import not_in_gptq_layout, unreadable
from .turns import Turns

log = logging.getLogger(__name__)


def _option(default: Any, label: str, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"label": label, "help": help, "choices": choices})


@dataclass(frozen=True)
class TransformersOptions:
    context_tokens: int = _option(0, "Context length", "Tokens the model keeps in view; 0 chooses what fits, up to 8192.")
    device: str = _option("auto", "Device", "auto uses the graphics card if there is one.", ("auto", "cpu", "cuda"))
    dtype: str = _option(
        "auto",
        "Number format",
        "auto: 16-bit floats on a graphics card, 32-bit on the processor.",
        ("auto", "fp16", "bf16", "fp32"),
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "fp16", "bf16", "fp32"):
            raise BadParameter(f"dtype must be auto, fp16, bf16 or fp32; found {self.dtype!r}.")
        if self.context_tokens < 0 or self.context_tokens > 1 << 20:
            raise BadParameter(f"context_tokens must be 0 (automatic) or up to {1 << 20}; found {self.context_tokens!r}.")


class TransformersLoader:
    name: ClassVar[str] = "transformers"
    options: ClassVar[type] = TransformersOptions

    def __init__(self, machine: Callable[[], Machine] = look) -> None:
        self._machine = machine

    def refusal(self, model: LocalModel, options: TransformersOptions) -> Refusal | None:
        machine = self._machine()
        for package in ("torch", "transformers", "accelerate"):
            if not machine.has(package):
                return Refusal(f"the package {package} is not installed", f"pip install {package}")
        return unreadable(model) or not_in_gptq_layout(model)

    def needs_bytes(self, model: LocalModel, options: TransformersOptions) -> int:
        return fit.needs_bytes(model, fit.wanted_context(model, options.context_tokens))

    def load(self, model: LocalModel, options: TransformersOptions, progress: LoadProgress) -> "TransformersModel":
        progress(0.02, "Starting torch and transformers")
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from ..gptq import checkpoint

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        device = _device(options)
        dtype = _dtype(options, device)
        fit.require_memory(model, device, dtype)
        progress(0.1, "Reading the tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadCheckpoint(
                f"The tokenizer of {model.name} cannot be read ({why}). Download the model again; what is complete is kept."
            ) from error
        progress(0.15, f"Reading {format_bytes(model.size_bytes)} of weights")
        try:
            device_map, max_memory = _placement(model, options, device, dtype)
            hf, notes = checkpoint.load(model, dtype=dtype, device_map=device_map, max_memory=max_memory)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "out of memory" not in str(error).lower():
                raise
            fit.give_back(device)
            raise NotEnoughMemory(
                f"There is not enough memory on {_device_name(device)} for {model.name} ({format_bytes(model.size_bytes)}). "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            ) from None
        progress(0.95, "Fitting the conversation into the memory")
        try:
            context, reason = fit.fit_context(
                model, options.context_tokens, dtype_bytes=dtype.itemsize, free_bytes=fit.free_bytes(device)
            )
        except LoadFailed:
            del hf
            fit.give_back(device)
            raise
        loaded = TransformersModel(model, hf, tokenizer, context, reason, notes, str(device))
        progress(1.0, "Ready")
        return loaded


class TransformersModel(LoadedModel):
    def __init__(
        self,
        model: LocalModel,
        hf: Any,
        tokenizer: Any,
        context_tokens: int,
        context_reason: str,
        notes: tuple[str, ...],
        device: str,
    ) -> None:
        super().__init__()
        from ..gptq.kv import PrefixCache
        from ..gptq.sampling import CAN

        self.model, self.hf, self.tokenizer = model, hf, tokenizer
        self.context_tokens, self.context_reason = context_tokens, context_reason
        self.notes, self.device, self.can = notes, device, CAN
        self.template = chat_template.find(model.folder, tokenizer, model.architecture)
        self._prefix: Any = PrefixCache()
        self._end_ids = _end_ids(hf, tokenizer)
        self._turns = Turns(hf, self._worker)

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish]:
        from ..gptq.decode import generate

        return generate(
            self.hf,
            ids,
            params,
            cancel,
            prefix=self._prefix,
            end_ids=self._end_ids | set(self.template.stop_ids),
            context_tokens=self.context_tokens,
        )

    def close(self) -> None:
        super().close()
        if self.hf is None:
            return
        device = self.hf.device
        self._turns.give_back()
        self._prefix.clear()
        self.hf = None
        fit.give_back(device)


def _end_ids(hf: Any, tokenizer: Any) -> set[int]:
    """Every id that ends an answer, from the generation settings and the tokenizer."""
    ids: set[int] = set()
    for found in (getattr(hf.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        ids.update(found if isinstance(found, (list, tuple)) else [found] if found is not None else [])
    return ids


def _device(options: TransformersOptions) -> Any:
    import torch

    if options.device != "auto":
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise BadParameter("There is no graphics card that torch can use. Choose the device auto or cpu.")
        return torch.device(options.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _placement(
    model: LocalModel, options: TransformersOptions, device: Any, dtype: Any
) -> tuple[Any, dict[int | str, int] | None]:
    """(device_map, max_memory): the whole model on one device, or spread over the card and the rest of the machine.

    On the card stay free: 1 GB for others, the conversation, and what computing takes.
    """
    if device.type != "cuda":
        return {"": device}, None
    room = fit.room_for_weights(model, options.context_tokens, free_bytes=fit.free_bytes(device), dtype_bytes=dtype.itemsize)
    if model.size_bytes <= room:
        return {"": device}, None
    return "auto", {device.index or 0: room, "cpu": fit.free_ram_bytes()}


def _dtype(options: TransformersOptions, device: Any) -> Any:
    import torch

    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return named.get(options.dtype) or (torch.float32 if device.type == "cpu" else torch.float16)


def _device_name(device: Any) -> str:
    return "the graphics card" if device.type == "cuda" else "this machine"
