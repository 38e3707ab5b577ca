"""What the host and the GPU do at the same time: who waits for whom, and what is on its way when something happens."""

import gc
from dataclasses import replace

from paged_model import prompt_of
from test_running_answers import GREEDY, SAMPLED, Run, solo


def pages_without_errors(run):
    run.found.clear()  # an error keeps the frames that it came through
    run.prefix.clear()
    gc.collect()
    return run.used_pages()


class Waits:
    """Marks of a model, each with the number of its launch, and what was launched when the host waited for one."""

    def __init__(self, model):
        self.launched, self.waited = [], []
        for name in ("step_rows", "prefill_several", "prefill"):
            self.note(model, name)
        model.mark = lambda timed=False: self.mark()

    def note(self, model, name):
        run = getattr(model, name)

        def noted(*given, **named):
            self.launched.append(name)
            return run(*given, **named)

        setattr(model, name, noted)

    def mark(self):
        at = len(self.launched)
        waited = self.waited

        class Noted:
            def synchronize(mark):
                waited.append((at, self.launched[at:]))

            def query(mark):
                return True

            def elapsed_time(mark, other):
                return 1.0

        return Noted()


def test_the_gpu_has_work_whenever_the_host_waits_for_it():
    run = Run()
    waits = Waits(run.model)
    for at in range(12):
        run.ask(at, prompt_of(at, 100), replace(GREEDY, max_new_tokens=30))
    for _ in range(3):
        run.turn()
    del waits.waited[:]
    for _ in range(8):
        run.turn()
    assert len(waits.waited) > 12 and all(behind for _at, behind in waits.waited), "a step or a prompt is behind each token"
    assert any("prefill" in each for _at, behind in waits.waited for each in behind), "a first token waits for no later prompt"
    assert run.all() == {at: solo(prompt_of(at, 100), replace(GREEDY, max_new_tokens=30)) for at in range(12)}


def test_answers_join_and_leave_while_a_step_is_on_its_way():
    run, long = Run(), replace(SAMPLED, max_new_tokens=50)
    for at in range(5):
        run.ask(at, prompt_of(at, 40 + at), replace(long, seed=at))
    for _ in range(6):
        run.turn()
    assert run.stepper._answers._pending, "a step that nobody has read"
    run.open.pop(0).close()  # it asked for the steps of all
    run.open.pop(3).close()
    cancel = run.ask(5, prompt_of(5, 70), replace(long, seed=5))
    run.turn()
    run.ask(6, prompt_of(6, 20), replace(long, seed=6))
    run.turn()
    run.turn()
    cancel.set()
    found = run.all()
    for at in (1, 2, 4, 6):
        assert found[at] == solo(prompt_of(at, (40 + at) if at < 5 else 20), replace(long, seed=at)), at
    assert found[5] == solo(prompt_of(5, 70), replace(long, seed=5))[: len(found[5])]
    run.prefix.clear()
    assert run.used_pages() == 0 and not run.stepper._answers.busy


def test_an_error_in_a_step_ends_who_asked_for_it_and_the_others_go_on():
    run = Run()
    for at in range(4):
        run.ask(at, prompt_of(at, 30))
    for _ in range(8):
        run.turn()
    step = run.model.step_rows

    def failing(*given):
        run.model.step_rows = step
        raise RuntimeError("CUDA error: the step failed")

    run.model.step_rows = failing
    found = run.all()
    failed = [at for at, events in run.found.items() if isinstance(events[-1], RuntimeError)]
    assert len(failed) == 1
    assert all(found[at] == solo(prompt_of(at, 30)) for at in range(4) if at not in failed)
    assert pages_without_errors(run) == 0


def test_an_error_in_prompts_that_are_read_together_is_theirs():
    run = Run()
    run.ask("stream", prompt_of(0, 30))
    for _ in range(5):
        run.turn()

    def failing(pieces, wanted):
        del run.model.prefill_several
        raise RuntimeError("CUDA error: the prompts failed")

    run.model.prefill_several = failing
    for at in range(2):
        run.ask(at, prompt_of(at + 1, 30))
    found = run.all()
    assert found["stream"] == solo(prompt_of(0, 30))
    assert all("prompts failed" in str(run.found[at][-1]) for at in range(2))
    assert pages_without_errors(run) == 0
