"""A server under attack for some minutes: good answers stay right and quick, and its memory stays flat.

Run `python benchmarks/soak.py --minutes 10` (a model without weights), or with `--models-dir FOLDER --model NAME`. The server
is a process of its own, with page, login and keys. Eight clients send good requests, and between them garbage, floods,
wrong and changing keys, prompts that do not fit, streams that they leave, and chats on which the chat template loops.
It prints a line a minute. Exit code 0: every good answer was the same as on the quiet server and came within the margin of
its time there, nothing ended in a status of 500 or more, and the memory is flat. 1: not so. 2: a request never ended.
"""
# mypy: ignore-errors

import argparse
import faulthandler
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

CLIENTS = 8
REQUEST_S = 30.0  # the limit of one request
STUCK_S = 90.0  # of one step of a client
START_S = 300.0  # of the server, with a large model
QUESTIONS = ("What is the capital of France?", "Name a colour of the sea.", "Write about bread and butter.")


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


# --- its clients -----------------------------------------------------------------------------------


def good_requests():
    """(name, path, body, text of the answer)."""
    for at, text in enumerate(QUESTIONS):
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, "seed": 1}
        yield f"chat {at}", "/v1/chat/completions", chat, lambda found: found["choices"][0]["message"]["content"]
        plain = {"prompt": text, "max_tokens": 12, "temperature": 0, "seed": 1}
        yield f"completion {at}", "/v1/completions", plain, lambda found: found["choices"][0]["text"]
        tgi = {"inputs": text, "parameters": {"max_new_tokens": 12, "do_sample": False, "seed": 1}}
        yield f"tgi {at}", "/generate", tgi, lambda found: found["generated_text"]
        kobold = {"prompt": text, "max_length": 12, "temperature": 0, "sampler_seed": 1}
        yield f"kobold {at}", "/api/v1/generate", kobold, lambda found: found["results"][0]["text"]


PATHS = (
    "/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/api/v1/generate", "/api/extra/tokencount",
    "/tokenize", "/v1/token/encode", "/lollms_generate", "/api/chat", "/v1/embeddings", "/v1/internal/logits", "/nowhere",
)  # fmt: skip
BODIES = (
    b"", b"null", b"[]", b"{", b"[" * 50_000, b'{"a":' * 20_000, b"\xff\xfe\x00", b'{"inputs": "\\ud800"}', b'{"prompt": NaN}',
    b'{"messages": 5}', b'{"messages": [{"role": 7}]}', b'{"prompt": {"a": []}, "max_tokens": "x"}', b'{"inputs": [1, [2]]}',
    b'{"messages": [], "max_tokens": 1e400}', b'{"prompt": "x", "temperature": -5}', b'{"prompt": "x", "n": 99999}',
    b'{"prompt": [1, -7, 99999999999]}', b'{"prompt": "x", "stop": [1, null]}', b"1" * 5000,
)  # fmt: skip


class Client(threading.Thread):
    """Sends a good request, then something else, again and again."""

    def __init__(self, at, soak):
        super().__init__(daemon=True, name=f"client {at}")
        self.soak, self.random = soak, random.Random(soak.options.seed + at)
        self.key = soak.keys.make(f"client {at}", admin=False)
        self.since, self.doing = time.monotonic(), "starting"
        self.http = soak.client(self.key)

    def step(self, doing):
        self.since, self.doing = time.monotonic(), doing

    def run(self):
        hostile = [self.garbage, self.garbage, self.flood, self.half_heads, self.wrong_keys, self.bomb, self.too_long, self.leave,
                   self.page, self.changed_key]  # fmt: skip
        while not self.soak.over.is_set():
            self.good()
            attack = self.random.choice(hostile)
            self.step(attack.__name__)
            try:
                attack()
            except Exception as error:  # a connection that the server cuts is an answer too
                self.soak.note_hostile(attack.__name__, type(error).__name__)

    def good(self):
        name, path, body, text_of = self.random.choice(self.soak.requests)
        self.step(f"good {name}")
        began = time.monotonic()
        try:
            answer = self.http.post(path, json=body)
            found = text_of(answer.json()) if answer.status_code == 200 else f"status {answer.status_code}: {answer.text[:200]}"
        except Exception as error:
            found = f"no answer: {type(error).__name__}"
        self.soak.note_good(name, found, time.monotonic() - began)

    def answered(self, kind, answer):
        if answer.status_code >= 500 or "Traceback" in answer.text:
            self.soak.fault(f"{kind}: status {answer.status_code}: {answer.text[:300]}")
        self.soak.note_hostile(kind, answer.status_code)

    def garbage(self):
        body = self.random.choice(BODIES)
        if self.random.random() < 0.3:
            body = self.random.randbytes(self.random.randrange(1, 2000))
        method = self.random.choice(("POST", "POST", "POST", "PUT", "GET", "DELETE"))
        self.answered("garbage", self.http.request(method, self.random.choice(PATHS), content=body))

    def flood(self):
        size = self.random.choice((1 << 20, 6 << 20))
        self.answered("flood", self.http.post(self.random.choice(PATHS), content=b'{"prompt": "' + b"a " * (size // 2) + b'"}'))

    def half_heads(self):
        lines = []
        try:
            for _ in range(10):
                line = socket.create_connection(("127.0.0.1", self.soak.port), timeout=5)
                lines.append(line)
                line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
        finally:
            self.soak.note_hostile("half heads", len(lines))
            for line in lines:
                line.close()

    def wrong_keys(self):
        for _ in range(10):
            headers = {"authorization": f"Bearer gw-{secrets.token_urlsafe(32)}"}
            answer = self.http.get("/v1/models", headers=headers)
            self.answered("wrong key", answer)
            if answer.status_code not in (401, 429):
                self.soak.fault(f"a wrong key was let in with status {answer.status_code}")

    def changed_key(self):
        name = f"passing {secrets.token_hex(4)}"
        key = self.soak.make_key(name)
        headers = {"authorization": f"Bearer {key}"}
        if (status := self.http.get("/v1/models", headers=headers).status_code) != 200:
            self.soak.fault(f"a new key got status {status}")
        self.soak.remove_key(name)
        answer = self.http.get("/v1/models", headers=headers)
        self.answered("removed key", answer)
        if answer.status_code == 200:
            self.soak.fault("a removed key was let in")

    def bomb(self):
        began = time.monotonic()
        body = {"messages": [{"role": "user", "content": f"a bomb {self.random.randrange(20)}"}], "max_tokens": 4}
        answer = self.http.post("/v1/chat/completions", json=body)
        self.answered("template bomb", answer)
        self.soak.note_bomb(time.monotonic() - began)
        if answer.status_code != 400:
            self.soak.fault(f"a template that loops got status {answer.status_code}")

    def too_long(self):
        path, body = self.random.choice(
            (("/v1/completions", {"prompt": "word " * 50_000}), ("/generate", {"inputs": "word " * 3000}))
        )
        self.answered("too long", self.http.post(path, json=body))

    def leave(self):
        body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 200, "stream": True}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_raw(), b"")
            self.soak.note_hostile("left stream", answer.status_code)

    def page(self):
        with self.soak.client(None) as stranger:
            answer = stranger.get("/")
            self.answered("page", answer)
            if answer.status_code != 200:
                self.soak.fault(f"the page got status {answer.status_code}")
            self.answered("stranger", stranger.post("/login", data={"username": "owner", "password": "guess"}))
            for prefix in ("/gradio_api", ""):
                session = secrets.token_hex(6)
                self.answered("stranger", stranger.get(f"{prefix}/heartbeat/{session}"))
                body = {"fn_index": 0, "data": [], "session_hash": session}
                self.answered("stranger", stranger.post(f"{prefix}/queue/join", json=body))


class Soak:
    def __init__(self, options, folder, port, keys):
        self.options, self.folder, self.port, self.keys = options, folder, port, keys
        self.over, self.lock = threading.Event(), threading.Lock()
        self.requests = list(good_requests())
        self.quiet = {}  # name -> (answer, seconds)
        self.faults, self.good, self.hostile = [], 0, Counter()
        self.slowest_s, self.late, self.bombs_s = 0.0, 0, []

    def client(self, key):
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=REQUEST_S, trust_env=False)

    def make_key(self, name):
        with self.lock:
            return self.keys.make(name, admin=False)

    def remove_key(self, name):
        with self.lock:
            self.keys.remove(name)

    def fault(self, text):
        with self.lock:
            self.faults.append(text)
        say(f"FAULT {text}")

    def note_good(self, name, found, took_s):
        wanted, quiet_s = self.quiet[name]
        if found != wanted:
            self.fault(f"{name} answered {found!r} instead of {wanted!r}")
        with self.lock:
            self.good += 1
            self.slowest_s = max(self.slowest_s, took_s - quiet_s)
            late = took_s - quiet_s > self.options.margin_s
            self.late += late
        if late:
            say(f"LATE  {name} took {took_s:.2f} s, {quiet_s:.2f} s on the quiet server")

    def note_hostile(self, kind, how):
        with self.lock:
            self.hostile[kind, how] += 1

    def note_bomb(self, took_s):
        with self.lock:
            self.bombs_s.append(took_s)

    def measure_quiet(self):
        with self.client(self.keys.make("quiet", admin=False)) as http:
            for name, path, body, text_of in self.requests:
                found = []
                for _ in range(3):
                    began = time.monotonic()
                    answer = http.post(path, json=body)
                    answer.raise_for_status()
                    found.append((text_of(answer.json()), time.monotonic() - began))
                if len({text for text, _took_s in found}) != 1:
                    raise SystemExit(f"{name} answers differently each time: {found}")
                self.quiet[name] = found[0][0], statistics.median(took_s for _text, took_s in found)
        times = [took_s for _text, took_s in self.quiet.values()]
        say(f"quiet: {len(times)} requests, {min(times):.2f} to {max(times):.2f} s each")

    def minute(self, at, memory):
        with self.lock:
            good, slowest_s, late, hostile, bombs = self.good, self.slowest_s, self.late, self.hostile, self.bombs_s
            self.slowest_s, self.bombs_s = 0.0, []
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "?"
        say(
            f"minute {at}: {good:,} good, {sum(hostile.values()):,} others; slowest good +{slowest_s:.2f} s, {late} late; "
            f"slowest template {max(bombs, default=0):.2f} s; {memory / 1e6:.1f} MB; {len(self.faults)} faults; load {load}"
        )


def memory_of(process):
    """Bytes of the server's process; its children come and go and have limits of their own."""
    import psutil

    return psutil.Process(process.pid).memory_info().rss


def watch(soak, clients, process):
    """Until the time is over. Returns (bytes in the minute after the first part, bytes in the last one)."""
    began, samples, minute = time.monotonic(), [], 0
    total_s = soak.options.minutes * 60
    while (passed_s := time.monotonic() - began) < total_s:
        time.sleep(min(2.0, total_s - passed_s + 0.01))
        if process.poll() is not None:
            soak.fault(f"the server's process ended with {process.returncode}")
            break
        samples.append((time.monotonic() - began, memory_of(process)))
        if int((time.monotonic() - began) // 60) > minute:
            minute = int((time.monotonic() - began) // 60)
            soak.minute(minute, samples[-1][1])
        stuck = [each for each in clients if time.monotonic() - each.since > STUCK_S]
        if stuck:
            say("STUCK " + ", ".join(f"{each.name} in {each.doing}" for each in stuck))
            process.kill()
            os._exit(2)
    if not samples:
        return 0, 0
    piece_s = min(60.0, total_s / 4)
    warm = [size for at, size in samples if total_s / 4 <= at < total_s / 4 + piece_s] or [samples[0][1]]
    last = [size for at, size in samples if at >= total_s - piece_s] or [samples[-1][1]]
    return statistics.median(warm), statistics.median(last)


def attack(options, folder):
    from bootstrap import register

    register()
    from gptq_webui.api.auth import Keys

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = Keys(folder / "api_keys.json")
    keys.make("first", admin=True)  # the server is locked from its start
    command = [sys.executable, str(Path(__file__).with_name("soak_server.py")), str(folder), str(port)]
    command += [options.models_dir] * bool(options.models_dir) + [options.model] * bool(options.models_dir and options.model)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    late = threading.Timer(START_S, process.kill)
    late.daemon = True  # or this process would live until it rings
    late.start()
    try:
        if "ready" not in (process.stdout.readline() or ""):
            raise SystemExit("the server did not start")
        late.cancel()
        say(f"the server is process {process.pid} on port {port}; {options.minutes:g} minutes, seed {options.seed}")
        soak = Soak(options, folder, port, keys)
        soak.measure_quiet()
        clients = [Client(at, soak) for at in range(CLIENTS)]
        for each in clients:
            each.start()
        warm, last = watch(soak, clients, process)
        soak.over.set()
        until = time.monotonic() + REQUEST_S + 15
        for each in clients:
            each.join(max(0.1, until - time.monotonic()))
        return verdict(soak, warm, last)
    finally:
        late.cancel()
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def verdict(soak, warm, last):
    growth = (last - warm) / warm if warm else 0.0
    for kind in sorted({kind for kind, _how in soak.hostile}):
        say(f"  {kind}: " + ", ".join(f"{how} x{n}" for (each, how), n in sorted(soak.hostile.items(), key=str) if each == kind))
    flat = growth < 0.05
    say(f"memory {warm / 1e6:.1f} MB after the first part, {last / 1e6:.1f} MB at the end ({growth:+.1%})")
    well = not soak.faults and not soak.late and flat and soak.good > 0
    say(f"{'PASSED' if well else 'FAILED'}: {soak.good:,} good answers, {len(soak.faults)} faults, {soak.late} late, "
        f"memory {'flat' if flat else 'grows'}")  # fmt: skip
    return 0 if well else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--margin-s", type=float, default=2.0, help="how much later than on the quiet server an answer may come")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models-dir", help="a folder with models, instead of a model without weights")
    parser.add_argument("--model", help="its name")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.minutes * 60 + 600, exit=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return attack(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
