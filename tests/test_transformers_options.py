"""loaders/transformers_options.py and what the loader makes of it: attention, places, a model's own code only when asked for."""

import json
import threading

import pytest
import torch

import tiny
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadCheckpoint, BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders import fit, transformers_options
from gptq_webui.loaders.transformers import TransformersLoader, TransformersOptions
from gptq_webui.loaders.transformers_options import placement

CUDA = torch.device("cuda")


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
    ],
)
def test_bad_options_are_told(options, says):
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
    ("cards", "options", "wanted"),
    [
        ([24e9], {}, ({"": CUDA}, None)),
        ([3e9], {}, ("auto", {0: "room", "cpu": 50_000_000_000})),
        ([3e9, 3e9], {"cpu_memory": 8}, ("auto", {0: "room", 1: "room", "cpu": 8_000_000_000})),
        ([24e9, 24e9], {"gpu_memory": "2,3"}, ("sequential", {0: 2_000_000_000, 1: 3_000_000_000, "cpu": 50_000_000_000})),
    ],
    ids=["fits on one", "too big for the only one", "over two cards", "the user's own split"],
)
def test_where_the_weights_go(cards, options, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(fit, "free_bytes", lambda device: int(cards[device.index or 0]))
    monkeypatch.setattr(fit, "free_ram_bytes", lambda: 50_000_000_000)
    model = LocalModel(tmp_path, "gptq", None, 4_000_000_000, 4096, "LlamaForCausalLM")
    device_map, memory = placement(model, TransformersOptions(**options), CUDA, torch.float16)
    assert device_map == wanted[0]
    shown = memory and {place: "room" if wanted[1][place] == "room" else size for place, size in memory.items()}
    assert shown == wanted[1]
    if memory and device_map == "auto":
        assert all(0 < size < cards[place] - 1e9 for place, size in memory.items() if place != "cpu")


def test_the_conversation_is_measured_against_the_fullest_card(monkeypatch):
    monkeypatch.setattr(fit, "free_bytes", lambda device: {0: 5, 1: 9}[device.index or 0])
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
