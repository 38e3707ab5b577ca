"""What a model gets on a GPU, of every causal architecture of transformers, without a GPU: only the kernels are stand-ins.

A sample runs; GPTQ_WEBUI_EVERY_ARCHITECTURE=1 runs all, in about ten minutes. See emulated_gpu.py.
"""

import pytest
import torch
from every_architecture import KINDS
from test_cuda_every_architecture import ALL, NEW, SOME_KINDS, check

pytestmark = NEW


@pytest.mark.parametrize("kind", KINDS if ALL else SOME_KINDS)
def test_every_architecture_is_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    hf, _kernel = check(kind, tmp_path, caplog, torch.float16, "emulated", act_order=False)
    assert any(".gptq.cuda." in type(each).__module__ for each in hf.modules()), "no kernel of ours runs"


@pytest.mark.parametrize("kind", KINDS if ALL else ("llama", "gpt2", "qwen3_moe", "deepseek_v3"))
def test_odd_sizes_and_orders_are_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.float16, "emulated", wide=False)


@pytest.mark.parametrize("kind", KINDS if ALL else ("llama", "gpt_oss", "qwen3_next", "deepseek_v2"))
def test_bfloat16_is_computed_on_a_gpu_but_for_its_kernels(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.bfloat16, "emulated")
