"""engine/request_queue.py: turns go round the clients, there is a limit, and nobody is forgotten."""

import random
import threading

import pytest

from gptq_webui.core.errors import Busy, QueueFull
from gptq_webui.engine.request_queue import RequestQueue


def served(queue, tickets):
    """The order in which turns are given when each is left at once."""
    order, left = [], list(tickets)
    while left:
        (ticket,) = [each for each in left if each._called.is_set()]
        order.append(ticket)
        left.remove(ticket)
        ticket.leave()
    return order


def test_turns_go_round_the_clients():
    queue = RequestQueue()
    many = [queue.join("many") for _ in range(4)]
    one, two = queue.join("one"), queue.join("two")
    assert served(queue, [*many, one, two]) == [many[0], many[1], one, two, many[2], many[3]]


def test_ahead_is_the_number_of_turns_before_it():
    queue = RequestQueue(limit=40)
    tickets = [queue.join(client) for client in "aaabbcabcc"]
    expected = {ticket: ticket.ahead for ticket in tickets}
    order = served(queue, tickets)
    assert expected[order[0]] == 0 and [expected[ticket] for ticket in order[1:]] == list(range(1, len(order)))


def test_past_the_limit_it_is_full_and_one_client_gets_half():
    queue = RequestQueue(limit=6)
    own = [queue.join("a") for _ in range(3)]
    with pytest.raises(QueueFull, match="3 of your requests"):
        queue.join("a")
    for client in "bcd":
        queue.join(client)
    with pytest.raises(QueueFull, match="6 requests"):
        queue.join("e")
    own[0].leave()
    queue.join("e")
    assert issubclass(QueueFull, Busy)


def test_one_client_may_have_fewer():
    queue = RequestQueue(limit=6)
    queue.most_per_client = 2
    own = [queue.join("a") for _ in range(2)]
    with pytest.raises(QueueFull, match="one client may have 2"):
        queue.join("a")
    queue.join("b")
    own[1].leave()  # it waited
    queue.join("a")
    queue.most_per_client = 100
    queue.join("a")
    with pytest.raises(QueueFull, match="one client may have 3"):  # never more than half
        queue.join("a")


def test_one_that_gives_up_waits_no_longer_and_leaves_the_queue():
    queue = RequestQueue()
    first, second, third = (queue.join(client) for client in "abc")
    second.give_up()
    assert second.wait() is False and first.wait() is True
    second.leave()
    second.leave()
    first.leave()
    assert third.ahead == 0 and third.wait() and queue.running == 1 and queue.waiting == 0


def test_as_many_run_at_once_as_the_model_can():
    queue = RequestQueue(parallel=lambda: 3)
    tickets = [queue.join("a") for _ in range(5)]
    assert (queue.running, queue.waiting) == (3, 2) and [each.ahead for each in tickets] == [0, 0, 0, 3, 4]
    tickets[1].leave()
    assert (queue.running, queue.waiting) == (3, 1)


def test_no_turn_is_lost_when_many_threads_come_and_go():
    queue = RequestQueue(limit=1000, parallel=lambda: 2)
    most, running, lock = [0], [0], threading.Lock()
    done = []

    def client(name):
        for _ in range(60):
            ticket = queue.join(name)
            if random.random() < 0.3:
                ticket.give_up()
            if ticket.wait():
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                with lock:
                    running[0] -= 1
            ticket.leave()
        done.append(name)

    threads = [threading.Thread(target=client, args=(str(at),), daemon=True) for at in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 12 and queue.running == queue.waiting == 0 and not queue._waiting


def test_who_is_refused_hears_when_there_should_be_room(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gptq_webui.engine.request_queue.time.monotonic", lambda: now[0])
    queue = RequestQueue(limit=8, parallel=lambda: 2)
    queue.most_per_client = 2

    def room_in_s(client):
        with pytest.raises(QueueFull) as found:
            queue.join(client)
        return found.value.retry_after_s

    first, second = queue.join("a"), queue.join("b")
    now[0] += 40
    first.leave()  # a turn takes 40 s
    third = queue.join("a")
    queue.join("a")
    now[0] += 10
    assert room_in_s("a") == 30  # the third has run for 10 s
    queue.join("c"), queue.join("c")
    assert room_in_s("c") == 40 * (1 + 3 / 2)  # after the two that run and the other one of a, and its own turn
    now[0] += 400
    assert room_in_s("a") == 370  # it is late: nobody knows how much longer it takes
    third.leave()
    second.leave()
    queue.limit = 5
    for client in "de":
        queue.join(client)
    assert queue.running == 2 and 1 <= room_in_s("f") <= 600
