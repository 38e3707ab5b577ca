"""The kernels of what surrounds attention and of layers that keep a state, in PyTorch, for emulated_gpu.py."""

import torch
from torch.nn import functional


def keep(k, v, keys, values, count, capacity, **_sizes):
    for row, each in enumerate(count.tolist()[: k.shape[0]]):
        keys[row, :, min(each, capacity - 1)].copy_(k[row, :, 0])
        values[row, :, min(each, capacity - 1)].copy_(v[row, :, 0])


def look_up(cosines, sines, position, cosines_out, sines_out, rows, width):
    row = int(position)
    assert 0 <= row < rows and width == cosines.shape[-1]
    cosines_out.view(-1).copy_(cosines[row])
    sines_out.view(-1).copy_(sines[row])


def gate_row(x, gate, out, n, width, stride):
    assert n == x.numel() == gate.numel() and width == gate.shape[-1] and stride >= width
    out.view(-1).copy_(x.reshape(-1).float() * gate.reshape(-1).float().sigmoid().to(x.dtype).float())


def delta_rule(q, k, v, z, b, a, taps, bias, kept, state, decay, dt_bias, norm, out, given, done, **n):
    """One token of a gated delta rule; what is kept is continued."""
    heads, dk, dv = state.shape[1:]
    group, keys = n["group"], n["key_heads"]
    assert heads == group * keys

    def parts(of, stride, count):
        return torch.stack([of[at * stride : at * stride + count] for at in range(keys)])

    rows = [parts(q, n["qk_stride"], dk), parts(k, n["qk_stride"], dk), parts(v, n["v_stride"], group * dv)]
    window = torch.cat([kept[0], torch.cat([each.reshape(-1) for each in rows])[:, None]], 1)[:, 1:]
    kept[0] = window
    inputs = functional.silu((window.float() * taps[:, 0].float()).sum(1) + (0 if bias is None else bias.float()))
    q, k, v = (
        each.view(-1, last) for each, last in zip(inputs.split([keys * dk, keys * dk, heads * dv]), (dk, dk, dv), strict=True)
    )
    q, k = (
        (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(group, 0)[:, :, None]
        for each in (q, k)
    )
    beta = parts(b, n["ba_stride"], group).reshape(-1).float().sigmoid()[:, None, None] * n["beta_scale"]
    step = functional.softplus(parts(a, n["ba_stride"], group).reshape(-1).float() + dt_bias)
    old = state[0] * (decay * step).exp()[:, None, None]
    state[0] = old + k * ((v[:, None] - (old * k).sum(1, keepdim=True)) * beta)
    y = (state[0] * q).sum(1) * dk**-0.5
    gate = parts(z, n["z_stride"], group * dv).reshape(heads, dv).float()
    y = norm.float() * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + n["eps"])
    out.copy_((y * (gate.sigmoid() if n["sigmoid"] else functional.silu(gate))).view(out.shape))


def scan_token(x, dt, taps, bias, kept, state, decay, dt_bias, through, done, out, groups, group, parts, least, most):
    """One token of a selective state space; what is kept is continued."""
    heads, dims, count = state.shape[1:]
    assert heads == groups * group and done.shape == (groups,) and parts >= 1
    kept[0] = torch.cat([kept[0], x[: kept.shape[1], None]], 1)[:, 1:]
    inputs = functional.silu((kept[0].float() * taps[:, 0].float()).sum(1) + (0 if bias is None else bias.float()))
    x, b, c = inputs.split([heads * dims, groups * count, groups * count])
    x = x.view(heads, dims, 1)
    b, c = (each.view(groups, 1, count).repeat_interleave(group, 0) for each in (b, c))
    dt = functional.softplus(dt[:heads].float() + dt_bias).clamp(least, most)[:, None, None]
    state[0] = state[0] * (dt * decay[:, None, None]).exp() + dt * b * x
    out.copy_(((state[0] * c).sum(-1) + x[..., 0] * through[:, None]).view(-1))


def gated_norm(x, gate, weight, out, width, norm_first, eps):
    """The gate of such a layer, and its norm."""
    gate = functional.silu(gate[: x.numel()].float())
    y = (x.float() if norm_first else x.float() * gate).view(-1, width)
    if weight is not None:
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = y.view(-1) * (1 if weight is None else weight.float())
    out.view(-1).copy_(y * gate if norm_first else y)


def _called(kernel):
    return lambda _name, _variant, a: kernel(**vars(a))


KERNELS = {
    "KEEP": _called(keep), "LOOK_UP": _called(look_up), "GATE_ROW": _called(gate_row), "DELTA": _called(delta_rule),
    "SCAN": _called(scan_token), "GATED_NORM": _called(gated_norm),
}  # fmt: skip
