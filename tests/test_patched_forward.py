"""gptq/patched_forward.py on the processor: transformers' generate and forward give what they gave layer by layer."""

import copy

import pytest
import torch
import transformers

pytest.importorskip("numba")

from family_variants import DENSE_IN_4
from test_families import off, packed
from test_transformers_stepper import Replay
from transformers import LogitsProcessor, LogitsProcessorList

from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.gptq.transformers_memory import cache_name

PROMPT = torch.tensor([[0, 50, 51, 52, 60, 61, 50, 51, 52, 60, 61, 50, 51]])
OTHER = torch.tensor([[0, 70, 71, 72, 73]])
CACHE = cache_name()
EXACT = 1e-3


class Model:
    """A tiny model with the compiled step in the place of its forward, its twin, and how often its own forward ran."""

    def __init__(self, kind="llama", changes=None, context_tokens=250, kernel="cpu"):
        self.hf, self.twin = packed(kind, changes)
        for each in (self.hf, self.twin):
            each.generation_config.eos_token_id = each.generation_config.pad_token_id = None
        if kernel == "cpu":
            self.stepper, _note = stepper_for(self.hf, context_tokens)
        else:
            self.stepper = GraphStepper(self.hf, context_tokens, Replay())
            self.stepper.trial()
        assert self.stepper.kernel == kernel
        self.own = self.hf.forward
        self.prefix = PrefixCache()
        self.stepper.take_over(self.hf, self.prefix)
        self.own_calls = 0
        patch = self.stepper._patch
        before = patch._original

        def counted(**given):
            self.own_calls += 1
            return before(**given)

        patch._original = counted

    def same(self, ids=PROMPT, count=24, own_calls=0, **settings):
        """generate gives the twin's tokens; how many of its forwards were the model's own is as expected (None: any)."""
        self.own_calls = 0
        found = generate(self.hf, ids, count, **copy.copy(settings))
        assert found.tolist() == generate(self.twin, ids, count, **settings).tolist()
        assert own_calls is None or self.own_calls == own_calls
        return found

    def logits(self, ids, cache=None, **more):
        with torch.no_grad():
            return self.hf(input_ids=ids, **{CACHE: cache}, **more)

    def expected(self, ids):
        with torch.no_grad():
            return self.twin(input_ids=ids).logits


def generate(hf, ids, count, **settings):
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": [287], **settings}
    return hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)


@pytest.fixture(scope="module", params=["cpu", "graph"])
def model(request):
    model = Model(kernel=request.param)
    yield model
    model.stepper.close()


class Ban(LogitsProcessor):
    """Of the caller: the best id is never taken."""

    def __repr__(self):  # the same in every process: test names are made of it
        return "Ban()"

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, scores.argmax(-1), -float("inf"))


@pytest.mark.parametrize("settings", [
    {},
    {"use_cache": False},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"logits_processor": LogitsProcessorList([Ban()])},
    {"prompt_lookup_num_tokens": 3},
    {"prompt_lookup_num_tokens": 30, "max_matching_ngram_size": 1},
    {"prompt_lookup_num_tokens": 5, "repetition_penalty": 1.2},
    {"prefill_chunk_size": 4},
], ids=str)  # fmt: skip
def test_generate_gives_the_same_tokens_by_the_step(model, settings):
    found = []
    for hf in (model.hf, model.twin):
        torch.manual_seed(5)
        model.own_calls = 0
        found.append(generate(hf, PROMPT, 40, **copy.copy(settings)).tolist())
        assert model.own_calls == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [
    {"num_beams": 3},
    {"num_return_sequences": 2, "do_sample": True},
    {"guidance_scale": 1.5, "negative_prompt_ids": OTHER},
    {"cache_implementation": "static"},
], ids=str)  # fmt: skip
def test_what_the_step_cannot_compute_is_computed_by_the_models_own_forward(model, settings):
    found = []
    for hf in (model.hf, model.twin):
        torch.manual_seed(5)
        found.append(generate(hf, PROMPT, 16, **copy.copy(settings)).tolist())
    assert found[0] == found[1]


def test_rows_with_padding_are_computed_by_the_models_own_forward(model):
    ids = torch.cat([PROMPT, torch.cat([torch.zeros(1, 8, dtype=torch.long), OTHER], 1)])
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = [hf.generate(ids, attention_mask=mask, **settings).tolist() for hf in (model.hf, model.twin)]
    assert found[0] == found[1] and model.own_calls > 0
    one = [hf.generate(ids[1:], attention_mask=mask[1:], **settings).tolist() for hf in (model.hf, model.twin)]
    assert one[0] == one[1]


def test_hidden_states_attentions_and_scores_come_as_before(model):
    with torch.no_grad():
        found, wanted = (hf(input_ids=PROMPT, output_hidden_states=True) for hf in (model.hf, model.twin))
    assert len(found.hidden_states) == len(wanted.hidden_states)
    assert off(found.hidden_states[-1][0], wanted.hidden_states[-1][0]) < EXACT
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, wanted = (generate(hf, PROMPT, 6, **settings) for hf in (model.hf, model.twin))
    assert found.sequences.tolist() == wanted.sequences.tolist()
    assert off(torch.cat(found.scores), torch.cat(wanted.scores)) < EXACT
    assert getattr(found, "past_key_values", None) is not None or getattr(found, "cache", None) is not None


def test_labels_embeddings_and_own_positions_are_computed_as_before(model):
    with torch.no_grad():
        loss, wanted = (hf(input_ids=PROMPT, labels=PROMPT).loss for hf in (model.hf, model.twin))
        assert abs(float(loss - wanted)) < EXACT * float(wanted)
        embeds = model.twin.get_input_embeddings()(PROMPT)
        assert off(model.hf(inputs_embeds=embeds).logits[0], model.expected(PROMPT)[0]) < EXACT
        positions = torch.arange(5, 18)[None]
        found, wanted = (hf(input_ids=PROMPT, position_ids=positions).logits[0] for hf in (model.hf, model.twin))
        assert off(found, wanted) < EXACT
        mask = torch.full((1, 1, 13, 13), -1e9).triu(1)
        mask[..., 3:5] = -1e9
        found, wanted = (hf(input_ids=PROMPT, attention_mask=mask).logits[0, 5:] for hf in (model.hf, model.twin))
        assert off(found, wanted) < EXACT
        assert isinstance(model.hf(PROMPT, return_dict=False), tuple)


@pytest.mark.parametrize("keep", [0, 1, 3, 13, torch.tensor([2, 7]), torch.tensor([12])], ids=str)
def test_logits_of_the_positions_that_are_wanted(model, keep):
    model.own_calls = 0
    found = model.logits(PROMPT, logits_to_keep=keep).logits
    wanted = model.expected(PROMPT)
    wanted = wanted[:, keep] if isinstance(keep, torch.Tensor) else wanted[:, -keep:] if keep else wanted
    assert found.shape == wanted.shape and off(found[0], wanted[0]) < EXACT and model.own_calls == 0


def test_logits_of_a_long_text(model):
    ids = torch.randint(5, 260, (1, 200), generator=torch.Generator().manual_seed(3))
    assert off(model.logits(ids).logits[0], model.expected(ids)[0]) < EXACT
    assert off(model.logits(ids, logits_to_keep=40).logits[0], model.expected(ids)[0, -40:]) < EXACT


def test_a_text_beyond_the_context_that_the_step_is_made_for():
    model = Model(context_tokens=32)
    model.same(count=60, own_calls=None)
    assert model.own_calls > 0
    model.stepper.close()


def test_hooks_and_replaced_layers_are_computed_and_so_is_training():
    model = Model()
    seen = []
    hook = model.hf.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    model.same(count=4, own_calls=4)
    hook.remove()
    assert len(seen) == 4
    model.same(count=4)

    class Louder(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    for hf in (model.hf, model.twin):
        hf.model.layers[0].mlp.down_proj = Louder(hf.model.layers[0].mlp.down_proj)
    model.same(count=4, own_calls=4)
    for hf in (model.hf, model.twin):
        hf.model.layers[0].mlp.down_proj = hf.model.layers[0].mlp.down_proj.inner
    model.same(count=4)
    model.hf.train()
    assert model.hf(input_ids=PROMPT).logits.requires_grad
    model.stepper.close()


def test_closing_leaves_the_models_own_forward():
    model = Model()
    model.stepper.close()
    assert "forward" not in vars(model.hf) and "generate" not in vars(model.hf)


def test_between_tokens_torch_computes_with_one_thread_and_later_as_before(model):
    if model.stepper.kernel != "cpu":
        pytest.skip("its torch computes, with all threads")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(torch.get_num_threads())
            return scores

    try:
        generate(model.hf, PROMPT, 3, logits_processor=LogitsProcessorList([Look()]))
        assert seen == [1, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "changes"), [
    ("gemma3_text", {}), ("gpt2", {}), ("bloom", {}), ("mistral", {"sliding_window": 8}), ("qwen3_moe", {}), ("cohere2", {}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}), ("phi3", {}), ("opt", {}),
    ("gpt_oss", {}), ("deepseek_v2", {"q_lora_rank": None}), ("deepseek_v3", {}), ("llama4_text", {}),
])  # fmt: skip
def test_every_kind_of_model_is_generated_by_the_step(kind, changes):
    if transformers.__version__ < "5" and kind in DENSE_IN_4:
        pytest.skip("transformers 4 keeps such experts dense")
    model = Model(kind, changes)
    model.same(own_calls=0)
    model.same(own_calls=0, repetition_penalty=1.3)
    if transformers.__version__ >= "5" or kind == "gpt2":  # before, a sliding window's cache could not be cut
        model.same(own_calls=0, prompt_lookup_num_tokens=4)
    model.stepper.close()
