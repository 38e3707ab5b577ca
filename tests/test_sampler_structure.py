"""gptq/sampler_structure.py: the GPU sampler's parameters, made from the table of sampling fields."""

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.sampler_structure import FIELDS, c_fields, values_of


def test_every_row_that_the_kernel_computes_with_is_a_member_and_has_a_value():
    rows = {name for name, row, _default in GenerationParams.table() if row.in_kernel}
    members = dict(FIELDS)
    assert rows == set(members) - {"biased", "masked", "seed_low", "seed_high"}
    assert set(values_of(GenerationParams(), 1)) == set(members)
    assert members["top_k"] == "int" and members["top_p"] == "float"
    assert "float temperature" in c_fields().splitlines()


def test_the_values_are_what_the_kernel_can_compute_with():
    values = values_of(GenerationParams(top_p=0, typical_p=0, logit_bias={1: 2}), (7 << 32) | 0xFFFFFFFF)
    assert values["top_p"] == values["typical_p"] == 1e-6
    assert values["biased"] == 1 and values["seed_low"] == -1 and values["seed_high"] == 7


def test_a_grammar_says_that_the_row_of_bits_is_to_be_read():
    assert values_of(GenerationParams(), 1)["masked"] == 0 and values_of(GenerationParams(), 1, masked=True)["masked"] == 1
