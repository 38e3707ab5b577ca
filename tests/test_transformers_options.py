"""loaders/transformers/transformers_options.py: attention, devices, and a model's own code only with consent."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

import tiny
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.load_request import LoadRequest
from gptq_webui.engine.remedies import remedies
from gptq_webui.gptq import stepper_choice
from gptq_webui.gptq.cuda import cuda_stepper
from gptq_webui.loaders.exllamav2.exllamav2_loader import ExLlamaV2Options
from gptq_webui.loaders.machine import memory_fit
from gptq_webui.loaders.machine.capabilities import Machine
from gptq_webui.loaders.transformers import transformers_options
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions
from gptq_webui.loaders.transformers.transformers_options import placement

CUDA = torch.device("cuda")
GPU = Machine({"torch": "2.13"}, torch_for="cuda 13.0", gpu=True)


def load(folder, **options):
    return TransformersLoader().load(LocalModel.read(folder), TransformersOptions(device="cpu", **options), lambda *_: None)


@pytest.fixture
def folder(tmp_path):
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kernel": "exllama"}, "kernel must be native or optimum"),
        ({"gpu_memory": "10,x"}, "gpu_memory must be gigabytes"),
        ({"cpu_memory": -1}, "cpu_memory"),
        ({"attn_implementation": "magic"}, "attn_implementation must be"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be true or false"),
        ({"alpha_value": 0.5}, "alpha_value must be between 1"),
        ({"cache_type": "q3"}, "cache_type must be fp16 or q8"),
        ({"guesses": "yes"}, "guesses must be auto, on or off"),
        ({"draft_model": 1}, "draft_model must be the name of a folder"),
        ({"parallel": -1}, "parallel must be 1 to 256"),
        ({"parallel": 257}, "parallel must be 1 to 256"),
    ],
)
def test_bad_options_are_reported(options, says):
    with pytest.raises(BadParameter, match=says):
        TransformersOptions(**options)


def test_the_attention_asked_for_is_the_one_that_computes(folder):
    model = load(folder, attn_implementation="eager")
    assert model.hf.config._attn_implementation == "eager"
    model.close()


def test_a_rope_that_is_stretched_lengthens_the_context(folder):
    model = load(folder, compress_pos_emb=2.0)
    assert model.context_tokens == 512 and any("divided by 2" in note for note in model.notes)  # trained for 256
    model.close()


@pytest.mark.parametrize(
    ("gpus", "options", "wanted"),
    [
        ([24e9], {}, ({"": CUDA}, None)),
        ([3e9], {}, ("auto", {0: "room", "cpu": 50_000_000_000})),
        ([3e9, 3e9], {"cpu_memory": 8}, ("auto", {0: "room", 1: "room", "cpu": 8_000_000_000})),
        ([24e9, 24e9], {"gpu_memory": "2,3"}, ("sequential", {0: 2_000_000_000, 1: 3_000_000_000, "cpu": 50_000_000_000})),
    ],
    ids=["fits on one", "too big for the only one", "over two gpus", "the user's own split"],
)
def test_where_the_weights_go(gpus, options, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(memory_fit, "available_bytes", lambda device: int(gpus[device.index or 0]))
    monkeypatch.setattr(memory_fit, "available_ram_bytes", lambda: 50_000_000_000)
    model = LocalModel(tmp_path, "gptq", None, 4_000_000_000, 4096, "LlamaForCausalLM")
    device_map, memory = placement(model, TransformersOptions(**options), CUDA, torch.float16)
    assert device_map == wanted[0]
    shown = memory and {place: "room" if wanted[1][place] == "room" else size for place, size in memory.items()}
    assert shown == wanted[1]
    if memory and device_map == "auto":
        assert all(0 < size < gpus[place] - 1e9 for place, size in memory.items() if place != "cpu")


def test_the_conversation_is_measured_against_the_fullest_gpu(monkeypatch):
    monkeypatch.setattr(memory_fit, "available_bytes", lambda device: {0: 5, 1: 9}[device.index or 0])
    hf = type("HF", (), {"hf_device_map": {"a": 0, "b": "cuda:1", "c": "cpu"}})()
    assert transformers_options.free_beside(hf, CUDA) == 10
    hf.hf_device_map = {"a": 0, "c": "cpu"}
    assert transformers_options.free_beside(hf, CUDA) == 5


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_when_asked_for_that_model(folder):
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    with pytest.raises(BadCheckpoint, match="trust_remote_code for this model"):
        load(folder)
    model = load(folder, trust_remote_code=True)
    assert type(model.hf).__name__ == "OwnModel"
    params = GenerationParams(temperature=0, max_new_tokens=3)
    assert list(model.chat([Message("user", "Hi")], params, threading.Event()))[-1].new_tokens <= 3
    model.close()


# the 8-bit cache


@pytest.mark.parametrize(("given", "taken"), [("Q8", "q8"), ("FP16", "fp16"), ("Q4", "q8"), ("q8", "q8")])
def test_the_cache_types_of_exllamav2_are_understood_for_one_name_is_saved_for_both(given, taken):
    assert TransformersOptions(cache_type=given).cache_type == taken
    assert ExLlamaV2Options(cache_type=given).cache_type == given.upper()


def test_the_8_bit_cache_is_counted_where_it_would_be_used(folder):
    model = LocalModel.read(folder)
    usual = TransformersOptions().demand(model, gpu=True)
    assert (usual.number_bytes, TransformersOptions(cache_type="q8").demand(model, gpu=True).number_bytes) == (2, 1.04)
    assert TransformersOptions(cache_type="q8").demand(model, gpu=False).number_bytes == 4


@pytest.mark.parametrize(
    ("options", "machine", "architecture", "why"),
    [
        ({}, GPU, "LlamaForCausalLM", None),
        ({}, Machine(), "LlamaForCausalLM", "it is for GPUs"),
        ({"device": "cpu"}, GPU, "LlamaForCausalLM", "it is for GPUs"),
        ({"kernel": "optimum"}, GPU, "LlamaForCausalLM", "the kernel optimum has none"),
        ({"dtype": "bf16"}, GPU, "LlamaForCausalLM", "it needs the number format fp16, not bf16"),
        ({}, GPU, "falcon", "models of this architecture are computed without it"),
    ],
)
def test_the_8_bit_cache_is_a_remedy_where_it_would_be_used(options, machine, architecture, why, folder):
    if architecture == "falcon":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "falcon"}))
    loader, model = TransformersLoader(lambda: machine), LocalModel.read(folder)
    given = TransformersOptions(**options)
    found = remedies(LoadRequest(model, None), loader, given, 256, [])[1]
    assert (found.cannot or None) == (why and f"8-bit cache: {why}.")
    assert why or found.options == {"cache_type": "q8"}
    already = remedies(LoadRequest(model, None), loader, TransformersOptions(cache_type="q8", **options), 256, [])[1]
    assert already.cannot == "8-bit cache: it is q8 already."


def test_what_is_asked_for_reaches_the_step_of_a_gpu(monkeypatch):
    seen = {}

    class Stepper:
        kernel = "cuda"

        def __init__(self, parts, context_tokens, **given):
            seen.update(given, context=context_tokens)

    monkeypatch.setattr(cuda_stepper, "CudaStepper", Stepper)
    monkeypatch.setattr(stepper_choice, "parts_for_gpu", lambda _hf: "parts")
    weight = SimpleNamespace(device=CUDA)
    embeddings = SimpleNamespace(weight=weight)
    hf = SimpleNamespace(get_input_embeddings=lambda: embeddings, dtype=torch.float16, named_modules=tuple)
    made, note = stepper_choice.stepper_for(hf, 100, cache_type="q8", parallel=3)
    assert isinstance(made, Stepper) and note == ""
    assert seen == {"cache_type": "q8", "parallel": 3, "context": 100, "guesses": True}
    for guesses, wanted in (("on", True), ("off", False), ("auto", True)):
        stepper_choice.stepper_for(hf, 100, guesses=guesses)
        assert seen["guesses"] is wanted


def test_where_there_is_no_such_cache_a_note_says_what_is_kept(folder):
    model = load(folder, cache_type="q8")
    assert any("kept in 32-bit numbers" in note and "q8" in note for note in model.notes)
    model.close()
