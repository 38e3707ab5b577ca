"""The GPU's step in our own answers and in the place of a transformers model's forward. Skipped without a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  (registers the classes that tiny makes)

import tiny
from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda.answer_rows import prepare_row
from gptq_webui.gptq.cuda.kernel_arguments import SAMPLE_PARAMS
from gptq_webui.gptq.cuda.sample import packed_params, sample
from gptq_webui.gptq.cuda.sequences import Sequences
from gptq_webui.gptq.sampling import Sampler
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

WIDE = {**tiny._COMMON, "hidden_size": 128, "intermediate_size": 160, "num_key_value_heads": 2}
KINDS = {
    "llama": WIDE,
    "mistral": {**WIDE, "sliding_window": 20},
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 64},
    "phi3": {**WIDE, "pad_token_id": 0},
}
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=24)


def load(folder, kind, monkeypatch, options=None, **how):
    monkeypatch.setitem(tiny.ARCHITECTURES, kind, KINDS[kind])
    twin = tiny.write(folder / "model", kind, **{"shared_order": True, **how})
    tiny.write_tokenizer(folder / "model")
    model = TransformersLoader().load(
        LocalModel.read(folder / "model"), options or TransformersOptions(), lambda share, text: None
    )
    return model, twin.to("cuda", torch.float32)


def answer(model, ids, params=GREEDY):
    events = list(model.generate(ids, params, threading.Event()))
    assert isinstance(events[-1], Finish)
    return [each.id for each in events if isinstance(each, Step)], events[-1], [each for each in events if isinstance(each, Step)]


def set_seed(sequences, seed):
    """Of row 0, without the rest of its parameters."""
    sequences.params.view(torch.int32)[0, SAMPLE_PARAMS.offset("seed_low") // 4] = seed


@pytest.fixture
def llama(tmp_path, monkeypatch):
    model, twin = load(tmp_path, "llama", monkeypatch)
    yield model, twin
    model.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_equal_the_dense_twin_and_greedy_text_its_argmax(kind, bits, tmp_path, monkeypatch):
    model, twin = load(tmp_path, kind, monkeypatch, bits=bits, sym=False)
    assert model._stepper.kernel == "cuda", model.notes
    ids = torch.randint(4, 288, (1, 40)).tolist()[0]
    with torch.no_grad():
        wanted = twin(torch.tensor([ids], device="cuda")).logits[0].double()
        found = model.hf(torch.tensor([ids], device="cuda")).logits[0].double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    model._end_ids = set()
    host_tokens, _finish, _steps = answer(model, ids)
    with torch.no_grad():
        logits = twin(torch.tensor([ids + host_tokens], device="cuda")).logits[0]
    for at, id in enumerate(host_tokens):
        row = logits[len(ids) + at - 1]
        assert float(row.max() - row[id]) < 0.05 * float(row.std()), at
    model.close()


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "gpt2", "falcon", "phi", "mixtral", "llama"])
def test_other_models_are_computed_layer_by_layer(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, kind, tiny.ARCHITECTURES[kind])
    model, twin = load(tmp_path, kind, monkeypatch, shared_order=False, bits=4)
    assert model._stepper.kernel in ("graph", "transformers") and any("layer by layer" in each for each in model.notes)
    assert any(type(each).__name__ == "CudaLinear" for each in model.hf.modules())
    ids = torch.randint(4, 288, (1, 30), device="cuda")
    with torch.no_grad():
        wanted = twin(ids).logits.double()
        found = model.hf(ids).logits.double()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2
        found = model.hf(ids[:, :1]).logits.double()
        wanted = twin(ids[:, :1]).logits.double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    assert len(answer(model, ids[0].tolist())[0]) > 0
    model.close()


def test_a_turn_computes_what_is_new_and_says_the_same(llama):
    model, _twin = llama
    model._end_ids = set()
    ids = torch.randint(4, 288, (1, 100)).tolist()[0]
    first, finish, _ = answer(model, ids)
    assert finish.cached_tokens == 0
    again, finish, _ = answer(model, ids)
    assert again == first and finish.cached_tokens == 99
    longer = ids + first + [7, 8, 9]
    cached, finish, _ = answer(model, longer)
    assert finish.cached_tokens >= len(ids) + len(first) - 1
    model._prefix.clear()
    fresh, finish, _ = answer(model, longer)
    assert finish.cached_tokens == 0 and fresh == cached


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llama):
    model, _twin = llama
    model._end_ids = set()
    ids = [5, 6, 7, 8]
    runs = [answer(model, ids, GenerationParams(seed=3, temperature=1.5, max_new_tokens=40))[0] for _ in range(20)]
    assert all(each == runs[0] for each in runs)
    assert answer(model, ids, GenerationParams(seed=4, temperature=1.5, max_new_tokens=40))[0] != runs[0]


@pytest.mark.parametrize(
    "values",
    [
        {}, {"top_k": 7, "top_p": 1}, {"top_p": 0.6, "top_k": 0}, {"min_p": 0.2, "top_k": 0, "top_p": 1}, {"typical_p": 0.5},
        {"top_n_sigma": 1.0, "top_k": 0, "top_p": 1}, {"top_n_sigma": 1.0, "top_k": 0, "top_p": 0.6}, {"top_n_sigma": 0.5},
        {"typical_p": 0.5, "top_k": 0, "top_p": 1}, {"top_k": 0, "top_p": 1}, {"repetition_penalty": 1.8},
        {"top_k": 3, "min_p": 0.3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"logit_bias": {9: 5.0, 10: -50.0}},
        {"top_p": 0.5, "min_p": 0.1, "top_k": 0},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_are_sampled_from_the_distribution_of_the_plain_sampler(llama, values):
    model, _twin = llama
    step = model._stepper._step
    sequences = step.sequences
    ids = [5, 6, 7, 8, 5, 5]
    params = GenerationParams(temperature=0.8, **{"repetition_penalty": 1.0, **values})
    generator = torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(1, 288, generator=generator, device="cuda") * 2
    with torch.inference_mode():
        sampler = Sampler(params, step.device, prompt_tokens=len(ids))
        kept, names = sampler._filtered(sampler._changed(logits.float(), torch.tensor([ids], device="cuda")))
        wanted = torch.zeros(288, device="cuda")
        wanted[names[0] if names is not None else slice(None)] = kept.softmax(-1)[0]
        count = torch.zeros(288, device="cuda")
        draws = 4000
        for seed in range(draws):
            if seed == 0:
                prepare_row(sequences, 0, ids, params)
                seen, answered = sequences.seen.clone(), sequences.answered.clone()
            sequences.logits.copy_(logits)
            sequences.seen.copy_(seen), sequences.answered.copy_(answered)
            sequences.positions.fill_(len(ids) - 1)
            set_seed(sequences, seed)
            sample(step.gpu, sequences)
            count[sequences.ids[:1].long()] += 1
    assert bool((count[wanted == 0] == 0).all()), "a token was sampled that a filter drops"
    expected = wanted * draws
    likely = expected >= 5
    chi2 = float(((count - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(1, freedom)) ** 0.5, (chi2, freedom)


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.9, "top_k": 0},
        {"typical_p": 0.9, "top_k": 0, "top_p": 1},
        {"top_k": 1000, "top_p": 1},
        {"top_n_sigma": 2.0, "top_k": 0, "top_p": 0.9},
    ],
)
def test_a_large_and_flat_vocabulary_is_filtered_right(llama, values):
    """More candidates than the short list holds: the bisection over all of them."""
    model, _twin = llama
    step = model._stepper._step
    n = 50000
    params = GenerationParams(temperature=1, repetition_penalty=1.0, **values)
    logits = torch.randn(1, n, device="cuda", generator=torch.Generator("cuda").manual_seed(2)) * 0.5
    with torch.inference_mode():
        sampler = Sampler(params, step.device)
        kept, names = sampler._filtered(logits.clone())
        wanted = torch.zeros(n, device="cuda")
        wanted[names[0] if names is not None else slice(None)] = kept.softmax(-1)[0]
        sequences = Sequences(step.device, replace(step.shape, vocabulary=n, embedding_rows=n), 1)
        sequences.set_params(0, packed_params(params, 0))
        sequences.set_history(0, torch.tensor([1], device="cuda"), 0)
        sequences.logits.copy_(logits)
        hits = 0
        for seed in range(300):
            sequences.positions.fill_(0)
            set_seed(sequences, seed)
            sample(step.gpu, sequences)
            hits += bool(wanted[int(sequences.ids[0])] > 0)
    assert hits >= 299  # one token may be on the edge


def test_log_probabilities_are_those_of_the_model(llama):
    model, twin = llama
    model._end_ids = set()
    ids = [5, 6, 7, 8]
    host_tokens, _finish, steps = answer(
        model, ids, GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=5, logprobs=3)
    )
    with torch.no_grad():
        wanted = twin(torch.tensor([ids + host_tokens], device="cuda")).logits[0].log_softmax(-1)
    for at, step in enumerate(steps):
        row = wanted[len(ids) + at - 1]
        assert abs(step.logprob - float(row[step.id])) < 0.02
        assert step.top[0][0] == step.id and len(step.top) == 3


def test_transformers_generate_runs_on_the_step(llama):
    model, _twin = llama
    model._end_ids = set()
    ids = torch.randint(4, 288, (1, 30), device="cuda")
    ours = answer(model, ids[0].tolist())[0]
    for _ in range(2):
        theirs = model.hf.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert theirs[0, 30:].tolist() == ours
    guessed = model.hf.generate(
        ids,
        max_new_tokens=24,
        do_sample=False,
        prompt_lookup_num_tokens=3,
        max_matching_ngram_size=1,
        eos_token_id=[1],
        pad_token_id=0,
    )
    assert guessed[0, 30:].tolist() == ours[: guessed.shape[1] - 30]
    sampled = model.hf.generate(
        ids, max_new_tokens=24, do_sample=True, top_k=5, repetition_penalty=1.2, eos_token_id=None, pad_token_id=0
    )
    assert sampled.shape == (1, 54)
    scores = model.hf.generate(
        ids,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert [int(each.argmax()) for each in scores.logits] == ours[:3]


def test_an_answer_ends_within_one_token_of_cancel_and_the_next_one_is_right(llama):
    model, _twin = llama
    model._end_ids = set()
    ids = torch.randint(4, 288, (1, 20)).tolist()[0]
    wanted = answer(model, ids)[0]
    cancel = threading.Event()
    seen = []
    for event in model.generate(ids, GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=200), cancel):
        if isinstance(event, Step):
            seen.append(event.id)
            if len(seen) == 5:
                cancel.set()
        else:
            assert event.reason == "cancelled"
    assert answer(model, ids)[0] == wanted


def test_the_context_is_filled_to_its_end_and_no_further(llama):
    model, _twin = llama
    model._end_ids = set()
    ids = torch.randint(4, 288, (1, model.context_tokens - 5)).tolist()[0]
    host_tokens, finish, _ = answer(model, ids, GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=100))
    assert len(host_tokens) == 5 and finish.reason == "length"


def test_closing_gives_the_memory_back(tmp_path, monkeypatch):
    import gc

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, twin = load(tmp_path, "llama", monkeypatch)
    del twin
    answer(model, [5, 6, 7])
    model.close()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 1 << 20
