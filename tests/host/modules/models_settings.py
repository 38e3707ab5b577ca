import json
import re

import modules.shared as shared
from modules.utils import resolve_model_path


def get_model_metadata(name):
    path = resolve_model_path(name)
    config = json.loads((path / "config.json").read_text())
    found = {"loader": "Transformers", "truncation_length": config.get("max_position_embeddings", 2048)}
    tokenizer = path / "tokenizer_config.json"
    jinja = path / "chat_template.jinja"
    template = jinja.read_text() if jinja.exists() else json.loads(tokenizer.read_text()).get("chat_template")
    found["instruction_template"] = "Custom (obtained from model metadata)" if template else "Alpaca"
    found["instruction_template_str"] = template or "alpaca's jinja"
    for pattern, values in shared.user_config.items():
        if re.match(pattern.lower(), path.name.lower()):
            found.update(values)
    return found


def update_model_parameters(state, initial=False):
    for name, value in state.items():
        if hasattr(shared.args, name):
            setattr(shared.args, name, value)
