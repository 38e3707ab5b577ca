"""What a step with guesses launches, without a GPU, and that nothing of it is there where guesses are off."""

from collections import Counter

import pytest
from test_cuda_launches import gpu, make  # noqa: F401 (a fixture)

from gptq_webui.gptq.cuda import batch_step


@pytest.mark.parametrize("guesses", [1, 3, 7])
def test_guessed_tokens_take_the_kernels_of_several_rows_and_one_that_samples(gpu, monkeypatch, guesses):  # noqa: F811
    monkeypatch.setattr(batch_step, "head_product", lambda x, weight: (x @ weight.T).float())
    step = make(gpu, parallel=8, guesses=True)
    gpu.launched.clear()
    step.guessed.step(5, list(range(guesses)))
    kinds = Counter(name if "guessed" in name else name.split("_")[0] for name in gpu.launched)
    products = {1: {"octet": 8}, 3: {"octet": 6, "cluster": 2}, 7: {"octet": 4, "cluster": 4}}[guesses]
    assert kinds == {"embed": 1, **products, "guessed_attention_64": 2, "head": 1, "sample_guessed": 1}
    gpu.launched.clear()
    step.batch.step(guesses + 1)
    attention = {each for each in gpu.launched if "attention" in each}
    assert gpu.launched[-1] == "sample" and attention == {f"cluster_attention_64_{6 if guesses == 7 else 8}"}


def test_without_guesses_nothing_of_them_is_compiled(gpu):  # noqa: F811
    make(gpu, parallel=8)
    assert not any("guessed" in name for name in gpu.compiled)
