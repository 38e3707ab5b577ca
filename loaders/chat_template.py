"""How a conversation becomes the one text that a model was taught to read.

Looked for in this order: the tokenizer's own template (chat_template.jinja or
tokenizer_config.json), the `prompt_template` in the front matter of the folder's README.md
(TheBloke's cards), the model's name, its architecture. A model with none of them is no chat
model; it gets a plain transcript and is labelled so.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.chat import Message
from ..core.errors import BadParameter

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SYSTEM_FIRST = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"


def _labelled(head: str, user: str, answer: str, between: str, default_system: str = "", bos: bool = True) -> str:
    """Templates of the kind `USER: … ASSISTANT: …`: `head` holds the system text, {s}."""
    system = f"{{% set system = system or {default_system!r} %}}" if default_system else ""
    before, _, after = head.partition("{s}")
    return (
        ("{{ bos_token }}" if bos else "")
        + _SYSTEM_FIRST
        + system
        + f"{{% if system %}}{{{{ {before!r} + system + {after!r} }}}}{{% endif %}}"
        + "{% for m in rest %}{% if m['role'] == 'user' %}"
        + f"{{{{ {user!r} + m['content'] + {between!r} }}}}"
        + "{% else %}"
        + f"{{{{ {answer!r} + m['content'] + eos_token + {_after_answer(user)!r} }}}}"
        + "{% endif %}{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ {answer.rstrip(' ')!r} }}}}{{% endif %}}"
    )


def _after_answer(user: str) -> str:
    return "" if user.startswith("USER:") else "\n"


_MISTRAL = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if system and loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)  # the conversation of Mistral-7B-Instruct's model card
_LLAMA2 = (
    _SYSTEM_FIRST + "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # Llama 2's reference code begins every exchange with BOS
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + (system + '\\n\\n' if system and loop.first else '') + m['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ ('' if m['role'] == 'system' else 'GPT4 Correct ' + ('User: ' if m['role'] == 'user' else 'Assistant: ')) + m['content'] + '<|end_of_turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ALPACA_SYSTEM = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

BUILT_IN: dict[str, str] = {
    "ChatML": CHATML,
    "Mistral [INST]": _MISTRAL,
    "Llama-2 [INST]": _LLAMA2,
    "Llama-3": _LLAMA3,
    "Vicuna": _labelled("{s} ", "USER: ", "ASSISTANT: ", " ", _VICUNA_SYSTEM),
    "Alpaca": _labelled("{s}\n\n", "### Instruction:\n", "### Response:\n", "\n\n", _ALPACA_SYSTEM),
    "User/Assistant ###": _labelled("### System:\n{s}\n\n", "### User:\n", "### Assistant:\n", "\n\n"),
    "Human/Assistant ###": _labelled("{s}\n", "### Human: ", "### Assistant: ", "\n"),
    "Zephyr": _ZEPHYR,
    "Gemma": _GEMMA,
    "Phi-3": _PHI3,
    "OpenChat": _OPENCHAT,
    "User/Assistant": _labelled("{s}\n\n", "User: ", "Assistant: ", "\n"),
}
PLAIN = "Plain transcript"  # what a model that was never taught to chat gets
_PLAIN_JINJA = _labelled("{s}\n\n", "User: ", "Assistant: ", "\n")

_BY_NAME: tuple[tuple[str, str], ...] = (  # the first that is found in the lower-cased folder name
    (r"code-?llama.*instruct|llama-?2.*chat", "Llama-2 [INST]"),
    (r"llama-?3.*(instruct|chat)", "Llama-3"),
    (r"openchat|starling", "OpenChat"),
    (r"zephyr|tinyllama.*chat", "Zephyr"),
    (r"openhermes|nous-hermes-2|hermes-2|dolphin|chatml|orca-2|openorca|smollm|qwen.*(chat|instruct)|yi-.*chat|neural-?chat.*chatml", "ChatML"),
    (r"mi[sx]tral.*instruct", "Mistral [INST]"),
    (r"vicuna|wizardlm.*(13b|30b|70b|1\.[0-9])|xwin|airoboros|samantha|synthia", "Vicuna"),
    (r"stable-?beluga|orca-?mini|neural-?chat|solar.*instruct", "User/Assistant ###"),
    (r"guanaco|stable-?vicuna|open-?assistant.*pythia", "Human/Assistant ###"),
    (r"alpaca|wizardcoder|wizardlm|nous-hermes|mythomax|chronos|platypus|deepseek-coder.*instruct|tulu", "Alpaca"),
    (r"gemma.*it\b", "Gemma"),
    (r"phi-?3.*instruct", "Phi-3"),
    (r"falcon.*instruct", "User/Assistant"),
)  # fmt: skip
_BY_ARCHITECTURE = {"MistralForCausalLM": "Mistral [INST]", "MixtralForCausalLM": "Mistral [INST]", "LlamaForCausalLM": "Llama-2 [INST]"}
_BY_CARD: tuple[tuple[tuple[str, ...], str], ...] = (  # marks in a card's prompt_template
    (("<|im_start|>",), "ChatML"),
    (("<|start_header_id|>",), "Llama-3"),
    (("<<SYS>>",), "Llama-2 [INST]"),
    (("[INST]",), "Mistral [INST]"),
    (("GPT4", "User:"), "OpenChat"),
    (("USER:", "ASSISTANT:"), "Vicuna"),
    (("### Instruction:", "### Response:"), "Alpaca"),
    (("### User:", "### Assistant:"), "User/Assistant ###"),
    (("### Human:", "### Assistant:"), "Human/Assistant ###"),
    (("<|user|>", "<|assistant|>", "<|end|>"), "Phi-3"),
    (("<|user|>", "<|assistant|>"), "Zephyr"),
    (("<start_of_turn>",), "Gemma"),
)


@dataclass(frozen=True)
class ChatTemplate:
    jinja: str
    name: str  # "ChatML", or "the model's own"
    source: str  # where it was found: "chat_template.jinja", "the model card" …
    stop: tuple[str, ...] = ()  # role markers: text that means the model speaks for somebody else
    stop_ids: tuple[int, ...] = ()  # the same where they are special tokens
    is_chat: bool = True  # False: the model was not taught to chat

    def render(self, messages: Sequence[Message], tokenizer: Any = None) -> str:
        """The prompt for the next assistant message; one that ends in an assistant's message is continued.

        A template that knows no system role gets the system text before the first user message.
        Raises BadParameter if the template cannot show the conversation.
        """
        chat = _merged(messages)
        resume = bool(chat) and chat[-1]["role"] == "assistant"
        try:
            return _render(self.jinja, chat, tokenizer, resume)
        except Exception as first:
            try:
                return _render(self.jinja, _system_into_user(chat), tokenizer, resume)
            except Exception:
                raise BadParameter(
                    f"The chat template of this model ({self.name}) cannot show this conversation: {first}. "
                    "Choose another template in the Chat tab."
                ) from None

    def bound(self, tokenizer: Any) -> "ChatTemplate":
        """With the role markers of this template as this tokenizer sees them."""
        stop, ids = _markers(self, tokenizer)
        return replace(self, stop=stop, stop_ids=ids)


def find(folder: Path, tokenizer: Any, architecture: str) -> ChatTemplate:
    """The template of a model folder; its `source` says where it came from."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    if own:
        source = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
        return ChatTemplate(own, "the model's own", source).bound(tokenizer)
    if card := card_template(folder):
        return from_card(card).bound(tokenizer)
    name = folder.name.lower()
    for pattern, built_in in _BY_NAME:
        if re.search(pattern, name):
            return named(built_in, "the model's name").bound(tokenizer)
    if architecture in _BY_ARCHITECTURE and re.search(r"chat|instruct", name):
        return named(_BY_ARCHITECTURE[architecture], "the model's architecture").bound(tokenizer)
    return ChatTemplate(_PLAIN_JINJA, PLAIN, "none found: not a chat model", is_chat=False).bound(tokenizer)


def named(name: str, source: str = "your choice") -> ChatTemplate:
    """One of the built-in templates. Raises BadParameter if there is none of that name."""
    if name == PLAIN:
        return ChatTemplate(_PLAIN_JINJA, PLAIN, source, is_chat=False)
    if name not in BUILT_IN:
        raise BadParameter(f"There is no chat template called {name!r}. There are: {', '.join(BUILT_IN)}.")
    return ChatTemplate(BUILT_IN[name], name, source)


def card_template(folder: Path) -> str | None:
    """`prompt_template` from the front matter of README.md, None if there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---") or "prompt_template" not in text.split("\n---", 1)[0]:
        return None
    import yaml  # huggingface-hub brings it

    try:
        found = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return None
    template = found.get("prompt_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) and "{prompt}" in template else None


def from_card(card: str) -> ChatTemplate:
    """A card's `… {prompt} …` as a template for whole conversations."""
    for marks, built_in in _BY_CARD:
        if all(mark in card for mark in marks):
            return named(built_in, "the model card")
    before, _, after = card.partition("{prompt}")
    before = before.removeprefix("<s>")
    head, cut, user = before.rstrip("\n").rpartition("\n")
    user = (user if cut else before.rstrip("\n")) + before[len(before.rstrip("\n")) :]
    head = (head + cut).replace("{system_message}", "{s}")
    answer = after.lstrip()
    between = after[: len(after) - len(answer)]
    default = "" if "{s}" in head else head.strip()
    jinja = _labelled(head if "{s}" in head else "{s}\n\n" if default else "{s}\n", user, answer.rstrip() and answer, between, default)
    return ChatTemplate(jinja, "the card's own", "the model card")


def _merged(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Neighbours of one role become one message: templates insist that roles alternate."""
    chat: list[dict[str, str]] = []
    for message in messages:
        if chat and chat[-1]["role"] == message.role:
            chat[-1]["content"] += "\n\n" + message.text
        else:
            chat.append({"role": message.role, "content": message.text})
    return chat


def _system_into_user(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    if not chat or chat[0]["role"] != "system":
        return chat
    system, rest = chat[0]["content"], [dict(each) for each in chat[1:]]
    for each in rest:
        if each["role"] == "user":
            each["content"] = f"{system}\n\n{each['content']}"
            break
    return rest


def _render(jinja: str, chat: list[dict[str, str]], tokenizer: Any, resume: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = getattr(tokenizer, "special_tokens_map", None) or {}
    tokens = {name: str(value) for name, value in special.items() if isinstance(value, str)}
    for name in ("bos_token", "eos_token"):
        tokens.setdefault(name, str(getattr(tokenizer, name, "") or ""))
    rendered, _ = render_jinja_template(
        conversations=[chat],
        chat_template=jinja,
        add_generation_prompt=not resume,
        continue_final_message=resume,
        **tokens,
    )
    return rendered[0]


def _markers(template: ChatTemplate, tokenizer: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What stands between the messages of a probe conversation: there the model must stop."""
    probe = [Message("user", "Aa1q"), Message("assistant", "Bb2q"), Message("user", "Cc3q")]
    try:
        text = template.render(probe, tokenizer)
    except BadParameter:
        return (), ()
    if not all(each.text in text for each in probe):
        return (), ()
    gaps = (text.split("Bb2q", 1)[1].split("Cc3q", 1)[0], text.split("Cc3q", 1)[1])
    special = {str(name): id for name, id in _special_tokens(tokenizer).items()}
    stop: list[str] = []
    ids: list[int] = []
    for at, gap in enumerate(gaps):
        for token, id in special.items():
            if token and token in gap:
                if at == 0 and id not in ids:
                    ids.append(id)  # only what may end an answer, not what begins one
                gap = gap.replace(token, "\n")
        for token in (getattr(tokenizer, "eos_token", None), getattr(tokenizer, "bos_token", None)):
            gap = gap.replace(token, "\n") if token else gap
        for line in gap.splitlines():
            marker = line.strip()
            if len(marker) >= 3 and re.search(r"[^\w\s]", marker) and marker not in stop:
                stop.append(marker)
    bos = getattr(tokenizer, "bos_token_id", None)
    return tuple(stop), tuple(id for id in ids if id != bos)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every token that decoding leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: id for id, token in added.items() if token.special}
