"""loaders/exllamav2/exllamav2_loader.py against a stand-in for the library, which cannot be imported without CUDA."""

import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

import fake_exllamav2
import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.errors import BadParameter, LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.exllamav2 import exllamav2_loader
from gptq_webui.loaders.exllamav2.exllamav2_loader import ExLlamaV2Loader, ExLlamaV2Options
from gptq_webui.loaders.exllamav2.exllamav2_model import settings_of
from gptq_webui.loaders.machine.capabilities import Machine

READY = Machine({"exllamav2": "0.3.2", "exllamav2_ext": "0.3.2", "flash_attn": "2.8.0"}, "cuda 13.0", gpu=True)
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=5)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "models" / "model"
    tiny.write(path, weights="gptq_model-4bit-32g")
    tiny.write_tokenizer(path)
    return path


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(exllamav2_loader, "_context", lambda model, options: (512, "what fits in the available memory"))
    monkeypatch.setattr(exllamav2_loader, "_settle", lambda: None)
    return fake_exllamav2.install(monkeypatch)


def load(folder, **options):
    loader = ExLlamaV2Loader(lambda: READY)
    return loader.load(LocalModel.read(folder), ExLlamaV2Options(**options), lambda share, text: None)


def run(model, ids, params=GREEDY, cancel=None):
    events = list(model.generate(ids, params, cancel or threading.Event()))
    return [each.id for each in events if isinstance(each, Step)], events[-1]


def test_a_folder_of_2023_reaches_the_library_under_the_names_it_knows_and_is_not_written_to(folder, library):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model = load(folder)
    (config,) = library.configs
    assert config.json["quantization_config"]["bits"] == 4 and config.json["quantization_config"]["checkpoint_format"] == "gptq"
    assert "model.safetensors" in library.files and "gptq_model-4bit-32g.safetensors" not in library.files
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    from pathlib import Path

    assert not Path(config.model_dir).exists()  # the links are gone once the weights are read
    model.close()
    assert library.unloaded == 1


def test_options_reach_the_library(folder, library):
    load(
        folder, cache_type="Q4", gpu_split="1.5,2", alpha_value=2, compress_pos_emb=4, rope_freq_base=1e6, no_flash_attn=True
    ).close()
    (config,) = library.configs
    assert (config.scale_alpha_value, config.scale_pos_emb, config.rotary_embedding_base) == (2, 4, 1e6)
    assert config.no_flash_attn and config.max_seq_len == 512
    assert library.loads == [("split", [1.5, 2.0])] and library.caches[0].name == "ExLlamaV2Cache_Q4"
    load(folder).close()
    assert library.loads[1][0] == "autosplit" and library.caches[1].name == "ExLlamaV2Cache"


def test_ids_in_ids_out_until_the_end_token_or_the_limit(folder, library):
    model = load(folder)
    ids, finish = run(model, [10, 11, 12])
    assert ids == [13, 14, 15, 16, 17] and (finish.reason, finish.prompt_tokens, finish.new_tokens) == ("length", 3, 5)
    vocabulary = len(model.tokenizer)
    ids, finish = run(model, [vocabulary - 2])  # the next is the last id, then 0, then 1, which ends
    assert ids == [vocabulary - 1, 0] and finish.reason == "stop"
    model.close()


def test_the_second_turn_tells_what_came_from_the_cache(folder, library):
    model = load(folder)
    first, _finish = run(model, [10, 11, 12])
    _ids, finish = run(model, [10, 11, 12, *first, 50])
    assert finish.cached_tokens == 8
    model.close()


def test_how_far_the_prompt_is_read_is_shown_beside_the_answer(folder, library):
    model = load(folder)
    stream = model.generate([10, 11, 12, 13], GREEDY, threading.Event())
    assert all(isinstance(each, (Step, Finish)) for each in stream)
    assert (stream.reading.read_tokens, stream.reading.prompt_tokens) == (3, 4)
    model.close()


def test_several_answers_are_computed_side_by_side(folder, library):
    model = load(folder, max_batch_size=3)
    assert model.parallel == 3
    params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=100)
    streams = [model.generate([start], params, threading.Event()) for start in (10, 20, 30, 40)]
    ids = [[each.id for each in stream if isinstance(each, Step)] for stream in streams]
    assert [each[:3] for each in ids] == [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]]
    assert library.most_at_once == 3 and {len(each) for each in ids} == {100}
    model.close()


def test_without_flash_attn_there_is_one_answer_at_a_time_and_the_user_is_warned(folder, monkeypatch, library):
    sys.modules["exllamav2.attn"].has_flash_attn_with_paged = False
    model = load(folder)
    assert model.parallel == 1 and "flash-attn" in model.notes[0]
    streams = [model.generate([start], GREEDY, threading.Event()) for start in (10, 20)]
    assert [[each.id for each in stream if isinstance(each, Step)] for stream in streams] == [
        [11, 12, 13, 14, 15],
        [21, 22, 23, 24, 25],
    ]
    assert library.most_at_once == 1
    model.close()


def test_cancel_ends_the_job_within_a_token_and_the_others_go_on(folder, library):
    model = load(folder)
    library.pause_s = 0.02
    params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=400)
    cancel = threading.Event()
    other = model.generate([20], GREEDY, threading.Event())
    stream = model.generate([10], params, cancel)
    seen = [next(stream) for _ in range(3)]
    cancel.set()
    last = list(stream)
    assert isinstance(last[-1], Finish) and last[-1].reason == "cancelled" and len(seen) == 3
    deadline = time.monotonic() + 5
    while not library.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert library.cancelled == [1] and [each.id for each in other if isinstance(each, Step)] == [21, 22, 23, 24, 25]
    model.close()


def test_closing_ends_what_runs_and_unloads(folder, library):
    model = load(folder)
    library.pause_s = 0.02
    stream = model.generate([10], GenerationParams(temperature=0, max_new_tokens=400), threading.Event())
    next(stream)
    model.close()
    model.close()
    assert library.unloaded == 1 and list(stream)[-1].reason == "cancelled"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Insufficient VRAM for model and cache"), "not enough memory on the GPU"),
        (AssertionError("model.layers.0 has no bias but bias expected"), "ExLlamaV2 cannot open model"),
    ],
)
def test_a_load_that_fails_is_a_sentence_and_leaves_nothing(folder, monkeypatch, error, says):
    monkeypatch.setattr(exllamav2_loader, "_context", lambda model, options: (512, ""))
    seen = fake_exllamav2.install(monkeypatch, fails=error)
    with pytest.raises(LoadFailed, match=says):
        load(folder)
    assert seen.unloaded == 1


def test_an_import_that_fails_is_a_sentence(folder, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "exllamav2":
                raise OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install root.")

    monkeypatch.delitem(sys.modules, "exllamav2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(LoadFailed, match=r"CUDA_HOME.*Use the loader transformers"):
        load(folder)


def test_while_it_compiles_the_page_sees_that_it_lives(monkeypatch):
    monkeypatch.setattr(exllamav2_loader.importlib, "import_module", lambda name: time.sleep(0.5) or SimpleNamespace())
    monkeypatch.setattr(exllamav2_loader, "_TICK_S", 0.1)
    reports = []
    exllamav2_loader._start("exllamav2", lambda share, text: reports.append(text), 120.0)
    assert "about two minutes" in reports[0] and "s so far" in reports[-1]


def test_parameters_become_the_librarys():
    settings = settings_of(SimpleNamespace, GenerationParams(typical_p=0.9, repetition_range=64, logit_bias=((3, 2.0),)), 32)
    assert (settings.temperature, settings.top_k, settings.top_p, settings.typical) == (0.7, 40, 0.95, 0.9)
    assert (settings.token_repetition_penalty, settings.token_repetition_range) == (1.1, 64)
    assert settings.token_bias.tolist()[:5] == [0, 0, 0, 2.0, 0]
    greedy = settings_of(SimpleNamespace, GREEDY, 32)
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.min_p, greedy.token_repetition_range) == (1.0, 1, 0.0, 0.0, -1)


@pytest.mark.parametrize(
    ("options", "says"), [({"cache_type": "FP8"}, "FP16"), ({"gpu_split": "a"}, "gigabytes"), ({"alpha_value": 0}, "alpha_value")]
)
def test_bad_options_are_reported(options, says):
    with pytest.raises(BadParameter, match=says):
        ExLlamaV2Options(**options)


def test_ends_bans_and_xtc_become_the_librarys():
    bans = GenerationParams(ignore_eos=True, custom_token_bans=(4, 99), xtc_probability=0.5, xtc_threshold=0.2)
    settings = settings_of(SimpleNamespace, bans, 32, ends={2})
    assert settings.token_bias.tolist()[:6] == [0, 0, float("-inf"), 0, float("-inf"), 0]
    assert (settings.xtc_probability, settings.xtc_threshold) == (0.5, 0.2)
    assert settings_of(SimpleNamespace, replace(bans, temperature=0.0), 32).xtc_probability == 0.0


def test_an_answer_ends_at_the_ids_that_the_request_names(folder, library):
    model = load(folder)
    run(model, [5, 6], replace(GREEDY, stop_token_ids=(9,)))
    named, usual = set(library.jobs[-1].stop), model._ends | set(model.template.stop_ids)
    run(model, [5, 6], replace(GREEDY, ignore_eos=True))
    assert usual and named == {9, *usual} and library.jobs[-1].stop == []
    model.close()
