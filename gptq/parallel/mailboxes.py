"""Sums of single rows between GPUs of one host, and the first one's token: each writes into the memory of the others
(cuda/exchange.cu).

A row of a large model is 16 KB, for which NCCL needs some ten microseconds; a token of 80 layers asks for 160 sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.errors import GptqWebuiError
from ..cuda import deferred
from ..cuda.gpu_kernels import Gpu
from ..cuda.kernel_arguments import EXCHANGE
from ..cuda.kernel_source import BLOCK_THREADS, LayerVariant
from ..cuda.peer_memory import PeerMemory

MOST_NUMBERS = 1 << 19  # of a row
_MOST_RANKS = 8  # ExchangeArguments.boxes
# Few blocks: a processor that one waits on is late for the next product, which needs all of it.
_THREADS, _RUN = BLOCK_THREADS, 4  # of a block; numbers of a thread
_LIMIT_S, _TRIAL_LIMIT_S = 120.0, 5.0  # that another GPU may be late
_DTYPES = {torch.float16: "half", torch.bfloat16: "bfloat"}

Gather = Callable[[Tensor], list[Tensor]]


class Apart(Exception):
    """The GPUs do not reach each other's memory, for this reason. All ranks come to the same end."""


class Mailboxes:
    """Of one rank."""

    def __init__(self, rank: int, ranks: int, device: torch.device, gather: Gather) -> None:
        """`gather`: the tensor of every rank, which all of them ask for together. Raises Apart."""
        self._rank, self._ranks = rank, ranks
        self._gpu: Gpu | None = None
        self._memory: PeerMemory | None = None
        self._turns = torch.zeros(MOST_NUMBERS // (_RUN * _THREADS), dtype=torch.int32, device=device)
        self._flags = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        handle, why = bytes(64), "" if ranks <= _MOST_RANKS else f"{ranks} GPUs"
        try:
            self._gpu = Gpu(device)
            self._gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
            self._memory = PeerMemory(device, 2 * ranks * MOST_NUMBERS // _RUN * 16)
            handle = self._memory.handle
        except (GptqWebuiError, RuntimeError) as error:
            why = why or str(error)
        handles = [bytes(each.tolist()) for each in gather(torch.tensor(list(handle), dtype=torch.uint8, device=device))]
        self._agree(gather, device, why)
        assert self._memory is not None
        self._boxes = [0] * _MOST_RANKS
        try:
            for other, each in enumerate(handles):
                self._boxes[other] = self._memory.address if other == rank else self._memory.address_of(each)
        except GptqWebuiError as error:
            why = str(error)
        self._agree(gather, device, why)
        self._limit_ns = int(_TRIAL_LIMIT_S * 1e9)
        self._agree(gather, device, self._trial(device))
        self._limit_ns = int(_LIMIT_S * 1e9)

    def takes(self, x: Tensor) -> bool:
        """Whether a contiguous tensor can be summed. The answer is the same on every rank."""
        return x.is_cuda and x.dtype in _DTYPES and x.numel() % _RUN == 0 and x.numel() <= MOST_NUMBERS and x.data_ptr() % 8 == 0

    def sum(self, x: Tensor) -> None:
        """Put the sum over all ranks into x, on the current stream. Where a rank does not come, NaN, and `is_broken`."""
        if (later := deferred.current()) is not None:
            later.write(x)
            later.before_changing([x])
        self._run(f"sum_of_gpus_{_DTYPES[x.dtype]}", x, x.numel() // _RUN)

    def first(self, ids: Tensor) -> None:
        """Put what the first rank has into ids (int64, contiguous), on the current stream. Where a rank does not come, zeros."""
        assert ids.dtype == torch.int64 and ids.is_contiguous() and ids.numel() <= MOST_NUMBERS // _RUN
        self._run("first_of_gpus_half", ids, ids.numel())

    def _run(self, kernel: str, x: Tensor, runs: int) -> None:
        assert self._gpu is not None
        arguments = EXCHANGE.pack(
            x=x, turns=self._turns, flags=self._flags, boxes=self._boxes, limit_ns=self._limit_ns, rank=self._rank,
            ranks=self._ranks, capacity=MOST_NUMBERS // _RUN, runs=runs,
        )  # fmt: skip
        self._gpu.run(kernel, (-(-runs // _THREADS),), _THREADS, arguments, overlap=True)

    @property
    def is_broken(self) -> bool:
        """Whether a sum that was waited for lacks a rank."""
        return bool(self._flags[1])

    def stop(self) -> None:
        """Let every sum end that waits for another rank. From any thread."""
        self._flags[0] = 1

    def close(self) -> None:
        """Free everything. Graphs that hold sums must be gone, and the other ranks."""
        self.stop()
        if self._gpu is not None:
            self._gpu.close()  # waits for the GPU
            self._gpu = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _trial(self, device: torch.device) -> str:
        """Why sums of known numbers are not what they must be; "" if they are."""
        try:
            for turn, dtype in enumerate((torch.float16, torch.bfloat16, torch.float16, torch.float16)):
                count = (4, 8192, 1000, MOST_NUMBERS)[turn]
                numbers = (torch.arange(count, device=device) % 7 - 3).to(dtype)  # sums of eight ranks are exact in bf16
                x = numbers * (self._rank + 1)
                self.sum(x)
                torch.cuda.synchronize(device)
                if self.is_broken:
                    return "a row did not arrive"
                if not torch.equal(x, numbers * (self._ranks * (self._ranks + 1) // 2)):
                    return "a row arrived with other numbers"
        except (GptqWebuiError, RuntimeError) as error:
            return str(error)
        return ""

    def _agree(self, gather: Gather, device: torch.device, why: str) -> None:
        """Raises Apart on every rank if one has a reason."""
        found = [bool(each.item()) for each in gather(torch.tensor([bool(why)], dtype=torch.uint8, device=device))]
        if any(found):
            self.close()
            raise Apart(why or f"GPU {found.index(True)} said no")
