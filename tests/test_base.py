"""loaders/contract/base.py: what every back-end is given, tried on the fake one and on a tiny real one."""

import threading
import time
from pathlib import Path

import pytest

import tiny
from gptq_webui.core.chat import Finish, Message, Token
from gptq_webui.core.errors import Busy
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.contract.base import Loader, StopFlag
from gptq_webui.loaders.contract.fake_loader import FakeLoader, FakeModel, FakeOptions
from gptq_webui.loaders.machine.memory_fit import Demand, Memory, fit_context
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

QUESTION = [Message("user", "What is the capital of France?")]


def fake(**options):
    model = LocalModel(Path("/nowhere/fake"), "gptq", None, 10, 2048, "LlamaForCausalLM")
    return FakeLoader().load(model, FakeOptions(**options), lambda share, text: None)


def ask(model, params=None, messages=QUESTION, cancel=None):
    events = list(model.chat(messages, params or GenerationParams(), cancel or threading.Event()))
    assert [type(event) for event in events[:-1]] == [Token] * (len(events) - 1) and isinstance(events[-1], Finish)
    return "".join(event.text for event in events[:-1]), events[-1]


def test_an_answer_is_tokens_and_one_finish():
    text, finish = ask(fake())
    assert text == "The capital of France is Paris."
    assert finish.reason == "stop" and finish.new_tokens == 6


def test_a_stop_string_over_two_tokens_ends_the_answer_before_it():
    text, finish = ask(fake(), GenerationParams(stop=("is Par",)))
    assert text == "The capital of France " and finish.reason == "stop"


def test_a_role_marker_ends_the_answer():
    text, finish = ask(fake(answer="Yes.<|im_start|>user more"))
    assert text == "Yes." and finish.reason == "stop"


def test_text_held_back_for_a_stop_string_is_not_lost_at_the_end():
    assert ask(fake(answer="one two <|im"))[0] == "one two <|im"


def test_the_limit_is_said():
    text, finish = ask(fake(), GenerationParams(max_new_tokens=2))
    assert text == "The capital" and finish.reason == "length"


def test_stop_ends_within_one_token():
    model = fake(answer="word " * 500, tokens_per_s=200)
    cancel = threading.Event()
    seen = 0
    for event in model.chat(QUESTION, GenerationParams(), cancel):
        if isinstance(event, Token):
            seen += 1
            if seen == 3:
                cancel.set()
                computed = model.computed_tokens
    assert isinstance(event, Finish) and event.reason == "cancelled"
    assert model.computed_tokens <= computed + 1


def test_times_are_reported():
    _text, finish = ask(fake(tokens_per_s=100))
    assert 0.005 < finish.prefill_s < 0.2 and 50 < finish.tokens_per_s < 101 and finish.wait_s >= 0


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(folder)
    tiny.write_tokenizer(folder, "{{ bos_token }}" + CHATML)
    model = TransformersLoader().load(LocalModel.read(folder), TransformersOptions(), lambda share, text: None)
    yield model
    model.close()


def test_a_prompt_begins_with_exactly_one_bos(tiny_model):
    for ids in (list(tiny_model.prompt(QUESTION).ids), tiny_model.encode("plain text"), tiny_model.encode("<s>begun")):
        assert ids[0] == 0 and ids.count(0) == 1


def test_the_second_turn_does_not_compute_the_first_again(tiny_model):
    params = GenerationParams(temperature=0, max_new_tokens=5)
    ask(tiny_model, params)
    _text, finish = ask(tiny_model, params, [*QUESTION, Message("assistant", "Paris"), Message("user", "Sure?")])
    assert finish.cached_tokens > 30


def test_generate_gives_ids(tiny_model):
    events = list(tiny_model.generate([0, 50, 51], GenerationParams(temperature=0, max_new_tokens=4), threading.Event()))
    assert isinstance(events[-1], Finish) and all(isinstance(event.id, int) for event in events[:-1])


def test_closing_frees_and_refuses():
    model = fake()
    model.close()
    model.close()
    with pytest.raises(Exception, match="unloaded"):
        ask(model)


GIB = 2**30


def test_an_unload_in_the_middle_of_a_text_gives_no_vector():
    """What was read of it has a vector too, which looks like any other."""
    model, reads = fake(), threading.Event()

    def vector(ids, pooling, cancel):
        while not cancel.is_set():
            reads.set()
            yield None
        return [1.0]

    model.can_embed, model._vector = True, vector
    unload = threading.Thread(target=lambda: reads.wait(30) and model.close())
    unload.start()
    with pytest.raises(Busy, match="Send them again"):
        model.embed([[1, 2]], "mean", threading.Event())
    unload.join()


@pytest.mark.parametrize(
    ("trained", "asked", "free", "tokens", "reason"),
    [
        (32768, 0, 100 * GIB, 8192, "default"),
        (4096, 0, 100 * GIB, 4096, "trained"),
        (32768, 16384, 100 * GIB, 16384, "as you set it"),
        (4096, 16384, 100 * GIB, 4096, "trained for 4096"),
        (32768, 0, 1_300_000_000 + 300_000 * 512, 1024, "memory"),
    ],
)
def test_the_context_is_the_smallest_of_trained_default_and_fitting(trained, asked, free, tokens, reason, tmp_path):
    # 2 layers x 2 heads x 64 x 2 bytes x (keys and values) = 1024 bytes a token; tripled by fp16 -> see below
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}'
    )
    model = LocalModel(tmp_path, "gptq", None, 10, trained, "LlamaForCausalLM")
    found, why = fit_context(model, Demand(asked), free)
    assert found == tokens and reason in why


def test_no_room_for_a_conversation_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}')
    model = LocalModel(tmp_path, "gptq", None, 10, 4096, "LlamaForCausalLM")
    with pytest.raises(Exception, match="no room for a conversation"):
        fit_context(model, Demand(), 1_300_000_001)


def test_a_flag_that_is_waited_for_is_set_by_its_parent_too():
    parent = threading.Event()
    flag = StopFlag(parent)
    assert not flag.wait(0.01)
    threading.Timer(0.05, parent.set).start()
    began = time.perf_counter()
    assert flag.wait(5) and time.perf_counter() - began < 2
    alone = StopFlag(threading.Event())
    threading.Timer(0.05, alone.set).start()
    assert alone.wait() and not alone._parent.is_set()


def test_a_loader_needs_two_methods_and_has_defaults_for_the_rest(tmp_path):
    class Least(Loader):
        name, options = "least", FakeOptions

        def refusal(self, model, options):
            return None

        def load(self, model, options, progress):
            return FakeModel(model, options)

    loader, model = Least(), LocalModel(tmp_path, "gptq", None, 10**9, 2048, "LlamaForCausalLM")
    options = loader.options()
    assert loader.remark(model, options) is None and loader.without_effect(model, options) == {}
    assert loader.fit(model, options, Memory(10**10)).fits and not loader.fit(model, options, Memory(10**8)).fits
    assert loader.needs_bytes(model, options) > 10**9 and loader.automatic and not loader.context_option


def test_text_and_ids_and_how_many(tiny_model):
    ids = tiny_model.encode("plain text", bos=False)
    assert tiny_model.decode(ids) == "plain text"
    assert tiny_model.count("plain text") == len(ids) + 1
    assert tiny_model.decode(tiny_model.encode("plain"), special=True) == "<s>plain"
    assert tiny_model.count(QUESTION) == len(tiny_model.prompt(QUESTION).ids) and not tiny_model.is_remote


def test_a_prompt_that_was_made_before_gives_the_same_answer(tiny_model):
    params = GenerationParams(temperature=0, max_new_tokens=8)
    prompt = tiny_model.prompt(QUESTION)
    text = "".join(event.text for event in tiny_model.answer(prompt, params, threading.Event()) if isinstance(event, Token))
    assert text == ask(tiny_model, params)[0]
