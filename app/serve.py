"""The one server process: engine, page, and where its address is told."""

import argparse
import os
import secrets
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from .. import __version__
from ..core.errors import BadParameter, GptqWebuiError
from ..engine.advice import fit_of_plan, free_memory, torch_banner
from ..engine.downloads import Downloads
from ..engine.engine import Engine
from .commands import asked_model, load_options, make_engine

if TYPE_CHECKING:
    from ..ui.access import Share

DEFAULT_PORT = 7860
_TRIED_PORTS = 100


def serve(options: argparse.Namespace) -> int:
    """Open the page and stay until Ctrl+C."""
    stop = _Stop()
    users = _users(options)
    port = free_port(options.host, options.port)
    engine = make_engine(options)
    banner = torch_banner()
    if banner:
        _tell(banner)
    if engine.settings.warning:
        _tell(engine.settings.warning)
    _tell(f"gptq-webui {__version__} is starting …")
    start = threading.Thread(target=_load_first, args=(engine, options), name="first load", daemon=True)
    start.start()  # torch and gradio are imported side by side

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from ..ui import page
    from ..ui.access import Access, Share

    access = Access(frozenset({users[0][0]}) if users else None)
    share = Share() if options.share else None
    preset = "Precise" if options.demo else "Model card"  # drawing lots leads a model this small astray
    downloads = Downloads(engine.library, lambda plan: fit_of_plan(plan, engine.loaders, free_memory()).text)
    downloads.find_unfinished()
    blocks = page.build(engine, downloads, access=access, banner=banner, preset=preset, share=share)
    _reach_ourselves(options.host)
    blocks.launch(
        server_name=options.host,
        server_port=port,
        auth=users or None,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        **page.launch_options(),
    )
    shown_host = "127.0.0.1" if options.host in ("0.0.0.0", "") else f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{shown_host}:{port}"
    _tell(f"The page is at {address}")
    for name, password in users:
        shown = "the password you gave" if options.auth and name == users[0][0] else f"password {password}"
        _tell(f"  {'owner' if name == users[0][0] else 'guests'}: user {name}, {shown}")
    if share is not None:
        _open_link(options.host if options.host not in ("0.0.0.0", "::", "") else "127.0.0.1", port, share, users[-1])
    elif not options.no_browser and _has_display():
        import webbrowser

        webbrowser.open(address)
    stop.wait()
    _tell("Stopping …")
    blocks.close(verbose=False)
    return 0


def _reach_ourselves(host: str) -> None:
    """Gradio asks its own address at the start; a proxy of the user's must not stand between."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [each for each in os.environ.get(name, "").split(",") if each]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost", host]))


class _Stop:
    """Ctrl+C, or the SIGTERM of a service manager. A second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before = {each: signal.signal(each, self._hear) for each in (signal.SIGINT, signal.SIGTERM)}

    def wait(self) -> None:
        while not self._asked.wait(0.5):  # without a limit, Windows would not hear Ctrl+C
            pass

    def _hear(self, *_: object) -> None:
        self._asked.set()
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


def free_port(host: str, asked: int | None) -> int:
    """The port that was asked for, else 7860 or the next free one. Raises BadParameter if it is taken."""
    for port in [asked] if asked is not None else range(DEFAULT_PORT, DEFAULT_PORT + _TRIED_PORTS):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if os.name != "nt":  # there the option lets two programs share a port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except OverflowError:
                raise BadParameter(f"{port} is no port; ports go from 1 to 65535.") from None
            except socket.gaierror:
                raise BadParameter(
                    f"{host!r} is no address of this machine. Use 127.0.0.1, or 0.0.0.0 for every network."
                ) from None
            except OSError as error:
                if asked is not None:
                    raise BadParameter(
                        f"Port {port} on {host} cannot be used ({error.strerror}). Stop that program, or choose another --port."
                    ) from None
    raise BadParameter(f"No port from {DEFAULT_PORT} to {DEFAULT_PORT + _TRIED_PORTS - 1} is free. Name one with --port.")


def _users(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, password) of the owner and, with --share, of the guests."""
    users: list[tuple[str, str]] = []
    if options.auth:
        name, colon, password = options.auth.partition(":")
        if not colon or not name or not password:
            raise BadParameter("--auth wants USER:PASSWORD, for example --auth me:correct-horse.")
        users.append((name, password))
    if options.share:
        if not users:
            users.append(("owner", secrets.token_urlsafe(9)))
        users.append(("guest" if users[0][0] != "guest" else "visitor", secrets.token_urlsafe(9)))
    return users


def _load_first(engine: Engine, options: argparse.Namespace) -> None:
    """--remote, --demo or --model, in the background; the page shows how far it is."""
    try:
        name = asked_model(engine, options)
        if options.demo:
            engine.load_demo(options.loader, load_options(options))
        elif name:
            engine.load(name, options.loader, load_options(options))
        else:
            return
        assert engine.loaded is not None
        _tell(f"{engine.loaded.model.name} is loaded.")
    except GptqWebuiError as error:
        engine.report(str(error))
        _tell(str(error))


def _open_link(host: str, port: int, share: "Share", guest: tuple[str, str]) -> None:
    """Make the public link, or say in one sentence why there is none; the local page goes on."""
    from gradio import networking

    from ..ui.access import ShareInfo

    _tell("Making a public link …")
    try:
        url = networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        _tell(
            f"No public link could be made ({(str(error).strip().splitlines() or [type(error).__name__])[0]}). "
            "A closed network or an antivirus program can be the reason; the page on this machine works."
        )
        return
    share.info = ShareInfo(url, *guest)
    _tell(f"Public link: {url}")


def _has_display() -> bool:
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
