"""Ids that the model has no embedding of: a sentence before anything is computed, and the next answer is right."""

import json
import shutil
import threading

import pytest
import torch

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


@pytest.mark.parametrize(("claims", "what"), [
    ({"pad_token_id": 288}, "padding"), ({"bos_token_id": 4000}, "beginning"), ({"eos_token_id": [1, 99999]}, "end"),
])  # fmt: skip
def test_ids_of_config_json_past_the_vocabulary_are_ignored_with_a_note(claims, what, tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claims}))
    packed, notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    assert any(what in note and "0 to 287" in note for note in notes)
    assert packed.config.eos_token_id in (1, 2, [1], None)


def test_a_prompt_with_such_a_token_is_refused_and_the_next_answer_is_right(tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(), lambda share, text: None)
    params = GenerationParams(temperature=0, max_new_tokens=4)

    def answer(ids):
        with loaded.generate(ids, params, threading.Event()) as steps:
            return [step.id for step in steps if hasattr(step, "id")]

    try:
        before = answer([5, 6, 7])
        for wrong in (288, -1, 10**9):
            with pytest.raises(BadParameter, match="0 to 287"):
                answer([5, wrong, 7])
        assert answer([5, 6, 7]) == before
    finally:
        loaded.close()
