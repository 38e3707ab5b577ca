"""The CUDA C, where there is no card: it compiles for every family we name, and Python says the same of it."""

import re
from pathlib import Path

import pytest
import torch

from gptq_webui.gptq.cuda import cuda_kernels, small_batch
from gptq_webui.gptq.cuda.cuda_weights import engine_order, permutation_of, step_order
from gptq_webui.gptq.cuda.nvrtc import Compiler, NoCompiler, find_nvrtc

FOLDER = Path(cuda_kernels.__file__).parent
FAMILIES = {"Turing": (7, 5), "Ampere": (8, 0), "Ampere (RTX 30)": (8, 6), "Ada": (8, 9), "Hopper": (9, 0), "Blackwell": (10, 0)}
FAMILIES |= {"Blackwell (RTX 50)": (12, 0)}


def compiler(capability, cache):
    try:
        find_nvrtc()
    except NoCompiler as error:
        pytest.skip(str(error))
    return Compiler(capability, cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_compile_for_every_family(family, tmp_path):
    shapes = [
        cuda_kernels.Shape(4, True, 1),
        cuda_kernels.Shape(8, False, 2),
        cuda_kernels.Shape(3, False, 4),
        cuda_kernels.Shape(2, True, 1),
    ]
    variants = [cuda_kernels.GemvVariant(shapes[0], epilogue, norm, 8, 4, 3, 1, True) for epilogue, norm in
                (("PLAIN", 2), ("SILU", 2), ("RESIDUAL", 0))]  # fmt: skip
    variants += [
        each for columns in small_batch.COLUMNS for each in small_batch.variants(shapes[columns % 4], "SILU", 99 * 1024).values()
    ]
    caches = [cuda_kernels.Cache(64), cuda_kernels.Cache(128), cuda_kernels.Cache(128, q8=True)]
    binary = compiler(FAMILIES[family], tmp_path).compile(cuda_kernels.source(variants, shapes, caches, fixed=True))
    for name in (
        *(each.name for each in variants),
        "repack_3",
        "unpack_8_asym_2",
        "attention_128",
        "sample",
        "head",
        "rope_64",
        "attention_128_q8",
    ):
        assert name.encode() in binary


def test_a_compiled_program_is_kept_for_the_next_start(tmp_path):
    source = 'extern "C" __global__ void nothing() {}'
    first = compiler((9, 0), tmp_path).compile(source)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"kept")
    assert compiler((9, 0), tmp_path).compile(source) == b"kept" != first
    assert compiler((8, 6), tmp_path).compile(source) != b"kept"


def test_a_mistake_in_a_kernel_is_told_in_the_compilers_words(tmp_path):
    with pytest.raises(NoCompiler, match="no_such_thing"):
        compiler((9, 0), tmp_path).compile('extern "C" __global__ void f() { no_such_thing(); }')


def test_a_card_too_old_is_a_sentence(tmp_path):
    with pytest.raises(NoCompiler, match=r"compute capability 6\.1; the fast kernels need 7\.5"):
        Compiler((6, 1), cache=tmp_path)


def test_a_card_newer_than_the_compiler_gets_code_that_the_driver_translates(tmp_path):
    made = compiler((19, 0), tmp_path)
    assert made.target == f"compute_{made.architectures()[-1]}"
    assert b".version" in made.compile('extern "C" __global__ void nothing() {}')


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("RepackArguments", cuda_kernels.Repack), ("UnpackArguments", cuda_kernels.Unpack),
        ("GemvArguments", cuda_kernels.Gemv),
        ("HeadArguments", cuda_kernels.Head), ("EmbedArguments", cuda_kernels.Embed), ("NormArguments", cuda_kernels.Norm),
        ("SiluArguments", cuda_kernels.Silu), ("AttentionArguments", cuda_kernels.Attention),
        ("RopeArguments", cuda_kernels.Rope),
        ("GatherArguments", cuda_kernels.Gather), ("SampleArguments", cuda_kernels.Sample),
    ],
)  # fmt: skip
def test_python_hands_over_the_fields_that_the_kernel_takes(name, structure):
    text = "".join(path.read_text() for path in sorted(FOLDER.glob("*.cu")))
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} {{(.*?)}};", text, re.S)[1])
    fields = []
    for declaration in filter(None, (each.strip() for each in body.split(";"))):
        kind, names = re.match(r"(.*?)([*\s]\w+(?:\[\d\])?(?:\s*,\s*\**\w+(?:\[\d\])?)*)$", declaration).groups()
        pointer = "*" in declaration
        for each in names.lstrip("* ").split(","):
            field, count = re.match(r"\s*\**(\w+)(?:\[(\d)\])?", each).groups()
            size = 8 if pointer or "u64" in kind else 4
            fields.append((field, size * int(count or 1)))
    assert [(field, kind) for field, kind in fields] == [
        (field, getattr(structure, field).size) for field, _kind in structure._fields_
    ]


@pytest.mark.parametrize("k", [64, 100, 736])
@pytest.mark.parametrize("act_order", [False, True])
def test_engine_order_holds_every_input_once(k, act_order):
    rows = torch.randperm(k) if act_order else None
    order = engine_order(rows, k, torch.device("cpu"))
    permutation = permutation_of(order, k)
    assert order.numel() % 64 == 0 and (order < 0).sum() == order.numel() - k
    assert torch.equal(order[permutation.long()].long(), torch.arange(k))
    by_step = step_order(order)
    wanted = torch.arange(k) if rows is None else rows
    assert torch.equal(by_step[:k].long(), wanted), "before the swap of steps and columns the inputs are sorted by group"
    # input 16 s + 4 c + j of a chunk stands at 16 c + 4 s + j
    s, c, j = 2, 1, 3
    assert order[16 * c + 4 * s + j] == wanted[16 * s + 4 * c + j]


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, 192, 1024])
def test_a_unit_finds_its_group_by_a_multiplication(group_size):
    units, groups, magic = cuda_kernels.unit_of(group_size, 14336)
    for at in range(14336 // 64 * units):
        assert at * magic >> 16 == at * (64 // units) // group_size < groups


def test_groups_that_no_unit_fits_are_left_to_the_plain_path():
    with pytest.raises(ValueError, match="no multiple of 16"):
        cuda_kernels.unit_of(24, 4096)
    assert cuda_kernels.unit_of(-1, 4096) == cuda_kernels.unit_of(4096, 4096) == (1, 1, 0)
