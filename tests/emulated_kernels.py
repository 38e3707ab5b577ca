"""The kernels of single layers and of a recorded forward, in PyTorch, for emulated_gpu.py.

Each takes the name that is launched, the variant that was compiled under it, and the tensors and numbers of its arguments.
"""

import weakref

import emulated_attention
import emulated_sampler
import emulated_states
import torch
from emulated_attention import normed as _normed

from gptq_webui.gptq import bit_packing
from gptq_webui.gptq.cuda import activations
from gptq_webui.gptq.cuda.cuda_weights import fragment_order, step_order
from gptq_webui.gptq.cuda.natural_order import gates_and_ups

# -- packed weights: 4 bits or 8, in rows of tiles, inputs in fragment order ------------------------------------------


def _repack(name, _variant, a):
    bits = int(name.rpartition("_")[2])
    order = step_order(a.order).long()
    rows = torch.full((a.columns.numel(), order.numel()), 1 << (bits - 1))
    for at, each in enumerate(a.sources):
        if each is not None:
            own = (a.columns >= 0) & (a.columns >> 28 == at)
            values = bit_packing.unpack(each, bits, each.shape[0] * 32 // bits).T.long()[a.columns[own].long() & ((1 << 28) - 1)]
            rows[own] = torch.where(order >= 0, values[:, order.clamp(min=0)], 1 << (bits - 1))
    tiles = rows.view(a.tiles, 16, a.chunks, 64).transpose(1, 2).reshape(a.tiles, a.chunks, 1024)
    a.out.copy_((tiles if bits == 8 else tiles[..., ::2] | tiles[..., 1::2] << bits).to(torch.uint8))


def _dense(words, scales, unit_to_group):
    """fp32 [rows, padded]."""
    tiles, chunks, size = words.shape
    values = words.long()
    if size == 512:
        values = torch.stack([values & 15, values >> 4], -1)
    values = values.reshape(tiles, chunks, 16, 64).transpose(1, 2).reshape(tiles * 16, chunks * 64).float()
    assert scales.dim() == 3, "only symmetric weights"
    scale = _by_row(scales)
    sorted_at = fragment_order(None, chunks * 64, words.device).long()
    groups = scales.shape[1]
    if unit_to_group == 0:
        group = torch.zeros_like(sorted_at)
    else:
        unit = next(each for each in (64, 32, 16) if _last_group(chunks * 64, each, unit_to_group) == groups - 1)
        group = sorted_at // unit * unit_to_group >> 16
    return (values - (8 if size == 512 else 128)) * scale[:, group]


def _last_group(padded, unit, factor):
    return (padded // unit - 1) * factor >> 16


def _by_row(scales):
    """fp32 [tiles * 16, groups]."""
    tiles, groups, _pairs = scales.shape
    pairs = scales.contiguous().view(torch.float16).view(tiles, groups, 8, 2)  # rows r and r + 8
    return pairs.permute(0, 3, 2, 1).reshape(tiles * 16, groups).float()


_made = {}


def _weights(words, scales, unit_to_group):
    key = words.data_ptr(), tuple(words.shape), scales.data_ptr()
    found = _made.get(key)
    if found is None or found[0]() is None or found[0]() is not words:
        found = _made[key] = weakref.ref(words), _dense(words, scales, unit_to_group)
    return found[1]


def _unpack(_name, _variant, a):
    rows = slice(a.first_tile, a.first_tile + a.tiles)
    a.out.copy_(_dense(a.weights[rows], a.scales[rows], a.unit_to_group))


# -- norms ------------------------------------------------------------------------------------------------------------


def _sum_of_choices(y, weights, bias, chosen, experts):
    if bias is not None:
        y = y + bias[chosen.reshape(-1).clamp(max=experts - 1)].view(y.shape)
    return (y * weights.float()[..., None]).sum(-2)


def _row_norm(name, _variant, a):
    assert a.k % 8 == 0 and (a.k <= 8192 or "_wide" in name)
    x = a.x.reshape(-1, a.k)
    more = None
    if a.inner_weight is not None:
        more = _normed(a.addend.reshape(-1, a.k), a.inner_weight, None, a.inner_eps, a.inner_offset, False).to(x.dtype)
    elif a.y is not None:
        more = _sum_of_choices(a.y.view(1, a.choices, a.k), a.choice_weights.view(1, -1), a.choice_bias, a.chosen, a.experts)
        more = more.to(x.dtype)
    elif a.addend is not None:
        more = a.addend.reshape(-1, a.k)
    if more is not None:
        x = (x.float() + more.float()).to(x.dtype)
        a.sum.view(-1, a.k).copy_(x)
    if a.weight is not None:
        a.out.view(-1, a.k).copy_(_normed(x, a.weight, a.bias, a.eps, a.offset, a.centred))


# -- products ---------------------------------------------------------------------------------------------------------


def _inputs(x, order, k, chunks):
    """Of rows in the model's order, those of the weight: [rows, padded]."""
    order = fragment_order(None, k, x.device).long() if order is None else order.long() & 0xFFFF
    order = torch.where(order < 0, k, order)
    return torch.nn.functional.pad(x.float(), (0, 1))[:, order]


def _given(y, epilogue, activation):
    if epilogue.startswith("GATED"):
        gate, up = gates_and_ups(y)
        return activations.apply(activation, gate) * up
    return activations.apply(activation, y) if epilogue.startswith("ACTIVE") else y


def _gemv(_name, variant, a):
    x = a.x.view(1, -1)
    if a.addend is not None:
        more = a.addend.view(1, -1)
        if a.also is not None:
            more = (more.float() + a.also.view(1, -1).float()).to(x.dtype)
        if a.inner is not None:
            more = _normed(more, a.inner, None, a.inner_eps, a.inner_offset, False).to(x.dtype)
        x = (x.float() + more.float()).to(x.dtype)
        a.sum.view(1, -1).copy_(x)
    if variant.norm:
        x = _normed(x, a.norm, a.norm_bias, a.eps, a.offset, a.centred).to(x.dtype)
    assert variant.input.startswith("ORDERED") == (a.order is not None) and variant.input != "FRAGMENTS"
    assert (x.dtype == torch.bfloat16) == (variant.input.endswith("BFLOAT")) or variant.norm
    y = _inputs(x, a.order, a.k, a.chunks) @ _weights(a.weights, a.scales, a.unit_to_group).T
    if a.bias is not None:
        y = y + a.bias.float()
    a.out.view(-1).copy_(_given(y[:, : a.n], variant.epilogue, a.activation).view(-1))


def _of_expert(a, expert):
    own = slice(expert * a.tiles, (expert + 1) * a.tiles)
    return _dense(a.weights[own], a.scales[own], a.unit_to_group)


def _order_of_expert(a, expert):
    return None if a.order is None else a.order[expert if a.order_length else 0]


def _expert_gemv(_name, variant, a):
    chosen = a.chosen.view(-1).clamp(max=a.experts - 1).tolist()
    x = a.x.view(-1, a.k)
    for at, expert in enumerate(chosen):
        own = _inputs(x[at // a.share][None], _order_of_expert(a, expert), a.k, a.chunks)
        a.out[at] = _given((own @ _of_expert(a, expert).T)[:, : a.n], variant.epilogue, a.activation).view(-1)


def _expert_sum(_name, _variant, a):
    total = 0
    for at, expert in enumerate(a.chosen.view(-1).clamp(max=a.experts - 1).tolist()):
        own = _inputs(a.x.view(-1, a.k)[at][None], _order_of_expert(a, expert), a.k, a.chunks)
        y = (own @ _of_expert(a, expert).T)[0, : a.n]
        total = total + (y if a.bias is None else y + a.bias[expert]) * a.choice_weights.view(-1)[at].float()
    a.out.view(-1).copy_(total)


def _combine(_name, _variant, a):
    y = a.y.view(-1, a.choices, a.n)
    a.out.view(-1, a.n).copy_(_sum_of_choices(y, a.weights.view(-1, a.choices), a.bias, a.chosen, a.experts))


def _clamped_gate(_name, _variant, a):
    y = a.y.float()
    if a.bias is not None:
        y = y + a.bias[a.chosen.clamp(max=a.experts - 1)]
    gate, up = y[:, ::2].clamp(max=a.limit), y[:, 1::2].clamp(-a.limit, a.limit)
    a.out.copy_((up + 1) * gate * torch.sigmoid(gate * a.alpha))


def _route(_name, _variant, a):
    x = a.x.view(-1, a.k)
    assert a.chosen.shape[0] == x.shape[0] and (x.shape[0] == 1 or "_rows" in _name)
    if a.norm is not None:
        if a.addend is not None:
            x = (x.float() + a.addend.view(1, -1).float()).to(x.dtype)
            a.sum.view(1, -1).copy_(x)
        x = _normed(x, a.norm, a.norm_bias, a.eps, a.offset, a.centred).to(x.dtype)
        a.normed.view(1, -1).copy_(x)
    logits = x.float() @ a.weights.float().T
    logits = logits if a.bias is None else logits + a.bias.float()
    logits = logits if a.wide else logits.to(a.x.dtype).float()
    probabilities = logits.softmax(-1)
    a.all.copy_(probabilities if a.probabilities else logits)
    scores, chosen = probabilities.topk(a.choices, -1)
    scores = scores / scores.sum(-1, keepdim=True) if a.shared else scores
    a.scores[:, : a.choices].copy_(scores * a.scale)
    a.chosen[:, : a.choices].copy_(chosen)
    if a.open is not None:
        a.scores[:, a.choices :].copy_((x.float() @ a.open.view(-1, 1).float()).to(a.x.dtype).float().sigmoid())


def _small_batch(_name, variant, a):
    assert (
        variant.epilogue == ("BFLOAT" if a.out.dtype == torch.bfloat16 else "PLAIN")
        and a.residual is None
        and a.rows <= variant.columns * 8
        and a.x.is_contiguous()
    )
    assert a.out.is_contiguous() and a.out.shape == (a.rows, a.n) and a.x.shape == (a.rows, a.chunks * 64)
    y = a.x.float() @ _weights(a.weights, a.scales, a.unit_to_group).T
    y = y if a.powers is None or variant.epilogue != "BFLOAT" else y * a.powers[: a.rows, None]
    a.out.copy_((y if a.bias is None else y + a.bias.float())[:, : a.n])


# -- experts of a prompt ----------------------------------------------------------------------------------------------


def _group(_name, _variant, a):
    chosen = a.chosen.clamp(max=a.experts - 1)
    rows = chosen.argsort(stable=True)
    a.sources.copy_(rows // a.per)
    a.sorted.copy_(chosen[rows])
    a.row_of[rows] = torch.arange(a.total, dtype=torch.int32)
    blocks, first = [], 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=a.experts).tolist()):
        blocks += [(expert, first + at, min(a.rows, count - at), 0) for at in range(0, count, a.rows)]
        first += count
    assert a.table.numel() >= 4 + 4 * len(blocks)
    a.table[0] = len(blocks)
    a.table[4 : 4 + 4 * len(blocks)] = torch.tensor(blocks, dtype=torch.int32).view(-1)


def _grouped(_name, variant, a):
    gates = variant.epilogue == "SILU"
    assert a.turned == gates and variant.grouped
    for expert, first, rows, _zero in a.table[4 : 4 + 4 * int(a.table[0])].view(-1, 4).tolist():
        assert 0 < rows <= variant.columns * 8
        own = slice(first, first + rows)
        x = a.x[own] if a.sources is None else a.x[a.sources[own].long()]
        y = (x.float() @ _of_expert(a, expert).T)[:, : a.n]
        if gates:
            gate, up = gates_and_ups(y)
            y = (torch.nn.functional.silu(gate) * up)[:, fragment_order(None, a.n // 2, y.device).long()]
        a.out[own] = y.half()


def _order_inputs(_name, _variant, a):
    x = a.x if a.sources is None else a.x[a.sources.long()]
    order = a.order.long() & 0xFFFF
    order = order[0].expand(x.shape[0], -1) if a.sorted is None else order[a.sorted]
    x = x.float()
    if a.powers is not None:
        exponents = (torch.frexp(x.abs().amax(1)).exponent - 6).clamp(-126, 122)
        a.powers.copy_(torch.ldexp(torch.ones_like(a.powers), exponents))
        x = x / a.powers[:, None]
    a.out.copy_(torch.nn.functional.pad(x.clamp(-65504, 65504), (0, 1)).gather(1, order))


def _gate_rows(_name, _variant, a):
    y = a.y.float() if a.powers is None else a.y.float() * a.powers[:, None]
    y = y if a.bias is None else y + a.bias.float()
    gate, up = gates_and_ups(y[:, : 2 * a.inner])
    a.out.copy_(activations.apply(a.activation, gate) * up)


def _combine_grouped(_name, _variant, a):
    y = a.y.float()[a.row_of.long()].view(-1, a.choices, a.n)
    a.out.view(-1, a.n).copy_(_sum_of_choices(y, a.weights.view(-1, a.choices), a.bias, a.chosen, a.experts))


KERNELS = {
    "GROUP": _group, "GROUPED": _grouped, "COMBINE_GROUPED": _combine_grouped, "ORDER_INPUTS": _order_inputs,
    "GATE_ROWS": _gate_rows,
    "REPACK": _repack, "UNPACK": _unpack, "SMALL_BATCH": _small_batch, "GEMV": _gemv, "EXPERT_GEMV": _expert_gemv,
    "EXPERT_AHEAD": _expert_gemv, "EXPERT_SUM": _expert_sum, "COMBINE": _combine, "CLAMPED_GATE": _clamped_gate,
    "ROUTE": _route, "ROW_NORM": _row_norm,
    **emulated_attention.KERNELS, **emulated_states.KERNELS, **emulated_sampler.KERNELS,
}  # fmt: skip
