# ruff: noqa: C408, E501, E741
"""Tiny configs of every MoE family transformers has, and how to build a model from one.

H 32, I 12, D 20, S 28, E 4, vocabulary 64: no two sizes alike, so that a wrong axis shows.
"""

from __future__ import annotations

from typing import Any

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

TEXT: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": PLAIN | SHARED,
    "qwen3_moe": PLAIN,
    "qwen3_next": PLAIN | SHARED | LINEAR,
    "qwen3_5_moe_text": PLAIN | SHARED | LINEAR,
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
        n_routed_experts=E, n_shared_experts=1, q_lora_rank=16, o_lora_rank=8, o_groups=2, qk_rope_head_dim=4
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
    "mellum": PLAIN | FULL | dict(mlp_layer_types=["sparse"] * 3),
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
    "doge": dict(num_experts=E, intermediate_size=D, num_experts_per_tok=2, is_moe=True, num_keys=4),
}  # fmt: skip


def _text(name: str, **more: Any) -> dict[str, Any]:
    return BASE | TEXT[name] | more


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
    "kimi_k25": dict(text_config=_text("deepseek_v3", model_type="deepseek_v3"), vision_config=VISION),
    "qwen3_omni_moe_thinker": dict(
        text_config=_text("qwen3_vl_moe_text", rope_parameters=ROPE), vision_config=VISION,
        audio_config=dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
                          output_dim=H, n_window=4),
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

# Models no Auto class builds.
_CLASSES = {
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
}


def build(name: str, seed: int = 1) -> Any:
    """A model with random weights, buffers that are saved included; raises what transformers raises."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    options = COMPOSITE[name] if name in COMPOSITE else BASE | TEXT[name]
    config = AutoConfig.for_model(name, **options)
    if name in _CLASSES:
        model = getattr(transformers, _CLASSES[name])._from_config(config, attn_implementation="eager")
    else:
        first = AutoModelForImageTextToText if name in COMPOSITE else AutoModelForCausalLM
        known = type(config) in first._model_mapping
        model = (first if known else AutoModel).from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.copy_(noise + (1.0 if "norm" in key else 0.0))
    return model.eval()
