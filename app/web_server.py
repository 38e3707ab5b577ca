"""One port of this process, which serves an application on a thread of its own."""

import asyncio
import contextlib
import threading
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..core.addresses import is_here
from ..core.errors import BadParameter

_STOP_S = 3  # then streams that still run are cut

_HEAD_S = 30.0  # the time that the head of a request may take
_HEAD_BYTES = 64 << 10  # the most of a head that is not complete; httptools itself has no limit
_REST_BYTES = 64 << 20  # the most that is read, and thrown away, of a body whose answer was sent before it ended
_KEEP_ALIVE_S = 75  # a connection without a request stays open for so long; programs keep theirs for the next one
_MOST_CONNECTIONS = 512  # fewer than the 1,024 files that a process may open on most systems
_MOST_OF_ONE = 128  # connections of one address; this machine, where proxies run, has no limit of its own


class _Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type] # httptools, which takes less time; h11 without it
    """uvicorn's connection, which waits for ever for the rest of a request's head, and for any number of them at once."""

    _late: asyncio.TimerHandle | None = None
    _head_bytes = 0  # of a head that is not complete
    _rest_bytes = 0  # of a body whose answer was sent
    _idle = False  # between two requests
    _begun = False  # a request, by the bytes that came last
    _field_bytes = 0  # of the header fields of a request, those after its body too, which come while it is answered

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        own = sum(each.client is not None and each.client[0] == address for each in self.connections)
        if len(self.connections) > _MOST_CONNECTIONS or (own > _MOST_OF_ONE and not is_here(address)):
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        was_idle, self._begun = self._idle, False
        super().data_received(data)
        if was_idle and not self._begun:  # line ends, which begin no request: they win no time
            self._idle = False
        if self._is_asked() or self._idle:
            self._head_bytes = self._rest_bytes = 0
        elif self.cycle is not None and self.cycle.more_body:  # no second answer, and no cut before the next request
            self._rest_bytes += len(data)
            if self._rest_bytes > _REST_BYTES:
                self.transport.close()
        else:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
        self._watch()

    def on_message_begin(self) -> None:
        self._field_bytes = 0
        self._idle, self._begun = False, True
        super().on_message_begin()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._idle = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by httptools, which answers 400 if this raises; h11 counts for itself."""
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > _HEAD_BYTES:
            raise ValueError("too many header fields")
        super().on_header(name, value)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Close the connection if a request's head is not complete in time. Bytes that come meanwhile win no time."""
        if self._is_asked() or self._idle:
            self._unwatch()
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(_HEAD_S, self.transport.close)

    def _is_asked(self) -> bool:
        """Whether the head of a request is complete, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class WebServer:
    def __init__(self, application: Any, host: str, port: int) -> None:
        self.host, self.port = host, port
        config = uvicorn.Config(
            application,
            host=host,
            port=port,
            http=_Connection,
            log_level="critical",  # mistakes of clients are not logged
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_S,
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
