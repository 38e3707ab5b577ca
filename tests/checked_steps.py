"""Logits of a loaded model against those of an independent computation: a prompt, then single steps."""

import torch

from gptq_webui.gptq.cpu import numba_compiler
from gptq_webui.gptq.stepper_choice import stepper_for

IDS = torch.randint(5, 260, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT = 24


def off(found, wanted):
    """The largest distance of a row, relative to its length."""
    found = found.detach()
    return float(((found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)).max())


@torch.inference_mode()
def require_logits(hf, wanted):
    """`wanted` [40, V], of IDS, within 1e-3: by its own forward, and by its stepper, compiled where that can be."""
    assert off(hf(torch.tensor([IDS])).logits[0], wanted) < 1e-3
    stepper, _note = stepper_for(hf, 128)
    if numba_compiler.available():
        assert stepper.kernel == "cpu"
    memory = stepper.begin()
    assert off(stepper.prefill(memory, IDS[:PROMPT]), wanted[PROMPT - 1 : PROMPT]) < 1e-3
    for at in range(PROMPT, len(IDS)):
        assert off(stepper.step(memory, IDS[at]), wanted[at : at + 1]) < 1e-3, f"token {at}"
    stepper.close()
