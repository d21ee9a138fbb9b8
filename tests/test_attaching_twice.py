# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A model with adapters that is to get one more the wrong way, and a config that is used more than once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Optional

import pytest
import tiny
import torch
import transformers as tf
from folders import assert_unchanged, picture
from methods import METHODS
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny import adapted, assert_same, batch, causal_lm, configure, perturb

from peft_instance_prompt import InstancePromptConfig, register_method
from peft_instance_prompt.engine.layer import InstancePromptLayer
from peft_instance_prompt.generator import PromptGenerator


INPUTS = batch(9, 6)
TEXT = {"task_type": "CAUSAL_LM"}
OTHERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(**TEXT, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "ia3": lambda: IA3Config(**TEXT, target_modules=["k_proj"], feedforward_modules=[]),
    "oft": lambda: OFTConfig(**TEXT, target_modules=["q_proj"], oft_block_size=4),
    "prompt tuning": lambda: PromptTuningConfig(**TEXT, num_virtual_tokens=3),
}
SAYS = r"adapters already, \['default'\] of \['{}'\]"


def ours(kind: str = "iapt", **fields) -> InstancePromptConfig:
    return METHODS[kind](**{**TEXT, **fields})


def logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or INPUTS)).logits


def attached(base: torch.nn.Module, kind: str = "iapt", name: str = "default") -> PeftModel:
    torch.manual_seed(3)
    return adapted(base, ours(kind), name)


def refuse(model: torch.nn.Module, config: PeftConfig, says: str, attach: Callable = get_peft_model) -> None:
    """Refused in one sentence; model, its configs and the caller's config are as before."""
    expected = logits(model)
    before, kept = picture(model), copy.deepcopy(config.to_dict())
    configs = dict(model.peft_config)
    contents = {name: copy.deepcopy(one.to_dict()) for name, one in configs.items()}
    with pytest.raises(ValueError, match=says) as caught:
        attach(model, config)
    assert len(str(caught.value)) < 300
    assert_unchanged(model, before)
    assert model.peft_config == configs and {n: c.to_dict() for n, c in model.peft_config.items()} == contents
    assert config.to_dict() == kept
    assert torch.equal(logits(model), expected)


NAMES = {"same name": "default", "another name": "new"}


@pytest.mark.filterwarnings("ignore:.*second time")
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_get_peft_model_twice(kind: str, name: str) -> None:
    model = adapted(causal_lm(), ours(kind))
    says = SAYS.format(kind.upper()) + r".*`add_adapter`, or call `unload\(\)` first"
    attach = lambda base, config: get_peft_model(base, config, adapter_name=name)  # noqa: E731
    refuse(model, ours(kind), says, attach)
    refuse(model.get_base_model(), ours(kind), says, attach)
    model.add_adapter("b", ours(kind))
    again = attached(model.unload(), kind, name)
    assert list(again.peft_config) == [name]
    assert_same(logits(again), logits(attached(causal_lm(), kind)))


@pytest.mark.filterwarnings("ignore:.*second time")
@pytest.mark.parametrize("other", OTHERS)
def test_on_a_model_of_another_method(other: str) -> None:
    model = get_peft_model(causal_lm(), OTHERS[other]())
    cure = r"`get_base_model\(\)`" if other == "prompt tuning" else r"`unload\(\)`"
    says = SAYS.format(other.upper().replace(" ", "_")) + ".*" + cure
    for name in NAMES.values():
        refuse(model, ours(), says, lambda base, config, name=name: get_peft_model(base, config, adapter_name=name))
    base = model.get_base_model()
    if other == "prompt tuning":  # it leaves the base model alone
        assert_same(logits(attached(base)), logits(attached(causal_lm())))
        return
    refuse(base, ours(), says)
    assert_same(logits(attached(model.unload())), logits(attached(causal_lm())))


@pytest.mark.filterwarnings("ignore:.*second time")
@pytest.mark.parametrize("other", OTHERS)
def test_another_method_on_ours(kind: str, other: str) -> None:
    model = adapted(causal_lm(), ours(kind))
    refuse(model, OTHERS[other](), SAYS.format(kind.upper()) + r".*call `unload\(\)` first")
    if other != "prompt tuning":
        assert logits(get_peft_model(model.unload(), OTHERS[other]())).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*second time")
def test_the_first_one_s_name_in_a_base_model() -> None:
    """By the ways that do not go through a `PeftModel`, a second adapter has a name of its own."""
    model = inject_adapter_in_model(ours(), causal_lm(), "default")
    perturb(model)
    refuse(model, ours(), "adapters already", lambda base, config: inject_adapter_in_model(config, base, "default"))
    refuse(model, OTHERS["lora"](), "adapters already")
    inject_adapter_in_model(ours("lpt"), model, "b")
    assert set(model.peft_config) == {"default", "b"}
    peft_model = adapted(causal_lm(), ours())
    refuse(peft_model, ours(), "adapters already", lambda base, config: inject_adapter_in_model(config, base, "b"))


def test_a_failure_beside_an_adapter_keeps_its_config() -> None:
    model = inject_adapter_in_model(OTHERS["lora"](), causal_lm(), "lora")
    before = dict(model.peft_config)
    with pytest.raises(ValueError, match="`layers_to_transform`"):
        inject_adapter_in_model(ours(layers_to_transform=[7]), model, "prompt")
    assert model.peft_config == before
    with pytest.raises(ValueError, match="adapters already"):
        inject_adapter_in_model(ours(), model, "lora")
    assert model.peft_config == before


# ------------------------------------------------------------------------------------------------- configs used twice


def classifier(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(configure("llama", num_labels=3, **changes)).eval()


def sft(base: torch.nn.Module, config: PeftConfig) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": "w1 w2", "completion": " w3"}] * 2)
    arguments = trl.SFTConfig("out", report_to="none", use_cpu=True, bf16=False, max_steps=1, packing=False)
    trl.SFTTrainer(base, arguments, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=config)


def from_pretrained(base: torch.nn.Module, config: PeftConfig, tmp_path) -> None:
    fresh = copy.deepcopy(config)
    folder = tmp_path / str(base.config.hidden_size)
    get_peft_model(copy.deepcopy(base), fresh).save_pretrained(folder)
    config.weights_digest = type(config).from_pretrained(folder).weights_digest
    before = config.to_dict()
    PeftModel.from_pretrained(base, folder, config=config)
    assert config.to_dict() == before
    config.weights_digest = None


USES: dict[str, Callable] = {
    "get_peft_model": lambda base, config, folder: get_peft_model(base, config),
    "add_adapter": lambda base, config, folder: adapted(
        base, type(config)(task_type=config.task_type), "first"
    ).add_adapter("new", config),
    "inject": lambda base, config, folder: inject_adapter_in_model(config, base, "new"),
    "native": lambda base, config, folder: base.add_adapter(config, adapter_name="new"),
    "from_pretrained": from_pretrained,
    "SFTTrainer": lambda base, config, folder: sft(base, config),
}
TASKS = {"CAUSAL_LM": causal_lm, "SEQ_CLS": classifier}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("use", [pytest.param(u, marks=pytest.mark.native if u == "native" else ()) for u in USES])
def test_a_config_stays_fresh(use: str, task: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT itself notes the name of the base model, and whether it trains; nothing else is written."""
    if use == "SFTTrainer" and task == "SEQ_CLS":
        pytest.skip("it trains language models")
    monkeypatch.chdir(tmp_path)
    own = ("base_model_name_or_path", "inference_mode")
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    said = {"response_template": "w1", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    config = ours(
        task_type=task, modules_to_save=None, **(said if task == "CAUSAL_LM" and use != "SFTTrainer" else {})
    )
    before = {name: value for name, value in config.to_dict().items() if name not in own}
    for width in (32, 64):
        base = TASKS[task](hidden_size=width, intermediate_size=width, head_dim=width // 4)
        USES[use](base, config, tmp_path)
        assert {name: value for name, value in config.to_dict().items() if name not in own} == before


def test_every_method_s_config_stays_fresh(method: str) -> None:
    config = ours(method)
    before = {f.name: copy.deepcopy(getattr(config, f.name)) for f in fields(config)}
    for family, changes in (("llama", {}), ("llama", {"hidden_size": 64, "head_dim": 16}), ("gpt2", {})):
        model = get_peft_model(causal_lm(family, **changes), config)
        kept = model.peft_config["default"]
        assert kept is not config and kept.hidden_size == changes.get("hidden_size", 32) and kept.num_layers == 3
        assert {name: getattr(config, name) for name in before} == before


def test_a_template_by_two_tokenizers(tmp_path) -> None:
    """Each model finds the ids by its own tokenizer, which is told by its name."""
    config = ours(response_template="w1 w2")
    found = []
    for name, shift in (("one", 0), ("other", 3)):
        tokenizer = tiny.tokenizer()
        tokenizer.save_pretrained(tmp_path / name)
        if shift:
            file = tmp_path / name / "tokenizer.json"
            text = file.read_text()
            for number in range(20, -1, -1):
                text = text.replace(f'"w{number}":', f'"w{number + shift}":', 1)
            file.write_text(
                text.replace('"w21":', '"w0":', 1).replace('"w22":', '"w1":', 1).replace('"w23":', '"w2":', 1)
            )
        base = causal_lm()
        base.save_pretrained(tmp_path / name)
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found.append(get_peft_model(base, config).peft_config["default"].response_template)
    assert config.response_template == "w1 w2"
    assert all(isinstance(ids, list) for ids in found) and found[0] != found[1]


# ------------------------------------------------------------------------------------------------- what LoRA users ask


def test_add_weighted_adapter(kind: str) -> None:
    model = adapted(causal_lm(), ours(kind))
    model.add_adapter("b", ours(kind))
    before = picture(model)
    with pytest.raises(ValueError, match="`add_weighted_adapter` is for LoRA.*Train one adapter on the data of both"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both")
    assert_unchanged(model, before)


def test_tokens_that_a_trainer_adds() -> None:
    """TRL reads and sets a field of LoRA's on any config, when a chat template brings tokens along."""
    config = ours()
    assert config.trainable_token_indices is None and "trainable_token_indices" not in config.to_dict()
    config.trainable_token_indices = {"embed_tokens": [94, 95]}
    base = causal_lm()
    before = picture(base)
    with pytest.raises(
        ValueError, match=r"`trainable_token_indices` must be None, got \{'embed_tokens': \[94, 95\]\}"
    ):
        get_peft_model(base, config)
    assert_unchanged(base, before)
    with pytest.raises(TypeError, match="trainable_token_indices"):
        ours(trainable_token_indices=[1])


@dataclass
class NeedyConfig(InstancePromptConfig):
    style: Optional[str] = field(default=None, metadata={"help": "Has no default that is allowed."})

    def __post_init__(self):
        super().__post_init__()
        if self.style is None:
            raise TypeError("NeedyConfig.__init__() missing 1 required argument: 'style'")


class NeedyGenerator(PromptGenerator):
    def __init__(self, config: NeedyConfig, info):
        super().__init__(config, info)
        self.prompts = torch.nn.Parameter(torch.randn(1, config.num_virtual_tokens, info.hidden_size))

    def generate(self, instances, depth, weights):
        return weights["prompts"]


def test_a_required_field_beside_exclude_modules(own_mappings) -> None:
    register_method("needy_prompt", NeedyConfig, NeedyGenerator)
    config = NeedyConfig(style="x", task_type="SEQ_2_SEQ_LM", exclude_modules=["decoder"])
    model = get_peft_model(tiny.pair("bart"), config)
    layers = [name for name, module in model.named_modules() if isinstance(module, InstancePromptLayer)]
    assert layers == ["base_model.model.model.encoder.needy_prompt"]
