"""What can be set for the loader transformers, and what follows from it: device, number format, where the weights go."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadParameter
from ...core.folder_files import shown_name
from ...core.models import LocalModel
from ...core.old_names import for_new_files
from ...gptq.parallel.dividing import MOST_RANKS, fullest_share
from ..contract import superhot
from ..contract.options import gigabytes, option, require_choice, require_context
from ..contract.standard_folder import config_of
from ..machine import memory_fit

if TYPE_CHECKING:
    from ...gptq.rope import Rope

KERNELS = ("native", "optimum")
DTYPES = ("auto", "fp16", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
MOST_PARALLEL = 256
CACHE_TYPES = ("fp16", "q8")
_NUMBER_BYTES = {"fp16": 2.0, "q8": 1.04}  # q8: a byte, and a scale of two bytes for every 64
GUESSES = ("auto", "on", "off")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class TransformersOptions:
    context_tokens: int = option(0, "Context length", "Tokens the model keeps in view; 0 chooses what fits, up to 8192.")
    device: str = option("auto", "Device", "auto uses the GPU if there is one.", DEVICES)
    dtype: str = option("auto", "Number format", "auto: 16-bit floats on a GPU, 32-bit on the processor.", DTYPES)
    kernel: str = option(
        "native",
        "GPTQ kernel",
        "native: this program's own. optimum: transformers' own, with optimum and GPTQModel.",
        KERNELS,
    )
    gpu_memory: str = option(
        "", "GPU memory", "Gigabytes of weights for each GPU, for example 10,20; empty: what fits, the rest in main memory."
    )
    cpu_memory: float = option(0.0, "Main memory", "Gigabytes for weights that do not fit on a GPU; 0: all.")
    cache_type: str = option("fp16", "Cache type", "How the conversation is stored on a GPU; q8 takes half.", CACHE_TYPES)
    parallel: int = option(
        0,
        "Answers at once",
        "At most so many side by side; 0: what fits, up to 256 on a GPU (32 without a step of our own) and 64 on a processor.",
    )
    guesses: str = option(
        "auto",
        "Guess ahead",
        "Computes likely next words beside the last one: an answer is there sooner where the conversation repeats. "
        "auto and on do so where it pays; off never does.",
        GUESSES,
    )
    draft_model: str = option(
        "",
        "Draft model",
        "A small model with the same tokenizer, by its folder or its name beside the model: it guesses the next words. "
        "For processors; empty: none.",
    )
    tensor_parallel: int = option(
        0,
        "GPUs that compute together",
        "Each computes a part of every layer (tensor parallel); 0: as many as a model needs that is too large for one, "
        "1: layers one after the other.",
        several_gpus=True,
    )
    attn_implementation: str = option("auto", "Attention", "auto is what transformers prefers here.", ATTENTION)
    compress_pos_emb: float = option(1.0, "Compress positions", "Positions are divided by this; for models made so (SuperHOT).")
    alpha_value: float = option(1.0, "Alpha value", "Stretches the rope (NTK) for a longer context; 1 changes nothing.")
    rope_freq_base: float = option(0.0, "Rope base", "Base frequency of the rope; 0 takes the model's own.")
    lora: str = option("", "LoRA adapter", "A PEFT folder, or the name of one beside the model; empty: none.")
    trust_remote_code: bool = option(
        False, "Run the model's own code", "Runs program files out of the model's folder. Only for models whose author you trust."
    )

    def __post_init__(self) -> None:
        require_context("context_tokens", self.context_tokens)
        require_choice("device", self.device, DEVICES)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("kernel", self.kernel, KERNELS)
        object.__setattr__(self, "cache_type", _cache_type(self.cache_type))
        require_choice("cache_type", self.cache_type, CACHE_TYPES)
        if isinstance(self.parallel, bool) or not isinstance(self.parallel, int) or not 0 <= self.parallel <= MOST_PARALLEL:
            raise BadParameter(
                f"parallel must be 1 to {MOST_PARALLEL} answers at once, or 0 for what fits; found {self.parallel!r}."
            )
        require_choice("guesses", self.guesses, GUESSES)
        ranks = self.tensor_parallel
        if isinstance(ranks, bool) or not isinstance(ranks, int) or not 0 <= ranks <= MOST_RANKS:
            raise BadParameter(
                f"tensor_parallel must be 2 to {MOST_RANKS} GPUs that compute together, 1 for none, or 0 for as many as the "
                f"model needs; found {ranks!r}."
            )
        require_choice("attn_implementation", self.attn_implementation, ATTENTION)
        for name in ("lora", "draft_model"):
            if not isinstance(value := getattr(self, name), str):
                raise BadParameter(f"{name} must be the name of a folder; found {value!r}.")
        gigabytes("gpu_memory", self.gpu_memory)
        if isinstance(self.cpu_memory, bool) or not isinstance(self.cpu_memory, (int, float)) or not 0 <= self.cpu_memory < 1e6:
            raise BadParameter(f"cpu_memory must be gigabytes, 0 for what is free; found {self.cpu_memory!r}.")
        if not isinstance(self.trust_remote_code, bool):
            raise BadParameter(f"trust_remote_code must be true or false; found {self.trust_remote_code!r}.")
        for name in ("compress_pos_emb", "alpha_value"):
            if not isinstance(value := getattr(self, name), (int, float)) or not 1 <= value <= 64:
                raise BadParameter(f"{name} must be between 1 (changes nothing) and 64; found {value!r}.")
        base = self.rope_freq_base
        if not isinstance(base, (int, float)) or not (base == 0 or 100 <= base <= 1e9):
            raise BadParameter(f"rope_freq_base must be 0 (as the model has it) or between 100 and 1e9; found {base!r}.")

    def adapter(self, model: LocalModel) -> Path | None:
        """The folder of the LoRA adapter. Raises BadParameter if it is not there."""
        if not self.lora.strip():
            return None
        folder = model.folder.parent / Path(self.lora.strip()).expanduser()  # an absolute path stays what it is
        if not folder.is_dir():
            raise BadParameter(
                f"There is no folder {shown_name(folder)} for the LoRA adapter. Download it, or leave the setting empty."
            )
        return folder

    def draft(self, model: LocalModel) -> Path | None:
        """The folder of the draft model. Raises BadParameter if it is not there."""
        if not self.draft_model.strip():
            return None
        folder = model.folder.parent / Path(self.draft_model.strip()).expanduser()
        if not folder.is_dir():
            raise BadParameter(
                f"There is no folder {shown_name(folder)} for the draft model. Download it, or leave the setting empty."
            )
        return folder

    @property
    def rope(self) -> "Rope":
        from ...gptq.rope import Rope

        return Rope(self.compress_pos_emb, self.alpha_value, self.rope_freq_base)

    @property
    def is_plain(self) -> bool:
        """Whether it can be told where a model goes before transformers is imported."""
        return self.cache_type == "fp16" and (self.compress_pos_emb, self.alpha_value, self.rope_freq_base) == (1, 1, 0)

    def for_model(self, model: LocalModel) -> "TransformersOptions":
        """With the positions compressed as the code of a SuperHOT folder does, unless the user changed the rope."""
        untouched = (self.compress_pos_emb, self.alpha_value, self.rope_freq_base) == (1, 1, 0)
        if not untouched or self.trust_remote_code or (factor := superhot.compression(model)) == 1:
            return self
        return replace(self, compress_pos_emb=factor)

    def demand(self, model: LocalModel, gpu: bool) -> memory_fit.Demand:
        """What these options need of the memory. `gpu`: there is one."""
        on_gpu = gpu and self.device != "cpu"
        wide = self.dtype == "fp32" or (self.dtype == "auto" and not on_gpu)
        trained = model.context_tokens or memory_fit.UNKNOWN_CONTEXT_TOKENS
        if superhot.compression(model) > 1:  # its config.json may have the stretched length already
            trained = min(trained, superhot.TRAINED_TOKENS)
        if (self.compress_pos_emb, self.alpha_value, self.rope_freq_base) != (1, 1, 0):
            trained = int(trained * self.rope.stretch(config_of(model).get("rope_theta", 10000.0)))
        number_bytes = 4.0 if wide else 2.0
        if self.cache_type != "fp16" and self.tensor_parallel < 2 and not self.no_cache_type(model, gpu):
            number_bytes = _NUMBER_BYTES[self.cache_type]
        found = memory_fit.Demand(self.context_tokens, trained, number_bytes, wide, on_gpu)
        if self.tensor_parallel < 2 or not on_gpu:
            return replace(found, latent_kernels=on_gpu and not wide and self.kernel == "native" and model.is_packed)
        weights, conversation = fullest_share(model, self.tensor_parallel)
        return replace(found, ranks=self.tensor_parallel, weights_share=weights, conversation_share=conversation)

    def no_cache_type(self, model: LocalModel, gpu: bool) -> str:
        """Why another cache type than fp16 would change nothing for a model; "" if it would."""
        if not gpu or self.device == "cpu":
            return "it is for GPUs"
        if self.tensor_parallel > 1:
            return "several GPUs that compute together keep 16-bit numbers"
        if self.kernel != "native":
            return f"the kernel {self.kernel} has none"
        if self.dtype not in ("auto", "fp16"):
            return f"it needs the number format fp16, not {self.dtype}"
        if not model.is_packed:
            return "it is for quantised models"
        from ...gptq.families.known import has_gpu_step

        return "" if has_gpu_step(for_new_files(config_of(model))) else "models of this architecture are computed without it"


def _cache_type(value: Any) -> Any:
    """Saved settings hold one name for every loader: exllamav2 writes it in capitals and has smaller types too."""
    name = str(value).lower()
    return "q8" if name in ("q6", "q4") else name if name in CACHE_TYPES else value


def device_of(options: TransformersOptions) -> Any:
    """The torch.device of the first weights. Raises BadParameter."""
    import torch

    if options.device != "auto":
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise BadParameter("There is no GPU that torch can use. Choose the device auto or cpu.")
        return torch.device(options.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(options: TransformersOptions, device: Any) -> Any:
    import torch

    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return named.get(options.dtype) or (torch.float32 if device.type == "cpu" else torch.float16)


def placement(
    model: LocalModel, options: TransformersOptions, device: Any, dtype: Any
) -> tuple[Any, dict[int | str, int] | None]:
    """(device_map, max_memory): the whole model on one device, or spread over the GPUs and main memory.

    On each GPU stay free: 1 GB for other programs, the conversation, and what computing takes.
    """
    if device.type != "cuda":
        return {"": device}, None
    ram = int(options.cpu_memory * 1e9) or memory_fit.available_ram_bytes()
    given = gigabytes("gpu_memory", options.gpu_memory)
    if given:  # the user's own split is filled in the order it was written
        return "sequential", {**{at: int(size * 1e9) for at, size in enumerate(given)}, "cpu": ram}
    rooms = _rooms(model, options, device)
    first = device.index or 0
    if memory_fit.weights_bytes(model, dtype.itemsize == 4) <= rooms[first]:
        return {"": device}, None
    return "auto", {**rooms, "cpu": ram}


def _rooms(model: LocalModel, options: TransformersOptions, device: Any) -> dict[int | str, int]:
    """Bytes for weights on each GPU. Each holds the conversation of its own layers; counted is that of all layers."""
    import torch

    found = {}
    for at in range(torch.cuda.device_count()) if device.index is None else [device.index]:
        free = memory_fit.available_bytes(torch.device("cuda", at))
        found[at] = memory_fit.room_for_weights(model, options.demand(model, True), free)
    return dict(found)


def free_beside(hf: Any, device: Any) -> int:
    """Bytes free for the conversation: of one device, or of the fullest GPU times the GPUs that hold layers."""
    import torch

    devices: Sequence[Any] = list((getattr(hf, "hf_device_map", None) or {}).values())
    gpus = sorted({int(str(each).rpartition(":")[2]) for each in devices if str(each).rpartition(":")[2].isdigit()})
    if device.type != "cuda" or len(gpus) < 2:
        return memory_fit.available_bytes(device)
    return len(gpus) * min(memory_fit.available_bytes(torch.device("cuda", at)) for at in gpus)
