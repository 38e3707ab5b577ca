"""The kernels of what surrounds attention, in PyTorch, for emulated_gpu.py."""


def keep(k, v, keys, values, count, capacity, **_sizes):
    at = min(int(count), capacity - 1)
    keys[0, :, at].copy_(k[0, :, 0])
    values[0, :, at].copy_(v[0, :, 0])


def look_up(cosines, sines, position, cosines_out, sines_out, rows, width):
    row = int(position)
    assert 0 <= row < rows and width == cosines.shape[-1]
    cosines_out.view(-1).copy_(cosines[row])
    sines_out.view(-1).copy_(sines[row])


def gate_row(x, gate, out, n, width, stride):
    assert n == x.numel() == gate.numel() and width == gate.shape[-1] and stride >= width
    out.view(-1).copy_(x.reshape(-1).float() * gate.reshape(-1).float().sigmoid().to(x.dtype).float())


def _called(kernel):
    return lambda _name, _variant, a: kernel(**vars(a))


KERNELS = {
    "KEEP": _called(keep), "LOOK_UP": _called(look_up), "GATE_ROW": _called(gate_row),
}  # fmt: skip
