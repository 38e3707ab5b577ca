"""Makes this folder's package importable as gptq_webui, installed or not, as script.py does."""

import importlib.util
import sys
from pathlib import Path


def register() -> None:
    spec = importlib.util.spec_from_file_location("gptq_webui_script", Path(__file__).resolve().parents[1] / "script.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gptq_webui_script"] = module
    spec.loader.exec_module(module)
    module.register()
