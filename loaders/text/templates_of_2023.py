"""The chat templates of models whose code of 2023 put a conversation together itself, and which folder gets which.

They are made of special tokens as code_tokenizers.py names them.
"""

import re
from pathlib import Path
from typing import Any

from ...core.folder_files import read_json
from .built_in_templates import CHATML, SYSTEM_FIRST

_ROUNDS = (
    SYSTEM_FIRST + "{% if system %}{{ raise_exception('it has no place for a system message') }}{% endif %}"
    "{{ '[gMASK]<sop>' }}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' + m['content'] + '\\n\\n答：' }}"
    "{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)
_ROLES = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\nGAP' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
_INTERNLM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|User|>:' + m['content'] + 'END\\n<|Bot|>:' }}"
    "{% elif m['role'] == 'system' %}{{ '<|System|>:' + m['content'] + '\\n' }}"
    "{% else %}{{ m['content'] + '<eoa>\\n' }}{% endif %}{% endfor %}"
)


def of_folder(folder: Path, tokenizer: Any, architecture: str) -> tuple[str, str] | None:
    """(template, name) for a model of such an architecture that was taught to chat; None for every other."""
    settings = read_json(folder / "generation_config.json")
    is_chat = re.search(r"chat|instruct", folder.name.lower()) is not None and "base" not in folder.name.lower()
    if architecture == "QWenLMHeadModel" and (is_chat or settings.get("chat_format") == "chatml"):
        return _QWEN, "Qwen"
    if architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM") and (is_chat or "user_token_id" in settings):
        return _of_baichuan(settings, tokenizer)
    if architecture == "InternLMForCausalLM" and is_chat:
        later = re.search(r"20b|v1[._]1", folder.name.lower())
        return _INTERNLM.replace("END", "" if later else "<eoh>"), "InternLM"
    if architecture == "InternLM2ForCausalLM" and is_chat:
        return "{{ bos_token }}" + CHATML, "ChatML"
    if architecture in ("ChatGLMModel", "ChatGLMForConditionalGeneration") and is_chat:
        called = f"{folder.name} {read_json(folder / 'config.json').get('_name_or_path')}".lower()
        if "chatglm2" in called:
            return _ROUNDS, "ChatGLM 2"
        of_sentencepiece = tokenizer.eos_token != "<|endoftext|>"  # each text that it reads begins with a space there
        return _ROLES.replace("GAP", " " if of_sentencepiece else ""), "ChatGLM 3" if of_sentencepiece else "GLM-4"
    return None


def _of_baichuan(settings: dict[str, Any], tokenizer: Any) -> tuple[str, str] | None:
    """Two reserved tokens begin the messages: 195 and 196, whatever their names are."""
    user, answer = (
        tokenizer.convert_ids_to_tokens(settings.get(f"{role}_token_id", id)) for role, id in (("user", 195), ("assistant", 196))
    )
    if not isinstance(user, str) or not isinstance(answer, str):
        return None
    jinja = (
        "{% for m in messages %}"
        f"{{% if m['role'] == 'user' %}}{{{{ {user!r} + m['content'] }}}}"
        f"{{% elif m['role'] == 'system' %}}{{{{ m['content'] }}}}{{% else %}}{{{{ {answer!r} + m['content'] }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {answer!r} }}}}{{% endif %}}"
    )
    return jinja, "Baichuan"
