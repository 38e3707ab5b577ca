"""gptq/families: every family that is described, read off tiny models of transformers' classes."""

import pytest
from every_architecture import tiny_model

from gptq_webui.gptq.families.known import KINDS, parts_of
from gptq_webui.gptq.families.parts import OPTIONS
from gptq_webui.gptq.suitability import Limits, shape_of

EVERYTHING = Limits(options=frozenset(OPTIONS), length_dependent=True)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gpt2"}))  # gpt2's layers are nn.Linear only once they are packed
def test_every_family_is_described_and_its_parts_fit_together(kind):
    parts = parts_of(tiny_model(kind))
    assert parts is not None
    assert shape_of(parts, EVERYTHING).layers == 4
