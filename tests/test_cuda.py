"""What only a GPU can show. Skipped without one."""

import gc
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from gptq_webui.core.chat import Finish, Message
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_layer_on_the_gpu_equals_its_float64_reference(bits, group_size, act_order, rows):
    generator = torch.Generator().manual_seed(bits)
    tensors, dense = tiny.random_layer(256, 192, bits, group_size, act_order=act_order, sym=False, generator=generator)
    layer = GPTQLinear(256, 192, bits, group_size, bias=False, device="cuda")
    layer.load_state_dict({name: tensor.cuda() for name, tensor in tensors.items()})
    x = torch.randn(rows, 256, generator=generator)
    wanted = x.double() @ dense.T.double()
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        found = layer(x.to("cuda", dtype)).cpu().double()
        assert float((found - wanted).norm() / wanted.norm()) < limit, dtype


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_packed_logits_on_the_gpu_equal_those_of_the_dense_twin(kind, tmp_path):
    twin = tiny.write(tmp_path / "model", kind, sym=False)
    packed, _notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map={"": "cuda"})
    ids = torch.randint(0, 288, (1, 24))
    with torch.no_grad():
        wanted, found = twin(ids).logits.double(), packed(ids.cuda()).logits.cpu().double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread over GPU and machine"])
def test_a_model_answers_on_the_gpu_and_releases_its_memory(spread, tmp_path, monkeypatch):
    tiny.write(tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model", "{{ bos_token }}" + CHATML)
    if spread:
        device_map = {"model.embed_tokens": "cuda", "model.layers.0": "cuda", "model.layers.1": "cpu", "model.norm": "cpu"}
        device_map |= {"model.rotary_emb": "cuda", "lm_head": "cpu"}
        monkeypatch.setattr("gptq_webui.loaders.transformers.transformers_loader.placement", lambda *_: (device_map, None))
    model = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(), lambda share, text: None)
    params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=20)
    events = list(model.chat([Message("user", "Hi")], params, threading.Event()))
    assert isinstance(events[-1], Finish) and model.hf.dtype == torch.float16
    weights = [weakref.ref(parameter) for parameter in model.hf.parameters()]
    model.close()
    gc.collect()
    assert [each for each in weights if each() is not None] == []


def test_a_packed_output_layer_is_computed_dense(tmp_path, monkeypatch):
    wide = {**tiny._COMMON, "hidden_size": 128, "intermediate_size": 160, "num_key_value_heads": 2}
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", wide)
    folder = tmp_path / "model"
    twin = tiny.write(folder, "llama", shared_order=True)
    tiny.write_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    tensors, dense = tiny.random_layer(128, 288, 8, 32)
    save_file(
        state | {f"lm_head.{part}": tensor for part, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    twin.lm_head.weight.data = dense
    model = TransformersLoader().load(LocalModel.read(folder), TransformersOptions(), lambda share, text: None)
    assert model._stepper.kernel == "cuda", model.notes
    ids = torch.randint(4, 288, (1, 40)).cuda()
    with torch.no_grad():
        wanted, found = twin.to("cuda", torch.float32)(ids).logits[0].double(), model.hf(ids).logits[0].double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    model.close()
