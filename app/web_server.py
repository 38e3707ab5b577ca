"""One port of this process, which serves an application on a thread of its own."""

import contextlib
import threading
import time
from typing import Any

import uvicorn

from ..core.errors import BadParameter

_STOP_S = 3  # then streams that still run are cut


class WebServer:
    def __init__(self, application: Any, host: str, port: int) -> None:
        self.host, self.port = host, port
        config = uvicorn.Config(
            application,
            host=host,
            port=port,
            log_level="critical",  # mistakes of clients are not logged
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name=f"gptq-webui port {port}", daemon=True)

    def start(self) -> None:
        """Start, and return when the port listens. Raises BadParameter if it cannot."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise BadParameter(
                    f"Port {self.port} on {self.host} cannot be used. Stop the program that has it, or choose another."
                )
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(_STOP_S + 5)

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that the port is taken
            self._server.run()
