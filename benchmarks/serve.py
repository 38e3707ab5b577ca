"""Many clients at once against any OpenAI address: `python benchmarks/serve.py http://127.0.0.1:7860/v1 --model NAME`.

Requests arrive as a Poisson process (`--rate` a second), or `--clients` people ask one after the other. Lengths of prompts and
answers are log-normal, with their medians as options: most are short and a few are long, as in conversations of people. Each
answer is streamed. It prints tokens/s of all answers together, and p50, p95 and p99 of the time to the first word and of the
pauses between words; `--json FILE` keeps them. The same command with another address measures another server: run both on the
same machine.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

WORDS = (
    "the",
    "harbour",
    "town",
    "bridge",
    "market",
    "bread",
    "wool",
    "story",
    "ship",
    "wind",
    "ice",
    "captain",
    "map",
    "gull",
    "and",
)


@dataclass
class Seen:
    """One request as its client saw it."""

    asked_tokens: int
    first_s: float = math.nan
    total_s: float = math.nan
    new_tokens: int = 0
    prompt_tokens: int = 0
    pauses_s: list[float] = field(default_factory=list)
    error: str = ""


def lengths(chance: random.Random, median: int, spread: float, most: int) -> int:
    """A length of a log-normal distribution, at least 1 and at most `most`."""
    return max(1, min(most, round(median * math.exp(chance.gauss(0, spread)))))


def prompt_of(chance: random.Random, words: int) -> str:
    """A prompt that no other one begins like, so that no server has its beginning in a cache."""
    return f"Story {chance.randrange(10**9)}: " + " ".join(chance.choice(WORDS) for _ in range(words)) + "\nGo on with it."


async def ask(client: httpx.AsyncClient, asked: argparse.Namespace, text: str, tokens: int) -> Seen:
    """Stream one answer."""
    seen = Seen(tokens)
    body = {
        "model": asked.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": asked.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asked.ignore_eos:
        body["ignore_eos"] = True
    began = last = time.perf_counter()
    try:
        async with client.stream("POST", "chat/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.error = f"{answer.status_code}: {(await answer.aread())[:200].decode(errors='replace')}"
                return seen
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if event.get("error"):
                    seen.error = str(event["error"])[:200]
                    return seen
                if usage := event.get("usage"):
                    seen.new_tokens, seen.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                delta = (event.get("choices") or [{}])[0].get("delta") or {}
                if not any(delta.get(name) for name in ("content", "reasoning_content", "reasoning")):
                    continue
                now = time.perf_counter()
                if math.isnan(seen.first_s):
                    seen.first_s = now - began
                else:
                    seen.pauses_s.append(now - last)
                last = now
    except httpx.HTTPError as error:
        seen.error = f"The connection failed: {error or type(error).__name__}"
    seen.total_s = time.perf_counter() - began
    return seen


async def measure(asked: argparse.Namespace) -> tuple[list[Seen], float]:
    """All requests, and the seconds from the first one to the end of the last one."""
    chance = random.Random(asked.seed)
    work = [
        (
            prompt_of(chance, lengths(chance, asked.prompt_words, asked.spread, asked.most)),
            lengths(chance, asked.answer_tokens, asked.spread, asked.most),
        )
        for _ in range(asked.requests)
    ]
    headers = {"Authorization": f"Bearer {asked.key}"} if asked.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=asked.address.rstrip("/") + "/", headers=headers, timeout=asked.timeout, limits=limits
    ) as client:
        began = time.perf_counter()
        if asked.rate:
            running = []
            for text, tokens in work:
                running.append(asyncio.create_task(ask(client, asked, text, tokens)))
                await asyncio.sleep(chance.expovariate(asked.rate))
            found = list(await asyncio.gather(*running))
        else:
            found = []

            async def person() -> None:
                while work:
                    text, tokens = work.pop()
                    found.append(await ask(client, asked, text, tokens))

            await asyncio.gather(*(person() for _ in range(asked.clients)))
        return found, time.perf_counter() - began


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99 by linear interpolation."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), values[0] if values else math.nan)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("address", help="of the API, with /v1")
    parser.add_argument("--model", default="", help="its name; some servers want one")
    parser.add_argument("--key", default="", help="an API key")
    parser.add_argument("--requests", type=int, default=64)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, default=0.0, help="requests a second, at random times")
    how.add_argument("--clients", type=int, default=16, help="people who ask one after the other")
    parser.add_argument("--prompt-words", type=int, default=80, help="median")
    parser.add_argument("--answer-tokens", type=int, default=120, help="median")
    parser.add_argument("--spread", type=float, default=0.8, help="standard deviation of the lengths' logarithms; 0: all alike")
    parser.add_argument("--most", type=int, default=1000, help="words of a prompt or tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="answers are as long as was asked, where the server knows this")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds without a byte")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found, seconds = asyncio.run(measure(asked))
    good = [each for each in found if not each.error]
    for text in sorted({each.error for each in found if each.error})[:5]:
        print(f"failed: {text}", file=sys.stderr)
    result = {
        "address": asked.address,
        "requests": len(found),
        "failed": len(found) - len(good),
        "seconds": seconds,
        "answer_tokens_per_s": sum(each.new_tokens for each in good) / seconds,
        "prompt_tokens_per_s": sum(each.prompt_tokens for each in good) / seconds,
        "first_word_s": percentiles([each.first_s for each in good if not math.isnan(each.first_s)]),
        "pause_s": percentiles([pause for each in good for pause in each.pauses_s]),
        "longest_pause_s": max((pause for each in good for pause in each.pauses_s), default=math.nan),
    }
    shape = f"{asked.rate:g} requests/s" if asked.rate else f"{asked.clients} clients"
    print(f"{shape}, {len(found)} requests, {result['failed']} failed, {seconds:.1f} s")
    print(f"answers {result['answer_tokens_per_s']:.1f} tokens/s, prompts {result['prompt_tokens_per_s']:.1f} tokens/s")
    for name, label in (("first_word_s", "first word"), ("pause_s", "pause between words")):
        print(f"{label}: " + ", ".join(f"{key} {1000 * value:.0f} ms" for key, value in result[name].items()))
    print(f"longest pause: {1000 * result['longest_pause_s']:.0f} ms")
    if asked.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items() if key != "key"}
        kept = {**result, "settings": settings, "answers": [asdict(each) for each in found]}
        asked.json.write_text(json.dumps(kept, indent=1, allow_nan=True), encoding="utf-8")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
