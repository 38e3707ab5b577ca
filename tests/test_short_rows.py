"""Which attention the steps of short and of long conversations launch, without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from test_cuda_launches import SMALL, RecordingGpu, gpu, make, random_models  # noqa: F401 (a fixture)

from gptq_webui.gptq.cuda import attention, batch_step
from gptq_webui.gptq.cuda.cuda_adapter import CudaAdapter
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.kernel_source import KvFormat
from gptq_webui.gptq.cuda.kv_pages import PagedMemory


@pytest.fixture(autouse=True)
def head_of_the_cpu(monkeypatch):
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())


def attended_by(step, gpu, rows):  # noqa: F811
    gpu.launched.clear()
    step.step_rows(rows)
    (found,) = {each for each in gpu.launched if "attention" in each}
    return found


@pytest.mark.parametrize(("rows", "most", "blocks"), [(1, 3072, 8), (4, 3072, 8), (6, 3072, 8), (7, 2304, 6), (12, 3072, 8)])
def test_long_conversations_have_another_attention_than_short_ones(gpu, rows, most, blocks):  # noqa: F811
    step = make(gpu, parallel=16, context=8192)
    memories = [PagedMemory(step.pages) for _ in range(16)]
    for row, memory in enumerate(memories[:rows]):
        step.sequences.use(memory, 10, row)
    for tokens, name in (
        (10, f"cluster_attention_64_{blocks}"),
        (most, f"cluster_attention_64_{blocks}"),
        (most + 1, "attention_64"),
    ):
        step.sequences.use(memories[rows - 1], tokens, rows - 1)
        assert attended_by(step, gpu, rows) == name, tokens
    memories[rows - 1] = PagedMemory(step.pages)
    step.sequences.use(memories[rows - 1], 10, rows - 1)
    assert attended_by(step, gpu, rows) == f"cluster_attention_64_{blocks}", "a new conversation in that row"
    step.sequences.use(memories[rows], 8000, rows)
    assert attended_by(step, gpu, rows) == f"cluster_attention_64_{blocks}", "a row that is not computed"


@pytest.mark.parametrize("rank", [4, 100])  # inside the products, and beside them
def test_an_answer_with_an_adapter_has_both_attentions_too(gpu, rank):  # noqa: F811
    torch.manual_seed(0)
    parts = random_models.random_models(**SMALL, device="cpu")
    linear = parts.layers[1].down
    step = CudaStep(parts, 8192, gpu=gpu)
    lines = {"down": (linear, torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank))}
    adapter = CudaAdapter([(lines, 1.0)], step.adaptable, step.weights.layers)
    memory = PagedMemory(step.pages)
    for tokens, name in ((10, "cluster_attention_64_8"), (3000, "cluster_attention_64_8"), (3200, "attention_64")):
        step.sequences.use(memory, tokens)
        gpu.launched.clear()
        step.step_rows(1, False, {0: adapter})
        assert {each for each in gpu.launched if "attention" in each} == {name}
    assert len(step.adapted._graphs) == 2


def test_each_length_is_recorded_once(gpu, monkeypatch):  # noqa: F811
    step = make(gpu, context=8192)
    recorded = []
    real = step.recorder.record
    monkeypatch.setattr(step.recorder, "record", lambda run: recorded.append(run) or real(run))
    memory = PagedMemory(step.pages)
    for tokens in (10, 3000, 3200, 8000):
        step.sequences.use(memory, tokens)
        step.step()
    assert len(recorded) == 2


def shape_of(attention_blocks):
    return SimpleNamespace(attention_blocks=attention_blocks, kv=KvFormat(128), max_pages=1000)


def test_rows_get_the_clusters_that_were_chosen_on_an_h200():
    gpu, shape = RecordingGpu(), shape_of(8)  # noqa: F811
    assert gpu.processors == 132
    gpu.add(attention.cluster_variants(gpu, shape, 256))
    chosen = {rows: attention._cluster(gpu, shape, rows) for rows in range(1, 20)}
    blocks = {rows: each.blocks for rows, each in chosen.items() if each is not None}
    chosen_by_time = {1: 8, 2: 6, 3: 8, 4: 6, 5: 5, 6: 4, 7: 3, 8: 3}
    assert blocks == {**chosen_by_time, **dict.fromkeys(range(11, 17), 2)}, "9, 10 and more than 16 rows have none"
    lengths = {rows: attention.short_tokens(gpu, shape, rows) for rows in (2, 3, 5, 8, 9, 11, 12, 16, 17)}
    assert lengths == {2: 2304, 3: 3072, 5: 1920, 8: 1152, 9: 0, 11: 768, 12: 64000, 16: 64000, 17: 0}
    many_heads = shape_of(32)
    gpu.add(attention.cluster_variants(gpu, many_heads, 256))
    assert [attention.short_tokens(gpu, many_heads, rows) for rows in (1, 2, 3, 4, 5)] == [2304, 1152, 64000, 64000, 0]


@pytest.mark.parametrize(
    ("processors", "blocks"), [(114, [8, 5, 6, 5, 4, 3, 3, 0]), (70, [6, 6, 4, 3, 0, 2, 2, 2]), (16, [3, 2, 0, 0, 0, 0, 0, 0])]
)
def test_on_a_smaller_gpu_clusters_are_smaller(processors, blocks):
    gpu, shape = RecordingGpu(), shape_of(8)  # noqa: F811
    gpu.processors = processors
    found = [attention._cluster(gpu, shape, rows) for rows in range(1, 9)]
    assert [each.blocks if each is not None else 0 for each in found] == blocks


def test_only_the_rows_that_may_come_have_kernels_compiled_and_none_before_hopper():
    gpu, shape = RecordingGpu(), shape_of(8)  # noqa: F811
    assert [each.blocks for each in attention.cluster_variants(gpu, shape, 1)] == [8]
    assert {each.blocks for each in attention.cluster_variants(gpu, shape, 4)} == {6, 8}
    assert attention.short_tokens(gpu, shape, 1) == 0, "it was not compiled"
    gpu.capability = (8, 9)
    assert not attention.cluster_variants(gpu, shape, 256), "clusters came with Hopper"
