"""The Benchmark button: measures the loaded model for a few seconds and shows one line to copy."""

from ..engine.benchmark import measure
from ..engine.engine import Engine
from .access import Access
from .job_watcher import Job, Watcher
from .measure_box import MeasureBox, draw_measurement


def draw_benchmark(engine: Engine, access: Access, watcher: Watcher) -> MeasureBox:
    """Draw and wire."""

    def work(job: Job) -> object:
        return measure(engine, job.cancel, lambda text: setattr(job, "text", text))

    return draw_measurement("Benchmark", "gw-benchmark", work, access, watcher)
