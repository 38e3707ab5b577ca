"""Tokenizers of 2023: a folder with nothing but SentencePiece's tokenizer.model."""

import json
import threading

import pytest
import sentencepiece

import tiny
from gptq_webui.core.chat import Message, Token
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "old-llama-2-chat"
    tiny.write(folder, weights="gptq_model-4bit-32g")
    lines = tmp_path_factory.mktemp("text") / "lines.txt"
    words = ("the", "capital", "i", "[INST]", "[/INST]")  # few letters: 288 pieces hold the 256 bytes and little else
    lines.write_text("\n".join(" ".join((*words[at % 5 :], *words[: at % 5])) for at in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(folder / "tokenizer"), vocab_size=288, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False})
    )
    loaded = TransformersLoader().load(LocalModel.read(folder), TransformersOptions(), lambda share, text: None)
    yield loaded
    loaded.close()


def test_the_prompt_has_one_bos_and_comes_back(model):
    ids = list(model.prompt([Message("user", "the capital")]).ids)
    assert ids[0] == 1 and ids.count(1) == 1
    assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == "[INST] the capital [/INST]"


def test_its_bytes_become_whole_characters(model):
    params = GenerationParams(temperature=0, max_new_tokens=30)
    events = list(model.chat([Message("user", "日本")], params, threading.Event()))
    text = "".join(event.text for event in events if isinstance(event, Token))
    ids = [event.id for event in events if isinstance(event, Token) and event.id >= 0]
    assert text == model.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
