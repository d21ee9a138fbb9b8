# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens the prompt is generated from: every rule, no leak from the response, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel, get_peft_model
from tiny import VOCAB, adapted, assert_same, batch, causal_lm, configure, perturb, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from peft_instance_prompt import IAPTConfig, instruction_scope
from peft_instance_prompt.engine import scope as rules
from peft_instance_prompt.engine.passes import current_pass
from peft_instance_prompt.engine.request import Request
from peft_instance_prompt.engine.scope import find_scope, from_labels, from_length, from_mask, from_template


TEMPLATE = [90, 91]
# Three tokens of instruction and the template, then six of response.
IDS = torch.tensor(
    [[5, 6, 7, *TEMPLATE, 20, 21, 22, 23, 24, 25], [15, 16, 17, *TEMPLATE, 30, 31, 32, 33, 34, 35]]
)  # (2, 11)
SPLIT = 5
MASK = torch.zeros_like(IDS).index_fill(1, torch.arange(SPLIT), 1)  # (2, 11)
LABELS = IDS.where(MASK == 0, -100)
SHIFTED = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], dim=1)


def prompted(method: str, **fields) -> PeftModel:
    return adapted(causal_lm(), METHODS[method](task_type="CAUSAL_LM", **fields))


@torch.no_grad()
def prompts(model: PeftModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """What stands in the slots at the input of each layer: (layers, B, L, d)."""
    seen = []

    def look(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if (step := current_pass.get()).layout is None:  # the pass without prompts
            return
        states = args[0] if args else kwargs["hidden_states"]
        index = step.layout.slot_index[:, :, None].expand(-1, -1, states.shape[-1])  # (B, L, d)
        seen.append(states.gather(1, index))

    layers = model.get_base_model().model.layers
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model(ids, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen[: len(layers)])


def changed(column: int, by: int = 3) -> torch.Tensor:
    ids = IDS.clone()
    ids[:, column] += by
    return ids


# ------------------------------------------------------------------------------------------------------ what tells it

TELLS = {
    "instruction_mask": {"instruction_mask": MASK},
    "bool_mask": {"instruction_mask": MASK.bool()},
    "labels": {"labels": LABELS},
    "shift_labels": {"shift_labels": SHIFTED},
    "context": {},
    "template": {},
}


def depends_on(model: PeftModel, columns: range, expected: torch.Tensor, **kwargs) -> bool:
    """Whether the prompts of each row change with one of these tokens; a method may pass over some, or choose in steps."""
    others = torch.stack([prompts(model, changed(column, by), **kwargs) for column in columns for by in (3, 17, 40)])
    return bool(((others - expected).abs().amax(dim=(0, 1, 3, 4)) > 1e-3).all())


@pytest.mark.parametrize("tell", TELLS)
def test_no_leak(method: str, tell: str) -> None:
    model = prompted(method, response_template=TEMPLATE if tell == "template" else None)
    with instruction_scope(MASK if tell == "context" else None):
        expected = prompts(model, IDS, **TELLS[tell])
        assert_same(expected, prompts(prompted(method), IDS, instruction_mask=MASK), 1e-6)
        for column in range(SPLIT, 11):
            assert_same(prompts(model, changed(column), **TELLS[tell]), expected, 1e-6)
        assert depends_on(model, range(3), expected, **TELLS[tell])
    # What is said of one call does not outlive it: here the whole row is the instance.
    if tell != "template":
        assert_same(prompts(model, IDS), prompts(model, IDS, instruction_mask=torch.ones_like(IDS)), 1e-6)


def test_whole_row_is_the_instance_of_a_plain_call(method: str) -> None:
    model = prompted(method)
    assert depends_on(model, range(SPLIT, 11), prompts(model, IDS))


def test_response_logits_do_not_depend_on_later_tokens(method: str) -> None:
    model = prompted(method)
    with torch.no_grad():
        expected, actual = model(IDS, labels=LABELS), model(changed(10), labels=LABELS)
    assert_same(actual.logits[:, :10], expected.logits[:, :10], 1e-6)


def test_precedence(kind: str) -> None:
    some = torch.zeros_like(IDS).index_fill(1, torch.arange(1, 4), 1)
    by_mask = prompts(prompted(kind), IDS, instruction_mask=some)
    by_template = prompts(prompted(kind), IDS, instruction_mask=MASK)
    early = IDS.clone()
    early[:, :4] = -100
    both = prompted(kind, response_template=TEMPLATE)
    assert_same(prompts(both, IDS, instruction_mask=some, labels=early), by_mask, 1e-6)
    assert_same(prompts(both, IDS, labels=early), by_template, 1e-6)
    with instruction_scope(MASK):  # what is given to the call itself is nearer
        assert_same(prompts(prompted(kind), IDS, instruction_mask=some), by_mask, 1e-6)
    # In `generate` the template is nearer than the prompt.
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        assert_same(both.generate(IDS, **how).logits[0], both(IDS, instruction_mask=MASK).logits[:, -1])


def test_rule_of_generate_is_its_prompt(kind: str) -> None:
    model = prompted(kind)
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    out = model.generate(IDS[:, :SPLIT], **how, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        forced = model(out.sequences, instruction_mask=MASK[:, : SPLIT + 2]).logits  # (2, SPLIT + 2, V)
    assert_same(torch.stack(out.logits, dim=1), forced[:, SPLIT - 1 : SPLIT + 1])


def test_training_with_labels_and_without(kind: str) -> None:
    model = prompted(kind).train()
    assert model(IDS, labels=LABELS).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"training mode.*`instruction_mask`.*`instruction_scope\(mask\)`.*`response_template`"
    ):
        model(IDS)
    with instruction_scope(MASK):
        assert model(IDS).logits.shape == (2, 11, VOCAB)
    with pytest.raises(ValueError, match="training mode"):  # the context is over
        model(IDS)
    assert prompted(kind, response_template=TEMPLATE).train()(IDS).logits.shape == (2, 11, VOCAB)


def test_classifier_has_no_response(kind: str) -> None:
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(configure("llama", num_labels=3))
    model = get_peft_model(base, METHODS[kind](task_type="SEQ_CLS"))
    perturb(model).train()
    loss = model(**batch(9, 6), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite()


def test_all_padding_row_is_finite(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = model(inputs["input_ids"][:1]).logits
    assert logits.isfinite().all()
    assert_same(logits[:1], alone)
    labels = inputs["input_ids"].where(torch.arange(9) > 6, -100)
    labels[1] = -100
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (MASK[:, :5], ValueError, r"\(2, 11\).*\(2, 5\)"),
        (MASK[:1], ValueError, r"2.*\(1, 11\)"),
        (MASK[0], ValueError, r"2.*\(11,\)"),
        (MASK.float(), TypeError, "torch.float32"),
        (MASK.tolist(), TypeError, "list"),
        (MASK * torch.tensor([[1], [0]]), ValueError, r"all false in row\(s\) \[1\]"),
    ],
    ids=["short", "rows", "flat", "float", "list", "empty_row"],
)
def test_bad_instruction_mask(kind: str, mask, error: type, says: str) -> None:
    model = prompted(kind)
    with torch.no_grad():
        good = model(IDS, instruction_mask=MASK).logits
        with pytest.raises(error, match=says):
            model(IDS, instruction_mask=mask)
        with pytest.raises(error, match=says):
            model.generate(IDS, instruction_mask=mask, max_new_tokens=2)
        # Nothing of the broken call is left.
        assert torch.equal(model(IDS, instruction_mask=MASK).logits, good)


def test_instruction_mask_over_padding_only(kind: str) -> None:
    model, inputs = prompted(kind), batch(9, 6)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"), torch.no_grad():
        model(**inputs, instruction_mask=(torch.arange(9) < 3).expand(2, -1))


def test_template_that_does_not_occur(kind: str) -> None:
    model = prompted(kind, response_template=TEMPLATE)
    ids = IDS.clone()
    ids[1, SPLIT - 1] = 4
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"\[90, 91\] does not occur in row\(s\) \[1\]"):
            model(ids)
        with pytest.raises(ValueError, match="does not occur"):
            model(IDS[:, :1])
        embeds = model.get_input_embeddings()(IDS)
        with pytest.raises(ValueError, match="pass `instruction_mask`"):
            model(inputs_embeds=embeds)
        assert_same(model(inputs_embeds=embeds, instruction_mask=MASK).logits, model(IDS).logits)


def test_labels_from_the_first_token_on(kind: str) -> None:
    model = prompted(kind).train()
    labels = LABELS.clone()
    labels[1] = IDS[1]
    with pytest.raises(ValueError, match=r"row\(s\) \[1\].*`response_template`"):
        model(IDS, labels=labels)
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 1\]"):
        model(IDS, labels=IDS)
    # A row without any label has no response.
    labels[1] = -100
    assert model(IDS, labels=labels).loss.isfinite()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batch(kind: str, shape: tuple[int, int]) -> None:
    with (
        pytest.raises(ValueError, match=f"The batch is empty: {shape[0]} row\\(s\\) of {shape[1]} token"),
        torch.no_grad(),
    ):
        prompted(kind)(torch.zeros(shape, dtype=torch.long))


def test_bad_attention_mask(kind: str) -> None:
    model = prompted(kind)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(2, 11\), got \(2, 10\)"):
            model(IDS, attention_mask=torch.ones(2, 10))
        causal = torch.ones(2, 1, 11, 11).tril().bool()
        assert_same(model(IDS, attention_mask=causal).logits, model(IDS).logits)
        causal[:, :, 5:, 2] = False  # not padding: the tokens before 5 see it
        with pytest.raises(ValueError, match=r"`attention_mask` as None, or as 2-D.*\(2, 1, 11, 11\)"):
            model(IDS, attention_mask=causal)


# ---------------------------------------------------------------------------------------------------------- template


@pytest.fixture
def tokenizer_folder(tmp_path) -> str:
    words = ["[UNK]", "<s>", "</s>", "Question", "Answer", ":", *(f"w{i}" for i in range(40))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_template_as_text(kind: str, tokenizer_folder: str) -> None:
    config = METHODS[kind](
        task_type="CAUSAL_LM", response_template="Answer :", tokenizer_name_or_path=tokenizer_folder
    )
    model = adapted(causal_lm(), config)
    assert model.peft_config["default"].response_template == [4, 5]
    ids = torch.tensor([[3, 5, 8, 9, 4, 5, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    assert_same(prompts(model, ids), prompts(prompted(kind), ids, instruction_mask=mask), 1e-6)


def test_template_as_text_with_the_models_own_tokenizer(kind: str, tokenizer_folder: str) -> None:
    base = causal_lm()
    base.config._name_or_path = base.name_or_path = tokenizer_folder
    model = get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM", response_template="w1 Answer"))
    assert model.peft_config["default"].response_template == [7, 4]


def test_template_as_text_without_a_tokenizer(kind: str) -> None:
    with pytest.raises(ValueError, match="`tokenizer_name_or_path`"):
        get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", response_template="Answer:"))


def test_template_is_stable_over_the_turns_of_a_chat(method: str) -> None:
    model = prompted(method, response_template=TEMPLATE)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(IDS[:, :SPLIT], attention_mask=MASK[:, :SPLIT], **how)
    turn = torch.cat([first.sequences, IDS[:, 2:SPLIT]], dim=1)  # the second question ends with the template as well
    mask = torch.ones_like(turn)
    goes_on = model.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **how)
    afresh = model.generate(turn, attention_mask=mask, **how)
    uncached = model.generate(turn, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(goes_on.sequences, afresh.sequences)
    assert torch.equal(uncached.sequences, afresh.sequences)


# ------------------------------------------------------------------------------------- the rules as functions of tensors


def test_rules_by_hand() -> None:
    tokens = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    given = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]])
    assert from_mask(given, tokens).int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert from_mask(given[:, :2], tokens, prompt_length=2).int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    ids = torch.tensor([[7, 3, 7, 3, 7], [3, 7, 3, 7, 3]])
    assert from_template([3, 7], ids, tokens).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert from_template([7, 3], ids, tokens).int().tolist() == [
        [0, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
    ]  # not in the padding
    labels = torch.tensor([[-100, -100, 3, -100, 7], [-100, 7, 3, -100, -100]])
    assert from_labels(labels, tokens, shifted=False).int().tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert from_labels(labels, tokens, shifted=True).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert torch.equal(find_scope(tokens, Request()), tokens)
    assert find_scope(tokens, Request(prompt_length=2)).int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert torch.equal(find_scope(tokens, Request(labels=labels)), tokens), "only a causal model has a response"


def test_request_of_rows() -> None:
    request = Request(instruction_mask=torch.arange(3)[:, None], labels=torch.arange(3)[:, None])
    assert request.of_rows(3, torch.tensor([2, 0])).instruction_mask.flatten().tolist() == [2, 0]
    assert request.of_rows(3, None).labels.flatten().tolist() == [0, 1, 2]
    beams = Request(instruction_mask=torch.arange(3)[:, None], prompt_length=1)
    assert beams.of_rows(6, torch.tensor([1, 5])).instruction_mask.flatten().tolist() == [0, 2]


def test_generate_with_a_mask_of_fewer_rows() -> None:
    """Within `generate` a row can have become several beams, so a mask of one row would be taken for all of them."""
    model, inputs = prompted("iapt").eval(), batch(9, 6)
    mask, message = torch.ones(1, 9), r"`instruction_mask` must have 2 row\(s\), as the input has; got \(1, 9\)"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, instruction_mask=mask)
    with instruction_scope(mask), pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


# ------------------------------------------------------------------------------- plain text, conversations, what is refused


TOKENS = torch.ones(2, 11, dtype=torch.bool)


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning was given before."""
    monkeypatch.setattr(rules, "_SAID", dict.fromkeys(rules._SAID, False))


def test_rows_without_the_template() -> None:
    ids = IDS.clone()
    ids[1, 3] = 40
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1\].*missing_template='all'"):
        from_template(TEMPLATE, ids, TOKENS)
    mask = from_template(TEMPLATE, ids, TOKENS, missing="all")
    assert mask.sum(dim=1).tolist() == [SPLIT, 11]
    short = from_template(TEMPLATE, torch.tensor([[5]]), torch.ones(1, 1).bool(), missing="all")
    assert short.tolist() == [[True]]


def test_a_row_that_asks_for_nothing_needs_no_template(kind: str) -> None:
    """As `max_length` leaves a conversation that it cuts off before the answer, where only answers are learned."""
    ids, labels = IDS.clone(), IDS.clone()
    ids[1, 3] = 40
    labels[:, :SPLIT] = labels[1] = -100
    mask = MASK.clone()
    mask[1] = 1
    model = prompted(kind, response_template=TEMPLATE)
    assert_same(prompts(model, ids, labels=labels), prompts(prompted(kind), ids, instruction_mask=mask), 1e-6)
    labels[1, -1] = 40
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1\]"):
        prompts(model, ids, labels=labels)


def test_a_template_that_another_tokenizer_writes(tmp_path) -> None:
    """The adapter's ids are of the tokenizer that it was made with; the data may come from another."""
    words = tokenizer()
    words.save_pretrained(tmp_path / "first")
    words.chat_template = words.chat_template.replace("w1 ", "w2 ")
    model = adapted(
        causal_lm(),
        IAPTConfig(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=str(tmp_path / "first")),
    )
    chat = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w7"}]
    ids = torch.tensor([words.apply_chat_template(chat, tokenize=True, return_dict=False)])
    says = r"`response_template` \[5\] does not occur in row\(s\) \[0\].*Another tokenizer or chat template than that of `tokenizer_name"
    with pytest.raises(ValueError, match=says):
        model(ids, labels=ids)


def test_the_config_says_what_a_row_without_the_template_is(kind: str) -> None:
    ids = IDS.clone()
    ids[1, 3] = 40
    with pytest.raises(ValueError, match="does not occur in row"):
        prompts(prompted(kind, response_template=TEMPLATE), ids)
    found = prompts(prompted(kind, response_template=TEMPLATE, missing_template="all"), ids)
    mask = MASK.clone()
    mask[1] = 1
    assert_same(found, prompts(prompted(kind), ids, instruction_mask=mask), 1e-6)


def test_first_tokens_of_plain_text() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert from_length(2, tokens).int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("training", [True, False])
def test_plain_text_does_not_leak(training: bool) -> None:
    """No logit at or before a token depends on later ones, and every token behind the first n sees the prompt."""
    config = IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, instruction_length=3, prompt_position="end")
    model, bare = adapted(causal_lm(), config), causal_lm()
    model.train(training)
    with torch.no_grad():
        expected, plain = model(IDS, labels=IDS).logits, bare(IDS).logits
        for column in range(1, 11):
            found = model(changed(column), labels=changed(column)).logits
            assert_same(found[:, :column], expected[:, :column], 1e-6)
        assert_same(expected[:, :2], plain[:, :2])
        assert ((expected - plain)[:, 2:].abs().amax(dim=(0, 2)) > 1e-3).all()


def test_plain_text_needs_slots_behind_it() -> None:
    with pytest.raises(ValueError, match="`instruction_length` needs `prompt_position='end'`, got 'before'"):
        IAPTConfig(instruction_length=4)
    with pytest.raises(ValueError, match="give one of them, got 4 and"):
        IAPTConfig(instruction_length=4, prompt_position="end", response_template=[3])
    with pytest.raises(ValueError, match="`instruction_length` must be at least 1, got 0"):
        IAPTConfig(instruction_length=0, prompt_position="end")
    with pytest.raises(ValueError, match="`missing_template` must be one of .*, got 'none'"):
        IAPTConfig(missing_template="none")


GAP = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]] * 2)  # two turns, an answer between them


def test_a_mask_with_a_response_between_instructions() -> None:
    model = prompted("iapt")
    labels = IDS.clone()
    labels[GAP.bool()] = -100
    with pytest.raises(ValueError, match=r"predicted from a prompt that has read it: row\(s\) \[0, 1\] have labels"):
        model(IDS, instruction_mask=GAP, labels=labels)
    labels[:, :6] = -100  # the answer between is not asked for
    model(IDS, instruction_mask=GAP, labels=labels)
    model.train()
    with pytest.raises(ValueError, match="tokens between their instruction tokens, which are predicted in training"):
        model(IDS, instruction_mask=GAP)
    model.eval()
    model.generate(IDS, instruction_mask=GAP, max_new_tokens=2, do_sample=False)


def test_several_turns_are_said_once(unsaid: None) -> None:
    labels = torch.full_like(IDS, -100)
    labels[:, 3:5] = IDS[:, 3:5]
    from_labels(labels, TOKENS, shifted=False)
    labels[:, 8:] = IDS[:, 8:]
    with pytest.warns(UserWarning, match="several labelled stretches.*`response_template`"):
        mask = from_labels(labels, TOKENS, shifted=False)
    assert mask.sum(dim=1).tolist() == [3, 3]
    from_labels(labels, TOKENS, shifted=False)  # warnings are errors here


def test_an_instruction_of_special_tokens_only() -> None:
    """A collator that puts -100 on padding does so on BOS, where both are one token."""
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 1]])
    labels = ids.masked_fill(ids == 1, -100)
    tokens = torch.ones_like(ids).bool()
    with pytest.raises(ValueError, match=r"Nothing but special tokens .* in row\(s\) \[0, 1\].*`instruction_length`"):
        from_labels(labels, tokens, False, ids, special_ids=(1, 2))
    model = get_peft_model(causal_lm(pad_token_id=1), IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8))
    with pytest.raises(ValueError, match="Nothing but special tokens"):
        model(ids, labels=labels)


def test_scoring_without_a_scope_is_said_once(unsaid: None) -> None:
    model = prompted("iapt")
    model(IDS[:1])
    with pytest.warns(UserWarning, match="was not told which of their tokens are the instruction"):
        model(IDS)
    model(IDS)


@pytest.fixture
def chat_folder(tmp_path) -> str:
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_chat_template_is_what_stands_before_an_answer(chat_folder: str, kind: str) -> None:
    make = METHODS[kind]
    config = make(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=chat_folder)
    model = adapted(causal_lm(), config)
    words = tokenizer()
    assert model.peft_config["default"].response_template == words("w1", add_special_tokens=False)["input_ids"]
    text = words.apply_chat_template(
        [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}],
        tokenize=True,
        return_dict=False,
    )
    ids = torch.tensor([text])
    question = text.index(words("w1", add_special_tokens=False)["input_ids"][0]) + 1
    mask = (torch.arange(len(text)) < question)[None].long()
    assert_same(prompts(model, ids), prompts(prompted(kind), ids, instruction_mask=mask), 1e-6)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "has no chat template"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes nothing between a user's turn and the answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}",
            "and something else before an answer that is there",
        ),
        (
            "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}w0 {% endfor %}",
            r"refuses a user's turn and an assistant's answer \(users only\)",
        ),
    ],
)
def test_chat_templates_that_tell_nothing(tmp_path, template: str | None, complaint: str) -> None:
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(tmp_path)
    config = IAPTConfig(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(causal_lm(), config)
