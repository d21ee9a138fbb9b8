# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Does the instance matter, and is it better than LoRA? A causal model that writes the label or the answer behind the text.

    python benchmarks/quality_causal.py --plan
    python benchmarks/quality_causal.py

The task "mixture" is seven tasks in one adapter, scored task by task. See quality_encoder.py for the rest.
"""

from quality.causal import Causal
from quality.command import main
from quality.methods import METHODS


from smollm2 import smollm2_folder  # isort: skip, quality.tasks knows where the loaders are


if __name__ == "__main__":
    main(
        "quality_causal",
        __doc__,
        Causal,
        {
            "folder": smollm2_folder,
            "tasks": ("mixture", "vitaminc", "movie", "overlap", "product", "editorial", "tweet"),
            "methods": [name for name in METHODS if name not in ("head", "full")],
            "steps": 120,
            "mixture_steps": 240,
            "batch_size": 8,
            "most": (60, 160),
            "step_seconds": 2.0,
            "smoke": ("movie+tweet", {"num_hidden_layers": 2}),
            "likely": {
                "iapt": (1e-2, 3e-2, 3e-3, 1e-1),
                "iapt-constant": (3e-3, 1e-2, 1e-3, 3e-2),
                "preft-r13": (1e-3, 3e-3, 3e-4),
            },
        },
    )
