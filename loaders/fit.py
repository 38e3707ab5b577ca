"""Does it fit? The one place where memory is counted: weights, the conversation at a context, and what computing takes.

Every figure is an estimate from file sizes and config.json, made before a byte is loaded, so that a
page can show it beside what is free. torch is imported only to ask a graphics card.
"""

import gc
import json
from pathlib import Path
from typing import Any

from ..core.errors import LoadFailed
from ..core.models import LocalModel
from ..core.units import format_bytes

DEFAULT_CONTEXT_TOKENS = 8192  # longer ones cost memory that few chats use; the options may ask for more
SMALLEST_CONTEXT_TOKENS = 256
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


def needs_bytes(model: LocalModel, context_tokens: int, dtype_bytes: float = 2) -> int:
    """Weights, conversation and overhead, in bytes, before loading."""
    return model.size_bytes + context_tokens * conversation_bytes_per_token(model.folder, dtype_bytes) + OVERHEAD_BYTES


def fit_context(model: LocalModel, asked_tokens: int, *, dtype_bytes: float, free_bytes: int) -> tuple[int, str]:
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
        fits = int((free_bytes - KEPT_FREE_BYTES) // per_token)
        if fits < SMALLEST_CONTEXT_TOKENS:
            raise LoadFailed(
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
    """Refuse before the first byte is read what cannot fit anywhere. Raises LoadFailed."""
    needed = model.size_bytes * (2 if model.kind == "plain" and dtype.itemsize == 4 else 1)
    free = free_ram_bytes() + (free_bytes(device) if device.type == "cuda" else 0)
    if needed > free:
        raise LoadFailed(
            f"{model.name} needs {format_bytes(needed)} and {format_bytes(free)} are free. "
            "Close other programs, or choose a smaller branch (fewer bits, larger group)."
        )


def give_back(device: Any) -> None:
    """Hand memory that nothing uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
