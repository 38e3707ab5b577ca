"""loaders/machine/memory_release.py: what the C library keeps in reserve."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "loaders" / "machine" / "memory_release.py"
THREADS = """
import ctypes, runpy, sys, threading

if sys.argv[2] == "few":
    runpy.run_path(sys.argv[1])["limit_arenas"]()
libc, all_there = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype = ctypes.c_void_p

def ask():
    all_there.wait()
    libc.malloc(100_000)
    all_there.wait()

threads = [threading.Thread(target=ask) for _ in range(8)]
for each in threads:
    each.start()
for each in threads:
    each.join()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def _has_glibc():
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_info")


@pytest.mark.skipif(not _has_glibc(), reason="needs glibc")
def test_threads_share_what_the_c_library_keeps():
    def reserves(how, **more):
        environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | more
        command = [sys.executable, "-c", THREADS, str(SOURCE), how]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return found.stdout.count("<heap nr=")

    assert reserves("few") <= 2 < reserves("many")
    assert reserves("few", MALLOC_ARENA_MAX="5") > 2  # who has said how many gets as many
