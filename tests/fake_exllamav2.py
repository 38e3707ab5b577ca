"""As much of the library exllamav2 0.3.2 as loaders/exllamav2/exllamav2_loader.py touches, for machines without CUDA.

Jobs are computed like there: one prefill and one token for every active job in each `iterate`, at most
`max_batch_size` side by side, results as dictionaries. The "model" counts: after id n comes n + 1.
"""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch


def install(monkeypatch, *, paged=True, fails=None):
    """Put the modules where an import finds them; returns what was done with them."""
    seen = SimpleNamespace(
        configs=[], caches=[], loads=[], unloaded=0, jobs=[], most_at_once=0, cancelled=[], files=None, pause_s=0.0
    )

    class Config:
        def __init__(self, folder):
            self.model_dir = folder
            self.json = json.loads((Path(folder) / "config.json").read_text())
            seen.files = sorted(path.name for path in Path(folder).iterdir())
            self.max_seq_len, self.max_input_len, self.no_flash_attn = 2048, 2048, False
            self.num_experts, self.num_experts_per_token = None, None
            self.vocab_size = self.json["vocab_size"]
            self.scale_alpha_value = self.scale_pos_emb = 1.0
            self.rotary_embedding_base = 10000.0
            seen.configs.append(self)

        def arch_compat_overrides(self, quiet=False, warn_only=False):
            pass

    class Model:
        def __init__(self, config):
            self.config = config

        def load(self, gpu_split=None, callback=None):
            seen.loads.append(("split", gpu_split))
            callback(0, 2)
            if fails is not None:
                raise fails

        def load_autosplit(self, cache, reserve_vram=None, last_id_only=False, callback=None):
            assert cache.lazy
            seen.loads.append(("autosplit", reserve_vram))
            callback(0, 2)
            if fails is not None:
                raise fails
            callback(2, 2)

        def unload(self):
            seen.unloaded += 1

    def cache(name):
        class Cache:
            def __init__(self, model, batch_size=1, max_seq_len=-1, lazy=False):
                self.name, self.max_seq_len, self.lazy = name, max_seq_len, lazy
                seen.caches.append(self)

        return Cache

    class Job:
        def __init__(self, input_ids, max_new_tokens, gen_settings, seed=None, stop_conditions=None):
            assert input_ids.shape[0] == 1 and input_ids.device.type == "cpu"
            self.ids, self.room, self.settings, self.stop = input_ids[0].tolist(), max_new_tokens, gen_settings, stop_conditions
            self.new, self.cached_pages, self.cached_tokens, self.seed = 0, 0, 0, seed
            seen.jobs.append(self)

    class Generator:
        def __init__(self, model, cache, tokenizer, max_batch_size, max_sampling_threads, filter_background_eval, paged):
            assert cache.max_seq_len % 256 == 0
            self.tokenizer, self.max_batch_size, self.page_size = tokenizer, max_batch_size, 256
            self.padded_vocab_size = (model.config.vocab_size + 31) // 32 * 32
            self.pending, self.active, self.serial = [], [], 0
            self.last_ids = []

        def enqueue(self, job):
            job.serial, self.serial = self.serial, self.serial + 1
            self.pending.append(job)
            return job.serial

        def cancel(self, job):
            seen.cancelled.append(job.serial)
            for each in (self.pending, self.active):
                if job in each:
                    each.remove(job)

        def iterate(self):
            time.sleep(seen.pause_s)
            results = []
            while self.pending and len(self.active) < self.max_batch_size:
                job = self.pending.pop(0)
                self.active.append(job)
                same = next((at for at, (a, b) in enumerate(zip(self.last_ids, job.ids[:-1], strict=False)) if a != b), None)
                job.cached_tokens = min(len(self.last_ids), len(job.ids) - 1) if same is None else same
                results.append({"job": job, "stage": "started", "eos": False, "serial": job.serial})
                read = {"curr_progress": len(job.ids) - 1, "max_progress": len(job.ids) - 1}
                results.append({"job": job, "stage": "prefill", "eos": False, "serial": job.serial, **read})
            seen.most_at_once = max(seen.most_at_once, len(self.active))
            for job in list(self.active):
                id = (job.ids[-1] + 1) % self.tokenizer.get_vocab_size()
                job.ids.append(id)
                job.new += 1
                result = {"job": job, "stage": "streaming", "eos": False, "serial": job.serial}
                if id in job.stop:
                    result |= {"eos": True, "eos_reason": "stop_token", "held": {"token_ids": torch.tensor([[id]])}}
                else:
                    assert self.tokenizer.get_id_to_piece_list(True)[id] == ""
                    result |= {"token_ids": torch.tensor([[id]])}
                    if job.new >= job.room:
                        result |= {"eos": True, "eos_reason": "max_new_tokens"}
                if result["eos"]:
                    result["cached_tokens"] = job.cached_tokens
                    self.last_ids = list(job.ids)
                    self.active.remove(job)
                results.append(result)
            return results

    library, attention, generator = (ModuleType(name) for name in ("exllamav2", "exllamav2.attn", "exllamav2.generator"))
    library.ExLlamaV2Config, library.ExLlamaV2 = Config, Model
    for name in ("ExLlamaV2Cache", "ExLlamaV2Cache_Q4", "ExLlamaV2Cache_Q6", "ExLlamaV2Cache_Q8"):
        setattr(library, name, cache(name))
    attention.has_flash_attn_with_paged = paged
    generator.ExLlamaV2DynamicGenerator, generator.ExLlamaV2DynamicJob = Generator, Job
    generator.ExLlamaV2Sampler = SimpleNamespace(Settings=SimpleNamespace)
    for module in (library, attention, generator):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen
