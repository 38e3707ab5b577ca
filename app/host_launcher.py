"""`gptq-webui host -- <server.py arguments>`: starts text-generation-webui and gives us its GPTQ folders from the start.

The host loads its --model before any extension. Started this way, that can be a GPTQ folder.
"""

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import BadParameter


def run_host(arguments: Sequence[str], folder: Path | None = None) -> int:
    """Patch the host, then run its server.py in `folder` (by default the current one) with its own arguments.

    Raises BadParameter if the folder is not that of text-generation-webui.
    """
    home = (folder or Path.cwd()).resolve()
    server = home / "server.py"
    if not server.is_file() or not (home / "modules" / "shared.py").is_file():
        raise BadParameter(
            f"{home} is not the folder of text-generation-webui: there is no server.py with its modules. "
            "Change to that folder first, or name it with --folder."
        )
    given = list(arguments)
    if given[:1] == ["--"]:
        given = given[1:]
    os.chdir(home)
    sys.argv = ["server.py", *given]  # the host's modules.shared reads it at its import
    sys.path.insert(0, str(home))
    _leave_root_logger_to_the_host()
    from ..extension import bridge

    bridge.patch()
    runpy.run_path(str(server), run_name="__main__")
    return 0


def _leave_root_logger_to_the_host() -> None:
    """Our command's handlers show our own log only: on the root logger they would print the host's lines a second time."""
    root, ours = logging.getLogger(), logging.getLogger("gptq_webui")
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        ours.addHandler(handler)
    ours.propagate = False
