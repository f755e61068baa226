"""A small model of each of KerasHub's families, for `saved_model_coverage.py`: random weights, no downloads.

A family is a class `keras_hub.models.<name>Backbone`. Keras and KerasHub are imported inside the functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

COUNT, LENGTH, WORDS = 4, 12, 64
# What arguments that many families share are given; one that a class does not require is left out.
COMMON: Mapping[str, Any] = {
    "vocabulary_size": WORDS, "vocab_size": WORDS, "num_layers": 2, "num_layers_enc": 1, "num_layers_dec": 1,
    "num_heads": 2, "num_attention_heads": 2, "num_query_heads": 2, "num_key_value_heads": 1, "embedding_dim": 32,
    "hidden_dim": 32, "hidden_size": 32, "intermediate_dim": 64, "mlp_dim": 64, "head_dim": 16, "head_size": 16,
    "max_sequence_length": 2 * LENGTH, "num_experts": 2, "moe_intermediate_dim": 32, "shared_expert_intermediate_dim": 32,
    "shared_expert_intermediate_size": 32, "top_k": 1, "image_size": 32, "image_shape": (32, 32, 3), "patch_size": 8,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "layer_norm_epsilon": 1e-6, "partial_rotary_factor": 1.0,
    "mlp_bias": False, "attention_bias": False, "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True], "layer_types": ["attention", "attention"],
    "encoder_hidden_dim": 32, "encoder_intermediate_dim": 64, "encoder_num_layers": 1, "encoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 1, "encoder_head_dim": 16, "encoder_num_heads": 2, "decoder_hidden_dim": 32,
    "decoder_intermediate_dim": 64, "decoder_num_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_num_key_value_heads": 1, "decoder_head_dim": 16, "decoder_num_heads": 2,
    "encoder_layer_types": ["full_attention"], "decoder_layer_types": ["full_attention"], "filter_dim": 32,
}  # fmt: skip


def _part(name: str, **settings: Any) -> Callable[[], Any]:
    def made() -> Any:
        import keras_hub

        found = getattr(keras_hub.models, name)
        wanted = inspect.signature(found.__init__).parameters
        required = {key for key, value in wanted.items() if value.default is inspect.Parameter.empty}
        wanted_too = {"image_shape", "max_sequence_length"} & wanted.keys()  # the defaults are open or large
        given = {key: value for key, value in COMMON.items() if key in required | wanted_too}
        own = {key: value() if callable(value) else value for key, value in settings.items()}
        return found(**{**given, **own})

    return made


def _resnet(stages: int = 3, size: int = 32) -> Callable[[], Any]:
    return _part(
        "ResNetBackbone", input_conv_filters=[64], input_conv_kernel_sizes=[3], image_shape=(size, size, 3),
        stackwise_num_filters=[64, 16, 16, 16][:stages], stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1, 2, 2, 2][:stages], block_type="basic_block",
    )  # fmt: skip


_mit = _part(
    "MiTBackbone", num_layers=2, hidden_dims=[16, 32], layerwise_depths=[1, 1], layerwise_num_heads=[1, 2],
    layerwise_sr_ratios=[2, 1], layerwise_patch_sizes=[7, 3], layerwise_strides=[4, 2], max_drop_path_rate=0.0,
)  # fmt: skip
_dino = _part("DINOV2Backbone", num_layers=4, patch_size=4, position_embedding_shape=(32, 32))
_towers: Mapping[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 64}
_words: Mapping[str, Any] = {**_towers, "vocabulary_size": WORDS, "embedding_dim": 32, "max_sequence_length": LENGTH}

TEXT = (
    "Albert", "Bart", "Bert", "Bloom", "DebertaV3", "DistilBert", "ESM", "EdRec", "Electra", "FNet", "Falcon", "GPT2",
    "GPTNeoX", "Gemma", "Gemma3", "Gemma4", "GptOss", "Llama", "Llama3", "Mistral", "Mixtral", "OPT", "Phi3", "Qwen",
    "Qwen3", "Qwen3Moe", "Qwen3_5", "Qwen3_5Moe", "QwenMoe", "RWKV7", "Roberta", "RoformerV2", "SmolLM3", "T5", "T5Gemma",
    "XLMRoberta", "XLNet", "Whisper",
)  # fmt: skip
_linear: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "partial_rotary_factor": 1.0,
}  # fmt: skip
OWN: Mapping[str, Mapping[str, Any]] = {
    "DebertaV3": {"bucket_size": 8},
    "Gemma4": {"layer_types": ["full_attention", "full_attention"]},
    "Qwen3_5": _linear,
    "Qwen3_5Moe": _linear,
    "Qwen3Moe": {"num_experts": 4, "top_k": 2},
    "QwenMoe": {"num_experts": 4, "top_k": 2},
    "RWKV7": {"gate_lora": 8, "mv_lora": 8, "aaa_lora": 8, "decay_lora": 8},
    "Whisper": {"max_encoder_sequence_length": LENGTH, "max_decoder_sequence_length": LENGTH},
}  # fmt: skip
FAMILIES: Mapping[str, Callable[[], Any]] = {
    **{name: _part(f"{name}Backbone", **OWN.get(name, {})) for name in TEXT},
    "CSPNet": _part(
        "CSPNetBackbone", stem_filters=16, stem_kernel_size=3, stem_strides=1, stackwise_depth=[1, 1],
        stackwise_strides=[1, 2], stackwise_num_filters=[16, 32], block_type="dark_block", stage_type="dark",
    ),
    "DINOV2": _dino,
    "DINOV3": _part("DINOV3Backbone"),
    "DeepLabV3": _part(
        "DeepLabV3Backbone", image_encoder=_resnet(4, 64), low_level_feature_key="P2", spatial_pyramid_pooling_key="P4",
        upsampling_size=4, dilation_rates=[2, 4], image_shape=(64, 64, 3),
    ),
    "DeiT": _part("DeiTBackbone"),
    "DenseNet": _part("DenseNetBackbone", stackwise_num_repeats=[2, 2]),
    "EfficientNet": _part(
        "EfficientNetBackbone", stackwise_width_coefficients=[1.0] * 2, stackwise_depth_coefficients=[1.0] * 2,
        stackwise_kernel_sizes=[3, 5], stackwise_num_repeats=[1, 1], stackwise_input_filters=[16, 16],
        stackwise_output_filters=[16, 24], stackwise_expansion_ratios=[1, 4],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25], stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"], stackwise_force_input_filters=[0, 0], stackwise_nores_option=[False] * 2,
        input_shape=(32, 32, 3), num_features=64,
    ),
    "HGNetV2": _part(
        "HGNetV2Backbone", depths=[1, 1], embedding_size=16, hidden_sizes=[32, 64], stem_channels=[3, 16, 16],
        hidden_act="relu", use_learnable_affine_block=False,
        stackwise_stage_filters=[(16, 16, 32, 1, 1, 3), (32, 16, 64, 1, 1, 3)], apply_downsample=[False, True],
        use_lightweight_conv_block=[False, True],
    ),
    "MiT": _mit,
    "MobileNet": _part(
        "MobileNetBackbone", stackwise_expansion=[[32, 32], [64]], stackwise_num_blocks=[2, 1],
        stackwise_num_filters=[[16, 16], [24]], stackwise_kernel_size=[[3, 3], [5]], stackwise_num_strides=[[2, 1], [2]],
        stackwise_se_ratio=[[None, None], [0.25]], stackwise_activation=[["relu", "relu"], ["hard_swish"]],
        stackwise_padding=[[1, 1], [2]], output_num_filters=64, depthwise_filters=16, depthwise_stride=2,
        depthwise_residual=False, last_layer_filter=64, squeeze_and_excite=0.5,
    ),
    "ResNet": _resnet(),
    "RetinaNet": _part(
        "RetinaNetBackbone", image_encoder=_resnet(4, 64), min_level=3, max_level=5, use_p5=False, image_shape=(64, 64, 3)
    ),
    "SegFormer": _part("SegFormerBackbone", image_encoder=_mit, projection_filters=16),
    "SwinTransformer": _part(
        "SwinTransformerBackbone", embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, patch_size=2
    ),
    "VGG": _part("VGGBackbone", stackwise_num_repeats=[1, 2], stackwise_num_filters=[16, 32]),
    "ViT": _part("ViTBackbone", patch_size=(8, 8)),
    "ViTDet": _part(
        "ViTDetBackbone", global_attention_layer_indices=[1], num_output_channels=16, window_size=2
    ),
    "Xception": _part("XceptionBackbone", stackwise_conv_filters=[[16, 32], [32, 64]], stackwise_pooling=[True, False]),
    "CLIP": _part(
        "CLIPBackbone", projection_dim=16, text_encoder=_part("CLIPTextEncoder", **_words),
        vision_encoder=_part("CLIPVisionEncoder", **_towers, patch_size=8, image_shape=(32, 32, 3)),
    ),
    "SigLIP": _part(
        "SigLIPBackbone", text_encoder=_part("SigLIPTextEncoder", **_words),
        vision_encoder=_part("SigLIPVisionEncoder", **_towers, patch_size=8, image_shape=(32, 32, 3)),
    ),
    "PaliGemma": _part(
        "PaliGemmaBackbone", vit_patch_size=8, vit_num_heads=2, vit_hidden_dim=32, vit_num_layers=2, vit_intermediate_dim=64
    ),
    "DepthAnything": _part(
        "DepthAnythingBackbone", image_encoder=_dino, reassemble_factors=[4, 2, 1, 0.5], neck_hidden_dims=[16, 16, 32, 32],
        fusion_hidden_dim=16, head_hidden_dim=16, head_in_index=-1, feature_keys=["stage1", "stage2", "stage3", "stage4"],
    ),
    "PARSeq": _part(
        "PARSeqBackbone", image_encoder=_part("ViTBackbone", patch_size=(8, 8), use_class_token=False),
        max_label_length=2 * LENGTH, decoder_hidden_dim=32, num_decoder_layers=1, num_decoder_heads=2, decoder_mlp_dim=64,
    ),
    "VideoPrism": _part(
        "VideoPrismBackbone", num_frames=2, num_spatial_layers=1, num_temporal_layers=1, num_auxiliary_layers=0
    ),
}  # fmt: skip
# Made of several models, or of parts that no small settings are known for here.
LEFT_OUT = (
    "BASNet", "BLIP2", "DFine", "Flux", "Gemma3n", "MetaCLIP2", "MobileNetV5", "Moonshine", "SAM", "SAM3", "StableDiffusion3",
    "T5Gemma2",
)  # fmt: skip


def build(name: str) -> tuple[Any, Any]:
    """The model and `COUNT` samples, an array or arrays by the names of the inputs."""
    model = FAMILIES[name]()
    rng = np.random.default_rng(0)
    inputs = model.input if isinstance(model.input, dict) else {"x": model.input}
    data = {key: _drawn(key, tensor, rng) for key, tensor in inputs.items()}
    return model, data if len(data) > 1 else data.popitem()[1]


def _drawn(name: str, tensor: Any, rng: np.random.Generator) -> np.ndarray:
    shape = (COUNT, *(d or LENGTH for d in tensor.shape[1:]))
    if "mask" in name or tensor.dtype == "bool":
        return np.ones(shape, tensor.dtype)
    if "int" in str(tensor.dtype):
        top = 2 if "segment" in name else 1 if "indices" in name else WORDS
        return rng.integers(0, top, shape).astype(tensor.dtype)
    return rng.uniform(0, 1, shape).astype(np.float32)
