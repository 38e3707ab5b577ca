"""Which attention the steps of short and of long conversations launch, without a GPU."""

from types import SimpleNamespace

import pytest
from test_cuda_launches import RecordingGpu, gpu, make  # noqa: F401 (a fixture)

from gptq_webui.gptq.cuda import attention, batch_step
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


@pytest.mark.parametrize(("rows", "most", "blocks"), [(1, 3072, 8), (2, 3072, 8), (4, 3072, 8), (8, 3072, 8), (12, 1536, 4)])
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


def test_rows_get_the_most_blocks_that_fit_one_on_a_processor_and_others_none():
    gpu, shape = RecordingGpu(), SimpleNamespace(attention_blocks=8, kv=KvFormat(128))  # noqa: F811
    variants = attention.cluster_variants(gpu, shape)
    assert [each.blocks for each in variants] == [8, 4]
    gpu.add(variants)
    assert [attention.short_tokens(gpu, shape, rows) for rows in (1, 2, 3, 4, 5, 8, 16)] == [3072, 3072, 1536, 1536, 0, 0, 0]
    shape.attention_blocks = 32
    assert [attention.short_tokens(gpu, shape, rows) for rows in (1, 2)] == [1536, 0]
    gpu.capability = (8, 9)
    assert attention.short_tokens(gpu, shape, 1) == 0 and not attention.cluster_variants(gpu, shape), "clusters came with Hopper"
