"""Transformers with our own packed layers (gptq/): every GPTQ width and layout, and 16-bit models.

Runs wherever torch does. torch and transformers are imported when a model is loaded, not before.
"""

import importlib.util
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..core.chat import Finish, Step
from ..core.errors import BadCheckpoint, BadParameter, LoadFailed
from ..core.models import OPENED_BY, LocalModel
from ..core.params import GenerationParams
from ..core.units import format_bytes
from . import chat_template
from .base import LoadedModel, LoadProgress, Refusal
from .turns import Turns

log = logging.getLogger(__name__)

DEFAULT_CONTEXT_TOKENS = 8192  # longer ones cost memory that few chats use; the options may ask for more
_OVERHEAD_BYTES = 600_000_000  # torch, CUDA's context, activations of one chunk of a prompt
_ACTIVATIONS_BYTES = 300_000_000  # of these, what is not taken yet when the weights are placed
_KEPT_FREE_BYTES = 1_000_000_000  # for the desktop and other programs
_SMALLEST_CONTEXT_TOKENS = 256


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

    def refusal(self, model: LocalModel, options: TransformersOptions) -> Refusal | None:
        if model.kind == "incomplete":
            return Refusal(model.problem)
        if model.kind in OPENED_BY:
            return Refusal(OPENED_BY[model.kind])
        for package in ("torch", "transformers", "accelerate"):
            if importlib.util.find_spec(package) is None:
                return Refusal(f"the package {package} is not installed", f"pip install {package}")
        if model.quantize is not None and model.quantize.checkpoint_format not in ("gptq", "gptq_v2"):
            return Refusal(
                f"the weights are in the {model.quantize.checkpoint_format} layout, which only its own kernel reads",
                "choose a branch in GPTQ's own layout",
            )
        if any(path.suffix != ".safetensors" for path in model.weights):
            return Refusal(
                f"the weights are in {model.weights[0].name}, a format that can run code when it is opened",
                "choose a branch with .safetensors files",
            )
        return None

    def needs_bytes(self, model: LocalModel, options: TransformersOptions) -> int:
        context = options.context_tokens or min(model.context_tokens or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)
        return model.size_bytes + context * conversation_bytes_per_token(model.folder) + _OVERHEAD_BYTES

    def load(self, model: LocalModel, options: TransformersOptions, progress: LoadProgress) -> "TransformersModel":
        progress(0.02, "Starting torch and transformers")
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from ..gptq import checkpoint
        from ..gptq.choose_step import stepper_for

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        device = _device(options)
        dtype = _dtype(options, device)
        _require_memory(model, device, dtype)
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
            _free(device)
            raise LoadFailed(
                f"There is not enough memory on {_device_name(device)} for {model.name} ({format_bytes(model.size_bytes)}). "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            ) from None
        progress(0.95, "Fitting the conversation into the memory")
        try:
            context, reason = fit_context(
                model, options.context_tokens, dtype_bytes=dtype.itemsize, free_bytes=_free_bytes(device)
            )
        except LoadFailed:
            del hf
            _free(device)
            raise
        progress(0.97, "Preparing the fastest way to compute")
        stepper, note = stepper_for(hf, context)
        loaded = TransformersModel(model, hf, stepper, tokenizer, context, reason, (*notes, note) if note else notes, str(device))
        progress(1.0, "Ready")
        return loaded


class TransformersModel(LoadedModel):
    def __init__(
        self,
        model: LocalModel,
        hf: Any,
        stepper: Any,  # gptq.stepper.Stepper
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
        self._stepper = stepper
        self.context_tokens, self.context_reason = context_tokens, context_reason
        self.notes, self.device, self.can = notes, device, CAN
        self.template = chat_template.find(model.folder, tokenizer, model.architecture)
        self._prefix: Any = PrefixCache()
        self._end_ids = _end_ids(hf, tokenizer)
        self._turns = Turns(hf, self._worker)

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish]:
        from ..gptq.decode import generate

        return generate(
            self._stepper,
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
        self._stepper.close()
        self.hf = self._stepper = None
        _free(device)


def _end_ids(hf: Any, tokenizer: Any) -> set[int]:
    """Every id that ends an answer, from the generation settings and the tokenizer."""
    ids: set[int] = set()
    for found in (getattr(hf.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        ids.update(found if isinstance(found, (list, tuple)) else [found] if found is not None else [])
    return ids


def conversation_bytes_per_token(folder: Path, dtype_bytes: int = 2) -> int:
    """Keys and values of one token in every layer, from config.json; 0 if it does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    config = {**config, **(config.get("text_config") or {})}
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = config.get("head_dim") or hidden // heads
    return int(2 * layers * kv_heads * head_dim * dtype_bytes)


def fit_context(model: LocalModel, asked_tokens: int, *, dtype_bytes: int, free_bytes: int) -> tuple[int, str]:
    """(tokens, reason): the smallest of what the model was trained for, 8192 and what fits the free memory.

    A length the user asked for is only cut to what the model was trained for. Raises LoadFailed
    if not even a short conversation fits.
    """
    trained = model.context_tokens or 2048
    if asked_tokens:
        if asked_tokens <= trained:
            return asked_tokens, "as you asked"
        return trained, f"the model was trained for {trained}; you asked for {asked_tokens}"
    tokens, reason = trained, "what the model was trained for"
    if trained > DEFAULT_CONTEXT_TOKENS:
        tokens, reason = DEFAULT_CONTEXT_TOKENS, "the default; more can be asked for"
    per_token = conversation_bytes_per_token(model.folder, dtype_bytes)
    if per_token:
        fits = int((free_bytes - _KEPT_FREE_BYTES) // per_token)
        if fits < _SMALLEST_CONTEXT_TOKENS:
            raise LoadFailed(
                f"{model.name} fits, but with {format_bytes(max(0, free_bytes))} left there is no room for a conversation. "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            )
        if fits < tokens:
            tokens, reason = fits // 256 * 256, "what fits into the free memory"
    return tokens, reason


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
    context = options.context_tokens or min(model.context_tokens or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)
    reserve = _KEPT_FREE_BYTES + _ACTIVATIONS_BYTES + context * conversation_bytes_per_token(model.folder, dtype.itemsize)
    room = _free_bytes(device) - reserve
    if model.size_bytes <= room:
        return {"": device}, None
    import psutil

    return "auto", {device.index or 0: max(0, room), "cpu": int(psutil.virtual_memory().available)}


def _dtype(options: TransformersOptions, device: Any) -> Any:
    import torch

    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return named.get(options.dtype) or (torch.float32 if device.type == "cpu" else torch.float16)


def _free_bytes(device: Any) -> int:
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def _require_memory(model: LocalModel, device: Any, dtype: Any) -> None:
    """Refuse before the first byte is read what cannot fit anywhere. Raises LoadFailed."""
    import psutil

    needed = model.size_bytes * (2 if model.kind == "plain" and dtype.itemsize == 4 else 1)
    free = psutil.virtual_memory().available + (_free_bytes(device) if device.type == "cuda" else 0)
    if needed > free:
        raise LoadFailed(
            f"{model.name} needs {format_bytes(needed)} and {format_bytes(free)} are free. "
            "Close other programs, or choose a smaller branch (fewer bits, larger group)."
        )


def _device_name(device: Any) -> str:
    return "the graphics card" if device.type == "cuda" else "this machine"


def _free(device: Any) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
