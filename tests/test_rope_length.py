"""gptq/rope_length.py: angles that depend on the length of the text, as transformers' generate computes them."""

import threading

import pytest
import torch

pytest.importorskip("numba")

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, prompt_scores
from gptq_webui.gptq.cpu.cpu_linear import replace_layers
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.cuda.model_shape import ModelShape
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.gptq.suitability import Unsuited
from gptq_webui.gptq.transformers_stepper import TransformersStepper

BORDER = 24
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.05 * at for at in range(8)], "long_factor": [3.0 + at for at in range(8)],
    "original_max_position_embeddings": BORDER,
}  # fmt: skip
GREEDY = GenerationParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=30)
KINDS = {
    "longrope": (
        "phi3",
        {**tiny._LLAMA, "rope_scaling": LONGROPE, "original_max_position_embeddings": BORDER, "pad_token_id": 0},
    ),
    "dynamic": (
        "llama",
        {**tiny._LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": BORDER},
    ),
    "yarn": (
        "llama",
        {**tiny._LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """(kind of rope, the packed folder, its twin)."""
    kind, settings = KINDS[request.param]
    path = tmp_path_factory.mktemp("rope") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.ARCHITECTURES, kind, {**settings, "initializer_range": 0.3})
        return request.param, path, tiny.write(path, kind, seed=3)


def steppers(path):
    for name in ("step", "layers", "plain"):
        hf, _notes = checkpoint.load(LocalModel.read(path), dtype=torch.float32, device_map={"": "cpu"})
        if name == "step":
            stepper, note = stepper_for(hf, 100)
            assert isinstance(stepper, CpuStepper), note
        else:
            if name == "layers":
                replace_layers(hf, 2)
            stepper = TransformersStepper(hf)
        yield name, stepper
        stepper.close()


def ids_of(count, seed=1):
    return torch.randint(5, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(stepper, ids, prefix=None, tokens=30):
    params = GenerationParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=tokens)
    prefix = PrefixCache() if prefix is None else prefix
    events = list(generate(stepper, ids, params, threading.Event(), prefix=prefix, end_ids=(), context_tokens=100))
    return [event.id for event in events[:-1]], events[-1].cached_tokens


def wanted(twin, ids, tokens=30):
    with torch.no_grad():
        found = twin.generate(torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", [10, BORDER, 40])
def test_thirty_tokens_are_those_of_transformers_across_the_border(prompt, folder):
    kind, path, twin = folder
    ids = ids_of(prompt)
    right = wanted(fresh(twin, kind), ids)
    assert len(set(right)) > 5  # a model that repeats itself would show nothing
    for name, stepper in steppers(path):
        assert answer(stepper, ids)[0] == right, name


def fresh(twin, kind):
    """The twin without the angles of the longest text so far, which transformers keeps (`dynamic`)."""
    if kind == "dynamic":
        rotary = twin.model.rotary_emb
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq = rotary.original_inv_freq
    return twin


def test_a_prompt_has_one_set_of_angles_however_it_is_cut(folder):
    kind, path, twin = folder
    ids = ids_of(45)
    with torch.no_grad():
        whole = fresh(twin, kind)(torch.tensor([ids])).logits[0].double()
    for name, stepper in steppers(path):
        with torch.inference_mode():
            memory = stepper.begin_text(len(ids))
            for at in range(0, len(ids), 7):
                last = stepper.prefill(memory, ids[at : at + 7])[0].double()
        assert float((last - whole[-1]).norm() / whole[-1].norm()) < 3e-3, name
        scored = [each for each in prompt_scores.score(stepper, ids, 1, threading.Event()) if getattr(each, "logprob", None)]
        right = whole.log_softmax(-1)
        for at, step in enumerate(scored):
            assert abs(step.logprob - float(right[at, ids[at + 1]])) < 0.05, (name, at)


def test_kept_conversations_never_mix_two_sets(folder):
    kind, path, twin = folder
    first = ids_of(20)
    for name, stepper in steppers(path):
        prefix = PrefixCache()
        said, _cached = answer(stepper, first, prefix, 3)
        again, cached = answer(stepper, first + said, prefix, 12)  # below the border, and over it in the answer
        assert again == wanted(fresh(twin, kind), first + said, 12) and cached == 22, name
        longer = first + said + again + ids_of(6, 2)
        found, cached = answer(stepper, longer, prefix, 8)
        assert found == wanted(fresh(twin, kind), longer, 8), name
        assert (cached > 22) == (kind in ("yarn", "longrope")), name  # `dynamic` has another set for each length
        found, cached = answer(stepper, first + ids_of(2, 3), prefix, 8)  # a short one again
        assert found == wanted(fresh(twin, kind), first + ids_of(2, 3), 8), name
        assert cached == (0 if kind == "longrope" else 20), name


def test_no_graph_is_recorded_and_the_gpus_step_is_for_texts_within_the_border(folder):
    kind, path, _twin = folder
    hf, _notes = checkpoint.load(LocalModel.read(path), dtype=torch.float16, device_map={"": "cpu"})
    if kind != "yarn":
        assert "depend on the length" in GraphStepper(hf, 64, recorder=None).why
        assert parts_of(hf).length_dependent
    parts = parts_of(hf)
    for tokens in (BORDER, BORDER + 1):
        try:
            ModelShape.of(parts, tokens)
            suited = ""
        except Unsuited as error:
            suited = str(error)
        assert ("depend on the length" in suited) == (kind != "yarn" and tokens > BORDER)
