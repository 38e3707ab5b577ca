"""Several rows at once on a GPU: products, short prompts, and the answers of several conversations. Skipped without a GPU."""

import threading
from dataclasses import replace

import pytest
import torch
from test_cuda_step import SMALL, error, random_models
from test_cuda_stepper import load

from gptq_webui.core.chat import Step
from gptq_webui.core.errors import AnswerFailed
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda import small_batch, wide_batch
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_arguments import PAGE_TOKENS
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.sampling import Sampler
from gptq_webui.loaders.transformers.transformers_loader import TransformersOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_small_batches_are_multiplied_right_in_every_layout(gpu, bits, group_size, act_order, sym):
    torch.manual_seed(bits * 1000 + group_size)
    k, n = 736, 416  # k no multiple of 64
    rows = torch.randperm(k, device="cuda") if act_order else None
    layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=rows, bias=True)
    wanted = layer.dequantize(torch.float64)
    packing = packing_of([layer])
    gpu.add(small_batch.every_variant(gpu, [(packing, each) for each in ("PLAIN", "RESIDUAL", "SILU")]), [packing])
    weight = repack(gpu, [layer], packing)
    x = torch.randn(259, k, device="cuda").half()
    staged = torch.zeros(259, weight.padded, dtype=torch.float16, device="cuda")
    staged[:, weight.permutation.long()] = x
    right = x.double() @ wanted.T + layer.bias.double()  # [T, N]
    pairs = right.view(259, n // 16, 2, 8)
    gates = (torch.nn.functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(259, n // 2)
    for count in (1, 2, 7, 8, 9, 16, 17, 33, 64, 96, 128, 130, 259):

        def run(epilogue, out, count=count):
            guarded = torch.full((count + 1, out.shape[1]), torch.nan, dtype=out.dtype, device="cuda")
            guarded[:count] = out
            multiply = wide_batch.multiply if count == 17 else small_batch.multiply  # which leaves it more rows of small weights
            multiply(gpu, weight, epilogue, staged[:count].contiguous(), guarded[:count])
            assert bool(guarded[count].isnan().all()), "a row too many was written"
            return guarded[:count]

        nan = torch.full((count, n), torch.nan, dtype=torch.float16, device="cuda")
        assert error(run("PLAIN", nan), right[:count]) < 2e-3, count
        assert error(run("SILU", nan[:, : n // 2]), gates[:count]) < 4e-3, count
        before = torch.randn(count, n, device="cuda")
        added = run("RESIDUAL", before)
        assert error(added - before, right[:count]) < 2e-3, count
        assert torch.equal(added, run("RESIDUAL", before)), "the same input gives the same bits"


@pytest.mark.parametrize(
    "change",
    [{}, {"bits": 8}, {"sym": False, "group_size": 32}, {"window": 40}, {"head_dim": 128, "heads": 8}, {"bias": True}],
    ids=str,
)
def test_short_prompts_and_rows_give_the_logits_of_plain_pytorch(gpu, change):
    torch.manual_seed(2)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    lengths = [5, 70, 100, 33, 64, 17, 2, 90, 128]
    with torch.inference_mode():
        texts = [torch.randint(0, SMALL["vocabulary"], (each + 6,)).tolist() for each in lengths]
        wanted = [random_models.plain_logits(parts, each) for each in texts]
        step = CudaStep(parts, 256, parallel=len(lengths), gpu=gpu)
        memories = [PagedMemory(step.pages) for _ in lengths]
        for row, (text, length, memory) in enumerate(zip(texts, lengths, memories, strict=True)):
            for start in range(0, length, 30):  # short ones, after the first on top of others
                end = min(length, start + 30)
                step.sequences.use(memory, end, step.sequences.prompt_row)
                step.prefill(text[start:end], start, step.sequences.prompt_row)
                assert error(step.prompt_logits[0], wanted[row][end - 1]) < 1e-2, (row, end)
            step.sequences.use(memory, length + 6, row)
        for at in range(6):
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
                step.sequences.ids[row], step.sequences.positions[row] = text[length + at], length + at
            step.batch.forward(len(lengths), short=at % 2 == 0)
            for row, length in enumerate(lengths):
                assert error(step.sequences.logits[row], wanted[row][length + at]) < 1e-2, (row, at)


@pytest.mark.parametrize("change", [{}, {"window": 40}], ids=str)
def test_prompts_that_are_read_together_give_the_logits_of_each_alone(gpu, change):
    torch.manual_seed(3)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    lengths = [5, 200, 64, 130, 33]
    with torch.inference_mode():
        texts = [torch.randint(0, SMALL["vocabulary"], (each,)).tolist() for each in lengths]
        wanted = [random_models.plain_logits(parts, each) for each in texts]
        step = CudaStep(parts, 256, gpu=gpu)
        memories = [PagedMemory(step.pages) for _ in lengths]
        halves = [(0, each // 2) for each in lengths], [(each // 2, each) for each in lengths]
        for part in halves:
            for memory, (_start, end) in zip(memories, part, strict=True):
                memory.reserve(end)
            pieces = [(memory, text[start:end]) for memory, text, (start, end) in zip(memories, texts, part, strict=True)]
            found = step.prefill_several(pieces, [True, True, False, True, True])
            for at, (memory, (_start, end)) in enumerate(zip(memories, part, strict=True)):
                memory.length = end
                logits = found[at]
                assert logits is None if at == 2 else error(logits[0], wanted[at][end - 1]) < 1e-2, (at, end)


# --- answers ------------------------------------------------------------------------------------------------------------

GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
SAMPLED = GenerationParams(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=7, max_new_tokens=40)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A loaded model whose step computes several answers at once."""
    model, twin = load(tmp_path, "llama", monkeypatch, TransformersOptions())
    assert model.parallel == 256
    model._end_ids, model.template = set(), replace(model.template, stop_ids=())
    yield model, twin
    model.close()


def ids_of(events):
    return [each.id for each in events if isinstance(each, Step)]


def solo(model, prompt, params):
    model._prefix.clear()
    return ids_of(model.generate(prompt, params, threading.Event()))


def first_doubt(twin, prompt, host_tokens, params):
    """The first position at which the best two logits, after penalties, differ by less than 0.05; there rounding may decide."""
    ids = torch.tensor([prompt + host_tokens], device="cuda")
    changed = Sampler(params, ids.device, len(prompt))._changed
    with torch.no_grad():
        logits = twin(ids).logits[0, len(prompt) - 1 :].float()
    scores = [changed(each[None], ids[:, : len(prompt) + at]) for at, each in enumerate(logits)]
    best = torch.cat(scores).topk(2).values
    near = ((best[:, 0] - best[:, 1]) < 0.05).nonzero()
    return int(near[0]) if len(near) else len(host_tokens)


@pytest.mark.parametrize("count", [2, 3, 5, 9, 16, 40])
def test_an_answer_is_the_same_beside_others_as_alone(shared, count):
    model, twin = shared
    torch.manual_seed(count)
    prompts = [torch.randint(4, 288, (7 + 11 * at % 180,)).tolist() for at in range(count)]
    asked = [GREEDY if at % 3 else replace(GREEDY, max_new_tokens=15 + at) for at in range(count)]
    alone = [solo(model, prompt, params) for prompt, params in zip(prompts, asked, strict=True)]
    model._prefix.clear()
    together = [model.generate(prompt, params, threading.Event()) for prompt, params in zip(prompts, asked, strict=True)]
    for prompt, mine, stream, params in zip(prompts, alone, together, asked, strict=True):
        host_tokens = ids_of(stream)
        assert len(host_tokens) == len(mine) == min(params.max_new_tokens, model.context_tokens - len(prompt))
        sure = first_doubt(twin, prompt, mine, params)
        assert host_tokens[:sure] == mine[:sure]


def test_twenty_runs_of_a_seed_are_equal_beside_others(shared):
    model, _twin = shared
    prompt, other = [5, 6, 7, 8], [9] * 30
    runs = []
    for _ in range(20):
        model._prefix.clear()
        streams = [model.generate(each, SAMPLED, threading.Event()) for each in (prompt, other, other[:7])]
        runs.append([ids_of(each) for each in streams])
    assert all(each == runs[0] for each in runs)


def test_answers_come_and_go_in_the_middle_of_others(shared):
    model, twin = shared
    prompts = [torch.randint(4, 288, (20 + at,)).tolist() for at in range(6)]
    alone = [solo(model, each, GREEDY) for each in prompts]
    model._prefix.clear()
    flags = [threading.Event() for _ in prompts]
    asked = [GREEDY, replace(GREEDY, max_new_tokens=model.context_tokens), *[GREEDY] * 4]  # the second is not over by itself
    streams = [model.generate(*each, flag) for *each, flag in zip(prompts, asked, flags, strict=True)]
    host_tokens = [[] for _ in prompts]
    for at in range(4):
        host_tokens[0].append(next(streams[0]).id)
        if at == 2:
            flags[1].set()
            streams[2].close()
    for row in (3, 4, 5, 0):
        host_tokens[row] += ids_of(streams[row])
        sure = first_doubt(twin, prompts[row], alone[row], GREEDY)
        assert host_tokens[row][:sure] == alone[row][:sure], row
    assert list(streams[1])[-1].reason == "cancelled"
    again = solo(model, prompts[1], GREEDY)  # nothing is left of the answer that was cancelled
    assert again == alone[1]


def test_log_probabilities_and_a_full_context_beside_others(shared):
    model, _twin = shared
    limit = model.context_tokens
    long = torch.randint(4, 288, (limit - 6,)).tolist()
    likely = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=12, logprobs=2)
    streams = [model.generate(*each, threading.Event()) for each in ((long, GREEDY), ([5, 6, 7], likely), ([8, 9], GREEDY))]
    full, sure, plain = [list(each) for each in streams]
    assert len(ids_of(full)) == 6 and full[-1].reason == "length"
    steps = [each for each in sure if isinstance(each, Step)]
    assert len(steps) == 12 and all(each.top[0][0] == each.id and each.logprob <= 0 for each in steps)
    assert len(ids_of(plain)) == 40


def test_pages_that_run_out_end_one_answer_with_a_sentence_and_no_other(shared, monkeypatch):
    model, _twin = shared
    model._prefix.clear()
    reserve = PagedMemory.reserve

    def one_page_each(memory, tokens):  # the first answer outgrows it, the second never does
        if tokens > PAGE_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reserve(memory, tokens)

    monkeypatch.setattr(PagedMemory, "reserve", one_page_each)
    streams = [model.generate([each] * count, GREEDY, threading.Event()) for each, count in ((5, 60), (6, 10))]
    with pytest.raises(AnswerFailed, match="not enough memory"):
        list(streams[0])
    assert len(ids_of(streams[1])) == 40
