"""A stepper in the place of a transformers model's forward: `generate`, its processors and its logits work as before.

The cache object that `generate` passes on says which ids were read; the stepper keeps their keys and values. So a cache may
be cut, copied and reused. A call that a stepper cannot compute (several rows, padding, embeddings, labels, hidden states,
layers that another library has replaced) goes to the model's own forward, where that still computes; keys and values that
it needs are computed then. Without such a forward it is refused.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .cache_of_ids import kind_of_ids, new_cache
from .module_watch import ModuleWatch
from .prefix_cache import PrefixCache
from .sampling_loop import SamplingLoop, in_place_of_sample
from .stepper import Memory, Stepper
from .transformers_memory import CACHE_NAMES, cache_name

_READ = frozenset(
    ("input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep", *CACHE_NAMES)
)
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")  # settings that ask for more than logits
_SMALL = 32  # ids of a call of the model's own forward that more threads would slow down


class ForwardPatch:
    """For one thread, until `release`."""

    def __init__(
        self, hf: Any, stepper: Stepper, prefix: PrefixCache, context_tokens: int | None = None, own_loop: bool = False
    ) -> None:
        """`context_tokens`: up to which length the stepper computes, where the model's own forward computes too. `own_loop`:
        `generate` goes from token to token by sampling_loop.py, where it is asked for nothing else."""
        self._hf, self._stepper, self._prefix, self._own_loop = hf, stepper, prefix, own_loop
        self._context_tokens = context_tokens
        self._name = cache_name()
        self._own = {name: vars(hf).get(name) for name in ("forward", "generate")}
        self._original: Callable[..., Any] = hf.forward
        signature = inspect.signature(hf.forward)
        self._arguments = tuple(signature.parameters)
        self._keeps_some = "logits_to_keep" in self._arguments
        self._read: list[int] = []  # the ids in memory
        self._memory: Memory | None = None
        self._kinds: dict[type, type] = {}
        self._parts = ModuleWatch(hf) if context_tokens is not None else None

        def forward(*positional: Any, **given: Any) -> Any:
            return self._forward({**dict(zip(self._arguments, positional, strict=False)), **given})

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self._patched = forward
        hf.forward = forward
        if hasattr(hf, "generate"):
            self._generate = hf.generate
            hf.generate = self._generated

    def release(self) -> None:
        """Leave the model as it was; nothing of it is held any more."""
        self._memory, self._parts = None, None
        for name, own in self._own.items():
            if own is not None:
                setattr(self._hf, name, own)
            else:
                vars(self._hf).pop(name, None)
        self._own, self._hf = {}, None
        for name in ("_original", "_generate", "_patched"):
            vars(self).pop(name, None)

    def _generated(self, *positional: Any, **given: Any) -> Any:
        loop = in_place_of_sample(self._hf, self._sampled) if self._own_loop else nullcontext()
        try:
            with self._stepper.while_sampling(), loop:
                return self._generate(*positional, **given)
        finally:
            self._keep()

    def _sampled(
        self,
        usual: Callable[[], Any],
        ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        """What transformers' `_sample` returns, computed without its forward; by `usual` what asks for more."""
        hf, cache, most = self._hf, _cache_of(given), stopping_criteria.max_length
        if (
            synced_gpus
            or not SamplingLoop.suits(logits_processor, stopping_criteria, generation_config, given)
            or self._why_not({"input_ids": ids, **given})
            or self._ids_of(cache)
            or most is None
            or (self._context_tokens is not None and most > self._context_tokens)
            or self._stepper.angles_of(most)
            or hf._forward_hooks
            or hf._forward_pre_hooks
            or not self._is_called_by(hf.forward)
        ):
            return usual()
        row = ids[0].tolist()
        with torch.inference_mode():
            logits = self._logits([], row, 1)[0]
            memory, read = self._memory, self._read
            assert memory is not None
            running = self._stepper.running(memory, row)
        self._memory, self._read = None, []  # a processor or a criterion may call the model meanwhile
        loop = SamplingLoop(logits_processor, stopping_criteria, generation_config, streamer, self._dtype(logits))
        try:
            return loop.run(ids, logits, running, read.append, most)
        finally:  # also where a part of the caller's ended it: the cache holds what was read
            if cache is not None:
                self._kept_in(cache, read[: memory.length])
            self._keep()
            self._memory, self._read = memory, read

    def _is_called_by(self, forward: Callable[..., Any]) -> bool:
        """Whether a model's forward is ours, directly or in the queue of calls (`passes_on`: itself, and what it calls)."""
        passes_on = vars(forward).get("passes_on") if inspect.isfunction(forward) else None
        return forward is self._patched or (passes_on is not None and passes_on[0] is forward and passes_on[1] is self._patched)

    def _forward(self, given: dict[str, Any]) -> Any:
        why = self._why_not(given)
        if why:
            return self._layer_by_layer(given, why)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = _cache_of(given)
        row = given["input_ids"][0].tolist()
        keep = given.get("logits_to_keep")
        before = self._ids_of(cache)
        with torch.inference_mode():
            logits = self._logits(before, row, 0 if keep is None else keep)
        used = given.get("use_cache")
        if cache is None and (used or (used is None and getattr(self._config, "use_cache", True))):
            cache = new_cache(self._hf.config)
        if cache is not None:
            self._kept_in(cache, [*before, *row])
        return CausalLMOutputWithPast(logits=logits.clone().to(self._dtype(logits)), **{self._name: cache})

    def _dtype(self, logits: Tensor) -> torch.dtype:
        """In which logits are passed on."""
        dtype: torch.dtype = getattr(self._hf, "dtype", logits.dtype) if self._parts is not None else logits.dtype
        return dtype

    @property
    def _config(self) -> Any:
        config = self._hf.config
        return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def _why_not(self, given: dict[str, Any]) -> str:
        """Why the stepper cannot compute this call, as a message; "" if it can."""
        ids = given.get("input_ids")
        if ids is None or given.get("inputs_embeds") is not None or given.get("labels") is not None:
            return "This model computes from input_ids only, without inputs_embeds and labels: it cannot be trained."
        if ids.dim() != 2 or ids.shape[0] != 1:
            return f"This model computes one row at a time; {ids.shape[0]} were given."
        mask, new = given.get("attention_mask"), ids.shape[1]
        if self._parts is None:
            padded = mask is not None and mask.dim() == 2 and not bool(mask[0, -new:].all())
            return "This model computes one row without padding." if padded else ""
        cache = _cache_of(given)
        if not new or not self._is_known(cache):
            return "its cache is not one that names the ids it holds"
        past = len(self._ids_of(cache))
        total = past + new
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != total or not bool(mask.all())):
            return "padding, or a mask of its own"
        for name in ("position_ids", "cache_position"):
            positions = given.get(name)
            if positions is not None and not _counted(positions, past, new):
                return "positions of its own"
        if (self._context_tokens is not None and total > self._context_tokens) or self._stepper.angles_of(total):
            return "a text that is longer than the step computes"
        if any(given[name] is not None and given[name] is not False for name in given if name not in _READ):
            return "more than ids"
        config = self._hf.config
        if any(getattr(config, name, False) for name in _OUTPUTS):
            return "more than logits"
        if given.get("return_dict") is False or getattr(config, "return_dict", True) is False:
            return "another output"
        if torch.is_grad_enabled() and self._hf.training:
            return "training"
        return "" if self._parts.unchanged else "layers were replaced, or have hooks"

    def _layer_by_layer(self, given: dict[str, Any], why: str) -> Any:
        if self._parts is None:
            raise ValueError(why)
        cache, ids = _cache_of(given), given.get("input_ids")
        self._fill(cache)
        small = ids is not None and ids.numel() <= _SMALL
        with nullcontext() if small else self._stepper.while_reading():
            return self._original(**given)

    # --- caches -------------------------------------------------------------------------------------

    def _is_known(self, cache: Any) -> bool:
        """Whether a cache is one of ours, or an empty one of the usual class."""
        from transformers import DynamicCache

        if cache is None or type(cache) in self._kinds.values():
            return True
        return type(cache) is DynamicCache and not getattr(cache, "offloading", False) and cache.get_seq_length() == 0

    def _ids_of(self, cache: Any) -> list[int]:
        ids: list[int] = vars(cache)["_ids"] if type(cache) in self._kinds.values() else []
        return ids

    def _kept_in(self, cache: Any, ids: list[int]) -> None:
        if type(cache) not in self._kinds.values() and hasattr(cache, "get_seq_length"):
            usual = type(cache)
            kind = getattr(cache, "layer_class_to_replicate", None)
            if kind is not None and not cache.layers:  # it answers for each of its layers, as a filled one does
                cache.layers = [kind() for _ in range(self._config.num_hidden_layers)]
            if usual not in self._kinds:
                self._kinds[usual] = kind_of_ids(usual, self._fill if self._parts is not None else lambda _cache: None)
            cache.__class__ = self._kinds[usual]
        vars(cache)["_ids"] = ids

    def _fill(self, cache: Any) -> None:
        """Compute the keys and values of a cache of ours, which is a usual one from then on."""
        usual = next((usual for usual, own in self._kinds.items() if type(cache) is own), None)
        if usual is None:
            return
        ids = vars(cache).pop("_ids")
        cache.__class__ = usual
        if ids and self._hf is not None:
            name = next((each for each in CACHE_NAMES if each in self._arguments), self._name)
            some = {"logits_to_keep": 1} if self._keeps_some else {}
            with torch.no_grad(), self._stepper.while_reading():
                self._original(
                    input_ids=torch.tensor([ids], device=self._stepper.device), use_cache=True, **{name: cache}, **some
                )

    # --- the stepper --------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Let what is in memory be used by whoever comes next."""
        memory, self._memory = self._memory, None
        if memory is not None and memory.length:
            self._prefix.keep(self._read[: memory.length], memory)

    def _logits(self, before: Sequence[int], row: Sequence[int], keep: Any) -> Tensor:
        """Logits [1, n, V] of those of `row` that are wanted, after the ids `before`."""
        count = (keep or len(row)) if isinstance(keep, int) else len(row)
        count = min(count, len(row))
        ids = [*before, *row]
        memory, held = self._memory, 0
        if memory is not None and 0 < memory.length <= len(ids) - count and self._read[: memory.length] == ids[: memory.length]:
            held = memory.length
        else:
            self._keep()
            memory, held = self._prefix.take(ids[: len(ids) - count + 1])
            if memory is None:
                memory = self._stepper.begin()
        self._memory, self._read = memory, ids
        try:
            logits = self._stepper.last_logits(memory, ids[held:], count)
        except BaseException:
            self._memory = None  # it may hold a part of the ids
            raise
        return logits[None] if isinstance(keep, int) else logits[None, keep]


def _cache_of(given: dict[str, Any]) -> Any:
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _counted(positions: Tensor, past: int, new: int) -> bool:
    """Whether positions [..., new] are those of tokens `past` and on, in each row."""
    if positions.shape[-1] != new:
        return False
    expected = list(range(past, past + new))
    return all(row == expected for row in positions.reshape(-1, new).tolist())
