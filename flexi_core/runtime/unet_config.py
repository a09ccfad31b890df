"""The arguments of the host's `UNetModel`, read from a file, as those of this project's own `UNet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FlexiError
from .unet import GROUPS

_NEEDED = (
    "in_channels",
    "out_channels",
    "model_channels",
    "num_res_blocks",
    "transformer_depth",
    "transformer_depth_output",
    "transformer_depth_middle",
)
# The host's own value for an argument that is left out.
_DEFAULTS = {
    "channel_mult": [1, 2, 4, 8],
    "num_heads": -1,
    "num_head_channels": -1,
    "context_dim": None,
    "use_scale_shift_norm": False,
    "use_linear_in_transformer": False,
}
# What an argument has to be, because this runtime has nothing else: the host's own defaults.
_FIXED = {
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "resblock_updown": False,
    "n_embed": None,
    "num_attention_blocks": None,
    "disable_self_attentions": None,
    "disable_middle_self_attn": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
# What says nothing about the prediction of such a network: training, precision and place, and what only temporal layers or
# `num_classes` read. `legacy` changes how the host writes the heads' width, not what it is.
_IGNORED = {
    "image_size",
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_bf16",
    "dtype",
    "device",
    "operations",
    "attn_precision",
    "legacy",
    "num_heads_upsample",
    "use_new_attention_order",
    "use_spatial_transformer",
    "adm_in_channels",
    "time_context_dim",
    "extra_ff_mix_layer",
    "use_spatial_context",
    "merge_strategy",
    "merge_factor",
    "video_kernel_size",
    "disable_temporal_crossattention",
    "max_ddpm_temb_period",
}


# What is allocated for a configuration is bounded before it is: far beyond any U-Net of this layout.
_MOST = {
    "in_channels": 1_024,
    "out_channels": 1_024,
    "model_channels": 8_192,
    "num_heads": 1_024,
    "num_head_channels": 8_192,
    "context_dim": 65_536,
    "transformer_depth_middle": 64,
    "transformer_depth": 64,
    "transformer_depth_output": 64,
    "attention_resolutions": 2**16,
    "num_res_blocks": 32,
    "channel_mult": 64,
}
_MOST_LEVELS = 16
_MOST_VALUES = 1_024  # in a list
_MOST_BLOCKS, _MOST_TRANSFORMERS = 64, 512


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `UNet` for those of the host's `UNetModel`.

    As the host's own loader does, `num_res_blocks` may be one number, and `attention_resolutions` with one
    `transformer_depth` may stand for the lists of depths.

    Raises:
        FlexiError: an argument is missing, is not known, or asks for what this runtime does not have.
    """
    config = dict(config)
    for name in sorted(config.keys() - {*_NEEDED, *_DEFAULTS, *_FIXED, *_IGNORED, "attention_resolutions"}):
        raise FlexiError(f"unet_config has {name!r}, which is no argument of the host's UNetModel; leave it out")
    for name, most in _MOST.items():
        _check_size(name, config.get(name), most)
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            raise FlexiError(f"unet_config has {name} = {config[name]!r}; this runtime has nothing but {only!r} there")
    config = _DEFAULTS | config
    if isinstance(config.get("num_res_blocks"), int) and isinstance(config["channel_mult"], list):
        config["num_res_blocks"] = [config["num_res_blocks"]] * len(config["channel_mult"])
    if "attention_resolutions" in config:
        config |= _depths(config)
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise FlexiError(f"unet_config lacks {', '.join(missing)}; give the arguments of the host's UNetModel")
    arguments = {name: config[name] for name in (*_NEEDED, *_DEFAULTS)}
    arguments["context_dim"] = _one_width(arguments["context_dim"])
    _check(arguments)
    return arguments


def _check_size(name: str, value: Any, most: int) -> None:
    """Refuse numbers that no network has, and truth values, which would pass for numbers."""
    values = value if isinstance(value, list) else [value]
    longest = _MOST_LEVELS if name == "channel_mult" else _MOST_VALUES
    if len(values) > longest:
        raise FlexiError(f"unet_config has {len(values)} values for {name}; at most {longest} are taken")
    for each in values:
        if isinstance(each, bool) or (isinstance(each, int | float) and not -2 <= each <= most):
            raise FlexiError(f"unet_config has {name} = {each!r}; expected a whole number up to {most}")


def _depths(config: dict[str, Any]) -> dict[str, Any]:
    """Return the depths of transformers that `attention_resolutions` stands for, as the host's `convert_config` does."""
    blocks, depth, at = config.get("num_res_blocks"), config.get("transformer_depth", 1), config["attention_resolutions"]
    if not _whole_numbers(blocks) or not _whole_numbers(at):
        raise FlexiError("unet_config has attention_resolutions, which needs num_res_blocks beside it, both as whole numbers")
    by_level = [depth] * len(blocks) if isinstance(depth, int) else depth
    if not _whole_numbers(by_level) or len(by_level) != len(blocks):
        raise FlexiError(f"unet_config has transformer_depth = {depth!r} beside attention_resolutions; give one for each level")
    middle = config.get("transformer_depth_middle")
    used = [d if 2**level in at else 0 for level, d in enumerate(by_level)]
    return {
        "transformer_depth": [d for d, count in zip(used, blocks, strict=True) for _ in range(count)],
        "transformer_depth_output": [d for d, count in zip(used, blocks, strict=True) for _ in range(count + 1)],
        "transformer_depth_middle": by_level[-1] if middle is None else middle,
    }


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _one_width(context_dim: Any) -> Any:
    """Return the width of the context tokens where the host has it as a list, one for each transformer block."""
    if isinstance(context_dim, list) and context_dim and all(width == context_dim[0] for width in context_dim):
        return context_dim[0]
    return context_dim


def _check(arguments: dict[str, Any]) -> None:
    for name in ("in_channels", "out_channels", "model_channels", "num_heads", "num_head_channels", "transformer_depth_middle"):
        if not isinstance(arguments[name], int):
            raise FlexiError(f"unet_config has {name} = {arguments[name]!r}; expected a whole number")
    for name in ("channel_mult", "num_res_blocks", "transformer_depth", "transformer_depth_output"):
        if not _whole_numbers(arguments[name]):
            raise FlexiError(f"unet_config has {name} = {arguments[name]!r}; expected a list of whole numbers")
    mult, blocks = arguments["channel_mult"], arguments["num_res_blocks"]
    for name, expected in (
        ("num_res_blocks", len(mult)),
        ("transformer_depth", sum(blocks)),
        ("transformer_depth_output", sum(blocks) + len(blocks)),
    ):
        if len(arguments[name]) != expected:
            raise FlexiError(f"unet_config has {len(arguments[name])} values for {name}; its levels and blocks need {expected}")
    if arguments["model_channels"] < 1 or arguments["model_channels"] % GROUPS:
        raise FlexiError(
            f"unet_config has model_channels = {arguments['model_channels']}; the layout needs a multiple of {GROUPS}"
        )
    if arguments["in_channels"] != arguments["out_channels"]:
        raise FlexiError(
            f"unet_config has in_channels = {arguments['in_channels']} and out_channels = {arguments['out_channels']}; "
            "only a network that takes the noisy latent alone can be sampled here"
        )
    transformers = sum(arguments["transformer_depth"]) + sum(arguments["transformer_depth_output"])
    if sum(blocks) > _MOST_BLOCKS or transformers > _MOST_TRANSFORMERS:
        raise FlexiError(
            f"unet_config has {sum(blocks)} blocks and {transformers} transformers; at most {_MOST_BLOCKS} and "
            f"{_MOST_TRANSFORMERS} are made"
        )
    if min(arguments["in_channels"], arguments["context_dim"] if isinstance(arguments["context_dim"], int) else 1) < 1:
        raise FlexiError("unet_config has in_channels or a context_dim below 1; give the network's own")
    if not mult or min(mult) < 1 or mult[0] != 1:
        raise FlexiError(f"unet_config has channel_mult = {mult}; its first value has to be 1, as in the host")
    if arguments["transformer_depth_middle"] < -1:
        raise FlexiError("unet_config has no middle block (transformer_depth_middle below -1); this runtime needs one")
    _check_transformers(arguments)


def _check_transformers(arguments: dict[str, Any]) -> None:
    blocks, mult, middle = arguments["num_res_blocks"], arguments["channel_mult"], arguments["transformer_depth_middle"]
    width, heads = arguments["num_head_channels"], arguments["num_heads"]
    at_input = [m for m, count in zip(mult, blocks, strict=True) for _ in range(count)]
    at_output = [m for m, count in zip(mult, blocks, strict=True) for _ in range(count + 1)]
    depths = list(zip(at_input, arguments["transformer_depth"], strict=True))
    depths += zip(at_output, arguments["transformer_depth_output"], strict=True)
    if any(depth > 0 for _, depth in [*depths, (0, middle)]) and not isinstance(arguments["context_dim"], int):
        raise FlexiError(
            f"unet_config has transformers and context_dim = {arguments['context_dim']!r}; give their tokens' width"
        )
    levels = {m for m, depth in depths if depth > 0} | ({mult[-1]} if middle >= 0 else set())
    if levels and max(width, heads) < 1:
        raise FlexiError("unet_config has neither num_heads nor num_head_channels; give one of them")
    for channels in (m * arguments["model_channels"] for m in levels):
        if channels % max(heads if width == -1 else width, 1):
            raise FlexiError(f"unet_config has transformers of {channels} channels, which its attention heads do not divide")
