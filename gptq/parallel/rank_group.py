"""Sums and collections over the ranks of one host: NCCL between GPUs, gloo between processors, through torch.distributed.
Rows of single tokens go through mailboxes (mailboxes.py) where GPUs reach each other's memory.

A group of our own, not the process's default one: a program around us may use that, and a model that is loaded anew gets a
new group. The ranks find each other through a file in a private folder, and gloo listens on this machine alone.
"""

import logging
import weakref
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .mailboxes import Mailboxes

log = logging.getLogger(__name__)


class Parted(Exception):
    """Another rank did not come to a sum: it has ended, or waits for something else."""


_WAIT_S = 120.0  # for another rank, which may have more to compute or has died


class RankGroup:
    """Of one rank. With one rank alone, a sum is what it has."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._joined: list[Any] = []  # the group of torch, once it is there
        self._device, self._on_gpu = torch.device("cpu"), False
        self._mailboxes: Mailboxes | None = None
        self._apart = ""  # why there are none
        # its threads are ended here, or they would abort a process that ends
        weakref.finalize(self, self._joined.clear)

    def join(self, folder: Path, device: torch.device) -> None:
        """Meet the others in a folder that all of them know, and that is for this group alone. Waits for them.

        Raises Parted where they do not come.
        """
        try:
            self._joined.append(self._meet(folder, device))
        except RuntimeError as error:
            raise Parted(str(error)) from error
        self._device, self._on_gpu = device, device.type == "cuda"
        if self._on_gpu and self.ranks > 1:
            from .mailboxes import Apart, Mailboxes

            try:
                self._mailboxes = Mailboxes(self.rank, self.ranks, device, self.gather)
            except Apart as error:
                self._apart = str(error)

    @property
    def describes(self) -> str:
        """How single rows are summed, for a note."""
        if not self._on_gpu:
            return "gloo"
        return "mailboxes in the GPUs' memory" if self._mailboxes is not None else f"NCCL ({self._apart})"

    def _meet(self, folder: Path, device: torch.device) -> Any:
        from torch import distributed

        wait = timedelta(seconds=_WAIT_S)
        store = distributed.FileStore(str(folder / "ranks"), self.ranks)
        store.set_timeout(wait)
        if device.type == "cuda":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = wait
            return distributed.ProcessGroupNCCL(store, self.rank, self.ranks, options)
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = wait
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        return gloo(store, self.rank, self.ranks, options)

    def sum(self, x: Tensor) -> None:
        """Put the sum over all ranks into x, which is contiguous. Raises Parted, at once or in `require_all`."""
        if self.ranks == 1:
            return
        there = self._there()
        if (boxes := self._mailboxes) is not None and boxes.takes(x):
            boxes.sum(x)
        else:
            self._wait(there.allreduce([x]))

    def first(self, ids: Tensor) -> None:
        """Put the ids (int64, contiguous) of the first rank into those of every other. Raises Parted, as `sum`."""
        if self.ranks > 1 and self._mailboxes is not None and self._joined:
            self._mailboxes.first(ids)
        elif self.ranks > 1:
            ids.copy_(self.gather(ids)[0])

    def gather(self, x: Tensor) -> list[Tensor]:
        """The x of every rank, all of one shape. Raises Parted."""
        if self.ranks == 1:
            return [x]
        if (boxes := self._mailboxes) is not None and x.shape[-1] == x.numel():
            whole = x.new_zeros(self.ranks, *x.shape)
            if boxes.takes(whole):
                whole[self.rank] = x
                self.sum(whole)
                return list(whole)
        found = [torch.empty_like(x) for _ in range(self.ranks)]
        self._wait(self._there().allgather([found], [x.contiguous()]))
        return found

    def _there(self) -> Any:
        """Never computes on without the others: the numbers would be wrong, and nobody would see it."""
        for group in self._joined:
            return group
        raise Parted("this rank is not, or no longer, together with the others")

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise Parted(str(error)) from error

    def require_all(self) -> None:
        """Wait for what this thread's GPU computes. Raises Parted where another rank did not come to one of the sums."""
        if self._on_gpu and self.ranks > 1:
            torch.cuda.current_stream(self._device).synchronize()
            self.require_sums()

    def require_sums(self) -> None:
        """Without waiting: raises Parted where another rank did not come to a sum that this thread's GPU has computed."""
        if self._on_gpu and (not self._joined or (self._mailboxes is not None and self._mailboxes.is_broken)):
            raise Parted("another rank did not come to a sum")

    def leave(self) -> None:
        """On GPUs what waits for the others ends with an error (gloo sees that they are gone). From any thread."""
        if self._mailboxes is not None:
            self._mailboxes.stop()
        while self._joined:
            group = self._joined.pop()
            if self._on_gpu and hasattr(group, "abort"):
                group.abort()

    def close(self) -> None:
        """Leave the others, which have ended, and free everything. Safe to call twice."""
        self.leave()
        if self._mailboxes is not None:
            self._mailboxes.close()
            self._mailboxes = None
