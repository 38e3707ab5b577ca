"""The compiled step is tried with a small model on this processor before a user's weights are released to it."""

import torch

from ..families.known import parts_of
from ..gptq_linear import GPTQLinear
from .cpu_step import CpuStepper


def compiles() -> None:
    """Compile, and try a model of one layer on this CPU, before weights are released. Raises if that fails."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=generator)
    for owner, name in ((model.model.layers[0].self_attn, "q_proj"), (model.model.layers[0].mlp, "down_proj")):
        dense = getattr(owner, name)
        linear = GPTQLinear(dense.in_features, dense.out_features, 4, 32, bias=False)
        for words in (linear.qweight, linear.qzeros):
            words.data.random_(-(2**31), 2**31 - 1, generator=generator)
        linear.scales.data.uniform_(0.01, 0.03, generator=generator)
        setattr(owner, name, linear)
    ids = [7, 3, 9, 30, 1, 12]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1]
        parts = parts_of(model)
        assert parts is not None
        stepper = CpuStepper(parts, 16, 1)
        memory = stepper.begin()
        stepper.prefill(memory, ids[:-1])
        found = stepper.step(memory, ids[-1])[0]
        stepper.close()
    if not float((found - wanted).norm()) < 0.01 * float(wanted.norm()):
        raise RuntimeError("the compiled step gives other numbers than PyTorch on this CPU")
