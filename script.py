"""The entry point: `python script.py`, and text-generation-webui's extension hooks.

Registers its own folder as the package `gptq_webui`, whatever the folder is called, and
never touches sys.path. Imports neither torch nor gradio. In text-generation-webui nothing
that goes wrong here may leave a hook: it would stop the server.
"""

import importlib.metadata
import importlib.util
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent

log = logging.getLogger("gptq_webui")

# What text-generation-webui reads; each can be set in its settings.yaml as `<folder>-<name>`. The options of the loaders
# (context_tokens, dtype, device …) are added below, with the names and defaults they have in our tab.
params = {
    "display_name": "GPTQ",
    "is_tab": True,
    "autoload_model": "",  # load this GPTQ folder when the web UI starts
    "loader": "",  # "": the first that can open the model
}

# The packages that are needed, with their oldest versions.
NEEDS = {
    "torch": (2, 6),
    "transformers": (4, 56),
    "accelerate": (1, 1),
    "safetensors": (0, 4),
    "huggingface_hub": (0, 36),
    "jinja2": (3,),
    "httpx": (0, 27),
    "psutil": (5,),
}

_problem = ""  # a sentence about why the extension does not work here


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


def _lacking() -> str:
    """A sentence about why GPTQ models do not work in this text-generation-webui; "" if they do."""
    if sys.version_info < (3, 11):  # noqa: UP036 (pip refuses an older Python; a folder copied into a host does not)
        return f"The GPTQ extension needs Python 3.11 or newer; text-generation-webui runs on {sys.version.split()[0]} here."
    for package, oldest in NEEDS.items():
        if importlib.util.find_spec(package) is None:
            if package in ("torch", "transformers"):
                return (
                    f"GPTQ models need {package}, which this build of text-generation-webui does not have. "
                    "Use its one-click or manual install; the portable builds run GGUF models only."
                )
            return (
                f"GPTQ models need the package {package}, which is missing here. Open text-generation-webui's cmd script "
                f"(cmd_linux.sh, cmd_macos.sh or cmd_windows.bat), type `pip install {package}` and start it again."
            )
        try:
            found = importlib.metadata.version(package)
            have = tuple(int(each) for each in re.findall(r"\d+", found)[: len(oldest)])
        except Exception as error:
            log.debug("the version of %s is not known: %s", package, error)
            continue
        if have < oldest:
            wanted = ".".join(str(each) for each in oldest)
            return f"GPTQ models need {package} {wanted} or newer; found {found}. Update text-generation-webui."
    return ""


def _show_log() -> None:
    """Print our log lines, each once: text-generation-webui's root logger discards everything."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s gptq-webui: %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _words(error: Exception) -> str:
    try:
        from gptq_webui.core.foreign_errors import in_words
    except Exception:  # the package itself cannot be imported
        return "its own code cannot be started"
    return in_words(error)


def setup() -> None:
    """text-generation-webui: after its settings, before its page."""
    global _problem
    _problem = ""
    try:
        _show_log()
        _problem = _lacking()
        if _problem:
            log.warning(_problem)
            return
        register()
        from gptq_webui.extension import bridge

        bridge.setup(params, Path(__file__).parent.name)  # as the host calls it, also if the folder is a link
    except Exception as error:
        _problem = f"The GPTQ extension cannot work here: {_words(error)}. Update its packages, then start again."
        log.exception(_problem)


def ui() -> None:
    """text-generation-webui: make our tab."""
    try:
        import gradio as gr

        try:
            if not _problem:
                from gptq_webui.extension import bridge, panel

                panel.draw(bridge.bridge())
                return
        except Exception as error:
            log.exception("the GPTQ tab could not be shown")
            gr.Markdown(f"This tab could not be shown: {_words(error)}. Look into the terminal, which has the details.")
            return
        gr.Markdown(_problem)
    except Exception:
        log.exception("the GPTQ tab could not be shown")


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
    """`custom_generate_reply` and `custom_tokenized_length`, only while a loaded model of ours has no transformers model."""
    bridge = None if name.startswith("__") else sys.modules.get("gptq_webui.extension.bridge")
    hook = bridge.hook(name) if bridge is not None else None
    if hook is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hook


if __name__ == "__main__":
    register()
    from gptq_webui.app.cli import main

    sys.exit(main())

try:  # importing the loaders is light: neither torch nor transformers
    register()
    from gptq_webui.extension.host_params import defaults

    params |= {name: default for name, default in defaults().items() if name not in params}
except Exception as error:  # setup() says what is wrong here
    log.debug("the options of the loaders are not among the params: %s", error)
