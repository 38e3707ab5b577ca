"""Rotations and attention of a recorded forward in PyTorch, for emulated_gpu.py."""

from types import SimpleNamespace

import torch


def normed(x, weight, bias, eps, offset, centred):
    x = x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return y if bias is None else y + bias.float()


def _turned(x, cosines, sines, kind, rotated, angles, norm, eps, offset):
    """[heads, D] in the type of x."""
    wide = x.float()
    if norm is not None:
        wide = normed(wide, norm, None, eps, offset, False).to(x.dtype).float()
    cosines, sines = cosines.reshape(-1).float(), sines.reshape(-1).float()
    half, at, out = rotated // 2, torch.arange(rotated // 2), wide.clone()
    first, second = (at, at + half) if kind == 0 else (2 * at, 2 * at + 1)
    angle = 2 * at if kind == 2 else at
    other = (at + half) % angles if kind == 0 else 2 * at + 1 if kind == 2 else at
    to_first, to_second = (at, at + half) if kind == 3 else (first, second)
    p, q = wide[:, first], wide[:, second]
    out[:, to_first] = p * cosines[angle] - q * sines[angle]
    out[:, to_second] = q * cosines[other] + p * sines[other]
    return out.to(x.dtype)


def _turn_rows(_name, _variant, a):
    assert a.q.shape[0] == 1
    for x, out in ((a.q, a.q_out), (a.k, a.k_out)):
        for row in range(x.shape[2]):
            angles = a.cosines[0, row], a.sines[0, row]
            out[0, row].copy_(_turned(x[0, :, row], *angles, a.kind, a.rotated, a.angles, None, 0.0, 0.0))


def _rotate(_name, _variant, a):
    for x, norm, out in ((a.q, a.q_norm, a.q_out), (a.k, a.k_norm, a.k_out)):
        out[0, :, 0].copy_(_turned(x[0, :, 0], a.cosines, a.sines, a.kind, a.rotated, a.angles, norm, a.eps, a.offset))


def _decode(name, variant, a):
    if name.startswith("rows_of_"):
        for row in range(a.q.shape[0]):
            of_all = {"mask": a.mask} if a.mask is None or a.mask.shape[0] == 1 else {}
            one = {
                each: vars(a)[each][row : row + 1]
                for each in ("q", "keys", "values", "count", "out", "mask")
                if each not in of_all
            }
            _decode("", variant, SimpleNamespace(**{**vars(a), **one}))
        return
    before = min(int(a.count), a.shown - 1)
    q = a.q[0, :, 0]
    keys, values = a.keys, a.values
    if a.new_key is not None:
        new_key, new_value = a.new_key[0, :, 0], a.new_value[0, :, 0]
        if a.cosines is not None:
            turn = (a.cosines, a.sines, 0, a.rotated, a.angles)
            q = _turned(q, *turn, a.q_norm, a.norm_eps, a.norm_offset)
            new_key = _turned(new_key, *turn, a.k_norm, a.norm_eps, a.norm_offset)
        keys[0, :, before].copy_(new_key)
        values[0, :, before].copy_(new_value)
    else:
        assert a.cosines is None
    total = before + 1
    keys = keys[0, :, :total].float().repeat_interleave(a.group, 0)
    values = values[0, :, :total].float().repeat_interleave(a.group, 0)
    scores = torch.einsum("hd,htd->ht", q.float(), keys) * a.scale
    scores = a.cap * torch.tanh(scores / a.cap) if a.cap else scores
    if a.mask_kind:
        mask = a.mask[0, :, 0, :total]
        add = torch.where(mask, 0.0, -torch.inf) if a.mask_kind == 1 else mask.float()
        scores = scores + torch.where(add <= -30000, -torch.inf, add)
    if a.sinks is not None:
        scores = torch.cat([scores, a.sinks.float().view(-1, 1)], -1)
    weights = scores.softmax(-1)[:, :total]
    a.out[0, 0].copy_(torch.einsum("ht,htd->hd", weights, values))


def _prompt_attention(name, _variant, a):
    rows, keys = torch.arange(a.rows)[:, None] + a.first, torch.arange(a.keys)[None]
    sees = (keys <= rows) & ((keys > rows - a.window) if a.window else torch.ones_like(keys, dtype=torch.bool))
    mask = torch.where(a.mask, 0.0, -torch.inf) if a.mask_kind == 1 else a.mask.float()
    mask = torch.where(mask <= -30000, -torch.inf, mask)[0]
    if name.startswith("compare_mask"):
        assert mask.shape[0] == 1
        if not torch.equal(mask[0], torch.where(sees, 0.0, -torch.inf)):
            a.irregular.fill_(1)
        return
    assert all(each.stride(3) == 1 and each.stride(2) % 8 == 0 for each in (a.q, a.k, a.v))
    keys, values = (each[0].float().repeat_interleave(a.group, 0) for each in (a.k, a.v))
    scores = a.q[0].float() @ keys.transpose(1, 2) * a.scale
    scores = a.cap * torch.tanh(scores / a.cap) if a.cap else scores
    scores = scores + (mask if int(a.irregular) else torch.where(sees, 0.0, -torch.inf))
    if a.sinks is not None:
        scores = torch.cat([scores, a.sinks.float().view(-1, 1, 1).expand(-1, a.rows, 1)], -1)
    weights = scores.softmax(-1)[..., : a.keys].to(a.q.dtype).float()
    a.out[0].copy_((weights @ values).transpose(0, 1))


def _latent(name, variant, a):
    if name.startswith(("meet", "attend")):
        return  # all is done by the last of the three
    rank, fixed, turned, value = (int(each) for each in name.split("_")[-4:])
    before = min(int(a.count), a.capacity - 1)

    def turn(x):
        at = torch.arange(turned // 2)
        first, second = (at, at + turned // 2) if a.kind == 2 else (2 * at, 2 * at + 1)
        if a.kind == 0:
            cosines, sines = a.angles.reshape(-1, 2).unbind(-1)
        else:
            cosines, sines = a.angles.reshape(-1)[: turned // 2].float(), a.sines.reshape(-1)[: turned // 2].float()
        p, q = x[..., first], x[..., second]
        p, q = p * cosines - q * sines, q * cosines + p * sines
        return torch.stack([p, q], -1).flatten(-2) if a.kind == 0 else torch.cat([p, q], -1)

    kv = a.kv.view(-1).float()
    a.keys[0, 0, before].copy_(normed(kv[:rank], a.norm, None, a.eps, 0.0, False))
    a.turned_keys[0, 0, before].copy_(turn(kv[rank:]))
    latents, keys = a.keys[0, 0, : before + 1].float(), a.turned_keys[0, 0, : before + 1].float()
    q = a.q.view(a.heads, fixed + turned).float()
    matrices = a.matrices.view(a.heads, fixed + value, rank).float()
    met = torch.einsum("hf,hfr->hr", q[:, :fixed], matrices[:, :fixed])
    scores = (met @ latents.T + turn(q[:, fixed:]) @ keys.T) * a.scale * 0.6931471805599453
    read = scores.softmax(-1) @ latents
    a.out.view(a.heads, value).copy_(torch.einsum("hr,hvr->hv", read, matrices[:, fixed:]))


KERNELS = {
    "ROTATE": _rotate, "TURN_ROWS": _turn_rows, "DECODE": _decode, "LATENT": _latent, "PROMPT_ATTENTION": _prompt_attention,
}  # fmt: skip
