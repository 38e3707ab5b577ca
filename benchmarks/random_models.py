"""Models of any shape with random packed weights, made on the GPU: for kernels, where no file is needed."""

import torch
from torch import nn

from gptq_webui.gptq.families.parts import LayerParts, ModelParts, Norm, Options, Rotary
from gptq_webui.gptq.gptq_linear import GPTQLinear

MISTRAL_7B = {"hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "layers": 32, "vocabulary": 32000}


class Angles(nn.Module):
    rope_type = "default"

    def __init__(self, head_dim: int, device: str) -> None:
        super().__init__()
        self.inv_freq = 1e6 ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.cat([positions[..., None] * self.inv_freq] * 2, -1)
        return angles.cos(), angles.sin()


def random_layer(
    k: int, n: int, bits: int, group_size: int, *, sym: bool, rows: torch.Tensor | None, bias: bool = False, device: str = "cuda"
) -> GPTQLinear:
    """`rows` int64 [K]: the act-order, a permutation that layers of one input share."""
    layer = GPTQLinear(k, n, bits, group_size, bias=bias, device=device)
    size = k if group_size == -1 else group_size
    groups = layer.scales.shape[0]
    layer.qweight.data = torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape, dtype=torch.int32, device=device)
    if sym:
        from gptq_webui.gptq import bit_packing

        stored = torch.full((groups, n), (1 << (bits - 1)) - 1, dtype=torch.int64, device=device)
        layer.qzeros.data = bit_packing.pack_columns(stored, bits)
    else:
        layer.qzeros.data = torch.randint(-(2**31), 2**31 - 1, layer.qzeros.shape, dtype=torch.int32, device=device)
    layer.scales.data = ((torch.rand(groups, n, device=device) + 0.5) * 4 / 2**bits / k**0.5).half()
    g_idx = torch.arange(k, device=device) // size
    layer.g_idx.data = (g_idx if rows is None else g_idx[rows.argsort()]).int()
    if bias:
        layer.bias = nn.Parameter(torch.randn(n, device=device).half() * 0.1, requires_grad=False)
    return layer


def random_models(
    *, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, layers: int, vocabulary: int,
    bits: int = 4, group_size: int = 128, act_order: bool = True, sym: bool = True, qk_norm: bool = False, bias: bool = False,
    window: int = 0, device: str = "cuda",
) -> ModelParts:  # fmt: skip
    def rows(k: int) -> torch.Tensor | None:
        return torch.randperm(k, device=device) if act_order else None

    def norm(n: int) -> Norm:
        return Norm((torch.rand(n, device=device) + 0.5).half(), None, 1e-5)

    def packed(k: int, widths: list[int], bias: bool = False) -> tuple[GPTQLinear, ...]:
        shared = rows(k)
        return tuple(random_layer(k, n, bits, group_size, sym=sym, rows=shared, bias=bias, device=device) for n in widths)

    made = []
    for _ in range(layers):
        made.append(
            LayerParts(
                attention_norm=norm(hidden),
                qkv=packed(hidden, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], bias),
                qkv_columns=None,
                q_norm=norm(head_dim) if qk_norm else None,
                k_norm=norm(head_dim) if qk_norm else None,
                o=packed(heads * head_dim, [hidden])[0],
                attended_norm=None,
                mlp_norm=norm(hidden),
                gate_up=packed(hidden, [inner, inner]),
                down=packed(inner, [hidden])[0],
                inner_norm=None,
                window=window,
            )
        )
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.float16)
    return ModelParts(
        embedding=torch.randn(vocabulary, hidden, device=device).half(),
        layers=tuple(made),
        norm=norm(hidden),
        head=head,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotaries=(Rotary(Angles(head_dim, device)),),
        rotary_dim=head_dim,
        options=Options(qk_norm="head" if qk_norm else ""),
    )


def plain_logits(parts: ModelParts, ids: list[int]) -> torch.Tensor:
    """The same forward in fp32 and plain PyTorch: logits [T, V]. Slow and simple."""

    def norm(x: torch.Tensor, one: Norm | None) -> torch.Tensor:
        return x if one is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + one.eps) * one.weight.float()

    def turned(x: torch.Tensor) -> torch.Tensor:  # [heads, T, D]
        a, b = x[..., : parts.rotary_dim].chunk(2, -1)
        c, s = cos[: len(ids)], sin[: len(ids)]
        return torch.cat([a * c - b * s, b * c + a * s, x[..., parts.rotary_dim :]], -1)

    cos, sin = parts.angles(len(ids))
    h = parts.embedding[torch.tensor(ids, device=parts.device)].float()
    at = torch.arange(len(ids), device=parts.device)
    for layer in parts.layers:
        x = norm(h, layer.attention_norm)
        q, k, v = (
            torch.cat([each(x) for each in layer.qkv], -1)
            .view(len(ids), -1, parts.head_dim)
            .transpose(0, 1)
            .split([parts.heads, parts.kv_heads, parts.kv_heads])
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        group = parts.heads // parts.kv_heads
        k, v = turned(k).repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = turned(q) @ k.mT / parts.head_dim**0.5
        hidden = at[None] > at[:, None]
        if layer.window:
            hidden |= at[None] <= at[:, None] - layer.window
        attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        h = h + layer.o(attended.transpose(0, 1).reshape(len(ids), -1))
        x = norm(h, layer.mlp_norm)
        both = torch.cat([each(x) for each in layer.gate_up], -1).chunk(2, -1)
        assert layer.down is not None  # no experts
        h = h + layer.down(nn.functional.silu(both[0]) * both[1])
    return nn.functional.linear(norm(h, parts.norm), parts.head.weight.float())  # type: ignore[arg-type]
