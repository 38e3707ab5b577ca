"""Many clients at once: honest ones, some that leave, some that read nothing, some that send garbage.

`python tests/storm.py URL SECONDS` runs it against a server that is up, and prints what it saw.
"""

import json
import random
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.util import find_spec

import httpx

PROMPTS = ["The capital of France is", "Once upon a time there was", "Water boils at", "To make bread, you need"]


@dataclass
class Outcome:
    right: int = 0
    refused: int = 0  # 429, as it should be
    left: int = 0
    stalled: int = 0
    garbage: int = 0
    wrong: list = field(default_factory=list)
    memory: list = field(default_factory=list)  # (seconds, bytes of the server)
    longest_s: float = 0.0

    @property
    def growth(self):
        """Memory of the last third beside that of the second, as a share: 0.01 is 1% more. The first third warms up."""
        end = self.memory[-1][0]
        middle = [size for at, size in self.memory if end / 3 <= at < end * 2 / 3]
        last = [size for at, size in self.memory if at >= end * 2 / 3]
        return (sum(last) / len(last)) / (sum(middle) / len(middle)) - 1


def cases(tokens, prompts):
    """Questions with a seed, over several protocols."""
    found = []
    for at, prompt in enumerate(PROMPTS[:prompts]):
        seed = 100 + at
        common = {"temperature": 0.8, "seed": seed}
        found += [
            ("tgi", {"inputs": prompt, "parameters": {**common, "max_new_tokens": tokens}}),
            ("tgi stream", {"inputs": prompt, "parameters": {**common, "max_new_tokens": tokens}}),
            ("openai", {"prompt": prompt, "max_tokens": tokens, **common}),
            ("openai stream", {"prompt": prompt, "max_tokens": tokens, "stream": True, **common}),
            ("chat stream", {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True, **common}),
            ("kobold", {"prompt": prompt, "max_length": tokens, "temperature": 0.8, "sampler_seed": seed}),
        ]
        if find_spec("llguidance"):
            found.append(
                ("openai", {"prompt": prompt, "max_tokens": tokens, "response_format": {"type": "json_object"}, **common})
            )
    return found


def ask(http, kind, body):
    """(status, text) of one question."""
    if kind == "tgi":
        answer = http.post("/generate", json=body)
        return answer.status_code, answer.json().get("generated_text")
    if kind == "tgi stream":
        answer = http.post("/generate_stream", json=body)
        lines = [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]
        return answer.status_code, lines[-1].get("generated_text")
    if kind == "openai":
        answer = http.post("/v1/completions", json=body)
        return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
    if kind == "kobold":
        answer = http.post("/api/v1/generate", json=body)
        return answer.status_code, answer.json()["results"][0]["text"] if answer.status_code == 200 else None
    answer = http.post("/v1/chat/completions" if kind == "chat stream" else "/v1/completions", json=body)
    if answer.status_code != 200:
        return answer.status_code, None
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [each["choices"][0] for each in lines]
    return 200, "".join(each["text"] if "text" in each else each["delta"].get("content", "") for each in choices)


def memory(http):
    return float(re.search(r"^process_resident_memory_bytes (\S+)", http.get("/metrics").text, re.MULTILINE)[1])


def storm(url, seconds, clients=16, tokens=8, prompts=4):
    """Run it; every honest answer is compared with that of a quiet server."""
    outcome, lock = Outcome(), threading.Lock()
    quiet = httpx.Client(base_url=url, trust_env=False, timeout=300)
    questions = cases(tokens, prompts)
    expected = []
    for kind, body in questions:
        status, text = ask(quiet, kind, body)
        assert status == 200, (kind, status)
        expected.append(text)
    began = time.monotonic()
    end = began + seconds

    def honest(random):
        with httpx.Client(base_url=url, trust_env=False, timeout=300) as http:
            while time.monotonic() < end:
                at = random.randrange(len(questions))
                asked = time.monotonic()
                status, text = ask(http, *questions[at])
                with lock:
                    outcome.longest_s = max(outcome.longest_s, time.monotonic() - asked)
                    if status in (429, 503):
                        outcome.refused += 1
                    elif status == 200 and text == expected[at]:
                        outcome.right += 1
                    else:
                        outcome.wrong.append((questions[at], status, text, expected[at]))

    def leaving(random):
        body = {"inputs": "Count: one, two,", "parameters": {"max_new_tokens": 500}}
        while time.monotonic() < end:
            with (
                httpx.Client(base_url=url, trust_env=False, timeout=300) as http,
                http.stream("POST", "/generate_stream", json=body) as answer,
            ):
                for at, _line in enumerate(answer.iter_lines()):
                    if at > random.randrange(6):
                        break
            outcome.left += 1
            time.sleep(random.random())

    def stalling(random):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "Go on:", "max_tokens": 5 * tokens, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        while time.monotonic() < end:
            with socket.create_connection((host, int(port))) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                line.sendall(head + body)
                time.sleep(min(random.random() * 8, max(0.1, end - time.monotonic())))  # and reads nothing
            outcome.stalled += 1

    def garbage(random):
        host, port = url.removeprefix("http://").split(":")
        while time.monotonic() < end:
            with socket.create_connection((host, int(port))) as line:
                line.sendall(random.choice([random.randbytes(200), b"POST /generate HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]))
            with httpx.Client(base_url=url, trust_env=False, timeout=300) as http:
                path = random.choice(
                    ["/", "/generate", "/v1/completions", "/v1/chat/completions", "/api/v1/generate", "/v1/model/load"]
                )
                content = random.choice([random.randbytes(50), b"{}", b"[]", b'{"inputs": 5}', b'{"prompt": {"a": 1}}'])
                status = http.post(path, content=content).status_code
                if not 400 <= status < 500:
                    outcome.wrong.append((path, content, status, "4xx"))
            outcome.garbage += 1
            time.sleep(0.2 + random.random())

    kinds = [leaving, leaving, stalling, stalling, garbage, garbage]
    kinds += [honest] * (clients - len(kinds))
    failures = []

    def run(kind, at):
        try:
            kind(random.Random(at))
        except Exception as error:
            failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(kind, at), daemon=True) for at, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        outcome.memory.append((time.monotonic() - began, memory(quiet)))
        time.sleep(min(1.0, seconds / 20))
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client still waits"
    outcome.wrong += failures
    quiet.close()
    return outcome


if __name__ == "__main__":
    found = storm(sys.argv[1], float(sys.argv[2]), tokens=int(sys.argv[3]) if len(sys.argv) > 3 else 8)
    print(f"right {found.right}, refused {found.refused}, wrong {len(found.wrong)}, longest {found.longest_s:.1f} s")
    print(f"left {found.left}, stalled {found.stalled}, garbage {found.garbage}")
    sizes = [size / 1e6 for _at, size in found.memory]
    print(f"memory {sizes[0]:.0f} MB at the start, {sizes[-1]:.0f} at the end, most {max(sizes):.0f}; growth {found.growth:+.2%}")
    for each in found.wrong[:5]:
        print("WRONG", each)
