"""gptq/early_weights.py: files that threads read ahead; the model is the same, and what cannot be read so is said as ever."""

import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.core.safetensors_header import read_header
from gptq_webui.gptq import checkpoint, early_weights
from gptq_webui.gptq.early_weights import EarlyWeights
from gptq_webui.loaders.transformers import early_start
from gptq_webui.loaders.transformers.early_start import EarlyStart, Placed

CPU = torch.device("cpu")


def load(folder, early=None):
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu", early=early)[0]


def threads():
    return [each for each in threading.enumerate() if each.name == "gptq-webui weights"]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(early_weights, "_PIECE", 9000)
    monkeypatch.setattr(early_weights, "_STEP", 4000)


@pytest.fixture
def counted(monkeypatch):
    """The names of the tensors that were given; True where they had arrived."""
    found = {}
    before = EarlyWeights.tensor

    def tensor(self, name, *args):
        made = before(self, name, *args)
        found[name] = made is not None
        return made

    monkeypatch.setattr(EarlyWeights, "tensor", tensor)
    return found


def test_tensors_of_a_file_arrive_each_in_memory_of_its_own(small_pieces, tmp_path):
    path = tmp_path / "model.safetensors"
    wanted = {
        "large": torch.randn(60, 70),
        "odd": torch.arange(7, dtype=torch.uint8),
        "words": torch.randint(-(2**31), 2**31 - 1, (33, 5), dtype=torch.int32),
        "scales": torch.randn(9, 9).half(),
        "more": torch.randn(11).bfloat16(),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
    }
    save_file(wanted, path)
    early = EarlyWeights([path], CPU)
    found = {name: early.tensor(name, *each) for name, each in early._tensors[path.resolve()].items()}
    assert set(found) == set(wanted) - {"none"}
    for name, each in found.items():
        assert each.dtype == wanted[name].dtype and torch.equal(each, wanted[name]), name
        assert each.untyped_storage().nbytes() == each.numel() * each.element_size(), name
    name, each = next(iter(early._tensors[path.resolve()].items()))
    assert early.tensor(name, *each) is None  # once: whoever takes it may release it
    early.close()
    early.close()
    assert not threads()


def test_pieces_hold_whole_tensors_that_follow_each_other(small_pieces, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"t{at}": torch.zeros(size) for at, size in enumerate((1, 5000, 10, 1000, 1000, 1000, 0, 3))}, path)
    tensors = read_header(path)
    pieces, piece_of = early_weights._pieces(path, tensors)
    for each in pieces:
        assert sum(each.sizes) == each.end - each.start and (each.end - each.start <= 9000 or len(each.names) == 1)
        assert [tensors[name].start for name in each.names] == [
            each.start + sum(each.sizes[:at]) for at in range(len(each.sizes))
        ]
    assert sorted(name for each in pieces for name in each.names) == sorted(piece_of)


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"weights": "gptq_model-4bit-32g"}, {"settings": "config"}], ids=str)
def test_a_model_of_tensors_read_ahead_is_the_same(options, small_pieces, counted, tmp_path):
    tiny.write(tmp_path / "model", sym=False, **options)
    wanted = dict(load(tmp_path / "model").named_parameters())
    model = LocalModel.read(tmp_path / "model")
    early = EarlyWeights(model.weights, CPU)
    before = modeling_utils.safe_open
    found = dict(load(tmp_path / "model", early).named_parameters())
    assert not any(early._tensors.values())
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], each) for name, each in wanted.items())
    assert len(counted) > 20 and all(counted.values())
    assert modeling_utils.safe_open is before and not threads()


def test_what_did_not_arrive_comes_from_the_file(counted, monkeypatch, tmp_path):
    tiny.write(tmp_path / "model")
    wanted = dict(load(tmp_path / "model").named_parameters())

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EarlyWeights, "_filled", full)
    early = EarlyWeights(LocalModel.read(tmp_path / "model").weights, CPU)
    found = dict(load(tmp_path / "model", early).named_parameters())
    assert all(torch.equal(found[name], each) for name, each in wanted.items()) and not any(counted.values())
    early.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_cut_short_is_the_same_sentence_as_without(when, monkeypatch, tmp_path):
    folder = tmp_path / "model"
    tiny.write(folder)
    model = LocalModel.read(folder)
    path = model.weights[0]
    monkeypatch.setattr(early_weights, "_THREADS", 0 if when == "after" else 4)  # the header is read, the rest is not yet
    early = EarlyWeights(model.weights, CPU) if when == "after" else None
    os.truncate(path, path.stat().st_size - 5000)
    if early is None:
        with pytest.raises(BadCheckpoint):
            EarlyWeights(model.weights, CPU)
    else:
        early._read()
    said = []
    before = modeling_utils.safe_open
    for each in (None, early):
        with pytest.raises(BadCheckpoint) as caught:
            checkpoint.load(model, dtype=torch.float32, device_map="cpu", early=each)
        said.append(str(caught.value))
        assert modeling_utils.safe_open is before
    assert said[0] == said[1]


def test_files_are_read_ahead_for_a_gpu_alone_and_never_stop_a_load(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert early_weights.early_weights([tmp_path / "model.safetensors"], CPU) is None
    assert early_weights.early_weights([tmp_path / "model.safetensors"], torch.device("cuda")) is None
    assert early_weights.early_weights([tmp_path / "nowhere.safetensors"], torch.device("cuda")) is None


def test_what_nobody_took_is_released_and_what_waits_is_not_read(monkeypatch, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"t{at}": torch.zeros(2000) for at in range(40)}, path)
    monkeypatch.setattr(early_weights, "_PIECE", 8000)
    go, read = threading.Event(), []
    before = EarlyWeights._filled

    def filled(self, piece, *args):
        read.append(piece)
        go.wait(20)
        return before(self, piece, *args)

    monkeypatch.setattr(EarlyWeights, "_filled", filled)
    early = EarlyWeights([path], CPU)
    closing = threading.Thread(target=early.close)
    closing.start()
    while not early._closed:
        pass
    go.set()
    closing.join(20)
    assert not closing.is_alive() and not threads()
    assert len(read) <= early_weights._THREADS and not any(early._tensors.values())
    assert load_file(path).keys()  # the file is not held


def test_an_error_of_the_thread_is_raised_where_the_place_is_asked_for():
    def place():
        raise MemoryError("full")

    for at_once in (True, False):
        start = EarlyStart(place, at_once)
        with pytest.raises(MemoryError, match="full"):
            start.placed()
        start.close()


def test_weights_are_closed_whether_or_not_anybody_asked_for_them():
    class Weights:
        closed = 0

        def close(self):
            self.closed += 1

    for ask in (True, False):
        weights = Weights()
        start = EarlyStart(lambda weights=weights: Placed(None, "", CPU, weights=weights), at_once=True)
        if ask:
            assert start.placed().weights is weights
        start.close()
        assert weights.closed == 1
    EarlyStart(lambda: pytest.fail("not asked for"), at_once=False).close()


def test_no_context_where_torch_is_there_or_for_a_processor(monkeypatch):
    monkeypatch.setattr(early_start, "_in_thread", lambda name, run: pytest.fail("a thread"))
    early_start.wake_driver("auto")  # torch is imported
    monkeypatch.delitem(early_start.sys.modules, "torch")
    early_start.wake_driver("cpu")
    monkeypatch.setattr(early_start, "_torch_has_cuda", lambda: False)
    early_start.wake_driver("cuda:0")


def test_a_driver_that_is_missing_or_fails_is_no_error(monkeypatch):
    class Full:
        asked = ()

        def __init__(self, *path):
            pass

        def cuInit(self, flags):
            return 0

        def cuDeviceGet(self, device, at):
            return 0

        def cuDevicePrimaryCtxRetain(self, context, device):
            Full.asked = (*Full.asked, 1)
            return 2  # out of memory

    def missing(path):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    for driver in (missing, Full):
        monkeypatch.setattr(early_start.ctypes, "CDLL", driver)
        early_start._make_context(0)
    assert Full.asked == (1,) and os.environ["CUDA_MODULE_LOADING"] == "EAGER"
