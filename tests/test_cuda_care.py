"""What only a GPU can show about memory: counted, short, released. Skipped without one."""

import threading

import pytest
import torch

import tiny
from fake_library import Folder
from gptq_webui.core.chat import Message
from gptq_webui.core.errors import AnswerFailed, NotEnoughMemory
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.available_memory import fit_of
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.loaders.machine.gpus import available_gpu_bytes, gpus
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

MIB = 2**20
SHORT = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=8)


@pytest.fixture
def engine(tmp_path):
    tiny.write(tmp_path / "models" / "tiny")
    tiny.write_tokenizer(tmp_path / "models" / "tiny", "{{ bos_token }}" + CHATML)
    engine = Engine(Folder(tmp_path / "models"), Settings(), [TransformersLoader()])
    yield engine
    engine.unload()


def used():
    """MiB that the driver counts as taken, by anybody."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / MIB


def answer(engine):
    return engine.chat([Message("user", "hello")], SHORT, threading.Event()).text()[1].new_tokens


def test_the_driver_and_torch_report_the_same_memory():
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    (first, *_more) = gpus()
    assert abs(first.free_bytes - available_gpu_bytes()) < 300 * MIB and first.driver and first.compute


def test_memory_comes_back_after_unload_and_after_ten_loads(engine):
    engine.load("tiny")
    engine.unload()
    before = used()
    for _ in range(10):
        engine.load("tiny")
        assert answer(engine) > 0
        engine.unload()
    assert used() - before < 200


def test_a_full_gpu_is_reported_before_loading_and_the_process_lives(engine):
    engine.load("tiny")
    engine.unload()
    free = available_gpu_bytes()
    hog = torch.empty(free - 500 * MIB, dtype=torch.uint8, device="cuda")
    try:
        found = fit_of(engine.library.get("tiny"), TransformersLoader(), TransformersOptions())
        assert not found.fits and "on the GPU" in str(found)
        with pytest.raises(NotEnoughMemory):
            engine.load("tiny", options={"context_tokens": 0, "device": "cuda"})
        assert engine.recovery.trouble is not None and len(engine.recovery.trouble.remedies) == 3
    finally:
        del hog
        torch.cuda.empty_cache()
    engine.load("tiny")
    assert answer(engine) > 0


def test_a_real_out_of_memory_in_an_answer_leaves_the_model_usable(engine):
    loaded = engine.load("tiny")

    def steps(*_args):
        yield torch.empty(available_gpu_bytes() * 2, dtype=torch.uint8, device="cuda")

    loaded._steps = steps
    with pytest.raises(AnswerFailed, match="not enough memory"):
        answer(engine)
    assert engine.recovery.trouble is not None
    del loaded._steps
    assert answer(engine) > 0
