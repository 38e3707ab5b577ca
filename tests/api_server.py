"""The API on a port of loopback, as tests and clients reach it."""

import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from gptq_webui.api import application as api_app
from gptq_webui.api.service import Service
from gptq_webui.engine.download_queue import Downloads
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.settings import Settings
from gptq_webui.hub.library import Library


class ApiServer:
    """`with ApiServer(engine) as server:` serves `engine` at `server.url`; `http` is a client that knows no proxy."""

    def __init__(self, engine, keys=None, limits=None, page=None, **options):
        self.service = Service(engine, Downloads(engine.library), keys, limits)
        self._app = api_app.build(self.service, page=page, **options)

    def __enter__(self):
        self.socket = socket.socket(proto=socket.IPPROTO_TCP)  # or each answer would wait 40 ms for an acknowledgement
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self._app, log_level="critical", access_log=False))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=30)
        return self

    def __exit__(self, *_):
        self.http.close()
        self._server.should_exit = True
        self._thread.join(10)
        self.socket.close()

    def raw(self, data, wait_s=5):
        """What the server answers to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as line:
            line.sendall(data)
            found = b""
            with contextlib.suppress(TimeoutError, OSError):
                while piece := line.recv(65536):
                    found += piece
            return found


@contextlib.contextmanager
def demo_server(demo_root, folder):
    """A server with the demo's 4-bit model."""
    engine = Engine(Library([demo_root]), Settings(folder / "settings.json"))
    engine.load(next(each.name for each in engine.library.models() if "4bit" in each.name))
    with ApiServer(engine) as server:
        yield server
    engine.unload()


def events(text):
    """The data of server-sent events, in order."""
    return [line[5:].lstrip() for line in text.splitlines() if line.startswith("data:")]


def settled(service, seconds=5):
    """Whether nobody is in the line any more, after at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not service.queue.running and not service.queue.waiting:
            return True
        time.sleep(0.01)
    return False
