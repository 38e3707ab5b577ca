"""Attention of one token to latent vectors (MLA) over a cache of transformers at a fixed address (latent_attention.cu).

Such an attention module keeps what is compressed, and multiplies `kv_b_proj` with every kept token for each new one. While a
graph is recorded its forward is ours: the product goes into the query and into the sum instead. Whether that is the same is
found by trying it with the first token of a recording: what is kept, and what the module gives.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from .cuda_driver import HOPPER
from .cuda_linear import CudaLinear, leave_room_beside
from .deferred import have_written, plainly
from .forward_calls import take_forward
from .gpu_kernels import Gpu
from .kernel_arguments import LATENT
from .kernel_source import LatentVariant
from .module_facts import asked_for, given_any
from .natural_order import NUMBERS
from .token_attention import capturing
from .token_rows import difference

_PARTS = (
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "kv_b_proj",
    "o_proj",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "scaling",
    "num_heads",
    "layer_idx",
)
_MASK = "create_causal_mask"
_CHILDREN = {
    "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj",
}  # fmt: skip
_OURS = "_of_gptq_webui"  # the end of a merged layer's name
_TAKEN = {  # by the forward of such an attention, the mask as the number of tokens that are seen
    "hidden_states", "position_embeddings", "attention_mask", "cache", "past_key_values", "cache_position", "position_ids",
    "use_cache",
}  # fmt: skip
_FAR = 1 << 20  # positions by which a trial moves a token
_MOST_SPLITS = 64  # blocks that share the tokens, as many as read_latent adds up
_SPLIT_TOKENS = 32  # that are shown, for each of them
_HEADS = 16  # of a block
_CLUSTER = 8  # blocks of a head, where one kernel computes all
_WHOLE_TOKENS = 1024  # that are shown, at most, where one kernel computes all
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative difference to the module's own forward


def is_latent(module: nn.Module) -> bool:
    """Whether a module has the parts of an attention to latent vectors."""
    if not all(hasattr(module, each) for each in _PARTS) or getattr(module, "sliding_window", None) is not None:
        return False
    if any(name not in _CHILDREN and not name.endswith(_OURS) for name, _child in module.named_children()):
        return False  # it chooses among its tokens, or does something else besides
    return getattr(module, "q_proj", None) is not None or getattr(module, "q_b_proj", None) is not None


def take_latent(
    model: nn.Module, attention: "LatentAttention", aside: Callable[[], AbstractContextManager[None]], undo: ExitStack
) -> None:
    """Compute a model's attention to latent vectors by `attention` until `undo` is closed. In `aside` a module is only tried."""
    for module in [each for each in model.modules() if is_latent(each)]:
        leave_room_beside(module)
        take_forward(module, lambda own, original: _taken(own, original, attention, aside), undo)


def leave_masks_out(model: nn.Module, attention: "LatentAttention", undo: ExitStack) -> None:
    """Make no causal mask until `undo` is closed, in a forward after one whose every attention `attention` computed: it counts
    the tokens that a token sees."""
    modules = [each for each in model.modules() if is_latent(each)]
    if not modules or len(modules) != getattr(getattr(model, "config", None), "num_hidden_layers", None):
        return
    for own in {sys.modules.get(type(each).__module__) for each in modules}:
        original = getattr(own, _MASK, None)
        if callable(original):
            setattr(own, _MASK, _left_out(original, attention, modules))
            undo.callback(setattr, own, _MASK, original)


def _left_out(original: Callable[..., Any], attention: "LatentAttention", modules: Sequence[nn.Module]) -> Callable[..., Any]:
    def masked(*args: Any, **given: Any) -> Any:
        return None if attention.leave_mask_out(modules) else original(*args, **given)

    return masked


def _taken(
    module: nn.Module,
    original: Callable[..., Any],
    attention: "LatentAttention",
    aside: Callable[[], AbstractContextManager[None]],
) -> Callable[..., Any]:
    others = asked_for(original) - _TAKEN

    def forward(hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        def plain() -> Any:
            with aside():
                moved = None
                if isinstance(at := given.get("position_ids"), Tensor):  # a module may scale by its position itself
                    moved = original(hidden_states, **{**given, "position_ids": at + _FAR})
                wanted = original(hidden_states, **given)
            if moved is None:
                return wanted
            with plainly():
                same = difference(moved[0], wanted[0]) < _CLOSE[hidden_states.dtype] / 10
            return wanted if same else None

        cache = given.get("cache", given.get("past_key_values"))
        usual = not args and not given_any(others, given)
        out = attention.of(module, hidden_states, cache, given.get("position_embeddings"), plain) if usual else None
        attention.computed(module, out is not None)
        return original(hidden_states, *args, **given) if out is None else (out, None)

    return forward


class _Kind(NamedTuple):
    """How modules that have much in common are computed, as a trial found it."""

    turn: int  # what turns together: `kind` of LATENT
    in_one: bool  # by one kernel, where the conversation is short


class LatentAttention:
    """Its kernels on one GPU, the modules' matrices, and the memory that they need."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._kinds: dict[Any, _Kind | None] = {}  # by what modules have in common; None: not computed here
        self._matrices: dict[int, Tensor] = {}  # fp16 [heads * (fixed + values), rank], by the module's id
        self._work: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        self._computed: set[int] = set()  # modules (by id) of this recording
        self._without_mask = False

    def end(self) -> None:
        """A recording ends."""
        self._computed.clear()
        self._without_mask = False

    def leave_mask_out(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all of them were computed here, in this recording: those of this forward must be, too."""
        self._without_mask = all(id(each) in self._computed for each in modules)
        return self._without_mask

    def computed(self, module: nn.Module, here: bool) -> None:
        """Raises RuntimeError if a module needs the mask that was left out."""
        if here:
            self._computed.add(id(module))
        elif self._without_mask:
            raise RuntimeError("attention differs from one forward to the next")

    def close(self) -> None:
        self._matrices.clear()
        self._work.clear()

    def of(self, module: Any, x: Tensor, cache: Any, angles: Any, plain: Callable[[], Any]) -> Tensor | None:
        """What the module gives for one token [1, 1, H]; None if that is left to its own forward, which `plain` calls. `plain`
        gives None where the module heeds more than what is given here."""
        layer = self._layer(module, x, cache)
        if layer is None:
            return None
        key = (type(module), self._variant(module, x.dtype), isinstance(angles, Tensor), module.num_heads, layer.keys.shape[2])
        if key not in self._kinds:
            if capturing():
                return None
            self._kinds[key] = self._try(module, x, layer, angles, plain)
        kind = self._kinds[key]
        if kind is None or (id(module) not in self._matrices and capturing()):
            return None
        found: Tensor = module.o_proj(self._attend(module, x, layer, angles, kind))
        return found

    def _layer(self, module: Any, x: Tensor, cache: Any) -> Any:
        """The module's keys at fixed addresses, if the kernels can read and continue them."""
        if x.numel() != x.shape[-1] or x.dtype not in NUMBERS or not x.is_cuda or not hasattr(cache, "layers"):
            return None
        layer = cache.layers[module.layer_idx]
        rank, turned = module.kv_lora_rank, module.qk_rope_head_dim
        if getattr(layer, "count", None) is None or not isinstance(getattr(layer, "keys", None), Tensor):
            return None
        kept = layer.keys.shape[:2] == layer.values.shape[:2] == (1, 1)
        if not kept or (layer.keys.shape[3], layer.values.shape[3]) != (rank, turned) or layer.keys.dtype != x.dtype:
            return None
        sizes = (rank % 64, module.qk_nope_head_dim % 16, turned % 16, module.v_head_dim % 16)
        variant = self._variant(module, x.dtype)
        return layer if not any(sizes) and variant.shared_bytes <= self._gpu.shared_limit_bytes else None

    @staticmethod
    def _variant(module: Any, dtype: torch.dtype) -> LatentVariant:
        return LatentVariant(
            dtype == torch.bfloat16, module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
        )

    def _try(self, module: Any, x: Tensor, layer: Any, angles: Any, plain: Callable[[], Any]) -> _Kind | None:
        given = plain()
        if not isinstance(given, tuple) or len(given) != 2:
            return None
        wanted, at = given[0], int(layer.count)
        with plainly():
            variant = self._variant(module, x.dtype)
            whole = self._whole(variant, module.num_heads)
            self._gpu.add_missing(variants=[variant] if whole is None else [variant, whole])
            kept = layer.keys[0, 0, at].clone(), layer.values[0, 0, at].clone()
        turns = [turn for turn in range(3) if _of_kind(angles, turn, module.qk_rope_head_dim, x.dtype)]
        for in_one, turn in itertools.product((True, False) if whole is not None else (False,), turns):
            kind = _Kind(turn, in_one)
            with plainly():
                layer.keys[0, 0, at], layer.values[0, 0, at] = 0, 0
            found = module.o_proj(self._attend(module, x, layer, angles, kind))
            with plainly():
                pairs = ((layer.keys[0, 0, at], kept[0]), (layer.values[0, 0, at], kept[1]), (found, wanted))
                if all(difference(a, b) < _CLOSE[x.dtype] for a, b in pairs):
                    return kind
                layer.keys[0, 0, at], layer.values[0, 0, at] = kept
        return None

    def _whole(self, variant: LatentVariant, heads: int) -> LatentVariant | None:
        """The one kernel that computes all, for a short conversation; None if there is none."""
        whole = replace(variant, whole=True)
        if self._gpu.capability < HOPPER or variant.rank not in (64, 128, 256, 512) or variant.value_dim % _CLUSTER:
            return None
        fits = whole.shared_bytes <= self._gpu.shared_limit_bytes and heads * _CLUSTER <= 2 * self._gpu.processors
        return whole if fits else None

    def _matrix(self, module: Any) -> Tensor:
        if id(module) not in self._matrices:
            layer = module.kv_b_proj
            with plainly():
                weight = layer.dense() if isinstance(layer, CudaLinear) else None
                if weight is None:
                    weight = layer.dequantize(torch.float16) if isinstance(layer, GPTQLinear) else layer.weight
                self._matrices[id(module)] = weight.detach().half().contiguous()
        return self._matrices[id(module)]

    def _attend(self, module: Any, x: Tensor, layer: Any, angles: Any, kind: _Kind) -> Tensor:
        """[1, 1, heads * values]; the token is kept."""
        if getattr(module, "q_b_proj", None) is None:
            q = module.q_proj(x)
        else:
            q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x)))
        have_written(q, kv := module.kv_a_proj_with_mqa(x))
        with plainly():
            variant, heads, shown = self._variant(module, x.dtype), module.num_heads, layer.shown
            whole = self._whole(variant, heads) if kind.in_one and shown <= _WHOLE_TOKENS else None
            groups = -(-heads // _HEADS)
            splits = max(1, min(_MOST_SPLITS, 2 * self._gpu.processors // groups, shown // _SPLIT_TOKENS))
            met, partial, stats = (None, None, None) if whole else self._work_of(variant, heads, splits, x)
            norm = module.kv_a_layernorm
            cosines, sines = (torch.view_as_real(angles), None) if kind.turn == 0 else angles
            out = torch.empty(1, 1, heads * variant.value_dim, dtype=x.dtype, device=x.device)
            arguments = LATENT.pack(
                q=q.contiguous(), kv=kv.contiguous(), norm=norm.weight, angles=cosines, sines=sines,
                matrices=self._matrix(module), keys=layer.keys, turned_keys=layer.values, count=layer.count, met=met,
                partial=partial, stats=stats, out=out, heads=heads, capacity=layer.keys.shape[2], splits=splits, kind=kind.turn,
                eps=float(norm.variance_epsilon), scale=float(module.scaling) * math.log2(math.e),
            )  # fmt: skip
            run = self._gpu.run
            if whole is not None:
                # with one block a processor, as other kernels claim it, only 15 of 16 clusters would run at once on an H200
                run(whole.name, (_CLUSTER, heads), 256, arguments, whole.shared_bytes, overlap=True)
                return out
            run(variant.kernel("meet"), (variant.rank // 64, heads + 1), 128, arguments, 1024, overlap=True)
            run(variant.kernel("attend"), (splits, groups), 128, arguments, variant.shared_bytes, overlap=True)
            shared_bytes = 4 * (variant.rank + _MOST_SPLITS)
            run(variant.kernel("read"), (variant.value_dim // 16, heads), 128, arguments, shared_bytes, overlap=True)
        return out

    def _work_of(self, variant: LatentVariant, heads: int, splits: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (variant, heads, splits)
        if key not in self._work:
            sizes = (heads * (variant.rank + variant.turned), splits * heads * variant.rank, splits * heads * 2)
            dtypes = (x.dtype, torch.float32, torch.float32)
            made = (torch.empty(size, dtype=dtype, device=x.device) for size, dtype in zip(sizes, dtypes, strict=True))
            self._work[key] = (next(made), next(made), next(made))
        return self._work[key]


def _of_kind(angles: Any, turn: int, turned: int, dtype: torch.dtype) -> bool:
    """Whether the angles are given as those of a turn are."""
    if isinstance(angles, Tensor):
        return bool(turn == 0 and angles.dtype == torch.complex64 and angles.numel() == turned // 2)
    return (
        turn > 0
        and isinstance(angles, tuple)
        and len(angles) == 2
        and all(isinstance(each, Tensor) and each.dtype == dtype and each.numel() == turned for each in angles)
    )
