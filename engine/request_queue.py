"""Whose turn it is among the programs that send requests over HTTP: a fair queue with a limit.

Turns go round the clients, not the requests: a program that sends fifty requests at once does not make another one's
single request wait for all of them. The page does not use this queue: it asks the model directly, and waits for at most
one of the queue's answers.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from ..core.errors import QueueFull

DEFAULT_LIMIT = 512  # requests that run or wait
_UNKNOWN_S = 5.0  # of a turn, before one has ended
_NEWS = 0.2  # share of the last turn in what one takes
_SOONEST_S, _LATEST_S = 1.0, 600.0  # that somebody is asked to come again after


class Ticket:
    """One request in the queue. `wait` for the turn, `leave` when the answer is complete."""

    def __init__(self, queue: "RequestQueue", client: str) -> None:
        self.client = client
        self._queue = queue
        self._called = threading.Event()
        self._called_at = 0.0  # on time.monotonic()
        self._given_up = False

    def wait(self) -> bool:
        """Block until its turn (True) or until it is given up (False)."""
        self._called.wait()
        return not self._given_up

    def give_up(self) -> None:
        """Make `wait` return. The ticket must still `leave`."""
        self._given_up = True
        self._called.set()

    def leave(self) -> None:
        """Give the turn to the next one. Safe to call twice."""
        self._queue._leave(self)

    @property
    def ahead(self) -> int:
        """Requests that are answered before this one; 0 once its turn has come."""
        return self._queue._ahead(self)


class RequestQueue:
    """Tickets by client. One client may hold half of `limit`, or `most_per_client` if that is less.

    `parallel` returns how many answers the loaded model computes at once; `most_parallel` lowers it.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT, parallel: Callable[[], int] = lambda: 1) -> None:
        self.limit = limit
        self.most_parallel: int | None = None
        self.most_per_client: int | None = None
        self._parallel = parallel
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by client, the next one first
        self._running: list[Ticket] = []
        self._turn_s: float | None = None  # that a turn takes

    def join(self, client: str) -> Ticket:
        """A new ticket. Raises QueueFull, which says when there should be room."""
        with self._lock:
            total = len(self._running) + self._count()
            own = len(self._waiting.get(client, ())) + sum(1 for each in self._running if each.client == client)
            share = max(1, (self.limit + 1) // 2)
            if self.most_per_client is not None:
                share = max(1, min(share, self.most_per_client))
            if total >= self.limit:
                text = f"{total} requests are being answered or wait, which is the limit. Ask again in a moment."
                raise QueueFull(text, self._room_in_s(None))
            if own >= share:
                text = f"{own} of your requests are being answered or wait; one client may have {share}. Wait for them."
                raise QueueFull(text, self._room_in_s(client))
            ticket = Ticket(self, client)
            self._waiting.setdefault(client, deque()).append(ticket)
            self._call()
        return ticket

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
        parallel = self._parallel() if self.most_parallel is None else min(self._parallel(), self.most_parallel)
        while self._waiting and len(self._running) < max(1, parallel):
            client, tickets = self._waiting.popitem(last=False)
            ticket = tickets.popleft()
            if tickets:
                self._waiting[client] = tickets  # to the end: the others come first now
            self._running.append(ticket)
            ticket._called_at = time.monotonic()
            ticket._called.set()

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self._running:
                self._running.remove(ticket)
                took_s = time.monotonic() - ticket._called_at
                self._turn_s = took_s if self._turn_s is None else self._turn_s + _NEWS * (took_s - self._turn_s)
            elif ticket.client in self._waiting:
                tickets = self._waiting[ticket.client]
                if ticket in tickets:
                    tickets.remove(ticket)
                if not tickets:
                    del self._waiting[ticket.client]
            self._call()

    def _room_in_s(self, client: str | None) -> float:
        """When the next request of this client, or of anybody, should have its answer. Holds the lock."""
        turn_s, now = _UNKNOWN_S if self._turn_s is None else self._turn_s, time.monotonic()
        running = [each for each in self._running if client in (None, each.client)]
        if running:  # one that is late is so for as long again
            wait_s = min(abs(turn_s - (now - each._called_at)) for each in running)
        elif waiting := self._waiting.get(client or ""):  # the first of them has had no turn yet
            wait_s = turn_s * (1 + self._turns_before(waiting[0]) / max(1, len(self._running)))
        else:
            wait_s = turn_s
        return min(max(wait_s, _SOONEST_S), _LATEST_S)

    def _ahead(self, ticket: Ticket) -> int:
        with self._lock:
            return self._turns_before(ticket)

    def _turns_before(self, ticket: Ticket) -> int:
        """Holds the lock."""
        tickets = self._waiting.get(ticket.client)
        if tickets is None or ticket not in tickets:
            return 0
        own = tickets.index(ticket)
        before, count = True, own + len(self._running)
        for client, others in self._waiting.items():
            if client == ticket.client:
                before = False
            else:
                count += min(len(others), own + before)
        return count
