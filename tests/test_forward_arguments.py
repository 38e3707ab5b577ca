"""gptq/cpu/forward_arguments.py: a record holds what its description names, and nothing of another type."""

import numpy as np
import pytest

from gptq_webui.gptq.cpu.forward_arguments import FORWARD, LINEAR, TABLES, Arguments

FIELDS = {"rows": int, "eps": float, "x": np.float32, "inside": TABLES}


def tables():
    return {"weights": np.zeros((1, 12), np.int64), "orders": np.zeros(1, np.int32), "biases": np.zeros(1, np.float32)}


def test_a_record_holds_numbers_and_addresses_and_keeps_the_arrays():
    x = np.zeros((2, 3), np.float32)
    made = Arguments(FIELDS, rows=2, eps=1e-5, x=x, inside=tables())
    assert made.array["rows"][0] == 2 and made.array["x"][0] == x.ctypes.data and made.kept["x"] is x
    assert made.array["inside"]["weights"][0] == made.kept["inside.weights"].ctypes.data
    other = np.ones(5, np.float32)
    made.set(x=other, rows=1)
    assert made.array["x"][0] == other.ctypes.data and made.kept["x"] is other and made.array["rows"][0] == 1


def test_what_is_missing_unknown_or_of_another_type_is_refused():
    good = {"rows": 1, "eps": 1.0, "x": np.zeros(3, np.float32), "inside": tables()}
    with pytest.raises(ValueError, match="without a value: eps"):
        Arguments(FIELDS, **{name: value for name, value in good.items() if name != "eps"})
    with pytest.raises(ValueError, match="no field width"):
        Arguments(FIELDS, **good, width=3)
    with pytest.raises(ValueError, match="inside has the fields weights, orders, biases; found weights"):
        Arguments(FIELDS, **{**good, "inside": {"weights": tables()["weights"]}})
    with pytest.raises(TypeError, match="x is an array of float32 without gaps; found float64"):
        Arguments(FIELDS, **{**good, "x": np.zeros(3)})
    with pytest.raises(TypeError, match="without gaps"):
        Arguments(FIELDS, **{**good, "x": np.zeros((4, 4), np.float32)[:, :2]})


def test_a_product_alone_and_a_forward_share_the_records_inside():
    assert LINEAR["tables"] is FORWARD["tables"] and LINEAR["rounded"] is FORWARD["rounded"] is FORWARD["head_rounded"]
