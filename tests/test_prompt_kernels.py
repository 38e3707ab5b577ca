"""TransformersStepper.use: kernels of prompts are tried before a conversation depends on them."""

import contextlib

import pytest
import torch
from every_architecture import tiny_model

from gptq_webui.gptq.cuda.nvrtc import NoCompiler
from gptq_webui.gptq.transformers_stepper import TransformersStepper

IDS = list(range(4, 40))


class Kernels:
    """Of prompts; those of `wrong` forward double the logits, or are not there."""

    def __init__(self, model, wrong, missing=False):
        self.model, self.wrong, self.missing, self.forwards, self.closed = model, wrong, missing, 0, False

    @contextlib.contextmanager
    def reading(self):
        self.forwards += 1
        if self.missing:
            raise NoCompiler("there is no compiler")
        factor = 1 + (self.forwards == self.wrong)
        self.model.lm_head.weight.data *= factor
        yield
        self.model.lm_head.weight.data /= factor

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("given", "used"),
    [({"wrong": 0}, True), ({"wrong": 1}, False), ({"wrong": 3}, False), ({"wrong": 0, "missing": True}, False)], ids=str
)  # fmt: skip
def test_kernels_of_prompts_are_used_if_a_prompt_and_a_later_piece_are_right_with_them(given, used):
    """The third forward of the trial is of a later piece, which sees what its mask says."""
    model = tiny_model("mistral")
    stepper, kernels = TransformersStepper(model), Kernels(model, **given)
    stepper.use(kernels)
    with torch.inference_mode():
        stepper.prefill(stepper.begin(), IDS)
    assert (kernels.forwards == 4) is used and kernels.closed is not used
