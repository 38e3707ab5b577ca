"""Products of 2 to 8 rows whose inputs are digits (octet_digits.cu), against float64. Skipped without a GPU."""

import contextlib
from dataclasses import replace

import pytest
import torch
from test_cuda_octet import EPILOGUES, Product, clusters
from test_cuda_step import SMALL, error, random_models

from gptq_webui.gptq.cuda import octet
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.cuda.octet import Plan, Spread
from gptq_webui.gptq.suitability import Unsuited

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


def check(product, plan, count, wanted):
    found = product.run(plan, list(range(count))).double()
    if plan.variant.epilogue != "RESIDUAL":
        limit = 4e-3 if plan.variant.epilogue == "SILU" else 1e-3  # fp16 comes out
    else:
        found, limit = found - product.before[:count].double(), 3e-4  # of one input 500 times its neighbours 16 bits are left
    for row in range(count):
        assert error(found[row], wanted[row]) < limit, (plan.name, count, row)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("sym", [False, True])
def test_digits_of_rows_are_multiplied_right_in_every_layout(gpu, bits, group_size, sym):
    torch.manual_seed(bits * 1000 + group_size)
    # 11 chunks, 12, and 26 of which warps have no whole pairs of batches; the last one half empty
    for k, spread in (
        (672, Spread(4, 2, 3, 2, 2, first=1)), (736, Spread(4, 4, 2, 1, 2)), (1632, Spread(8, 2, 2, 2, first=0)),
        (1632, Spread(4, 2, 2, 3, sharers=2)), (672, Spread(4, 2, 3, 2, first=0, sharers=4)),
    ):  # fmt: skip
        product = Product(gpu, k, 176, bits, group_size, act_order=sym, sym=sym)
        product.x[:, 5] *= 500
        product.x[2] = 0
        product.x[1, 100:400] = 0
        for rows in octet.ROWS[: 3 if k != 736 else 2]:
            plans = [Plan.of(gpu, product.weight, *each, rows, replace(spread, digits=True)) for each in EPILOGUES[1:]]
            gpu.add_missing({each.variant for each in plans})
            for (epilogue, normed), plan in zip(EPILOGUES[1:], plans, strict=True):
                assert plan.variant.span == (2 if product.weight.lasting and product.weight.chunks % 2 == 0 else 1)
                wanted = product.wanted(epilogue, normed)
                for count in {max(1, rows // 2), rows - 1, rows}:
                    check(product, plan, count, wanted)


@pytest.mark.parametrize("k", [64, 320, 4096, 14336])
@pytest.mark.parametrize("rows", octet.ROWS)
def test_every_spread_of_digits_gives_the_same_and_a_row_does_not_depend_on_the_others(gpu, k, rows):
    torch.manual_seed(k)
    product = Product(gpu, k, 272, 4, 128 if k > 1000 else 64, act_order=True, sym=rows != 4)
    product.x[:, 5] *= 500
    plans = []
    for split, batch, teams, cluster, first, sharers in (
        (4, 4, 4, 1, 0, 1), (8, 2, 1, 2, 1, 1), (16, 1, 1, 4, 0, 1), (1, 8, 14, 1, 0, 1), (3, 2, 5, 1, None, 1),
        (32, 1, 1, 1, 0, 1), (14, 2, 2, 2, 0, 1), (8, 4, 2, 1, 0, 2), (4, 2, 4, 1, 1, 4), (3, 1, 5, 1, None, 2),
    ):  # fmt: skip
        for epilogue, normed in EPILOGUES:
            if cluster * sharers in clusters(gpu):
                spread = Spread(split, batch, 2, teams, 1, cluster, first, True, sharers)
                with contextlib.suppress(Unsuited):
                    plans.append(Plan.of(gpu, product.weight, epilogue, normed, rows, spread))
    assert len(plans) >= 8
    gpu.add_missing({each.variant for each in plans})
    wanted = {each: product.wanted(*each) for each in EPILOGUES}
    for plan in plans:
        everything = list(range(rows))
        check(product, plan, rows, wanted[plan.variant.epilogue, plan.variant.norm > 0])
        found = product.run(plan, everything)
        for _ in range(5):
            assert torch.equal(found, product.run(plan, everything)), "the same input gives the same bits"
        turned = everything[::-1]
        assert torch.equal(found[turned], product.run(plan, turned)), "a row in another column"
        assert torch.equal(found[:1], product.run(plan, [0])), "a row alone"


@pytest.mark.parametrize("first", [0, 1])
def test_rows_as_they_were_with_x_before_most_of_the_weights(gpu, first):
    product = Product(gpu, 1632, 176, 4, 64, act_order=True, sym=True)
    for rows in octet.ROWS:
        plans = [Plan.of(gpu, product.weight, *each, rows, Spread(8, 2, 3, 2, first=first)) for each in EPILOGUES]
        gpu.add_missing({each.variant for each in plans})
        for (epilogue, normed), plan in zip(EPILOGUES, plans, strict=True):
            found = product.run(plan, list(range(rows)))
            assert torch.equal(found, product.run(replace(plan, first_batches=9), list(range(rows))))
            y = found - product.before[:rows] if epilogue == "RESIDUAL" else found
            assert error(y, product.wanted(epilogue, normed)[:rows]) < 4e-3


@pytest.mark.parametrize("change", [{}, {"sym": False, "group_size": 32}, {"bits": 3, "group_size": 128}, {"bits": 2}], ids=str)
def test_steps_of_digits_of_rows_give_the_logits_of_plain_pytorch(gpu, change, monkeypatch):
    for role, each in octet.SPREADS.items():
        monkeypatch.setitem(octet.SPREADS, role, {rows: replace(spread, digits=True, first=0) for rows, spread in each.items()})
    torch.manual_seed(2)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    lengths = [5, 70, 33, 17, 2, 90, 1, 40]
    with torch.inference_mode():
        texts = [torch.randint(0, SMALL["vocabulary"], (each + 6,)).tolist() for each in lengths]
        wanted = [random_models.plain_logits(parts, each) for each in texts]
        step = CudaStep(parts, 256, parallel=len(lengths), gpu=gpu)
        memories = [PagedMemory(step.pages) for _ in lengths]
        for row, (text, length, memory) in enumerate(zip(texts, lengths, memories, strict=True)):
            step.sequences.use(memory, length + 6, row)
            step.prefill(text[:length], 0, row)
        at = list(lengths)
        for rows in (2, 3, 4, 6, 8):
            for row in range(rows):
                step.sequences.ids[row], step.sequences.positions[row] = texts[row][at[row]], at[row]
            plans = step._octet.plans(rows)
            assert plans is not None and plans[0]["qkv"].variant.span > 0
            step.batch.forward(rows, short=at[0] % 2 == 0)
            for row in range(rows):
                assert error(step.sequences.logits[row], wanted[row][at[row]]) < 1e-2, (rows, row)
                at[row] += 1
