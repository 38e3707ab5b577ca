"""Downloads at full size, on loopback: `python benchmarks/download_speed.py [cut|kill|speed|memory]`

The server is tests/hub_server.py in a process of its own, the client the real command. Needs 3 GB of disk
(20 GB for `memory`), a quiet machine for `speed`, and `hf` (huggingface-hub) beside this Python to compare with.
"""

import filecmp
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPO = "Owner/Big-GPTQ"
MB = 10**6
GB = 10**9


def serve(folder: Path, pipe: Any, knobs: dict[str, Any]) -> None:
    """The server's process: sends its address, then the bytes that it has served, at each request."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer

    with HubServer() as server:
        for name, value in knobs.items():
            setattr(server, name, value)
        server.add(REPO, folder)
        pipe.send(server.url)
        while pipe.recv():
            pipe.send((server.bytes_served, server.connections_cut))


@contextmanager
def hub(folder: Path, **knobs: Any) -> Iterator[tuple[str, Any]]:
    """(address, a function that returns bytes served and connections cut)."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(folder, there, knobs), daemon=True)
    process.start()

    def served() -> tuple[int, int]:
        here.send(True)
        return here.recv()

    try:
        yield here.recv(), served
    finally:
        here.send(False)
        process.join(5)
        process.kill()


def branch(folder: Path, files: int = 8, size: int = 125 * MB) -> int:
    """Random weights; returns their bytes."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for at in range(files):
        with (folder / f"model-{at + 1:05}-of-{files:05}.safetensors").open("wb") as file:
            for start in range(0, size, 25 * MB):
                file.write(generator.randbytes(min(25 * MB, size - start)))
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    (folder / "config.json").write_text("{}")
    return sum(path.stat().st_size for path in folder.iterdir())


def start(url: str, target: Path) -> subprocess.Popen:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(ROOT / "script.py"), "download", REPO, "--local-dir", str(target), "--quiet"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def same(one: Path, other: Path) -> bool:
    return all(filecmp.cmp(path, other / path.name, shallow=False) for path in one.iterdir())


def cut(work: Path) -> None:
    total = branch(work / "source")
    with hub(work / "source", cut_between=(1 * MB, 20 * MB)) as (url, served):
        began = time.perf_counter()
        code = start(url, work / "target").wait()
        bytes_served, cuts = served()
        right = same(work / "source", work / "target")
        print(f"cut: exit {code}, same bytes: {right}, {cuts} cuts, served {bytes_served / total:.4f} of {total / GB:.2f} GB, "
              f"{time.perf_counter() - began:.1f} s")  # fmt: skip


def kill(work: Path) -> None:
    total = branch(work / "source")
    generator = random.Random(1)
    with hub(work / "source", cut_between=(1 * MB, 20 * MB), rate_bytes_per_s=40e6) as (url, served):
        for _ in range(5):
            process = start(url, work / "target")
            before = arrived(work / "target")
            while arrived(work / "target") <= before:
                time.sleep(0.05)
            time.sleep(generator.uniform(0.1, 1.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"  killed at {arrived(work / 'target') / GB:.3f} GB")
        code = start(url, work / "target").wait()
        bytes_served, cuts = served()
        right = same(work / "source", work / "target")
        print(f"kill: exit {code}, same bytes: {right}, 5 kills and {cuts} cuts, served {bytes_served / total:.4f}")


def arrived(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors*")) if folder.exists() else 0


def speed(work: Path, rounds: int = 3) -> None:
    total = branch(work / "source", 8, 500 * MB)
    hf = Path(sys.executable).with_name("hf")
    walls: dict[str, list[float]] = {"ours": [], "hf": []}
    cpus: dict[str, list[float]] = {"ours": [], "hf": []}
    with hub(work / "source") as (url, _served):
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # hf is compiled too
        for at in range(rounds):
            for who in ("ours", "hf") if at % 2 else ("hf", "ours"):
                target = work / who
                shutil.rmtree(target, ignore_errors=True)
                ours = [sys.executable, str(ROOT / "script.py"), "download", REPO, "--local-dir", str(target), "--quiet"]
                command = ours if who == "ours" else [str(hf), "download", REPO, "--local-dir", str(target)]
                began, spent = time.perf_counter(), cpu_s()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                walls[who].append(time.perf_counter() - began)
                cpus[who].append(cpu_s() - spent)
                assert same(work / "source", target)
    for who, each in walls.items():
        middle = statistics.median(each)
        print(f"speed: {who} {middle:.2f} s ({total / middle / MB:.0f} MB/s), all {[round(one, 2) for one in each]}, "
              f"processor {[round(one, 2) for one in cpus[who]]} s")  # fmt: skip
    print(f"speed: ours has {statistics.median(walls['hf']) / statistics.median(walls['ours']):.2f} of the speed of hf")


def cpu_s() -> float:
    """Of the children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def memory(work: Path, size: int = 8 * GB) -> None:
    import psutil

    branch(work / "source", 1, 1000)
    path = work / "source" / "model-00001-of-00001.safetensors"
    with path.open("r+b") as file:
        file.truncate(size)
    with hub(work / "source") as (url, _served):
        process = start(url, work / "target")
        watched, idle, most = psutil.Process(process.pid), 0, 0
        began = time.perf_counter()
        while process.poll() is None:
            now = watched.memory_info().rss
            if not arrived(work / "target"):
                idle = now
            most = max(most, now)
            time.sleep(0.05)
        took = time.perf_counter() - began
        print(f"memory: exit {process.returncode}, {size / GB:.0f} GB in {took:.0f} s ({size / took / MB:.0f} MB/s), "
              f"idle {idle / MB:.0f} MB, most {most / MB:.0f} MB, above idle {(most - idle) / MB:.0f} MB")  # fmt: skip


def main() -> None:
    runs = {each.__name__: each for each in (cut, kill, speed, memory)}
    for name in sys.argv[1:] or list(runs):
        with tempfile.TemporaryDirectory(prefix="gptq-webui-downloads-") as place:
            runs[name](Path(place))


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
