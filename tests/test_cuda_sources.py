"""The CUDA C, without a GPU: it compiles for every family that we name, and Python says the same of it."""

import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptq_webui.gptq.cuda import gpu_kernels, kernel_arguments, kernel_source, octet, small_batch, wide_batch
from gptq_webui.gptq.cuda.kernel_source import (
    ClusterAttentionVariant,
    ClusterBatchVariant,
    DecodeVariant,
    DeltaVariant,
    ExpertSumVariant,
    GemvVariant,
    GuessedVariant,
    KvFormat,
    LatentVariant,
    LayerVariant,
    OctetVariant,
    Packing,
    PagedAttentionVariant,
    ShownRouteVariant,
)
from gptq_webui.gptq.cuda.nvrtc import Compiler, NoCompiler, find_nvrtc

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
    variants += [
        OctetVariant(Packing(bits, bits > 2, units), epilogue, rows, norm, 4, 2, 3, 2, even, 1, span, True)
        for bits, units, epilogue, rows, norm, even, span in (
            (2, 1, "PLAIN", 2, 2, True, 2), (3, 2, "SILU", 4, 1, True, 1), (4, 1, "RESIDUAL", 8, 0, False, 2)
        )
    ]  # fmt: skip
    if FAMILIES[family] >= (9, 0):
        variants += [
            OctetVariant(packings[0], "RESIDUAL", 8, 0, 16, 2, 3, 1, True, 2, span, follow)
            for span, follow in ((0, False), (0, True), (2, True))
        ]
        variants += [
            OctetVariant(packings[0], epilogue, rows, norm, 4, 2, 3, 2, True, 1, 2, True, sharers)
            for epilogue, norm, rows, sharers in (("SILU", 1, 8, 2), ("RESIDUAL", 0, 2, 4))
        ]
    variants += [
        ClusterBatchVariant(packing, epilogue, columns, norm, 2, 2, 2, 3, 2)
        for packing, (epilogue, norm, columns) in zip(
            packings, (("PLAIN", 8, 2), ("SILU", 4, 2), ("RESIDUAL", 0, 2), ("RESIDUAL", 0, 4)), strict=True
        )
        if FAMILIES[family] >= (9, 0)
    ]
    variants += [GuessedVariant(KvFormat(64)), GuessedVariant(KvFormat(128, q8=True))]
    variants += [PagedAttentionVariant(KvFormat(each), 2) for each in (32, 64, 96, 128) if FAMILIES[family] >= (9, 0)]
    formats = [KvFormat(64), KvFormat(128), KvFormat(128, q8=True)]
    if FAMILIES[family] >= (9, 0):
        variants += [
            ClusterAttentionVariant(KvFormat(32), 4),
            ClusterAttentionVariant(KvFormat(128, True), 3),
            ClusterAttentionVariant(KvFormat(96), 5),
        ]
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
        GemvVariant(packing, "ACTIVE", 0, 2, 2, 3, 4, experts=True, input="NATURAL_BFLOAT"),
        GemvVariant(packing, "BFLOAT", 2, 7, 4, 3, input="ORDERED_BFLOAT"),
        GemvVariant(Packing(3, False, 2), "GATED", 1, 8, 2, 3, input="NATURAL"),
        GemvVariant(Packing(2, True, 1), "PLAIN", 0, 4, 8, 2, input="NATURAL", span=2),
        *(LayerVariant(True), DecodeVariant(False, 8, 1), kernel_source.ScanVariant(True, 64, 128, 4)),
        kernel_source.PromptAttentionVariant(False, 80),
        *(replace(each, grouped=True) for each in wide_batch.variants(packing, "SILU", 64 * 1024, False).values()),
        *(LatentVariant(True, 512, 128, 64, 128), LatentVariant(False, 64, 32, 32, 32)),
        *(DeltaVariant(True, 128, 128, 32, 4, False), DeltaVariant(False, 24, 192, 32, 3, False)),
    ]
    shown = {"route_shown_bfloat", "route_normed_shown_bfloat", "route_wide_shown_bfloat"} if capability >= (9, 0) else set()
    if capability >= (9, 0):
        variants += [GemvVariant(packing, "GATED", 0, 2, 4, 3, 4, experts=True, ahead=True, input="NATURAL")]
        variants += [ExpertSumVariant(packing, 8, 2, 4, 3, False, 1)]
        variants += [ShownRouteVariant(True), LatentVariant(True, 512, 128, 64, 128, whole=True)]
        variants += [LatentVariant(False, 512, 192, 64, 256, whole=True), DeltaVariant(False, 128, 128, 32, 4, True)]
    text = kernel_source.source(variants, [], [])
    binary = compiler(capability, tmp_path).compile(text)
    names = gpu_kernels._KERNEL.findall(text)
    assert {each.name for each in variants} | shown | {
        "row_norm_wide_bfloat", "row_norm_normed_bfloat", "row_norm_chosen_bfloat", "rotate_bfloat", "keep_bfloat",
        "turn_rows_bfloat", "sum_of_gpus_bfloat", "first_of_gpus_bfloat", "rows_of_decode_half_8_1",
        "group_choices_bfloat", "order_inputs_bfloat", "combine_grouped_bfloat", "gate_rows_bfloat", "compare_mask_half_80",
        "combine_bfloat", "route_bfloat", "route_normed_bfloat", "route_wide_bfloat", "route_rows_bfloat",
        "route_rows_wide_bfloat", "attend_latent_bfloat_512_128_64_128", "read_latent_bfloat_512_128_64_128",
        "attend_latent_half_64_32_32_32",
        "read_latent_half_64_32_32_32", "clamped_gate_bfloat", "gate_row_bfloat", "gated_norm_bfloat", "look_up_bfloat",
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
