"""What the user should know about this machine before they wonder."""

import importlib.util
import re
import sys
from pathlib import Path

from ..loaders.machine import has_nvidia_card

CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def torch_banner() -> str:
    """A sentence with its cure if a graphics card is here and the installed torch cannot use it, else "".

    Reads torch's version file instead of importing torch, which takes seconds.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or not has_nvidia_card():
        return ""
    try:
        version = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    if re.search(r"^cuda\b.*=\s*['\"]", version, re.MULTILINE) or re.search(r"^hip\b.*=\s*['\"]", version, re.MULTILINE):
        return ""
    return (
        "This machine has an NVIDIA graphics card, but the installed torch only uses the processor. "
        f'For the card: "{sys.executable}" -m pip install --force-reinstall torch --index-url {CUDA_INDEX}'
    )
