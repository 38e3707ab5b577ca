"""Both ways in which the host imports an extension, and both ways in which one can hurt it."""

import importlib
import importlib.util
import sys
from pathlib import Path

import modules.shared as shared

state: dict = {}


def load_extensions():
    state.clear()
    for name in shared.args.extensions:
        user = Path("user_data/extensions") / name / "script.py"
        try:
            if user.exists():  # executed by file, under a name without a package, again at every restart
                spec = importlib.util.spec_from_file_location(f"user_ext_{name}", str(user))
                extension = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = extension
                spec.loader.exec_module(extension)
            else:
                extension = importlib.import_module(f"extensions.{name}.script")
            for param in getattr(extension, "params", {}):
                if f"{name}-{param}" in shared.settings:
                    extension.params[param] = shared.settings[f"{name}-{param}"]
            if hasattr(extension, "setup"):
                extension.setup()
            state[name] = extension
        except ModuleNotFoundError:
            raise  # stops the server
        except Exception as error:
            print(f"EXTENSION FAILED {name}: {error}", file=sys.stderr)


def first_attribute(name):
    return next((getattr(each, name) for each in state.values() if hasattr(each, name)), None)
