import json

import modules.shared as shared
from modules.utils import resolve_model_path


def get_model_metadata(name):
    path = resolve_model_path(name)
    config = json.loads((path / "config.json").read_text())
    return {"loader": "Transformers", "truncation_length": config.get("max_position_embeddings", 2048)}


def update_model_parameters(state, initial=False):
    for name, value in state.items():
        if hasattr(shared.args, name):
            setattr(shared.args, name, value)
