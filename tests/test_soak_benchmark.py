"""benchmarks/soak_requests.py: two answers are the same only if all of their text, ids and numbers are."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "soak_requests.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak_requests", PROGRAM)
    module = sys.modules["soak_requests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak_requests"]


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
