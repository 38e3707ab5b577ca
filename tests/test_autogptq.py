"""loaders/autogptq/autogptq_loader.py and the kernel optimum: the real libraries load and answer. Only where they are installed.

They pin versions that do not fit beside the rest, so they have environments of their own:

    .ci/libraries
"""

import importlib.util
import threading

import pytest

from gptq_webui.core.chat import Finish, Message, Step
from gptq_webui.core.errors import BadParameter, LoadFailed, LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine import demo
from gptq_webui.loaders.autogptq.autogptq_loader import AutoGPTQLoader, AutoGPTQOptions
from gptq_webui.loaders.choose import all_loaders, choose
from gptq_webui.loaders.machine.capabilities import Machine, look
from gptq_webui.loaders.transformers import optimum
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

ALONE = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1"}
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=16)
PARIS = "The capital of France is Paris."

needs_library = pytest.mark.skipif(
    not (look().has("gptqmodel") or (look().has("auto_gptq") and look().major("transformers") < 5)),
    reason="neither GPTQModel nor an auto-gptq that can be imported is installed",
)


def answer(model):
    events = list(model.chat([Message("user", "What is the capital of France?")], GREEDY, threading.Event()))
    return "".join(each.text for each in events if not isinstance(each, Finish))


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_loads_the_demo_model_of_2023s_layout_and_answers(bits, demo_root):
    folder = demo.folders(demo_root)[0 if bits == 4 else 1]
    before = sorted(path.name for path in folder.iterdir())
    model = AutoGPTQLoader().load(LocalModel.read(folder), AutoGPTQOptions(device="cpu"), lambda share, text: None)
    try:
        assert answer(model) == PARIS and "Computed by" in model.notes[0]
        assert bool(model.hf.get_input_embeddings().weight.any())  # a tied model keeps its embedding
    finally:
        model.close()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.skipif(not (look().has("gptqmodel") and look().has("optimum")), reason="optimum and gptqmodel are not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_optimum_answers_also_while_our_entry_is_registered(bits, demo_root):
    import gptq_webui
    from gptq_webui.gptq.gptq_linear import GPTQLinear

    gptq_webui.register()
    try:
        options = TransformersOptions(kernel="optimum", device="cpu", dtype="bf16")
        local = LocalModel.read(demo.folders(demo_root)[0 if bits == 4 else 1])
        model = TransformersLoader().load(local, options, lambda share, text: None)
    finally:
        gptq_webui.unregister()
    assert not any(isinstance(module, GPTQLinear) for module in model.hf.modules())
    assert answer(model) == PARIS
    model.close()


@pytest.mark.skipif(not (look().has("auto_gptq") and look().major("transformers") < 5), reason="auto-gptq is not installed")
def test_auto_gptq_gives_the_tokens_of_the_native_kernel(demo_root):
    local = LocalModel.read(demo.folders(demo_root)[0])
    found = []
    for loader, options in (
        (AutoGPTQLoader(), AutoGPTQOptions(device="cpu", backend="auto_gptq")),
        (TransformersLoader(), TransformersOptions(device="cpu", dtype="fp32")),
    ):
        model = loader.load(local, options, lambda share, text: None)
        ids = list(model.prompt([Message("user", "Name three colours.")]).ids)
        found.append([each.id for each in model.generate(ids, GREEDY, threading.Event()) if isinstance(each, Step)])
        model.close()
    assert found[0] == found[1]


def test_auto_gptq_in_fp16_on_the_processor_is_reported_before_it_fails(tmp_path):
    import tiny

    if importlib.util.find_spec("auto_gptq") is None:
        loader = AutoGPTQLoader(lambda: Machine(ALONE | {"auto_gptq": "0.7.1", "transformers": "4.57.6"}, "cpu"))
    else:
        loader = AutoGPTQLoader()
        if look().major("transformers") >= 5:
            pytest.skip("this transformers is too new for auto-gptq")
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    with pytest.raises(BadParameter, match="fp16 on the processor"):
        loader.load(LocalModel.read(tmp_path / "model"), AutoGPTQOptions(device="cpu", dtype="fp16"), lambda share, text: None)


def test_a_library_that_cannot_be_imported_is_a_sentence(tmp_path):
    import tiny

    if look().has("gptqmodel"):
        pytest.skip("GPTQModel is installed")
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    loader = AutoGPTQLoader(lambda: Machine(ALONE | {"gptqmodel": "7.6.0"}, "cpu"))
    with pytest.raises(LoadFailed, match="GPTQModel cannot open model"):
        loader.load(LocalModel.read(tmp_path / "model"), AutoGPTQOptions(device="cpu"), lambda share, text: None)


def test_on_a_gpu_gptqmodel_is_said_to_compile_first_or_refused_without_a_compiler(tmp_path):
    import tiny

    tiny.write(tmp_path / "model")
    local = LocalModel.read(tmp_path / "model")
    gpu = {"torch_for": "cuda 13.0", "gpu": True}
    machine = Machine(ALONE | {"gptqmodel": "7.6.0"}, **gpu, compilers=True)
    assert AutoGPTQLoader(lambda: machine).remark(local, AutoGPTQOptions()).wait_s > 0
    assert AutoGPTQLoader(lambda: machine).remark(local, AutoGPTQOptions(backend="triton")).wait_s == 0
    bare = all_loaders(lambda: Machine(ALONE | {"gptqmodel": "7.6.0"}, **gpu))
    with pytest.raises(LoadRefused, match="choose the backend triton or torch"):
        choose(local, bare, "autogptq")
    assert choose(local, bare, "autogptq", {"backend": "triton"}).loader.name == "autogptq"
    quick = AutoGPTQLoader(lambda: Machine(ALONE | {"gptqmodel": "7.6.0", "triton": "3.6.0"}, **gpu, c_compiler=True))
    assert quick.refusal(local, AutoGPTQOptions()) is None and quick.remark(local, AutoGPTQOptions()).wait_s == 0
    assert "CUDA toolkit" in str(quick.refusal(local, AutoGPTQOptions(backend="gptqmodel")))


def test_the_kernel_optimum_takes_tritons_kernel_where_marlin_would_be_compiled(tmp_path):
    import tiny

    tiny.write(tmp_path / "model")
    local = LocalModel.read(tmp_path / "model")
    here = {"versions": ALONE | {"gptqmodel": "7.6.0", "optimum": "2.3.0"}, "torch_for": "cuda 13.0", "gpu": True}
    triton = {**here, "versions": here["versions"] | {"triton": "3.6.0"}, "c_compiler": True}
    assert "CUDA toolkit" in str(optimum.refusal(local, Machine(**here)))
    assert optimum.refusal(local, Machine(**triton)) is None and optimum.remark(local, Machine(**triton)).wait_s == 0
    assert optimum.refusal(local, Machine(**here, compilers=True)) is None
    assert optimum.remark(local, Machine(**here, compilers=True)).wait_s > 60
