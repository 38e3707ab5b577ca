"""Whose turn it is among the programs that ask over HTTP: a fair line with a limit.

Turns go round the clients, not the requests: a program that sends fifty at once does not keep another
one's single question waiting for all of them. The page does not stand in this line: it asks the model
directly, and waits for one answer of it at most.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from ..core.errors import QueueFull

DEFAULT_LIMIT = 128  # requests that are answered or wait


class Ticket:
    """One request in the line. `wait` for the turn, `leave` when the model is free again."""

    def __init__(self, line: "RequestQueue", client: str) -> None:
        self.client = client
        self._line = line
        self._called = threading.Event()
        self._given_up = False

    def wait(self) -> bool:
        """Until the turn has come (True) or the request was given up (False)."""
        self._called.wait()
        return not self._given_up

    def give_up(self) -> None:
        """Wake `wait`; the place is still to be left."""
        self._given_up = True
        self._called.set()

    def leave(self) -> None:
        """Make room for the next one. Safe to call twice."""
        self._line._leave(self)

    @property
    def ahead(self) -> int:
        """Requests that are answered before this one; 0 once its turn has come."""
        return self._line._ahead(self)


class RequestQueue:
    def __init__(self, limit: int = DEFAULT_LIMIT, width: Callable[[], int] = lambda: 1) -> None:
        """`width` tells how many requests are answered at once. One client may hold half of `limit`."""
        self.limit = limit
        self._width = width
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by client, the next one first
        self._running: list[Ticket] = []

    def join(self, client: str) -> Ticket:
        """Take a place. Raises LineFull."""
        with self._lock:
            total = len(self._running) + self._count()
            own = len(self._waiting.get(client, ())) + sum(1 for each in self._running if each.client == client)
            share = max(1, (self.limit + 1) // 2)
            if total >= self.limit:
                raise QueueFull(f"{total} requests are being answered or wait, which is the limit. Ask again in a moment.")
            if own >= share:
                raise QueueFull(f"{own} of your requests are being answered or wait; one client may have {share}. Wait for them.")
            place = Ticket(self, client)
            self._waiting.setdefault(client, deque()).append(place)
            self._call()
        return place

    @property
    def waiting(self) -> int:
        with self._lock:
            return self._count()

    @property
    def running(self) -> int:
        with self._lock:
            return len(self._running)

    def _count(self) -> int:
        return sum(len(each) for each in self._waiting.values())

    def _call(self) -> None:
        """Give turns while there are any. Holds the lock."""
        while self._waiting and len(self._running) < max(1, self._width()):
            client, places = self._waiting.popitem(last=False)
            place = places.popleft()
            if places:
                self._waiting[client] = places  # to the end: the others come first now
            self._running.append(place)
            place._called.set()

    def _leave(self, place: Ticket) -> None:
        with self._lock:
            if place in self._running:
                self._running.remove(place)
            elif place.client in self._waiting:
                places = self._waiting[place.client]
                if place in places:
                    places.remove(place)
                if not places:
                    del self._waiting[place.client]
            self._call()

    def _ahead(self, place: Ticket) -> int:
        with self._lock:
            places = self._waiting.get(place.client)
            if places is None or place not in places:
                return 0
            own = places.index(place)
            before, count = True, own + len(self._running)
            for client, others in self._waiting.items():
                if client == place.client:
                    before = False
                else:
                    count += min(len(others), own + before)
            return count
