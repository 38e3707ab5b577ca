"""Loads that fail in each real loader, and disks that are full: one sentence with what was found and what to do."""

import errno
import json
import os
import sqlite3

import pytest
from test_error_sentences import A_CURE
from test_words import CURE, INTERNAL

import tiny
from gptq_webui.app import cli, quantize_command
from gptq_webui.core.errors import GptqWebuiError
from gptq_webui.core.foreign_errors import of_the_disk
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.preset_store import PresetStore
from gptq_webui.loaders.autogptq.autogptq_loader import AutoGPTQLoader
from gptq_webui.loaders.choose import choose
from gptq_webui.loaders.exllamav2.exllamav2_loader import ExLlamaV2Loader
from gptq_webui.loaders.machine.capabilities import Machine
from gptq_webui.loaders.remote.remote_loader import RemoteLoader
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader
from gptq_webui.ui.job_watcher import Job

READY = Machine(
    {"torch": "2.13.0", "transformers": "4.57.6", "accelerate": "1", "exllamav2": "0.3.2", "exllamav2_ext": "0.3.2",
     "gptqmodel": "7.6.0", "auto_gptq": "0.7.1"}, "cpu",
)  # fmt: skip
LOADERS = {  # with the versions of a machine that has every library
    "transformers": TransformersLoader(),
    "autogptq": AutoGPTQLoader(lambda: READY),
    "exllamav2": ExLlamaV2Loader(lambda: READY),
    "remote": RemoteLoader(),
}
BROKEN = {
    "an architecture that nobody knows": lambda f: config_of(f, model_type="zeta9", architectures=["Zeta9ForCausalLM"]),
    "a config of other types": lambda f: config_of(f, hidden_act={"a": 1}),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "a tokenizer of another format": lambda f: (f / "tokenizer.json").write_text('{"version": "9.0"}'),
    "weights of another model": lambda f: config_of(f, intermediate_size=128),
    "nothing wrong": lambda f: None,
}


def config_of(folder, **claims):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claims}))


def judge(text):
    assert not INTERNAL.search(text) and "\n" not in text.strip(), text
    assert CURE.search(text) or A_CURE.search(text), text
    assert text.rstrip()[-1] in ".)" and len(text) < 800, text


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_load_that_fails_in_a_real_loader_is_a_sentence(loader, broken, tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)
    tiny.write_tokenizer(folder)
    BROKEN[broken](folder)
    model, opened = LocalModel.read(folder), LOADERS[loader]
    options = opened.options(**({"base_url": "http://127.0.0.1:9/v1"} if loader == "remote" else {}))
    try:
        choose(model, list(LOADERS.values()), loader)
        loaded = opened.load(model, options, lambda share, text: None)
    except GptqWebuiError as error:
        judge(str(error))
    else:
        loaded.close()
        assert broken == "nothing wrong" and loader in ("transformers", "autogptq")


FULL = {
    "a file": OSError(errno.ENOSPC, "No space left on device", "/home/me/models/x.safetensors"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "the library of the weights": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "the conversations": sqlite3.OperationalError("database or disk is full"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_named_whoever_met_it(name, monkeypatch, capsys, tmp_path):
    def full(*_args, **_more):
        raise FULL[name]

    said = of_the_disk(FULL[name])
    assert "disk is full" in said and "Make room" in said
    job = Job("Quantising", full)
    job.wait(30)
    assert job.error == said
    monkeypatch.setattr(quantize_command, "run", full)
    tiny.dense_model("llama").half().save_pretrained(tmp_path / "dense")
    assert cli.main(["quantize", str(tmp_path / "dense"), "--models-dir", str(tmp_path)]) == 7
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_no_traceback(monkeypatch, capsys, tmp_path):
    def closed(*_args, **_more):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x" / "model.safetensors"))

    monkeypatch.setattr(quantize_command, "run", closed)
    tiny.dense_model("llama").half().save_pretrained(tmp_path / "dense")
    assert cli.main(["quantize", str(tmp_path / "dense"), "--models-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "model.safetensors: permission denied" in said and "Check that" in said and str(tmp_path / "x") not in said
    assert of_the_disk(ValueError("x")) == "" and of_the_disk(KeyError("y")) == ""


def test_presets_on_a_full_disk(monkeypatch, tmp_path):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GptqWebuiError) as caught:
        PresetStore(tmp_path / "presets.json").save("me", "mine", {"temperature": GenerationParams().temperature})
    judge(str(caught.value))
