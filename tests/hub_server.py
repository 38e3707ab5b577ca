"""A Hub on loopback: the real huggingface-hub client, of 0.36 and of 2.x, works against it.

    with HubServer() as server:
        server.add("owner/name", {"config.json": b"{}"}, branch="main")
        ... HF_ENDPOINT=server.url ...

As on the real Hub, large files are answered with a redirect to another host (here another
port, `cdn_url`) and a signed link that expires. `python tests/hub_server.py FOLDER owner/name[:branch]`
serves a folder by hand. Faults are attributes of the server; see HubServer.
"""

import argparse
import base64
import email.utils
import hashlib
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".gguf", ".model")  # kept in large-file storage whatever their size
LARGE_BYTES = 10_000_000
PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Blob:
    """One file's content, in memory or on disk."""

    data: bytes | None
    path: Path | None
    size_bytes: int
    sha256: str
    git_sha1: str
    large: bool

    @classmethod
    def of(cls, name: str, content: bytes | Path) -> "Blob":
        data, path = (content, None) if isinstance(content, bytes) else (None, content)
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
        large = name.endswith(LARGE) or size >= LARGE_BYTES
        for piece in _pieces(data, path, 0, size):
            sha256.update(piece)
            git.update(piece)
        if large:  # git holds a pointer
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n".encode()
            git = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer)
        return cls(data, path, size, sha256.hexdigest(), git.hexdigest(), large)

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        return _pieces(self.data, self.path, start, end)


def _pieces(data: bytes | None, path: Path | None, start: int, end: int) -> Iterator[bytes]:
    if data is not None:
        for at in range(start, end, PIECE_BYTES):
            yield data[at : min(at + PIECE_BYTES, end)]
        return
    assert path is not None
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(PIECE_BYTES, end - start))
            start += len(piece)
            yield piece


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    gated: str | bool = False
    private: bool = False
    moved_to: str = ""


@dataclass(frozen=True)
class Seen:
    """One request, as it came."""

    host: str  # "hub" or "cdn"
    method: str
    path: str
    authorization: str
    range: str
    user_agent: str


@dataclass
class Fault:
    """Answered once instead of a file; `host` is hub, cdn, or api for the lists."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    host: str = "hub"


class HubServer:
    """Knobs may be turned while it runs."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = "hf_good"  # the one that is accepted
        self.token_has_access = True  # to gated repositories
        self.seen: list[Seen] = []
        self.bytes_served = 0  # of file contents
        self.connections_cut = 0
        self.cut_every_bytes: int | None = None  # of file contents, per response
        self.cut_between: tuple[int, int] | None = None  # the same, at random in these limits
        self.cut_hard = False  # with a reset instead of an orderly end
        self.stall_after_bytes: int | None = None  # then silence, until the server ends
        self.rate_bytes_per_s: float | None = None
        self.faults: list[Fault] = []
        self.ignores_range = False
        self.links_used_once = False  # a signed link is refused the second time, as an expired one
        self.damage: dict[str, int] = {}  # path -> how many times it is served with one wrong byte
        self.down = False  # every request fails with 503
        self.truncates_json = False
        self.xet = ""  # "works": large files are offered by Xet too; "fails": without the chunks; "ends": with none
        self.xet_ranges: list[str] = []  # what was asked for of such files
        self.lists_also: list[dict[str, Any]] = []  # entries that no file stands behind
        self.latency_s = 0.0  # before every answer
        self.bytes_answered = 0  # of every body, lists and settings included
        self.token_may_write = True
        self.uploaded: dict[str, bytes] = {}  # large files that were put, by sha256
        self.put_requests = 0
        self._links: dict[str, Blob] = {}
        self._xet_blobs: dict[str, Blob] = {}
        self._names: dict[str, str] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._hub = _Server(("127.0.0.1", port), _Hub, self)
        self._cdn = _Server(("127.0.0.1", 0), _Cdn, self)
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.cdn_url = f"http://localhost:{self._cdn.server_address[1]}"

    def __enter__(self) -> "HubServer":
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        branch: str = "main",
        gated: str | bool = False,
        private: bool = False,
    ) -> str:
        """Put a branch, or move it; returns its commit. Files of a folder are read when they are served."""
        if isinstance(files, Path):
            contents: dict[str, bytes | Path] = {
                path.relative_to(files).as_posix(): path for path in sorted(files.rglob("*")) if path.is_file()
            }
        else:
            contents = dict(files)
        blobs = {name: Blob.of(name, content) for name, content in contents.items()}
        text = "".join(f"{name} {blob.git_sha1}\n" for name, blob in sorted(blobs.items()))
        commit = hashlib.sha1(f"{repo}:{branch}\n{text}".encode()).hexdigest()
        entry = self.repos.setdefault(repo, Repo())
        entry.gated, entry.private = gated, private
        entry.branches[branch] = commit
        entry.commits[commit] = blobs
        return commit

    def requests(self, host: str = "", containing: str = "", method: str = "GET") -> list[Seen]:
        return [each for each in self.seen if host in each.host and containing in each.path and each.method == method]

    def file_requests(self, name: str = "") -> list[Seen]:
        """GETs that asked for a file's content from the Hub."""
        return [each for each in self.requests("hub", "/resolve/") if each.path.endswith(f"/{name}" if name else "")]

    def _link(self, name: str, blob: Blob) -> str:
        with self._lock:
            key = f"{len(self._links):06x}{blob.sha256[:16]}"
            self._links[key], self._names[key] = blob, name
        return f"{self.cdn_url}/objects/{blob.sha256}?X-Signature={key}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type, hub: HubServer) -> None:
        super().__init__(address, handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host = "hub"
    server: _Server

    def setup(self) -> None:
        # what the kernel holds back was counted as served but never arrives at a client that is killed
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE_BYTES)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_HEAD(self) -> None:
        self._do()

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def do_PUT(self) -> None:
        self._do()

    def _do(self) -> None:
        headers = self.headers
        asked = (headers.get("Authorization", ""), headers.get("Range", ""), headers.get("User-Agent", ""))
        self.hub.seen.append(Seen(self.host, self.command, self.path, *asked))
        time.sleep(self.hub.latency_s)
        try:
            if self.hub.down:
                self.answer(503, b"down")
            else:
                self.route()
        except (_Cut, ConnectionError):
            self.close_connection = True

    def route(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.hub.bytes_answered += len(body)
            self.wfile.write(body)

    def answer_json(self, values: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(values).encode()
        self.answer(status, body[: len(body) // 2] if self.hub.truncates_json else body, "application/json", **headers)

    def answer_fault(self, host: str = "") -> bool:
        for fault in self.hub.faults:
            if fault.host == (host or self.host):
                self.hub.faults.remove(fault)
                self.answer(fault.status, b"fault", **{name.replace("-", "_"): value for name, value in fault.headers.items()})
                return True
        return False

    def answer_blob(self, name: str, blob: Blob, **headers: str) -> None:
        start, end, status = 0, blob.size_bytes, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and not self.hub.ignores_range:
            first, _, last = asked[6:].partition("-")
            start = int(first)
            end = min(int(last) + 1, end) if last else end
            if start >= blob.size_bytes:
                return self.answer(416, Content_Range=f"bytes */{blob.size_bytes}")
            status, headers["Content_Range"] = 206, f"bytes {start}-{end - 1}/{blob.size_bytes}"
        self.send_response(status)
        for key, value in {**headers, "Accept_Ranges": "bytes", "Content_Length": str(end - start)}.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return None
        wrong = self.hub.damage.get(name, 0)
        if wrong:
            self.hub.damage[name] = wrong - 1
        sent, since_s = 0, time.monotonic()
        at_random = random.randint(*self.hub.cut_between) if self.hub.cut_between else None
        for whole in blob.pieces(start, end):
            piece = bytes([whole[0] ^ 1]) + whole[1:] if wrong and sent == 0 else whole
            limit = at_random if at_random is not None else self.hub.cut_every_bytes
            cut = limit is not None and sent + len(piece) >= limit
            piece = piece[: limit - sent] if cut and limit is not None else piece
            self.wfile.write(piece)
            sent += len(piece)
            with self.hub._lock:
                self.hub.bytes_served += len(piece)
                self.hub.bytes_answered += len(piece)
            if cut:
                self._cut()
            if self.hub.stall_after_bytes is not None and sent >= self.hub.stall_after_bytes:
                self.hub._ending.wait()
                raise _Cut
            if self.hub.rate_bytes_per_s:
                time.sleep(max(0.0, since_s + sent / self.hub.rate_bytes_per_s - time.monotonic()))
        return None

    def _cut(self) -> None:
        self.hub.connections_cut += 1
        if self.hub.cut_hard:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.request.close()
        else:
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
        raise _Cut


class _Cdn(_Handler):
    """Where large files lie. Knows links, no tokens."""

    host = "cdn"

    def route(self) -> None:
        if self.answer_fault():
            return None
        path = urlsplit(self.path).path
        if self.command == "PUT":
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.hub.put_requests += 1
            self.hub.uploaded[hashlib.sha256(body).hexdigest()] = body
            return self.answer(200, ETag='"x"')
        if path.startswith(("/v1/reconstructions/", "/v2/reconstructions/", "/xorb/")):
            return self.xet(path)
        key = parse_qs(urlsplit(self.path).query).get("X-Signature", [""])[0]
        blob = self.hub._links.get(key)
        if blob is None:
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        if self.hub.links_used_once:
            self.hub._links.pop(key)
        return self.answer_blob(self.hub._names[key], blob, ETag=f'"{blob.sha256}"')

    def xet(self, path: str) -> None:
        """A file of Xet's is one xorb of chunks, each with 8 bytes before it (version 0, sizes, not compressed)."""
        found = self.hub._xet_blobs.get(path.rpartition("/")[2])
        if self.hub.xet == "ends":
            return self.answer_json({"offset_into_first_range": 0, "terms": [], "fetch_info": {}, "xorbs": {}})
        if found is None or self.hub.xet != "works" or path.startswith("/v2/"):
            return self.answer(404)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1, found.size_bytes) if last else found.size_bytes
        if path.startswith("/xorb/"):
            stored = b"".join(_chunk(piece) for piece in found.pieces(0, found.size_bytes))
            body = stored[int(first) : int(last) + 1] if last else stored[int(first) :]
            self.hub.bytes_served += len(body)
            return self.answer(206, body)
        self.hub.xet_ranges.append(self.headers.get("Range", ""))
        from_chunk, to_chunk = int(first) // PIECE_BYTES, -(-stop // PIECE_BYTES)
        chunks = {"start": from_chunk, "end": to_chunk}
        size = min(to_chunk * PIECE_BYTES, found.size_bytes)
        addresses = {"start": from_chunk * (PIECE_BYTES + 8), "end": size + 8 * to_chunk - 1}
        fetch = [{"range": chunks, "url": f"{self.hub.cdn_url}/xorb/{found.sha256}", "url_range": addresses}]
        term = {"hash": found.sha256, "unpacked_length": size - from_chunk * PIECE_BYTES, "range": chunks}
        offset = int(first) - from_chunk * PIECE_BYTES
        return self.answer_json({"offset_into_first_range": offset, "terms": [term], "fetch_info": {found.sha256: fetch}})


def _chunk(data: bytes) -> bytes:
    size = len(data).to_bytes(3, "little")
    return b"\0" + size + b"\0" + size + data


class _Hub(_Handler):
    def route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        is_form = "json" not in self.headers.get("Content-Type", "")
        form = parse_qs(body.decode()) if length and is_form else {}
        parts = urlsplit(self.path)
        pieces = [unquote(piece) for piece in parts.path.split("/")[1:]]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.hub.token:
            message = "Invalid credentials in Authorization header"
            return self.answer_json({"error": message}, 401, X_Error_Message=message)
        if self.command == "POST" and not is_form:
            return self.write(pieces, body, token)
        api = pieces[:2] == ["api", "models"]
        pieces = pieces[2:] if api else pieces
        if len(pieces) < 2:
            return self.answer_json({"error": "Not found"}, 404)
        name, rest = "/".join(pieces[:2]), pieces[2:]
        repo = self.hub.repos.get(name)
        if repo is not None and repo.moved_to:
            prefix = "/api/models/" if api else "/"
            where = prefix + repo.moved_to + parts.path[len(prefix + name) :] + (f"?{parts.query}" if parts.query else "")
            return self.answer(307, Location=where)
        if repo is None or (repo.private and not token):
            if not token:  # the Hub does not tell a stranger which of the two it is, and gives no code
                message = "Invalid username or password."
                return self.answer_json({"error": message}, 401, X_Error_Message=message)
            return self.answer_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if api and self.answer_fault("api"):
            return None
        if api:
            return self.api(name, repo, rest, parse_qs(parts.query), form)
        if len(rest) > 2 and rest[0] == "resolve":
            return self.resolve(name, repo, rest[1], "/".join(rest[2:]), token)
        return self.answer_json({"error": "Not found"}, 404)

    def write(self, pieces: list[str], body: bytes, token: str) -> None:
        """The calls with which huggingface-hub uploads: a repository, a branch, a commit with its files."""
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        given = lines[0] if lines else {}
        if pieces == ["api", "validate-yaml"]:
            return self.answer_json({"errors": [], "warnings": []})
        if not token or not self.hub.token_may_write:
            message = "You don't have the rights to create a model under this namespace"
            return self.answer_json({"error": message}, 403 if token else 401, X_Error_Message=message)
        if self.answer_fault("write"):
            return None
        if pieces == ["api", "repos", "create"]:
            name = "/".join(each for each in (given.get("organization"), given["name"]) if each)
            if name in self.hub.repos:
                return self.answer_json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.add(
                name, {".gitattributes": b""}, private=bool(given.get("private")) or given.get("visibility") == "private"
            )
            return self.answer_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        api = pieces[:2] == ["api", "models"]
        pieces = pieces[2:] if api else pieces
        name, rest = "/".join(pieces[:2]).removesuffix(".git"), pieces[2:]
        repo = self.hub.repos[name]
        if rest[:1] == ["branch"]:
            if rest[1] in repo.branches:
                return self.answer_json({"error": "exists"}, 409)
            repo.branches[rest[1]] = repo.branches["main"]
            return self.answer_json({})
        if rest[:1] == ["preupload"]:
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for each in given["files"]
            ]
            return self.answer_json({"files": modes})
        if rest == ["info", "lfs", "objects", "batch"]:
            objects = [
                each if each["oid"] in self.hub.uploaded else each | {"actions": {"upload": {"href": f"{self.hub.cdn_url}/put"}}}
                for each in given["objects"]
            ]
            return self.answer_json({"transfer": "basic", "objects": objects})
        if rest[:1] == ["commit"]:
            files: dict[str, bytes | Path] = {}
            for line in lines[1:]:
                value = line["value"]
                files[value["path"]] = (
                    self.hub.uploaded[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                )
            commit = self.hub.add(name, files, rest[1], repo.gated, repo.private)  # type: ignore[arg-type]
            url = f"https://huggingface.co/{name}/commit/{commit}"  # huggingface-hub 0.36 reads no other host's
            return self.answer_json({"success": True, "commitUrl": url, "commitOid": commit})
        return self.answer_json({"error": "Not found"}, 404)

    def commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.branches.get(revision, revision)
        if commit in repo.commits:
            return commit
        self.answer_json({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        return None

    def api(self, name: str, repo: Repo, rest: list[str], query: dict[str, list[str]], form: dict[str, list[str]]) -> None:
        what = rest[0] if rest else ""
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            return self.answer_json({"branches": branches, "converts": [], "tags": []})
        if (commit := self.commit(repo, rest[1] if len(rest) > 1 else "main")) is None:
            return None
        blobs = repo.commits[commit]
        if what in ("", "revision"):
            siblings: list[dict[str, Any]] = []
            for path, blob in blobs.items():
                entry: dict[str, Any] = {"rfilename": path}
                if query.get("blobs"):
                    entry |= {"size": blob.size_bytes, "blobId": blob.git_sha1}
                    if blob.large:
                        entry["lfs"] = {"sha256": blob.sha256, "size": blob.size_bytes, "pointerSize": 134}
                siblings.append(entry)
            siblings += self.hub.lists_also
            return self.answer_json(
                {"id": name, "modelId": name, "sha": commit, "private": repo.private, "gated": repo.gated, "disabled": False,
                 "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
            )  # fmt: skip
        if what == "xet-read-token":
            return self.answer_json({"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": self.hub.cdn_url})
        if what == "tree":
            under = "/".join(rest[2:])
            return self.answer_json([_tree_entry(path, blob) for path, blob in blobs.items() if path.startswith(under)])
        if what == "paths-info":
            wanted = form.get("paths", [])
            return self.answer_json([_tree_entry(path, blob) for path, blob in blobs.items() if path in wanted])
        return self.answer_json({"error": "Not found"}, 404)

    def resolve(self, name: str, repo: Repo, revision: str, path: str, token: str) -> None:
        if self.answer_fault():
            return None
        if (commit := self.commit(repo, revision)) is None:
            return None
        if repo.gated and not (token and self.hub.token_has_access):
            message = f"Access to model {name} is restricted."
            return self.answer(403 if token else 401, message.encode(), X_Error_Code="GatedRepo", X_Error_Message=message)
        blob = repo.commits[commit].get(path)
        if blob is None:
            return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not blob.large:
            return self.answer_blob(path, blob, ETag=f'"{blob.git_sha1}"', X_Repo_Commit=commit)
        offer = {}
        if self.hub.xet:
            route = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
            offer = {"X_Xet_Hash": blob.sha256, "Link": f'<{route}>; rel="xet-auth"'}
            self.hub._xet_blobs[blob.sha256] = blob
        return self.answer(
            302, b"Found. Redirecting", Location=self.hub._link(path, blob), X_Repo_Commit=commit,
            X_Linked_ETag=f'"{blob.sha256}"', X_Linked_Size=str(blob.size_bytes), **offer,
        )  # fmt: skip


def _tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size_bytes, "oid": blob.git_sha1}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size_bytes, "pointerSize": 134}
    return entry


def http_date(from_now_s: float) -> str:
    return email.utils.formatdate(time.time() + from_now_s, usegmt=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ref", help="owner/name or owner/name:branch")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, help="bytes per second")
    parser.add_argument("--cut-every", type=int, help="bytes")
    options = parser.parse_args()
    repo, _, branch = options.ref.partition(":")
    with HubServer(options.port) as server:
        server.rate_bytes_per_s, server.cut_every_bytes = options.rate, options.cut_every
        server.add(repo, options.folder, branch or "main")
        print(f"HF_ENDPOINT={server.url} serves {options.ref}; address {server.url}/{quote(repo)}. Ctrl+C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
