"""LoRA adapters in the GPU's step, against plain PyTorch with the same adapters. Skipped without a GPU; the layout is not."""

from collections import Counter

import pytest
import torch
from test_cuda_launches import Recorder, RecordingGpu
from test_cuda_step import SMALL, error, put, random_models

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq import lora
from gptq_webui.gptq.cuda import adapted_step, cuda_step, gemv
from gptq_webui.gptq.cuda.adapter_rows import MOST_RANK
from gptq_webui.gptq.cuda.cuda_adapter import ENTRY_BYTES, CudaAdapter, Matrices, adaptable_layers
from gptq_webui.gptq.cuda.cuda_layers import gate_up_columns, products
from gptq_webui.gptq.cuda.cuda_step import CudaStep
from gptq_webui.gptq.cuda.cuda_weights import packing_of, repack
from gptq_webui.gptq.cuda.gemv import Tuning
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kv_pages import PagedMemory

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(scope="module")
def gpu():
    return Gpu(torch.device("cuda", 0))


def adapter_parts(parts, seed, rank=16, roles=("qkv", "o", "gate_up", "down"), size=1.0):
    """As lora.read gives them, for the layers of these roles; of q, k and v the middle one is left out."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for at, layer in enumerate(parts.layers):
        for role, modules in products(layer).items():
            for index, each in enumerate(modules if role in roles else ()):
                if role == "qkv" and index == 1:
                    continue
                inner = torch.randn(rank, each.in_features, generator=generator) / each.in_features**0.5
                outer = torch.randn(each.out_features, rank, generator=generator) * (size / rank**0.5)
                found[f"{at}.{role}.{index}"] = each, inner, outer
    return found


def wanted_logits(parts, ids, adapters):
    """Of plain PyTorch, with the adapters beside its layers."""
    hooks = [module.register_forward_hook(lora._adding(a, b)) for each in adapters for module, a, b in each.values()]
    try:
        return random_models.plain_logits(parts, ids)
    finally:
        for each in hooks:
            each.remove()


@pytest.mark.parametrize("role", ["qkv", "o", "gate_up", "down"])
def test_matrices_are_the_adapters_in_the_order_of_the_products(role, monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    torch.manual_seed(0)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, "layers": 1}, device="cpu")
    given = adapter_parts(parts, 1, rank=3, roles=(role,))
    step = CudaStep(parts, 64, gpu=RecordingGpu())
    adapter = CudaAdapter([(given, 0.5), (given, 1.0)], step.adaptable, step.weights.layers)
    weight = step.weights.layers[0].weights[("qkv", "o", "gate_up", "down").index(role)]
    x = torch.randn(2, weight.in_features)
    staged = torch.zeros(2, weight.padded)
    staged[:, weight.permutation.long()] = x
    found = adapter.matrices[0, role].of_rows(staged.half())
    outputs = []
    for index, each in enumerate(products(parts.layers[0])[role]):
        _module, a, b = given.get(
            f"0.{role}.{index}", (each, torch.zeros(1, each.in_features), torch.zeros(each.out_features, 1))
        )
        outputs.append(1.5 * (x.half().float() @ a.T) @ b.T)
    natural = torch.cat(outputs, 1)
    if role == "gate_up":
        columns = gate_up_columns(step.weights.layers[0].down)
        natural = torch.where(columns >= 0, natural[:, columns.clamp(min=0)], 0.0)
    assert error(found, natural) < 2e-3
    assert adapter.ranks[role] == 3 * 2 * (2 if role in ("qkv", "gate_up") else 1)


def test_an_adapter_of_one_row_is_inside_the_products_that_it_changes(monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    torch.manual_seed(0)
    parts = random_models.random_models(**{**SMALL, "group_size": 64}, device="cpu")
    given = adapter_parts(parts, 1, rank=4, roles=("qkv", "down"))
    gpu = RecordingGpu()
    step = CudaStep(parts, 64, gpu=gpu)
    adapter = CudaAdapter([(given, 1.0)], step.adaptable, step.weights.layers)
    step.adapted  # noqa: B018 (makes its kernels)
    gpu.launched.clear()
    step.step_rows(1, False, {0: adapter})
    kinds = Counter("attention" if "attention" in name else name.split("_")[0] for name in gpu.launched)
    assert kinds == {"embed": 1, "gemv": 8, "attention": 2, "head": 1}, "as many kernels as without one"
    assert sum("_adapted" in name for name in gpu.launched) == 2 * 2
    assert torch.equal(step.adapted._row._entries[:-1].view(-1), adapter.table)
    gpu.launched.clear()
    step.step_rows(1, False, {0: None})
    assert len(gpu.launched) == 12 and not any("_adapted" in name for name in gpu.launched)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
@pytest.mark.parametrize("roles", [("qkv",), ("o", "down"), ("gate_up",)])
@pytest.mark.parametrize("rank", [4, 80])
def test_every_product_beside_an_adapter_is_compiled(bits, capability, roles, rank, monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    monkeypatch.setattr(adapted_step, "head_product", lambda x, weight: (x @ weight.T).float())  # no fp32 sums on the CPU
    torch.manual_seed(0)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, "layers": 1, "bits": bits}, device="cpu")
    given = adapter_parts(parts, 1, rank=rank, roles=roles)
    gpu = RecordingGpu()
    gpu.capability = capability
    step = CudaStep(parts, 64, parallel=4, gpu=gpu)
    adapter = CudaAdapter([(given, 1.0)], step.adaptable, step.weights.layers)
    for rows in (1, 2, 4):
        gpu.launched.clear()
        step.step_rows(rows, False, {0: adapter, **dict.fromkeys(range(1, rows))})
        assert len(gpu.launched) > 6


@pytest.mark.parametrize("bits", [2, 3])
def test_of_two_and_three_bits_only_a_step_without_an_adapter_has_one_block_a_processor(bits, monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    torch.manual_seed(0)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, "layers": 1, "bits": bits}, device="cpu")
    gpu = RecordingGpu()
    gpu.capability = (8, 9)  # where teams do not follow the width
    step = CudaStep(parts, 64, gpu=gpu)
    assert {each.blocks_per_processor for each in step.tunings.values()} == {1}
    assert (step._plans[0]["gate_up"].variant.teams, step.adapted._plans[0]["gate_up"].variant.teams) == (2, 1)
    step.tune({"gate_up": Tuning(4, 2, 3, 3)})
    assert (step._plans[0]["gate_up"].variant.teams, step.adapted._plans[0]["gate_up"].variant.teams) == (3, 3)


def test_what_the_step_cannot_take_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(cuda_step, "GraphRecorder", Recorder)
    torch.manual_seed(0)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, "layers": 1}, device="cpu")
    other = {"lm_head": (torch.nn.Linear(4, 4), torch.zeros(2, 4), torch.zeros(4, 2))}
    given = adapter_parts(parts, 1, rank=MOST_RANK // 2 + 1, roles=("o",))
    step = CudaStep(parts, 64, gpu=RecordingGpu())
    with pytest.raises(BadCheckpoint, match="no linear layer of a block"):
        CudaAdapter([(other, 1.0)], step.adaptable, step.weights.layers)
    with pytest.raises(BadCheckpoint, match="Choose fewer"):
        CudaAdapter([(given, 1.0), (given, 1.0)], step.adaptable, step.weights.layers)
    assert len(adaptable_layers(parts)) == 7


@on_gpu
@pytest.mark.parametrize(
    ("change", "roles"),
    [
        ({}, ("qkv", "o", "gate_up", "down")),
        ({"layers": 3}, ("gate_up", "o")),
        ({"bits": 8, "sym": False, "bias": True}, ("qkv", "o", "gate_up", "down")),
        ({"head_dim": 128, "heads": 4, "kv_heads": 4, "qk_norm": True}, ("qkv",)),
        ({"group_size": 32}, ("gate_up",)),
        ({"window": 40}, ("o", "down")),
    ],
    ids=str,
)
def test_the_step_and_the_prompt_give_the_logits_of_plain_pytorch(gpu, change, roles):
    torch.manual_seed(1)
    parts = random_models.random_models(**{**SMALL, "group_size": 64, **change})
    ids = torch.randint(0, SMALL["vocabulary"], (230,)).tolist()
    given = [(adapter_parts(parts, 1, 16, roles), 1.0), (adapter_parts(parts, 2, 5, roles), 1.0)]
    with torch.inference_mode():
        without = random_models.plain_logits(parts, ids)
        wanted = wanted_logits(parts, ids, [each for each, _weight in given])
        step = CudaStep(parts, 256, gpu=gpu)
        adapter = CudaAdapter(given, step.adaptable, step.weights.layers)
        memory = PagedMemory(step.pages)
        step.sequences.use(memory, len(ids))
        found = []
        for start, end in ((0, 110), (110, 190), (190, 200)):  # by dense weights, and by packed ones
            step.prefill(ids[start:end], start, adapter=adapter)
            found.append((end - 1, step.prompt_logits.clone()))
        for at in range(200, 230):
            put(step, ids[at], at)
            step.step_rows(1, False, {0: adapter})
            found.append((at, step.sequences.logits[:1].clone()))
        for at, logits in found:
            assert error(logits[0], wanted[at]) < 1e-2, at
        assert error(without[-1], wanted[-1]) > 0.1


@on_gpu
def test_rows_with_different_adapters_are_each_as_alone(gpu):
    torch.manual_seed(2)
    parts = random_models.random_models(**{**SMALL, "group_size": 64})
    roles = (("qkv", "o", "gate_up", "down"), ("qkv",), ("gate_up", "down"), ("o",))
    given = [
        adapter_parts(parts, seed, rank, which) for seed, (rank, which) in enumerate(zip((16, 8, 40, 3), roles, strict=True))
    ]
    chosen = [0, 1, 2, 3, None, 0, 1, 2]
    lengths = [5, 70, 100, 33, 64, 17, 2, 90]
    with torch.inference_mode():
        texts = [torch.randint(0, SMALL["vocabulary"], (each + 6,)).tolist() for each in lengths]
        wanted = [
            wanted_logits(parts, text, [given[at]] if at is not None else []) for text, at in zip(texts, chosen, strict=True)
        ]
        step = CudaStep(parts, 256, parallel=8, gpu=gpu)
        made = [CudaAdapter([(each, 1.0)], step.adaptable, step.weights.layers) for each in given]
        adapters = [None if at is None else made[at] for at in chosen]

        def begin(rows):
            memories = [PagedMemory(step.pages) for _ in rows]
            for row, (source, memory) in enumerate(zip(rows, memories, strict=True)):
                step.sequences.use(memory, lengths[source] + 6, row)
                step.prefill(texts[source][: lengths[source]], 0, row, adapters[source])
            return memories

        def steps(rows):
            kept, found = begin(rows), []
            for at in range(6):
                for row, source in enumerate(rows):
                    step.sequences.ids[row], step.sequences.positions[row] = (
                        texts[source][lengths[source] + at],
                        lengths[source] + at,
                    )
                step.step_rows(len(rows), False, {row: adapters[source] for row, source in enumerate(rows)})
                found.append(step.sequences.logits[: len(rows)].clone())
            del kept
            return found

        together = steps(range(8))
        for at, logits in enumerate(together):
            for row, length in enumerate(lengths):
                assert error(logits[row], wanted[row][length + at]) < 1e-2, (row, at)
        for row in (0, 2, 3):
            for beside in (1, 4):  # in another row, beside another one
                pair = steps([beside, row])
                apart = max(error(two[1], eight[row]) for two, eight in zip(pair, together, strict=True))
                assert apart < 2e-3, (row, beside, apart)  # other kernels
            alone = steps([row])
            for at, logits in enumerate(alone):
                assert error(logits[0], wanted[row][lengths[row] + at]) < 1e-2
                assert int(logits[0].argmax()) == int(together[at][row].argmax())


@on_gpu
@pytest.mark.parametrize(
    ("k", "n", "rank", "tuning"),
    [
        (736, 400, 5, Tuning(4, 2, 3)),  # no multiples of a chunk and a tile
        (4096, 512, 64, Tuning(8, 4, 3, 1, 1)),
        (4096, 4096, 40, Tuning(2, 2, 3, 4)),  # blocks of several tiles take several turns
        (4096, 16384, 100, Tuning(16, 4, 6, 1, 1000)),  # blocks that make t begin late: others make it themselves
        (14336, 4096, 64, Tuning(16, 2, 3, 1, 2)),
        (736, 64, 20, Tuning(4, 2, 3)),  # blocks make several of t
    ],
)  # fmt: skip
def test_a_product_with_an_adapter_inside_is_right_whichever_blocks_run_together(gpu, k, n, rank, tuning):
    torch.manual_seed(k + n)
    widths = (n // 2, n // 4, n // 4)
    layers = [random_models.random_layer(k, width, 4, 32, sym=True, rows=None, bias=True) for width in widths]
    wanted_weight = [each.dequantize(torch.float64) for each in layers]
    packing = packing_of(layers)
    ranks = (rank, 0, rank - 3)
    a = torch.randn(sum(ranks), k, device="cuda").double() / k**0.5
    b = [torch.randn(width, own, device="cuda").double() for width, own in zip(widths, ranks, strict=True)]
    found = gemv.variant(packing, k, "PLAIN", False, tuning, gpu.shared_limit_bytes, adapted=2)
    gpu.add_missing([found], [packing])
    weight = repack(gpu, layers, packing)
    x = torch.randn(k, device="cuda").half()
    staged = torch.zeros(weight.padded, dtype=torch.float16, device="cuda")
    staged[weight.permutation.long()] = x
    inner = torch.zeros(sum(ranks), weight.padded, dtype=torch.float16, device="cuda")
    inner[:, weight.permutation.long()] = a.half()
    outer = torch.zeros(n, -(-rank // 8) * 8, dtype=torch.float16, device="cuda")
    begin = 0
    for each in b:
        outer[begin : begin + len(each), : each.shape[1]] = each.half()
        begin += len(each)
    made = Matrices(inner, outer, torch.zeros(0), ranks, 0.5)
    entries = torch.frombuffer(bytearray(made.entry(widths) + bytes(ENTRY_BYTES)), dtype=torch.uint8).cuda()
    wanted, first = [], 0
    for dense, own, each, layer in zip(wanted_weight, ranks, b, layers, strict=True):
        t = a[first : first + own].half().double() @ x.double()
        wanted.append(dense @ x.double() + layer.bias.double() + 0.5 * each.half().double() @ t)
        first += own
    plan = gemv.Plan.of(gpu, weight, "PLAIN", False, tuning, adapted=2)
    results = []
    for _ in range(3):
        t = torch.full((sum(ranks) + 3,), -1, dtype=torch.int32, device="cuda")
        out = torch.full((n,), torch.nan, dtype=torch.float16, device="cuda")
        gemv.launch(gpu, weight, plan, x=staged, out=out, inside=gemv.Inside(entries, t))
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert error(results[0], torch.cat(wanted)) < 1e-3
