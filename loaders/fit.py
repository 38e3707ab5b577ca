"""Does it fit? The one place where memory is counted: weights, the conversation at a context, and what computing takes.

Every figure is an estimate from file sizes and config.json, made before a byte is loaded, so that a
page can show it beside what is free. torch is imported only to ask a graphics card.
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import NotEnoughMemory
from ..core.models import LocalModel
from ..core.units import format_bytes

DEFAULT_CONTEXT_TOKENS = 8192  # longer ones cost memory that few chats use; the options may ask for more
SMALLEST_CONTEXT_TOKENS = 256
_LACKED = ("out of memory", "can't allocate memory", "insufficient vram", "not enough memory")  # as back-ends say it
USEFUL_CONTEXT_TOKENS = 2048  # a context is shortened to this before a part of the weights leaves the card
OVERHEAD_BYTES = 600_000_000  # torch, CUDA's context, activations of one chunk of a prompt
ACTIVATIONS_BYTES = 300_000_000  # of these, what is not taken yet when the weights are placed
KEPT_FREE_BYTES = 1_000_000_000  # for the desktop and other programs


def conversation_bytes_per_token(folder: Path, dtype_bytes: float = 2) -> int:
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


def wanted_context(model: LocalModel, asked_tokens: int = 0) -> int:
    """The context a load aims at: what was asked for, else what the model was trained for, up to 8192."""
    return asked_tokens or min(model.context_tokens or DEFAULT_CONTEXT_TOKENS, DEFAULT_CONTEXT_TOKENS)


@dataclass(frozen=True)
class Fit:
    """What a model needs at a context, beside what is free, before it is loaded."""

    weights_bytes: int
    conversation_bytes: int
    context_tokens: int
    wanted_tokens: int  # more than context_tokens where it was shortened to fit
    free_bytes: int  # of the place it goes to
    place: str  # "the graphics card", "this machine"
    spare_bytes: int = 0  # elsewhere, for what does not fit there

    @property
    def needs_bytes(self) -> int:
        return self.weights_bytes + self.conversation_bytes + OVERHEAD_BYTES

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.free_bytes - KEPT_FREE_BYTES

    @property
    def impossible(self) -> bool:
        """Not even the weights alone have room anywhere."""
        return self.weights_bytes > max(0, self.free_bytes) + self.spare_bytes

    def __str__(self) -> str:
        parts = f"{format_bytes(self.weights_bytes)} of weights"
        if self.conversation_bytes:
            parts += f", {format_bytes(self.conversation_bytes)} for {self.context_tokens} tokens of conversation"
        parts += f", {format_bytes(OVERHEAD_BYTES)} for computing"
        verdict = "It fits."
        if self.context_tokens < self.wanted_tokens:
            verdict = f"The context is shortened from {self.wanted_tokens} to {self.context_tokens} tokens so that it fits."
        if not self.fits:
            on_card = self.place != MACHINE
            verdict = "A part goes to the processor, which is slow." if on_card and not self.impossible else "It is tight."
        if self.impossible:
            verdict = "It does not fit. Choose a smaller branch (fewer bits, larger group)."
        return (
            f"Needs {format_bytes(self.needs_bytes)}: {parts}. {format_bytes(max(0, self.free_bytes))} are free on {self.place}, "
            f"of which {format_bytes(KEPT_FREE_BYTES)} are kept for other programs. {verdict}"
        )


MACHINE, CARD = "this machine", "the graphics card"


def estimate(
    model: LocalModel, asked_tokens: int, *, free_bytes: int, place: str, spare_bytes: int = 0, dtype_bytes: float = 2
) -> Fit:
    """The fit of a model at the context asked for; without one, the context is shortened where that makes it fit."""
    wanted = wanted_context(model, asked_tokens)
    per_token = conversation_bytes_per_token(model.folder, dtype_bytes)
    context = wanted
    if not asked_tokens and per_token:
        room = free_bytes - KEPT_FREE_BYTES - OVERHEAD_BYTES - model.size_bytes
        context = _shortened(wanted, room // per_token)
    return Fit(model.size_bytes, context * per_token, context, wanted, free_bytes, place, spare_bytes)


def _shortened(wanted: int, fitting: int) -> int:
    """`fitting` tokens where they are fewer than wanted and still useful, else what was wanted."""
    if fitting >= wanted or fitting < min(wanted, USEFUL_CONTEXT_TOKENS):
        return wanted
    return int(fitting // 256 * 256) or wanted


def room_for_weights(model: LocalModel, asked_tokens: int, *, free_bytes: int, dtype_bytes: float = 2) -> int:
    """Bytes of a card that weights may take, so that 1 GB, the conversation and the computing have room beside them.

    The conversation gives way down to 2048 tokens before weights have to leave the card, unless the
    user fixed its length.
    """
    wanted = wanted_context(model, asked_tokens)
    per_token = conversation_bytes_per_token(model.folder, dtype_bytes)
    room = free_bytes - KEPT_FREE_BYTES - ACTIVATIONS_BYTES
    context = wanted
    if not asked_tokens and per_token:
        context = _shortened(wanted, (room - model.size_bytes) // per_token)
    return max(0, room - context * per_token)


def needs_bytes(model: LocalModel, context_tokens: int, dtype_bytes: float = 2) -> int:
    """Weights, conversation and overhead, in bytes, before loading."""
    return model.size_bytes + context_tokens * conversation_bytes_per_token(model.folder, dtype_bytes) + OVERHEAD_BYTES


def fit_context(model: LocalModel, asked_tokens: int, *, dtype_bytes: float, free_bytes: int) -> tuple[int, str]:
    """(tokens, reason): the smallest of what the model was trained for, 8192 and what fits the free memory.

    A length the user asked for is only cut to what the model was trained for. Raises NotEnoughMemory
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
        fits = int((free_bytes - KEPT_FREE_BYTES) // per_token)
        if fits < SMALLEST_CONTEXT_TOKENS:
            raise NotEnoughMemory(
                f"{model.name} fits, but with {format_bytes(max(0, free_bytes))} left there is no room for a conversation. "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            )
        if fits < tokens:
            tokens, reason = fits // 256 * 256, "what fits into the free memory"
    return tokens, reason


def free_bytes(device: Any) -> int:
    """Free memory of a torch.device, what torch holds in reserve counted as free."""
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_ram_bytes()


def free_ram_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def require_memory(model: LocalModel, device: Any, dtype: Any) -> None:
    """Refuse before the first byte is read what cannot fit anywhere. Raises NotEnoughMemory."""
    needed = model.size_bytes * (2 if model.kind == "plain" and dtype.itemsize == 4 else 1)
    free = free_ram_bytes() + (free_bytes(device) if device.type == "cuda" else 0)
    if needed > free:
        raise NotEnoughMemory(
            f"{model.name} needs {format_bytes(needed)} and {format_bytes(free)} are free. "
            "Close other programs, or choose a smaller branch (fewer bits, larger group)."
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was what was lacking, in whatever words a back-end said it; looks at what led to the error too."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, NotEnoughMemory)) or type(error).__name__ == "OutOfMemoryError":
            return True
        if any(words in str(error).lower() for words in _LACKED):
            return True
        error = error.__cause__ or error.__context__
    return False


def give_back(device: Any) -> None:
    """Hand memory that nothing uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
