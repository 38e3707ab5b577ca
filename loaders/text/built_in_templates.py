"""The chat templates that models of 2023 were taught, for folders that carry none, and how to recognise which.

Each is Jinja with the variables of transformers' chat templates: messages, bos_token,
eos_token, add_generation_prompt. What one cannot show as its model was taught, it refuses: then message_order.py folds it.
"""

OWN = "your own"  # the name of a template that somebody wrote


def is_jinja(name: str) -> bool:
    """Whether what somebody chose is a template, and not the name of one."""
    return "{{" in name or "{%" in name


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('system messages are at the beginning only') }}"
    "{% elif not loop.first and m['role'] == loop.previtem['role'] %}"
    "{{ raise_exception('user and assistant alternate') }}{% endif %}{% endfor %}"
)
_USER_FIRST = (
    "{% if system and (not rest or rest[0]['role'] != 'user') %}"
    "{{ raise_exception('the system message is part of the first message of the user') }}{% endif %}"
)
_SYSTEM_INTO_FIRST = "(system + '\\n\\n' if system and loop.first else '')"


def labelled(head: str, user: str, answer: str, between: str, default_system: str = "", bos: bool = True) -> str:
    """Templates of the kind `USER: … ASSISTANT: …`: `head` holds the system text, {s}."""
    system = f"{{% set system = system or {default_system!r} %}}" if default_system else ""
    before, _, after = head.partition("{s}")
    return (
        ("{{ bos_token }}" if bos else "")
        + SYSTEM_FIRST
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
    "{{ bos_token }}" + SYSTEM_FIRST + _USER_FIRST + "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + " + _SYSTEM_INTO_FIRST + " + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)  # the conversation of Mistral-7B-Instruct's model card
_LLAMA2 = (
    SYSTEM_FIRST + _USER_FIRST + "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # Llama 2's reference code begins every exchange with BOS
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}" + SYSTEM_FIRST + _USER_FIRST + "{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ " + _SYSTEM_INTO_FIRST + " + m['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '' if m['role'] == 'system' else 'GPT4 Correct User: ' if m['role'] == 'user' else 'GPT4 Correct Assistant: ' }}"
    "{{ m['content'] + '<|end_of_turn|>' }}"
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
    "Vicuna": labelled("{s} ", "USER: ", "ASSISTANT: ", " ", _VICUNA_SYSTEM),
    "Alpaca": labelled("{s}\n\n", "### Instruction:\n", "### Response:\n", "\n\n", _ALPACA_SYSTEM),
    "User/Assistant ###": labelled("### System:\n{s}\n\n", "### User:\n", "### Assistant:\n", "\n\n"),
    "Human/Assistant ###": labelled("{s}\n", "### Human: ", "### Assistant: ", "\n"),
    "Zephyr": _ZEPHYR,
    "Gemma": _GEMMA,
    "Phi-3": _PHI3,
    "OpenChat": _OPENCHAT,
    "User/Assistant": labelled("{s}\n\n", "User: ", "Assistant: ", "\n"),
}
PLAIN = "Plain transcript"  # what a model that was never taught to chat gets
PLAIN_JINJA = labelled("{s}\n\n", "User: ", "Assistant: ", "\n")

BY_NAME: tuple[tuple[str, str], ...] = (  # the first that is found in the lower-cased folder name
    (r"code-?llama.*instruct|llama-?2.*chat", "Llama-2 [INST]"),
    (r"llama-?3.*(instruct|chat)", "Llama-3"),
    (r"openchat|starling", "OpenChat"),
    (r"zephyr|tinyllama.*chat", "Zephyr"),
    (r"openhermes|nous-hermes-2|hermes-2|dolphin|chatml|orca-2|openorca|smollm|qwen.*(chat|instruct)|yi-.*chat", "ChatML"),
    (r"mi[sx]tral.*instruct", "Mistral [INST]"),
    (r"vicuna|wizardlm.*(13b|30b|70b|1\.[0-9])|xwin|airoboros|samantha|synthia", "Vicuna"),
    (r"stable-?beluga|orca-?mini|neural-?chat|solar.*instruct", "User/Assistant ###"),
    (r"guanaco|stable-?vicuna|open-?assistant.*pythia", "Human/Assistant ###"),
    (r"alpaca|wizardcoder|wizardlm|nous-hermes|mythomax|chronos|platypus|deepseek-coder.*instruct|tulu", "Alpaca"),
    (r"gemma.*it\b", "Gemma"),
    (r"phi-?3.*instruct", "Phi-3"),
    (r"falcon.*instruct", "User/Assistant"),
)  # fmt: skip
BY_ARCHITECTURE = {
    "MistralForCausalLM": "Mistral [INST]",
    "MixtralForCausalLM": "Mistral [INST]",
    "LlamaForCausalLM": "Llama-2 [INST]",
}
BY_MODEL_CARD: tuple[tuple[tuple[str, ...], str], ...] = (  # marks in a card's prompt_template
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
