# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Bi-level learning of activations: weights on training data, activation coefficients on held-out data, in turns.

With weights W and coefficients c, the papers (https://arxiv.org/abs/2405.18203 and, in detail, https://arxiv.org/abs/2410.18035)
minimise over c the held-out loss at `argmin_W` of the training loss, by first-order steps in turns: an optimiser step on W with a
training batch, then one on c with a held-out batch. Without this module, W and c are learned together on the training data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import TrainerCallback

from ..generator import PromptGenerator


if TYPE_CHECKING:
    from transformers import Trainer

# The key of the callback's state in a checkpoint's trainer_state.json.
_STATE = "peft_instance_prompt.bilevel"


def learn_activations(
    trainer: Trainer, dataset: Any = None, learning_rate: float = 1e-6, **kwargs: Any
) -> BilevelCallback:
    """Make a trainer learn the coefficients of rational activations on held-out data. Call it once, before `train`.

    The trainer's optimiser then steps on everything but the coefficients; after each of its steps, the callback steps on the
    coefficients with a held-out batch.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, or a subclass such as TRL's `SFTTrainer`. Its model must have an
            active, trainable adapter with `activation="rational"`.
        dataset (`Dataset` or `str`, *optional*): The held-out data, as `trainer.get_eval_dataloader` takes it: a map-style data
            set ready for the collator, or the name of one of several evaluation data sets. Defaults to the trainer's
            `eval_dataset`, as in the paper; then report results on data of their own.
        learning_rate (`float`): The learning rate of the coefficients. Defaults to 1e-6, which the same authors report for
            MiLoRA.
        kwargs: Further arguments of [`BilevelCallback`].

    Returns:
        [`BilevelCallback`]: The callback, added to the trainer.

    Raises:
        ValueError: As [`BilevelCallback`].
        TypeError: As [`BilevelCallback`].

    Example:

    ```py
    >>> model = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM", activation="rational"))
    >>> trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset={"held_out": held_out, "test": test})
    >>> learn_activations(trainer, "held_out")
    >>> trainer.train()
    ```
    """
    callback = BilevelCallback(trainer, dataset, learning_rate, **kwargs)
    trainer.add_callback(callback)
    return callback


class BilevelCallback(TrainerCallback):
    """Takes the held-out steps; [`learn_activations`] makes it and adds it to the trainer.

    Each checkpoint's `trainer_state.json` keeps the state of its optimiser and its position in the held-out data. The order of the
    held-out data is shuffled anew in each round and is the same in all processes; each process draws batches of its own from it, and
    the coefficients' gradients are averaged over processes.

    Args:
        trainer ([`~transformers.Trainer`]): See [`learn_activations`].
        dataset (`Dataset` or `str`, *optional*): See [`learn_activations`].
        learning_rate (`float`): See [`learn_activations`].
        every (`int`): The number of steps on the weights for each step on the coefficients. Defaults to 1.
        batch_size (`int`, *optional*): Held-out examples per process and step. Defaults to the trainer's
            `per_device_train_batch_size`.
        optimizer_cls (`type`): The class of the coefficients' optimiser. Defaults to `torch.optim.AdamW`, without weight decay.
        optimizer_kwargs (`dict`, *optional*): Its further arguments.

    Attributes:
        coefficients (`list[nn.Parameter]`): The parameters that are learned on held-out data.
        num_steps (`int`): The number of steps taken.
        loss (`float`, *optional*): This process's held-out loss at the last step.

    Raises:
        ValueError: The model has no trainable rational activation, its coefficients are in half precision, the trainer cannot
            take held-out steps (DeepSpeed, FSDP, an optimiser that holds the coefficients), or an argument is out of range.
        TypeError: The held-out data has no length.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Any = None,
        learning_rate: float = 1e-6,
        every: int = 1,
        batch_size: int | None = None,
        optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        batch_size = trainer.args.per_device_train_batch_size if batch_size is None else batch_size
        for name, value in (("every", every), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {learning_rate!r}.")
        self.coefficients = find_coefficients(trainer.model)
        check_trainer(trainer, self.coefficients)
        if dataset is None and (trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict)):
            names = list(trainer.eval_dataset or ())
            raise ValueError(
                f"`dataset` must name the held-out data, as the trainer has these evaluation data sets: {names}."
            )
        loader = trainer.get_eval_dataloader(dataset)
        self.dataset, self.collate = loader.dataset, loader.collate_fn
        if not hasattr(self.dataset, "__len__"):
            raise TypeError(f"The held-out data must have a length and an index, got {type(self.dataset).__name__}.")
        if len(self.dataset) == 0:
            raise ValueError("The held-out data set is empty.")
        self.trainer, self.every, self.batch_size = trainer, every, batch_size
        defaults = {"weight_decay": 0.0} if optimizer_cls is torch.optim.AdamW else {}
        optimizer_kwargs = {**defaults, **(optimizer_kwargs or {})}
        self.optimizer = optimizer_cls(self.coefficients, lr=learning_rate, **optimizer_kwargs)
        self.num_steps = 0
        self.loss: float | None = None
        self._freeze()  # before the trainer makes its optimiser, and wraps the model for several processes

    def on_train_begin(self, args, state, control, **kwargs):
        self._freeze()
        if _STATE in state.stateful_callbacks:
            self._restore(state.stateful_callbacks[_STATE])

    def on_step_begin(self, args, state, control, **kwargs):
        self._freeze()  # again: leaving PEFT's `disable_adapter` makes every weight of the adapter trainable

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._step()
        state.stateful_callbacks[_STATE] = self._state()

    def on_train_end(self, args, state, control, **kwargs):
        for coefficient in self.coefficients:
            coefficient.requires_grad_(True)

    def _freeze(self) -> None:
        for coefficient in self.coefficients:
            coefficient.requires_grad_(False)
            coefficient.grad = None

    def _step(self) -> None:
        """One step on the coefficients, with everything else frozen."""
        trainer, model = self.trainer, self.trainer.model  # unwrapped: the gradients are averaged below
        self._freeze()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in weights:
            parameter.requires_grad_(False)
        try:
            for coefficient in self.coefficients:
                coefficient.requires_grad_(True)
            batch = send_to_device(self._batch(), trainer.args.device)
            model.train()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch)
            loss.backward()  # not autograd.grad, which re-entrant gradient checkpointing refuses
            for coefficient in self.coefficients:
                # A coefficient on which the loss does not depend has no gradient.
                gradient = torch.zeros_like(coefficient) if coefficient.grad is None else coefficient.grad
                coefficient.grad = trainer.accelerator.reduce(gradient, "mean")
            self.optimizer.step()
        finally:
            self._freeze()
            for parameter in weights:
                parameter.requires_grad_(True)
        self.loss = float(loss)
        self.num_steps += 1

    def _batch(self) -> Any:
        """The batch of the next step; it depends on the number of steps taken only, so that training can be resumed."""
        size, rank, world = self.batch_size, self.trainer.args.process_index, self.trainer.args.world_size
        start = (self.num_steps * world + rank) * size
        rounds = [divmod(place, len(self.dataset)) for place in range(start, start + size)]
        seed = self.trainer.args.seed
        return self.collate([self.dataset[_order(len(self.dataset), seed + turn)[place]] for turn, place in rounds])

    def _state(self) -> dict[str, Any]:
        """The state for a checkpoint, in JSON's types: a dozen numbers per layer and moment."""
        state = self.optimizer.state_dict()["state"]
        moments = {
            str(number): {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
            for number, values in state.items()
        }
        return {"num_steps": self.num_steps, "optimizer": moments}

    def _restore(self, saved: dict[str, Any]) -> None:
        moments = {
            int(number): {name: v if v is None else torch.tensor(v) for name, v in values.items()}
            for number, values in saved["optimizer"].items()
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.num_steps = saved["num_steps"]


@lru_cache(maxsize=2)
def _order(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def find_coefficients(model: nn.Module) -> list[nn.Parameter]:
    """The trainable coefficients of a model's rational activations.

    Raises:
        ValueError: There are none, or they are in half precision, where a step of 1e-6 is lost to rounding.
    """
    generators = [module for module in model.modules() if isinstance(module, PromptGenerator)]
    found = [p for g in generators if (p := g.activation_coefficients) is not None and p.requires_grad]
    if not found:
        raise ValueError(
            "The model has no learned activation to train: the active adapter must be trainable and have "
            '`activation="rational"`.'
        )
    if any(p.dtype not in (torch.float32, torch.float64) for p in found):
        raise ValueError(
            f"The activations' coefficients are {found[0].dtype}, in which a step of 1e-6 is lost to rounding. Load the "
            "adapter in float32 (`autocast_adapter_dtype=True`, PEFT's default)."
        )
    return found


def check_trainer(trainer: Trainer, coefficients: list[nn.Parameter]) -> None:
    """Raise a ValueError if a trainer cannot take held-out steps between its own."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "Bi-level learning needs the whole adapter in each process, which DeepSpeed and FSDP do not leave there. Use "
            "one process or DDP, or learn the activations together with the weights."
        )
    if trainer.optimizer is not None:
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        if any(id(coefficient) in held for coefficient in coefficients):
            raise ValueError(
                "The trainer's optimiser holds the activations' coefficients already. Call `learn_activations` before "
                "`train`, and leave them out of an optimiser of your own."
            )
