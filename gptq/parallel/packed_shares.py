"""The share of a packed layer: some of its outputs, or some of its inputs, with the integers, zeros and scales of the file.

Nothing is rounded: the shares' dense weights are, bit for bit, the rows or columns of the layer's. Outputs are columns of
qweight and scales. Inputs are rows of qweight, several to a word: a share that begins inside of a word is packed again. With
act-order the inputs of a share belong to groups in any order and number: it keeps the scales of the groups that it needs.
"""

import torch
from torch import Tensor

from ...core.errors import BadCheckpoint
from .. import bit_packing
from ..gptq_linear import GPTQLinear
from ..packed_quantizer import PackedLayer
from .shares import Span, spans
from .tensor_files import TensorFiles

_WORD_VALUES = 32  # of them fill whole words at every width
_EVEN_INPUTS = 16  # groups of so many inputs, or several times as many, are read by the kernels for GPUs
_PACKED_COLUMNS = 1024  # at once: packing takes eight bytes for a value

Pick = Span | Tensor  # numbers in a row, or int64 [n], in any order


def by_outputs(files: TensorFiles, name: str, layer: PackedLayer, picks: list[Pick]) -> GPTQLinear:
    """The layer with the picked outputs alone, one pick after the other. Its inputs are all of them."""
    qweight = torch.cat([_columns(files, f"{name}.qweight", each) for each in picks], 1)
    scales = torch.cat([_columns(files, f"{name}.scales", each) for each in picks], 1)
    zeros = torch.cat([_zeros(files, name, layer, each) for each in picks], 1)
    bias = None
    if layer.has_bias:
        bias = torch.cat([_entries(files, f"{name}.bias", each) for each in picks])
    return _linear(qweight, zeros, scales, g_idx_of(files, name, layer), layer, layer.group_size, bias)


def by_inputs(files: TensorFiles, name: str, layer: PackedLayer, pick: Pick, *, bias: bool) -> GPTQLinear:
    """The layer with the picked inputs alone: the sum over all ranks is the layer. `bias`: this rank adds it."""
    groups = g_idx_of(files, name, layer)
    groups = (groups[pick.start : pick.end] if isinstance(pick, Span) else groups[pick]).long()
    if isinstance(pick, Span):
        first = pick.start // _WORD_VALUES * _WORD_VALUES
        words = files.rows(f"{name}.qweight", Span(first * layer.bits // 32, bit_packing.packed_length(pick.end, layer.bits)))
        if first < pick.start:
            words = _repacked(words, layer.bits, pick.end - first, torch.arange(pick.start - first, pick.end - first))
    else:
        words = _repacked(files.whole(f"{name}.qweight"), layer.bits, layer.in_features, pick)
    used, own_groups = groups.unique(return_inverse=True)
    scales = files.whole(f"{name}.scales")[used]
    zeros = _zeros(files, name, layer, Span(0, layer.out_features))[used]
    own_bias = files.whole(f"{name}.bias") if bias and layer.has_bias else None
    return _linear(words, zeros, scales, own_groups, layer, layer.group_size, own_bias)


def with_even_groups(layer: GPTQLinear) -> tuple[GPTQLinear, Tensor] | None:
    """(a layer whose groups all have as many inputs, in order; int64 [its inputs]: which of the given layer's inputs each is).

    The kernels for GPUs read no others. Groups are filled up with weights for an input that is always zero, whose number is
    one past the last. None for a layer that has such groups already.
    """
    groups, count = layer.g_idx.long(), layer.scales.shape[0]
    size = layer.in_features if layer.group_size == -1 else layer.group_size
    order = groups.argsort(stable=True)
    if torch.equal(groups[order], torch.arange(layer.in_features, device=groups.device) // size):
        return None
    rows = torch.bincount(groups, minlength=count)
    size = -(-int(rows.max()) // _EVEN_INPUTS) * _EVEN_INPUTS
    within = torch.arange(layer.in_features, device=groups.device) - (rows.cumsum(0) - rows)[groups[order]]
    sources = torch.full((count * size,), layer.in_features, dtype=torch.int64, device=groups.device)
    sources[groups[order] * size + within] = order
    padded = torch.cat([torch.arange(layer.in_features, device=groups.device), groups.new_zeros(1)])  # any weight does for a zero
    words = _repacked(layer.qweight, layer.bits, layer.in_features, padded[sources])
    zeros = bit_packing.true_zeros(layer.qzeros, layer.bits, layer.out_features, layer.checkpoint_format)
    even = bit_packing.default_g_idx(count * size, size, groups.device)
    made = _made(words, zeros, layer.scales.data, even, layer.bits, size if count > 1 else -1, layer.bias)
    return made, sources


def g_idx_of(files: TensorFiles, name: str, layer: PackedLayer) -> Tensor:
    """The group of each input, int32 [K]. Raises BadCheckpoint for one that names a group there is none of."""
    if layer.has_g_idx:
        found = files.whole(f"{name}.g_idx").int()
        low, high = (int(each) for each in found.aminmax())
        if low < 0 or high >= layer.groups:
            raise BadCheckpoint(
                f"g_idx of {name} names group {high if low >= 0 else low}, but the layer has the groups 0 to {layer.groups - 1}: "
                "the file is damaged. Download the model again."
            )
        if layer.act_order or bit_packing.g_idx_is_possible(found, layer.groups):
            return found
    return bit_packing.default_g_idx(layer.in_features, layer.group_size, files.device)


def inputs_of_ranks(g_idx: Tensor, groups: int, ranks: int) -> list[Pick]:
    """The inputs of each rank for a layer whose inputs may be in any order: whole groups, as far as there are enough.

    In act-order they come sorted by group, so the shares have none; what computes those inputs must give them in this order.
    """
    count = g_idx.numel()
    even = count // groups if groups > 1 and count % groups == 0 else 0
    unit = even if groups >= ranks and even else _WORD_VALUES if count >= _WORD_VALUES * ranks else 1
    cut = spans(count, ranks, unit)
    if bit_packing.g_idx_is_sorted(g_idx):
        return list(cut)
    order = g_idx.long().argsort(stable=True)
    return [order[each.start : each.end] for each in cut]


def _linear(
    qweight: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, layer: PackedLayer, group_size: int, bias: Tensor | None
) -> GPTQLinear:
    """`zeros` are the true ones, uint8 [G, N]; `groups` [K] name rows of zeros and scales."""
    count = groups.numel()
    size = _group_size(groups, scales.shape[0], group_size)
    made = bit_packing.group_count(count, size)
    if made > scales.shape[0]:  # groups that no input belongs to
        zeros, scales = (torch.cat([each, each[-1:].expand(made - each.shape[0], -1)]) for each in (zeros, scales))
    return _made(qweight, zeros, scales, groups, layer.bits, size, bias)


def _made(
    qweight: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int, size: int, bias: Tensor | None
) -> GPTQLinear:
    shape = groups.numel(), scales.shape[1]
    linear = GPTQLinear(*shape, bits, size, checkpoint_format="gptq_v2", bias=bias is not None, device="meta")
    tensors = {
        "qweight": qweight,
        "qzeros": bit_packing.pack_columns(zeros, bits),
        "scales": scales,
        "g_idx": groups.int(),
        "bias": bias,
    }
    for part, tensor in tensors.items():
        if tensor is not None:
            setattr(linear, part, torch.nn.Parameter(tensor.contiguous(), requires_grad=False))
    linear.prepare()
    return linear


def _group_size(groups: Tensor, count: int, claimed: int) -> int:
    """The size by which GPTQLinear counts at least `count` groups; that of the groups, where all are of one."""
    inputs = groups.numel()
    if count == 1:
        return -1
    if claimed > 0 and bit_packing.group_count(inputs, claimed) == count:
        return claimed
    if inputs % count == 0:
        return inputs // count
    return (inputs - 1) // (count - 1)


def _columns(files: TensorFiles, name: str, pick: Pick) -> Tensor:
    return files.columns(name, pick) if isinstance(pick, Span) else files.whole(name)[:, pick]


def _entries(files: TensorFiles, name: str, pick: Pick) -> Tensor:
    return files.rows(name, pick) if isinstance(pick, Span) else files.whole(name)[pick]


def _zeros(files: TensorFiles, name: str, layer: PackedLayer, pick: Pick) -> Tensor:
    """The true zeros of some outputs, uint8 [G, n]."""
    if not isinstance(pick, Span):
        return _zeros(files, name, layer, Span(0, layer.out_features))[:, pick]
    first = pick.start // _WORD_VALUES * _WORD_VALUES
    words = Span(first * layer.bits // 32, bit_packing.packed_length(pick.end, layer.bits))
    stored = files.columns(f"{name}.qzeros", words)
    found = bit_packing.true_zeros(stored, layer.bits, pick.end - first, layer.checkpoint_format)
    return found[:, pick.start - first :]


def _repacked(words: Tensor, bits: int, rows: int, kept: Tensor) -> Tensor:
    """Words of `rows` values down each column -> those of the rows `kept`."""
    parts = []
    for start in range(0, words.shape[1], _PACKED_COLUMNS):
        values = bit_packing.unpack(words[:, start : start + _PACKED_COLUMNS], bits, rows)
        parts.append(bit_packing.pack(values[kept.to(values.device)], bits))
    return torch.cat(parts, 1)
