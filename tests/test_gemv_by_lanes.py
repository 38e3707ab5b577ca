"""Products as gemv.cu and octet.cu compute them, and rows between them, on a processor: their own text, a fiber for each lane."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gptq_webui.gptq.cuda import kernel_arguments, kernel_source

HERE, KERNELS = Path(__file__).parent, Path(kernel_source.__file__).parent
FILES = ("unpack.cu", "staged_input.cu", "digits.cu", "digit_products.cu", "adapted_gemv.cu", "gemv.cu")
OF_COMMON = (  # as they are there
    "DEVICE float block_sum(",
    "DEVICE u32 size_bits(",
    "DEVICE u32 block_max(",
    "DEVICE float power_of_largest(",
    "DEVICE float inverse_power(",
)
OF_PROMPTS = {  # what prompt_rows.cu takes of other files
    "layer_kernels.cu": ("struct Half {", "struct Bfloat {"),
    "gemv.cu": ("DEVICE float activated(",),
}
OF_ROWS = ("row_sums.cu", "octet_digits.cu", "octet.cu")
# Instructions of a GPU: lanes_as_fibers.h has functions of these names.
REPLACED = (
    "DEVICE void mma_bytes(",
    "DEVICE int sum_bytes(",
    "template <int LANES> DEVICE u32 largest(",
    "template <int LANES> DEVICE int added(",
    "DEVICE float larger(",
    "DEVICE float further(",
)


def span_of(text, function):
    """Where a function of C begins, which begins so, and where it has ended."""
    begin = text.index(function)
    end, depth = text.index("{", begin), 0
    while depth := depth + (text[end] == "{") - (text[end] == "}"):
        end += 1
    return begin, end + 1


def without(text, function):
    begin, end = span_of(text, function)
    return text[:begin] + text[end:]


def program(files, main, more):
    common = (KERNELS / "common.cu").read_text(encoding="utf-8")
    parts = [(HERE / "lanes_as_fibers.h").read_text(encoding="utf-8"), kernel_arguments.c_text()]
    parts += [re.sub(r"#pragma unroll.*", "", common[slice(*span_of(common, each))]) for each in OF_COMMON]
    for name, taken in more.items():
        text = (KERNELS / name).read_text(encoding="utf-8")
        parts += [text[slice(*span_of(text, each))] + ";" for each in taken]
    for name in files:
        text = (KERNELS / name).read_text(encoding="utf-8")
        for each in REPLACED:
            if each in text:
                text = without(text, each)
        text = re.sub(
            r'asm volatile\("bar\.sync %0, %1;" ::"r"\((.*?)\), "r"\((.*?)\) : "memory"\)', r"named_barrier(\1, \2)", text
        )
        parts.append(re.sub(r"#pragma unroll.*", "", text))
    return "\n".join([*parts, (HERE / main).read_text(encoding="utf-8")])


@pytest.fixture(scope="module")
def lines_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    command = [shutil.which("g++") or "", "-std=c++17", "-O0", "-w"]
    (folder / "half.cc").write_text(
        "#include <ucontext.h>\nint main() { _Float16 half = 1; return half != 1; }\n", encoding="utf-8"
    )
    if not command[0] or subprocess.run([*command, "half.cc", "-o", "half"], cwd=folder, capture_output=True).returncode:
        pytest.skip("no g++ with numbers of 16 bits")

    def lines(files, main, more=None):
        (folder / main).write_text(program(files, main, more or {}), encoding="utf-8")
        made = subprocess.run([*command, main, "-o", "lanes"], cwd=folder, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[:2000]
        run = subprocess.run(["./lanes"], cwd=folder, capture_output=True, text=True, check=True, timeout=120)
        return run.stdout.splitlines()

    return lines


def test_every_form_of_a_product_gives_the_same_numbers(lines_of):
    lines = lines_of(FILES, "gemv_by_lanes.cc")
    assert len(lines) == 124
    worst = {line: float(line.rsplit(": ", 1)[1]) for line in lines}
    assert all(found < 5e-7 for found in worst.values()), sorted(worst, key=worst.get)[-3:]
    assert sum(found > 0 for found in worst.values()) > 70, "most add in another order"


def test_every_form_of_a_product_of_rows_is_right_and_a_row_is_what_it_is_alone(lines_of):
    lines = lines_of((*FILES, *OF_ROWS), "octet_by_lanes.cc")
    assert len(lines) == 129
    found = {line: line.rsplit(": ", 1)[1].split() for line in lines}
    assert all(same == "same" for same, _apart in found.values()), [line for line in lines if "other" in line]
    worst = {line: float(apart) for line, (_same, apart) in found.items()}
    limits = {line: 1e-3 if ", fp16, " in line else 3e-4 for line in lines}
    assert all(worst[line] < limits[line] for line in lines), sorted(worst, key=worst.get)[-3:]


def test_rows_of_a_prompt_are_divided_and_gated_as_they_say(lines_of):
    lines = lines_of(("prompt_rows.cu",), "prompt_rows_by_lanes.cc", OF_PROMPTS)
    assert len(lines) == 12
    assert [line for line in lines if not line.endswith(": right")] == []
