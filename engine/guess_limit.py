"""Slows down those who guess passwords and keys: each address for itself, and all of them together.

Whoever came in before is not stopped by the guesses of strangers, nor is who sits at this machine, or anybody could lock the
owner out. Those who came in before share a limit, too: one of them may have many addresses. Visitors of a link or a proxy all
have one address, so they share its limit, and none of them is known by it.
"""

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

from ..core.addresses import is_here

T = TypeVar("T")

BY_NAME = " by name"  # ends the address of whoever asks for a host by its name: a public link's visitors, or those of a proxy
_HERE = "127.0.0.1"  # stands for every address of this machine
_MOST_PAID = 64
_MOST_ADDRESSES = 4096  # that are remembered; the ones seen last


class _Bucket:
    """Tokens that come back with time: one guess costs one."""

    def __init__(self, size: float, per_s: float, now: float) -> None:
        self.size, self.per_s = size, per_s
        self.left, self.at = size, now
        self.paid: deque[_Bucket] = deque(maxlen=_MOST_PAID)  # of an address: which buckets its attempts were also taken from

    def wait_s(self, now: float) -> float:
        self.left, self.at = min(self.size, self.left + (now - self.at) * self.per_s), now
        return max(0.0, (1 - self.left) / self.per_s)


class GuessLimit:
    """At most `guesses` wrong attempts at once per address, then one per `every_s`; `total` of both for all strangers together,
    and again for all who came in before.

    The defaults are for passwords that people choose: some 4,400 a day of strangers, as many of those who came in before, and
    as many of this machine.
    """

    def __init__(
        self,
        guesses: int = 5,
        every_s: float = 20.0,
        total_guesses: int = 60,
        total_every_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guesses, self._every_s, self._clock = guesses, every_s, clock
        self._strangers, self._friends = (_Bucket(total_guesses, 1 / total_every_s, clock()) for _ in range(2))
        self._each: OrderedDict[str, _Bucket] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()  # addresses that came in
        self._lock = threading.Lock()

    def attempt(self, address: str) -> float:
        """Count an attempt. 0 if it may be checked, else the seconds after which the next one may.

        It counts before it is checked: otherwise a thousand attempts at the same moment would all pass.
        """
        address, now = _network(address), self._clock()
        with self._lock:
            own = self._each.get(address) or _Bucket(self._guesses, 1 / self._every_s, now)
            _remember(self._each, address, own)
            buckets = [own] if address == _HERE else [own, self._friends if address in self._known else self._strangers]
            if (wait_s := max(each.wait_s(now) for each in buckets)) > 0:
                return wait_s
            for each in buckets:
                each.left -= 1
            own.paid.extend(buckets[1:])
            return 0.0

    def succeeded(self, address: str) -> None:
        """The attempt that was just counted was right: it is given back."""
        address = _network(address)
        with self._lock:
            if not address.endswith(BY_NAME):
                _remember(self._known, address, None)
            if (own := self._each.get(address)) is not None:
                own.left += 1
                if own.paid:
                    paid = own.paid.pop()
                    paid.left = min(paid.size, paid.left + 1)


def _remember(kept: OrderedDict[str, T], address: str, value: T) -> None:
    kept[address] = value
    kept.move_to_end(address)
    if len(kept) > _MOST_ADDRESSES:
        kept.popitem(last=False)


def _network(address: str) -> str:
    """IPv6 gives everybody 2**64 addresses, and this machine has 2**24 of its own: each of them count as one."""
    own, space, by_name = address.partition(" ")  # "1.2.3.4 by name" (page_gate.py)
    if is_here(own):
        return _HERE + space + by_name
    try:
        found = ipaddress.ip_address(own.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False)) + space + by_name
    return str(found) + space + by_name
