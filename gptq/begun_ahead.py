"""An answer alone on a GPU whose tokens torch samples: the next step is launched before the host knows the token.

Between two tokens the host would read the sampled one, ask whether it ends the answer, and launch some three hundred kernels
as one graph: time in which the GPU computes nothing. Here it is given the token as a tensor and goes on; the host reads a copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .running import Running
from .stepper import Memory


class BegunAhead(Running):
    """Everything is launched on the current stream, in this order: the token's copy to the host, and the step after it."""

    def __init__(
        self,
        memory: Memory,
        step: Callable[[int | Tensor], Tensor],
        device: torch.device,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """`step`: computes one id, or a tensor [1] of `device` that has one, into `memory` -> logits [1, V]. `require` raises
        where a token that was waited for is none."""
        self._memory, self._step, self._require = memory, step, require
        self._device, on_gpu = device, device.type == "cuda"
        self._token = torch.empty(1, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._logits: Tensor | None = None
        self._is_ahead = False

    def begin(self, token: Tensor) -> Callable[[], int] | None:
        self._token.copy_(token, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))  # which may not be the thread's current GPU
        try:
            logits = self._step(token)
        except (torch.OutOfMemoryError, ValueError):  # no pages, or the context ends: no fault if this token is the last
            return None
        self._is_ahead = True
        self._logits = logits.clone()  # a criterion may have the model compute something else before these are asked for
        return self._wait

    def _wait(self) -> int:
        if self._copied is not None:
            self._copied.synchronize()
        self._require()
        return int(self._token)

    def give(self, id: int) -> None:
        if not self._is_ahead:
            self._logits = self._step(id)
        self._is_ahead = False

    def logits(self) -> Tensor:
        assert self._logits is not None
        return self._logits

    def close(self) -> None:
        if self._is_ahead:
            self._is_ahead = False
            self._memory.cut(self._memory.length - 1)
