"""Models of timm, whose tokens, gates and distances are parameters outside of layers."""

from functools import partial

import pytest

from tests.support.fisher.zoo import CLASSES, VARIANTS, Case, cases, check_case, classes, images

timm = pytest.importorskip("timm", reason="timm is an optional package")

SIZE = {"img_size": 32}
VIT = SIZE | {"patch_size": 16, "embed_dim": 8, "depth": 2, "num_heads": 2}
SWIN = SIZE | {"patch_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
FOUR = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 12)}
EDGE = {"global_block_counts": (0, 1, 1, 1), "kernel_sizes": (3,) * 4, "heads": (2,) * 4, "d2_scales": (2,) * 4}


def build(module, name, options, checkpoints=False, **rest):
    model = getattr(getattr(timm.models, module), name)(num_classes=CLASSES, **options)
    if checkpoints:
        model.set_grad_checkpointing()
    return Case(model, images(), classes(), recomputes=checkpoints, **rest)


def registered(name, **rest):
    """Models that timm makes for tests."""
    return Case(timm.create_model(name, num_classes=CLASSES), images(), classes(), **rest)


TIMM = {
    "vit": partial(build, "vision_transformer", "VisionTransformer", VIT),
    "vit, checkpointed": partial(build, "vision_transformer", "VisionTransformer", VIT, True),
    "vit, registers": partial(
        build,
        "vision_transformer",
        "VisionTransformer",
        VIT | {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    ),
    "vit, attention pool": partial(
        build, "vision_transformer", "VisionTransformer", VIT | {"global_pool": "map", "init_values": 1e-5}
    ),
    "vit, norms of queries": partial(
        build, "vision_transformer", "VisionTransformer", VIT | {"qk_norm": True, "dynamic_img_size": True}
    ),
    "vit, relative positions": partial(build, "vision_transformer_relpos", "VisionTransformerRelPos", VIT),
    "deit": partial(build, "deit", "VisionTransformerDistilled", VIT),
    "beit": partial(build, "beit", "Beit", VIT | {"init_values": 0.1, "use_rel_pos_bias": True}),
    "cait": partial(build, "cait", "Cait", VIT | {"depth": 1}),
    "xcit": partial(build, "xcit", "Xcit", VIT | {"depth": 1, "cls_attn_layers": 1}),
    "eva": partial(build, "eva", "Eva", VIT | {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True}),
    "crossvit": partial(
        build, "crossvit", "CrossVit", SIZE | {"embed_dim": (8, 12), "depth": ((1, 1, 1),), "num_heads": (2, 2)}
    ),
    "mixer": partial(build, "mlp_mixer", "MlpMixer", SIZE | {"patch_size": 16, "embed_dim": 8, "num_blocks": 2}),
    "convnext": partial(build, "convnext", "ConvNeXt", FOUR),
    "convnext, checkpointed": partial(build, "convnext", "ConvNeXt", FOUR, True),
    "convnext, response norms": partial(build, "convnext", "ConvNeXt", FOUR | {"use_grn": True, "ls_init_value": None}),
    "swin": partial(build, "swin_transformer", "SwinTransformer", SWIN),
    "swin, checkpointed": partial(build, "swin_transformer", "SwinTransformer", SWIN, True),
    "swin v2": partial(build, "swin_transformer_v2", "SwinTransformerV2", SWIN),
    "levit": partial(
        build, "levit", "Levit", SIZE | {"embed_dim": (16, 24), "key_dim": 4, "depth": (1, 1), "num_heads": (2, 2)}
    ),
    "metaformer": partial(
        build, "metaformer", "MetaFormer", {"depths": (1, 1), "dims": (8, 12), "layer_scale_init_values": 1e-5}
    ),
    "edgenext": partial(build, "edgenext", "EdgeNeXt", FOUR | {"dims": (8, 8, 8, 16)} | EDGE),
    "sequencer": partial(
        build,
        "sequencer",
        "Sequencer2d",
        SIZE
        | {
            "layers": (1, 1),
            "patch_sizes": (8, 2),
            "embed_dims": (8, 12),
            "hidden_sizes": (3, 4),
            "mlp_ratios": (2, 2),
        },
    ),
    "volo": partial(
        build,
        "volo",
        "VOLO",
        SIZE
        | {"layers": [1, 1], "embed_dims": [8, 12], "num_heads": [2, 2], "stem_hidden_dim": 8}
        | {"downsamples": (True, False), "outlook_attention": (True, False)},
    ),
    "resnet": partial(registered, "test_resnet"),
    "byobnet": partial(registered, "test_byobnet"),
    "efficientnet": partial(registered, "test_efficientnet"),
    "efficientnet, evolved norms": partial(registered, "test_efficientnet_evos", tolerance=1e-5),  # in float32
    "nfnet": partial(registered, "test_nfnet"),
}
case = cases(TIMM)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm(case, variant):
    check_case(case, variant)
