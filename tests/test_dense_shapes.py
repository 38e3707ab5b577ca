"""gptq/packed_quantizer.py: dense tensors beside packed layers have the shapes that config.json asks for."""

import pytest
import torch

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, packed_quantizer


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_dense_tensor_of_another_shape_is_a_sentence_whatever_transformers_compares(tiny_gptq, name, monkeypatch):
    """transformers 5.17 takes it where a quantizer is at work."""
    after = packed_quantizer.PackedQuantizer._process_model_after_weight_loading

    def shortened(self, model, **given):
        module = model.get_submodule(name)
        module.weight = torch.nn.Parameter(module.weight[:-1], requires_grad=False)
        return after(self, model, **given)

    monkeypatch.setattr(packed_quantizer.PackedQuantizer, "_process_model_after_weight_loading", shortened)
    with pytest.raises(BadCheckpoint, match=r"weight is \[287, 64\] in the files, and config.json asks for \[288, 64\]"):
        checkpoint.load(LocalModel.read(tiny_gptq), dtype=torch.float32, device_map="cpu")
