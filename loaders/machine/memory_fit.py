"""Does a model fit? The one place that counts memory: weights, the conversation at a context, and what computing takes.

Every figure is an estimate from file sizes and config.json, made before a byte is loaded, so that a page can show it
beside what is free. The advice before a download and the load itself use the same function, `of`. torch is imported
only to ask a GPU.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core import folder_files
from ...core.errors import BadFile, NotEnoughMemory
from ...core.models import LocalModel
from ...core.neighbour_layouts import PLANAR, width_in_memory
from ...core.old_names import in_todays_words
from ...core.units import format_bytes
from .capabilities import version_of

DEFAULT_CONTEXT_TOKENS = 8192  # longer ones cost memory that few chats use; an option sets more
UNKNOWN_CONTEXT_TOKENS = 2048  # of a model that does not say what it was trained for
SMALLEST_CONTEXT_TOKENS = 256
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "insufficient vram",
    "not enough memory",
)  # in the words of the back-ends
USEFUL_CONTEXT_TOKENS = 2048  # a context is shortened to this before a part of the weights leaves the GPU
COMPUTING_BYTES = 300_000_000  # activations of one chunk of a prompt, buffers of the kernels
STARTING_BYTES = 300_000_000  # torch and CUDA's context take this before the first weight
KEPT_FREE_BYTES = 1_000_000_000  # for the desktop and other programs


@dataclass(frozen=True)
class Memory:
    """What a model could have, in bytes, once torch is started there."""

    ram: int
    gpu: int | None = None  # of the GPU; None if there is none that torch can use


@dataclass(frozen=True)
class Demand:
    """What a loader's options need of the memory."""

    requested_tokens: int = 0  # of context; 0: what fits
    trained_tokens: int = 0  # how long the context may be; 0: as the model says
    number_bytes: float = 2  # of one number of keys and values
    wide: bool = False  # computes with 32-bit numbers
    on_gpu: bool = True
    latent_kernels: bool = False  # our kernels on a GPU compute attention to latent vectors, where the model has it
    ranks: int = 1  # GPUs that compute every layer together; what is counted is the fullest of them
    weights_share: float = 1.0  # of the weights, that one of them holds
    conversation_share: float = 1.0


def conversation_bytes_per_token(folder: Path, dtype_bytes: float = 2, on_gpu: bool = True) -> int:
    """Keys and values of one token in every layer, from config.json; 0 if it does not say."""
    config = _config(folder)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    return int(layers * _kept_bytes(config, dtype_bytes, on_gpu))


def _config(folder: Path) -> dict[str, Any]:
    """Of the part that reads text; empty if it cannot be read."""
    try:
        config = in_todays_words(folder_files.read_json(folder / "config.json"))
    except (OSError, BadFile):
        return {}
    return {**config, **(config.get("text_config") or {})}


def _kept_bytes(config: dict[str, Any], dtype_bytes: float, on_gpu: bool) -> float:
    """Of a token in a layer."""
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    rank, turned = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if rank and turned:  # a latent vector (MLA), of which each head's key and value are made
        by_step = 2 * (2 * rank + turned)  # bytes; our step on a processor has the vector twice, as key and as value
        step = not on_gpu and version_of("numba") is not None
        if _keeps_latent() or step:
            kept = (rank + turned) * dtype_bytes
            return (max(kept, by_step) if step else kept) + (config.get("index_head_dim") or 0) * dtype_bytes
        fixed = config.get("qk_nope_head_dim") or 0
        return heads * (fixed + turned + (config.get("v_head_dim") or fixed)) * dtype_bytes
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    return 2 * kv_heads * (config.get("head_dim") or hidden // heads) * dtype_bytes


def matrices_bytes(folder: Path, demand: Demand) -> int:
    """Dense fp16 copies of every `kv_b_proj`, which the kernels for latent vectors (MLA) read on a GPU; 0 without them."""
    config = _config(folder)
    rank, fixed = config.get("kv_lora_rank"), config.get("qk_nope_head_dim")
    if not (demand.latent_kernels and rank and fixed and _keeps_latent()):
        return 0
    outputs = (config.get("num_attention_heads") or 1) * (fixed + (config.get("v_head_dim") or fixed))
    return int((config.get("num_hidden_layers") or 0) * outputs * rank * 2)


def _keeps_latent() -> bool:
    """Whether transformers keeps that vector; before 5.15 it kept keys and values."""
    numbers = re.findall(r"\d+", version_of("transformers") or "")[:2]
    return tuple(map(int, numbers)) >= (5, 15)


def wanted_context(model: LocalModel, requested_tokens: int = 0, trained_tokens: int = 0) -> int:
    """The context a load aims at: the requested one, else 8192; never more than what the model was trained for."""
    trained = trained_tokens or model.context_tokens or UNKNOWN_CONTEXT_TOKENS
    return min(requested_tokens or DEFAULT_CONTEXT_TOKENS, trained)


def weights_bytes(model: LocalModel, wide: bool = False) -> int:
    """In memory: packed weights as in the file (gptq_p: see width_in_memory), others in the number format of the computing."""
    if model.kind == PLANAR and model.quantize is not None:
        widths = model.quantize.mixed_bits or (model.quantize.bits,)
        return int(model.size_bytes * max(width_in_memory(each) / each for each in widths))
    return model.size_bytes * (2 if wide and model.kind == "plain" else 1)


State = Literal["fits", "partly", "tight", "not"]


@dataclass(frozen=True)
class Fit:
    """What a model needs at a context, beside what is free, before it is loaded."""

    weights_bytes: int
    conversation_bytes: int
    context_tokens: int
    wanted_tokens: int  # more than context_tokens where it was shortened to fit
    free_bytes: int  # of the device it goes to
    device: str  # "the GPU", "this machine"
    spare_bytes: int = 0  # elsewhere, for what does not fit there
    ranks: int = 1  # GPUs of which this is one
    matrices_bytes: int = 0  # dense copies beside the weights, for attention to latent vectors

    @property
    def needs_bytes(self) -> int:
        return self.weights_bytes + self.matrices_bytes + self.conversation_bytes + COMPUTING_BYTES

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.free_bytes - KEPT_FREE_BYTES

    @property
    def impossible(self) -> bool:
        """Not even the weights alone fit anywhere."""
        return self.weights_bytes > max(0, self.free_bytes) + self.spare_bytes

    @property
    def state(self) -> State:
        """partly: some of the weights are outside the GPU. tight: only without what is kept for other programs."""
        if self.fits or self.impossible:
            return "fits" if self.fits else "not"
        return "tight" if self.device == MACHINE or self.ranks > 1 else "partly"

    def __str__(self) -> str:
        parts = f"{format_bytes(self.weights_bytes)} of weights"
        if self.matrices_bytes:
            parts += f", {format_bytes(self.matrices_bytes)} for copies that attention reads"
        if self.conversation_bytes:
            parts += f", {format_bytes(self.conversation_bytes)} for {self.context_tokens} tokens of conversation"
        parts += f", {format_bytes(COMPUTING_BYTES)} for computing"
        verdict = {
            "fits": "It fits.",
            "partly": "A part goes to the processor, which is slow.",
            "tight": "It is tight.",
            "not": "It does not fit. Choose a smaller branch (fewer bits, larger group).",
        }[self.state]
        if self.fits and self.context_tokens < self.wanted_tokens:
            verdict = f"The context is shortened from {self.wanted_tokens} to {self.context_tokens} tokens so that it fits."
        return (
            f"Needs {format_bytes(self.needs_bytes)}: {parts}. {format_bytes(max(0, self.free_bytes))} are free on "
            f"{self.device}, of which {format_bytes(KEPT_FREE_BYTES)} are kept for other programs. {verdict}"
        )


MACHINE, GPU = "this machine", "the GPU"


def of(model: LocalModel, demand: Demand, memory: Memory) -> Fit:
    """The fit of a model with what a loader's options need."""
    if memory.gpu is None or not demand.on_gpu:
        return estimate(model, demand, free_bytes=memory.ram, device=MACHINE)
    if demand.ranks > 1:
        return estimate(model, demand, free_bytes=memory.gpu, device=f"each of {demand.ranks} GPUs")
    return estimate(model, demand, free_bytes=memory.gpu, device=GPU, spare_bytes=memory.ram)


def estimate(model: LocalModel, demand: Demand, *, free_bytes: int, device: str, spare_bytes: int = 0) -> Fit:
    """The formula. A context that nobody requested is shortened where that makes the model fit."""
    weights = math.ceil(weights_bytes(model, demand.wide) * demand.weights_share)
    wanted = wanted_context(model, demand.requested_tokens, demand.trained_tokens)
    matrices, per_token = matrices_bytes(model.folder, demand), _bytes_per_token(model, demand)
    context = wanted
    if not demand.requested_tokens and per_token:
        fitting = (free_bytes - KEPT_FREE_BYTES - COMPUTING_BYTES - weights - matrices) // per_token
        if min(wanted, USEFUL_CONTEXT_TOKENS) <= fitting < wanted:
            context = int(fitting // 256 * 256) or wanted
    return Fit(weights, context * per_token, context, wanted, free_bytes, device, spare_bytes, demand.ranks, matrices)


def _bytes_per_token(model: LocalModel, demand: Demand) -> int:
    whole = conversation_bytes_per_token(model.folder, demand.number_bytes, demand.on_gpu)
    return math.ceil(whole * demand.conversation_share)


def room_for_weights(model: LocalModel, demand: Demand, free_bytes: int) -> int:
    """Bytes of a GPU that weights may take, so that 1 GB, the conversation, the computing and what it copies fit beside them.

    The conversation is shortened down to 2048 tokens before weights have to leave the GPU, unless the user set its
    length.
    """
    found = estimate(model, demand, free_bytes=free_bytes, device=GPU)
    return max(0, free_bytes - KEPT_FREE_BYTES - COMPUTING_BYTES - found.matrices_bytes - found.conversation_bytes)


def fit_context(model: LocalModel, demand: Demand, free_bytes: int) -> tuple[int, str]:
    """(tokens, reason) for a model whose weights are loaded and not yet copied, from what is free now; agrees with `estimate`.

    A length that the user set is only cut to what the model was trained for. Raises NotEnoughMemory if not even a short
    conversation fits.
    """
    trained = demand.trained_tokens or model.context_tokens or UNKNOWN_CONTEXT_TOKENS
    tokens = wanted_context(model, demand.requested_tokens, demand.trained_tokens)
    if demand.requested_tokens:
        cut = f"the model was trained for {trained}; you set {demand.requested_tokens}"
        return tokens, "as you set it" if tokens == demand.requested_tokens else cut
    reason = "the default; the options can set more" if tokens < trained else "what the model was trained for"
    per_token = _bytes_per_token(model, demand)
    if per_token:
        beside = KEPT_FREE_BYTES + COMPUTING_BYTES + matrices_bytes(model.folder, demand)
        fits = int((free_bytes - beside) // per_token)
        if fits < SMALLEST_CONTEXT_TOKENS:
            raise NotEnoughMemory(
                f"{model.name} fits, but with {format_bytes(max(0, free_bytes))} left there is no room for a conversation. "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            )
        if fits < tokens:
            tokens, reason = fits // 256 * 256, "what fits in the available memory"
    return tokens, reason


def available_bytes(device: Any) -> int:
    """Free memory of a torch.device. What torch holds in reserve counts as free."""
    if device.type == "cuda":
        import torch

        free, _total = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_ram_bytes()


def available_ram_bytes() -> int:
    """Free memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().available)


def require_memory(model: LocalModel, device: Any, dtype: Any) -> None:
    """Refuse what cannot fit anywhere, before the first byte is read. Raises NotEnoughMemory."""
    needed = weights_bytes(model, dtype.itemsize == 4)
    free = available_ram_bytes() + (available_bytes(device) if device.type == "cuda" else 0)
    if needed > free:
        raise NotEnoughMemory(
            f"{model.name} needs {format_bytes(needed)} and {format_bytes(free)} are free. "
            "Close other programs, or choose a smaller branch (fewer bits, larger group)."
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether there was not enough memory, in the words of any back-end. Looks at the causes of the error too."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, NotEnoughMemory)) or type(error).__name__ == "OutOfMemoryError":
            return True
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
