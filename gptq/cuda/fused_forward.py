"""Parts of transformers' forward that are computed by kernels of ours while a graph of it is recorded.

Three places of every modern architecture of transformers are the same: attention is asked for through a registry, query and
key are rotated by a function of the architecture's module, and keys and values are kept by the cache. What a rotation does is
found by trying it with random angles. The first forward of a recording shows which sum goes into which norm, and whose keys go
into our attention: the next ones add and norm in one kernel, and attention keeps the token itself. Whatever a kernel does not
compute, transformers computes as before. Nothing of this stays in place: a graph is replayed without Python.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import deferred
from .attention_names import configs_of, decoders, name_attention
from .deferred import Deferred, plainly
from .delta_rule import DeltaRule
from .forward_calls import Calls
from .fused_norms import Added, ChosenRows, CudaNorm, NormedRow, norm_of, watchers
from .gated_rows import GatedRows
from .gpu_kernels import Gpu
from .kept_states import KeptStates
from .kernel_arguments import KEEP, ROTATE
from .kernel_source import LayerVariant
from .latent_attention import LatentAttention, leave_masks_out, take_latent
from .positions import Positions
from .state_space import StateSpace
from .token_attention import TokenAttention, Turn, capturing, of_one_token, suffix
from .token_rows import can_rotate, rotated_dims
from .turned_rows import ROTATION, kind_of


class FusedForward:
    """The kernels of one model. Raises NoCompiler if they cannot be compiled."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self.gpu = Gpu(device)
        self.gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
        self._rotations: dict[Any, int | None] = {}
        self.attention = TokenAttention(self.gpu)
        self._latent = LatentAttention(self.gpu)
        self.capacity, self._positions = 0, Positions(self.gpu)  # tokens that the cache has room for
        self._states: tuple[KeptStates, ...] = (DeltaRule(self.gpu), StateSpace(self.gpu))
        self.deferred = Deferred()
        self._gates = GatedRows(self.gpu, self.deferred)
        self._forwards = 0  # of this recording
        self._sums: list[Tensor] = []  # of the first forward
        self._norms: dict[int, CudaNorm] = {}  # that take the sum of this number
        self._sum = 0  # the number of the next one
        # by the id of a cache's layer whose keys go into our attention, whether its values do, as they are kept
        self._keeping: dict[int, bool] = {}
        self._heads: dict[int, tuple[CudaNorm, Tensor]] = {}  # normed heads of the first forward, by their address
        self._turned: dict[int, tuple[CudaNorm, CudaNorm]] = {}  # the norms of the heads that a rotation (by number) takes
        self._left: set[int] = set()  # norms (by id) that rotations compute
        self._rotation_number = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, the model's forward uses the kernels."""
        with ExitStack() as undo:
            decoders.append(self)
            watchers.append(self)
            undo.callback(self._end)
            name_attention(configs_of(self._model), undo)
            for module in {sys.modules.get(type(each).__module__) for each in self._model.modules()}:
                original = getattr(module, ROTATION, None)
                if callable(original):
                    setattr(module, ROTATION, self._rotation(original))
                    undo.callback(setattr, module, ROTATION, original)
            take_latent(self._model, self._latent, self._aside, undo)
            self._positions.take(self._model, self.capacity, lambda: self._forwards == 1, undo)
            leave_masks_out(self._model, self._latent, undo)
            for each in self._states:
                each.take(self._model, self._aside, undo)
            undo.enter_context(Calls(self))
            yield

    def _end(self) -> None:
        decoders.remove(self)
        watchers.remove(self)
        self._forwards = 0
        self.deferred.clear()
        self._latent.end()
        deferred.use(None)
        for each in (self._sums, self._norms, self._keeping, self._heads, self._turned, self._left):
            each.clear()

    def begin(self) -> None:
        """A forward begins: the same one as before, since the recording began."""
        self._forwards += 1
        self._sum = self._rotation_number = 0
        self.deferred.clear()
        deferred.use(self.deferred)
        if self._forwards == 2:
            self._sums.clear()
            self._heads.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is computed meanwhile is not of this forward."""
        sums, before = len(self._sums), (self._sum, self._rotation_number)
        yield
        del self._sums[sums:]
        self._sum, self._rotation_number = before

    def close(self) -> None:
        every: tuple[Any, ...] = (self.attention, self._latent, self._positions, *self._states, self.gpu)
        for each in every:
            each.close()

    # -- the residual ----------------------------------------------------------------------------------------------

    def add(self, x: Tensor, addend: Tensor, in_place: bool = False) -> Tensor:
        """x + addend, of one token; with the norm that follows. Where none does, the sum waits for the next addition."""
        number, self._sum = self._sum, self._sum + 1
        norm, kinds = self._norms.get(number), (NormedRow, ChosenRows, Added)
        if in_place or norm is None or not norm.takes(x):
            return self._only_add(x, addend, in_place)
        if self.deferred.what(x, kinds) is not None:
            x, addend = addend, x
        row = self.deferred.what(addend, kinds)
        if isinstance(row, NormedRow) and (row.addend is not None or not row.simple):
            row = None
        self.deferred.write(x, *(() if row is not None else (addend,)))
        return norm.after_adding(x, addend if row is None else row)

    def _only_add(self, x: Tensor, addend: Tensor, in_place: bool) -> Tensor:
        if not in_place and self.deferred.what(x, (NormedRow, ChosenRows)) is not None:
            x, addend = addend, x
        row = None if in_place else self.deferred.what(addend, (NormedRow, ChosenRows))
        if isinstance(row, NormedRow) and (row.addend is not None or not row.simple):
            row = None
        self.deferred.write(x, *(() if row is not None else (addend,)))
        total = x if in_place else torch.empty_like(x)
        if row is None and self._forwards > 1 and deferred.current() is self.deferred:
            return Added.of(self.gpu, x, addend, total, self.deferred)
        self.deferred.before_changing([total])
        norm_of(self.gpu, x, addend if row is None else row, None, total)
        if self._forwards == 1:
            self._sums.append(total)
        return total

    def before(self, norm: CudaNorm, x: Tensor) -> bool:
        """In the first forward it is learnt what the norm is given; later the norms of turned heads are left to the rotation."""
        if self._forwards == 1:
            for number, total in enumerate(self._sums):
                if total is x:
                    self._norms.setdefault(number, norm)
        return id(norm) in self._left and self._forwards > 1

    def after(self, norm: CudaNorm, out: Tensor) -> None:
        if self._forwards == 1 and out.dim() == 4 and not norm.kind.centred and norm.bias is None:
            self._heads[out.data_ptr()] = norm, out

    def gated(self, func: Any, args: Any, given: dict[str, Any]) -> Tensor | None:
        """What a function of torch gives as a part of a gated row; None if it is none."""
        return self._gates.call(func, args, given) if deferred.current() is self.deferred else None

    # -- keys and values -------------------------------------------------------------------------------------------

    def keep(self, layer: Any, keys: Tensor, values: Tensor, shown: Tensor) -> bool:
        """Put the new token into a StaticKeys, or leave it to the attention that gets `shown`. False if no kernel can."""
        if self not in decoders or not of_one_token(keys, values) or keys.dtype != layer.keys.dtype:
            return False
        with plainly():
            aligned = all(each.data_ptr() % 16 == 0 and each.stride(1) % 8 == 0 for each in (keys, values))
        if self._keeping.get(id(layer)) and self._forwards > 1 and aligned:
            vars(shown)["new_token"] = keys, values
            return True
        vars(shown)["kept_by"] = layer
        arguments = KEEP.pack(
            k=keys, v=values, keys=layer.keys, values=layer.values, count=layer.count, k_row=0, v_row=0,
            k_stride=keys.stride(1), v_stride=values.stride(1), d=keys.shape[3], dv=values.shape[3], capacity=layer.keys.shape[2],
        )  # fmt: skip
        self.gpu.run(f"keep_{suffix(keys)}", (keys.shape[1],), 128, arguments, overlap=True)
        return True

    # -- rotation --------------------------------------------------------------------------------------------------

    def _rotation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rotated(*args: Any, **kwargs: Any) -> Any:
            usual = len(args) == 4 and kwargs.get("unsqueeze_dim", 1) == 1 and kwargs.get("position_ids") is None
            if usual and set(kwargs) <= {"unsqueeze_dim", "position_ids"} and can_rotate(*args):
                q, k, cos, sin = args  # others turn one tensor at a time (Gemma 4, GPT-J)
                key = (original, q.shape, k.shape, cos.shape, q.dtype)
                if key not in self._rotations and not capturing():
                    self._rotations[key] = kind_of(original, self._rotate, q, k, cos)
                if (kind := self._rotations.get(key)) is not None:
                    number, self._rotation_number = self._rotation_number, self._rotation_number + 1
                    if self._forwards == 1:
                        self._learn_heads(number, q, k)
                        return self._rotate(q, k, cos, sin, kind)
                    return self._rotate_later(q, k, cos, sin, kind, self._turned.get(number))
            if self._left and self._forwards > 1:
                raise RuntimeError("a rotation differs from one forward to the next")
            return original(*args, **kwargs)

        return rotated

    def _learn_heads(self, number: int, q: Tensor, k: Tensor) -> None:
        """Whether a rotation takes what norms gave, all of it and as it was given."""
        of_q, of_k = (self._heads.get(each.data_ptr()) for each in (q, k))
        if of_q is None or of_k is None or of_q[0].kind != of_k[0].kind:
            return
        if q.numel() == of_q[1].numel() and k.numel() == of_k[1].numel() and q.shape[3] == of_q[1].shape[3]:
            self._turned[number] = of_q[0], of_k[0]
            self._left |= {id(of_q[0]), id(of_k[0])}

    def _rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: int, norms: tuple[CudaNorm, CudaNorm] | None = None
    ) -> tuple[Tensor, Tensor]:
        q_out, k_out = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k))
        self._rotate_into(q, k, cos, sin, kind, norms, q_out, k_out)
        return q_out, k_out

    def _rotate_later(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: int, norms: tuple[CudaNorm, CudaNorm] | None
    ) -> tuple[Tensor, Tensor]:
        """As `_rotate`, or by the attention that takes them."""
        with plainly():
            self.deferred.write(q, k, cos, sin)
            angles, alike = cos.shape[-1], norms is None or norms[0].kind == norms[1].kind
            if deferred.current() is not self.deferred:
                return self._rotate(q, k, cos, sin, kind, norms)
            rotated = rotated_dims(q.shape[3], angles, kind)
            if kind != 0 or angles not in (rotated, rotated // 2) or angles % 8 or rotated % 16 or q.shape[3] % 16 or not alike:
                return self._rotate(q, k, cos, sin, kind, norms)
            out = tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k))
            what = Turn(q, k, cos, sin, norms, rotated)
            run = partial(self._rotate_into, q, k, cos, sin, kind, norms, *out)
            self.deferred.defer(out, (q, k, cos, sin), what, run)
            return out[0], out[1]

    def _rotate_into(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: int, norms: tuple[CudaNorm, CudaNorm] | None,
        q_out: Tensor, k_out: Tensor,
    ) -> None:  # fmt: skip
        dims, angles = q.shape[3], cos.shape[-1]
        arguments = ROTATE.pack(
            q=q, k=k, cosines=cos, sines=sin, q_out=q_out, k_out=k_out, q_stride=q.stride(1), k_stride=k.stride(1),
            heads=q.shape[1], d=dims, rotated=rotated_dims(dims, angles, kind), angles=angles, kind=kind,
            q_norm=None if norms is None else norms[0].weight, k_norm=None if norms is None else norms[1].weight,
            eps=0.0 if norms is None else norms[0].kind.eps, offset=0.0 if norms is None else norms[0].kind.offset,
        )  # fmt: skip
        shared_bytes = (dims + 36) * 4
        self.gpu.run(f"rotate_{suffix(q)}", (q.shape[1] + k.shape[1],), 64, arguments, shared_bytes, overlap=True)

    # -- attention -------------------------------------------------------------------------------------------------

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
        """[1, heads, 1, D] -> [1, 1, heads, D of the values]; None if the kernel does not compute this."""
        new_key, new_value = getattr(key, "new_token", (None, None))
        turn = self.deferred.what(query, Turn)
        if new_key is None or turn is None or self.deferred.what(new_key, Turn) is not turn:
            turn = None
            self.deferred.write(query, new_key)
        self.deferred.write(value, new_value)
        with plainly():
            out = self.attention.of(query, key, value, mask, given, turn)
            if out is None and turn is not None:
                self.deferred.write(query, new_key)
                out = self.attention.of(query, key, value, mask, given)
        if out is None and hasattr(key, "new_token"):  # the token would be lost
            raise RuntimeError("attention differs from one forward to the next")
        if out is not None and (layer := getattr(key, "kept_by", None)) is not None:
            with plainly():  # Diff Llama makes others of them
                own = value.data_ptr() == layer.values.data_ptr()
            self._keeping[id(layer)] = own and self._keeping.get(id(layer), True)
        return out
