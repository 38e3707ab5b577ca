"""What a model gets on a GPU, of every causal architecture of transformers, without a GPU: only the kernels are stand-ins.

A sample runs; GPTQ_WEBUI_EVERY_ARCHITECTURE=1 runs all, in about ten minutes. See emulated_gpu.py.
"""

import emulated_gpu
import pytest
import torch
import transformers
from every_architecture import KINDS, tiny_model
from packaging import version
from test_cuda_every_architecture import ALL, NEW, SOME_KINDS, check

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq import stepper_choice
from gptq_webui.gptq.gptq_linear import GPTQLinear

pytestmark = NEW
TABLE_OF = version.parse("5.24")  # of transformers; earlier ones ask more often for what a recording cannot give
# No graph is made of these: their own forward waits for the GPU, or their cache is of another kind.
NOT_RECORDED = {
    "openai-gpt",
}  # fmt: skip


def test_a_model_whose_own_forward_fails_is_refused_in_words_on_a_gpu_too(monkeypatch):
    hf = tiny_model("llama", wide=True).half()
    rows, layer = hf.model.layers[0].mlp.down_proj.weight.shape, GPTQLinear(384, 256, 4, 32, bias=False)
    assert rows == (256, 384)
    tensors, _dense = tiny.random_layer(384, 256, 4, 32)
    layer.load_state_dict(tensors)
    hf.model.layers[0].mlp.down_proj = layer
    monkeypatch.setattr(type(hf.model), "forward", lambda *_, **__: None.shape)
    emulated_gpu.emulate(monkeypatch)
    with pytest.raises(BadCheckpoint, match="transformers cannot compute this model"):
        stepper_choice.stepper_for(hf, 128)


EVERY = tuple(kind for kind in KINDS if kind != "kolibri1")  # asks for a product that torch has on GPUs alone


@pytest.mark.parametrize("kind", EVERY if ALL else SOME_KINDS)
def test_every_architecture_is_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    hf, kernel = check(kind, tmp_path, caplog, torch.float16, "emulated", act_order=False)
    if version.parse(transformers.__version__) >= TABLE_OF:
        assert kernel == ("transformers" if kind in NOT_RECORDED else "graph")
    assert any(".gptq.cuda." in type(each).__module__ for each in hf.modules()), "no kernel of ours runs"


@pytest.mark.parametrize("kind", EVERY if ALL else ("llama", "gpt2", "qwen3_moe", "deepseek_v3"))
def test_odd_sizes_and_orders_are_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.float16, "emulated", wide=False)


@pytest.mark.parametrize("kind", EVERY if ALL else ("llama", "gpt_oss", "qwen3_next", "deepseek_v2"))
def test_bfloat16_is_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.bfloat16, "emulated")
