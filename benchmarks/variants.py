# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Does a change of IAPT's or PreFT's form gain anything? One change at a time, on the encoder's mixture, screened by loss.

    python benchmarks/variants.py
    python benchmarks/variants.py --names iapt,gate --seeds 0,1

Each training (name, seed) is an entry of benchmarks/results/variants.json; those that are there are not run again. Two nearly equal trainings
of one seed can differ by 0.05 in the loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
import transformers
from machine import RESULTS
from peft import get_peft_model
from quality.cells import Cell, Plan, evaluate, summary, train
from quality.encoder import Encoder
from quality.methods import METHODS, Method, Setting
from quality.tasks import load
from torch import nn
from torch.nn.functional import dropout, gelu

from peft_instance_prompt import IAPTConfig, IDPGConfig, IDSPAMConfig, LPTConfig, PreFTConfig, register_method
from peft_instance_prompt.generator import Instances, Weights
from peft_instance_prompt.methods.iapt import IAPTGenerator
from peft_instance_prompt.methods.preft import PreFTGenerator


from minilm import minilm_folder  # isort: skip, quality.tasks knows where the loaders are


FILE = RESULTS / "variants.json"
STEPS, BATCH, MOST = 300, 8, (200, 400)


class OutputBias(IAPTGenerator):
    """`p = g(p_0) W_up + b`."""

    def __init__(self, config: Any, info: Any):
        super().__init__(config, info)
        self.bias = nn.Parameter(torch.zeros(len(self.depths), 1, info.hidden_size))

    def index_at(self, depth: int) -> dict[str, int]:
        return {**super().index_at(depth), "bias": self.depths.index(depth)}

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        return super().generate(instances, depth, weights) + weights["bias"]  # (G, l, d)


class Gate(IAPTGenerator):
    """`p = c + alpha g(p_0) W_up`, with a learned vector c and a number alpha for each slot: alpha says whether the instance matters."""

    def __init__(self, config: Any, info: Any):
        super().__init__(config, info)
        L, l = len(self.depths), self.num_slots
        self.alone = nn.Parameter(torch.zeros(L, l, info.hidden_size))
        self.alpha = nn.Parameter(torch.full((L, l, 1), 0.1))

    def index_at(self, depth: int) -> dict[str, int]:
        return {**super().index_at(depth), "alone": self.depths.index(depth), "alpha": self.depths.index(depth)}

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        return weights["alone"] + weights["alpha"] * super().generate(instances, depth, weights)  # (G, l, d)


class InstanceDropout(IAPTGenerator):
    """In training, a tenth of the instances is not read: their slots have their own vectors alone."""

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        ones = torch.ones(len(instances.states), 1, 1, device=instances.states.device)  # (G, 1, 1)
        kept = dropout(ones, 0.1, self.training)
        return super().generate(instances._replace(states=instances.states * kept), depth, weights)  # (G, l, d)


class Gelu(PreFTGenerator):
    """`h + gelu(h W_down + b) W_up`."""

    def edit(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        states = instances.states.to(weights["down"].dtype)  # (G, n, d)
        z = states @ weights["down"] + weights["bias"]  # (G, n, r)
        return gelu(z) @ weights["up"]  # (G, n, d)


def of(config: Any, generator: type | None = None, **fields: Any) -> Any:
    """What attaches a method, with a generator in place of its own."""
    if generator is not None:
        name = f"{config.method}_{generator.__name__.lower()}"
        config = dataclass(make_dataclass(name, (), bases=(config,)))
        register_method(name, config, generator)
    return lambda base, setting: get_peft_model(base, config(task_type=setting.task_type, **fields))


def crossed(r: int, bottleneck_dim: int) -> Any:
    """IAPT and edits in one model. The edits change slots, too, as hooks do not know them."""

    def attach(base: nn.Module, setting: Setting) -> nn.Module:
        model = of(IAPTConfig, bottleneck_dim=bottleneck_dim)(base, setting)
        d, layers = base.config.hidden_size, base.bert.encoder.layer
        base.edit_down = nn.Parameter(torch.randn(len(layers), d, r) / d**0.5)
        base.edit_up = nn.Parameter(torch.zeros(len(layers), r, d))
        for n, layer in enumerate(layers):
            layer.register_forward_pre_hook(
                lambda _, args, n=n: (args[0] + args[0] @ base.edit_down[n] @ base.edit_up[n], *args[1:])
            )
        return model

    return attach


def variants() -> dict[str, tuple[Any, float, Mapping[str, float]]]:
    """How to attach each variant, its learning rate, and the factors of that rate by the last part of parameters' names."""
    idpg = lambda base, setting: get_peft_model(  # noqa: E731
        base, IDPGConfig.preset("m-phm", task_type=setting.task_type, down_factor=None)
    )
    return {
        "iapt": (of(IAPTConfig), 1e-2, {}),
        "rational": (of(IAPTConfig, activation="rational"), 1e-2, {"activation": 0.03}),
        "output-bias": (of(IAPTConfig, OutputBias), 1e-2, {}),
        "gate": (of(IAPTConfig, Gate), 1e-2, {}),
        "instance-dropout": (of(IAPTConfig, InstanceDropout), 1e-2, {}),
        "preft": (of(PreFTConfig, r=13), 3e-3, {}),
        "preft-slow-down": (of(PreFTConfig, r=13), 3e-3, {"down": 0.1}),
        "preft-gelu": (of(PreFTConfig, Gelu, r=13), 3e-3, {}),
        "cross": (crossed(r=7, bottleneck_dim=7), 3e-3, {}),
        "cross-1e-2": (crossed(r=7, bottleneck_dim=7), 1e-2, {"edit_down": 0.3, "edit_up": 0.3}),
        "m-idpg-factor": (idpg, 1e-2, {}),
        "lpt-factor": (of(LPTConfig, down_factor=None), 1e-2, {}),
        "idspam-factor": (of(IDSPAMConfig, down_factor=None), 1e-2, {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", help="with commas (default: all)")
    parser.add_argument("--seeds", default="0,1", help="(default: %(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = variants()
    names = args.names.split(",") if args.names else list(chosen)
    suite = Encoder(str(minilm_folder()), "cpu", {})
    plan = Plan(suite, STEPS, STEPS, BATCH, 1, MOST, RESULTS, {})
    task = load("mixture", "full", MOST, suite.free_text)
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            found = json.loads(FILE.read_text()) if FILE.is_file() else {}
            if f"{name}, seed {seed}" in found:
                continue
            attach, rate, factors = chosen[name]
            METHODS[name] = Method(attach, (rate,), ours=True, factors=factors)
            model, record = train(plan, Cell("mixture", "full", name, seed), task, rate)
            row = {"rate": rate, "trainable": record["trainable"]}
            for split in ("dev", "test"):
                parts = [summary(evaluate(suite, model, part, split)) for part in task.each()]
                for measure in ("loss", "accuracy"):
                    row[f"{split}_{measure}"] = round(sum(part[measure] for part in parts) / len(parts), 4)
            for last, parameter in model.named_parameters():
                if "alpha" in last:
                    row["alpha"] = [[round(x, 3) for x in row.flatten().tolist()] for row in parameter]
            found = json.loads(FILE.read_text()) if FILE.is_file() else {}
            FILE.write_text(json.dumps({**found, f"{name}, seed {seed}": row}, indent=1) + "\n")
            print(f"{name}, seed {seed}: {row}", flush=True)


if __name__ == "__main__":
    main()
