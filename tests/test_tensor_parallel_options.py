"""The option tensor_parallel before a load: what it refuses, and what fits on each GPU."""

import pytest

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq.parallel.ranks import in_a_sentence
from gptq_webui.loaders.machine import gpus, memory_fit
from gptq_webui.loaders.machine.capabilities import Machine
from gptq_webui.loaders.transformers import divided_load
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(path)
    return path


def machine(monkeypatch, count: int, free_bytes: tuple[int, ...] = (), cuda: bool = True) -> TransformersLoader:
    sizes = free_bytes or (80_000_000_000,) * count
    found = [gpus.GpuInfo("NVIDIA H200", 140_000_000_000, each) for each in sizes]
    monkeypatch.setattr(divided_load, "gpus", lambda: found)
    monkeypatch.setattr(divided_load.sys, "platform", "linux")
    versions = {"torch": "2.13", "transformers": "5.24", "accelerate": "1.0"}
    return TransformersLoader(lambda: Machine(versions, "cuda 13.0" if cuda else "cpu", gpu=cuda))


@pytest.mark.parametrize(
    ("count", "cuda", "options", "words"),
    [
        (0, False, {}, "tensor_parallel is for several GPUs, and there is none that torch can use"),
        (1, True, {}, "tensor_parallel 2 needs 2 GPUs, and this machine has 1 (set tensor_parallel to 1)"),
        (2, True, {"tensor_parallel": 4}, "tensor_parallel 4 needs 4 GPUs, and this machine has 2 (set it to 2)"),
        (2, True, {"lora": "pirate"}, "tensor_parallel and a LoRA adapter exclude each other"),
        (2, True, {"gpu_memory": "10,10"}, "tensor_parallel and a split of the GPU memory exclude each other"),
        (8, True, {"tensor_parallel": 8}, "The 4 heads of this model, which read the keys of 2, cannot be divided among 8 GPUs."),
        (2, True, {}, ""),
        (1, False, {"device": "cpu"}, ""),
    ],
)
def test_what_tensor_parallel_refuses(folder, monkeypatch, count, cuda, options, words):
    loader = machine(monkeypatch, count, cuda=cuda)
    found = loader.refusal(LocalModel.read(folder), TransformersOptions(**{"tensor_parallel": 2, **options}))
    assert (words in str(found)) if words else found is None


@pytest.mark.parametrize("value", (0, 9, True, "2"))
def test_a_number_of_gpus_that_cannot_be_is_refused(value):
    with pytest.raises(BadParameter, match="tensor_parallel must be 2 to 8 GPUs that compute together, or 1 for none"):
        TransformersOptions(tensor_parallel=value)


def test_what_fits_is_counted_for_the_fullest_gpu(folder, monkeypatch):
    loader, model = machine(monkeypatch, 2, (80_000_000_000, 30_000_000_000)), LocalModel.read(folder)
    memory = memory_fit.Memory(ram=200_000_000_000, gpu=80_000_000_000)
    one = loader.fit(model, TransformersOptions(), memory)
    two = loader.fit(model, TransformersOptions(tensor_parallel=2), memory)
    assert two.weights_bytes == pytest.approx(one.weights_bytes / 2, abs=1) and two.free_bytes == 30_000_000_000
    assert two.conversation_bytes == one.conversation_bytes / 2
    assert "are free on each of 2 GPUs" in str(two) and two.fits


def test_a_model_that_fits_two_gpus_but_not_one(folder, monkeypatch):
    loader, model = machine(monkeypatch, 2, (10_000_000_000,) * 2), LocalModel.read(folder)
    large = LocalModel(**{**vars(model), "size_bytes": 15_000_000_000})
    memory = memory_fit.Memory(ram=4_000_000_000, gpu=10_000_000_000)
    assert loader.fit(large, TransformersOptions(), memory).impossible
    assert loader.fit(large, TransformersOptions(tensor_parallel=2), memory).fits
    tight = loader.fit(
        LocalModel(**{**vars(model), "size_bytes": 19_500_000_000}), TransformersOptions(tensor_parallel=2), memory
    )
    assert tight.state == "tight" and "goes to the processor" not in str(tight)


def test_what_the_loaded_model_will_free_counts_on_every_gpu(folder, monkeypatch):
    loader, model = machine(monkeypatch, 2, (10_000_000_000, 9_000_000_000)), LocalModel.read(folder)
    memory = memory_fit.Memory(ram=200_000_000_000, gpu=60_000_000_000)  # of which a model holds 50
    assert loader.fit(model, TransformersOptions(tensor_parallel=2), memory).free_bytes == 59_000_000_000


@pytest.mark.parametrize(("count", "shown"), [(0, False), (1, False), (2, True)])
def test_the_page_shows_the_option_only_where_there_are_several_gpus(monkeypatch, count, shown):
    from dataclasses import fields

    from gptq_webui.ui import settings_box

    monkeypatch.setattr(settings_box, "gpus", lambda: [None] * count)
    (option,) = (each for each in fields(TransformersOptions) if each.name == "tensor_parallel")
    assert settings_box._draw(option, "tensor_parallel").visible is shown


@pytest.mark.parametrize(
    "error", [TypeError("forward() got an unexpected keyword argument 'x'"), RuntimeError("NCCL error: unhandled system error")]
)
def test_what_fails_in_a_process_is_said_without_a_class_and_is_whole_in_the_log(error, caplog):
    said = in_a_sentence(error)
    assert said.startswith("One of the processes that compute the model stopped: ") and said.endswith(".")
    assert "Error:" not in said and "keyword" not in said
    assert str(error) in caplog.text
