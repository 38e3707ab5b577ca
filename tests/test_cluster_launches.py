"""Which products of 3 to 64 rows clusters of blocks make, and how they are launched, without a GPU."""

from collections import Counter
from types import SimpleNamespace

import pytest
from test_cuda_launches import SEVEN_A_LAYER, RecordingGpu, gpu, make  # noqa: F401 (a fixture)

from gptq_webui.gptq.cuda import batch_step, cluster_batch, cluster_step, cuda_stepper
from gptq_webui.gptq.cuda.cuda_layers import EPILOGUES, NORMED
from gptq_webui.gptq.cuda.kernel_source import Packing
from gptq_webui.gptq.suitability import Unsuited

BY_CLUSTERS = {"embed": 1, "cluster": 8, "attention": 2, "norm": 1}
DOWN_BY_CLUSTERS = {"embed": 1, "octet": 6, "cluster": 2, "attention": 2, "head": 1}
TWO_BY_CLUSTERS = {**DOWN_BY_CLUSTERS, "octet": 4, "cluster": 4}
HALF_BY_CLUSTERS = {"embed": 1, "norm": 5, "wide": 4, "cluster": 4, "paged": 2}
MOST_BY_CLUSTERS = {"embed": 1, "norm": 5, "small": 2, "cluster": 6, "paged": 2}
MANY = {"embed": 1, "norm": 5, "small": 8, "paged": 2}
RAGGED = {"hidden": 264, "group_size": -1}  # outputs that fill no tile
MANY_OUTPUTS = {"inner": 14848}  # of gate and up: more than all clusters take at once

# Run and timed on an H200, Mistral-7B's shape: inputs, outputs, the rest of the name, blocks, shared memory with a claim.
TIMED = {
    (16, "qkv"): (4096, 6144, "plain_norm8_2_3_2_4_3_2", 128, 115840),
    (16, "o"): (4096, 4096, "residual_norm0_2_2_1_8_3_2", 256, 76928),
    (16, "gate_up"): (4096, 28672, "silu_norm8_2_7_4_2_3_2", 128, 157312),
    (16, "down"): (14336, 4096, "residual_norm0_2_4_1_8_3_2", 128, 115840),
    (32, "o"): (4096, 4096, "residual_norm0_4_4_1_8_3_2", 128, 150784),
    (32, "down"): (14336, 4096, "residual_norm0_4_4_1_8_3_2", 128, 150784),
    (48, "o"): (4096, 4096, "residual_norm0_6_2_1_4_3_2", 256, 87168),
    (48, "down"): (14336, 4096, "residual_norm0_6_4_1_8_2_2", 128, 133504),
    (64, "o"): (4096, 4096, "residual_norm0_8_2_1_4_3_2", 256, 111872),
    (32, "qkv"): (4096, 6144, "plain_norm0_4_3_1_8_2_1", 128, 115840),
    (48, "qkv"): (4096, 6144, "plain_norm0_6_3_1_8_3_1", 128, 187008),
    (64, "qkv"): (4096, 6144, "plain_norm0_8_3_1_4_2_2", 256, 79104),
    (8, "o"): (4096, 4096, "residual_norm0_1_2_1_8_3_2", 256, 76928),
    (8, "down"): (14336, 4096, "residual_norm0_1_4_1_12_3_2", 128, 115840),
    (4, "down"): (14336, 4096, "residual_norm0_1_4_1_12_3_2", 128, 115840),
}


@pytest.fixture(autouse=True)
def head_of_the_cpu(monkeypatch):
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())


def launched(step, gpu, rows):  # noqa: F811
    gpu.launched.clear()
    step.batch.forward(rows)
    return Counter(name.split("_")[0] for name in gpu.launched)


@pytest.mark.parametrize(("rows", "role"), TIMED)
def test_the_shape_that_was_timed_is_launched_as_it_was(rows, role):
    k, n, name, blocks, claimed = TIMED[rows, role]
    gpu = RecordingGpu()  # noqa: F811
    weight = SimpleNamespace(packing=Packing(4, True, 1), chunks=k // 64, tiles=n // 16, out_features=n)
    spread = cluster_batch.SPREADS[rows][role]
    assert spread.fitted(weight.tiles, gpu.processors) == spread
    plan = cluster_batch.Plan.of(gpu, weight, EPILOGUES[role], role in NORMED and rows <= 16, rows, spread)
    assert (plan.name, plan.blocks, plan.shared_bytes) == (f"cluster_batch_4_sym_1_{name}", blocks, claimed)
    with pytest.raises(Unsuited, match="a product of 4096 tiles"):
        spread.fitted(4096, gpu.processors)


@pytest.mark.parametrize(
    ("rows", "change", "wanted"),
    [(9, {}, BY_CLUSTERS), (12, {"sym": False}, BY_CLUSTERS), (16, {"bias": True, "qk_norm": True}, BY_CLUSTERS),
     (17, {}, MOST_BY_CLUSTERS), (24, {"sym": False, "bias": True}, MOST_BY_CLUSTERS),
     (32, {"group_size": -1}, MOST_BY_CLUSTERS), (48, {}, {**HALF_BY_CLUSTERS, "wide": 2, "cluster": 6}),
     (64, {}, HALF_BY_CLUSTERS), (5, {}, TWO_BY_CLUSTERS), (8, {"sym": False, "bias": True}, TWO_BY_CLUSTERS),
     (8, {"bits": 8}, {"embed": 1, "octet": 8, "attention": 2, "head": 1}),
     (3, {}, DOWN_BY_CLUSTERS), (4, {}, DOWN_BY_CLUSTERS),
     (2, {}, {"embed": 1, "octet": 8, "attention": 2, "head": 1}), (65, {}, {"embed": 1, "norm": 5, "wide": 8, "paged": 2}),
     (12, RAGGED, SEVEN_A_LAYER), (24, RAGGED, {**MANY, "small": 6, "cluster": 2}),
     (32, {"heads": 52, "kv_heads": 52}, {**MANY, "small": 4, "cluster": 4}), (16, MANY_OUTPUTS, SEVEN_A_LAYER),
     (32, MANY_OUTPUTS, MOST_BY_CLUSTERS), (16, {"bits": 8}, SEVEN_A_LAYER), (32, {"bits": 3}, MANY),
     (24, {"bits": 2, "sym": False}, MANY), (16, {"group_size": 32}, SEVEN_A_LAYER)],
)  # fmt: skip
def test_clusters_make_what_they_were_faster_at_and_nothing_else(gpu, rows, change, wanted):  # noqa: F811
    assert launched(make(gpu, parallel=rows, **change), gpu, rows) == wanted


def test_a_step_that_grows_has_the_kernels_of_each_number_of_rows(gpu):  # noqa: F811
    step = make(gpu, parallel=8, most=32)
    step.sequences.grow(48)
    for rows, wanted in ((8, TWO_BY_CLUSTERS), (12, BY_CLUSTERS), (24, MOST_BY_CLUSTERS)):
        assert launched(step, gpu, rows) == wanted
    with pytest.raises(ValueError, match="no kernels for 24 rows"):
        step._clusters.forward(24, None, None)


def test_the_stepper_has_kernels_for_as_many_answers_as_it_may_take(monkeypatch):
    asked = {}

    def step(*args, **options):
        asked.update(options)
        raise Unsuited("enough")

    monkeypatch.setattr(cuda_stepper, "CudaStep", step)
    with pytest.raises(Unsuited, match="enough"):
        cuda_stepper.CudaStepper(None, 256, parallel=32)
    assert (asked["parallel"], asked["most"]) == (cuda_stepper.FIRST_ROWS, 32)


@pytest.mark.parametrize("rows", [12, 24])
def test_before_hopper_there_are_no_clusters(gpu, rows):  # noqa: F811
    gpu.capability = (8, 9)
    kinds = launched(make(gpu, parallel=rows), gpu, rows)
    assert kinds["small"] == 8 and not any(name.startswith("cluster") for name in gpu.compiled)


def test_a_model_with_a_norm_beyond_fp16_keeps_its_norms_apart(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cluster_step, "norms_within_fp16", lambda weights, hidden: False)
    step = make(gpu, parallel=32)
    assert launched(step, gpu, 16) == SEVEN_A_LAYER and launched(step, gpu, 32) == MOST_BY_CLUSTERS
