# ruff: noqa: C408, E501, E741
"""Tiny configs of every MoE family transformers has, and how to build a model from one.

H 32, I 12, D 20, S 28, E 4, vocabulary 64: no two sizes alike, so that a wrong axis shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ckpt_tool.errors import UsageError
from ckpt_tool.families import families, family_of

H, I, D, S, E = 32, 12, 20, 28, 4
BASE: dict[str, Any] = dict(
    hidden_size=H, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    head_dim=8,
)  # fmt: skip
MLA = dict(q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
           num_key_value_heads=4)  # fmt: skip
INDEX = dict(index_n_heads=2, index_head_dim=16, index_topk=4)
MOE = dict(moe_intermediate_size=I, intermediate_size=D, num_experts_per_tok=2)
ROUTED = dict(**MOE, n_routed_experts=E, n_shared_experts=1, n_group=1, topk_group=1)
PLAIN = dict(**MOE, num_experts=E)
LOCAL = dict(num_local_experts=E, intermediate_size=I, num_experts_per_tok=2)
SHARED = dict(shared_expert_intermediate_size=S)
DENSE1 = dict(first_k_dense_replace=1)
KINDS = dict(mlp_layer_types=["dense", "sparse", "sparse"])
FULL = dict(layer_types=["full_attention"] * 3)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
HYBRID = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4, rel_extent=16,
    layer_types=["hybrid"] * 3,
)  # fmt: skip
ROPE = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0, partial_rotary_factor=1.0)
VISION = dict(
    hidden_size=16, depth=2, num_heads=2, intermediate_size=16, out_hidden_size=H, num_hidden_layers=2,
    num_attention_heads=2, image_size=16, patch_size=4, deepstack_visual_indexes=[0],
    num_position_embeddings=16, spatial_merge_size=2, temporal_patch_size=1,
)  # fmt: skip
SMALL_VISION = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
    patch_size=4,
)  # fmt: skip
AUDIO = dict(
    d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, output_dim=H, n_window=4
)  # fmt: skip
SAM = dict(
    hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4,
    window_size=2, global_attn_indexes=[0], mlp_dim=16, downsample_channels=[8, 16],
)  # fmt: skip
SEQ2SEQ = dict(d_model=H, num_experts=E, tie_word_embeddings=True)
SMALL_ENCODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)

TEXT: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": PLAIN | SHARED,
    "qwen3_moe": PLAIN,
    "qwen3_next": PLAIN | SHARED | LINEAR,
    "flint": PLAIN | SHARED | FULL | dict(mlp_only_layers=[0]),
    "qwen3_5_moe_text": PLAIN | SHARED | LINEAR,
    "qwen4_exp_text": PLAIN | SHARED | LINEAR | dict(
        layer_types=["linear_attention", "indexed_attention", "linear_attention"], hc_count=2, hc_lowrank=8,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, indexer_compress_ratio=2,
    ),
    "qwen3_vl_moe_text": PLAIN,
    "qwen3_omni_moe_text": PLAIN,
    "deepseek_v2": ROUTED | DENSE1 | MLA,
    "deepseek_v3": ROUTED | DENSE1 | MLA,
    "deepseek_v32": ROUTED | DENSE1 | MLA | INDEX,
    "glm4_moe": ROUTED | DENSE1,
    "glm4_moe_lite": ROUTED | KINDS | MLA,
    "glm4v_moe_text": ROUTED | DENSE1 | dict(rope_parameters=ROPE),
    "glm_moe_dsa": ROUTED | DENSE1 | MLA | INDEX,
    "gpt_oss": LOCAL | FULL,
    "llama4_text": LOCAL | dict(intermediate_size_mlp=D, interleave_moe_layer_step=1),
    "minimax": LOCAL | dict(
        layer_types=["full_attention", "linear_attention", "full_attention"], block_size=8
    ),
    "minimax_m2": LOCAL,
    "minimax_m3_vl_text": LOCAL | KINDS | dict(dense_intermediate_size=D, shared_intermediate_size=S),
    "olmoe": LOCAL | dict(num_experts=E),
    "flex_olmo": LOCAL | dict(num_experts=E),
    "phimoe": LOCAL,
    "granitemoe": LOCAL,
    "granitemoeshared": LOCAL | dict(shared_intermediate_size=S),
    "granitemoehybrid": LOCAL | dict(
        shared_intermediate_size=S, layer_types=["attention"] * 3, mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=8,
    ),
    "granitemoe_swa": LOCAL | dict(shared_intermediate_size=0),
    "jamba": LOCAL | dict(
        num_experts=E, attn_layer_offset=0, attn_layer_period=1, expert_layer_offset=1, expert_layer_period=2,
        mamba_d_state=8, use_mamba_kernels=False,
    ),
    "ernie4_5_moe": dict(
        intermediate_size=D, moe_intermediate_size=I, moe_k=2, moe_num_experts=E, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=2, moe_layer_interval=1,
    ),
    "hunyuan_v1_moe": dict(num_experts=E, intermediate_size=I, moe_topk=2, num_shared_expert=1),
    "dots1": ROUTED | DENSE1,
    "lfm2_moe": PLAIN | dict(
        num_dense_layers=1, use_expert_bias=True, layer_types=["full_attention", "conv", "full_attention"]
    ),
    "afmoe": PLAIN | FULL | dict(num_dense_layers=1, num_shared_experts=1),
    "longcat_flash": MLA | dict(
        num_layers=2, expert_ffn_hidden_size=I, ffn_hidden_size=D, moe_topk=2, n_routed_experts=E,
        zero_expert_num=2,
    ),
    "exaone_moe": PLAIN | KINDS | FULL | dict(num_shared_experts=1),
    "solar_open": ROUTED,
    "mimo_v2_flash": ROUTED | KINDS | FULL | dict(
        v_head_dim=8, swa_head_dim=8, swa_v_head_dim=8, swa_num_key_value_heads=2, swa_num_attention_heads=4
    ),
    "laguna": PLAIN | SHARED | KINDS | FULL | dict(
        num_shared_experts=1, num_attention_heads_per_layer=[4, 4, 4]
    ),
    "hy_v3": PLAIN | KINDS | dict(num_shared_experts=1),
    "cohere2_moe": LOCAL | FULL | dict(
        num_experts=E, intermediate_size=D, mlp_layer_types=["sparse"] * 3, num_shared_experts=0
    ),
    "jetmoe": LOCAL | dict(intermediate_size=D, kv_channels=8, num_key_value_heads=4),
    "aria_text": dict(intermediate_size=I, moe_num_experts=E, moe_topk=2, moe_num_shared_experts=2),
    "kimi_linear": MLA | KINDS | dict(
        moe_intermediate_size=I, intermediate_size=D, num_experts=E, num_experts_per_token=2,
        num_shared_experts=1, num_expert_group=1, topk_group=1, layer_types=LINEAR["layer_types"],
    ),
    "nemotron_h": ROUTED | dict(
        moe_shared_expert_intermediate_size=S, layers_block_type=["attention", "moe", "moe"],
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, use_mamba_kernels=False,
    ),
    "deepseek_v4": MOE | INDEX | dict(
        n_routed_experts=E, n_shared_experts=1, q_lora_rank=16, o_lora_rank=8, o_groups=2, qk_rope_head_dim=4,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    ),
    "gemma4_text": PLAIN | dict(
        enable_moe_block=True, top_k_experts=2, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        vocab_size_per_layer_input=64, global_head_dim=8,
    ),
    "mistral4": ROUTED | DENSE1 | MLA | dict(rope_parameters=dict(
        rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0, llama_4_scaling_beta=0.1,
        original_max_position_embeddings=64,
    )),
    "bailing_hybrid": PLAIN | KINDS | MLA | dict(
        num_shared_experts=1, n_group=1, topk_group=1, layer_group_size=2
    ),
    "axk1": ROUTED | KINDS | MLA,
    "axk2": ROUTED | KINDS | MLA | INDEX | dict(gated_norm_rank=4),
    "dots3_note_text": ROUTED | KINDS | MLA | INDEX | dict(
        shared_experts_intermediate_size=S, layer_types=["indexed_attention"] * 3, head_dim=16
    ),
    "mellum": PLAIN | FULL | dict(mlp_layer_types=["sparse"] * 3),
    "beam": PLAIN | KINDS | FULL | dict(n_group=1, topk_group=1),
    "kolibri1": PLAIN | SHARED | FULL,
    "muse_spark_text": MOE | KINDS | FULL | dict(num_local_experts=E, moe_hidden_size=24),
    "inkling_text": ROUTED | KINDS | HYBRID,
    "openai_privacy_filter": LOCAL,
    "zaya": PLAIN | dict(num_experts_per_tok=1),
    "hy_v4": MOE | KINDS | dict(n_routed_experts=E, n_shared_experts=1),
    "dbrx": dict(
        d_model=H, n_heads=4, n_layers=2, max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=I, moe_num_experts=E, moe_top_k=2, hidden_size=H),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
    ),
    "glm5_next_text": ROUTED | KINDS | MLA | dict(
        qk_rope_head_dim=0, layer_types=["linear_attention", "deepseek_sparse_attention", "linear_attention"]
    ),
    "switch_transformers": SEQ2SEQ | dict(
        d_kv=8, d_ff=I, num_layers=2, num_decoder_layers=2, num_heads=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "nllb-moe": SEQ2SEQ | dict(
        encoder_ffn_dim=I, decoder_ffn_dim=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_sparse_step=2, decoder_sparse_step=2,
    ),
    "sarvam_mla": ROUTED | DENSE1 | MLA,
    "sarvam_moe": ROUTED | DENSE1,
    "lara_mini": PLAIN | SHARED | LINEAR,
    "doge": dict(num_experts=E, intermediate_size=D, num_experts_per_tok=2, is_moe=True, num_keys=4),
}  # fmt: skip


def _text(name: str, **more: Any) -> dict[str, Any]:
    return BASE | TEXT[name] | more


THINKER = dict(
    text_config=_text("qwen3_vl_moe_text", rope_parameters=ROPE), vision_config=VISION, audio_config=AUDIO
)  # fmt: skip
COMPOSITE: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": dict(text_config=_text("qwen3_vl_moe_text", rope_parameters=ROPE), vision_config=VISION),
    "qwen3_5_moe": dict(text_config=_text("qwen3_5_moe_text", rope_parameters=ROPE), vision_config=VISION),
    "glm4v_moe": dict(text_config=_text("glm4v_moe_text"), vision_config=VISION),
    "glm5_next": dict(text_config=_text("glm5_next_text"), vision_config=VISION),
    "llama4": dict(text_config=_text("llama4_text"), vision_config=SMALL_VISION | dict(
        vision_output_dim=16, projector_input_dim=16, projector_output_dim=16, pixel_shuffle_ratio=0.5
    )),
    "minimax_m3_vl": dict(
        text_config=_text("minimax_m3_vl_text", model_type="minimax_m3_vl_text"), vision_config=VISION
    ),
    "ernie4_5_vl_moe": dict(
        text_config=BASE | dict(
            moe_intermediate_size=[I, 6], moe_num_experts=E, moe_k=2, intermediate_size=24,
            rope_parameters=ROPE | dict(mrope_section=[1, 1, 2]),
        ),
        vision_config=SMALL_VISION | dict(
            depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_merge_size=2
        ),
    ),
    "kimi_k25": dict(text_config=_text("deepseek_v3", model_type="deepseek_v3"), vision_config=VISION),
    "qwen4_exp": dict(text_config=_text("qwen4_exp_text", rope_parameters=ROPE), vision_config=VISION),
    "qwen3_omni_moe_thinker": THINKER,
    "qwen3_omni_moe": dict(
        thinker_config=THINKER,
        talker_config=dict(
            text_config=_text("qwen3_omni_moe_text", moe_intermediate_size=6, shared_expert_intermediate_size=10),
            code_predictor_config=BASE | dict(intermediate_size=16, num_hidden_layers=1), num_code_groups=2,
            spatial_merge_size=2, thinker_hidden_size=H,
        ),
        code2wav_config=SMALL_ENCODER | dict(
            codebook_size=8, num_key_value_heads=2, num_quantizers=2, decoder_dim=16, upsample_rates=[2],
            upsampling_ratios=[2],
        ),
    ),
    "inkling_mm_model": dict(
        text_config=_text("inkling_text"),
        vision_config=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4),
        audio_config=dict(n_mel_bins=4, mel_vocab_size=8),
    ),
    "inkling2": dict(
        text_config=BASE | HYBRID | dict(
            moe_intermediate_size=I, num_experts_per_tok=2, n_routed_experts=E, unpadded_vocab_size=64,
            n_layers_per_attn_res_block=1,
        ),
        vision_config=SMALL_ENCODER | dict(
            patch_size=4, text_hidden_size=H, projection_hidden_dim=16, posemb_grid_size=4
        ),
    ),
    "inkling2_loop": dict(
        text_config=BASE | HYBRID | dict(
            moe_intermediate_size=I, num_experts_per_tok=2, n_routed_experts=E, unpadded_vocab_size=64,
            n_layers_per_attn_res_block=1, loop_layer_index_start=1, loop_layer_index_end=2, loop_gate_rank=4,
        ),
        vision_config=SMALL_ENCODER | dict(
            patch_size=4, text_hidden_size=H, projection_hidden_dim=16, posemb_grid_size=4
        ),
    ),
    "hy_v4_vl": dict(
        text_config=_text("hy_v4", model_type="hy_v4_vl_text"),
        vision_config=SMALL_ENCODER | dict(patch_size=4, out_hidden_size=H, max_image_size=16),
    ),
    "mistral_large4": dict(
        text_config=BASE | ROUTED | KINDS | MLA | INDEX,
        vision_config=SMALL_VISION | dict(model_type="pixtral", head_dim=8),
    ),
    "muse_spark": dict(
        text_config=_text("muse_spark_text"),
        vision_config=SMALL_ENCODER | dict(patch_size=4, pos_emb_height=4, pos_emb_width=4),
        audio_config=dict(
            patch_sizes=[2, 2], hidden_sizes=[8, 16], depths=[1, 1], num_hidden_layers=2, out_hidden_size=H
        ),
        out_hidden_size=16, projector_hidden_size=16,
    ),
    "dots3_note": dict(
        text_config=_text("dots3_note_text"),
        vision_config=SMALL_ENCODER | dict(
            num_hidden_layers=2, moe_intermediate_size=6, patch_size=4, adapter_in_dim=16, adapter_out_dim=H,
            pyramid_num_routed=[-1, 2], num_experts_per_tok=1,
        ),
        audio_config=SMALL_ENCODER | dict(
            adapter_input_size=16, adapter_out_dim=H, downsample_hidden_size=4, feature_size=8
        ),
    ),
    "deepseek_ocr2": dict(
        text_config=BASE | ROUTED | KINDS | dict(num_key_value_heads=4),
        vision_config=dict(
            sam_config=SAM, encoder_config=SMALL_ENCODER | dict(num_key_value_heads=2, vocab_size=8)
        ),
    ),
    "unlimited_ocr": dict(
        text_config=BASE | ROUTED | KINDS | dict(num_key_value_heads=4),
        vision_config=dict(
            sam_config=SAM, encoder_config=SMALL_ENCODER | dict(image_size=16, patch_size=4)
        ),
    ),
    "nemo_speechlm": dict(
        text_config=_text(
            "nemotron_h", model_type="nemotron_h", layers_block_type=["attention", "moe", "mamba"]
        ),
        audio_config=dict(
            asr_config=SMALL_ENCODER | dict(num_mel_bins=8),
            diarization_config=dict(
                audio_config=SMALL_ENCODER | dict(num_mel_bins=8),
                head_config=dict(hidden_size=16, audio_hidden_size=16),
            ),
        ),
        word_timestamp_config=SMALL_ENCODER | dict(vocab_size=9, blank_token_id=8),
    ),
    "diffusion_gemma": dict(
        text_config=BASE | PLAIN | dict(
            top_k_experts=2, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            global_head_dim=8, tie_word_embeddings=True,
        ),
        vision_config=SMALL_VISION | dict(num_key_value_heads=2, head_dim=8), canvas_length=8,
    ),
    "aria": dict(text_config=_text("aria_text", model_type="aria_text"), vision_config=SMALL_VISION),
    "step3p7": dict(text_config=BASE | MOE | KINDS | dict(
        n_routed_experts=E, share_expert_dim=S, sliding_window=8
    ), vision_config=VISION),
    "gemma4": dict(text_config=_text("gemma4_text"), vision_config=SMALL_VISION | dict(
        num_key_value_heads=2, head_dim=8
    )),
    "mistral3": dict(
        text_config=_text("mistral4", model_type="mistral4"),
        vision_config=SMALL_VISION | dict(model_type="pixtral", head_dim=8),
    ),
}  # fmt: skip

MODELS = tuple(TEXT) + tuple(COMPOSITE)

# What only the newer of the releases they are tested with can build: it has the family, or beside it is
# installed what the family's code imports.
NEWER_ONLY = (
    "dots3_note", "dots3_note_text", "flint", "hy_v4_vl", "inkling2", "inkling2_loop",
    "inkling_mm_model", "lara_mini", "mistral_large4",
    "nemo_speechlm", "sarvam_mla", "sarvam_moe",
)  # fmt: skip
_IMPORTS = {"inkling_mm_model": "scipy"}

# Model types in the tables that cannot be built, or that need not be.
NOT_BUILT = {
    "arctic": "has no class in transformers; its code is in its repository",
    "bailing_moe": "has no class in transformers; its files have the names of sarvam_moe",
    "bailing_moe_v2": "another name of bailing_moe",
    "gemma4_unified": "has the names of gemma4, and no experts",
    "gemma4_unified_text": "has the names of gemma4_text, and no experts",
    "inkling": "another name of inkling_mm_model",
    "kimi_k2": "has no class in transformers; its files have the names of deepseek_v3",
    "llama": "is not sparse",
    "minimax_m1": "has no class in transformers; its files have the names of minimax",
    "minimax_text_01": "another name of minimax_m1",
    "mistral": "is not sparse",
    "mistral3/mistral4": "is built as mistral3",
    "qwen2": "is not sparse",
    "qwen3": "is not sparse",
    "step3p5": "is the text model of step3p7; no class builds it alone",
}

# Models no Auto class builds.
_CLASSES = {
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "nemo_speechlm": "Nemotron3_5TranscribeForConditionalGeneration",
}


def can_build(name: str) -> bool:
    """Whether the installed release has the family, and what its code imports is there."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return name in CONFIG_MAPPING_NAMES and find_spec(_IMPORTS.get(name, "transformers")) is not None


def without_family() -> list[str]:
    """What the installed release has with experts and no family is for: model code, and registered types."""
    return sorted({*_code_without_family(), *_types_without_family()})


def _types_without_family() -> set[str]:
    """The types in the configuration registry whose defaults state experts, and no family knows. Types of parts
    of another model (its text model, its tower) are that model's matter."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    fields = {name for family in families() for name in family.config.get("experts", ()) if "." not in name}
    sparse: set[str] = set()
    parts: set[str] = set()
    for model_type in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # no defaults, or what its code imports is not installed
            continue
        nested = list(_configs(config))
        parts |= {str(part.get("model_type")) for part in nested[1:]}
        if any(isinstance(part.get(name), int) and part[name] > 1 for part in nested for name in fields):
            try:
                family_of(config)
            except UsageError:
                sparse.add(model_type)
    return sparse - parts


def _configs(config: Any) -> Iterator[dict[str, Any]]:
    """A config and all in it."""
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _configs(value)


def _code_without_family() -> list[str]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    known = {model_type for family in families() for model_type in family.model_types}
    covered = {model_type_to_module_name(name) for name in CONFIG_MAPPING_NAMES if name in known}
    return sorted(
        path.parent.name
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        if path.parent.name not in covered
        and re.search(r"^class \w*Experts\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


def build(name: str, seed: int = 1) -> Any:
    """A model with random weights, buffers that are saved included; raises what transformers raises."""
    import torch
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    options = COMPOSITE[name] if name in COMPOSITE else _text(name)
    config = AutoConfig.for_model(name, **options)
    if name in _CLASSES:
        model = getattr(transformers, _CLASSES[name])._from_config(config, attn_implementation="eager")
    else:
        first = AutoModelForImageTextToText if name in COMPOSITE else AutoModelForCausalLM
        first = AutoModelForSeq2SeqLM if config.is_encoder_decoder else first
        known = type(config) in first._model_mapping
        model = (first if known else AutoModel).from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.copy_(noise + (1.0 if "norm" in key else 0.0))
    return model.eval()
