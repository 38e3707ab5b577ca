"""What the HTTP API costs: streaming against the bare engine, and the processor time of one more request.

Run `python benchmarks/api_overhead.py` (a minute). A model without weights writes 500 tokens a second; the server is a
process of its own, so that its client's time is not counted.
"""
# mypy: ignore-errors

import importlib.util
import socket
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 500
ROUNDS, EACH = 12, 40  # of requests of one token


def register():
    spec = importlib.util.spec_from_file_location("gptq_webui_script", ROOT / "script.py")
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    entry.register()


def make_engine(tokens_per_s, words):
    from gptq_webui.core.models import LocalModel
    from gptq_webui.engine.engine import Engine
    from gptq_webui.engine.settings import Settings
    from gptq_webui.loaders.contract.fake_loader import FakeLoader

    folder = Path(tempfile.mkdtemp())

    class Library:
        roots = (folder,)

        def models(self):
            return []

        def get(self, name):
            return LocalModel(folder / name, "gptq", None, 10, 4096, "LlamaForCausalLM")

    engine = Engine(Library(), Settings(folder / "settings.json"), [FakeLoader()])
    engine.load("fake", options={"answer": "word " * words, "tokens_per_s": tokens_per_s, "context_tokens": 4096})
    return engine


def bare(engine, words):
    """(tokens/s, CPU s) of the engine's own stream."""
    from gptq_webui.core.chat import Finish
    from gptq_webui.core.params import GenerationParams

    began, cpu, first, count = time.perf_counter(), time.process_time(), None, 0
    for event in engine.complete("Go", GenerationParams(max_new_tokens=words), threading.Event()):
        if not isinstance(event, Finish):
            count += 1
            first = first or time.perf_counter()
    return (count - 1) / (time.perf_counter() - first), time.process_time() - cpu, time.perf_counter() - began


def serve(port, tokens_per_s, words):
    """In the server's process."""
    register()
    from gptq_webui.api import application
    from gptq_webui.api.service import Service
    from gptq_webui.app.web_server import WebServer
    from gptq_webui.engine.download_queue import Downloads

    engine = make_engine(tokens_per_s, words)
    service = Service(engine, Downloads(engine.library))
    WebServer(application.build(service), "127.0.0.1", port)._run()  # as the program serves, but on this thread


def wait(port):
    import httpx

    for _ in range(400):
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit("the server did not start")


def streamed(http, path, body, is_token):
    first, last, count = None, None, 0
    with http.stream("POST", path, json=body) as answer:
        for line in answer.iter_lines():
            if is_token(line):
                last = time.perf_counter()
                first = first or last
                count += 1
    return (count - 1) / (last - first), count


def cpu_of(process):
    """Processor seconds of a process, by the nanosecond where the system counts so."""
    threads = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    if threads:
        return sum(int(each.read_text().split()[0]) for each in threads) / 1e9
    times = process.cpu_times()
    return times.user + times.system


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main():
    import multiprocessing

    import httpx
    import psutil

    register()
    spawn = multiprocessing.get_context("spawn")
    port = free_port()
    server = spawn.Process(target=serve, args=(port, 500.0, TOKENS), daemon=True)
    server.start()
    wait(port)
    streams = {
        "OpenAI completions": (
            "/v1/completions",
            {"prompt": "Go", "max_tokens": TOKENS, "stream": True},
            lambda line: '"text":"' in line and '"finish_reason":null' in line,
        ),
        "OpenAI chat": (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Go"}], "max_tokens": TOKENS, "stream": True},
            lambda line: '"delta":{"content"' in line,
        ),
        "TGI": (
            "/generate_stream",
            {"inputs": "Go", "parameters": {"max_new_tokens": TOKENS}},
            lambda line: line.startswith("data:"),
        ),
        "KoboldCpp": (
            "/api/extra/generate/stream",
            {"prompt": "Go", "max_length": TOKENS},
            lambda line: line.startswith("data:") and '"finish_reason": null' in line,
        ),
    }
    engine = make_engine(500.0, TOKENS)
    figures = {name: [] for name in ["bare", *streams]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
        for _ in range(5):  # in turns: other load on the machine is shared
            figures["bare"].append(bare(engine, TOKENS)[0])
            for name, call in streams.items():
                figures[name].append(streamed(http, *call)[0])
    rates = {name: sorted(values)[len(values) // 2] for name, values in figures.items()}
    for name, rate in rates.items():
        print(f"{name:20} {rate:7.1f} tokens/s   {rate / rates['bare']:.3f} of the bare engine")
    server.terminate()

    port = free_port()
    server = spawn.Process(target=serve, args=(port, 0.0, 1), daemon=True)
    server.start()
    wait(port)
    process = psutil.Process(server.pid)
    chat = {"model": "gpt-4", "messages": [{"role": "user", "content": "Go"}]}
    requests = {
        "OpenAI chat": ("/v1/chat/completions", {**chat, "max_tokens": 1}),
        "OpenAI chat, stream": ("/v1/chat/completions", {**chat, "max_tokens": 1, "stream": True}),
        "OpenAI completions": ("/v1/completions", {"prompt": "Go", "max_tokens": 1}),
        "Responses": ("/v1/responses", {"input": "Go", "max_output_tokens": 1, "store": False}),
        "Anthropic": ("/v1/messages", {**chat, "max_tokens": 1}),
        "Ollama": ("/api/chat", {**chat, "stream": False, "options": {"num_predict": 1}}),
        "llama.cpp": ("/completion", {"prompt": "Go", "n_predict": 1}),
        "TGI": ("/generate", {"inputs": "Go", "parameters": {"max_new_tokens": 1}}),
        "KoboldAI": ("/api/v1/generate", {"prompt": "Go", "max_length": 1}),
    }
    engine = make_engine(0.0, 1)
    costs = {name: [] for name in ["bare engine", *requests]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
        for _ in range(ROUNDS):  # in turns: other load on the machine is shared
            costs["bare engine"].append(sum(bare(engine, 1)[1] for _ in range(EACH)) / EACH)
            for name, (path, body) in requests.items():
                for count in (10, EACH):
                    before = cpu_of(process)
                    for _ in range(count):
                        assert http.post(path, json=body).status_code == 200
                costs[name].append((cpu_of(process) - before) / EACH)
    for name, values in costs.items():
        least, usual = min(values) * 1000, sorted(values)[len(values) // 2] * 1000
        print(f"{name:20} {usual:6.2f} ms of CPU an answer of one token (median of {ROUNDS}; least {least:.2f})")
    server.terminate()


if __name__ == "__main__":
    main()
