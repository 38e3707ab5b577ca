"""Judges an answer that is not the one alone by how near the first other token was. For soak_answers.py on a GPU.

There a token's logits depend in their last digits on how many answers are computed with it, so an answer may leave the one alone
where two tokens are as good as equally likely. Greedy completions that give their ids are judged: what the model says alone
after the tokens that both have is asked, and the two likeliest must be nearer than the limit. Of what is sampled, or bound by a
grammar, only the share that is not the same is reported.
"""
# mypy: ignore-errors

import random
from collections import Counter

from soak_requests import Asked, same

MOST_DIFFERENT = 0.3  # of the answers that are not judged by their tokens


def add_plain(draw, requests, share=0.4):
    """Every so many requests are greedy completions that give their ids."""
    chance = random.Random(len(requests))
    for at in range(len(requests)):
        if chance.random() < share:
            body = {"prompt": draw.question(), "max_tokens": draw.length(60), "temperature": 0, "return_token_ids": True}
            body["stream"] = draw.random.random() < 0.7
            requests[at] = Asked(f"{at} plain", "/v1/completions", body)
    return requests


def ids_of(found):
    """(ids of the prompt, ids of the answer), as soak_requests.read gives a completion or a stream of one."""
    prompt, answer = [], []
    for event in found:
        if not isinstance(event, dict):
            continue
        for choice in event.get("choices", ()):
            prompt += choice.get("prompt_token_ids") or []
            answer += choice.get("token_ids") or []
    return prompt, answer


class Near:
    """`limit`: in logits; 0 takes nothing but the same answer."""

    def __init__(self, limit):
        self.limit, self.of_kind, self.different, self._waiting = limit, Counter(), Counter(), {}

    def same(self, asked, alone, found):
        """Whether an answer may stand for now. One that is judged by its tokens is kept for `judge`."""
        if not self.limit:
            return same(found, alone)
        kind = asked.name.split(" ", 1)[1]
        self.of_kind[kind] += 1
        if same(found, alone, self.limit):
            return True
        self.different[kind] += 1
        if kind == "plain":
            prompt, expected = ids_of(alone)
            got_prompt, got = ids_of(found)
            at = next((at for at, (one, two) in enumerate(zip(expected, got, strict=False)) if one != two), None)
            if prompt != got_prompt or at is None:  # one ends where the other goes on: an end that is no token
                at = min(len(expected), len(got))
            self._waiting[asked.name, at] = prompt, expected, got
        return True

    async def judge(self, http, fault):
        """Asks what the model says where answers left those alone. No one else is answered meanwhile."""
        for (name, at), (prompt, expected, got) in self._waiting.items():
            body = {"prompt": prompt + expected[:at], "max_tokens": 1, "temperature": 0, "logprobs": 5}
            answer = await http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                fault(f"{name}: what it says after {at} tokens is not answered: {answer.text[:300]}")
                continue
            likeliest = sorted(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
            gap = likeliest[0] - likeliest[1]
            if gap > self.limit:
                one, two = expected[at : at + 3], got[at : at + 3]
                fault(f"{name} differs after {at} tokens, where the likeliest leads by {gap:.3f}: {one} alone, {two} now")
        self._waiting.clear()

    def report(self, say, fault):
        if not self.limit:
            return
        say(
            "  not the same: "
            + ", ".join(f"{kind} {count:,} of {self.of_kind[kind]:,}" for kind, count in self.different.items())
        )
        others = {kind: count for kind, count in self.of_kind.items() if kind != "plain"}
        share = sum(self.different[kind] for kind in others) / max(1, sum(others.values()))
        if share > MOST_DIFFERENT:
            fault(f"{share:.0%} of the answers that are not judged by their tokens differ")


def difference(wanted, found):
    """Where two answers begin to differ."""
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((at for at, (one, two) in pairs if not same(one, two)), min(len(wanted), len(found)))
    one, two = (str(each[at : at + 1])[:600] for each in (wanted, found))
    return f"event {at} of {len(wanted)} and {len(found)}: {one} alone, {two} now"
