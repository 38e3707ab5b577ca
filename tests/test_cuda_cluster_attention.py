"""Attention of one token by clusters of blocks, against float64 and the kernel without clusters. Skipped before Hopper."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gptq_webui.gptq.cuda import attention
from gptq_webui.gptq.cuda.attention import AttentionWork, attend, gather_pages, rope_rows
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_arguments import ATTENTION_HEADS
from gptq_webui.gptq.cuda.kernel_source import ClusterAttentionVariant, KvFormat
from gptq_webui.gptq.cuda.kv_pages import Pages

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with clusters of blocks"
)
FORMATS = [KvFormat(each, q8) for each, q8 in itertools.product((32, 64, 96, 128), (False, True))]
BLOCKS = (2, 3, 4, 5, 6, 8)
LENGTHS = (0, 1, 40, 63, 64, 65, 127, 128, 129, 512, 600, 1000, 1023, 1024, 1025, 2049, 5000)
CONTEXT = 5056


@pytest.fixture(scope="module")
def gpu():
    made = Gpu(torch.device("cuda", 0))
    made.add([ClusterAttentionVariant(kv, each) for kv in FORMATS for each in BLOCKS], formats=FORMATS)
    return made


class Model:
    """What attention needs of one: two layers, whose second is computed."""

    def __init__(self, gpu, kv, kv_heads, group, window=0, normed=False, unturned=0):
        heads, dim, half = kv_heads * group, kv.head_dim, kv.head_dim // 2 - unturned // 2
        blocks = -(-group // ATTENTION_HEADS)
        self.gpu = gpu
        self.shape = SimpleNamespace(
            heads=heads, kv_heads=kv_heads, head_dim=dim, kv=kv, qkv_width=(heads + 2 * kv_heads) * dim, eps=1e-5,
            rotary_half=half, group_blocks=blocks, attention_blocks=kv_heads * blocks, max_pages=CONTEXT // 64,
            kv_layer_bytes=kv.token_bytes(kv_heads) * 64,
        )  # fmt: skip
        angles = torch.rand(CONTEXT, half, device="cuda") * 6
        norms = [(torch.rand(dim, device="cuda") + 0.5).half() if normed else None for _ in range(2)]
        order = torch.randperm(heads * dim, device="cuda").int()
        layer = SimpleNamespace(
            o=SimpleNamespace(padded=heads * dim, permutation=order), q_norm=norms[0], k_norm=norms[1], window=window
        )
        self.weights = SimpleNamespace(layers=[layer] * 2, cosines=angles.cos(), sines=angles.sin())
        self.pages = Pages(gpu.device, 2, kv_heads, kv)
        table = torch.tensor([self.pages.take() for _ in range(CONTEXT // 64)], dtype=torch.int64, device="cuda")
        self.sequences = SimpleNamespace(table=table[None], positions=torch.zeros(1, dtype=torch.int32, device="cuda"), rows=1)
        self.qkv = torch.randn(CONTEXT, self.shape.qkv_width, device="cuda").half() * 1.5
        rope_rows(gpu, self.shape, self.weights, 1, qkv=self.qkv.clone(), table=table, start=0)
        self.work = AttentionWork(gpu, self.shape, 1)

    def kept(self, tokens):
        """Keys and values in the pages."""
        both = torch.empty(2, self.shape.kv_heads, tokens, self.shape.head_dim, dtype=torch.float16, device="cuda")
        gather_pages(self.gpu, self.shape, 1, table=self.sequences.table[0], keys=both[0], values=both[1])
        return both

    def put(self, token, position):
        """Keep another token at a position."""
        qkv = self.qkv[token : token + 1].clone()
        rope_rows(self.gpu, self.shape, self.weights, 1, qkv=qkv, table=self.sequences.table[0], start=position)

    def attended(self, position, short=False):
        self.sequences.positions.fill_(position)
        out = torch.full((1, self.shape.heads * self.shape.head_dim), torch.nan, dtype=torch.float16, device="cuda")
        attend(
            self.gpu, self.shape, self.weights, 1, self.sequences, self.work, qkv=self.qkv[position : position + 1], out=out,
            short=short,
        )  # fmt: skip
        return out[0]

    def wanted(self, position):
        """In float64, as attended() orders it."""
        shape, layer = self.shape, self.weights.layers[1]

        def turned(x, norm):
            if norm is not None:
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.eps) * norm.double()
            c, s = self.weights.cosines[position].double(), self.weights.sines[position].double()
            a, b = x[:, : shape.rotary_half], x[:, shape.rotary_half : 2 * shape.rotary_half]
            return torch.cat([a * c - b * s, b * c + a * s, x[:, 2 * shape.rotary_half :]], -1)

        heads = self.qkv[position].double().view(-1, shape.head_dim)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads])
        first = max(0, position + 1 - layer.window) if layer.window else 0
        keys, values = self.kept(position + 1).double()[:, :, first:]
        keys[:, -1], values[:, -1] = turned(k, layer.k_norm), v
        q = turned(q, layer.q_norm).view(shape.kv_heads, -1, shape.head_dim)
        found = (q @ keys.mT / shape.head_dim**0.5).softmax(-1) @ values
        return torch.empty_like(found.flatten()).index_copy_(0, layer.o.permutation.long(), found.flatten())


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kv", FORMATS, ids=lambda each: each.name)
def test_clusters_attend_as_float64_and_keep_the_token_as_blocks_do(gpu, kv, blocks, monkeypatch):
    torch.manual_seed(7)
    monkeypatch.setattr(attention, "_CLUSTERS", (blocks,))
    shapes = [(8, 4, 0, False, 0), (3, 1, 100, True, 16), (2, 8, 0, True, 0), (1, 16, 600, False, 0), (2, 5, 1025, False, 32)]
    for kv_heads, group, window, normed, unturned in shapes:
        model = Model(gpu, kv, kv_heads, group, window, normed, unturned)
        assert attention.short_tokens(gpu, model.shape, 1) == blocks * 4 * 32 * 3
        for position in LENGTHS:  # longer ones than short_tokens, too
            plain = model.attended(position)
            kept = model.kept(position + 1)
            wanted = model.wanted(position)
            model.work.partial.fill_(torch.nan)
            model.put(position + 1, position)
            found = model.attended(position, short=True)
            of = (kv_heads, group, window, position)
            assert float((found.double() - wanted).norm() / wanted.norm()) < 3e-3, of
            assert float((found.double() - plain.double()).norm() / wanted.norm()) < 2e-3, of
            assert torch.equal(model.kept(position + 1), kept), of
            assert bool(model.work.partial.isnan().all()), of  # it was by clusters
            assert not bool(model.work.done.any()), of


@pytest.mark.parametrize("blocks", BLOCKS)
def test_clusters_give_the_same_bits_every_time(gpu, blocks, monkeypatch):
    torch.manual_seed(8)
    monkeypatch.setattr(attention, "_CLUSTERS", (blocks,))
    model = Model(gpu, KvFormat(128), 8, 4)
    for position in (129, 512, 1000, 1500, 2000):
        first = model.attended(position, short=True)
        assert all(torch.equal(model.attended(position, short=True), first) for _ in range(50))


@pytest.mark.parametrize(("rows", "blocks"), [(3, 8), (4, 6), (8, 3), (16, 2)])
def test_each_row_attends_to_its_own_pages_and_an_idle_one_is_left_alone(gpu, rows, blocks):
    torch.manual_seed(9)
    model = Model(gpu, KvFormat(128), 8, 4)
    tables = [model.sequences.table[0]]
    for row in range(1, rows):
        table = torch.tensor([model.pages.take() for _ in range(CONTEXT // 64)], dtype=torch.int64, device="cuda")
        rope_rows(gpu, model.shape, model.weights, 1, qkv=model.qkv.roll(row * 500, 0), table=table, start=0)
        tables.append(table)
    positions = torch.tensor([300, -1, 1000, 63, 64, 700, 0, 2000][:rows] * -(-rows // 8), dtype=torch.int32, device="cuda")
    sequences = SimpleNamespace(table=torch.stack(tables), positions=positions, rows=rows)
    qkv, work = model.qkv[:rows].clone(), AttentionWork(gpu, model.shape, rows)
    if gpu.processors == 132:
        assert attention._cluster(gpu, model.shape, rows).blocks == blocks
    elif attention.short_tokens(gpu, model.shape, rows) == 0:
        pytest.skip("on this GPU so many rows have no clusters")
    found = []
    for short in (False, True):
        out = torch.full((rows, 32 * 128), torch.nan, dtype=torch.float16, device="cuda")
        attend(gpu, model.shape, model.weights, 1, sequences, work, qkv=qkv, out=out, short=short)
        found.append(out.double())
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            assert bool(found[1][row].isnan().all())
        else:
            assert float((found[1][row] - found[0][row]).norm() / found[0][row].norm()) < 2e-3, row
