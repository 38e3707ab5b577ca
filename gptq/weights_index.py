"""Which files transformers opens for a model, and a right index for shards whose own index is missing or stale.

An index (`weight_map`: tensor -> file) only repeats what the headers of the shards say. Where it says something else, the
headers are right, and transformers is given a folder of links with an index made from them.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.errors import BadCheckpoint
from ..core.folder_files import is_plain_name, printable, read_json
from ..core.models import LocalModel, tensors_of
from ..core.readable_folder import without_bom, write

INDEX = "model.safetensors.index.json"


@dataclass
class WeightsSource:
    folder: Path  # what transformers is to open
    weights: str  # the weights file in it, or the index of a sharded model
    note: str = ""  # for the user
    links: TemporaryDirectory[str] | None = None  # must live as long as the model: offloaded weights are read again


def weights_source(model: LocalModel) -> WeightsSource:
    """Raises BadCheckpoint for an index that names a file outside its folder."""
    if len(model.weights) == 1:
        return _readable(model, model.weights[0].name)
    stem = re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", model.weights[0].name)
    held = {name: path.name for name, (path, _info) in tensors_of(model.weights).items()}
    wrong = ""
    for name in dict.fromkeys((f"{stem}.safetensors.index.json", INDEX)):
        if (model.folder / name).is_file():
            listed = _weight_map(model.folder / name)
            if listed == held:
                return _readable(model, name)
            wrong = wrong or name
    said = (
        f"{wrong} does not name the tensors of the files beside it"
        if wrong
        else "The list of the tensors in the files is missing"
    )
    note = f"{said}; the files themselves were read instead."
    links = _linked(model)
    for stale in Path(links.name).glob("*.index.json"):
        stale.unlink()
    (Path(links.name) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": held}), encoding="utf-8")
    return WeightsSource(Path(links.name), INDEX, note, links)


def _readable(model: LocalModel, weights: str) -> WeightsSource:
    """The folder, or links where transformers cannot read one of its settings files."""
    if not without_bom(model.folder):
        return WeightsSource(model.folder, weights)
    links = _linked(model)
    return WeightsSource(Path(links.name), weights, "", links)


def _weight_map(path: Path) -> dict[str, str]:
    """Empty for a file that holds none. Raises BadCheckpoint for a name that leaves the folder."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, Mapping):
        return {}
    for file in listed.values():
        if not isinstance(file, str) or not is_plain_name(file):
            raise BadCheckpoint(
                f"{path.name} names the file {printable(str(file))[:80]}, which is not in the model's folder. Nothing was "
                "opened: an index names files beside it. Delete the index, or download the model again."
            )
    return dict(listed)


def _linked(model: LocalModel) -> TemporaryDirectory[str]:
    """A temporary folder with links to the model's files, and with its settings files as libraries can read them."""
    links = TemporaryDirectory(prefix="gptq-webui-", ignore_cleanup_errors=True)
    folder, changed = Path(links.name), without_bom(model.folder)
    for entry in sorted(model.folder.iterdir()):
        if entry.name in changed:
            write(folder / entry.name, changed[entry.name])
        elif entry.is_file():
            try:
                os.symlink(entry.resolve(), folder / entry.name)
            except OSError:
                os.link(entry.resolve(), folder / entry.name)  # Windows, without the right to make symbolic links
    return links
