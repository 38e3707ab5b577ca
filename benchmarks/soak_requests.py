"""Requests of every protocol, drawn by a seed, and what is compared of their answers. For soak_answers.py.

Two answers are the same if everything that was sent is: each event of a stream with its text, ids, log-probabilities, calls and
counts; not the names of answers, times, and how much of a prompt was in a cache. Numbers may differ in the fifth digit: a vector
is a sum of pieces, which are larger where nobody else is answered.
"""
# mypy: ignore-errors

import json
import math
import random
from dataclasses import dataclass

WORDS = (
    "harbour", "bridge", "market", "bread", "wool", "story", "ship", "wind", "ice", "captain", "map", "gull", "river", "stone",
    "lamp", "winter", "letter", "garden", "road", "bell", "engine", "number", "colour", "paper", "glass", "music", "honey",
    "cloud", "train", "forest", "window", "table", "north", "answer", "silver", "morning", "field", "horse",
)  # fmt: skip
_SYSTEM_WORDS = 1700  # about 2,000 tokens
_VOLATILE = {
    "created", "created_at", "completed_at", "timings", "total_duration", "load_duration", "prompt_eval_duration",
    "eval_duration", "cached_tokens", "tokens_cached",
    "cache_read_input_tokens", "input_tokens", "prompt_eval_count", "prompt_tokens_details",
    "input_tokens_details", "item_id", "call_id", "tool_call_id", "response_id", "message_id", "obfuscation",
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 30}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["town", "days"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "parts": {"type": "array", "items": {"enum": ["wood", "iron", "glass"]}, "maxItems": 4},
        "old": {"type": "boolean"},
    },
    "required": ["name", "parts", "old"],
}


@dataclass
class Asked:
    """One request."""

    name: str
    path: str
    body: dict


def read(text):
    """(what is compared of an answer's body, the error in it or ""). The body is JSON, server-sent events, or JSON in lines."""
    lines = [each.removeprefix("data:").strip() for each in text.splitlines() if each.startswith("data:")]
    if not lines:
        lines = [text] if text.count("\n") < 2 else [each for each in text.splitlines() if each.strip()]
    found, error = [], ""
    for line in lines:
        if line == "[DONE]":
            found.append("done")
            continue
        try:
            event = json.loads(line)
        except ValueError:
            return [text], f"no JSON: {line[:200]}"
        if isinstance(event, dict) and event.get("type") == "ping":
            continue
        if isinstance(event, dict):
            inner = event.get("response")  # of OpenAI's Responses
            why = event.get("error") or event.get("detail") or (inner.get("error") if isinstance(inner, dict) else None)
            error = json.dumps(why)[:300] if why else error
        found.append(settled(event))
    return found, error


def settled(value):
    """Without what differs between two equal answers."""
    if isinstance(value, dict):
        return {
            key: settled(each)
            for key, each in value.items()
            if key not in _VOLATILE and not (key == "id" and isinstance(each, str))
        }
    return [settled(each) for each in value] if isinstance(value, list) else value


def same(one, two, apart=1e-6):
    """Whether two answers are, as `read` gives them. `apart`: by how much two numbers may differ."""
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=1e-4, abs_tol=apart)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(each, two[key], apart) for key, each in one.items())
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(same(each, other, apart) for each, other in zip(one, two, strict=True))
    return one == two


class Draw:
    """Draws requests. The same seed, the same requests."""

    def __init__(self, seed, model, adapters=()):
        self.random, self.model, self.adapters = random.Random(seed), model, adapters
        self.systems = [self.words(_SYSTEM_WORDS) for _ in range(3)]

    def words(self, count):
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    def requests(self, count, only=()):
        kinds = [
            self.chat, self.chat, self.chat, self.shared, self.shared, self.turns, self.completion, self.completion, self.scored,
            self.grammar, self.schema, self.tools, self.repeating, self.samplers, self.banned, self.adapted, self.several,
            self.anthropic, self.kobold, self.tgi, self.llamacpp, self.ollama, self.responses, self.tgwui, self.embedding,
        ]  # fmt: skip
        kinds = [getattr(self, each) for each in only] if only else kinds
        found = []
        for at in range(count):
            asked = kinds[at % len(kinds)]()
            asked.name = f"{at} {asked.name}"
            found.append(asked)
        return found

    def length(self, median=30, most=250):
        return max(1, min(most, round(median * 2.718 ** self.random.gauss(0, 0.8))))

    def question(self):
        return self.random.choice(
            (
                f"Write a story about {self.words(3)}.",
                f"What have {self.words(2)} in common?",
                f"Explain {self.words(1)} to a child, then to a sailor.",
                f"{self.words(self.length(40, 300))}\nGo on with it.",
            )
        )

    def sampling(self):
        """OpenAI's names, and ours."""
        chance = self.random
        found = {"seed": chance.randrange(10**6), "temperature": chance.choice((0, 0, 0.7, 1.0, 1.3))}
        for name, values in (
            ("top_p", (0.5, 0.9)), ("top_k", (5, 50)), ("min_p", (0.05, 0.1)), ("repetition_penalty", (1.05, 1.2)),
            ("frequency_penalty", (0.3,)), ("presence_penalty", (0.5,)), ("min_tokens", (5,)),
            ("logit_bias", ({"260": 2, "28": -3},)),
        ):  # fmt: skip
            if chance.random() < 0.2:
                found[name] = chance.choice(values)
        if chance.random() < 0.3:
            found["stop"] = chance.choice((["."], ["\n\n", " and "], "the"))
        return found

    def openai(self, name, messages, **more):
        body = {
            "messages": messages,
            "max_tokens": self.length(),
            "stream": self.random.random() < 0.7,
            **self.sampling(),
            **more,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if self.random.random() < 0.3 and "tools" not in body:
            body |= {"logprobs": True, "top_logprobs": self.random.randrange(4)}
        return Asked(name, "/v1/chat/completions", body)

    def user(self):
        return {"role": "user", "content": self.question()}

    def chat(self):
        return self.openai("chat", [self.user()])

    def shared(self):
        return self.openai("shared", [{"role": "system", "content": self.random.choice(self.systems)}, self.user()])

    def turns(self):
        earlier = [{"role": "assistant", "content": self.words(self.length(20, 80))} for _ in range(self.random.randrange(1, 4))]
        return self.openai("turns", [each for said in earlier for each in (self.user(), said)] + [self.user()])

    def completion(self):
        body = {"prompt": self.question(), "max_tokens": self.length(), "stream": self.random.random() < 0.5, **self.sampling()}
        body |= {"logprobs": 2} if self.random.random() < 0.3 else {}
        body |= {"return_token_ids": True} if self.random.random() < 0.3 else {}
        return Asked("completion", "/v1/completions", body)

    def long(self):
        body = {"prompt": self.question(), "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        return Asked("long", "/v1/completions", body)

    def scored(self):
        body = {"prompt": self.question(), "max_tokens": 0, "echo": True, "logprobs": 2}
        return Asked("scored", "/v1/completions", body)

    def grammar(self):
        more = self.random.choice(
            (
                {"response_format": {"type": "json_object"}},
                {"guided_choice": ["red", "green and blue", "neither of them"]},
                {"regex": "[A-Z][a-z]{3,9}( [a-z]{2,8}){2,5}\\."},
                {"grammar": 'root ::= ("- " [a-z ]{5,20} "\\n"){2,4}'},
            )
        )
        return self.openai("grammar", [self.user()], **more, stop=None, min_tokens=None)

    def schema(self):
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        return self.openai("schema", [self.user()], response_format=form, max_tokens=120, stop=None, min_tokens=None)

    def tools(self):
        choice = self.random.choice(("required", "auto", {"type": "function", "function": {"name": "weather"}}))
        more = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60, "stop": None, "min_tokens": None}
        return self.openai("tools", [self.user()], **more)

    def repeating(self):
        text = self.words(40)
        content = f"{text}\n{text}\n{text}\nRepeat this text word by word:\n{text}"
        return self.openai("repeating", [{"role": "user", "content": content}], max_tokens=100)

    def samplers(self):
        more = self.random.choice(
            (
                {"dry_multiplier": 0.8}, {"xtc_probability": 0.5, "xtc_threshold": 0.05},
                {"mirostat_mode": 2, "mirostat_tau": 4.0},
                {"dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynamic_temperature": True}, {"smoothing_factor": 0.3},
                {"typical_p": 0.6}, {"top_n_sigma": 1.0},
            )
        )  # fmt: skip
        return self.openai("samplers", [self.user()], temperature=0.9, **more)

    def banned(self):
        return self.openai("banned", [self.user()], banned_strings=[" the ship", "of the", "story"])

    def adapted(self):
        if not self.adapters:
            return self.chat()
        name = self.random.choice(self.adapters)
        if self.random.random() < 0.3:
            given = {"max_new_tokens": self.length(), "adapter_id": name, "do_sample": False}
            return Asked("adapted tgi", "/generate", {"inputs": self.question(), "parameters": given})
        return self.openai("adapted", [self.user()], model=f"{self.model}:{name}")

    def several(self):
        return self.openai("several", [self.user()], n=2, max_tokens=20)

    def anthropic(self):
        body = {
            "model": "any", "max_tokens": self.length(), "temperature": 0, "stream": self.random.random() < 0.6,
            "system": self.random.choice(self.systems), "messages": [self.user()],
        }  # fmt: skip
        if self.random.random() < 0.4:
            parameters = TOOL["function"]["parameters"]
            body |= {"tools": [{"name": "weather", "input_schema": parameters}], "tool_choice": {"type": "any"}, "max_tokens": 60}
        return Asked("anthropic", "/v1/messages", body)

    def kobold(self):
        path = self.random.choice(("/api/v1/generate", "/api/extra/generate/stream"))
        body = {
            "prompt": self.question(),
            "max_length": self.length(),
            "temperature": 0.8,
            "sampler_seed": 1 + self.random.randrange(99),
        }
        body |= {"rep_pen": 1.1, "stop_sequence": ["\n\n"], "genkey": f"K{self.random.randrange(10**9)}"}
        return Asked("kobold", path, body)

    def tgi(self):
        path = self.random.choice(("/generate", "/generate_stream"))
        given = {"max_new_tokens": self.length(), "seed": 1 + self.random.randrange(99), "do_sample": True, "temperature": 0.9}
        given |= {"details": True, "top_n_tokens": 2} if self.random.random() < 0.6 else {}
        return Asked("tgi", path, {"inputs": self.question(), "parameters": given})

    def llamacpp(self):
        body = {"prompt": self.question(), "n_predict": self.length(), "seed": self.random.randrange(99), "temperature": 0.8}
        body |= {"n_probs": 2} if self.random.random() < 0.4 else {"repeat_penalty": 1.1}
        return Asked("llamacpp", "/completion", body | {"stream": self.random.random() < 0.6, "cache_prompt": True})

    def ollama(self):
        options = {"num_predict": self.length(), "seed": self.random.randrange(99), "temperature": 0.7}
        more = {"format": "json"} if self.random.random() < 0.3 else {}
        body = {"model": self.model, "messages": [self.user()], "options": options, "stream": True, **more}
        return Asked("ollama", "/api/chat", body)

    def responses(self):
        body = {"input": self.question(), "instructions": self.random.choice(self.systems), "store": False, "temperature": 0}
        body |= {"max_output_tokens": self.length() + 16, "stream": self.random.random() < 0.6}
        return Asked("responses", "/v1/responses", body)

    def tgwui(self):
        return Asked("tgwui", "/v1/internal/logits", {"prompt": self.question(), "top_logits": 5})

    def embedding(self):
        return Asked("embedding", "/v1/embeddings", {"input": [self.question(), self.words(8)]})
