"""Products of 2 to 8 rows, and the step made of them, against float64. Skipped without a GPU."""

import contextlib

import pytest
import torch
from test_cuda_step import SMALL, error, random_models

from gptq_webui.gptq.cuda import octet, row_kernels
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kv_pages import PagedMemory
from gptq_webui.gptq.cuda.octet import Plan, Spread
from gptq_webui.gptq.suitability import Unsuited

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

EPILOGUES = [("PLAIN", True), ("PLAIN", False), ("SILU", True), ("RESIDUAL", False)]  # with norm or without


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


def clusters(gpu):
    return (1, 2, 4) if gpu.capability >= (9, 0) else (1,)


class Product:
    """A random layer and rows of its inputs, what comes out in float64, and the same by a plan."""

    def __init__(self, gpu, k, n, bits, group_size, *, act_order, sym):
        rows = torch.randperm(k, device="cuda") if act_order else None
        self.gpu, self.k, self.n = gpu, k, n
        self.layer = random_models.random_layer(k, n, bits, group_size, sym=sym, rows=rows, bias=True)
        packing = packing_of([self.layer])
        gpu.add_missing(packings=[packing])
        self.weight = repack(gpu, [self.layer], packing)
        self.x = torch.randn(8, k, device="cuda").half()
        self.norm = (torch.rand(k, device="cuda") + 0.5).half()
        self.before = torch.randn(8, n, device="cuda")
        self.permutation = torch.randperm(n, device="cuda").int()

    def wanted(self, epilogue, normed):
        """fp64 [8, N] or, of SILU, [8, N / 2]."""
        x = self.x.double()
        if normed:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.norm.double()
        y = x @ self.layer.dequantize(torch.float64).T + self.layer.bias.double()
        if epilogue == "SILU":
            pairs = y.view(8, self.n // 16, 2, 8)
            y = (torch.nn.functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(8, self.n // 2)
        return y

    def run(self, plan, rows):
        """What the plan gives of those rows: fp16 or, of RESIDUAL, what was added to the residual. Nothing else is written."""
        weight, residual_too = self.weight, plan.variant.epilogue == "RESIDUAL"
        staged = torch.zeros(len(rows), weight.padded, dtype=torch.float16, device="cuda")
        staged[:, weight.permutation.long()] = self.x[rows]
        norm = torch.zeros(weight.padded, dtype=torch.float16, device="cuda")
        norm[weight.permutation.long()] = self.norm
        width = self.n // 2 if plan.variant.epilogue == "SILU" else self.n + 8 * residual_too
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
        assert bool(out[:-1, self.n :].isnan().all()), "the padding of the next input was written"
        assert torch.equal(out[:-1, self.permutation.long()], residual[:-1].clamp(-65504, 65504).half())
        return residual[:-1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_octet_are_multiplied_right_in_every_layout(gpu, bits, group_size, act_order, sym):
    torch.manual_seed(bits * 1000 + group_size)
    product = Product(gpu, 672, 416, bits, group_size, act_order=act_order, sym=sym)  # 11 chunks, the last one half empty
    for rows in octet.ROWS:
        spreads = [Spread(4, 2, 3, 2, 2), Spread(4, 4, 2, 1, 2)]
        plans = [Plan.of(gpu, product.weight, *each, rows, spreads[rows // 4 % 2]) for each in EPILOGUES]
        gpu.add_missing({each.variant for each in plans})
        for (epilogue, normed), plan in zip(EPILOGUES, plans, strict=True):
            wanted = product.wanted(epilogue, normed)
            for count in range(max(1, rows // 2), rows + 1):
                found = product.run(plan, list(range(count))).double()
                if epilogue == "RESIDUAL":
                    found = found - product.before[:count].double()
                assert error(found, wanted[:count]) < (4e-3 if epilogue == "SILU" else 2e-3), (epilogue, count)


@pytest.mark.parametrize("k", [64, 320, 4096, 14336])
@pytest.mark.parametrize("rows", octet.ROWS)
def test_every_spread_gives_the_same_and_a_row_does_not_depend_on_the_others(gpu, k, rows):
    torch.manual_seed(k)
    product = Product(gpu, k, 272, 4, 64, act_order=True, sym=True)
    plans = []
    for split, batch, teams, cluster in ((4, 4, 4, 1), (8, 2, 1, 2), (16, 1, 1, 4), (1, 1, 2, 2), (3, 2, 5, 1), (32, 1, 1, 1)):
        for epilogue, normed in EPILOGUES:
            if cluster in clusters(gpu) and not (normed and cluster > 1):
                with contextlib.suppress(Unsuited):
                    plans.append(Plan.of(gpu, product.weight, epilogue, normed, rows, Spread(split, batch, 2, teams, 1, cluster)))
    assert len(plans) >= 8
    gpu.add_missing({each.variant for each in plans})
    for plan in plans:
        epilogue, everything = plan.variant.epilogue, list(range(rows))
        found = product.run(plan, everything)
        y = found - product.before[:rows] if epilogue == "RESIDUAL" else found
        assert error(y, product.wanted(epilogue, plan.variant.norm > 0)[:rows]) < 4e-3, plan.name
        assert torch.equal(found, product.run(plan, everything)), "the same input gives the same bits"
        turned = everything[::-1]
        assert torch.equal(found[turned], product.run(plan, turned)), "a row in another column"
        assert torch.equal(found[:1], product.run(plan, [0])), "a row alone"


@pytest.mark.parametrize(("hidden", "vocabulary"), [(320, 515), (4096, 2000), (5120, 40), (8192, 2113 * 16)])
def test_the_output_layer_of_octet(gpu, hidden, vocabulary):
    torch.manual_seed(hidden)
    gpu.add(fixed=True)
    weights = torch.randn(vocabulary, hidden, device="cuda").half() / hidden**0.5
    norm = (torch.rand(hidden, device="cuda") + 0.5).half()
    x = torch.randn(8, hidden, device="cuda").half() * 3
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * norm.double()
    wanted = normed @ weights.double().T
    assert not row_kernels.has_head_rows(gpu, 8, 8224) and not row_kernels.has_head_rows(gpu, 2, 328)
    for rows in range(2, 9):
        out = torch.full((rows + 1, vocabulary), torch.nan, device="cuda")
        row_kernels.head_rows(gpu, weights, x[:rows], norm, out[:rows], 1e-5)
        assert error(out[:rows], wanted[:rows]) < 1e-3 and bool(out[rows].isnan().all()), rows


@pytest.mark.parametrize(
    "change",
    [{}, {"bits": 8}, {"sym": False, "group_size": 32}, {"window": 40}, {"head_dim": 128, "heads": 8}, {"bias": True},
     {"qk_norm": True, "bits": 3}],
    ids=str,
)  # fmt: skip
def test_two_to_eight_rows_give_the_logits_of_plain_pytorch(gpu, change):
    torch.manual_seed(2)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    lengths = [5, 70, 100, 33, 64, 17, 2, 90]
    with torch.inference_mode():
        texts = [torch.randint(0, SMALL["vocabulary"], (each + 14,)).tolist() for each in lengths]
        wanted = [random_models.plain_logits(parts, each) for each in texts]
        step = CudaStep(parts, 256, parallel=len(lengths), gpu=gpu)
        memories = [PagedMemory(step.pages) for _ in lengths]
        for row, (text, length, memory) in enumerate(zip(texts, lengths, memories, strict=True)):
            step.sequences.use(memory, length + 14, row)
            step.prefill(text[:length], 0, row)
        at = list(lengths)
        for rows in (2, 3, 4, 5, 6, 7, 8, 2, 8):
            for row in range(rows):
                step.sequences.ids[row], step.sequences.positions[row] = texts[row][at[row]], at[row]
            assert step._octet.plans(rows) is not None
            step.batch.forward(rows, short=at[0] % 2 == 0)
            for row in range(rows):
                assert error(step.sequences.logits[row], wanted[row][at[row]]) < 1e-2, (rows, row)
                at[row] += 1
