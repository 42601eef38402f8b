"""Adapters of peft: few trained parameters in a frozen model, some of them outside of layers."""

from functools import partial

import pytest

from tests.support.fisher.zoo import (
    CLASSES,
    VARIANTS,
    Case,
    assert_fisher,
    cases,
    check_case,
    classes,
    images,
    padding,
    sum_of_tokens,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="transformers is an optional package")
peft = pytest.importorskip("peft", reason="peft is an optional package")

WORDS = {"vocab_size": 20, "num_labels": CLASSES, "pad_token_id": 0}
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**WORDS, **SIZES))


def gpt2():
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**WORDS, **sizes))


def gpt2_language():
    words = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**words, **sizes))


def vit():
    options = {"image_size": 32, "patch_size": 16, "num_labels": CLASSES}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**options, **SIZES))


def adapted(base, kind, length=6, **options):
    model = peft.get_peft_model(base(), getattr(peft, kind + "Config")(**options))
    inputs = {"input_ids": tokens(length), "attention_mask": padding(length).long()}
    if base is gpt2_language:
        return Case(model, inputs, tokens(length), sum_of_tokens)
    return Case(model, {"pixel_values": images()} if base is vit else inputs, classes())


LORA = {"r": 2, "lora_alpha": 4}
PEFT = {
    "lora": partial(adapted, bert, "Lora", **LORA, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "lora, all linear layers": partial(adapted, bert, "Lora", 4, **LORA, target_modules="all-linear", bias="all"),
    "lora, transposed weights": partial(
        adapted, gpt2, "Lora", **LORA, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "lora, embeddings": partial(
        adapted, bert, "Lora", **LORA, target_modules=["word_embeddings", "dense"], modules_to_save=["classifier"]
    ),
    "lora, convolution": partial(
        adapted, vit, "Lora", **LORA, target_modules=["projection", "dense"], modules_to_save=["classifier"]
    ),
    "dora": partial(adapted, bert, "Lora", **LORA, target_modules=["query", "dense"], use_dora=True),
    "dora, images": partial(adapted, vit, "Lora", **LORA, target_modules="all-linear", use_dora=True),
    "ia3": partial(
        adapted, bert, "IA3", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "loha": partial(adapted, bert, "LoHa", r=2, alpha=2, target_modules=["query", "value"]),
    "vera": partial(adapted, bert, "Vera", r=2, target_modules=["query", "value"]),
    "prompt": partial(adapted, bert, "PromptTuning", task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefix": partial(adapted, gpt2_language, "PrefixTuning", task_type="CAUSAL_LM", num_virtual_tokens=3),
}
case = cases(PEFT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft(case, variant):
    check_case(case, variant)


def test_trained_parameters(case):
    trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(case.expected)
    assert_fisher(case, {name: f for name, f in case.expected.items() if name in trained})
