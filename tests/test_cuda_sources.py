"""The CUDA C, without a GPU: it compiles for every family that we name, and Python says the same of it."""

import itertools
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptq_webui.gptq.cuda import gemv, gpu_kernels, kernel_arguments, kernel_source, octet, small_batch, wide_batch
from gptq_webui.gptq.cuda.cuda_weights import fragment_order, permutation_of, step_order
from gptq_webui.gptq.cuda.gemv import Tuning
from gptq_webui.gptq.cuda.kernel_source import (
    DecodeVariant,
    GemvVariant,
    GuessedVariant,
    KvFormat,
    LatentVariant,
    LayerVariant,
    OctetVariant,
    Packing,
    PagedAttentionVariant,
    groups_of,
)
from gptq_webui.gptq.cuda.nvrtc import Compiler, NoCompiler, find_nvrtc
from gptq_webui.gptq.cuda.row_kernels import head_threads
from gptq_webui.gptq.suitability import Unsuited

FOLDER = Path(kernel_source.__file__).parent
FAMILIES = {"Turing": (7, 5), "Ampere": (8, 0), "Ampere (RTX 30)": (8, 6), "Ada": (8, 9), "Hopper": (9, 0), "Blackwell": (10, 0)}
FAMILIES |= {"Blackwell (RTX 50)": (12, 0)}
LIMITS = {"Turing": 64, "Ampere (RTX 30)": 99, "Ampere": 163, "Hopper": 227}  # KB of shared memory for a block


def compiler(capability, cache):
    try:
        find_nvrtc()
    except NoCompiler as error:
        pytest.skip(str(error))
    return Compiler(capability, cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_compile_for_every_family(family, tmp_path):
    packings = [Packing(4, True, 1), Packing(8, False, 2), Packing(3, False, 4), Packing(2, True, 1)]
    variants = [
        GemvVariant(packings[0], epilogue, norm, 8, 4, 3, 1, True)
        for epilogue, norm in (("PLAIN", 2), ("SILU", 2), ("RESIDUAL", 0))
    ]
    variants += [replace(each, adapted=runs, blocks=2) for runs, each in enumerate(variants, 1)]
    variants += [replace(variants[0], packing=Packing(bits, sym, 1), span=2) for bits, sym in ((2, True), (3, False), (4, True))]
    variants.append(replace(variants[3], packing=Packing(2, True, 1), span=2))
    limit = LIMITS.get(family, 99) * 1024
    for packing in packings:
        epilogue = "SILU" if packing.sym else "RESIDUAL"
        variants += small_batch.variants(packing, epilogue, limit).values()
        variants += wide_batch.variants(packing, epilogue, limit, family == "Hopper").values()
    variants += wide_batch.variants(packings[0], "PLAIN", limit, family == "Hopper").values()
    variants.append(GemvVariant(packings[1], "PLAIN", 0, 8, 2, 3, experts=True))
    variants += [
        OctetVariant(packings[rows % 4], epilogue, rows, norm, 4, 2, 3, 2, False, 1)
        for rows in octet.ROWS
        for epilogue, norm in (("PLAIN", 2), ("SILU", 1), ("RESIDUAL", 0))
    ]
    variants += [OctetVariant(packings[0], "RESIDUAL", 8, 0, 16, 2, 3, 1, True, 2)] * (FAMILIES[family] >= (9, 0))
    variants += [GuessedVariant(KvFormat(64)), GuessedVariant(KvFormat(128, q8=True))]
    variants += [PagedAttentionVariant(KvFormat(each), 2) for each in (32, 64, 96, 128) if FAMILIES[family] >= (9, 0)]
    formats = [KvFormat(64), KvFormat(128), KvFormat(128, q8=True)]
    binary = compiler(FAMILIES[family], tmp_path).compile(kernel_source.source(variants, packings, formats, fixed=True))
    fixed = ("repack_3", "unpack_8_asym_2", "attention_128", "sample", "sample_guessed", "head", "rope_64", "attention_128_q8")
    names = gpu_kernels._KERNEL.findall(kernel_source.source(variants, packings, formats, fixed=True))
    assert {each.name for each in variants} | set(fixed) <= set(names)
    for name in names:
        assert name.encode() in binary


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_kernels_of_other_architectures_compile(capability, tmp_path):
    packing = Packing(4, False, 2)
    variants = [
        GemvVariant(packing, "ACTIVE", 0, 7, 4, 3, input="NATURAL"),
        GemvVariant(packing, "GATED_BFLOAT", 0, 8, 2, 3, experts=True, input="ORDERED_BFLOAT"),
        GemvVariant(packing, "BFLOAT", 2, 7, 4, 3, input="ORDERED_BFLOAT"),
        GemvVariant(Packing(3, False, 2), "GATED", 1, 8, 2, 3, input="NATURAL"),
        GemvVariant(Packing(2, True, 1), "PLAIN", 0, 4, 8, 2, input="NATURAL", span=2),
        LayerVariant(True),
        DecodeVariant(False, 8, 1),
        *(LatentVariant(True, 512, 128, 64, 128), LatentVariant(False, 64, 32, 32, 32)),
    ]
    if capability >= (9, 0):
        variants += [LatentVariant(False, 512, 192, 64, 256, whole=True)]
    text = kernel_source.source(variants, [], [])
    binary = compiler(capability, tmp_path).compile(text)
    names = gpu_kernels._KERNEL.findall(text)
    assert {each.name for each in variants} | {
        "row_norm_wide_bfloat", "row_norm_normed_bfloat", "row_norm_chosen_bfloat", "rotate_bfloat", "keep_bfloat",
        "sum_of_gpus_bfloat", "first_of_gpus_bfloat",
        "combine_bfloat", "route_bfloat", "route_normed_bfloat", "route_wide_bfloat",
        "attend_latent_bfloat_512_128_64_128", "read_latent_bfloat_512_128_64_128", "attend_latent_half_64_32_32_32",
        "read_latent_half_64_32_32_32", "clamped_gate_bfloat",
    } == set(names)  # fmt: skip
    for name in names:
        assert name.encode() in binary


def test_a_compiled_program_is_kept_for_the_next_start(tmp_path):
    source = 'extern "C" __global__ void nothing() {}'
    first = compiler((9, 0), tmp_path).compile(source)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"kept")
    assert compiler((9, 0), tmp_path).compile(source) == b"kept" != first
    assert compiler((8, 6), tmp_path).compile(source) != b"kept"


def test_a_mistake_in_a_kernel_is_reported_with_the_compilers_message(tmp_path):
    with pytest.raises(NoCompiler, match="no_such_thing"):
        compiler((9, 0), tmp_path).compile('extern "C" __global__ void f() { no_such_thing(); }')


def test_a_gpu_too_old_is_a_sentence(tmp_path):
    with pytest.raises(NoCompiler, match=r"compute capability 6\.1; the fast kernels need 7\.5"):
        Compiler((6, 1), cache=tmp_path)


def test_a_gpu_newer_than_the_compiler_gets_code_that_the_driver_translates(tmp_path):
    made = compiler((19, 0), tmp_path)
    assert made.target == f"compute_{made.architectures()[-1]}"
    assert b".version" in made.compile('extern "C" __global__ void nothing() {}')


# --- argument structures --------------------------------------------------------------------------------------------------

SIZES = {"int": 4, "u32": 4, "float": 4, "u64": 8}


@pytest.mark.parametrize("structure", kernel_arguments.EVERY, ids=lambda each: each.name)
def test_a_launch_fills_the_fields_that_the_kernel_declares(structure):
    """The C text is read here once more, as a compiler lays it out, and every field is looked up in the packed bytes."""
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {structure.name} {{(.*?)}};", structure.c_text, re.S)[1])
    given, wanted, at = {}, [], 0
    for number, declaration in enumerate(filter(None, (each.strip() for each in body.split(";"))), 1):
        kind, name, count = re.match(r"(.*?)(\w+)(?:\[(\d)\])?$", declaration).groups()
        size = 8 if "*" in kind else SIZES[kind.strip()]
        at = -(-at // size) * size
        values = [number * 16 + each for each in range(int(count or 1))]
        if "*" in kind:
            own = [SimpleNamespace(data_ptr=lambda each=each: each) for each in values]
        else:
            own = [float(each) if "float" in kind else each for each in values]
        given[name] = own if count else own[0]
        for value in values:
            wanted.append((at, "Q" if size == 8 else "f" if "float" in kind else "i", value))
            at += size
    packed = structure.pack(**given)
    assert structure.fields == list(given)
    for offset, code, value in wanted:
        assert struct.unpack_from(code, packed, offset) == (value,)
    assert len(packed) <= structure.size_bytes <= 256, "cuda_driver.py keeps so much room"


def test_the_compiler_puts_every_field_where_python_does(tmp_path):
    made = compiler((9, 0), tmp_path)
    if tuple(map(int, made.version.split("."))) < (13, 5):
        pytest.skip(f"NVRTC {made.version} has no __builtin_offsetof")
    checks = "".join(
        f'static_assert(__builtin_offsetof({each.name}, {field}) == {each.offset(field)}, "{field}");\n'
        for each in kernel_arguments.EVERY
        for field in each.fields
    )
    assert made.compile(kernel_source.source([], [], []) + checks)


def test_a_structure_of_another_size_is_not_compiled(tmp_path):
    text = kernel_source.source([], [], [])
    size = kernel_arguments.GEMV.size_bytes
    wrong = text.replace(f"sizeof(GemvArguments) == {size}", f"sizeof(GemvArguments) == {size + 8}")
    assert wrong != text
    with pytest.raises(NoCompiler, match="lays GemvArguments out as Python does"):
        compiler((9, 0), tmp_path).compile(wrong)


@pytest.mark.parametrize("change", ["a field too many", "a field too few"])
def test_a_launch_names_every_field(change):
    fields = dict.fromkeys(kernel_arguments.SILU.fields, 0) | {"gate_up": None, "out": None}
    if change == "a field too many":
        fields["rows"] = 1
    else:
        del fields["inner"]
    with pytest.raises(TypeError, match="rows" if change == "a field too many" else "inner"):
        kernel_arguments.SILU.pack(**fields)


def test_every_kernel_takes_one_structure_of_the_list():
    text = "".join(path.read_text() for path in sorted(FOLDER.glob("*.cu")))
    taken = set(re.findall(r"\b(\w+Arguments|SampleParams)\b", text)) - {"kernel_arguments"}
    assert taken == {each.name for each in kernel_arguments.EVERY}
    for structure in kernel_arguments.EVERY:
        missing = [field for field in structure.fields if not re.search(rf"[.>]\s*{field}\b", text)]
        assert not missing, f"no kernel reads {missing} of {structure.name}"


# --- orders, groups and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [64, 100, 736])
@pytest.mark.parametrize("act_order", [False, True])
def test_fragment_order_holds_every_input_once(k, act_order):
    rows = torch.randperm(k) if act_order else None
    order = fragment_order(rows, k, torch.device("cpu"))
    permutation = permutation_of(order, k)
    assert order.numel() % 64 == 0 and (order < 0).sum() == order.numel() - k
    assert torch.equal(order[permutation.long()].long(), torch.arange(k))
    by_step = step_order(order)
    wanted = torch.arange(k) if rows is None else rows
    assert torch.equal(by_step[:k].long(), wanted), "before steps and columns are swapped the inputs are sorted by group"
    # input 16 s + 4 c + j of a chunk is at 16 c + 4 s + j
    s, c, j = 2, 1, 3
    assert order[16 * c + 4 * s + j] == wanted[16 * s + 4 * c + j]


def group_of_every_unit(group_size, in_features):
    """What the kernel computes, and what is right."""
    groups = groups_of(group_size, in_features)
    units = -(-in_features // 64) * groups.units
    found = [unit * groups.unit_to_group >> 16 for unit in range(units)]
    right = [unit * (64 // groups.units) // group_size for unit in range(units)]
    return groups, found, list(range(units)) if groups.units_stored else right


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, 192, 1024])
def test_a_unit_finds_its_group_by_a_multiplication(group_size):
    groups, found, right = group_of_every_unit(group_size, 14336)
    assert found == right and max(found) < groups.count and not groups.units_stored


def test_every_group_size_finds_its_groups_exactly():
    """2416 inputs a group of a wide layer once found the wrong one: a factor of 16 bits is not fine enough there."""
    assert groups_of(2416, 28672).units_stored and not groups_of(2416, 4096).units_stored
    for in_features in (4096, 11008, 28672, 53248):
        for group_size in range(16, in_features, 16 if in_features < 12000 else 400):
            groups, found, right = group_of_every_unit(group_size, in_features)
            assert found == right and max(found) < groups.count, (in_features, group_size)


def test_groups_that_no_unit_fits_are_left_to_the_plain_path():
    with pytest.raises(Unsuited, match=r"groups of 24 inputs .* multiple of 16"):
        groups_of(24, 4096)
    assert groups_of(-1, 4096) == groups_of(4096, 4096) == kernel_source.Groups(1, 1, 0)


@pytest.mark.parametrize("family", LIMITS)
@pytest.mark.parametrize("in_features", [4096, 12288, 14336, 28672])
@pytest.mark.parametrize("norm", [False, True])
def test_a_product_fits_into_the_shared_memory_of_every_family(family, in_features, norm):
    limit = LIMITS[family] * 1024
    for tuning in (Tuning(), Tuning(16, 2, 3, 1, 2), Tuning(8, 4, 4, 1, 2)):
        try:
            found = gemv.variant(Packing(4, True, 1), in_features, "PLAIN", norm, tuning, limit)
        except Unsuited as error:
            assert family == "Turing" and in_features == 28672 and "shared memory" in str(error)
            continue
        assert found.shared_bytes(-(-in_features // 64)) <= limit
        assert not norm or found.norm * 8 * found.threads >= in_features


@pytest.mark.parametrize("family", LIMITS)
@pytest.mark.parametrize("rows", octet.ROWS)
@pytest.mark.parametrize("role", octet.SPREADS)
def test_the_product_of_a_octet_fits_or_is_left_to_the_kernels_of_many(family, rows, role):
    limit, hopper, spread = LIMITS[family] * 1024, family == "Hopper", octet.SPREADS[role][rows]
    fits = 0
    for packing, in_features in itertools.product((Packing(4, True, 1), Packing(8, False, 4)), (4096, 8192, 14336, 28672)):
        epilogue, norm = {"qkv": ("PLAIN", True), "gate_up": ("SILU", True)}.get(role, ("RESIDUAL", False))
        try:
            found = octet.variant(packing, in_features, epilogue, norm, rows, spread, limit, 3, hopper)
        except Unsuited as error:
            assert f"{rows} rows of {in_features} inputs" in str(error)
            continue
        fits += 1
        assert found.shared_bytes(-(-in_features // 64), 3) <= limit and (hopper or found.cluster == 1)
        assert not norm or found.norm * 8 * found.threads >= in_features
    assert fits >= (4 if role in ("qkv", "gate_up") else 8) * hopper


def test_a_norm_wider_than_a_block_is_refused_in_words():
    assert gemv.variant(Packing(4, True, 1), 32768, "PLAIN", True, Tuning(), 227 * 1024).threads == 1024
    with pytest.raises(Unsuited, match="a norm over 32832 inputs"):
        gemv.variant(Packing(4, True, 1), 32832, "PLAIN", True, Tuning(), 227 * 1024)


@pytest.mark.parametrize(
    ("hidden", "threads"), [(4096, 256), (8192, 256), (8448, 512), (12288, 512), (16384, 512), (32768, 1024)]
)
def test_the_output_layer_stages_every_input(hidden, threads):
    assert head_threads(hidden) == threads and 4 * 8 * threads >= hidden
    with pytest.raises(ValueError, match="32776 inputs"):
        head_threads(32776)
