"""A recorded graph in the place of a transformers model's forward, where an architecture has no step of its own."""

import pytest
import torch
import transformers

pytest.importorskip("numba")

from every_architecture import KINDS, tiny_model
from family_variants import DENSE_IN_4
from test_patched_forward import OTHER, PROMPT, Model, generate
from test_transformers_stepper import graph

from gptq_webui.gptq.prefix_cache import PrefixCache

OTHERS = ["gemma2", "gpt_neox", "falcon", "mixtral", "bloom", "gpt2", "qwen3_moe", "cohere", "phi"]


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_model_is_generated_by_its_graph(kind):
    if transformers.__version__ < "5" and kind in DENSE_IN_4:
        pytest.skip("transformers 4 keeps such experts dense")
    model = Model(kind, kernel="graph")
    model.same()
    model.same(repetition_penalty=1.2)
    torch.manual_seed(3)
    found = generate(model.hf, PROMPT, 20, do_sample=True, top_k=30)
    torch.manual_seed(3)
    assert found.tolist() == generate(model.twin, PROMPT, 20, do_sample=True, top_k=30).tolist() and not model.own_calls
    model.same(PROMPT.expand(2, -1), own_calls=None)  # two rows: by its own forward
    model.same(OTHER, num_beams=2, own_calls=None)
    model.same()
    assert not model.stepper.why
    model.stepper.close()


@pytest.mark.parametrize("kind", [each for each in ("qwen3_next", "falcon_h1", "mamba") if each in KINDS])
def test_a_model_with_states_keeps_its_own_forward(kind):
    if transformers.__version__ < "5":
        pytest.skip("of classes of their own before")
    model = tiny_model(kind)
    stepper, before = graph(model), model.forward
    stepper.take_over(model, PrefixCache())
    assert model.forward == before
    stepper.close()


def test_closing_gives_the_model_its_forward_back_and_leaves_no_patch():
    model = Model("gemma2", kernel="graph")
    model.same(count=6)
    model.stepper.close()
    assert model.hf.forward == model.own.__self__.forward and "forward" not in vars(model.hf)
    assert generate(model.hf, PROMPT, 6).tolist() == generate(model.twin, PROMPT, 6).tolist()


def test_answers_of_the_page_and_of_generate_share_what_they_have_read():
    model = Model("gemma2", kernel="graph")
    found = generate(model.hf, PROMPT, 10)
    ids = found[0].tolist()
    memory, length = model.prefix.take([*ids, 70])
    assert memory is not None and length >= len(ids) - 2
    with torch.inference_mode():
        logits = model.stepper.prefill(memory, [*ids, 70][length:])
    wanted = model.expected(torch.tensor([[*ids, 70]]))[0, -1]
    assert float((logits[0] - wanted).norm() / wanted.norm()) < 1e-3
    model.stepper.close()
