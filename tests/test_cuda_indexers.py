"""Models that choose among their tokens, or compress them, on a GPU: with and without a graph, beside the model in 32 bits."""

import hub_folder
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW, PROMPTS, apart, plain_rows
from test_indexed_cache import INDEXED, chosen_of, compare, right
from test_static_windows import CHOSEN, KIND, LAYERS
from test_transformers_stepper import IDS, whole
from transformers import AutoModelForCausalLM

from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, stepper_choice

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"), NEW]
CASES = [(kind, chosen_of(kind), 4) for kind in INDEXED]
if KIND in KINDS:
    CASES += [(KIND, CHOSEN | {"layer_types": list(layers)}, 1) for layers in LAYERS]


@pytest.mark.parametrize(("kind", "changes", "parallel"), CASES)
def test_a_gpu_heeds_what_is_chosen(kind, changes, parallel, tmp_path):
    hub_folder.write(tmp_path, tiny_model(kind, wide=True, **changes), group_size=32, act_order=False)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    _plain, broken = plain_rows(tmp_path / "dense", torch.float16, "cuda")
    if broken:  # DeepSeek V4 in 5.17
        pytest.skip(f"transformers does not compute it in 16 bits: {broken}")
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float16, device_map={"": "cuda"})
    stepper, note = stepper_choice.stepper_for(hf, 128, parallel=4)
    assert (stepper.kernel, stepper.parallel) == ("graph", parallel), note
    compare(stepper, lambda ids: whole(twin, ids))
    if parallel > 1:
        off, held = [], [list(each) for each in PROMPTS]
        with torch.inference_mode():
            memories = [stepper.begin() for _ in held]
            for memory, ids in zip(memories, held, strict=True):
                stepper.prefill(memory, ids)
            for turn in range(12):
                held = [[*ids, IDS[turn + at]] for at, ids in enumerate(held)]
                found = stepper._rows.logits([(memory, ids[-1]) for memory, ids in zip(memories, held, strict=True)])
                off += [float(apart(row, whole(twin, ids)[-1])) for row, ids in zip(found, held, strict=True)]
        assert right(off), off
    stepper.close()
