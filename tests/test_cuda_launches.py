"""What the GPU's step launches, without a GPU: every argument is packed and every check on the host runs."""

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptq_webui.core.errors import BadParameter
from gptq_webui.gptq.cuda import adapted_step, batch_step, cuda_step, gemv, gpu_kernels, small_batch
from gptq_webui.gptq.cuda.attention import AttentionWork, attend
from gptq_webui.gptq.cuda.cuda_adapter import CudaAdapter
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.kernel_source import GuessedVariant
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.cuda.model_shape import ModelShape
from gptq_webui.gptq.cuda.row_kernels import head_threads
from gptq_webui.gptq.cuda.sample import sample
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.suitability import Unsuited

_spec = importlib.util.spec_from_file_location("random_models", Path(__file__).parents[1] / "benchmarks" / "random_models.py")
random_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_models)

SMALL = {"hidden": 256, "inner": 320, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2, "vocabulary": 130, "group_size": 64}
FIXED = "embed norm_rows norm_rows_natural order_rows silu_rows head sample head_2_4 head_4_2 head_8_1 head_8_2"
ADAPTERS = ("adapter_in_plain", "adapter_in_norm", "adapter_out", "adapter_silu")


class RecordingGpu:
    """In the place of Gpu: it compiles nothing, and notes what is launched."""

    name, processors, shared_bytes = "no GPU", 132, 228 * 1024
    device, capability, warpgroups = torch.device("cpu"), (9, 0), False

    def __init__(self, shared_limit_bytes=227 * 1024):
        self.shared_limit_bytes, self.compiled, self.launched = shared_limit_bytes, set(), []

    def add(self, variants=(), packings=(), formats=(), fixed=False):
        variants = list(variants)
        self.compiled |= {each.name for each in variants}
        self.compiled |= {"sample_guessed"} if any(isinstance(each, GuessedVariant) for each in variants) else set()
        self.compiled |= {f"unpack_{each.name}" for each in packings} | {f"repack_{each.bits}" for each in packings}
        self.compiled |= {f"{kernel}_{each.name}" for each in formats for kernel in ("attention", "rope", "gather")}
        self.compiled |= {*FIXED.split(), *ADAPTERS} if fixed else set()

    def add_missing(self, variants=(), packings=()):
        self.add(variants, packings)

    def has(self, name):
        return name in self.compiled

    def run(self, name, grid, threads, arguments, shared_bytes=0, overlap=False):
        assert self.has(name), f"{name} was launched and never compiled"
        assert all(0 < each < 65536 for each in grid) and 0 < threads <= 1024 and shared_bytes <= self.shared_limit_bytes
        self.launched.append(name)

    def scratch(self, size_bytes):
        return SimpleNamespace(counters=torch.zeros(1), sums=torch.zeros(1))

    def close(self):
        pass


class Replay:
    """In the place of a graph: what was recorded is run."""

    def __init__(self, run):
        self.replay = run


class Recorder:
    def __init__(self, device):
        pass

    def record(self, run):
        return Replay(run)

    def record_all(self, runs):
        return [Replay(each) for each in runs]

    def reset(self):
        pass

    close = reset


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    return RecordingGpu()


def make(gpu, **change):
    torch.manual_seed(0)
    how = {key: change.pop(key) for key in ("parallel", "most", "q8", "guesses") if key in change}
    context = change.pop("context", 256)
    return CudaStep(random_models.random_models(**{**SMALL, **change}, device="cpu"), context, gpu=gpu, **how)


@pytest.mark.parametrize(
    "change",
    [{}, {"bits": 8, "sym": False}, {"qk_norm": True, "bias": True, "window": 40}, {"q8": True}, {"hidden": 8448}],
    ids=str,
)
def test_a_token_takes_five_kernels_a_layer(gpu, change):
    step = make(gpu, **change)
    step.sequences.use(PagedMemory(step.pages), 10)
    gpu.launched.clear()
    step.step()
    kinds = Counter(name.split("_")[0] for name in gpu.launched)
    assert kinds == {"embed": 1, "gemv": 8, "cluster": 2, "head": 1, "sample": 1}


FIVE_A_LAYER = {"embed": 1, "octet": 8, "attention": 2, "head": 1}
SEVEN_A_LAYER = {"embed": 1, "norm": 5, "small": 8, "attention": 2}


@pytest.mark.parametrize(
    ("rows", "change", "wanted"),
    [(2, {}, FIVE_A_LAYER), (5, {"bits": 3, "sym": False}, FIVE_A_LAYER), (4, {"bias": True, "bits": 8}, FIVE_A_LAYER),
     (9, {"bits": 8}, SEVEN_A_LAYER), (17, {"bits": 8}, {"embed": 1, "norm": 5, "small": 8, "paged": 2})],
)  # fmt: skip
def test_up_to_eight_tokens_take_five_kernels_a_layer_and_more_take_seven(gpu, monkeypatch, rows, change, wanted):
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())  # no fp32 sums on the CPU
    step = make(gpu, parallel=rows, **change)
    gpu.launched.clear()
    step.batch.forward(rows)
    assert Counter(name.split("_")[0] for name in gpu.launched) == wanted


def test_rows_whose_inputs_do_not_fit_into_shared_memory_take_the_kernels_of_many_rows(gpu, monkeypatch):
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())
    gpu.shared_limit_bytes, gpu.capability = 64 * 1024, (7, 5)
    step = make(gpu, parallel=8, hidden=4096, layers=1)
    for rows, kernels in ((2, {"octet": 4, "head": 1}), (8, {"small": 4, "norm": 3})):
        gpu.launched.clear()
        step.batch.forward(rows)
        assert Counter(name.split("_")[0] for name in gpu.launched) == {"embed": 1, "attention": 1, **kernels}


@pytest.mark.parametrize(("parallel", "kernel", "norms"), [(1, "gemv", 0), (3, "octet", 0), (12, "small", 5), (24, "small", 5)])
def test_an_adapter_takes_two_kernels_for_each_product_that_it_changes(gpu, monkeypatch, parallel, kernel, norms):
    monkeypatch.setattr(adapted_step, "head_product", lambda x, weight: (x @ weight.T).float())
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())
    parts = random_models.random_models(**SMALL, device="cpu")
    layer, rank = parts.layers[1], 100 if parallel == 1 else 4  # one row's products take smaller ones inside
    parts_of_adapter = {
        name: (each, torch.randn(rank, each.in_features), torch.randn(each.out_features, rank))
        for name, each in (("q", layer.qkv[0]), ("up", layer.gate_up[1]), ("down", layer.down))
    }
    step = CudaStep(parts, 256, gpu=gpu, parallel=parallel)
    adapter = CudaAdapter([(parts_of_adapter, 1.0)], step.adaptable, step.weights.layers)
    step.adapted  # noqa: B018 (makes its kernels)
    gpu.launched.clear()
    step.step_rows(parallel, False, {0: adapter})
    rest = [name for name in gpu.launched if "attention" not in name]
    kinds = Counter(name if name.startswith("adapter") else name.split("_")[0] for name in rest)
    inner = kinds["adapter_in_plain"] + kinds["adapter_in_norm"]
    assert inner == 3 * 2 and kinds["adapter_in_norm"] == (4 if parallel < 9 else 0)
    assert kinds["adapter_out"] == 2 * 2 and kinds["adapter_silu"] == 2, "layers alike"
    assert kinds[kernel] + kinds["cluster"] == 8 and len(gpu.launched) - len(rest) == 2 and kinds["norm"] == norms
    step.step_rows(parallel, False, {0: None})
    assert sum(name.startswith("adapter_in") for name in gpu.launched) == 3 * 2, "without adapters, the step is as before"


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_a_processor_takes_no_more_blocks_of_a_launch_than_are_meant_for_it(blocks):
    gpu = RecordingGpu()
    for used in (1000, 40_000, 90_432, 110_000, 232_448):
        claimed = gpu_kernels.claimed_bytes(gpu, used, blocks)
        fit, fitted = (gpu.shared_bytes // (each + 1024) for each in (claimed, used))
        assert used <= claimed <= gpu.shared_limit_bytes and fit == min(blocks, fitted)
    gpu.capability = (8, 9)
    assert gpu_kernels.claimed_bytes(gpu, 1000, blocks) == 1000, "there no kernel begins before the previous one has ended"


def test_the_rows_of_a_graph_are_few_numbers_and_never_too_few():
    assert [batch_step.rows_of_graph(each) for each in (1, 5, 8, 9, 17, 100, 129, 256)] == [1, 5, 8, 12, 24, 128, 192, 256]
    assert all(batch_step.rows_of_graph(each) >= each for each in range(1, 257)) and len(batch_step.ROWS) < 20
    with pytest.raises(ValueError, match="257 rows"):
        batch_step.rows_of_graph(257)


@pytest.mark.parametrize(("tokens", "kind", "count"), [(32, "small", 8), (33, "wide", 8), (130, "wide", 8), (257, "unpack", 8)])
def test_a_long_prompt_is_multiplied_with_dense_weights_and_a_short_one_with_packed_ones(gpu, tokens, kind, count):
    step = make(gpu, context=512)
    step.sequences.use(PagedMemory(step.pages), 300)
    gpu.launched.clear()
    step.prefill([1] * tokens, 0)
    kinds = Counter(name.split("_")[0] for name in gpu.launched)
    assert kinds[kind] == count and kinds["rope"] == 2 and kinds["gather"] == 0 and gpu.launched[-1] == "head"
    step.prefill([1] * 5, tokens)
    assert Counter(gpu.launched)["gather_64"] == 2, "later pieces read what earlier ones kept"


# --- checks of what a launch assumes ------------------------------------------------------------------------------------


def test_tokens_without_an_embedding_are_refused_before_anything_is_computed(gpu):
    step = make(gpu)
    step.sequences.use(PagedMemory(step.pages), 10)
    gpu.launched.clear()
    for wrong in (130, 2**40, -1):
        with pytest.raises(BadParameter, match=f"token {wrong}; the model's tokens are 0 to 129"):
            step.prefill([5, wrong, 6], 0)
    assert gpu.launched == []


def test_a_conversation_longer_than_the_context_is_refused(gpu):
    step = make(gpu)
    with pytest.raises(ValueError, match=r"257 tokens were to be kept; the context has 256"):
        step.sequences.use(PagedMemory(step.pages), 257)


def test_more_rows_than_there_is_room_for_are_refused(gpu):
    step = make(gpu, parallel=2)
    with pytest.raises(ValueError, match="rows 1 to 2"):
        sample(gpu, step.sequences, 1, 2)
    work = AttentionWork(gpu, step.shape, 1)
    with pytest.raises(ValueError, match="2 rows were to attend"):
        attend(
            gpu, step.shape, step.weights, 0, step.sequences, work,
            qkv=torch.zeros(2, step.shape.qkv_width), out=torch.zeros(2, 256),
        )  # fmt: skip


def test_inputs_of_another_width_are_refused(gpu):
    step = make(gpu)
    weight, plan = step.weights.layers[0].qkv, step._plans[0]["qkv"]
    with pytest.raises(ValueError, match="has 64 numbers; the weight takes 256"):
        gemv.launch(gpu, weight, plan, x=torch.zeros(64), out=torch.zeros(512), norm=torch.zeros(256))
    with pytest.raises(ValueError, match="other tensors than it takes"):
        gemv.launch(gpu, weight, plan, x=torch.zeros(256), out=torch.zeros(512))
    with pytest.raises(ValueError, match="rows of 64 numbers"):
        small_batch.multiply(gpu, weight, "PLAIN", torch.zeros(3, 64), torch.zeros(3, 512))
    with pytest.raises(ValueError, match="40000 inputs"):
        head_threads(40000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 3, "kv_heads": 2}, "3 heads that share the keys of 2"),
        ({"head_dim": 80}, "heads of 80 dimensions"),
        ({"rotary_half": 33}, "66 rotated dimensions in heads of 64"),
        ({"hidden": 260}, "a hidden size of 260"),
        ({"hidden": 32776}, "a block norms 32768 inputs at most"),
        ({"vocabulary": 131}, "131 outputs for 130 embeddings"),
    ],
    ids=str,
)
def test_shapes_that_the_kernels_cannot_compute_are_refused_in_words(change, reason):
    shape = ModelShape.of(random_models.random_models(**SMALL, device="cpu"), 256)
    assert shape.unsuited() == ""
    assert reason in replace(shape, **change).unsuited()


def test_layers_that_do_not_fit_together_are_refused_before_anything_is_taken(gpu):
    parts = random_models.random_models(**SMALL, device="cpu")
    wrong = random_models.random_models(**{**SMALL, "inner": 384}, device="cpu")
    mixed = replace(parts, layers=(parts.layers[0], wrong.layers[1]))
    with pytest.raises(Unsuited, match="layers of different sizes"):
        CudaStep(mixed, 256, gpu=gpu)
    short = replace(parts, layers=(replace(parts.layers[0], qkv=parts.layers[0].qkv[:2]), parts.layers[1]))
    with pytest.raises(Unsuited, match="sizes are not those of the heads"):
        CudaStep(short, 256, gpu=gpu)
    assert all(each.qweight is not None for each in parts.linears())


def test_a_gpu_with_too_little_shared_memory_is_refused_before_anything_is_taken(gpu):
    gpu.shared_limit_bytes = 48 * 1024
    with pytest.raises(Unsuited, match="shared memory"):
        make(gpu, hidden=16384)


def test_groups_whose_division_is_not_exact_keep_a_scale_for_every_unit(gpu):
    """2416 inputs a group: the factor of 16 bits finds wrong groups, so each unit of 16 inputs has its own scale."""
    torch.manual_seed(1)
    k, n = 28672, 16
    layer = random_models.random_layer(k, n, 4, 2416, sym=True, rows=None, device="cpu")
    packing = packing_of([layer])
    gpu.add(packings=[packing])
    weight = repack(gpu, [layer], packing)
    assert weight.groups == k // 16 and weight.unit_to_group == 65536
    stored = weight.scales.view(torch.float16).view(1, k // 16, 8, 2)  # the pairs (r, r + 8)
    rows = torch.cat([stored[0, :, :, 0], stored[0, :, :, 1]], 1)  # [units, 16]
    assert torch.equal(rows, layer.scales.data[torch.arange(k // 16) * 16 // 2416])


def test_a_packed_layer_has_the_bits_that_the_kernels_read():
    layer = GPTQLinear(64, 32, 4, 64, bias=False)
    layer.bits = 5
    with pytest.raises(Unsuited, match="weights of 5 bits"):
        packing_of([layer])
