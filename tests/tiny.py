# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny models of every family, built from configs, with random weights that differ between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_instance_prompt.generator import InstanceGenerator, Instances
from peft_instance_prompt.tools.promises import only


def native_refuses() -> str | None:
    """Why transformers' own `add_adapter` refuses every adapter, LoRA too; None if it does not."""
    if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):
        return None
    return f"transformers {tf.__version__} wants peft >= {MIN_PEFT_VERSION} for its own `add_adapter`"


VOCAB = 96
_small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_llama = {**_small, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
# Untied, or the greedy text of some is one token over and over.
_special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}

DECODERS = {
    "llama": lambda: tf.LlamaConfig(**_llama),
    "mistral": lambda: tf.MistralConfig(**_llama, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**_llama),
    "qwen3": lambda: tf.Qwen3Config(**_llama, head_dim=12),
    "gemma2": lambda: tf.Gemma2Config(**_llama, head_dim=8, sliding_window=8),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_llama,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: tf.Phi3Config(**_llama, original_max_position_embeddings=128),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_small, intermediate_size=48, max_position_embeddings=128),
    "opt": lambda: tf.OPTConfig(**_small, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=24),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
    "falcon": lambda: tf.FalconConfig(**_small, alibi=True, new_decoder_architecture=False),
    "falcon_rotary": lambda: tf.FalconConfig(**_small, alibi=False, max_position_embeddings=128),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=128),
    "stablelm": lambda: tf.StableLmConfig(**_llama),
    "cohere2": lambda: tf.Cohere2Config(**_llama, sliding_window=8),
    "olmo2": lambda: tf.Olmo2Config(**_llama),
    "granite": lambda: tf.GraniteConfig(**_llama, attention_multiplier=0.3),
    "smollm3": lambda: tf.SmolLM3Config(**_llama),
    "mixtral": lambda: tf.MixtralConfig(**_llama, num_local_experts=2),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_llama, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
}

_states = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}
# Decoders without attention, which have no slots.
STATE_SPACES = {
    "mamba": lambda: tf.MambaConfig(**_states),
    "mamba2": lambda: tf.Mamba2Config(**_states, num_heads=4, head_dim=16, n_groups=1),
}

_encoder = {**_small, "num_hidden_layers": 4, "intermediate_size": 48, "max_position_embeddings": 64}
_bert = {**_encoder, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_roberta = {**_encoder, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

ENCODERS = {
    "bert": lambda: tf.BertConfig(**_bert),
    "roberta": lambda: tf.RobertaConfig(**_roberta),
    "deberta-v2": lambda: tf.DebertaV2Config(
        **_bert, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False
    ),
    "modernbert": lambda: tf.ModernBertConfig(**_bert, cls_token_id=1, sep_token_id=2),
    "mpnet": lambda: tf.MPNetConfig(**_roberta),
    "electra": lambda: tf.ElectraConfig(**_bert, embedding_size=16),
    # The four layers are two, each run twice.
    "albert": lambda: tf.AlbertConfig(**_bert, embedding_size=16, num_hidden_groups=2),
}

# Not as deep on one side as on the other, so that the sides cannot be taken for each other.
_t5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
_t5.update(num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
_bart = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "dropout": 0.0}
_bart.update(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
_bart.update(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_bart.update(decoder_start_token_id=1, forced_eos_token_id=None)

PAIRS = {
    "t5": lambda: tf.T5Config(**_t5),
    "mt5": lambda: tf.MT5Config(**_t5),
    "bart": lambda: tf.BartConfig(**_bart),
    "mbart": lambda: tf.MBartConfig(**_bart),
    "pegasus": lambda: tf.PegasusConfig(**_bart, scale_embedding=True),
    "marian": lambda: tf.MarianConfig(**_bart, scale_embedding=True, decoder_vocab_size=VOCAB),
}

_text = {**_llama, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_vision = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}

VLMS = {
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config={
            **_text,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            **_vision,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 32,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    ),
    "gemma3_vlm": lambda: tf.Gemma3Config(
        text_config={
            **_text,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={**_vision, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=92,
        eoi_token_index=93,
    ),
}


def configure(family: str, **changes):
    config = {**DECODERS, **STATE_SPACES}[family]()
    for name, value in {**_special, **changes}.items():
        setattr(config, name, value)
    return config


def causal_lm(family: str = "llama", seed: int = 0, attn_implementation: str | None = None, **changes):
    """A causal LM in eval mode whose weights are large enough for its prompts to matter."""
    return _random(AutoModelForCausalLM, configure(family, **changes), seed, attn_implementation)


def encoder(family: str = "bert", auto=tf.AutoModel, seed: int = 0, attn_implementation: str | None = None, **changes):
    """An encoder under the head of an auto class, in eval mode."""
    config = ENCODERS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return _random(auto, config, seed, attn_implementation)


def pair(family: str = "t5", auto=tf.AutoModelForSeq2SeqLM, seed: int = 0, attn_implementation: str | None = None):
    """An encoder-decoder model in eval mode."""
    return _random(auto, PAIRS[family](), seed, attn_implementation)


def vlm(family: str, seed: int = 0):
    """A vision-language model in eval mode, and its inputs: two rows of text, each with an image."""
    model = _random(tf.AutoModelForImageTextToText, VLMS[family](), seed)
    ids = torch.tensor([[5, 6, 92, 90, 90, 90, 90, 93, 7, 8, 9], [11, 12, 92, 90, 90, 90, 90, 93, 10, 3, 4]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(2)
    if family == "gemma3_vlm":
        pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "token_type_ids": (ids == 90).long()}
    else:
        patches = torch.randn(8, 3 * 4 * 4, generator=generator)  # (patches of both images, 3 * 4 * 4)
        pixels = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
        pixels["mm_token_type_ids"] = (ids == 90).long()
    return model, {**inputs, **pixels}


def _random(auto, config, seed: int, attn_implementation: str | None = None):
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25 if "embed" not in name and "wte" not in name else 1.0)
            # T5 does not divide its scores by the root of the heads' size, but has queries that are smaller by as much:
            # without it, softmax saturates and multiplies rounding.
            if name.endswith("Attention.q.weight"):
                parameter.mul_(config.d_kv**-0.5)
    return model.eval()


DEGREES = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5])  # of a rational activation's numerator and denominator


def perturb(model: torch.nn.Module, seed: int = 0, adapter: str | None = None, scale: float = 1.0) -> torch.nn.Module:
    """Move what is trainable (or all weights of an adapter) far from its start, differently for each seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad if adapter is None else f".{adapter}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith(".activation"):  # (depths, 1, 12): as much of x^6 at x = 4 as of 1, or rounding grows
                    noise *= 4.0**-DEGREES
                matrix = parameter.dim() > 1 and parameter.shape[-2] > 1  # vectors are (depths, 1, a)
                parameter.add_(noise.to(parameter), alpha=scale * (0.3 if matrix else 0.05))
    return model


def adapted(model: torch.nn.Module, config: PeftConfig, name: str = "default", seed: int = 0) -> PeftModel:
    """The model with an adapter whose weights are far from their start, in eval mode."""
    return perturb(get_peft_model(model, config, adapter_name=name), seed).eval()


def generator_of(model: torch.nn.Module, adapter: str = "default") -> InstanceGenerator:
    """The adapter's generator, of which the model must have one."""
    named = (module for name, module in model.named_modules() if name.endswith("." + adapter))
    (found,) = (module for module in named if isinstance(module, InstanceGenerator))
    return found


def batch(
    *lengths: int, side: str = "left", seed: int = 0, pad: int = 0, tokens: tuple[int, int] = (3, VOCAB)
) -> dict[str, torch.Tensor]:
    """Random rows of these lengths, padded on one side, with their mask; a row depends on its place and length only."""
    ids = torch.full((len(lengths), max(lengths)), pad)  # (B, S)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        columns = slice(ids.shape[1] - n, None) if side == "left" else slice(0, n)
        ids[row, columns] = torch.randint(*tokens, (n,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_adapter(model: PeftModel, name: str, call: Callable, **inputs):
    """What a call gives with one adapter, or with none for `__base__`; the active one is active again afterwards."""
    with only(model, name):
        return call(**inputs)


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of a batch, without its padding."""
    return {"input_ids": inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]}


def instances(states: torch.Tensor, mask: torch.Tensor | None = None, vector: torch.Tensor | None = None) -> Instances:
    """What a generator reads of states (G, n, w), all of which count where no mask is given; the base is the first that does."""
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask  # (G, n)
    first = [row[own.nonzero()[0]] for row, own in zip(states.detach(), mask)]  # (1, w) each
    return Instances(states, mask, torch.stack(first), vector)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, measured against the largest of the expected numbers."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def tokenizer(side: str = "right") -> tf.PreTrainedTokenizerFast:
    """One token per word: <pad> is 0, <s> 1, </s> 2, <unk> 3, and w0, w1, ... go on from 4."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = tf.PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **special)
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}w0 {{ m['content'] }} </s> {% else %}"
        "w1 {% generation %}{{ m['content'] }} </s> {% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    return made


def letters(path: Path) -> str:
    """The folder of a tokenizer whose tokens are letters, and a space with the letter behind it, as those of most models are."""
    single = [*"Question:Answer:yesno {}"]
    merges = [(" ", letter) for letter in dict.fromkeys(single) if letter != " "]
    pieces = {piece: n for n, piece in enumerate(dict.fromkeys([*single, *map("".join, merges)]))}
    backend = Tokenizer(models.BPE(pieces, merges))
    backend.decoder = decoders.Fuse()
    tf.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return str(path)
