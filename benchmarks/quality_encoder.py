# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Does the instance matter, and is it better than LoRA? An encoder with a classification head.

    python benchmarks/quality_encoder.py --plan
    python benchmarks/quality_encoder.py

Each cell (task, number of examples, method, seed) is a file under benchmarks/results/; cells that are there are not run again.
Several processes can share the work: --shard 0/2 and --shard 1/2. benchmarks/report.py makes the tables of Evidence.
"""

from quality.command import main
from quality.encoder import Encoder
from quality.methods import METHODS
from quality.tasks import CLASSIFICATION


from minilm import minilm_folder  # isort: skip, quality.tasks knows where the loaders are


if __name__ == "__main__":
    main(
        "quality_encoder",
        __doc__,
        Encoder,
        {
            "folder": minilm_folder,
            "tasks": ("mixture", *CLASSIFICATION),
            # PEFT refuses prefix tuning for BERT, which takes no `past_key_values`
            "methods": [name for name in METHODS if name != "prefix-tuning"],
            "steps": 150,
            "mixture_steps": 300,
            "batch_size": 8,
            "most": (200, 400),
            "step_seconds": 0.25,
            "smoke": ("movie", {"num_hidden_layers": 2}),
        },
    )
