"""gptq-webui: download, load and chat with GPTQ models.

The package is the repository itself, known as `gptq_webui` in all its guises: a pip
package, a folder inside text-generation-webui, and `python script.py`. This file has no
import, so that each of them can load it before anything heavy is there.

    import gptq_webui

    gptq_webui.register()

makes plain transformers code open GPTQ models through this package's layers, until
`gptq_webui.unregister()`.
"""

__version__ = "0.1.0"


def __getattr__(name):  # type: ignore[no-untyped-def]  # what would need an import is fetched when it is asked for
    if name in ("register", "unregister"):
        return getattr(__import__(f"{__name__}.gptq.registered", fromlist=[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
