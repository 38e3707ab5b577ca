from pathlib import Path

import modules.shared as shared


def resolve_model_path(name):
    return Path(name) if Path(name).exists() else Path(shared.args.model_dir) / name


def get_available_models():
    return sorted(each.name for each in Path(shared.args.model_dir).iterdir() if each.is_dir())
