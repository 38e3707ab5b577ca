"""The door: `python script.py`, and text-generation-webui's extension hooks.

Registers its own folder as the package `gptq_webui`, whatever the folder is called, and
never touches sys.path. Imports neither torch nor gradio.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def register() -> ModuleType:
    """Make `gptq_webui` importable from this folder; returns the package.

    Raises RuntimeError if another copy of it is already loaded.
    """
    loaded = sys.modules.get("gptq_webui")
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve().parent == HERE:
            return loaded
        raise RuntimeError(
            f"Two copies of gptq-webui are installed: {Path(loaded.__file__ or '').parent} is loaded and {HERE} was started. "
            "Remove one of them (pip uninstall gptq-webui, or delete the folder)."
        )
    spec = importlib.util.spec_from_file_location("gptq_webui", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["gptq_webui"] = package
    spec.loader.exec_module(package)
    return package


if __name__ == "__main__":
    register()
    from gptq_webui.app.cli import main

    sys.exit(main())
