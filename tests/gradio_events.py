"""Events of a page called over HTTP, as a browser calls them, but without one."""

import json
import secrets
import threading

import httpx

from gptq_webui.ui import gradio_compat


class Visitor:
    """One open page."""

    def __init__(self, url: str, name: str = "", password: str = "") -> None:
        base = url.rstrip("/")
        prefix = "/gradio_api" if gradio_compat.SIX else ""
        self.session = secrets.token_hex(5)
        self._client = httpx.Client(base_url=base + prefix, trust_env=False, verify=False, timeout=60)
        if name:
            assert self._client.post(f"{base}/login", data={"username": name, "password": password}).status_code == 200

    def press(self, index: int, data: list) -> None:
        """Begin an event; its messages wait for `listen`."""
        body = {"data": data, "fn_index": index, "session_hash": self.session}
        joined = self._client.post("/queue/join", json=body)
        assert joined.status_code == 200, joined.text

    def call(self, index: int, data: list) -> tuple[dict, str]:
        """(final message of the queue, everything that came) of one event."""
        self.press(index, data)
        seen = ""
        with self._client.stream("GET", "/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                seen += line
                if line.startswith("data:") and (message := json.loads(line[5:]))["msg"] == "process_completed":
                    return message, seen
        raise AssertionError(seen)

    def stay(self) -> None:
        """Keep the page open: read and forget its messages."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            with self._client.stream("GET", "/queue/data", params={"session_hash": self.session}, timeout=None) as stream:
                for _line in stream.iter_lines():
                    pass
        except (httpx.HTTPError, RuntimeError):
            pass

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def indexes(page, module: str, name: str) -> list[int]:
    """The events whose handler is this function."""
    return [
        index
        for index, each in page.fns.items()
        if each.fn is not None and each.fn.__module__.rpartition(".")[2] == module and getattr(each.fn, "__name__", "") == name
    ]
