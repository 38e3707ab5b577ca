"""benchmarks/soak_requests.py: two answers are the same only if all of their text, ids and numbers are; and soak_near.py: on a
GPU a token may be another where two are as good as equally likely."""

import asyncio
import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def program(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def soak():
    with program("soak_requests") as module:
        yield module


@pytest.fixture(scope="module")
def near(soak):
    with program("soak_near") as module:
        yield module


def stream(*events):
    return "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"


def event(text="word", id="chatcmpl-1", created=1, **more):
    return {"id": id, "created": created, "choices": [{"delta": {"content": text}}], **more}


def test_names_and_times_do_not_count(soak):
    one, two = stream(event(), event("more")), ": waiting, 3 ahead\n\n" + stream(event(id="chatcmpl-2", created=9), event("more"))
    assert soak.read(one) == soak.read(two) == (soak.read(one)[0], "")
    assert len(soak.read(one)[0]) == 3


@pytest.mark.parametrize(
    "other",
    [
        stream(event("words")),
        stream(event(), event("")),
        stream(event(usage={"completion_tokens": 2})),
        stream(event(tokens=[5])),
        stream(event()).removesuffix("data: [DONE]\n\n"),
    ],
)
def test_everything_else_does(soak, other):
    assert not soak.same(soak.read(other)[0], soak.read(stream(event()))[0])


def test_numbers_may_differ_in_the_fifth_digit(soak):
    one, near, far = ([{"logprob": value, "ids": [5, 6]}] for value in (-1.23456789, -1.23456780, -1.236))
    assert (
        soak.same(one, near) and not soak.same(one, far) and not soak.same(one, [{"logprob": one[0]["logprob"], "ids": [5, 7]}])
    )


@pytest.mark.parametrize(
    "text",
    [
        stream(event(), {"error": {"message": "The model was unloaded."}}),
        stream({"type": "error", "error": {"type": "api_error"}}),
        stream({"type": "response.failed", "response": {"error": {"code": "server_error"}}}),
        'event: error\ndata: {"detail": {"msg": "unloaded", "type": "service_unavailable"}}\n\n',
        '{"model":"a","response":"one"}\n{"error":"unloaded"}\n',
        "Internal Server Error",
    ],
)
def test_an_error_in_a_stream_is_found(soak, text):
    assert soak.read(text)[1]


def test_the_same_seed_draws_the_same_requests(soak):
    one, two, other = (soak.Draw(seed, "model", ["calm"]).requests(100) for seed in (1, 1, 2))
    assert one == two and one != other and len({each.path for each in one}) > 9


def plain(*ids, prompt=(5, 6)):
    """A stream of a completion that gives its ids, as `read` gives it."""
    return [
        {"choices": [{"text": "", "prompt_token_ids": list(prompt)}]},
        *({"choices": [{"token_ids": [each]}]} for each in ids),
    ]


@pytest.mark.parametrize(("gap", "faults"), [(0.01, 0), (0.5, 1)])
def test_an_answer_may_leave_the_one_alone_where_two_tokens_are_as_good_as_equal(soak, near, gap, faults):
    judge, asked, found = near.Near(0.05), soak.Asked("3 plain", "/v1/completions", {}), []
    assert judge.same(asked, plain(7, 8, 9), plain(7, 8, 9)) and judge.same(asked, plain(7, 8, 9), plain(7, 4, 4))
    sent = []

    class Http:
        async def post(self, path, json):
            sent.append((path, json["prompt"]))
            return httpx.Response(200, json={"choices": [{"logprobs": {"top_logprobs": [{"a": -1.0, "b": -1.0 - gap}]}}]})

    asyncio.run(judge.judge(Http(), found.append))
    assert sent == [("/v1/completions", [5, 6, 7])] and len(found) == faults
    asyncio.run(judge.judge(Http(), found.append))
    assert len(sent) == 1, "judged once"


def test_without_a_limit_only_the_same_will_do_and_else_many_differences_of_other_kinds_are_a_fault(soak, near):
    asked, found = soak.Asked("1 chat", "/v1/chat/completions", {}), []
    assert not near.Near(0.0).same(asked, plain(7), plain(8)) and near.Near(0.0).same(asked, plain(7), plain(7))
    judge = near.Near(0.05)
    assert all(judge.same(asked, plain(7), plain(8 if at < 2 else 7)) for at in range(10))
    judge.report(lambda _text: None, found.append)
    assert not found
    assert all(judge.same(asked, plain(7), plain(8)) for _ in range(3))
    judge.report(lambda _text: None, found.append)
    assert len(found) == 1
