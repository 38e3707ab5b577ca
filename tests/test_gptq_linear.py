"""The packed layer against a float64 reference that shares no code with it.

`reference_weight` below reads the format with Python integers: one little-endian stream of bits
for each packed column (weights) or row (zeros), zero = (stored + 1) mod 2^bits in format gptq.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gptq_webui.core.errors import BadCheckpoint, BadQuantizeConfig
from gptq_webui.gptq.gptq_linear import GPTQLinear

K, N = 256, 96
TABLE = list(itertools.product((2, 3, 4, 8), (-1, 32, 64, 128), (False, True), (False, True), ("gptq", "gptq_v2")))


@dataclass
class File:
    """The tensors of one layer as a file holds them, made from random words without our packer."""

    bits: int
    group_size: int
    checkpoint_format: str
    qweight: np.ndarray  # int32 [K*bits/32, N]
    qzeros: np.ndarray  # int32 [G, N*bits/32]
    scales: np.ndarray  # float16 [G, N]
    g_idx: np.ndarray  # int32 [K]
    bias: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.g_idx), self.scales.shape[1]

    def layer(self, *, without: tuple[str, ...] = ()) -> GPTQLinear:
        layer = GPTQLinear(
            *self.shape, self.bits, self.group_size, checkpoint_format=self.checkpoint_format, bias=self.bias is not None
        )
        names = [name for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if name not in without]
        state = {name: torch.from_numpy(getattr(self, name)) for name in names if getattr(self, name) is not None}
        layer.load_state_dict(state, strict=not without)
        layer.prepare()
        return layer


def make_file(
    bits: int, group_size: int, act_order: bool, sym: bool, checkpoint_format: str, *, k: int = K, n: int = N, bias: bool = False
) -> File:
    rng = np.random.default_rng(abs(hash((bits, group_size, act_order, sym, checkpoint_format == "gptq", k, n))))
    groups = 1 if group_size == -1 else -(-k // group_size)
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (groups, n))
    stored = (zeros - 1) % 2**bits if checkpoint_format == "gptq" else zeros
    g_idx = np.zeros(k, np.int32) if group_size == -1 else (np.arange(k) // group_size).astype(np.int32)
    return File(
        bits,
        group_size,
        checkpoint_format,
        rng.integers(-(2**31), 2**31, (-(-k * bits // 32), n)).astype(np.int32),
        np.array([words_of(row.tolist(), bits) for row in stored], dtype=np.uint32).view(np.int32),
        (rng.random((groups, n)) * 0.02 + 0.001).astype(np.float16),
        rng.permutation(g_idx) if act_order else g_idx,
        rng.standard_normal(n).astype(np.float16) if bias else None,
    )


def words_of(values: list[int], bits: int) -> list[int]:
    """Values -> unsigned 32-bit words, low bits first."""
    stream = sum(value << (bits * at) for at, value in enumerate(values))
    return [(stream >> (32 * at)) & 0xFFFFFFFF for at in range(-(-len(values) * bits // 32))]


def values_of(words: list[int], bits: int, count: int) -> list[int]:
    """Signed 32-bit words -> `count` values, low bits first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
    return [(stream >> (bits * at)) & (2**bits - 1) for at in range(count)]


def reference_weight(file: File) -> np.ndarray:
    """float64 [K, N]."""
    k, n = file.shape
    offset = 1 if file.checkpoint_format == "gptq" else 0
    q = np.array([values_of(file.qweight[:, column].tolist(), file.bits, k) for column in range(n)]).T
    zeros = np.array([[(z + offset) % 2**file.bits for z in values_of(row.tolist(), file.bits, n)] for row in file.qzeros])
    return file.scales.astype(np.float64)[file.g_idx] * (q - zeros[file.g_idx])


def relative_error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


def check(file: File, layer: GPTQLinear, *, dtype: torch.dtype = torch.float32, limit: float = 1e-5) -> None:
    """One row, a few and many, against the reference."""
    weight = reference_weight(file)
    assert relative_error(layer.dequantize(), weight.T) < 1e-6
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 40):
        x = torch.randn(rows, file.shape[0], generator=generator).to(dtype)
        wanted = x.double().numpy() @ weight + (0 if file.bias is None else file.bias.astype(np.float64))
        found = layer(x)
        assert found.dtype == dtype
        assert relative_error(found, wanted) < limit, f"{rows} rows"


@pytest.mark.parametrize(("bits", "group_size", "act_order", "sym", "checkpoint_format"), TABLE)
def test_equals_the_reference(bits: int, group_size: int, act_order: bool, sym: bool, checkpoint_format: str) -> None:
    file = make_file(bits, group_size, act_order, sym, checkpoint_format)
    check(file, file.layer())


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_old_files_have_no_g_idx(bits: int) -> None:
    file = make_file(bits, 32, False, True, "gptq")
    check(file, file.layer(without=("g_idx",)))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("act_order", (False, True))
def test_the_last_group_may_be_short(bits: int, act_order: bool) -> None:
    file = make_file(bits, 128, act_order, False, "gptq", k=288, n=64)
    assert file.scales.shape[0] == 3
    check(file, file.layer())


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_odd_sizes(bits: int) -> None:
    file = make_file(bits, 32, True, False, "gptq_v2", k=104, n=40)
    check(file, file.layer())


def test_groups_of_unequal_size() -> None:
    file = make_file(4, 32, False, False, "gptq")
    file.g_idx = np.random.default_rng(0).integers(0, file.scales.shape[0], K).astype(np.int32)
    check(file, file.layer())


def test_symmetric_zeros_that_are_not_the_middle() -> None:
    file = make_file(8, 64, True, True, "gptq")
    file.qzeros = np.full_like(file.qzeros, 0x10101010)
    check(file, file.layer())


def test_wide_layers_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_webui.gptq.gptq_linear._LOW_BITS_CHUNK", 5000)
    monkeypatch.setattr("gptq_webui.gptq.gptq_linear._CHUNK", 9000)
    for file in (make_file(4, 32, True, True, "gptq", n=200), make_file(3, 64, True, False, "gptq", n=200, bias=True)):
        check(file, file.layer())


def test_bias_and_batch_dimensions() -> None:
    file = make_file(4, 32, True, False, "gptq", bias=True)
    layer = file.layer()
    check(file, layer)
    x = torch.randn(2, 3, 5, K)
    assert layer(x).shape == (2, 3, 5, N)
    torch.testing.assert_close(layer(x)[1, 2, 4], layer(x[1, 2, 4]), rtol=1e-4, atol=1e-4)
    assert layer(torch.empty(0, K)).shape == (0, N)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3), (torch.float64, 1e-14)])
def test_other_types(dtype: torch.dtype, limit: float) -> None:
    for file in (make_file(4, 32, True, True, "gptq", bias=True), make_file(8, -1, False, False, "gptq")):
        check(file, file.layer(), dtype=dtype, limit=limit)


def test_stands_in_for_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    file = make_file(4, 32, False, True, "gptq", bias=True)
    layer = file.layer()
    dense = Conv1D(N, K)
    dense.weight.data = layer.dequantize().T.contiguous()
    dense.bias.data = layer.bias.data.float()
    x = torch.randn(2, 7, K)
    assert layer.nf == dense.nf
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


def test_holds_the_tensors_of_the_file_as_parameters() -> None:
    file = make_file(3, 64, True, True, "gptq", bias=True)
    layer = file.layer()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert not any(each.requires_grad for each in parameters.values())
    assert not list(layer.named_buffers())
    layer(torch.randn(1, K))
    for name, value in layer.state_dict().items():
        assert np.array_equal(value.numpy(), getattr(file, name)), name


def test_made_on_meta_then_loaded() -> None:
    file = make_file(4, 32, True, True, "gptq")
    with torch.device("meta"):
        layer = GPTQLinear(K, N, 4, 32, bias=False)
    layer.prepare()  # nothing to learn yet, and no error
    state = {name: torch.from_numpy(getattr(file, name)) for name in ("qweight", "qzeros", "scales", "g_idx")}
    layer.load_state_dict(state, assign=True)
    check(file, layer)


def test_other_weights_may_be_loaded_later() -> None:
    first, second = make_file(4, 32, True, True, "gptq"), make_file(4, 32, False, False, "gptq")
    layer = first.layer()
    check(first, layer)
    layer.load_state_dict({name: torch.from_numpy(getattr(second, name)) for name in ("qweight", "qzeros", "scales", "g_idx")})
    check(second, layer)


def test_survives_offloading_by_accelerate() -> None:
    """The tensors lie on meta between two calls and are other ones each time."""
    from accelerate import cpu_offload

    file = make_file(4, 32, True, False, "gptq", bias=True)
    layer = file.layer()
    layer._facts = None
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.qweight.is_meta
    x = torch.randn(2, K)
    wanted = x.double().numpy() @ reference_weight(file) + file.bias.astype(np.float64)  # type: ignore[union-attr]
    for _ in range(2):
        assert relative_error(layer(x), wanted) < 1e-5
    assert layer.qweight.is_meta


def test_a_gradient_reaches_x() -> None:
    file = make_file(4, 32, True, True, "gptq")
    layer = file.layer()
    for rows in (2, 40):
        x = torch.randn(rows, K, requires_grad=True)
        layer(x).sum().backward()
        wanted = torch.from_numpy(reference_weight(file).sum(1)).float()
        torch.testing.assert_close(x.grad, wanted.expand(rows, K), rtol=1e-3, atol=1e-4)


def test_a_damaged_g_idx_is_an_error_in_words() -> None:
    file = make_file(4, 32, False, True, "gptq")
    file.g_idx = file.g_idx.copy()
    file.g_idx[7] = 99
    with pytest.raises(BadCheckpoint, match="group 99"):
        file.layer()


def test_bits_that_do_not_exist() -> None:
    with pytest.raises(BadQuantizeConfig, match="5 bits"):
        GPTQLinear(K, N, 5, 32, bias=False)


def test_says_what_it_is() -> None:
    assert repr(make_file(4, 32, True, True, "gptq").layer()) == "GPTQLinear(256 -> 96, 4-bit, group 32, bias=False)"


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)
