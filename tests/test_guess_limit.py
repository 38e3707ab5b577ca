"""engine/guess_limit.py: how fast passwords and keys can be guessed."""

from gptq_webui.core.addresses import is_here
from gptq_webui.engine.guess_limit import GuessLimit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def limit(**options):
    clock = Clock()
    return GuessLimit(clock=clock, **{"guesses": 5, "every_s": 10, "total_guesses": 20, "total_every_s": 1, **options}), clock


def tries(found, address, times=1000):
    return sum(found.attempt(address) == 0 for _ in range(times))


def test_an_address_gets_a_few_guesses_and_then_one_from_time_to_time():
    found, clock = limit()
    assert tries(found, "10.0.0.1") == 5
    assert found.attempt("10.0.0.1") == 10
    clock.now = 9.9
    assert tries(found, "10.0.0.1") == 0
    clock.now = 3600
    assert tries(found, "10.0.0.1") == 5  # an hour's rest gives no more than the first time


def test_many_addresses_together_are_slowed_too():
    found, clock = limit()
    assert sum(tries(found, f"10.0.{at}.1") for at in range(200)) == 20
    clock.now = 10
    assert sum(tries(found, f"10.1.{at}.1") for at in range(200)) == 10


def test_whoever_came_in_before_is_not_stopped_by_others():
    found, _clock = limit()
    assert found.attempt("10.0.0.9") == 0
    found.succeeded("10.0.0.9")
    assert sum(tries(found, f"10.0.{at}.1") for at in range(200)) == 20
    assert found.attempt("10.0.0.9") == 0
    found.succeeded("10.0.0.9")
    assert tries(found, "10.0.0.9") == 5  # its own limit holds all the same


def test_a_right_attempt_costs_nothing():
    found, _clock = limit()
    for _ in range(100):
        assert found.attempt("10.0.0.1") == 0
        found.succeeded("10.0.0.1")


def test_right_attempts_at_the_same_moment_cost_nothing_either():
    found, _clock = limit()
    for at in range(50):
        assert [found.attempt(f"10.0.{at}.1") for _ in range(5)] == [0] * 5
        for _ in range(5):
            found.succeeded(f"10.0.{at}.1")
    assert found._strangers.left == found._friends.left == 20


def test_the_addresses_of_one_ipv6_network_are_one():
    found, _clock = limit()
    assert sum(tries(found, f"2001:db8::{at:x}") for at in range(1, 200)) == 5
    assert tries(found, "2001:db8:0:1::1") == 5
    assert tries(found, "10.0.0.1") + tries(found, "::ffff:10.0.0.1") == 5


def test_memory_has_a_limit():
    found, _clock = limit()
    for at in range(20_000):
        found.attempt(f"{at >> 8}.{at & 255}.0.1")
        found.succeeded(f"{at >> 8}.{at & 255}.0.1")
    assert len(found._each) <= 4096 and len(found._known) <= 4096


def test_who_sits_at_the_machine_is_stopped_by_his_own_guesses_alone():
    found, _clock = limit()
    assert sum(tries(found, f"10.0.{at}.1") for at in range(200)) == 20
    assert tries(found, "127.0.0.1") == 5
    assert tries(found, "127.0.0.1 by name") == 0  # through a link or a proxy: anybody


def test_the_many_addresses_of_this_machine_are_one():
    found, clock = limit()
    own = [*(f"127.{at}.{at}.2" for at in range(200)), "127.0.0.1", "::1", "::ffff:127.0.0.9", "::ffff:7f01:203", "localhost"]
    assert sum(tries(found, each) for each in own) == 5
    clock.now = 10
    assert sum(tries(found, each) for each in own) == 1
    assert sum(tries(found, f"{each} by name") for each in own[:200]) == 5  # visitors of a link, whatever a proxy says of them


def test_who_came_in_once_from_many_networks_cannot_guess_without_end():
    found, clock = limit()
    for at in range(1000):
        clock.now += 20
        assert found.attempt(f"2001:db8:{at:x}::1") == 0
        found.succeeded(f"2001:db8:{at:x}::1")
    assert sum(tries(found, f"2001:db8:{at:x}::1", 5) for at in range(1000)) == 20
    assert tries(found, "10.0.0.1", 5) == 5  # strangers have what is theirs
    clock.now += 10
    assert sum(tries(found, f"2001:db8:{at:x}::1", 5) for at in range(1000)) == 10


def test_visitors_of_a_name_count_by_network_too():
    found, _clock = limit(total_guesses=1000)
    assert sum(tries(found, f"2001:db8::{at:x} by name") for at in range(50)) == 5
    assert tries(found, "2001:db8::1") == 5 and tries(found, "1.2.3.4 by name") == tries(found, "1.2.3.4") == 5


def test_a_day_of_guesses_at_chosen_passwords_gives_a_few_thousand_however_many_guess():
    clock = Clock()
    found = GuessLimit(clock=clock)
    checked = 0
    for second in range(0, 86_400, 5):
        clock.now = second
        checked += sum(found.attempt(f"10.0.{at}.1") == 0 for at in range(20))
        checked += found.attempt("127.0.0.1 by name") == 0
    assert 1000 < checked < 4500


def test_one_visitor_of_a_link_who_came_in_makes_none_of_the_others_known():
    found, _clock = limit()
    assert found.attempt("127.0.0.1 by name") == 0
    found.succeeded("127.0.0.1 by name")
    assert sum(tries(found, f"10.0.{at}.1") for at in range(200)) == 20
    assert found.attempt("127.0.0.1 by name") > 0


def test_whose_address_it_is_is_asked_in_one_place():
    for own in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "localhost", "LocalHost.", "a.localhost"):
        assert is_here(own) and is_here(own, also_link_local=True)
    for link in ("169.254.169.254", "fe80::1%eth0", "::ffff:169.254.1.1"):
        assert not is_here(link) and is_here(link, also_link_local=True)
    for other in ("10.0.0.1", "2001:db8::1", "example.org", "127.0.0.1 by name", "localhost.example.org", "", "unix"):
        assert not is_here(other) and not is_here(other, also_link_local=True)
