# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The worker, which runs the model: it holds the adapters, and makes and runs each step's plan.

vLLM adds [`WorkerExtension`] to its worker (`worker_extension_cls`). The first adapter extends the *instance* of the model runner, and
the last to go leaves hooks that return at once; no class of vLLM is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import internals, points
from .adapters import describe_base, unpack
from .hooks import Writer
from .package import InstanceGenerator
from .plan import Edited, Placed, Prefill, make_plan


class WorkerExtension:
    """Methods of vLLM's worker, which the front end calls by `collective_rpc`."""

    model_runner: Any
    instance_prompts: Store | None = None

    def load_instance_prompt(self, key: str, fields: str, weights: bytes) -> str:
        """Load an adapter that [`~adapters.pack`] packed. Returns a complaint, which is empty if it is loaded."""
        try:
            if self.instance_prompts is None:
                self.instance_prompts = Store(self.model_runner)
            self.instance_prompts.load(key, fields, weights)
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error) or repr(error)
        return ""

    def drop_instance_prompt(self, key: str) -> None:
        """Unload an adapter."""
        if self.instance_prompts is not None:
            self.instance_prompts.generators.pop(key, None)


class Store:
    """The adapters of one worker, and the steps of its model runner.

    Args:
        runner: The model runner, of either generation (V1 or V2).

    Attributes:
        generators (`dict[str, InstanceGenerator]`): By key.

    Raises:
        ValueError: The model's layers are not understood, or the runner has other methods than those of the tested releases.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.generators: dict[str, InstanceGenerator] = {}
        with internals.known_to_models(runner.vllm_config):
            self.info = describe_base(runner.model_config.hf_config)
        self.requests: dict[str, tuple[Placed | Edited, list[int]]] = {}  # V2's, which keeps no prompts on the host
        layers = internals.find_layers(runner, self.info.num_layers)
        extend = internals.extend_v2 if internals.is_v2(runner) else internals.extend_v1
        if found := points.changed(points.of_runner(runner)):
            raise ValueError(found)
        self.writer = Writer(layers)
        extend(runner, self)

    def load(self, key: str, fields: str, weights: bytes) -> None:
        """Load an adapter, unless it is loaded."""
        if key not in self.generators:
            self.generators[key] = unpack(fields, weights, self.info).to(self.runner.device)

    def plan(self, prefills: Iterable[Prefill]) -> bool:
        """Make the plan of a step. Returns whether it writes anything."""
        self.writer.plan = make_plan(prefills, self.generators, self.runner.device)
        return bool(self.writer.plan.rows)

    def failing(self, run: Callable[[], Any]) -> Any:
        """The output of a step, which tells the scheduler what failed."""
        output = run()
        plan = self.writer.close()
        for name, reason in plan.failures.items():
            internals.logger.error("Request %s is failed, since its prompt was not written. %s", name, reason)
        if plan.failures:
            internals.report(output, {name: plan.done[name] for name in plan.failures})
        return output
