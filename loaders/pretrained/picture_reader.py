"""Pictures of a conversation as a model on this machine reads them: by the processor in its folder.

transformers' AutoProcessor is not used: it asks for torchvision even where only a video would need it.
"""

import base64
import io
import logging
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.chat import Message
from ...core.errors import BadFile, BadParameter
from ...core.folder_files import printable, read_json
from ...core.foreign_errors import in_words
from ...core.picture import is_picture
from ..text.chat_template import ChatTemplate
from ..text.token_codec import TokenCodec

log = logging.getLogger(__name__)

_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_MOST_PIXELS = 50_000_000  # of a picture before it is made smaller
_MOST_LENGTH = 30_000  # pixels of a side
_MOST_SCANS = 100  # of a JPEG, each of which goes over the whole picture; cameras write 1, programs about 10
_MOST_PICTURES = 32  # of one conversation as it is read
_MOST_SIDE = 2048  # pixels of what the processor is given
# The largest numbers that a folder's processor may have: sides, areas and tokens of a picture, and what multiplies them.
_MOST_NUMBER = 4096  # of a name that is not here
_MOST_OF = {
    "min_pixels": 2**22, "max_pixels": 2**28, "shortest_edge": 2**22, "longest_edge": 2**28, "patch_size": 256, "merge_size": 16,
    "spatial_merge_size": 16, "temporal_patch_size": 4, "scale_factor": 16, "image_seq_length": 2**14, "image_seq_len": 2**14,
    "num_additional_image_tokens": 64, "pan_and_scan_max_num_crops": 16, "max_patches": 64, "max_image_tiles": 64,
    **dict.fromkeys(("sampling_rate", "n_samples", "nb_max_frames", "max_frequency", "fft_length"), 2**26),  # of sound: not used
}  # fmt: skip
_NO_SIZE = re.compile(r".*(_id|_ids|_index|max_length)")  # names of numbers that cost nothing
_MOST_NUMBERS = 10_000  # of all together
_MOST_EDGE = 8192  # of a processor whose edges are lengths, not areas as Qwen's are
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_KEPT = 4  # prompts whose pictures are kept ready
_PICTURE = "data:image/png;base64,"


class PictureReader:
    """Makes ids and tensors of a text with pictures. Any thread may ask."""

    def __init__(self, processor: Any, codec: TokenCodec) -> None:
        self._processor, self._codec = processor, codec
        self._ready: OrderedDict[tuple[str, tuple[str, ...]], tuple[list[int], dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, text: str, urls: Sequence[str]) -> tuple[list[int], dict[str, Any]]:
        """(ids, the model's further arguments by name) of a rendered conversation with pictures, in their order.

        Raises BadParameter for a picture that cannot be read, or that the text has no place for.
        """
        if len(urls) > _MOST_PICTURES:
            raise BadParameter(
                f"This conversation has {len(urls)} pictures; {_MOST_PICTURES} are the limit. "
                "Delete some, or open a new conversation."
            )
        key = (text, tuple(urls))
        with self._lock:
            if key not in self._ready:
                self._ready[key] = self._read(text, [_open(each) for each in urls])
                if len(self._ready) > _KEPT:
                    self._ready.popitem(last=False)
            ids, tensors = self._ready[key]
        return list(ids), dict(tensors)

    def _read(self, text: str, pictures: list[Any]) -> tuple[list[int], dict[str, Any]]:
        import torch

        for name in ("image_token", "boi_token"):
            token = getattr(self._processor, name, None)
            if isinstance(token, str) and text.count(token) not in (0, len(pictures)):
                raise BadParameter(
                    f"The pictures of this conversation do not fit its text: it has {text.count(token)} times {token}, which "
                    f"stands for a picture, and {len(pictures)} pictures. Leave {token} out of the messages."
                )
        try:
            with self._codec.lock:
                found = self._processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # of any processor, whose errors have no common class
            log.exception("the pictures cannot be read")
            raise BadParameter(
                f"The pictures of this conversation do not fit its text: {in_words(error)}. Send them in a message of their own."
            ) from error
        own = found["input_ids"][0].tolist()
        tensors = {name: each for name, each in found.items() if name not in ("input_ids", "attention_mask")}
        ids = self._codec.with_bos(own)
        if len(ids) > len(own):
            for name, each in tensors.items():
                if isinstance(each, torch.Tensor) and each.shape == (1, len(own)):  # a number for each token
                    tensors[name] = torch.nn.functional.pad(each, (1, 0))
        return ids, tensors


def find(folder: Path, config: Any, codec: TokenCodec, template: ChatTemplate) -> tuple[PictureReader | None, str]:
    """(reader of a folder whose model sees pictures, None if it does not; a sentence for the user, "" without one)."""
    if not may_see(folder, config):
        return None, ""
    try:
        _require_sizes({name: read_json(folder / name) for name in _CONFIGS})
        processor = _processor(folder, config, codec.tokenizer)
        _require_edges(processor)
        reader = PictureReader(processor, codec)
        message = Message("user", "?", pictures=(_trial(),))
        reader.read(template.render([message], codec.tokenizer), message.pictures)
    except Exception as error:  # a folder's processor is no reason to lose its language model
        log.info("no pictures: %s", error)
        return None, f"It reads text only, for the processor of its pictures cannot be used: {in_words(error).rstrip('.')}."
    return reader, "It sees pictures: attach them in the Chat tab."


def may_see(folder: Path, config: Any) -> bool:
    """Whether a model sees pictures and its folder says how they are read."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and any((folder / name).is_file() for name in _CONFIGS)


def _processor(folder: Path, config: Any, tokenizer: Any) -> Any:
    import transformers
    from transformers import AutoImageProcessor, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    values = [read_json(folder / name) for name in (*_CONFIGS, "tokenizer_config.json")]
    name = next((str(each["processor_class"]) for each in values if "processor_class" in each), "")
    of: Any = getattr(transformers, name, None) if name.endswith("Processor") else None
    of = of or PROCESSOR_MAPPING[type(config)]
    if not (isinstance(of, type) and issubclass(of, ProcessorMixin)):
        raise BadFile(f"its class {name[:60]!r} is no processor of pictures and text. Download the model again.")
    unchecked: Any = type(of.__name__, (of,), {"check_argument_for_proper_class": lambda self, *given: None})
    # said, not left open: where nothing is said, transformers asks at the terminal whether to run a folder's own code
    reader = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    given = {"image_processor": reader, "tokenizer": tokenizer}
    try:
        names = unchecked.get_attributes()
    except AttributeError:  # transformers 4
        names = unchecked.attributes
    settings, _rest = of.get_processor_dict(folder, local_files_only=True)
    return unchecked.from_args_and_dict([given.get(each) for each in names], settings)


def _require_sizes(configs: Mapping[str, Any]) -> None:
    """Raises BadFile for a number that would make a picture fill the memory."""
    waiting: list[tuple[str, Any]] = list(configs.items())
    numbers = 0
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            waiting += [(name, each) for each in value]
        elif isinstance(value, (int, float)) and not _NO_SIZE.fullmatch(name):
            numbers += 1
            most = _MOST_OF.get(name, _MOST_NUMBER)
            if not abs(value) <= most:
                raise BadFile(
                    f"{printable(name)[:60]} is {str(value)[:20]}, and at most {most:,} was expected. "
                    "Correct preprocessor_config.json."
                )
    if numbers > _MOST_NUMBERS:
        raise BadFile(f"its settings have {numbers:,} numbers, and at most {_MOST_NUMBERS:,} were expected. Download it again.")


def _require_edges(processor: Any) -> None:
    """Raises BadFile for edges that `_require_sizes` took for areas, where the processor takes them for lengths.

    Those that take them for areas, as Qwen's, have a function smart_resize in their module.
    """
    reader = getattr(processor, "image_processor", None)
    size = getattr(reader, "size", None)
    if hasattr(sys.modules.get(type(reader).__module__), "smart_resize") or size is None:
        return
    for name in ("shortest_edge", "longest_edge"):
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        if isinstance(value, (int, float)) and value > _MOST_EDGE:
            raise BadFile(f"{name} is {value}, and at most {_MOST_EDGE:,} was expected. Correct preprocessor_config.json.")


def _open(url: str) -> Any:
    """A PIL image in RGB. Raises BadParameter."""
    from PIL import Image

    if not is_picture(url):
        raise BadParameter(
            "This model reads pictures from the message itself and fetches none from an address. "
            "Send it as data:image/png;base64,… (PNG, JPEG, WebP or GIF)."
        )
    try:
        data = _without_comments(base64.b64decode(url.partition(",")[2]))
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.format == "JPEG" and data.count(b"\xff\xda") > _MOST_SCANS:
            raise BadParameter(
                f"A picture has more than {_MOST_SCANS} scans, which would take minutes to open. Save it again as PNG or JPEG."
            )
        if image.width * image.height > _MOST_PIXELS or max(image.size) > _MOST_LENGTH:
            raise BadParameter(
                f"A picture has {image.width} x {image.height} pixels; {_MOST_PIXELS // 1_000_000} million are the limit, and "
                f"{_MOST_LENGTH:,} of a side. Make it smaller, then send it again."
            )
        image.draft("RGB", (_MOST_SIDE, _MOST_SIDE))
        image.thumbnail((_MOST_SIDE, _MOST_SIDE))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, ArithmeticError, Image.DecompressionBombError) as error:
        raise BadParameter("A picture is damaged: it cannot be opened. Save it as PNG or JPEG, then send it again.") from error


def _without_comments(data: bytes) -> bytes:
    """A GIF without its comments, which Pillow joins one by one: a million take minutes. Another picture, or a damaged one,
    as it is."""
    if not data.startswith(b"GIF8") or len(data) < 13:
        return data
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at : at + 1] == b"!" and at + 2 < len(data):
        begin, at = at, at + 2
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
        if data[begin + 1] == 0xF9:  # what is transparent
            kept = [kept[0], data[begin:at]]
    return b"".join((*kept, data[at:]))


def _trial() -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(data, "PNG")
    return _PICTURE + base64.b64encode(data.getvalue()).decode()
