# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Each message on the page Troubleshooting is raised here, and says what it says in fewer than 300 characters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tiny import adapted, batch, causal_lm, encoder, letters, tokenizer
from trainers import COMMON, TRL
from trl import SFTConfig, SFTTrainer

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.__main__ import main
from peft_instance_prompt.engine import calls, scope


PAGE = Path(__file__).parents[1] / "docs/troubleshooting.md"
HEADINGS = re.findall(r"^> (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
OTHERS = {"KeyError: 'IAPT'"}  # PEFT's own
LONGEST = 300

Raise = Callable[[Path, pytest.MonkeyPatch], object]
CASES: dict[str, list[Raise]] = {}


def says(heading: str) -> Callable[[Raise], Raise]:
    """What is decorated must give this message. One message may be had in several ways."""

    def add(call: Raise) -> Raise:
        CASES.setdefault(heading, []).append(call)
        return call

    return add


def iapt(base: torch.nn.Module | None = None, **fields):
    return adapted(causal_lm() if base is None else base, IAPTConfig(**{"task_type": "CAUSAL_LM", **fields}))


# -------------------------------------------------------------------------------------------------------- first steps


@says("... does not have these fields.")
def _(path, patch):
    IAPTConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, bias="none", use_dora=True, target_modules=["q"]
    )


@says("... does not have these fields.")
def _(path, patch):
    IAPTConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="Say", encoder_hidden_size=3, token_dim=3)


@says("... got an unexpected keyword argument. ...: did you mean ...?")
def _(path, patch):
    IAPTConfig(num_virtual_token=4, bottleneck=8)


@says("Leave `target_modules` out: ... names none of the stacks that hold prompts here")
def _(path, patch):
    iapt(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


@says("Leave `target_modules` out: ... names none of the stacks that hold prompts here")
def _(path, patch):
    iapt(target_modules="all-linear")


SCORED = "All tokens of row(s) ... are scored: a prompt would read what it is to predict."


@says(SCORED)
def _(path, patch):
    """A script's `labels = input_ids.clone()`, with as many rows as a message can name."""
    rows = torch.randint(3, 90, (128, 6))
    iapt().train()(rows, labels=rows)


@says(SCORED)
def _(path, patch):
    """Padding, on either side, is not scored."""
    inputs = batch(7, 5)
    iapt()(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))


def sft(path: Path, rows: list[dict]) -> object:
    """TRL's script, with a config of ours in the place of LoRA's."""
    return SFTTrainer(
        model=causal_lm(),
        args=SFTConfig(output_dir=str(path), **COMMON, **TRL),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=IAPTConfig(task_type="CAUSAL_LM"),
    ).train()


@says(SCORED)
def _(path, patch):
    sft(path, [{"text": "w5 w6 w7 w8"}] * 4)


@says(SCORED)
def _(path, patch):
    sft(path, [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}] * 4)


@says("All tokens of row(s) ... but special ones are scored")
def _(path, patch):
    rows = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 1]]).repeat(64, 1)
    iapt(causal_lm(pad_token_id=1))(rows, labels=rows.masked_fill(rows == 1, -100))


# ------------------------------------------------------------------------------------------------------------ loading


@says("No transformer stack to put a prompt into was found in ...")
def _(path, patch):
    iapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), task_type=None)


@says("Whether ... is causal cannot be told: its attention declares no `is_causal`")
def _(path, patch):
    iapt(tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)))


@says("The forward of ... is not understood: it takes no ...")
def _(path, patch):
    iapt(tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4)))


@says("IAPT cannot be used here: slots need layers that ...")
def _(path, patch):
    config = tf.Mamba2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, n_groups=1
    )
    iapt(tf.AutoModelForCausalLM.from_config(config))


@says("`task_type` ... does not fit the base model, which is ...")
def _(path, patch):
    iapt(encoder(auto=tf.AutoModelForMaskedLM))


@says("The adapter was made for a base model with ...")
def _(path, patch):
    iapt(hidden_size=64)


@says("peft_instance_prompt is tested with transformers ...")
def _(path, patch):
    patch.setattr(calls, "release", lambda: (99, 1))
    patch.delenv(calls.SWITCH, raising=False)
    iapt()


# ----------------------------------------------------------------------------------------------------------- training


@says("Nothing in the adapted module says whether tokens of its causal stack are predicted")
def _(path, patch):
    adapted(causal_lm().model, IAPTConfig()).train()(**batch(7, 5))


@says("A causal language model in training mode cannot tell instruction from response without `labels`.")
def _(path, patch):
    iapt().train()(**batch(7, 5))


@says("No token is left for the prompt to be generated from in row(s) ...")
def _(path, patch):
    rows = torch.randint(3, 90, (128, 6))
    iapt()(rows, labels=rows.index_fill(1, torch.tensor([3]), -100))


MISSING = "`response_template` ... does not occur in row(s) ..."


@says(MISSING)
def _(path, patch):
    """Without a tokenizer: token ids."""
    iapt(response_template=[*range(5, 25)])(torch.randint(30, 90, (128, 20)))


@says(MISSING)
def _(path, patch):
    """A text that is not there, in rows that a tokenizer writes with more characters than there are."""
    iapt(response_template="Answer: Answer: Answer: Answer:", tokenizer_name_or_path=letters(path))(
        torch.full((128, 40), 3)
    )


@says(MISSING)
def _(path, patch):
    """A text that is there as other tokens."""
    name = letters(path)
    rows = tf.AutoTokenizer.from_pretrained(name)(["Question: no Answer: yes"] * 128, return_tensors="pt")
    iapt(response_template="Answer: ", tokenizer_name_or_path=name)(rows["input_ids"])


@says("`response_template` is a text, and no tokenizer is known to turn it into token ids")
def _(path, patch):
    iapt(response_template="Answer:")


@says(
    "The chat template of the tokenizer ... writes nothing between a user's turn and the answer that could be searched for"
)
def _(path, patch):
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    words.save_pretrained(path)
    iapt(response_template="chat", tokenizer_name_or_path=str(path))


@says("An adapter of this size cannot be made")
def _(path, patch):
    iapt(num_virtual_tokens=2 * 10**9, bottleneck_dim=2 * 10**9)


# ------------------------------------------------------------------------------------------------------------ calling


@says("A causal language model got several rows and was not told which of their tokens are the instruction")
def _(path, patch):
    patch.setattr(scope, "_SAID", dict.fromkeys(scope._SAID, False))
    iapt()(**batch(7, 5))


@says("`adapter_names` must name an adapter for each of the ... rows")
def _(path, patch):
    iapt()(**batch(7, 5), adapter_names=["default"])


@says("Cannot pass `adapter_names` when the model is in training mode.")
def _(path, patch):
    iapt().train()(**batch(7, 5), adapter_names=["default"] * 2)


@says("The cache holds ... tokens and ... prompt slots, but the text does not go on from these")
def _(path, patch):
    model, cache = iapt(), tf.DynamicCache()
    ids = batch(7)["input_ids"]
    name = calls.cache_argument(type(model.get_base_model()).forward)
    model(ids, **{name: cache}, use_cache=True)
    model(ids[:, :1], **{name: cache}, position_ids=torch.tensor([[11]]))  # behind tokens and slots


@says("Instance prompts cannot be used with `prefill_chunk_size`")
def _(path, patch):
    iapt().generate(**batch(7, 5), max_new_tokens=2, prefill_chunk_size=4)


@says("`attention_mask` does not tell which tokens are padding")
def _(path, patch):
    mask = torch.ones(1, 1, 7, 7).tril().bool()
    mask[:, :, 5:, 2] = False
    iapt()(batch(7)["input_ids"], attention_mask=mask)


@says("The sequence does not fit: the model has ... positions")
def _(path, patch):
    iapt(causal_lm("gpt2"))(**batch(127))


# --------------------------------------------------------------------------------------------------- merging and mixing


@says("Prompts that are generated from the instance cannot be merged into the base weights")
def _(path, patch):
    iapt().merge_and_unload()


@says("Only one instance-prompt adapter can be active at a time")
def _(path, patch):
    model = iapt()
    model.add_adapter("second", IAPTConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])


@says("There is neither a folder nor a command ...")
def _(path, patch):
    said = StringIO()
    patch.setattr("sys.stderr", said)
    assert main(["doctr"]) == 2
    raise ValueError(said.getvalue().removeprefix("error: ").strip())


# -------------------------------------------------------------------------------------------------------------- tests


def test_each_message_on_the_page_is_raised() -> None:
    assert set(HEADINGS) - OTHERS == set(CASES)


def message_of(call: Raise, path: Path, patch: pytest.MonkeyPatch) -> str:
    """What a call is refused or, of a warning, answered with."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            call(path, patch)
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error)
    (own,) = (str(one.message) for one in given if "peft_instance_prompt" in one.filename)
    return own


@pytest.mark.parametrize(
    ("heading", "call"),
    [pytest.param(h, call, id=f"{h[:30]}-{n}") for h, found in CASES.items() for n, call in enumerate(found)],
)
def test_message(heading: str, call: Raise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = message_of(call, tmp_path, monkeypatch)
    assert re.match(".+".join(map(re.escape, re.split(r" ?\.\.\. ?", heading))), message), message
    assert len(message) < LONGEST, f"{len(message)} characters: {message}"
    assert re.search(r"[.?]\)?$", message), message
