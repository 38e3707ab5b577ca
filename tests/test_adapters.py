"""LoRA adapters of single answers on the processor's compiled step: by logits, in one batch, over the API."""

import concurrent.futures
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from test_lora import write_adapter

import tiny
from api_server import ApiServer
from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.gptq import checkpoint, lora
from gptq_webui.gptq.cpu import numba_compiler
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.hub.library import Library

pytestmark = pytest.mark.skipif(not numba_compiler.available(), reason="the compiled step needs numba")

IDS = list(range(4, 44))
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = {
    "llama": LLAMA,
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "fc1", "fc2"),
}


def made(folder, kind, adapters):
    """(dequantised twin, stepper, hf model, {name: parts}); `adapters`: name -> (rank, seed, layers)."""
    from gptq_webui.gptq.cpu.cpu_step import CpuStepper

    twin = tiny.write(folder / "packed", **({} if kind == "llama" else {"kind": kind}))
    products = {}
    for name, (rank, seed, layers) in adapters.items():
        products[name] = write_adapter(folder / name, twin, layers, rank, seed=seed, size=0.05, lora_alpha=rank)
    model, _ = checkpoint.load(LocalModel.read(folder / "packed"), dtype=torch.float32, device_map="cpu")
    found = {name: lora.read(model, folder / name) for name in adapters}
    return twin, CpuStepper(parts_of(model), 128, 2, 8), model, found, products


def twin_logits(twin, products=(), weights=()):
    """Of the dequantised twin with B A added to its weights."""
    kept = {name: value.clone() for name, value in twin.state_dict().items()}
    for each, weight in zip(products, weights, strict=True):
        for name, product in each.items():
            twin.get_submodule(name).weight.data += weight * product
    with torch.inference_mode():
        found = twin(input_ids=torch.tensor([IDS])).logits[0]
    twin.load_state_dict(kept)
    return found


def logits_with(stepper, adapter, ids=IDS):
    with torch.inference_mode():
        memory = stepper.begin()
        memory.adapter = adapter
        return stepper.all_logits(memory, ids)


@pytest.mark.parametrize("kind", LAYERS)
def test_logits_are_those_of_the_twin_with_the_adapter_in_its_weights(kind, tmp_path):
    twin, stepper, _model, parts, products = made(tmp_path, kind, {"a": (5, 1, LAYERS[kind]), "b": (20, 2, LAYERS[kind][:2])})
    plain = twin_logits(twin)
    limit = max(1e-3, 2 * float((logits_with(stepper, None) - plain).abs().max()))
    for names, weights in ((["a"], [1.0]), (["b"], [1.0]), (["a", "b"], [0.5, -2.0])):
        adapter = stepper.adapter([(parts[name], weight) for name, weight in zip(names, weights, strict=True)])
        expected = twin_logits(twin, [products[name] for name in names], weights)
        assert (expected - plain).abs().max() > 10 * limit
        assert (logits_with(stepper, adapter) - expected).abs().max() < limit, names
        memory = stepper.begin()
        memory.adapter = adapter
        with torch.inference_mode():  # the last one by the step of one token
            stepper.prefill(memory, IDS[:-1])
            assert (stepper.step(memory, IDS[-1])[0] - expected[-1]).abs().max() < limit
    assert torch.equal(logits_with(stepper, None), logits_with(stepper, None))
    stepper.close()


def test_eight_rows_of_four_adapters_in_one_pass_are_those_of_each_alone(tmp_path):
    shapes = {"a": (4, 1, LLAMA), "b": (16, 2, LLAMA[:1]), "c": (40, 3, LLAMA[2:]), "d": (8, 4, LLAMA)}
    _twin, stepper, _model, parts, _products = made(tmp_path, "llama", shapes)
    adapters = [None, *(stepper.adapter([(each, 1.0)]) for each in parts.values())]
    rows = [adapters[at] for at in (1, 2, 0, 3, 4, 1, 0, 2)]

    def begun(at):
        memory = stepper.begin()
        memory.adapter = rows[at]
        stepper.prefill(memory, IDS[at:])
        return memory

    with torch.inference_mode():
        together = stepper.rows_logits([(begun(at), [50 + at]) for at in range(8)]).clone()
        alone = torch.cat([stepper.step(begun(at), 50 + at) for at in range(8)])
    assert torch.equal(together, alone)
    assert not torch.equal(alone[0], alone[5]) and len({tuple(each.tolist()) for each in alone}) == 8
    stepper.close()


def test_a_cached_conversation_is_of_one_adapter(tmp_path):
    _twin, stepper, _model, parts, _products = made(tmp_path, "llama", {"a": (4, 1, LLAMA)})
    adapter, cache = stepper.adapter([(parts["a"], 1.0)]), PrefixCache()
    memory = stepper.begin()
    memory.adapter = adapter
    with torch.inference_mode():
        stepper.prefill(memory, IDS)
    cache.keep(IDS, memory)
    assert cache.take(IDS) == (None, 0)
    found, same = cache.take(IDS, 0, adapter)
    assert found is memory and same == len(IDS) - 1
    cache.keep(IDS, memory)
    forked, same = cache.take([*IDS[:10], 99, 98], 0, adapter)
    assert forked is not memory and forked.adapter is adapter and same == 10
    stepper.close()


def test_what_is_outside_of_the_blocks_is_refused(tmp_path):
    _twin, stepper, _model, parts, _products = made(tmp_path, "llama", {"a": (4, 1, ("lm_head",))})
    with pytest.raises(BadCheckpoint, match="no linear layer of a block"):
        stepper.adapter([(parts["a"], 1.0)])
    stepper.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    twin = tiny.write(root / "base")
    tiny.write_tokenizer(root / "base")
    for at, name in enumerate(("pirate", "poet")):
        write_adapter(root / name, twin, LLAMA, 8, seed=at, size=0.3)
    write_adapter(root / "foreign", tiny.dense_model("gpt_neox"), ("dense_h_to_4h",))
    engine = Engine(Library([root]), Settings(root / "settings.json"))
    engine.load("base", options={"device": "cpu", "parallel": 4})
    with ApiServer(engine) as server:
        yield SimpleNamespace(engine=engine, server=server, root=root)
    engine.unload()


def said(house, name, prompt="Hello", **more):
    body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0, "ignore_eos": True, **more}
    answer = house.server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def direct(house, adapters):
    params = GenerationParams(
        max_new_tokens=12, temperature=0, top_p=1, top_k=0, repetition_penalty=1, logprobs=0, ignore_eos=True, adapters=adapters
    )
    loaded = house.engine.ready()
    return [step.logprob for step in loaded.generate(loaded.encode("Hello"), params, threading.Event()) if hasattr(step, "id")]


def test_a_request_names_the_adapter_with_the_model(house):
    plain, pirate, poet = (said(house, f"base{each}") for each in ("", ":pirate", ":poet"))
    assert plain != pirate != poet != plain
    assert pirate == direct(house, (("pirate", 1.0),)) and plain == direct(house, ())
    assert said(house, "base") == plain and said(house, "base:latest") == plain and said(house, "gpt-4:pirate") == plain
    assert direct(house, (("pirate", 0.0),)) == pytest.approx(plain, abs=1e-4)
    both = direct(house, (("pirate", 0.5), ("poet", 0.5)))
    assert both not in (plain, pirate, poet)


def test_answers_with_different_adapters_at_the_same_time_are_those_of_each_alone(house):
    names = ["base", "base:pirate", "base:poet", "base:pirate", "base", "base:poet"]
    alone = [said(house, name, f"Hello {at}") for at, name in enumerate(names)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda given: said(house, given[1], f"Hello {given[0]}"), enumerate(names)))
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_other_protocols(house):
    http = house.server.http
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/v1/chat/completions", {"model": "base:pirate", "messages": messages, "max_tokens": 8, "temperature": 0}),
        ("/v1/messages", {"model": "base:pirate", "messages": messages, "max_tokens": 8, "temperature": 0}),
        (
            "/api/generate",
            {"model": "base:pirate", "prompt": "Hi", "stream": False, "options": {"temperature": 0, "num_predict": 8}},
        ),
        ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "pirate", "max_new_tokens": 8}}),
    ):
        plain = json.loads(json.dumps(body).replace(":pirate", "").replace('"adapter_id": "pirate", ', ""))
        one, other = (http.post(path, json=each) for each in (body, plain))
        assert one.status_code == other.status_code == 200, one.text
        texts = [
            json.dumps([each.json().get(name) for name in ("choices", "content", "response", "generated_text")])
            for each in (one, other)
        ]
        assert texts[0] != texts[1], path


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        (
            "/v1/completions",
            {"model": "base:nobody", "prompt": "x"},
            404,
            "no LoRA adapter 'nobody' beside base. There are: foreign, p",
        ),
        ("/v1/completions", {"model": "base:foreign", "prompt": "x"}, 400, "it is for another base model"),
        ("/v1/embeddings", {"model": "base:poet", "input": "x"}, 400, "Embeddings are computed without LoRA adapters"),
        (
            "/v1/completions",
            {"model": "base:poet", "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 0},
            400,
            "Leave the adapter out",
        ),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "nobody"}}, 422, "no LoRA adapter 'nobody'"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(house, path, body, code, words):
    answer = house.server.http.post(path, json=body)
    assert answer.status_code == code and words in answer.text, answer.text


def test_a_way_of_computing_without_adapters_says_so(tmp_path):
    from gptq_webui.loaders.contract.fake_loader import FakeModel, FakeOptions

    model = FakeModel(LocalModel(tmp_path / "x", "gptq", None, 1, 1, "X"), FakeOptions())
    with pytest.raises(BadParameter, match="takes no LoRA adapter for a single answer"):
        model.chat([], GenerationParams(adapters=(("pirate", 1.0),)), threading.Event())
    model.close()
