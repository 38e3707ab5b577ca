"""Whose prompt is read next, and how much of it. Runs on any machine."""

import pytest

from gptq_webui.gptq import reading_turns
from gptq_webui.gptq.reading_turns import CROWD, LARGE_CROWD, PAUSE_S, Turns


def rounds(turns, waiting, count):
    """What each of `waiting` (name -> turn) reads in rounds that ask them in order."""
    found = []
    for _ in range(count):
        read = {}
        for name, turn in waiting.items():
            if tokens := turn.tokens():
                turn.took(tokens)
                read[name] = tokens
        found.append(read)
    return found


def test_two_long_prompts_take_turns_and_a_new_one_comes_next():
    turns = Turns(lambda: True, lambda: 2048)
    turns.tokens = 256
    waiting = {"a": turns.join(), "b": turns.join()}
    found = rounds(turns, waiting, 6)
    assert sum("a" in each for each in found) == sum("b" in each for each in found) == 3
    waiting["short"] = turns.join()
    assert any("short" in each for each in rounds(turns, waiting, 2))


def test_what_is_left_of_a_round_goes_to_the_next_one():
    turns = Turns(lambda: True, lambda: 2048)
    turns.tokens = 256
    first, second = turns.join(), turns.join()
    assert second.tokens() == 0, "who came first is still to be asked"
    assert first.tokens() == 256
    first.took(100)
    assert second.tokens() == 256, "a new round: in the last one it has had its turn"
    second.took(256)
    assert first.tokens() == 0
    turns = Turns(lambda: True, lambda: 2048)
    turns.tokens = 256
    first, second = turns.join(), turns.join()
    assert first.tokens() == 256
    first.took(100)
    assert second.tokens() == 156
    second.took(156)
    assert turns.join().tokens() == 0, "nothing is left of this round"


def test_where_many_prompts_wait_more_is_read_in_a_round():
    turns = Turns(lambda: True, lambda: 2048)
    turns.tokens = 1000
    waiting = {at: turns.join() for at in range(3)}
    assert sum(rounds(turns, waiting, 1)[0].values()) == 1000
    waiting[3] = turns.join()
    assert sum(rounds(turns, waiting, 1)[0].values()) == 1500
    waiting[3].blocked = True
    assert sum(rounds(turns, waiting, 1)[0].values()) == 1000
    turns.tokens = 2000
    waiting[3].blocked = False
    assert sum(rounds(turns, waiting, 1)[0].values()) == 2048, "a piece has its size"


def test_where_eight_wait_a_round_reads_as_much_as_streams_can_bear_where_that_is_wanted():
    for crowds, wanted in (((LARGE_CROWD, CROWD), 1300), ((CROWD,), 750)):
        turns = Turns(lambda: True, lambda: 2048, crowds=crowds)
        turns.tokens = 500
        waiting = {at: turns.join() for at in range(7)}
        assert sum(rounds(turns, waiting, 1)[0].values()) == 750 and not turns.is_crowded
        waiting[7] = turns.join()
        assert sum(rounds(turns, waiting, 1)[0].values()) == wanted and turns.is_crowded == (wanted == 1300)


@pytest.mark.parametrize(("step_s", "longest_s"), [(0.002, 0.094), (0.02, 0.105), (0.06, 0.11), (0.3, 0.34)])
def test_a_round_with_its_step_is_no_longer_than_a_stream_may_pause(step_s, longest_s, monkeypatch):
    now = 0.0
    monkeypatch.setattr(reading_turns, "perf_counter", lambda: now)
    turns = Turns(lambda: True, lambda: 100_000, crowds=(LARGE_CROWD, CROWD))
    for _ in range(20):  # a GPU that reads 10,000 tokens a second
        turns.measured(turns.tokens, turns.tokens / 10_000)
    waiting = {at: turns.join() for at in range(64)}
    took = []
    for _ in range(40):
        read = sum(rounds(turns, waiting, 1)[0].values())
        took.append(read / 10_000 + step_s)
        now += took[-1]
    assert max(took[20:]) <= longest_s
    assert min(took[20:]) >= step_s + PAUSE_S - 0.01
    for each in waiting.values():
        each.close()
    now += 1000  # nobody waits for so long
    waiting = {at: turns.join() for at in range(64)}
    for each in rounds(turns, waiting, 2):
        assert abs(sum(each.values()) / 10_000 + step_s - took[-1]) < 0.01


def test_what_a_whole_round_has_room_for_is_read_at_once():
    turns = Turns(lambda: True, lambda: 2048)
    turns.tokens = 1100
    left = {turns.join(): 512 for _ in range(3)} | {turns.join(): 1700}
    turns.tokens = 1100 * 2 // 3 + 1  # four wait, and a round reads half as many more
    found = []
    while left:
        read = []
        for turn, wanted in list(left.items()):
            if tokens := min(turn.tokens(wanted), wanted):
                turn.took(tokens)
                left[turn] -= tokens
                read.append(tokens)
            if not left[turn]:
                turn.close()
                del left[turn]
        found.append(read)
    assert found == [[512, 512, 77], [512, 222], [734], [667]], "the third is not begun, the long one has what is left"


def test_who_waits_for_something_else_holds_up_nobody():
    turns = Turns(lambda: True, lambda: 2048)
    blocked, other = turns.join(), turns.join()
    blocked.share = -10
    assert other.tokens() == 0
    blocked.blocked = True
    assert other.tokens() > 0
    blocked.close()
    blocked.close()


def test_pieces_are_as_long_as_a_pause_may_be():
    turns = Turns(lambda: True, lambda: 2048)
    for _ in range(20):  # a GPU that reads 10,000 tokens a second
        turns.measured(turns.tokens, turns.tokens / 10_000)
    assert abs(turns.tokens / 10_000 - PAUSE_S) < 0.01
    known = turns.tokens
    turns.measured(8, 0.002)
    assert turns.tokens == known, "a short prompt says nothing of a long piece"
    turns.measured(turns.tokens, 10.0)
    assert known // 2 - 64 <= turns.tokens < known, "one slow piece halves it, no more"
    turns.tokens = known
    turns.measured(3 * known, 3 * known / 10_000)
    assert abs(turns.tokens - known) <= 64, "a piece of a round that reads more says what a usual one takes"


def test_where_nobody_writes_a_piece_is_as_long_as_the_memory_allows():
    turns = Turns(lambda: False, lambda: 2048)
    assert turns.join().tokens() == 2048


def test_prompts_one_after_the_other_have_a_whole_round_each():
    turns = Turns(lambda: False, lambda: 4096)
    for _ in range(4):
        turn = turns.join()
        assert turn.tokens() == 4096, "what the one before has left of its round is no limit"
        turn.took(3840)
        turn.close()
    first, second = turns.join(), turns.join()
    assert first.tokens() == 4096
    first.took(3000)
    assert second.tokens() == 1096, "the same round"
    second.took(1000)
    first.close()
    assert second.tokens() == 4096, "the next one"
