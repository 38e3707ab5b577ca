"""Lies about folders: each is computed right or refused in a sentence. benchmarks/lies.py tells more of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="without numba nothing checks bounds")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children of benchmarks/lies.py are forked")
def test_no_lie_crashes_and_none_computes_something_else():
    seed = os.environ.get("GPTQ_WEBUI_SEED", "5")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "lies.py", "--lies", "100", "--seed", seed],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "100 folders" in run.stdout and "'right: cpu'" in run.stdout
