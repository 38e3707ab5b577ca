"""engine/rescue.py and gptq/convert.py: settings written from the tensors, pickles converted without running them."""

import json
import pickle
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from gptq_webui.core.errors import BadCheckpoint, DiskFull, ModelError, WrongRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.core.models import LocalModel
from gptq_webui.engine import rescue
from gptq_webui.gptq import checkpoint
from gptq_webui.hub import verification
from gptq_webui.hub.library import Library

SETTINGS = "quantize_config.json"


def read(folder):
    return LocalModel.read(folder)


@pytest.fixture
def folder(tmp_path, tiny_gptq):
    return shutil.copytree(tiny_gptq, tmp_path / "model")


def change(folder, **values):
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_right_settings_need_nothing(folder):
    assert rescue.settings_wrong(read(folder)) == ""


def test_missing_settings_are_written_from_the_tensors(folder):
    (folder / SETTINGS).unlink()
    assert "There is no quantize_config.json" in rescue.settings_wrong(read(folder))
    rescue.write_settings(read(folder))
    values = json.loads((folder / SETTINGS).read_text())
    found = (values["bits"], values["group_size"], values["desc_act"], values["sym"], values["quant_method"])
    assert found == (4, 32, True, True, "gptq") and values["model_file_base_name"] == "model"
    assert rescue.settings_wrong(read(folder)) == "" and read(folder).quantize.notes == ()
    checkpoint.load(read(folder), dtype=torch.float32, device_map={"": "cpu"})


@pytest.mark.parametrize("wrong", [{"bits": 8}, {"group_size": 128}, {"desc_act": False}, {"sym": False}, {"bits": "four"}])
def test_wrong_settings_are_made_right_and_the_rest_is_kept(folder, wrong):
    change(folder, damp_percent=0.1, true_sequential=True, **wrong)
    assert rescue.settings_wrong(read(folder))
    rescue.write_settings(read(folder))
    values = json.loads((folder / SETTINGS).read_text())
    assert (values["bits"], values["group_size"], values["desc_act"], values["sym"]) == (4, 32, True, True)
    assert values["damp_percent"] == 0.1 and values["true_sequential"] is True
    assert rescue.settings_wrong(read(folder)) == "" and (folder / f"{SETTINGS}.old").exists()


def test_a_damaged_settings_file_is_replaced(folder):
    (folder / SETTINGS).write_text('{"bits": 4,')
    assert "is not JSON" in rescue.settings_wrong(read(folder))
    rescue.write_settings(read(folder))
    assert read(folder).kind == "gptq" and read(folder).quantize.group_size == 32


def test_what_cannot_be_repaired_keeps_its_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SETTINGS).write_text('{"bits": 4}')
    with pytest.raises(ModelError, match="cannot be repaired"):
        rescue.write_settings(read(tmp_path))
    assert (tmp_path / SETTINGS).read_text() == '{"bits": 4}'


def test_a_repaired_file_is_not_called_damaged_nor_fetched_over(folder, tmp_path, hub_server):
    change(folder, group_size=64)
    hub_server.add("Owner/Wrong-GPTQ", folder)
    library = Library([tmp_path / "models"])
    plan = library.plan(ModelRef("Owner/Wrong-GPTQ"))
    list(library.fetch(plan, threading.Event()))
    rescue.write_settings(library.get(plan.folder.name))
    *_, verdict = verification.verify(plan.folder, threading.Event())
    assert verdict.good and verdict.repaired == (SETTINGS,) and "was written here" in verdict.text
    list(library.fetch(library.plan(ModelRef("Owner/Wrong-GPTQ")), threading.Event()))
    assert json.loads((plan.folder / SETTINGS).read_text())["group_size"] == 32
    *_, verdict = verification.verify(plan.folder, threading.Event())
    assert verdict.repaired == (SETTINGS,)


# .bin and .pt


def as_pickle(folder, name="gptq_model-4bit-32g.pt", wrap=lambda state: state):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(wrap(dict(state)), folder / name)
    return state


def run(folder, **options):
    return rescue.convert(read(folder), lambda share, text: None, threading.Event(), **options)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}], ids=["plain", "nested"])
def test_pt_weights_become_safetensors_with_every_tensor_the_same(folder, wrap):
    state = as_pickle(folder, wrap=wrap)
    with pytest.raises(BadCheckpoint, match="can run code"):
        checkpoint.load(read(folder), dtype=torch.float32, device_map={"": "cpu"})
    (written,) = run(folder)
    assert written.name == "gptq_model-4bit-32g.safetensors"
    found = load_file(written)
    assert set(found) == set(state) and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert (folder / "gptq_model-4bit-32g.pt").exists()
    checkpoint.load(read(folder), dtype=torch.float32, device_map={"": "cpu"})


def test_shards_are_renamed_and_indexed_and_the_originals_deleted_if_asked(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for at in range(2):
        part = {name: state[name] for name in names[at::2]}
        torch.save(part, folder / f"pytorch_model-{at + 1:05}-of-00002.bin")
    written = run(folder, delete_original=True)
    assert [path.name for path in written] == [f"model-{at:05}-of-00002.safetensors" for at in (1, 2)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(state) and not list(folder.glob("*.bin"))
    checkpoint.load(read(folder), dtype=torch.float32, device_map={"": "cpu"})


def test_tensors_that_share_memory_are_each_stored(folder, tmp_path):
    base = torch.arange(12.0)
    torch.save({"a": base, "b": base, "c": base[2:6], "nan": torch.tensor(float("nan"))}, tmp_path / "model.bin")
    from gptq_webui.gptq.convert import convert

    (written,) = convert([tmp_path / "model.bin"], lambda *_: None, threading.Event())
    found = load_file(written)
    assert torch.equal(found["a"], base) and torch.equal(found["b"], base) and torch.equal(found["c"], base[2:6])


class Evil:
    def __reduce__(self):
        return (exec, ("open('hacked', 'w').close()",))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(folder, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    path = folder / "model.pt"
    if how == "torch":
        torch.save({"weight": torch.zeros(2), "evil": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"evil": Evil()}, 2))
    with pytest.raises(BadCheckpoint, match=r"program code|cannot be read"):
        run(folder)
    assert not (tmp_path / "hacked").exists()
    assert not list(folder.glob("*.safetensors*")) and path.exists()


def test_a_full_disk_and_a_stop_leave_nothing(folder, monkeypatch):
    as_pickle(folder)
    cancel = threading.Event()
    cancel.set()
    assert rescue.convert(read(folder), lambda *_: None, cancel) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DiskFull, match="1 byte"):
        run(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".pt"}


def test_a_repository_with_pt_weights_comes_only_when_asked_for(folder, tmp_path, hub_server):
    as_pickle(folder)
    hub_server.add("Owner/Old-GPTQ", folder)
    library = Library([tmp_path / "models"])
    with pytest.raises(WrongRepository, match="--allow-pickle"):
        library.plan(ModelRef("Owner/Old-GPTQ"))
    plan = library.plan(ModelRef("Owner/Old-GPTQ"), allow_pickle=True)
    list(library.fetch(plan, threading.Event()))
    (model,) = library.models()
    run(model.folder)
    assert library.get(model.name).weights[0].suffix == ".safetensors"
