"""gptq-webui: download, load and chat with GPTQ models.

The repository is the package `gptq_webui`. It runs in three ways: as a pip package, as a
folder inside text-generation-webui, and as `python script.py`. This file has no import, so
that each of them can load it before the heavy packages.

    import gptq_webui

    gptq_webui.register()

lets plain transformers code open GPTQ models with this package's layers, until
`gptq_webui.unregister()`.
"""

__version__ = "0.2.0"


def __getattr__(name):  # type: ignore[no-untyped-def]  # imports on first use
    if name in ("register", "unregister"):
        return getattr(__import__(f"{__name__}.gptq.transformers_patch", fromlist=[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
