"""Qwen of 2023 (model_type "qwen") opens without its program code, as what it is in arithmetic: Qwen2 with fused layers."""

import json
import threading

import pytest
import qwen_of_2023
import torch
from checked_steps import IDS, require_logits
from test_tokenizers_of_2023 import write_ranks, write_settings

from gptq_webui.core.chat import Message
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.hub.library import Library
from gptq_webui.loaders.machine import memory_fit
from gptq_webui.loaders.machine.capabilities import look
from gptq_webui.loaders.transformers import optimum


def loaded(folder):
    hf, notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    return hf, notes


@pytest.mark.parametrize(("bits", "act_order", "shards"), [(4, False, 2), (4, True, 1), (8, True, 1)])
def test_its_logits_are_those_of_its_arithmetic(bits, act_order, shards, tmp_path):
    tensors = qwen_of_2023.write(tmp_path / "model", bits=bits, act_order=act_order, shards=shards)
    wanted = qwen_of_2023.logits(tensors, IDS)
    hf, _notes = loaded(tmp_path / "model")
    assert sum(isinstance(each, GPTQLinear) for each in hf.modules()) == 7 * qwen_of_2023.LAYERS
    require_logits(hf, wanted)


def test_its_context_ends_where_its_own_way_of_longer_ones_begins(tmp_path):
    qwen_of_2023.write(tmp_path / "model", seq_length=128, longest=256)
    model = LocalModel.read(tmp_path / "model")
    assert model.context_tokens == 128 and model.architecture == "QWenLMHeadModel"
    hf, notes = loaded(tmp_path / "model")
    assert hf.config.max_position_embeddings == 128
    assert any("ends at 128 tokens" in note and "256" in note for note in notes)
    qwen_of_2023.write(tmp_path / "whole", seq_length=256, longest=256)
    assert LocalModel.read(tmp_path / "whole").context_tokens == 256
    assert not loaded(tmp_path / "whole")[1]
    assert memory_fit.conversation_bytes_per_token(tmp_path / "whole") == 2 * 2 * 2 * 4 * 16


def test_it_is_chosen_loaded_asked_saved_and_reloaded(tmp_path):
    folder = tmp_path / "models" / "Qwen-7B-Chat-Int4"
    write_settings(folder, "QWenTokenizer", "QWenLMHeadModel", "qwen", model_max_length=256)
    ranks = write_ranks(folder / "qwen.tiktoken", 400)
    tensors = qwen_of_2023.write(folder, vocabulary=len(ranks) + 208, seq_length=256, longest=256)
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": len(ranks)}))
    library, settings = Library([tmp_path / "models"]), tmp_path / "settings.json"
    engine = Engine(library, Settings(settings))
    try:
        assert [each.name for each in library.models()] == [folder.name]
        engine.load(folder.name)
        assert engine.loaded.context_tokens == 256 and engine.loaded.template.name == "Qwen"
        assert len(ranks) + 2 in engine.loaded.template.stop_ids
        chat, params = [Message("user", "The quick brown fox?")], GenerationParams(temperature=0, max_new_tokens=8)
        first = engine.chat(chat, params, threading.Event()).text()[0]
        ids = list(engine.loaded.prompt(chat).ids)
        for _ in range(8):
            ids.append(int(qwen_of_2023.logits(tensors, ids)[-1].argmax()))
        wanted = ids[-8:]
        assert first == engine.loaded.tokenizer.decode(wanted, skip_special_tokens=True)
        engine.settings.save_for_model(folder.name, options={"context_tokens": 128})
        engine.unload()
        engine = Engine(library, Settings(settings))
        engine.load(folder.name)
        assert engine.loaded.context_tokens == 128
        assert engine.chat(chat, params, threading.Event()).text()[0] == first
    finally:
        engine.unload()


def test_transformers_own_integration_is_not_given_names_it_does_not_know(tmp_path):
    qwen_of_2023.write(tmp_path / "model")
    refused = optimum.refusal(LocalModel.read(tmp_path / "model"), look())
    assert refused is not None and "names of 2023" in str(refused) and "kernel native" in str(refused)
