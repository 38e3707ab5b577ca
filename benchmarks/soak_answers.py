"""Many clients for many minutes: is every answer what the same request gives alone?

`python benchmarks/soak_answers.py --models-dir FOLDER --model NAME` starts a server in a process of its own (page, keys, API). It
asks requests of every protocol and kind (soak_requests.py) one by one and keeps their answers. Then `--clients` clients with 8
keys ask them at random times, and some leave in the middle; a visitor chats in the page, where there is a Chromium, and the
model is loaded again three times. At the end every request is asked alone once more, and Ctrl+C ends the server while answers
are being written. The same `--seed` draws the same requests.

Twice nobody is answered and the server's memory is measured, after the same last requests: after a first part of three minutes (a
quarter of a short run), in which the model was loaded again once and all threads and buffers have been used, and at the end.
What runs takes memory by its length, and gives it back; what is measured counts 15 seconds later, when the server has
given back the C library's reserve.

It prints a line a minute. Exit code 0: every whole answer was the same as alone, none came later than the load explains, the
server's memory at rest has not grown by 10%, and the server ended well. 1: not so.
"""
# mypy: ignore-errors

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from soak_near import Near, add_plain, difference
from soak_program import KEYS, Server, say, visit_page
from soak_requests import Draw, read

PROBE_S = 10.0  # between two short requests of a client with a key of its own
SHORT = {"prompt": "Name a colour:", "max_tokens": 8, "temperature": 0, "stream": True}
PAUSE_S = 0.8  # of a client between two requests, on average
LEAVES = 0.15  # share of requests whose client leaves before the end
SLOWER = 3  # than alone, for each client
STOP_S = 20.0  # that Ctrl+C may take
MOST_GROWTH = 0.1  # of the memory at rest: the C library keeps a tenth of it in reserve after a load
FIRST_S = 180.0  # before the memory is measured first
QUIET_S = 15.0  # after the last answer; the server gives memory back after 10
LAST = 12  # requests that are asked one by one before that: the server keeps the last conversations


class Soak:
    def __init__(self, options, server):
        self.options, self.server = options, server
        draw, self.near = Draw(options.seed, options.model, server.adapters), Near(options.near)
        self.requests = draw.requests(options.requests, options.kinds)
        if options.near:
            add_plain(draw, self.requests)
        self.alone = {}  # name -> (what was read, seconds)
        self.faults, self.counts, self.by_kind = [], Counter(), Counter()
        self.open, self.reloads, self.reloading = 0, 0, False
        self.slowest_s, self.firsts_s, self.positions = 0.0, [], []
        self.end = self.mean_s = 0.0
        self.draws = [random.Random(f"{options.seed} {at}") for at in range(options.clients)]
        self.minute = self.most_bytes = 0

    def fault(self, text):
        self.faults.append(text)
        say(f"FAULT {text[:1500]}")

    async def ask(self, http, asked):
        """(status, what was read, error)."""
        answer = await http.post(asked.path, json=asked.body)
        return answer.status_code, *read(answer.text)

    async def measure_alone(self):
        async with self.server.client(self.server.keys[0]) as http:
            for asked in self.requests:
                began = time.monotonic()
                status, found, error = await self.ask(http, asked)
                if status != 200 or error:
                    raise SystemExit(f"{asked.name} is no good request: {status} {error} {str(found)[:500]}\n{asked.body}")
                self.alone[asked.name] = found, time.monotonic() - began
        times = [took_s for _found, took_s in self.alone.values()]
        self.mean_s = statistics.mean(times)
        most = f"at most {max(times):.2f}; the limit is {self.limit_s():.0f} s"
        say(f"alone: {len(times)} requests, {self.mean_s:.2f} s each, {most}")

    def limit_s(self, asked=None):
        """When a request must have its end: the model's time is shared by all clients, and the machine by other programs."""
        own_s = self.alone[asked.name][1] if asked is not None else 0.0
        return 60 + SLOWER * self.options.clients * max(self.mean_s, own_s)

    async def client(self, at):
        draw = self.draws[at]
        async with self.server.client(self.server.keys[at % KEYS]) as http:
            while time.monotonic() < self.end:
                await asyncio.sleep(draw.expovariate(1 / PAUSE_S))
                asked = draw.choice(self.requests)
                leaves_s = draw.expovariate(1 / 4.0) if draw.random() < LEAVES else None
                await self.one(http, asked, leaves_s)

    async def one(self, http, asked, leaves_s=None):
        reloads, began = self.reloads, time.monotonic()
        self.open += 1
        try:
            async with asyncio.timeout(leaves_s if leaves_s is not None else self.limit_s(asked)):
                async with http.stream("POST", asked.path, json=asked.body) as answer:
                    position = int(answer.headers.get("x-queue-position", 0))
                    if position > self.options.clients + 2:
                        self.fault(f"{asked.name}: position {position} in the queue of {self.open} requests")
                    text = (await answer.aread()).decode()
        except TimeoutError:
            if leaves_s is None:
                self.fault(f"{asked.name} has no end after {self.limit_s(asked):.0f} s")
            self.counts["left"] += 1
            return
        except Exception as error:
            self.fault(f"{asked.name}: the connection broke: {type(error).__name__}: {error}")
            return
        finally:
            self.open -= 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.judge(asked, answer.status_code, text, self.reloading or reloads != self.reloads, answer.headers)
        await asyncio.sleep(float(answer.headers.get("retry-after", 0)))

    def judge(self, asked, status, text, reloaded, headers):
        found, error = read(text)
        if status in (429, 503) and not headers.get("retry-after"):
            self.fault(f"{asked.name}: status {status} without Retry-After")
        if reloaded and (status == 503 or error):
            self.counts["refused for a reload"] += 1
        elif status != 200 or error:
            self.fault(f"{asked.name}: status {status}: {error or text[:300]}")
        elif not self.near.same(asked, self.alone[asked.name][0], found):
            self.counts["different"] += 1
            self.fault(f"{asked.name} differs: {difference(self.alone[asked.name][0], found)}")
        else:
            self.counts["same"] += 1
            self.by_kind[asked.name.split(" ", 1)[1]] += 1

    async def probe(self):
        """How soon a short request of a client of its own gets its first word; is the position that it is told right?"""
        async with self.server.client(self.server.probe) as http:
            while time.monotonic() < self.end:
                await asyncio.sleep(PROBE_S)
                began, first, reloads = time.monotonic(), None, self.reloads
                beside, left = self.open, self.counts["left"]
                with suppress(Exception):
                    async with http.stream("POST", "/v1/completions", json=SHORT) as answer:
                        positions = [int(answer.headers["x-queue-position"])]
                        # all that were open at some time until now, also those whose leaving is not seen yet; and the visitor
                        beside = max(beside, self.open) + self.counts["left"] - left + 1
                        async for line in answer.aiter_lines():
                            if line.startswith(": waiting, "):
                                positions.append(int(line.split()[2]))
                            elif first is None and '"text":' in line:
                                first = time.monotonic() - began
                if first is None or self.reloading or reloads != self.reloads:
                    continue
                self.firsts_s.append(first)
                self.positions.append(positions[0])
                if sorted(positions, reverse=True) != positions or positions[0] > beside:
                    self.fault(f"a short request beside at most {beside} others was told the positions {positions}")

    async def reload(self, seconds, *shares):
        """At these shares of the coming seconds."""
        began = time.monotonic()
        async with self.server.client(self.server.admin) as http:
            for share in shares:
                await asyncio.sleep(max(0.0, began + share * seconds - time.monotonic()))
                self.reloading = True
                answer = await http.post("/v1/internal/model/load", json={"model_name": self.options.model})
                self.reloads, self.reloading = self.reloads + 1, False
                if answer.status_code != 200:
                    self.fault(f"the model was not loaded again: {answer.status_code} {answer.text[:300]}")

    async def watch(self):
        began = time.monotonic() - 60 * self.minute
        while time.monotonic() < self.end:
            await asyncio.sleep(2)
            if self.server.process.poll() is not None:
                self.fault(f"the server's process ended with {self.server.process.returncode}")
                os._exit(1)
            size = self.server.memory()
            self.most_bytes = max(self.most_bytes, size)
            if (now := int((time.monotonic() - began) // 60)) > self.minute:
                self.minute = now
                counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
                state = f"{size / 1e6:.1f} MB; {len(self.faults)} faults; load {os.getloadavg()[0]:.1f}"
                say(f"minute {self.minute}: {counts}; slowest {self.slowest_s:.1f} s; {state}")
                self.slowest_s = 0.0

    async def run(self):
        await self.server.ready()
        say(f"the server is process {self.server.process.pid}; seed {self.options.seed}, {self.options.minutes:g} minutes, "
            f"{self.options.clients} clients")  # fmt: skip
        await self.measure_alone()
        whole_s = self.options.minutes * 60
        first_s = min(FIRST_S, whole_s / 4)
        await self.part(first_s, self.reload(first_s, 0.5))
        first = await self.at_rest(self.requests[-LAST:])
        await self.part(whole_s - first_s, self.reload(whole_s - first_s, 0.3, 0.6))
        async with self.server.client(self.server.admin) as http:
            await self.near.judge(http, self.fault)
            figures = (await http.get("/metrics")).text
            queue = (await http.get("/v1/queue")).json()
            last = await self.at_rest(self.requests)
            await self.interrupt(http)
        log = self.server.log.read_text()
        if "Traceback" in log or "ERROR" in log:
            self.fault(f"the server's log:\n{log[-1500:]}")
        say("  " + ", ".join(f"{name} {count:,}" for name, count in sorted(self.by_kind.items())))
        self.near.report(say, self.fault)
        if self.firsts_s:
            middle, ahead = statistics.median(self.firsts_s), statistics.median(self.positions)
            most = f"at most {max(self.firsts_s):.2f} ({len(self.firsts_s)} tries)"
            say(f"a short request beside them, {ahead:g} ahead: first word after {middle:.2f} s, {most}")
        for name in ("time_to_first_token", "inter_token_latency"):
            found = re.search(rf"^gptq_webui_{name}_p95_seconds (.*)$", figures, re.MULTILINE)
            say(f"/metrics: {name}_p95_seconds {float(found[1]):.3f}")
        growth = last / first - 1
        at_rest = f"{first / 1e6:.1f} MB after the first part, {last / 1e6:.1f} MB at the end ({growth:+.1%})"
        say(f"memory at rest {at_rest}; at most {self.most_bytes / 1e6:.1f} MB; {queue}")
        well = not self.faults and growth < MOST_GROWTH and self.counts["same"] > 0
        say(f"{'PASSED' if well else 'FAILED'}: {dict(self.counts)}, {self.reloads} reloads, {len(self.faults)} faults")
        return 0 if well else 1

    async def part(self, seconds, *beside):
        """All clients and the visitor, for so long; until their last answers."""
        self.end = time.monotonic() + seconds
        page = threading.Thread(target=visit_page, args=(self,), daemon=True)
        page.start()
        clients = [self.client(at) for at in range(self.options.clients)]
        await asyncio.gather(*clients, self.probe(), self.watch(), *beside)
        await asyncio.to_thread(page.join, self.limit_s())

    async def at_rest(self, requests):
        """The server's memory after these, asked one by one: nothing that was computed meanwhile has changed their answers."""
        async with self.server.client(self.server.keys[0]) as http:
            for asked in requests:
                self.judge(asked, *(await self.whole(http, asked)), False, {})
        before = self.server.memory()
        await asyncio.sleep(QUIET_S)
        size = self.server.memory()
        say(f"at rest: {before / 1e6:.1f} MB after the last answer, {size / 1e6:.1f} MB {QUIET_S:.0f} s later")
        return size

    async def whole(self, http, asked):
        answer = await http.post(asked.path, json=asked.body)
        return answer.status_code, answer.text

    async def interrupt(self, http):
        """Ctrl+C while answers are written and others wait."""
        body = {"prompt": "Count: one, two,", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        waiting = [asyncio.create_task(self.whole_quietly(http, body)) for _ in range(16)]
        await asyncio.sleep(3)
        began = time.monotonic()
        self.server.process.send_signal(signal.SIGINT)
        try:
            code = await asyncio.to_thread(self.server.process.wait, STOP_S)
            say(f"Ctrl+C with {len(waiting)} requests open: ended after {time.monotonic() - began:.1f} s with {code}")
            if code:
                self.fault(f"Ctrl+C ended the server with {code}")
        except subprocess.TimeoutExpired:
            self.fault(f"Ctrl+C did not end the server in {STOP_S:.0f} s")
        await asyncio.wait(waiting, timeout=5)

    async def whole_quietly(self, http, body):
        with suppress(Exception):
            await http.post("/v1/completions", json=body)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", required=True)
    parser.add_argument("--model", required=True, help="the name of a folder in it, of a Llama")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=125, help="how many different ones")
    parser.add_argument("--kinds", nargs="*", help="of requests: methods of soak_requests.Draw; all but `long`, if none is named")
    parser.add_argument("--threads", type=int, default=1, help="of the server's computing")
    parser.add_argument("--near", type=float, default=0.0, help="on a GPU 0.05: logits by which the likeliest token must lead")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    from bootstrap import register

    register()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        server = Server(options, Path(folder))
        try:
            return asyncio.run(Soak(options, server).run())
        finally:
            server.process.kill()
            server.process.wait()


if __name__ == "__main__":
    sys.exit(main())
