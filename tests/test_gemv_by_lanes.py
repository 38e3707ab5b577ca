"""The products of one row as gemv.cu computes them, on a processor: its own text, a fiber for each lane (lanes_as_fibers.h)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gptq_webui.gptq.cuda import kernel_arguments, kernel_source

HERE, KERNELS = Path(__file__).parent, Path(kernel_source.__file__).parent
FILES = ("unpack.cu", "staged_input.cu", "digits.cu", "digit_products.cu", "adapted_gemv.cu", "gemv.cu")
# Instructions of a GPU: lanes_as_fibers.h has functions of these names.
REPLACED = (
    "DEVICE void mma_bytes(",
    "DEVICE int sum_bytes(",
    "template <int LANES> DEVICE u32 largest(",
    "template <int LANES> DEVICE int added(",
    "DEVICE float larger(",
)


def without(text, function):
    """C without a function, which begins so."""
    begin = text.index(function)
    end, depth = text.index("{", begin), 0
    while depth := depth + (text[end] == "{") - (text[end] == "}"):
        end += 1
    return text[:begin] + text[end + 1 :]


def program():
    parts = [(HERE / "lanes_as_fibers.h").read_text(encoding="utf-8"), kernel_arguments.c_text()]
    for name in FILES:
        text = (KERNELS / name).read_text(encoding="utf-8")
        if name == "digits.cu":
            for each in REPLACED:
                text = without(text, each)
        text = re.sub(
            r'asm volatile\("bar\.sync %0, %1;" ::"r"\((.*?)\), "r"\((.*?)\) : "memory"\)', r"named_barrier(\1, \2)", text
        )
        parts.append(re.sub(r"#pragma unroll.*", "", text))
    return "\n".join([*parts, (HERE / "gemv_by_lanes.cc").read_text(encoding="utf-8")])


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    command = [shutil.which("g++") or "", "-std=c++17", "-O0", "-w"]
    (folder / "half.cc").write_text(
        "#include <ucontext.h>\nint main() { _Float16 half = 1; return half != 1; }\n", encoding="utf-8"
    )
    if not command[0] or subprocess.run([*command, "half.cc", "-o", "half"], cwd=folder, capture_output=True).returncode:
        pytest.skip("no g++ with numbers of 16 bits")
    (folder / "gemv.cc").write_text(program(), encoding="utf-8")
    made = subprocess.run([*command, "gemv.cc", "-o", "gemv"], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:2000]
    return subprocess.run(["./gemv"], cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()


def test_every_form_of_a_product_gives_the_same_numbers(lines):
    assert len(lines) == 100
    worst = {line: float(line.rsplit(": ", 1)[1]) for line in lines}
    assert all(found < 5e-7 for found in worst.values()), sorted(worst, key=worst.get)[-3:]
    assert sum(found > 0 for found in worst.values()) > 70, "most add in another order"
