"""The figures of the README for one GPU: `python benchmarks/gpu.py FOLDER [--json FILE]`.

Decoding, prompts, memory, chat turns and transformers' own generate on one GPTQ folder, beside the exllamav2
library where it can be imported. Every ratio is of one run; every figure the median of three or more.
make_checkpoint.py makes a folder of any shape.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import script  # noqa: E402

script.register()

from tune import copy_bandwidth  # noqa: E402

from gptq_webui.core.chat import Finish, Message, Step  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.engine.settings import Settings  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402

TOKENS = 256
PROMPT = 512
TOGETHER = 16  # answers at once
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
MODEL_CARD: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "seed": 1}
found: dict[str, Any] = {}


def say(name: str, value: Any, text: str = "") -> None:
    found[name] = value
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{name:58} {shown} {text}", flush=True)


def median(run: Callable[[], float], times: int = 3) -> float:
    run()
    return statistics.median(run() for _ in range(times))


def ours(folder: Path) -> None:
    model = LocalModel.read(folder)
    engine = Engine(Library([folder.parent]), Settings(Path("/tmp/gptq-webui-bench.json")))
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    context = min(16384 + 512, model.context_tokens or 2048)
    loaded: Any = engine.load(folder.name, "transformers", {"context_tokens": context, "parallel": TOGETHER})
    say("load, seconds (page cache as it is)", time.perf_counter() - began)
    if loaded.notes:
        print("   ", *loaded.notes)
    loaded._end_ids = set()
    file_bytes = model.size_bytes
    say("memory after load / file", torch.cuda.memory_allocated() / file_bytes)
    say("peak memory while loading / file", torch.cuda.max_memory_allocated() / file_bytes)
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.hf.config.vocab_size

    def ids(count: int) -> list[int]:
        return torch.randint(300, vocabulary, (count,), generator=generator).tolist()

    def answer(prompt: list[int], tokens: int, **params: Any) -> Finish:
        values = {**GREEDY, **params}
        events = list(loaded.generate(prompt, GenerationParams(max_new_tokens=tokens, **values), threading.Event()))
        assert isinstance(events[-1], Finish)
        return events[-1]

    def rate(length: int, **params: Any) -> float:
        return median(lambda: answer(ids(length), TOKENS, **params).tokens_per_s)

    base = rate(PROMPT)
    say("decode tokens/s, greedy, prompt 512", base)
    say("decode tokens/s, the model card's sampling, prompt 512", rate(PROMPT, **MODEL_CARD))
    copy = copy_bandwidth()
    head = loaded.hf.get_output_embeddings().weight.numel() * 2
    step = loaded._stepper._step
    weights = head + sum(each.size_bytes for layer in step.weights.layers for each in layer.weights)
    per_token = step.pages.page_bytes / 64
    say("copy bandwidth, TB/s", copy / 1e12)
    say("share of the limit (weights + conversation over copy bandwidth)", base * (weights + PROMPT * per_token) / copy)
    for length in (4096, 16000):
        if length + TOKENS < context:
            slower = rate(length)
            added = 1 / slower - 1 / base
            say(f"decode tokens/s at {length}", slower)
            say(f"conversation read at this share of copy bandwidth, to {length}", (length - PROMPT) * per_token / added / copy)

    def together(count: int) -> float:
        """The rates of answers that run side by side, added up."""
        params = GenerationParams(max_new_tokens=TOKENS, **GREEDY)
        streams = [loaded.generate(ids(PROMPT), params, threading.Event()) for _ in range(count)]
        return sum(list(each)[-1].tokens_per_s for each in streams)

    if loaded.parallel >= TOGETHER:
        for count in (2, 4, 8, TOGETHER):
            rate_of_all = median(lambda count=count: together(count))  # type: ignore[misc]
            say(f"{count} answers at once, tokens/s together", rate_of_all, f"{rate_of_all / base:.2f}x of one")
    for length in (64, 512, 3840):
        if length >= context:
            continue
        torch.cuda.reset_peak_memory_stats()
        took = median(lambda length=length: answer(ids(length), 1).prefill_s)  # type: ignore[misc]
        say(f"prompt of {length}: tokens/s", length / took, f"{took * 1e3:.1f} ms to the first token")
        if length == 3840:
            kept = sum(each.memory.size_bytes for each in loaded._prefix._kept)
            slabs = step.pages.size_bytes
            peak = torch.cuda.max_memory_allocated() - max(kept, slabs)
            say("peak memory after a prompt of 3840, without conversations / file", peak / file_bytes)

    turns: list[float] = []
    conversation = ids(64)
    for _ in range(21):
        if len(conversation) + 192 >= context:
            break
        events = list(loaded.generate(conversation, GenerationParams(max_new_tokens=128, **GREEDY), threading.Event()))
        turns.append(events[-1].prefill_s)
        conversation += [each.id for each in events if isinstance(each, Step)] + ids(64)
    say("first token of turn 20 / of turn 2", turns[min(19, len(turns) - 1)] / turns[1], f"{turns[1] * 1e3:.1f} ms in turn 2")

    def chat() -> float:
        params = GenerationParams(max_new_tokens=TOKENS, **GREEDY, stop=("###never",))
        answer = engine.chat([Message("user", "x" * 400)], params, threading.Event())
        return answer.text()[1].tokens_per_s

    say("Engine.chat / bare loop", median(chat) / rate(400))
    prompt = torch.tensor([ids(PROMPT)], device=loaded.hf.device)

    def generate(tokens: int) -> float:
        began = time.perf_counter()
        loaded.hf.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.95, top_k=40,
            repetition_penalty=1.1, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - began

    took = median(lambda: generate(TOKENS) - generate(1))
    say(
        "transformers' generate with its processors / Engine",
        (TOKENS - 1) / took / found["decode tokens/s, the model card's sampling, prompt 512"],
    )
    before = torch.cuda.memory_allocated()
    engine.unload()
    torch.cuda.empty_cache()
    say("MB freed by unload, of", before / 1e6, f"{torch.cuda.memory_allocated() / 1e6:.0f} MB left")


def start(folder: Path) -> None:
    """A new process each time, from its start to its first token on the terminal: imports, load and prompt."""
    script_py = str(Path(__file__).resolve().parents[1] / "script.py")
    ask = [sys.executable, script_py, "ask", "--models-dir", str(folder.parent), "--model", folder.name]
    ask += ["--loader", "transformers", "--temperature", "0", "--max-new-tokens", "8", "Hello"]

    def once() -> float:
        began = time.perf_counter()
        with subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            if not process.stdout.read(1):
                raise RuntimeError(" ".join(ask) + " said nothing")
            took = time.perf_counter() - began
            process.communicate()
        return took

    say(
        "process start to first token, seconds",
        median(once),
        "(not the first; with Python keeping its bytecode)",
    )


def exllamav2(folder: Path) -> None:
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer, __version__
    from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2Sampler

    config = ExLlamaV2Config(str(folder))
    config.max_seq_len = 4608
    model = ExLlamaV2(config)
    cache = ExLlamaV2Cache(model, max_seq_len=4608, lazy=True)
    began = time.perf_counter()
    model.load_autosplit(cache)
    say("exllamav2 load, seconds", time.perf_counter() - began, __version__)

    def loop() -> float:
        ids = torch.randint(300, config.vocab_size, (1, PROMPT))
        with torch.inference_mode():
            cache.current_seq_len = 0
            model.forward(ids[:, :-1], cache, preprocess_only=True)
            token = ids[:, -1:]
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(TOKENS):
                token = model.forward(token, cache)[:, -1].argmax(-1, keepdim=True).cpu()
            torch.cuda.synchronize()
        return TOKENS / (time.perf_counter() - began)

    def prompt(length: int) -> float:
        ids = torch.randint(300, config.vocab_size, (1, length))
        with torch.inference_mode():
            cache.current_seq_len = 0
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.forward(ids, cache, last_id_only=True)
            torch.cuda.synchronize()
        return time.perf_counter() - began

    theirs = median(loop)
    say("exllamav2 forward loop, tokens/s", theirs, f"ours is {found['decode tokens/s, greedy, prompt 512'] / theirs:.2f}x")
    for length in (512, 3840):
        rate = length / median(lambda length=length: prompt(length))  # type: ignore[misc]
        say(f"exllamav2 prompt of {length}: tokens/s", rate, f"ours is {found[f'prompt of {length}: tokens/s'] / rate:.2f}x")
    tokenizer = ExLlamaV2Tokenizer(config)
    generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=tokenizer, paged=False)
    settings = ExLlamaV2Sampler.Settings()
    settings.temperature, settings.top_p, settings.top_k, settings.token_repetition_penalty = 0.7, 0.95, 40, 1.1

    def dynamic() -> float:
        from exllamav2.generator import ExLlamaV2DynamicJob

        ids = torch.randint(300, config.vocab_size, (1, PROMPT))
        generator.enqueue(ExLlamaV2DynamicJob(input_ids=ids, max_new_tokens=TOKENS, gen_settings=settings))
        came = []
        while generator.num_remaining_jobs():
            for result in generator.iterate():
                if result.get("stage") == "streaming" and result.get("token_ids") is not None:
                    came.append(time.perf_counter())
        return (len(came) - 1) / (came[-1] - came[0])

    theirs = median(dynamic)
    ratio = found["decode tokens/s, the model card's sampling, prompt 512"] / theirs
    say("exllamav2 dynamic generator, the model card's sampling, tokens/s", theirs, f"ours is {ratio:.2f}x")
    model.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    ours(given.folder.resolve())
    try:
        start(given.folder.resolve())
    except (OSError, RuntimeError) as error:
        print(f"process start: {error}")
    try:
        exllamav2(given.folder.resolve())
    except Exception as error:
        print(f"exllamav2: {type(error).__name__}: {str(error).splitlines()[:1]}")
    if given.json:
        given.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, **found}, indent=1))


if __name__ == "__main__":
    main()
