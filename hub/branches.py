"""Every branch of a repository with its bits, group size and the rest, in parallel requests of a few hundred kilobytes.

Facts come from the repository itself (sizes, settings, the first bytes of the weights) and are
filled from the model card where it has none. Knows nothing of this machine: engine/advice.py
judges whether a branch fits.
"""

import itertools
import math
import struct
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import BadQuantizeConfig, WrongRepository
from ..core.model_ref import ModelRef
from ..core.models import choose_weights
from ..core.quantize_config import BITS, QuantizeConfig
from ..core.safetensors_header import TensorInfo, read_beginning
from . import file_selection, hub_request
from .file_selection import FileSelection
from .model_card import ModelCard, ModelCardRow, read_model_card
from .repository import Hub, Listing

if TYPE_CHECKING:
    import httpx

AT_ONCE = 16  # requests
SHOWN = 64  # branches; a note says how many more there are
_TOGETHER_BYTES = 64_000_000  # of the lists and settings of all branches but the first; usual ones are a few hundred kilobytes
_HEADER_BYTES = 16_384  # of the weights: the first layers' names and shapes


@dataclass(frozen=True)
class Branch:
    ref: ModelRef
    commit: str
    selection: FileSelection | None  # what a download would fetch; None if it is refused
    error: WrongRepository | None = None  # why it is refused
    quantize: QuantizeConfig | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # config.json and quantize_config.json
    model_card: ModelCardRow = field(default_factory=lambda: ModelCardRow(""))
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.ref.branch

    @property
    def size_bytes(self) -> int:
        """Of the weights, as in the model card's table."""
        return self.selection.weights_bytes if self.selection else 0

    @property
    def dataset(self) -> str:
        return self.model_card.dataset or (self.quantize.dataset if self.quantize else None) or ""

    @property
    def damp_percent(self) -> str:
        damp = self.quantize.damp_percent if self.quantize else None
        return self.model_card.damp_percent if damp is None else f"{damp:g}"

    @property
    def exllama(self) -> str:
        """Yes or No: ExLlama's kernels take 4 bits, with whole columns or groups of a power of two from 32 on."""
        if self.quantize is None:
            return self.model_card.exllama
        if self.quantize.checkpoint_format not in ("gptq", "gptq_v2"):
            return "No"
        group = self.quantize.group_size
        return "Yes" if self.quantize.bits == 4 and (group == -1 or (group >= 32 and group & (group - 1) == 0)) else "No"


@dataclass(frozen=True)
class Branches:
    repo: str
    branches: tuple[Branch, ...]  # main first
    model_card: ModelCard
    notes: tuple[str, ...] = ()


def read_branches(hub: Hub, repo: str) -> Branches:
    """Read the lists of all branches, then their settings and the first bytes of their weights, many at once.

    Raises the HubErrors of Hub.listing and Hub.small_file; WrongRepository if no branch can be
    used, with the GPTQ version of the model where there is one.
    """
    names = hub.branches(repo)
    room = hub_request.Room(_TOGETHER_BYTES)
    with hub_request.new_client(AT_ONCE) as client, ThreadPoolExecutor(AT_ONCE, "branches") as pool:
        try:

            def listing_of(name: str) -> Listing | None:
                try:
                    return hub.listing(ModelRef(repo, name), client=client, room=None if name == names[0] else room)
                except hub_request.RoomFull:
                    return None

            listings = [each for each in pool.map(listing_of, names[:SHOWN]) if each is not None]
            requests = _Requests(hub, client, pool, room, listings[0] if listings else None)
            for listing in listings:
                requests.settings(listing)
            for listing in listings:
                requests.header(listing)
            model_card = requests.model_card(listings[0]) if listings else ModelCard()
            found = [each for listing in listings if (each := requests.branch(listing, model_card)) is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else the error waits for every request that is left
            raise
    if not any(each.selection for each in found):
        errors = {each.ref.branch: each.error for each in found if each.error}
        first = next(iter(errors.values()), WrongRepository(f"{repo} has no branches. Check the name."))
        raise with_gptq_version(errors.get("main", first), hub)
    left, crowded = max(0, len(names) - SHOWN), min(len(names), SHOWN) - len(found)
    notes = [f"{left} more branches are not shown."] if left else []
    if crowded:
        size = f"{_TOGETHER_BYTES / 1e6:g} MB"
        notes.append(f"Branches left out, because the lists and settings of all are over {size} together: {crowded}.")
    return Branches(repo, tuple(found), model_card, tuple(notes))


def with_gptq_version(error: WrongRepository, hub: Hub) -> WrongRepository:
    """The same refusal; it names the GPTQ version of the model if one of its candidates exists."""
    for candidate in error.candidates:
        if hub.exists(candidate):
            return WrongRepository(error.found, error.candidates, candidate)
    if error.candidates:
        return WrongRepository(f"{error.found} No GPTQ version of it was found under the usual names: type another name.")
    return error


class _Requests:
    """The running requests. A file that several branches share is requested once."""

    def __init__(self, hub: Hub, client: "httpx.Client", pool: Executor, room: hub_request.Room, first: Listing | None) -> None:
        """`first` is read whatever the others hold."""
        self._hub, self._client, self._pool, self._room, self._first = hub, client, pool, room, first
        self._jobs: dict[tuple[str, tuple[int, int] | None], Future[bytes | None]] = {}

    def _read(self, listing: Listing, path: str, part: tuple[int, int] | None = None) -> "Future[bytes | None]":
        content = next((each.fingerprint for each in listing.files if each.path == path), "")
        key = (content or f"{listing.commit}/{path}", part)
        if key not in self._jobs:
            room = None if listing is self._first else self._room
            self._jobs[key] = self._pool.submit(self._hub.small_file, listing, path, self._client, part, room)
        return self._jobs[key]

    def settings(self, listing: Listing) -> "Mapping[str, Future[bytes | None]]":
        return {path: self._read(listing, path) for path in file_selection.settings_needed(listing)}

    def header(self, listing: Listing) -> "Future[bytes | None] | None":
        name = _weights(listing)
        return self._read(listing, name, (0, _HEADER_BYTES)) if name else None

    def model_card(self, listing: Listing) -> ModelCard:
        data = self._read(listing, "README.md").result()
        return read_model_card(data.decode("utf-8", "replace")) if data else ModelCard()

    def branch(self, listing: Listing, model_card: ModelCard) -> Branch | None:
        """None where the room is full."""
        try:
            return self._branch(listing, model_card)
        except hub_request.RoomFull:
            return None

    def _branch(self, listing: Listing, model_card: ModelCard) -> Branch:
        row = model_card.rows.get(listing.ref.branch, ModelCardRow(listing.ref.branch))
        settings = {path: file_selection.parse_settings(job.result()) for path, job in self.settings(listing).items()}
        try:
            chosen = file_selection.select_files(listing, settings)
        except WrongRepository as error:
            return Branch(listing.ref, listing.commit, None, error, settings=settings, model_card=row)
        tensors = read_beginning((job.result() if (job := self.header(listing)) else None) or b"")
        quantize, notes = self._quantize(listing, settings, tensors)
        return Branch(listing.ref, listing.commit, chosen, None, quantize, settings, row, (*chosen.notes, *notes))

    def _quantize(
        self, listing: Listing, settings: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, TensorInfo]
    ) -> tuple[QuantizeConfig | None, tuple[str, ...]]:
        """From the settings, checked against the tensors; without settings, from the tensors alone."""
        seen = bits_and_group(tensors)
        try:
            config = file_selection.quantize_of(settings)
        except BadQuantizeConfig:
            if seen is None:
                return None, ()
            return QuantizeConfig(*seen, desc_act=self._act_order(listing, tensors)), ()
        if seen is None or seen == (config.bits, config.group_size):
            return config, ()
        difference = (
            f"its settings say {config.bits} bits and group size {config.group_size}, its tensors {seen[0]} and {seen[1]}"
        )
        return replace(config, bits=seen[0], group_size=seen[1]), (f"{listing.ref.branch}: {difference}; the tensors are right.",)

    def _act_order(self, listing: Listing, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the first g_idx is unsorted: only the tensors show act-order."""
        found = next((info for name, info in tensors.items() if name.endswith(".g_idx")), None)
        if found is None:
            return False
        part = (found.start, found.start + found.size_bytes // 4 * 4)
        data = self._read(listing, _weights(listing), part).result() or b""
        values = struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
        return any(a > b for a, b in itertools.pairwise(values))


def bits_and_group(tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """(bits, group size) from the shapes of the first packed layer; None if there is none or it is no GPTQ layer."""
    for name, weight in tensors.items():
        zeros = tensors.get(f"{name.removesuffix('.qweight')}.qzeros")
        if not name.endswith(".qweight") or zeros is None or len(weight.shape) != 2 or len(zeros.shape) != 2:
            continue
        columns, groups = weight.shape[1], zeros.shape[0]
        bits = 32 * zeros.shape[1] / columns if columns else 0
        if bits not in BITS or not groups:
            return None  # AWQ packs along the columns
        in_features = weight.shape[0] * 32 // int(bits)
        return int(bits), -1 if groups == 1 else math.ceil(in_features / groups)
    return None


def _weights(listing: Listing) -> str:
    """The safetensors file to read the beginning of; "" if there is none."""
    sizes = {file.path: file.size_bytes for file in listing.files if "/" not in file.path}
    names, _missing = choose_weights(sizes)
    return names[0] if names and names[0].endswith(".safetensors") else ""
