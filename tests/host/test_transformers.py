"""Transformers of the host, every family tiny and with random weights: partial steps through the hooks that it offers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexi_core.networks.block_lists import find_block_lists
from flexi_core.networks.transformer import ModelCall, TransformerSteps

MIXED = "2*(F)|FPX@2|FPN@2"  # FFFPXFPN
DEPTH, FULL, PARTIAL = 2, 4, 2  # of its partial steps; steps of these kinds
CPU = torch.device("cpu")
TOKENS = 4
SIZE = {"hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0}
STACK = {**SIZE, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True}
ROPE = {"axes_dim": [8, 12, 12], "theta": 10000}
NEWER = {"txt_ids_dims": [], "vec_in_dim": None}  # off; see `build`
WAN = {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 4}
HUNYUAN = {**STACK, "context_in_dim": 32, "theta": 256, "guidance_embed": False, "byt5": False}
HUNYUAN |= {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
FLUX = {**STACK, **ROPE, "in_channels": 16, "out_channels": 16, "patch_size": 2, "guidance_embed": True}
FLUX |= {"vec_in_dim": 32, "context_in_dim": 32, "txt_ids_dims": []}


PREDICT2 = {"max_img_h": 16, "max_img_w": 16, "max_frames": 4, "in_channels": 16, "out_channels": 16, "patch_spatial": 2}
PREDICT2 |= {"patch_temporal": 1, "model_channels": 64, "num_blocks": 4, "num_heads": 2, "crossattn_emb_channels": 32}
PREDICT2 |= {"pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16, "rope_enable_fps_modulation": False}
LUMINA = {"in_channels": 16, "dim": 64, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 32}
KANDINSKY = {"in_text_dim": 32, "in_text_dim2": 32, "time_dim": 32, "model_dim": 64, "ff_dim": 128, "num_visual_blocks": 4}
KANDINSKY |= {"axes_dims": (8, 12, 12)}
ZIMAGE = {"dim": 256, "n_heads": 8, "n_kv_heads": 8, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 8}
LUMINA |= {"qk_norm": True, "cap_feat_dim": 32, "axes_dims": [8, 12, 12], "axes_lens": [32, 32, 32]}
FLUX2 = {**FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "axes_dim": [8, 8, 8, 8]}
FLUX2 |= {"txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False}
FLUX2 |= {"default_ref_method": "index", "ref_index_scale": 10.0}


def blocks(**counts: int) -> tuple[tuple[str, int], ...]:
    return tuple((kind, i) for kind, count in counts.items() for i in range(count))


def nothing(random: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {}


def mask(random: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}


def two_encoders(random: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {**mask(random), "conditioning_mt5xl": random(1, 6, 32), "attention_mask_mt5xl": torch.ones(1, 6)}


def number_embedders() -> dict[str, torch.Tensor]:
    from comfy.ldm.audio.embedders import NumberConditioner

    weights = NumberConditioner(768, min_val=0, max_val=512).state_dict()
    return {f"conditioner.conditioners.seconds_{end}.{name}": w for end in ("start", "total") for name, w in weights.items()}


@dataclass(frozen=True)
class Family:
    """A tiny network of a family.

    Args:
        config: class of the host's supported models.
        network: what the host's detection would find in a weights file.
        latent: shape of one latent, or of its streams.
        blocks: those that it offers to hooks, in the order in which they run.
        conditions: what a prompt carries beside its tokens, from a function that makes random tensors.
        tokens: width of a prompt's tokens.
        weights: that the host's model takes from the file itself.
        trim: makes parts of the network small that have no setting, and buffers that a weights file would fill.
        counts: whether its code runs on the meta device, where its MACs are counted.
        latents: how many one run samples.
    """

    config: str
    network: dict[str, Any]
    latent: tuple[int, ...] | tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[str, int], ...] = ()
    conditions: Callable[[Callable[..., torch.Tensor]], dict[str, Any]] = nothing
    tokens: int = 32
    weights: Callable[[], dict[str, torch.Tensor]] = dict
    trim: Callable[[Any], Any] = id
    counts: bool = True
    latents: int = 2


FAMILIES = {
    "Flux": Family(
        "Flux",
        FLUX,
        (16, 8, 8),
        blocks(double_block=2, single_block=2),
    ),
    "Flux Kontext": Family(
        "Flux",
        FLUX,
        (16, 8, 8),
        blocks(double_block=2, single_block=2),
        lambda random: {"reference_latents": [random(1, 16, 6, 6)]},
    ),
    "Chroma": Family(
        "Chroma",
        {**STACK, **ROPE, "in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": 32}
        | {"in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1, **NEWER},
        (16, 8, 8),
        blocks(double_block=2, single_block=2),
    ),
    "Chroma Radiance": Family(
        "ChromaRadiance",
        {**STACK, **ROPE, "in_channels": 3, "out_channels": 3, "patch_size": 16, "context_in_dim": 32}
        | {
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 32,
            "n_layers": 1,
            **NEWER,
            "use_x0": False,
            "use_sequential_txt_ids": False,
            "nerf_hidden_size": 16,
            "nerf_mlp_ratio": 2,
        }
        | {"nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 32, "nerf_final_head_type": "conv"}
        | {"nerf_embedder_dtype": torch.float32},
        (3, 32, 32),
        blocks(double_block=2, single_block=2),
    ),
    "AuraFlow": Family(
        "AuraFlow",
        {"dim": 64, "n_layers": 4, "n_double_layers": 2, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 32, "max_seq": 16},
        (4, 8, 8),
        blocks(double_block=2, single_block=2),
    ),
    "HunyuanVideo": Family(
        "HunyuanVideo",
        {**HUNYUAN, "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "axes_dim": [8, 12, 12]}
        | {"vec_in_dim": 32, "meanflow": False},
        (16, 2, 8, 8),
        blocks(double_block=2, single_block=2),
    ),
    "HunyuanImage 2.1": Family(
        "HunyuanImage21",
        {**HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [16, 16]}
        | {"vec_in_dim": None, "meanflow": True},  # the distilled model: it reads the noise level of the next step too
        (64, 4, 4),
        blocks(double_block=2, single_block=2),
    ),
    "Hunyuan3D 2": Family(
        "Hunyuan3Dv2",
        {**STACK, "in_channels": 64, "context_in_dim": 32, "guidance_embed": False},
        (64, 16),
        blocks(double_block=2, single_block=2),
    ),
    "Hunyuan3D 2.1": Family(
        "Hunyuan3Dv2_1",
        {"in_channels": 64, "hidden_size": 64, "context_dim": 32, "depth": 5, "num_heads": 2, "num_moe_layers": 2}
        | {"num_experts": 4, "guidance_cond_proj_dim": None},
        (64, 16),
        blocks(block=5),
    ),
    "SD3": Family(
        "SD3",
        {"in_channels": 16, "out_channels": 16, "depth": 2, "num_blocks": 4, "adm_in_channels": 32}
        | {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}},
        (16, 8, 8),
        blocks(double_block=4),
    ),
    "Wan 2.1": Family("WAN21_T2V", {**WAN, "model_type": "t2v"}, (16, 2, 8, 8), blocks(double_block=4)),
    "Wan 2.1 image to video": Family(
        "WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}, (16, 2, 8, 8), blocks(double_block=4)
    ),
    "Wan 2.1 VACE": Family(
        "WAN21_Vace",
        {**WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96},
        (16, 2, 8, 8),
        blocks(double_block=4),
    ),
    "Wan 2.2 5B": Family(
        "WAN22_T2V", {**WAN, "model_type": "t2v", "in_dim": 48, "out_dim": 48}, (48, 2, 8, 8), blocks(double_block=4)
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
        | {"axes_dims_rope": (8, 12, 12)},
        (16, 1, 8, 8),
        blocks(double_block=4),
    ),
    "LTXV": Family(
        "LTXV",
        {
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "cross_attention_dim": 64,
            "caption_channels": 32,
        },
        (128, 2, 4, 4),
        blocks(double_block=4),
        mask,
    ),
    "LTX-2 (pictures and sound)": Family(
        "LTXAV",
        {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "cross_attention_dim": 64}
        | {"audio_attention_head_dim": 16, "audio_num_attention_heads": 2, "audio_cross_attention_dim": 32}
        | {"caption_channels": 32, "connector_attention_head_dim": 16, "connector_num_attention_heads": 2},
        ((128, 2, 4, 4), (8, 6, 16)),
        blocks(double_block=4),
        mask,
        tokens=64,
    ),
    # Takes one latent a call, and its hidden states have no axis for more.
    "MiniMax H3 (pictures and sound)": Family(
        "MiniMaxH3",
        {"hidden_size": 64, "num_layers": 4, "token_refiner_num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}
        | {"ffn_hidden_size": 128, "text_dim": 32, "timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 64}
        | {"rope_inv_freq_len": 4},
        ((24, 2, 4, 4), (32, 2, 8)),
        blocks(double_block=4),
        trim=lambda network: network.rope.inv_freq.copy_(torch.tensor([1.0, 0.5, 0.25, 0.125])),
        latents=1,
        counts=False,  # it reads the noise level as a number
    ),
    "Flux.2": Family(
        "Flux2",
        FLUX2,
        (128, 4, 4),
        blocks(double_block=2, single_block=2),
    ),
    "Flux.2 with a reference": Family(
        "Flux2",
        {**FLUX2, "guidance_embed": False},  # the host takes no time 0 for references beside embedded guidance
        (128, 4, 4),
        blocks(double_block=2, single_block=2),
        lambda random: {"reference_latents": [random(1, 128, 4, 4)]},
    ),
    "LongCat-Image": Family(
        "LongCatImage",
        {**FLUX, "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]},
        (16, 8, 8),
        blocks(double_block=2, single_block=2),
    ),
    "HunyuanVideo 1.5": Family(
        "HunyuanVideo15",
        {**HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "axes_dim": [8, 12, 12]}
        | {"vec_in_dim": None, "meanflow": False, "vision_in_dim": 32, "use_cond_type_embedding": True},
        (32, 2, 4, 4),
        blocks(double_block=2, single_block=2),
    ),
    "Wan 2.2 Animate": Family(
        "WAN22_Animate",
        {**WAN, "num_layers": 5, "model_type": "animate", "in_dim": 36},
        (16, 2, 8, 8),
        blocks(double_block=5),
    ),
    "HiDream-O1": Family(
        "HiDreamO1",
        {
            "text_config_overrides": {
                "vocab_size": 151680,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "rope_dims": [4, 6, 6],
            },
            "vision_config_overrides": {
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 64,
                "depth": 1,
                "deepstack_visual_indexes": (),
            },
        },
        (3, 64, 64),
        blocks(double_block=4),
        lambda random: {"text_input_ids": torch.arange(1, TOKENS + 1)[None]},
        counts=False,
    ),
    "Lens": Family(
        "Lens",
        {"in_channels": 128, "out_channels": 32, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2}
        | {"enc_hidden_dim": 8, "axes_dims_rope": (8, 12, 12)},
        (128, 4, 4),
        blocks(double_block=4),
    ),
    "JoyImage": Family(
        "JoyImage",
        {"hidden_size": 64, "num_attention_heads": 2, "text_dim": 32, "num_layers": 4, "rope_dim_list": [8, 12, 12]},
        (16, 1, 8, 8),
        blocks(double_block=4),
    ),
    "Mage-Flow": Family(
        "MageFlow",
        {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
        | {"axes_dims_rope": (8, 12, 12)},
        (128, 4, 4),
        blocks(double_block=4),
    ),
    "Mochi": Family(
        "GenmoMochi",  # 64 * 192 is the one width of its feed-forward layers that the host allows
        {"depth": 4, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "in_channels": 12}
        | {
            "mlp_ratio_x": 192.0,
            "mlp_ratio_y": 2.0,
            "learn_sigma": False,
            "qk_norm": True,
            "qkv_bias": False,
        }  # 64 * 192 is fixed
        | {"out_bias": True, "attn_drop": 0.0, "timestep_scale": 1000.0, "t5_feat_dim": 32, "t5_token_length": TOKENS}
        | {"use_t5": True, "posenc_preserve_area": True},
        (12, 2, 4, 4),
        blocks(double_block=4),
        mask,
    ),
    "HunyuanDiT": Family(
        "HunyuanDiT",
        {"depth": 6, "hidden_size": 64, "num_heads": 2, "text_states_dim": 32, "text_states_dim_t5": 32, "text_len": TOKENS}
        | {"text_len_t5": 6},
        (4, 8, 8),
        blocks(double_block=6),
        two_encoders,
    ),
    "Stable Audio": Family(
        "StableAudio",
        {"depth": 4, "embed_dim": 768, "num_heads": 12},  # newer hosts project to this width alone
        (64, 16),
        blocks(double_block=4),
        tokens=768,
        weights=number_embedders,
    ),
}

# No hooks: their blocks are found in the network's lists.
LISTED = {
    "HiDream": Family(
        "HiDream",
        {"patch_size": 2, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32}
        | {"num_attention_heads": 2, "caption_channels": [32, 32], "text_emb_dim": 32, "axes_dims_rope": [8, 12, 12]}
        | {"max_resolution": [16, 16], "llama_layers": [0, 1, 0, 1]},
        (16, 8, 8),
        blocks(double_stream_blocks=2, single_stream_blocks=2),
        lambda random: {"conditioning_llama3": random(1, 2, TOKENS, 32)},
        counts=False,
    ),
    "Cosmos Predict2": Family("CosmosT2IPredict2", PREDICT2, (16, 1, 8, 8), blocks(blocks=4)),
    "Anima": Family(
        "Anima",
        PREDICT2,
        (16, 1, 8, 8),
        blocks(blocks=4),
        trim=lambda network: setattr(network, "llm_adapter", nn.Identity()),
    ),
    "Lumina 2": Family("Lumina2", LUMINA, (16, 8, 8), blocks(layers=5), mask),
    "Z-Image": Family(
        "ZImage",
        {**LUMINA, **ZIMAGE},
        (16, 8, 8),
        blocks(layers=5),
        mask,
    ),
    "Z-Image in pixels": Family(
        "ZImagePixelSpace",
        {**LUMINA, **ZIMAGE, "in_channels": 3}
        | {"decoder_hidden_size": 32, "decoder_num_res_blocks": 1, "decoder_max_freqs": 4, "decoder_in_channels": 12},
        (3, 16, 16),
        blocks(layers=5),
        mask,
    ),
    "NewBie": Family("Lumina2", {**LUMINA, "clip_text_dim": 32}, (16, 8, 8), blocks(layers=5), mask),
    "Krea 2": Family(
        "Krea2",
        {"features": 128, "tdim": 32, "txtdim": 32, "heads": 2, "kvheads": 2, "multiplier": 2, "layers": 5, "channels": 16}
        | {"txtlayers": 2, "txtheads": 2, "txtkvheads": 2},
        (16, 1, 8, 8),
        blocks(blocks=5),
        tokens=64,
    ),
    "ErnieImage": Family(
        "ErnieImage",
        {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 128, "text_in_dim": 32}
        | {"rope_axes_dim": (8, 12, 12)},
        (128, 4, 4),
        blocks(layers=4),
    ),
    "Ideogram 4": Family(
        "Ideogram4",
        {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 128, "adaln_dim": 32}
        | {"llm_features_dim": 32, "mrope_section": [4, 6, 6]},
        (128, 4, 4),
        blocks(layers=4),
    ),
    "ACE-Step": Family(
        "ACEStep",
        {"num_layers": 4, "inner_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2, "text_embedding_dim": 32}
        | {"mlp_ratio": 2.0},
        (8, 16, 12),
        blocks(transformer_blocks=4),
        lambda random: {"conditioning_lyrics": torch.ones(1, TOKENS, dtype=torch.long)},
        trim=lambda network: setattr(network.lyric_encoder, "encoders", network.lyric_encoder.encoders[:1]),
        counts=False,
    ),
    "ACE-Step 1.5": Family(
        "ACEStep15",
        {"hidden_size": 64, "encoder_hidden_size": 64, "text_hidden_dim": 32, "num_dit_layers": 4, "num_lyric_layers": 2}
        | {"num_timbre_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 512}
        | {"encoder_intermediate_size": 32, "encoder_num_heads": 2, "fsq_dim": 64, "num_tokenizer_layers": 1},
        (64, 20),
        tuple(("decoder.layers", i) for i in range(4)),
        lambda random: {"conditioning_lyrics": random(1, TOKENS, 32)},
        trim=lambda network: setattr(network.detokenizer, "layers", network.detokenizer.layers[:1]),
        counts=False,
    ),
    "PixArt": Family(
        "PixArtSigma",
        {"hidden_size": 64, "depth": 3, "num_heads": 2, "caption_channels": 32, "model_max_length": TOKENS}
        | {"micro_condition": False, "pe_interpolation": 1},
        (4, 40, 40),
        blocks(blocks=3),
    ),
    "OmniGen2": Family(
        "Omnigen2",
        {"hidden_size": 64, "num_layers": 5, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2}
        | {"multiple_of": 32, "axes_dim_rope": [8, 12, 12], "axes_lens": [64, 64, 64], "text_feat_dim": 32},
        (16, 8, 8),
        blocks(layers=5),
        mask,
    ),
    "Boogu": Family(
        "Boogu",
        {"hidden_size": 64, "num_layers": 3, "num_double_stream_layers": 2, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 32, "axes_dim_rope": [8, 12, 12]}
        | {"axes_lens": [64, 64, 64], "instruction_feat_dim": 32},
        (16, 8, 8),
        blocks(double_stream_layers=2, single_stream_layers=3),
        mask,
    ),
    "CogVideoX": Family(
        "CogVideoX_T2V",
        {"num_attention_heads": 2, "attention_head_dim": 32, "text_embed_dim": 32, "num_layers": 4, "time_embed_dim": 64}
        | {"use_rotary_positional_embeddings": True},
        (16, 2, 8, 8),
        blocks(blocks=4),
    ),
    "PixelDiT": Family(
        "PixelDiTT2I",
        {"hidden_size": 64, "num_groups": 2, "pixel_attn_hidden_size": 64, "pixel_num_groups": 2, "patch_depth": 5}
        | {"pixel_depth": 2, "patch_size": 2, "txt_embed_dim": 32},
        (3, 16, 16),
        blocks(patch_blocks=5),
    ),
    # Its hooks are broken in ComfyUI 0.33.0.
    "Kandinsky 5": Family(
        "Kandinsky5",
        {**KANDINSKY, "visual_embed_dim": 132},
        (16, 2, 8, 8),
        blocks(visual_transformer_blocks=4),
    ),
    "Kandinsky 5 Image": Family(
        "Kandinsky5Image",
        {**KANDINSKY, "visual_embed_dim": 64},
        (16, 8, 8),
        blocks(visual_transformer_blocks=4),
    ),
}
# Nothing of theirs can be skipped, for the reason that the report gives.
WITHOUT = {
    "Stable Cascade": (
        Family(
            "Stable_Cascade_C",
            {"stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 32], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]]}
            | {"c_clip_text": 32, "c_clip_text_pooled": 32},
            (16, 8, 8),
        ),
        "blocks do not run one by one",
    ),
    "Cosmos": (
        Family(
            "CosmosT2V",
            {"max_img_h": 16, "max_img_w": 16, "max_frames": 4, "in_channels": 16, "out_channels": 16, "patch_spatial": 2}
            | {"patch_temporal": 1, "model_channels": 64, "num_blocks": 4, "num_heads": 2, "crossattn_emb_channels": 32}
            | {"block_config": "FA-CA-MLP", "block_x_format": "THWBD", "pos_emb_cls": "rope3d", "affline_emb_norm": True}
            | {"use_adaln_lora": True, "adaln_lora_dim": 16, "extra_per_block_abs_pos_emb": True}
            | {"extra_per_block_abs_pos_emb_type": "learnable"},
            (16, 2, 8, 8),
        ),
        "hand on hidden states whose first axis is not the latents'",
    ),
}


SKIPPED = {**FAMILIES, **LISTED}
COUNTED = [name for name, family in SKIPPED.items() if family.counts]
ALL = {**SKIPPED, **{name: family for name, (family, _) in WITHOUT.items()}}


class Tiny:
    """A model of the host with random weights, and how to sample it."""

    def __init__(
        self,
        host: Any,
        inner: nn.Module,
        shape: tuple[int, ...] | tuple[tuple[int, ...], ...],
        latents: int,
        prompt: Callable[..., tuple],
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        for name, value in inner.named_parameters():
            noise = torch.randn(value.shape, generator=rng)
            if value.ndim > 1:
                noise /= value[0].numel() ** 0.5
            else:
                noise = noise * 0.1 + name.endswith(("weight", "scale", "gamma"))  # those of norms are near 1
            value.data.copy_(noise)
        self.model = host.comfy.model_patcher.ModelPatcher(inner.eval(), load_device=CPU, offload_device=CPU)
        self._host, rng = host, torch.Generator().manual_seed(1)
        self._prompts = [prompt(lambda *shape: torch.randn(shape, generator=rng)) for _ in range(2)]
        if isinstance(shape[0], int):
            self._noise = torch.randn(latents, *shape, generator=rng)
        else:
            from comfy.nested_tensor import NestedTensor

            self._noise = NestedTensor([torch.randn(latents, *stream, generator=rng) for stream in shape])

    def sample(self, model: Any, control: Any = None) -> torch.Tensor:
        """Return a latent, one of several streams packed into one."""
        return self._host.adapter.packed(self.draw(model, control))

    def draw(self, model: Any, control: Any = None) -> Any:
        """Return a latent as the host hands it on."""
        carried = {} if control is None else {"control": control}
        positive, negative = ([[tokens, {**conditions, **carried}]] for tokens, conditions in self._prompts)
        return self._host.sample(model, noise=self._noise, scheduler="simple", positive=positive, negative=negative)

    def another(self) -> Tiny:
        """Return the same model, sampled from other noise."""
        other = copy(self)
        other._noise = self._noise * 2.0
        return other

    def call(self, model: Any) -> ModelCall:
        """Return the first call that sampling makes of the host's model around the network."""
        from comfy.patcher_extension import WrappersMP

        calls: list[ModelCall] = []

        def note(executor, *args, **kwargs):
            calls.append(ModelCall(*args, kwargs=kwargs))
            return executor(*args, **kwargs)

        noted = model.clone()
        noted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", note)
        self.sample(noted)
        return calls[0]


@pytest.fixture(scope="module")
def make(host):
    """A function that returns the tiny model of a family, made once."""
    import comfy.supported_models

    kept: dict[str, Tiny] = {}

    def tiny(name: str) -> Tiny:
        if name not in kept:
            family = ALL[name]
            config = getattr(comfy.supported_models, family.config, None)
            if config is None:
                pytest.skip(f"this host has no {family.config}")
            inner = build(config, family.network, family.weights())
            family.trim(inner.diffusion_model)
            kept[name] = Tiny(host, inner, family.latent, family.latents, lambda random: _prompt(family, random))
        return kept[name]

    return tiny


def build(config: Any, network: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """Return the host's model, without those switches that are off and that an older host does not have."""
    try:
        described = config({**network, "dtype": torch.float32})
        described.unet_config |= network  # some configurations have sizes of their own
        return described.get_model(weights, device=CPU)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        if network.get(unknown[1], True):
            pytest.skip(f"this host's {config.__name__} has no {unknown[1]}")
        return build(config, {key: value for key, value in network.items() if key != unknown[1]}, weights)


def _prompt(family: Family, random: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    return random(1, TOKENS, family.tokens), {"pooled_output": random(1, 32), **family.conditions(random)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value of b."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def assert_partial_steps_equal_the_full_one(call: ModelCall, forward: Callable[..., torch.Tensor], count: int) -> None:
    """Assert the law at the input of the full step, and that the kept feature is what makes it hold."""
    plain = call.run(forward)
    for depth in range(1, count):
        steps = TransformerSteps(forward.__self__.diffusion_model, find_block_lists(forward.__self__))
        full, feature = steps.full(call, forward, depth)
        assert torch.equal(full, plain), depth
        assert distance(steps.partial(call, forward, depth, feature), full) < 1e-5, depth
        empty = {name: None if value is None else torch.zeros_like(value) for name, value in feature.items()}
        assert distance(steps.partial(call, forward, depth, empty), full) > 2e-5, depth


@pytest.mark.matrix("Architectures: transformers", "{family}")
@pytest.mark.parametrize("family", SKIPPED)
def test_mixed_schedules_run_as_planned(make, apply, cell, family):
    tiny = make(family)
    report = cell(tiny.model, tiny.sample, MIXED)
    each = 2 // SKIPPED[family].latents  # a network of one latent a call is asked for each half by itself
    assert [step.network_calls for step in report.steps] == [each * ran for ran in (1, 1, 1, 1, 0, 1, 1, 0)]
    mixed, without_partial = (tiny.sample(apply(tiny.model, text)[0]) for text in (MIXED, "3*(F)|FX|F|FN"))
    assert not torch.equal(mixed, without_partial)


def test_the_report_of_a_latent_of_several_streams_is_found(make, apply):
    tiny = make("LTX-2 (pictures and sound)")
    model, handle = apply(tiny.model, MIXED)
    latent = tiny.draw(model)
    assert latent.is_nested and [tuple(stream.shape) for stream in latent.unbind()] == [(2, 128, 2, 4, 4), (2, 8, 6, 16)]
    report = handle.report
    assert report.letters == "FFFPXFPN"
    tiny.another().draw(model)
    assert handle.report is not report and handle.report_of(latent) is report


@pytest.mark.parametrize("family", SKIPPED)
def test_partial_step_equals_the_full_one_at_its_input_at_every_depth(make, family):
    tiny = make(family)
    assert_partial_steps_equal_the_full_one(tiny.call(tiny.model), tiny.model.model._apply_model, len(SKIPPED[family].blocks))


@pytest.mark.parametrize("family", COUNTED)
def test_the_report_counts_the_blocks_that_ran(make, apply, family):
    tiny, names = make(family), SKIPPED[family].blocks
    model, handle = apply(tiny.model, MIXED)
    latent = tiny.sample(model)
    cost = handle.report.cost
    assert cost is not None
    assert tuple(cost.blocks) == names
    by_depth = [cost.partial_macs[depth] for depth in range(1, len(names))]
    assert by_depth == sorted(set(by_depth)) and by_depth[-1] < cost.full_macs
    assert handle.report.macs == pytest.approx(
        2 * SKIPPED[family].latents * (FULL * cost.full_macs + PARTIAL * cost.macs(DEPTH))
    )
    assert handle.report.predicted_cache_mib == pytest.approx(handle.report.cache_mib)
    assert torch.equal(tiny.sample(model), latent), "counting changed the model"


@pytest.mark.parametrize("family", COUNTED)
def test_the_count_is_that_of_a_pass_with_data(make, apply, family):
    tiny = make(family)
    model, handle = apply(tiny.model, MIXED)
    tiny.sample(model)
    cost, call, forward = handle.report.cost, tiny.call(tiny.model), tiny.model.model._apply_model
    steps = TransformerSteps(tiny.model.model.diffusion_model, find_block_lists(tiny.model.model))

    def macs(run: Callable[[], Any]) -> float:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 2

    rows = call.x.shape[0]
    assert macs(lambda: call.run(forward)) == rows * cost.full_macs
    for depth in range(1, len(SKIPPED[family].blocks)):
        _, feature = steps.full(call, forward, depth)
        assert macs(lambda: steps.partial(call, forward, depth, feature)) == pytest.approx(rows * cost.macs(depth)), depth  # noqa: B023


@pytest.mark.parametrize("family", SKIPPED)
def test_depth_as_large_as_the_network_runs_full_and_says_so(make, apply, family):
    tiny, count = make(family), len(SKIPPED[family].blocks)
    model, handle = apply(tiny.model, f"F|FPP@{count}|FPPP@{count + 7}")
    assert torch.equal(tiny.sample(model), tiny.sample(tiny.model))
    assert handle.report.letters == "F" * 8
    for depth in (count, count + 7):
        assert f"depth {depth} needs more than the network's {count} blocks" in str(handle.report)


@pytest.mark.matrix("Architectures: transformers", "{family}")
@pytest.mark.parametrize("family", WITHOUT)
def test_networks_with_nothing_to_skip_run_their_partial_steps_in_full_and_say_so(make, apply, cell, family):
    tiny = make(family)
    _, reason = WITHOUT[family]
    does = f"full, removed, extrapolated steps as planned; partial ones run in full: {reason}"
    report = cell(tiny.model, tiny.sample, MIXED, ran="FFFFXFFN", does=does)
    assert [step.network_calls for step in report.steps] == [1, 1, 1, 1, 0, 1, 1, 0]
    assert reason in str(report)
    assert report.speedup_macs in (None, pytest.approx(8 / 6))
    mixed, without_partial = (tiny.sample(apply(tiny.model, text)[0]) for text in (MIXED, "3*(F)|FX|F|FN"))
    assert torch.equal(mixed, without_partial)


@pytest.fixture
def kv_cached(make, extra):
    """A tiny Flux.2 with a reference picture under the host's own FluxKVCache, and how to sample it."""
    node = extra("flux", "FluxKVCache")
    tiny = make("Flux.2 with a reference")
    return tiny, node(tiny.model)[0]


@pytest.mark.matrix("Architectures: transformers", "Flux.2 with a reference under FluxKVCache")
def test_cached_keys_of_a_reference_reach_partial_steps(kv_cached, cell):
    tiny, model = kv_cached
    assert distance(tiny.sample(model), tiny.sample(tiny.model)) > 1e-4, "the node does nothing here"
    cell(model, tiny.sample, MIXED)
    call, forward = tiny.call(model), tiny.model.model._apply_model
    with torch.no_grad():
        call.run(forward)  # the first call has the reference's tokens, and its keys are kept
    assert_partial_steps_equal_the_full_one(call, forward, len(SKIPPED["Flux.2"].blocks))


@pytest.mark.matrix("Architectures: transformers", "Flux.2 under FluxKVCache, a partial step right behind the first one")
def test_the_step_behind_the_one_with_the_references_tokens_runs_full_and_says_so(kv_cached, cell, apply):
    tiny, model = kv_cached
    does = "one full step, where the reference's tokens are gone; the next are partial"
    report = cell(model, tiny.sample, "FPPP@2|FPP@2|F", ran="FFPPFPPF", does=does)
    assert "blocks of another size" in str(report)
    patched, handle = apply(model, "FP@2|6*(F)")
    assert torch.equal(tiny.sample(patched), tiny.sample(model)) and handle.report.letters == "F" * 8


def louder(out: Any) -> Any:
    return {**out, "img": out["img"] * 1.5} if isinstance(out, dict) else out * 1.5


@pytest.mark.matrix("Architectures: transformers", "{family} with another pack's replace hooks")
@pytest.mark.parametrize("family", ["Flux", "SD3", "Hunyuan3D 2.1"])
def test_another_packs_hook_is_called_wherever_its_block_runs(make, apply, cell, family):
    tiny, names = make(family), SKIPPED[family].blocks
    hooked, seen = tiny.model.clone(), []

    def hook(key):
        def replaced(args, extra):
            seen.append(key)
            return louder(extra["original_block"](args))

        return replaced

    for key in (names[0], names[-1]):
        hooked.set_model_patch_replace(hook(key), "dit", *key)
    cell(hooked, tiny.sample, MIXED)
    seen.clear()
    with_hooks = tiny.sample(apply(hooked, MIXED)[0])
    assert Counter(seen) == {names[0]: FULL + PARTIAL, names[-1]: FULL}
    assert distance(tiny.sample(apply(tiny.model, MIXED)[0]), with_hooks) > 1e-3
    assert_partial_steps_equal_the_full_one(tiny.call(hooked), tiny.model.model._apply_model, len(names))


# By family: the residuals that its control nets give, their tokens, their width.
CONTROLLED = {
    "Flux": ({"input": 2, "output": 2}, 16, 64),
    "Chroma": ({"input": 2, "output": 2}, 16, 64),
    "HunyuanVideo": ({"input": 2, "output": 2}, 32, 64),
    "Qwen-Image": ({"input": 4}, 16, 64),
    "SD3": ({"output": 4}, 16, 128),
}


@pytest.fixture
def control(host):
    """A function that returns a control net of a family, with random residuals that depend on nothing."""
    import comfy.controlnet

    class Residuals(comfy.controlnet.ControlBase):
        def __init__(self, residuals: dict[str, list[torch.Tensor]]) -> None:
            super().__init__()
            self.residuals = residuals

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            return {name: [value.expand(len(x_noisy), -1, -1) for value in values] for name, values in self.residuals.items()}

        def copy(self):
            return Residuals(self.residuals)

    def make_control(family: str) -> Residuals:
        counts, tokens, width = CONTROLLED[family]
        rng = torch.Generator().manual_seed(2)
        return Residuals(
            {name: [torch.randn(1, tokens, width, generator=rng) for _ in range(count)] for name, count in counts.items()}
        )

    return make_control


@pytest.mark.matrix("Architectures: transformers", "{family} with a control net")
@pytest.mark.parametrize("family", CONTROLLED)
def test_control_nets_reach_partial_steps(make, apply, cell, control, family):
    tiny, net = make(family), control(family)
    cell(tiny.model, lambda model: tiny.sample(model, net), MIXED)
    model, _ = apply(tiny.model, MIXED)
    assert distance(tiny.sample(model, net), tiny.sample(model)) > 1e-3


@pytest.mark.parametrize("family", CONTROLLED)
def test_partial_step_under_a_control_net_equals_the_full_one_at_every_depth(make, control, family):
    tiny, forward = make(family), make(family).model.model._apply_model
    call = tiny.call(tiny.model)
    controlled = replace(call, control=control(family).get_control(call.x, None, None, None, None))
    with torch.no_grad():
        assert distance(controlled.run(forward), call.run(forward)) > 1e-3
    assert_partial_steps_equal_the_full_one(controlled, forward, len(SKIPPED[family].blocks))


@pytest.mark.parametrize("family", ["Flux", "SD3", "Wan 2.1"])
def test_cond_and_uncond_in_one_call_and_in_two_give_the_same_latents(make, apply, monkeypatch, family):
    tiny = make(family)
    model, handle = apply(tiny.model, MIXED)
    together = tiny.sample(model)
    calls = sum(step.network_calls for step in handle.report.steps)
    monkeypatch.setattr(tiny.model.model, "memory_usage_factor", 1e12)  # the host splits what does not fit its estimate
    apart = tiny.sample(model)
    assert sum(step.network_calls for step in handle.report.steps) == 2 * calls
    assert handle.report.letters == "FFFPXFPN"
    assert distance(apart, together) < 1e-4


class Stranger(nn.Module):
    """A network of no family that the pack could know: its blocks take turns under names of its own."""

    KINDS = ("near", "far")

    def __init__(self, dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__()
        self.dtype = dtype
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs):
        hooks = transformer_options.get("patches_replace", {}).get("dit", {})
        h = self.into(x.flatten(2).transpose(1, 2)) + timesteps[:, None, None] / 1000
        for i, layer in enumerate(self.layers):
            key = (self.KINDS[i % 2], i // 2)

            def block(args, layer=layer):
                return {"img": args["img"] + torch.tanh(layer(args["img"]) + args["txt"].mean(1, keepdim=True))}

            args = {"img": h, "txt": context[..., :16]}
            h = (hooks[key](args, {"original_block": block}) if key in hooks else block(args))["img"]
        return self.out(h).transpose(1, 2).reshape(x.shape)


@pytest.mark.matrix("Architectures: transformers", "a network that the pack has never seen, with the same hooks")
def test_a_network_of_an_unknown_class_gets_partial_steps_at_once(host, apply, cell):
    import comfy.model_base
    import comfy.supported_models_base

    class Config(comfy.supported_models_base.BASE):
        unet_config: dict[str, Any] = {}
        unet_extra_config: dict[str, Any] = {}

    inner = comfy.model_base.BaseModel(
        Config({"dtype": torch.float32}), comfy.model_base.ModelType.FLOW, device=CPU, unet_model=Stranger
    )
    tiny = Tiny(host, inner, (4, 8, 8), 2, lambda random: (random(1, TOKENS, 32), {}))
    report = cell(tiny.model, tiny.sample, MIXED)
    names = [("near", 0), ("far", 0), ("near", 1), ("far", 1), ("near", 2), ("far", 2)]
    assert list(report.cost.blocks) == names
    assert report.predicted_cache_mib == pytest.approx(report.cache_mib)
    assert_partial_steps_equal_the_full_one(tiny.call(tiny.model), inner._apply_model, len(names))
