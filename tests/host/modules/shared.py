"""The globals that everything in the host reads."""

import threading
from argparse import Namespace

args = Namespace(
    model_dir="user_data/models",
    model=None,
    loader=None,
    cpu=True,
    extensions=[],
    ctx_size=8192,
    idle_timeout=0,
    nowebui=False,
    multi_user=False,
)
settings = {"truncation_length": 8192, "instruction_template_str": ""}
user_config: dict = {}  # config-user.yaml: what the user saved for models, by regex
gradio: dict = {}
model = None
tokenizer = None
model_name = "None"
lora_names: list = []
stop_everything = False
need_restart = False
generation_lock = threading.Lock()
