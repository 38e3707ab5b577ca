"""The door: `python script.py`, and text-generation-webui's extension hooks.

Registers its own folder as the package `gptq_webui`, whatever the folder is called, and
never touches sys.path. Imports neither torch nor gradio. In text-generation-webui nothing
that goes wrong here may leave a hook: it would stop the server.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent

log = logging.getLogger("gptq_webui")

# What text-generation-webui reads; each can be set in its settings.yaml as `<folder>-<name>`.
params = {
    "display_name": "GPTQ",
    "is_tab": True,
    "autoload_model": "",  # load this GPTQ folder when the web UI starts
    "loader": "",  # "": the first that can open the model
    "context_tokens": 0,  # 0: what fits, up to 8192
    "dtype": "auto",  # auto, fp16, bf16, fp32
    "device": "auto",  # auto, cpu, cuda
}

_problem = ""  # why the extension does not work here, in a sentence


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


def setup() -> None:
    """text-generation-webui: after its settings, before its page."""
    global _problem
    _problem = ""
    try:
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                _problem = (
                    f"GPTQ models need {package}, which this build of text-generation-webui does not have. "
                    "Use its one-click or manual install; the portable builds run GGUF models only."
                )
                log.warning(_problem)
                return
        register()
        from gptq_webui.extension import bridge

        bridge.setup(params)
    except Exception as error:
        _problem = f"The GPTQ extension cannot work here ({type(error).__name__}: {error})."
        log.exception(_problem)


def ui() -> None:
    """text-generation-webui: draw our tab."""
    try:
        import gradio as gr

        if _problem:
            gr.Markdown(_problem)
            return
        from gptq_webui.extension import bridge, panel

        panel.draw(bridge.bridge())
    except Exception:
        log.exception("the GPTQ tab could not be drawn")


def custom_css() -> str:
    """text-generation-webui: the style of our tab."""
    try:
        if not _problem:
            from gptq_webui.extension import panel

            return panel.CSS
    except Exception:
        log.exception("the style of the GPTQ tab could not be read")
    return ""


def __getattr__(name: str) -> Any:
    """`custom_generate_reply` is there only while a model of ours is loaded that transformers cannot drive."""
    if name == "custom_generate_reply" and (bridge := sys.modules.get("gptq_webui.extension.bridge")) is not None:
        reply = bridge.custom_reply()
        if reply is not None:
            return reply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    register()
    from gptq_webui.app.cli import main

    sys.exit(main())
