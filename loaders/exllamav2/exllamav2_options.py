"""What can be set for the loader exllamav2, and what follows from it for the memory."""

from dataclasses import dataclass, replace

from ...core.errors import BadParameter
from ...core.models import LocalModel
from ..contract import superhot
from ..contract.options import gigabytes, option, require_choice, require_context
from ..machine import memory_fit

CACHES = {"FP16": ("ExLlamaV2Cache", 2.0), "Q8": ("ExLlamaV2Cache_Q8", 1.0625), "Q6": ("ExLlamaV2Cache_Q6", 0.8125),
           "Q4": ("ExLlamaV2Cache_Q4", 0.5625)}  # fmt: skip  # class, bytes of one value with its share of scales


@dataclass(frozen=True)
class ExLlamaV2Options:
    max_seq_len: int = option(
        0, "Context length (max_seq_len)", "Tokens the model keeps in view; 0 chooses what fits, up to 8192."
    )
    autosplit: bool = option(True, "Autosplit", "Fill one GPU after the other. Off: the first GPU, or the split below.")
    gpu_split: str = option("", "GPU split", "Gigabytes of weights for each GPU, for example 10,20; empty: automatic.")
    cache_type: str = option("FP16", "Cache type", "How the conversation is stored; Q4 takes a quarter.", tuple(CACHES))
    no_flash_attn: bool = option(False, "No flash-attn", "Do not use flash-attn; then one answer is computed at a time.")
    alpha_value: float = option(1.0, "Alpha value", "Stretches the rope (NTK); 1 changes nothing, 1.75 gives half as much again.")
    compress_pos_emb: float = option(1.0, "Compress positions", "Positions are divided by this; for models made so (SuperHOT).")
    rope_freq_base: float = option(0.0, "Rope base", "Base frequency of the rope; 0 takes the model's own.")
    num_experts_per_token: int = option(0, "Experts per token", "For mixtures of experts; 0 takes the model's own.")
    max_batch_size: int = option(4, "Answers at once", "Computed side by side; needs flash-attn.")
    context_tokens: int = option(0)  # max_seq_len for front ends that do not know the names of this loader

    def __post_init__(self) -> None:
        require_context("max_seq_len", self.max_seq_len)
        require_context("context_tokens", self.context_tokens)
        object.__setattr__(self, "cache_type", str(self.cache_type).upper())
        require_choice("cache_type", self.cache_type, tuple(CACHES))
        gigabytes("gpu_split", self.gpu_split)
        for name, low, high in (("alpha_value", 1, 64), ("compress_pos_emb", 1, 64), ("rope_freq_base", 0, 1e9)):
            if not low <= getattr(self, name) <= high:
                raise BadParameter(f"{name} must be between {low:g} and {high:g}; found {getattr(self, name)!r}.")
        if not 0 <= self.num_experts_per_token <= 64 or not 1 <= self.max_batch_size <= 64:
            raise BadParameter("num_experts_per_token must be 0 to 64, max_batch_size 1 to 64.")

    @property
    def asked_tokens(self) -> int:
        return self.max_seq_len or self.context_tokens

    @property
    def stretch(self) -> float:
        """How many times longer than trained the context may be."""
        return max(self.alpha_value, self.compress_pos_emb)

    def for_model(self, model: LocalModel) -> "ExLlamaV2Options":
        """With the positions compressed as the code of a SuperHOT folder does, unless the user changed the rope."""
        untouched = (self.compress_pos_emb, self.alpha_value, self.rope_freq_base) == (1, 1, 0)
        if not untouched or (factor := superhot.compression(model)) == 1:
            return self
        return replace(self, compress_pos_emb=factor)

    def demand(self, model: LocalModel, gpu: bool) -> memory_fit.Demand:
        trained = model.context_tokens or memory_fit.UNKNOWN_CONTEXT_TOKENS
        if superhot.compression(model) > 1:  # its config.json may have the stretched length already
            trained = min(trained, superhot.TRAINED_TOKENS)
        trained = int(trained * self.stretch)
        return memory_fit.Demand(self.asked_tokens, trained, CACHES[self.cache_type][1])
