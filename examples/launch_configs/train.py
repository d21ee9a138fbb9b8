# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
A training script for several processes. It is one for a single process, too: nothing in it is about processes but the last check.

    accelerate launch --config_file examples/launch_configs/ddp.yaml --num_processes 8 examples/launch_configs/train.py

On two CPU processes, over gloo:

    ACCELERATE_USE_CPU=true accelerate launch --config_file examples/launch_configs/ddp.yaml examples/launch_configs/train.py --short

IAPT on film reviews; model and reviews come from PyPI packages. `--steps` counts steps of 8 sentences per process.
"""

import os
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from peft import PeftModel, get_peft_model
from transformers import set_seed

from peft_instance_prompt import IAPTConfig
from reviews import Collator, accuracy, fit, load_base, load_examples, make_parser, parse


def main(args):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    more = {"ddp_backend": "gloo"} if processes > 1 and not torch.cuda.is_available() else {}
    set_seed(args.seed)  # before the adapter is made, the same in all processes
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed, args.n_test)
    labels = sorted({example["label"] for example in train_examples})
    model = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM"))
    trainer = fit(model, train_examples, Collator(tokenizer), args, **more)
    trainer.save_model(args.output)  # one process writes; under FSDP and DeepSpeed all bring their parts

    state = PartialState()
    if state.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):  # there, each holds a part
        sizes = gather(sum(p.detach().abs().sum() for p in model.parameters() if p.requires_grad).reshape(1))
        if state.is_main_process:
            same = bool((sizes == sizes[0]).all())
            print(f"{len(sizes)} process(es), whose trained weights are the same: {same}", flush=True)
    if state.is_main_process:
        loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output)
        share = accuracy(loaded, tokenizer, test_examples, labels)
        print(f"accuracy on {len(test_examples)} held-out sentences with the adapter from {args.output}: {share:.3f}")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse(make_parser(__doc__, lr=1e-2, output="outputs/launched")))
