"""Products of 5 to 64 rows by clusters of blocks, and the steps with them, against float64. Skipped without such a GPU."""

import contextlib

import pytest
import torch
from test_cuda_step import SMALL, error, random_models

from gptq_webui.gptq.cuda import octet
from gptq_webui.gptq.cuda.cluster_batch import Plan, Spread
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.suitability import Unsuited

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with clusters that torch can use"
)

EPILOGUES = {  # by the most rows, with a norm or without
    8: [("RESIDUAL", False)],
    16: [("PLAIN", True), ("SILU", True), ("RESIDUAL", False)],
    32: [("RESIDUAL", False), ("PLAIN", False)],
    48: [("RESIDUAL", False), ("PLAIN", False)],
    64: [("RESIDUAL", False), ("PLAIN", False)],
}


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


class Product:
    """A random layer and rows of its inputs, what comes out in float64, and the same by a plan."""

    def __init__(self, gpu, k, n, bits, group_size, *, act_order, sym):
        rows = torch.randperm(k, device="cuda") if act_order else None
        self.gpu, self.n = gpu, n
        self.layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=rows, bias=True)
        packing = packing_of([self.layer])
        gpu.add_missing(packings=[packing])
        self.weight = repack(gpu, [self.layer], packing)
        self.x = (torch.randn(64, k, device="cuda") * torch.logspace(-2, 2, 64, device="cuda")[:, None]).half()
        self.norm = (torch.rand(k, device="cuda") + 0.5).half()
        self.before = torch.randn(64, n, device="cuda")
        self.permutation = torch.randperm(n, device="cuda").int()

    def wanted(self, epilogue, normed):
        """fp64 [64, N] or, of SILU, [64, N / 2]."""
        x = self.x.double()
        if normed:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.norm.double()
        y = x @ self.layer.dequantize(torch.float64).T + self.layer.bias.double()
        if epilogue == "SILU":
            pairs = y.view(64, self.n // 16, 2, 8)
            y = (torch.nn.functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(64, self.n // 2)
        return y + self.before.double() if epilogue == "RESIDUAL" else y

    def run(self, plan, rows):
        """What the plan gives of those rows. Nothing else is written."""
        weight, residual_too = self.weight, plan.variant.epilogue == "RESIDUAL"
        staged = torch.zeros(len(rows), weight.padded, dtype=torch.float16, device="cuda")
        staged[:, weight.permutation.long()] = self.x[rows]
        norm = torch.zeros(weight.padded, dtype=torch.float16, device="cuda")
        norm[weight.permutation.long()] = self.norm
        width = self.n // 2 if plan.variant.epilogue == "SILU" else self.n
        out = torch.full((len(rows) + 1, width), torch.nan, dtype=torch.float16, device="cuda")
        residual = torch.full((len(rows) + 1, self.n), torch.nan, device="cuda")
        residual[:-1] = self.before[rows]
        octet.launch(
            self.gpu, weight, plan, x=staged, out=out[:-1], norm=norm if plan.variant.norm else None, eps=1e-5,
            residual=residual if residual_too else None, permutation=self.permutation if residual_too else None,
        )  # fmt: skip
        assert bool(out[-1].isnan().all() and residual[-1].isnan().all()), "a row too many was written"
        if not residual_too:
            return out[:-1]
        assert torch.equal(out[:-1, self.permutation.long()], residual[:-1].clamp(-65504, 65504).half())
        return residual[:-1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_clusters_multiply_right_in_every_layout(gpu, bits, group_size, act_order, sym):
    torch.manual_seed(bits * 1000 + group_size)
    product = Product(gpu, 672, 416, bits, group_size, act_order=act_order, sym=sym)  # 11 chunks, the last one half empty
    spreads = (
        Spread(4, 1, 4, 3, 2),
        Spread(3, 2, 2, 3, 2),
        Spread(2, 1, 3, 2, 4),
        Spread(4, 1, 4, 2, 2),
        Spread(2, 1, 4, 3, 2, 2),
    )
    for rows, spread in zip(EPILOGUES, spreads, strict=True):
        plans = [Plan.of(gpu, product.weight, *each, rows, spread) for each in EPILOGUES[rows]]
        gpu.add_missing({each.variant for each in plans})
        for (epilogue, normed), plan in zip(EPILOGUES[rows], plans, strict=True):
            wanted = product.wanted(epilogue, normed)
            for count in (rows // 2 + 1, rows - 3, rows):
                found = product.run(plan, list(range(count))).double()
                assert error(found, wanted[:count]) < (4e-3 if epilogue == "SILU" else 2e-3), (epilogue, count)


@pytest.mark.parametrize("k", [64, 320, 4096, 14336])
@pytest.mark.parametrize("rows", EPILOGUES)
def test_every_spread_gives_the_same_and_a_row_does_not_depend_on_the_others(gpu, k, rows):
    torch.manual_seed(k)
    product = Product(gpu, k, 4224, 4, 64, act_order=True, sym=True)
    plans = []
    for spread in ((1, 1, 1, 2, 2), (4, 1, 8, 3, 2), (3, 2, 4, 2, 2), (5, 3, 1, 3, 4), (1, 4, 4, 4, 1), (2, 7, 1, 2, 2, 2)):
        for epilogue, normed in EPILOGUES[rows]:
            with contextlib.suppress(Unsuited):
                plans.append(Plan.of(gpu, product.weight, epilogue, normed, rows, Spread(*spread)))
    assert len(plans) >= (5 if rows <= 32 else 3), "of six, some need more shared memory for so many rows than there is"
    gpu.add_missing({each.variant for each in plans})
    for plan in plans:
        epilogue, everything = plan.variant.epilogue, list(range(rows))
        found = product.run(plan, everything)
        assert error(found, product.wanted(epilogue, plan.variant.norm > 0)[:rows]) < 4e-3, plan.name
        assert torch.equal(found, product.run(plan, everything)), "the same input gives the same bits"
        turned = everything[::-1]
        assert torch.equal(found[turned], product.run(plan, turned)), "a row in another column"
        assert torch.equal(found[:7], product.run(plan, everything[:7])), "fewer rows"


@pytest.mark.parametrize("rows", [9, 16, 27, 32, 41, 48, 64])
@pytest.mark.parametrize("change", [{}, {"sym": False}, {"bias": True}, {"qk_norm": True}], ids=str)
def test_rows_by_clusters_give_the_logits_of_plain_pytorch(gpu, rows, change):
    torch.manual_seed(2)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    ids = torch.randint(0, SMALL["vocabulary"], (rows,)).tolist()
    with torch.inference_mode():
        wanted = torch.cat([random_models.plain_logits(parts, [each]) for each in ids])
        step = CudaStep(parts, 256, parallel=64, gpu=gpu)
        assert step._clusters.plans(rows) is not None and step._clusters.whole(rows) == (rows <= 16)
        memories = [PagedMemory(step.pages) for _ in ids]
        for row, (memory, each) in enumerate(zip(memories, ids, strict=True)):
            step.sequences.use(memory, 8, row)
            step.sequences.ids[row], step.sequences.positions[row] = each, 0
        step.step_rows(rows, False)
        assert error(step.sequences.logits[:rows], wanted) < 5e-3
        step.close()
