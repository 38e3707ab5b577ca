"""The option tensor_parallel before a load: what it refuses, and what fits on each GPU."""

import pytest

import tiny
from gptq_webui.core.errors import BadParameter, LoadCancelled, LoadFailed
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
    monkeypatch.setattr(divided_load, "visible_gpus", lambda: found)
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


@pytest.mark.parametrize("value", (-1, 9, True, "2"))
def test_a_number_of_gpus_that_cannot_be_is_refused(value):
    with pytest.raises(
        BadParameter,
        match="tensor_parallel must be 2 to 8 GPUs that compute together, 1 for none, or 0 for as many as the model needs",
    ):
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
    assert loader.fit(large, TransformersOptions(tensor_parallel=1), memory).impossible
    assert loader.fit(large, TransformersOptions(tensor_parallel=2), memory).fits
    tight = loader.fit(
        LocalModel(**{**vars(model), "size_bytes": 19_500_000_000}), TransformersOptions(tensor_parallel=2), memory
    )
    assert tight.state == "tight" and "goes to the processor" not in str(tight)


LARGE, MEMORY = 15_000_000_000, memory_fit.Memory(ram=4_000_000_000, gpu=10_000_000_000)


def sized(folder, size_bytes):
    model = LocalModel.read(folder)
    return LocalModel(**{**vars(model), "size_bytes": size_bytes})


@pytest.mark.parametrize(
    ("count", "size_bytes", "options", "ranks"),
    [
        (2, LARGE, {}, 2),
        (2, LARGE, {"device": "cuda"}, 2),
        (4, LARGE, {}, 2),  # no more than it needs
        (4, 24_000_000_000, {}, 4),  # 3 would hold it, and its heads cannot be divided among 3
        (4, 3_000_000_000, {}, 1),  # one holds it
        (1, LARGE, {}, 1),
        (2, 60_000_000_000, {}, 1),  # no number of them holds it
        (2, LARGE, {"tensor_parallel": 1}, 1),
        (2, 3_000_000_000, {"tensor_parallel": 2}, 2),
        (2, LARGE, {"lora": "pirate"}, 1),
        (2, LARGE, {"gpu_memory": "10,10"}, 1),
        (2, LARGE, {"device": "cpu"}, 1),
    ],
)
def test_as_many_gpus_as_a_model_needs(folder, monkeypatch, count, size_bytes, options, ranks):
    loader = machine(monkeypatch, count, (10_000_000_000,) * count)
    found, _note = loader._chosen(sized(folder, size_bytes), TransformersOptions(**options), MEMORY)
    assert found.tensor_parallel == ranks
    assert loader.refusal(sized(folder, size_bytes), TransformersOptions(**options)) is None


def test_a_model_that_cannot_be_divided_is_split_by_layers(tmp_path, monkeypatch):
    tiny.write(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "falcon"'))
    loader = machine(monkeypatch, 2, (10_000_000_000,) * 2)
    found, note = loader._chosen(sized(tmp_path / "model", LARGE), TransformersOptions(), MEMORY)
    assert found.tensor_parallel == 1
    assert note.startswith("The GPUs work one after the other, not together: tensor_parallel knows models of the kinds llama, ")


def test_gpus_of_several_kinds_are_not_joined(folder, monkeypatch):
    loader = machine(monkeypatch, 2, (10_000_000_000,) * 2)
    mixed = [gpus.GpuInfo(name, 24 << 30, 10_000_000_000) for name in ("RTX 4090", "Tesla P40")]
    monkeypatch.setattr(divided_load, "visible_gpus", lambda: mixed)
    found, note = loader._chosen(sized(folder, LARGE), TransformersOptions(), MEMORY)
    assert found.tensor_parallel == 1 and "they are of several kinds" in note


def test_gpus_of_an_unknown_order_are_counted(folder, monkeypatch):
    loader = machine(monkeypatch, 2)
    monkeypatch.setattr(divided_load, "visible_gpus", list)
    monkeypatch.setattr(gpus, "_lately", lambda: MIXED)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = TransformersOptions(tensor_parallel=2)
    assert loader.refusal(LocalModel.read(folder), two) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "this machine has 1" in str(loader.refusal(LocalModel.read(folder), two))


def test_the_host_gets_a_model_in_one_process(folder, monkeypatch):
    loader = machine(monkeypatch, 2, (10_000_000_000,) * 2)
    loader.divides_by_itself = False
    assert loader._chosen(sized(folder, LARGE), TransformersOptions(), MEMORY)[0].tensor_parallel == 1
    assert loader._chosen(sized(folder, LARGE), TransformersOptions(tensor_parallel=2), MEMORY)[0].tensor_parallel == 2


def test_a_branch_that_several_gpus_hold_together_is_offered_as_such(folder, monkeypatch):
    from gptq_webui.engine import advice

    loader = machine(monkeypatch, 2, (10_000_000_000,) * 2)
    found = advice.fit(sized(folder, LARGE), [loader], 256, MEMORY)
    assert (found.state, found.text) == ("fits", "Fits 2 of your GPUs together")
    assert found.needs_bytes > LARGE


def test_conversations_of_several_gpus_are_counted_in_16_bits(folder):
    model = LocalModel.read(folder)
    together = TransformersOptions(tensor_parallel=2, cache_type="q8")
    assert together.demand(model, True).number_bytes == 2.0 and "16-bit numbers" in together.no_cache_type(model, True)


# the GPUs of torch ---------------------------------------------------------------------------------------------------

FOUR = [gpus.GpuInfo("RTX 3090", 24 << 30, at << 30, id=f"GPU-{at}a") for at in range(4)]
MIXED = [gpus.GpuInfo("RTX 3060", 12 << 30, 1), gpus.GpuInfo("RTX 4090", 24 << 30, 2)]


@pytest.mark.parametrize(
    ("found", "variables", "order"),
    [
        (FOUR, {}, [0, 1, 2, 3]),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        (FOUR, {"CUDA_VISIBLE_DEVICES": " 3 "}, [3]),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "GPU-2a,1"}, [2, 1]),
        (FOUR, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "1,7,2"}, [1]),  # what follows one that is none is not seen
        (FOUR, {"CUDA_VISIBLE_DEVICES": "MIG-1"}, []),
        (MIXED, {}, []),
        (MIXED, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [0, 1]),
        ([], {}, []),
    ],
)
def test_the_gpus_that_torch_sees(found, variables, order):
    assert gpus.in_order_of_torch(found, variables) == [found[at] for at in order]


def test_started_torch_is_asked_for_its_order(monkeypatch):
    from types import SimpleNamespace

    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda at: SimpleNamespace(uuid=("3a", "1a")[at]),
    )
    monkeypatch.setitem(gpus.sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(gpus, "gpus", lambda: FOUR)
    monkeypatch.setattr(gpus, "_answers", [])
    assert gpus.visible_gpus() == [FOUR[3], FOUR[1]]
    monkeypatch.setattr(gpus, "gpus", lambda: MIXED)
    assert gpus.visible_gpus() == [FOUR[3], FOUR[1]]  # asked a moment ago
    gpus.ask_anew()
    assert gpus.visible_gpus() == []  # of other ids
    cuda.get_device_properties = lambda at: SimpleNamespace(uuid="a part of one")
    assert gpus.visible_gpus() == []


def test_what_fits_is_said_of_the_gpus_that_compute_together(folder, monkeypatch):
    loader = machine(monkeypatch, 2, (10_000_000_000,) * 2)
    found = loader.fit(sized(folder, LARGE), TransformersOptions(), MEMORY)
    assert found.fits and "are free on each of 2 GPUs" in str(found)


@pytest.mark.parametrize(
    "error", [LoadFailed("NCCL found no way."), RuntimeError("CUDA error"), AttributeError("ProcessGroupNCCL")]
)
def test_gpus_that_cannot_compute_together_are_split_by_layers_and_a_note_says_so(folder, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(divided_load, "load", fails)
    two = TransformersOptions(tensor_parallel=2)
    found, why = divided_load.load_or_leave(LocalModel.read(folder), two, lambda *_: None, optional=True)
    assert found is None and why == (
        "The GPUs work one after the other, since 2 of them could not compute together; the log has the details."
    )
    with pytest.raises(type(error)):
        divided_load.load_or_leave(LocalModel.read(folder), two, lambda *_: None, optional=False)


def test_a_load_that_is_cancelled_is_not_split_by_layers(folder, monkeypatch):
    def cancelled(*_):
        raise LoadCancelled("The load was cancelled.")

    monkeypatch.setattr(divided_load, "load", cancelled)
    with pytest.raises(LoadCancelled):
        divided_load.load_or_leave(
            LocalModel.read(folder), TransformersOptions(tensor_parallel=2), lambda *_: None, optional=True
        )


def test_what_the_loaded_model_will_free_counts_on_every_gpu(folder, monkeypatch):
    loader, model = machine(monkeypatch, 2, (10_000_000_000, 9_000_000_000)), LocalModel.read(folder)
    memory = memory_fit.Memory(ram=200_000_000_000, gpu=60_000_000_000)  # of which a model holds 50
    assert loader.fit(model, TransformersOptions(tensor_parallel=2), memory).free_bytes == 9_000_000_000  # on the first alone

    class Divided:
        ranks, is_loaded = 2, True

    divided = Divided()
    monkeypatch.setattr(divided_load, "_divided", [divided])
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
