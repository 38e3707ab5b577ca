"""The one server process: it makes the engine, the page and the API, prints their addresses, and stops at Ctrl+C."""

import argparse
import os
import secrets
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .. import __version__
from ..core.errors import BadParameter, GptqWebuiError
from ..core.foreign_errors import in_words
from ..engine.advice import fit_of_plan, torch_banner
from ..engine.available_memory import available_memory
from ..engine.chat_service import ChatService
from ..engine.download_queue import Downloads
from ..engine.engine import Engine
from ..engine.request_queue import DEFAULT_LIMIT
from ..engine.running_chats import MOST_RUNNING
from ..loaders.machine.memory_release import limit_arenas
from . import access_flags, tgi_flags
from .engine_commands import load_options, make_engine, requested_model
from .first_model import first_model

if TYPE_CHECKING:
    from ..ui.access import Share

DEFAULT_PORT = 7860
_EVERYWHERE = ("0.0.0.0", "::", "")
_TRIED_PORTS = 100


def serve(options: argparse.Namespace) -> int:
    """Open the page and stay until Ctrl+C."""
    stop = _Stop()
    limit_arenas()
    tgi_flags.understand(options, _say)
    host, users = access_flags.host_of(options), access_flags.users(options)
    port = free_port(host, options.port)
    api_port = free_port(host, options.api_port) if options.api_port is not None else None
    keys = access_flags.keys(options, _say)
    engine = make_engine(options)
    banner = torch_banner()
    if banner:
        _say(banner)
    if engine.settings.warning:
        _say(engine.settings.warning)
    _say(f"gptq-webui {__version__} is starting …")
    downloads = Downloads(engine.library, lambda plan: fit_of_plan(plan, engine.loaders, available_memory(engine.loaded)).text)
    downloads.find_unfinished()
    start = threading.Thread(target=_load_first, args=(engine, downloads, options), name="first load", daemon=True)
    start.start()  # torch and gradio are imported side by side

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from ..api import application as api
    from ..api.service import Limits, Service
    from ..ui import gradio_compat, page
    from ..ui.access import Access, Share
    from ..ui.api_box import Api
    from .web_server import WebServer

    per_client = access_flags.per_client(options)
    limits = Limits(options.max_input_length, options.queue or DEFAULT_LIMIT, options.parallel, per_client)
    service = Service(engine, downloads, keys, limits)
    service.gate.load_on_request = options.load_on_request
    panel = Api(lambda: keys.required, api_port) if gradio_compat.SIX else None
    access = Access(frozenset({users[0][0]}) if users else None)
    share = Share() if options.share else None
    preset = "Precise" if options.demo else "Model card"  # random choices mislead a model this small
    chats = ChatService(engine, most_running=per_client or MOST_RUNNING)
    blocks = page.build(engine, downloads, access=access, banner=banner, preset=preset, share=share, api=panel, chats=chats)
    names, origins = access_flags.hosts(options), options.cors or ()
    shown = page.application(blocks, users, access_flags.made(options, users))
    webs = [WebServer(api.build(service, page=shown, here=gradio_compat.SIX, hosts=names, origins=origins), host, port)]
    if api_port is not None:
        webs.append(WebServer(api.build(service, hosts=names, origins=origins), host, api_port))
    for web in webs:
        web.start()
    address = _address(host, port)
    _say(f"The page is at {address}, the API at the same address: {address}/docs")
    if api_port is not None:
        _say(f"The API is also at {_address(host, api_port)}")
    for name, password in users:
        said = "the password you gave" if options.auth and name == users[0][0] else f"password {password}"
        _say(f"  {'owner' if name == users[0][0] else 'guests'}: user {name}, {said}")
    if share is not None:
        _open_link("127.0.0.1" if host in _EVERYWHERE else host, port, share, users[-1])
        if share.info is not None:
            names.names.add(urlsplit(share.info.url).hostname or "")
        names.names.discard(access_flags.SHARE_HOST)  # other people's links end alike
    elif not options.no_browser and _has_display():
        import webbrowser

        webbrowser.open(address)
    stop.wait()
    _say("Stopping …")
    service.stop_all()
    chats.close()
    for web in webs:
        web.stop()
    if start.is_alive():  # a thread inside torch while the interpreter goes away would end in an abort
        sys.stderr.flush()
        os._exit(0)
    return 0


def _address(host: str, port: int) -> str:
    name = "127.0.0.1" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


class _Stop:
    """Ctrl+C, or the SIGTERM of a service manager. A second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before = {each: signal.signal(each, self._received) for each in (signal.SIGINT, signal.SIGTERM)}

    def wait(self) -> None:
        while not self._asked.wait(0.5):  # without a timeout, Windows does not deliver Ctrl+C
            pass

    def _received(self, *_: object) -> None:
        self._asked.set()
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


def free_port(host: str, asked: int | None) -> int:
    """The given port, else 7860 or the next free one. Raises BadParameter if the given one is taken."""
    for port in [asked] if asked is not None else range(DEFAULT_PORT, DEFAULT_PORT + _TRIED_PORTS):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if os.name != "nt":  # there the option lets two programs share a port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except OverflowError:
                raise BadParameter(f"{port} is not a port: ports are numbers from 1 to 65535.") from None
            except socket.gaierror:
                raise BadParameter(
                    f"{host!r} is not an address of this machine. Use 127.0.0.1, or 0.0.0.0 for every network."
                ) from None
            except OSError as error:
                if asked is not None:
                    raise BadParameter(
                        f"Port {port} on {host} cannot be used ({error.strerror}). Stop that program, or choose another --port."
                    ) from None
    raise BadParameter(f"No port from {DEFAULT_PORT} to {DEFAULT_PORT + _TRIED_PORTS - 1} is free. Name one with --port.")


def _load_first(engine: Engine, downloads: Downloads, options: argparse.Namespace) -> None:
    """Load --remote, --demo, --model or --model-id in the background; the page shows the progress."""
    try:
        name, given = requested_model(engine, options), load_options(options)
        if options.demo:
            engine.load_demo(options.loader, given)
        elif options.model_id and not options.model:
            name = first_model(engine, downloads, options.model_id, options.revision, _say)
            engine.load(name, options.loader, given)
        elif name:
            engine.load(name, options.loader, given)
        else:
            return
        assert engine.loaded is not None
        _say(f"{engine.loaded.model.name} is loaded.")
    except GptqWebuiError as error:
        engine.slot.report(str(error))
        _say(str(error))


def _open_link(host: str, port: int, share: "Share", guest: tuple[str, str]) -> None:
    """Make the public link, or say in one sentence why there is none; the local page keeps running."""
    from gradio import networking

    from ..ui.access import ShareInfo

    _say("Making a public link …")
    try:
        url = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        _say(
            f"No public link could be made ({in_words(error)}). "
            "A closed network or an antivirus program can be the reason; the page on this machine works."
        )
        return
    share.info = ShareInfo(url, *guest)
    _say(f"Public link: {url}")


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
