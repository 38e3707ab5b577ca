"""engine/request_queue.py: turns go round the clients, there is a limit, and nobody is forgotten."""

import random
import threading

import pytest

from gptq_webui.core.errors import Busy, QueueFull
from gptq_webui.engine.request_queue import RequestQueue


def served(line, places):
    """The order in which turns are given when each is left at once."""
    order, left = [], list(places)
    while left:
        (place,) = [each for each in left if each._called.is_set()]
        order.append(place)
        left.remove(place)
        place.leave()
    return order


def test_turns_go_round_the_clients():
    line = RequestQueue()
    many = [line.join("many") for _ in range(4)]
    one, two = line.join("one"), line.join("two")
    assert served(line, [*many, one, two]) == [many[0], many[1], one, two, many[2], many[3]]


def test_ahead_is_the_number_of_turns_before_it():
    line = RequestQueue(limit=40)
    places = [line.join(client) for client in "aaabbcabcc"]
    expected = {place: place.ahead for place in places}
    order = served(line, places)
    assert expected[order[0]] == 0 and [expected[place] for place in order[1:]] == list(range(1, len(order)))


def test_past_the_limit_it_is_full_and_one_client_gets_half():
    line = RequestQueue(limit=6)
    own = [line.join("a") for _ in range(3)]
    with pytest.raises(QueueFull, match="3 of your requests"):
        line.join("a")
    for client in "bcd":
        line.join(client)
    with pytest.raises(QueueFull, match="6 requests"):
        line.join("e")
    own[0].leave()
    line.join("e")
    assert issubclass(QueueFull, Busy)


def test_one_that_gives_up_waits_no_longer_and_leaves_its_place():
    line = RequestQueue()
    first, second, third = (line.join(client) for client in "abc")
    second.give_up()
    assert second.wait() is False and first.wait() is True
    second.leave()
    second.leave()
    first.leave()
    assert third.ahead == 0 and third.wait() and line.running == 1 and line.waiting == 0


def test_as_many_run_at_once_as_the_model_can():
    line = RequestQueue(width=lambda: 3)
    places = [line.join("a") for _ in range(5)]
    assert (line.running, line.waiting) == (3, 2) and [each.ahead for each in places] == [0, 0, 0, 3, 4]
    places[1].leave()
    assert (line.running, line.waiting) == (3, 1)


def test_no_place_is_lost_when_many_threads_come_and_go():
    line = RequestQueue(limit=1000, width=lambda: 2)
    most, running, lock = [0], [0], threading.Lock()
    done = []

    def client(name):
        for _ in range(60):
            place = line.join(name)
            if random.random() < 0.3:
                place.give_up()
            if place.wait():
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                with lock:
                    running[0] -= 1
            place.leave()
        done.append(name)

    threads = [threading.Thread(target=client, args=(str(at),), daemon=True) for at in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 12 and line.running == line.waiting == 0 and not line._waiting
