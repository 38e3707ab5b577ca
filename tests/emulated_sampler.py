"""The sampler (sample.cu) in PyTorch, for emulated_gpu.py: bias, penalties, temperature, top k, top p, min p, and the draw."""

import numpy as np
import torch

from gptq_webui.gptq.cuda.kernel_arguments import HOST_TOKENS, SAMPLE_PARAMS


def _mixed(a, b, c, d):
    a, b, c, d = (np.asarray(each, np.uint32) * np.uint32(1664525) + np.uint32(1013904223) for each in (a, b, c, d))
    for turn in range(2):
        a, b = a + b * d, b + c * a
        c = c + a * b
        d = d + b * c
        if turn == 0:
            a, b, c, d = (each ^ (each >> np.uint32(16)) for each in (a, b, c, d))
    return a


def _rows(view, rows):
    """A row of a matrix, or a number of a vector, as the rows from there on."""
    width = view.numel() if view.dim() else 0
    size, strides = ((rows, width), (width, 1)) if width else ((rows,), (1,))
    return view.as_strided(size, strides, view.storage_offset())


class _Params:
    def __init__(self, row):
        whole, real = row.contiguous().view(torch.int32).tolist(), row.contiguous().view(torch.float32).tolist()
        self._whole, self._real = whole, real

    def whole(self, name):
        return self._whole[SAMPLE_PARAMS.offset(name) // 4]

    def real(self, name):
        return self._real[SAMPLE_PARAMS.offset(name) // 4]


def sample(_name, _variant, a):
    rows = a.rows
    given = {name: _rows(getattr(a, name), rows) for name in vars(a) if isinstance(getattr(a, name), torch.Tensor)}
    for row in range(rows):
        if int(given["positions"][row]) >= 0:
            _sample_row({name: each[row : row + 1] for name, each in given.items()}, a.vocabulary, a.context)


def _sample_row(a, vocabulary, context):
    params, position = _Params(a["params"][0]), int(a["positions"])
    assert params.real("typical_p") >= 1 and params.real("top_n_sigma") == 0
    z = a["logits"][0].clone()
    if params.whole("biased"):
        z += a["bias"][0]
    penalty, seen, answered = params.real("repetition_penalty"), a["seen"][0] > 0, a["answered"][0].float()
    z = torch.where(seen, torch.where(z < 0, z * penalty, z / penalty), z)
    z = z - params.real("presence_penalty") * (answered > 0) - params.real("frequency_penalty") * answered
    if params.whole("masked"):
        bits = np.unpackbits(a["masks"][0].contiguous().numpy().view(np.uint8), bitorder="little")[:vocabulary]
        z = z.masked_fill(torch.from_numpy(bits) == 0, -torch.inf)
    if params.real("temperature"):
        z = _filtered(z / params.real("temperature"), params)
        seeds = [np.full(vocabulary, params.whole(name) & 0xFFFFFFFF, np.uint32) for name in ("seed_low", "seed_high")]
        words = _mixed(*seeds, np.full(vocabulary, position, np.uint32), np.arange(vocabulary, dtype=np.uint32))
        uniform = torch.from_numpy((words.astype(np.float64) + 0.5) / 2**32)
        z = z - (-uniform.log()).log()
    chosen = int(z.argmax())
    a["ids"].fill_(chosen)
    a["positions"].fill_(position + 1)
    a["host_tokens"][0, (position + 1) % HOST_TOKENS] = chosen
    if position + 1 < context:
        a["history"][0, position + 1] = chosen
        a["seen"][0, chosen] += 1
        a["answered"][0, chosen] += 1
        back = params.whole("repetition_range")
        if back > 0 and (left := position + 1 - back) >= 0:
            gone = int(a["history"][0, left])
            a["seen"][0, gone] -= 1
            a["answered"][0, gone] -= int(left >= int(a["answer_from"]))


def _filtered(z, params):
    order = z.argsort(descending=True, stable=True)
    kept = torch.ones_like(z, dtype=torch.bool)
    if top_k := params.whole("top_k"):
        kept &= z >= z[order[min(top_k, len(z)) - 1]]
    shares = z.masked_fill(~kept, -torch.inf).softmax(-1)
    before = shares[order].cumsum(-1) - shares[order]
    kept[order[before >= params.real("top_p")]] = False
    kept &= shares >= params.real("min_p") * shares.max()
    return z.masked_fill(~kept, -torch.inf)


KERNELS = {"SAMPLE": sample}
