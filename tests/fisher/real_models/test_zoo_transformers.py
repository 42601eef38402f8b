"""Models of Hugging Face, with the inputs, labels and outputs that they have."""

import pytest
import torch
from torch import nn

from fdcr_fast import diagonal_fisher
from tests.support.fisher.zoo import (
    CLASSES,
    VARIANTS,
    Case,
    N,
    arguments,
    assert_close,
    cases,
    check_case,
    classes,
    images,
    in_float32,
    padding,
    square,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="transformers is an optional package")

WORDS = {"vocab_size": 20, "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12}
LLAMA = BERT | {"num_key_value_heads": 1, "max_position_embeddings": 12}
MOE = LLAMA | {"num_hidden_layers": 1, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MIXTRAL = MOE | {"num_local_experts": 3}
QWEN2_MOE = MOE | {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
SWITCH = T5 | {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
VIT = BERT | {"image_size": 32, "patch_size": 16, "num_labels": CLASSES}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 12} | {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in (("attention_heads", 2), ("ffn_dim", 12))
}
WHISPER = BART | {"num_mel_bins": 4, "max_source_positions": 5, "max_target_positions": 12, "decoder_start_token_id": 1}
SWIN = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": CLASSES,
}
IN_FLOAT32 = 1e-5  # norms, rotations or routers that compute in float32 whatever the parameters are


def build(name, head, options, **more):
    config = getattr(transformers, name + "Config")(**options, **more)
    return getattr(transformers, name + head)(config)


def ids_and_mask(length):
    return {"input_ids": tokens(length), "attention_mask": padding(length).long()}


def sequence(name, options, length=6, **rest):
    """The class of a text."""
    model = build(name, "ForSequenceClassification", WORDS | options)
    return Case(model, ids_and_mask(length), classes(), **rest)


def token_classes(name, options, length=6, **rest):
    """A class per token, padding ignored."""
    labels = torch.randint(0, CLASSES, (N, length)).masked_fill(~padding(length), -100)
    return Case(build(name, "ForTokenClassification", WORDS | options), ids_and_mask(length), labels, "tokens", **rest)


def next_tokens(name, options, head="ForCausalLM", length=6, **rest):
    words = {key: value for key, value in WORDS.items() if key != "num_labels"}
    model = build(name, head, words | options)
    return Case(model, ids_and_mask(length), tokens(length), "tokens", **rest)


def translation(name, head, options, length=6, target=5, **rest):
    model = build(name, head, WORDS | options)
    inputs = ids_and_mask(length) | {"decoder_input_ids": tokens(target)}
    return Case(model, inputs, tokens(target), "tokens", **rest)


def picture(name, options, head="ForImageClassification", **rest):
    return Case(build(name, head, options), {"pixel_values": images()}, classes(), **rest)


def flags(case, **more):
    """As ``model(**batch)`` takes them."""
    case.inputs |= more
    return case


def checkpointed(case, reentrant=False):
    """These throw activations away in training only; nothing in it may be random then."""
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in case.model.modules():
        assert not isinstance(module, nn.Dropout) or module.p == 0
    case.training = case.recomputes = True
    return case


def text_embedding():
    words = {"vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 2, "pad_token_id": 0}
    model = build("CLIPText", "ModelWithProjection", BERT | words | {"projection_dim": 4})
    return Case(model, ids_and_mask(6), torch.randn(N, 4), square("text_embeds"))


def clip_images():
    vision = {key: value for key, value in VIT.items() if key != "num_labels"}
    text = BERT | {"vocab_size": 20, "max_position_embeddings": 6}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    config.num_labels = CLASSES
    return Case(transformers.CLIPForImageClassification(config), {"pixel_values": images()}, classes())


def switch():
    case = translation("SwitchTransformers", "ForConditionalGeneration", SWITCH, tolerance=IN_FLOAT32)
    for module in case.model.modules():
        if hasattr(module, "router"):
            module.router.dtype = torch.float64  # to which the forward pass converts the router's weights
    return case


def speech(head, **options):
    model = build("Whisper", head, WORDS | WHISPER, **options)
    features = {"input_features": torch.randn(N, 4, 10)}
    if head == "ForAudioClassification":
        return Case(model, features, classes())
    return Case(model, features | {"decoder_input_ids": tokens(5)}, tokens(5), "tokens")


TRANSFORMERS = {
    "bert": lambda: sequence("Bert", BERT),
    "bert, as many tokens as samples": lambda: sequence("Bert", BERT, N),
    "bert, eager attention": lambda: sequence("Bert", BERT | {"attn_implementation": "eager"}),
    "bert, tokens": lambda: token_classes("Bert", BERT),
    "bert, as many tokens as classes": lambda: token_classes("Bert", BERT, CLASSES),
    "bert, masked language": lambda: next_tokens("Bert", BERT, "ForMaskedLM"),
    "bert, checkpointed": lambda: checkpointed(sequence("Bert", BERT | NO_DROPOUT)),
    "bert, reentrant checkpoints": lambda: checkpointed(sequence("Bert", BERT | NO_DROPOUT), True),
    "distilbert": lambda: sequence("DistilBert", {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}),
    "roberta": lambda: sequence("Roberta", BERT),
    "albert": lambda: sequence("Albert", BERT | {"embedding_size": 4}),
    "electra, tokens": lambda: token_classes("Electra", BERT | {"embedding_size": 4}, N),
    "deberta": lambda: sequence("DebertaV2", BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": lambda: sequence("ModernBert", BERT | {"global_attn_every_n_layers": 2}),
    "gpt2": lambda: sequence("GPT2", GPT2),
    "gpt2, language": lambda: next_tokens("GPT2", GPT2, "LMHeadModel"),
    "gpt2, as many tokens as samples": lambda: next_tokens("GPT2", GPT2, "LMHeadModel", N),
    "gpt2, flags": lambda: flags(sequence("GPT2", GPT2), use_cache=False, token_type_ids=None),
    "gpt2, checkpointed": lambda: checkpointed(
        next_tokens("GPT2", GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "LMHeadModel")
    ),
    "llama": lambda: sequence("Llama", LLAMA, tolerance=IN_FLOAT32),
    "llama, language": lambda: next_tokens("Llama", LLAMA | {"tie_word_embeddings": True}, tolerance=IN_FLOAT32),
    "llama, checkpointed": lambda: checkpointed(next_tokens("Llama", LLAMA, tolerance=IN_FLOAT32)),
    "qwen2": lambda: next_tokens("Qwen2", LLAMA, length=N, tolerance=IN_FLOAT32),
    "gemma": lambda: next_tokens("Gemma", LLAMA | {"head_dim": 4}, tolerance=IN_FLOAT32),
    "mixtral": lambda: next_tokens("Mixtral", MIXTRAL, tolerance=IN_FLOAT32),
    "mixtral, one expert a token": lambda: next_tokens(
        "Mixtral", MIXTRAL | {"num_local_experts": 6, "num_experts_per_tok": 1}, length=N, tolerance=IN_FLOAT32
    ),
    "mixtral, batched experts": lambda: next_tokens(
        "Mixtral", MIXTRAL | {"experts_implementation": "batched_mm"}, tolerance=IN_FLOAT32
    ),
    "qwen2 moe": lambda: sequence("Qwen2Moe", QWEN2_MOE, tolerance=IN_FLOAT32),
    "switch": switch,
    "t5": lambda: translation("T5", "ForConditionalGeneration", T5, tolerance=IN_FLOAT32),
    "t5, checkpointed": lambda: checkpointed(
        translation("T5", "ForConditionalGeneration", T5 | {"dropout_rate": 0.0}, N, N, tolerance=IN_FLOAT32)
    ),
    "bart": lambda: translation("Bart", "ForConditionalGeneration", BART),
    "mamba": lambda: next_tokens(
        "Mamba", {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}, tolerance=IN_FLOAT32
    ),
    "vit": lambda: picture("ViT", VIT),
    "vit, checkpointed": lambda: checkpointed(picture("ViT", VIT | NO_DROPOUT)),
    "deit": lambda: picture("DeiT", VIT),
    "deit, distilled": lambda: picture("DeiT", VIT, "ForImageClassificationWithTeacher"),
    "beit": lambda: picture(
        "Beit", VIT | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
    ),
    "dinov2": lambda: picture("Dinov2", VIT),
    "swin": lambda: picture("Swin", SWIN),
    "convnext": lambda: picture(
        "ConvNext", {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": CLASSES}
    ),
    "clip, text": text_embedding,
    "clip, images": clip_images,
    "whisper": lambda: speech("ForConditionalGeneration"),
    "whisper, classes": lambda: speech("ForAudioClassification", classifier_proj_size=8),
}
case = cases(TRANSFORMERS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers(case, variant):
    check_case(case, variant)


smooth = cases({name: TRANSFORMERS[name] for name in ("bert", "gpt2", "llama", "vit", "mixtral")})


def test_transformers_in_float32(smooth):
    in_float32(smooth)


grouped = cases({name: TRANSFORMERS[name] for name in ("mixtral", "qwen2 moe")})


def test_grouped_experts(grouped):
    """What they use by default, which there is in float32 only."""
    grouped.model.set_experts_implementation("grouped_mm")
    in_float32(grouped)


labelled = cases({name: TRANSFORMERS[name] for name in ("bert", "bert, as many tokens as classes", "gpt2, flags")})


def test_labels_in_the_batch(labelled):
    loss, options = arguments(labelled, labelled.expected)
    batch = transformers.BatchEncoding({**labelled.inputs, "labels": labelled.targets})
    for data in batch, [batch]:
        assert_close(diagonal_fisher(labelled.model, data, loss, **options), labelled.expected, labelled.tolerance)
