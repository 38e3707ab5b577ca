"""Parts of a model card that come from the model itself: its licence and languages, and its prompt template."""

import re
from pathlib import Path

from ..core.chat import Message
from ..core.errors import BadParameter
from ..core.folder_files import read_bytes
from ..core.models import LocalModel


def prompt_template(source: LocalModel) -> str:
    """A section with the prompt of one question as the model's own template writes it; empty if it has none."""
    from ..loaders.text import chat_template
    from ..loaders.text.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(source)
    if not getattr(tokenizer, "chat_template", None):
        return ""
    template = chat_template.find(source.folder, tokenizer, source.architecture)
    try:
        text = template.render([Message("user", "{prompt}")], tokenizer).rstrip()
    except BadParameter:
        return ""
    finally:
        template.close()
    return f"## Prompt template\n\n```\n{text}\n```\n\n" if "```" not in text else ""


def front_matter(readme: Path) -> tuple[str, str]:
    """(front matter of the new model card, a sentence about the licence)."""
    head = ""
    if readme.is_file():
        beginning = read_bytes(readme)[:20_000].decode("utf-8", "replace")
        found = re.match(r"---\n(.*?)\n---", beginning, re.DOTALL)
        head = found[1] if found else ""
    kept = re.findall(r"^(?:license|license_name|license_link|language): *\S.*$", head, re.MULTILINE)
    sentence = "" if any(line.startswith("license:") for line in kept) else " Its licence is that of the original model."
    return "\n".join([*kept, "library_name: transformers", "tags: [gptq]", "quantized_by: gptq-webui"]) + "\n", sentence
