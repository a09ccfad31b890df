"""Nodes for a server under test that stand in for files: a tiny network of a family, its words, its pictures, its control net.

The networks are those of the sheet of official templates (benchmarks/templates.py), with generated weights.
"""

import importlib.util
import sys
import zlib
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import torch

_FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "templates.py"
_spec = importlib.util.spec_from_file_location("flexi_benchmark_templates", _FILE)
templates = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = templates  # dataclasses look their module up
_spec.loader.exec_module(templates)
FAMILIES = templates.families()
TINY = templates.TinyNodes(FAMILIES)


class Words:
    """A text encoder: what a text is encoded to follows from the text."""

    def __init__(self, family):
        self._family = family

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, tokens, **_):
        return TINY.words(self._family, zlib.crc32(tokens.encode()))


class Pictures:
    """A VAE: eight pixels for each place of the latent, and three of its channels for red, green and blue."""

    def __init__(self, family):
        self._channels = FAMILIES[family].latent[0]

    def decode(self, latent):
        large = latent[:, :3].sigmoid().repeat_interleave(8, -1).repeat_interleave(8, -2)
        return large.movedim(1, -1).contiguous()

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        return small.repeat(1, -(-self._channels // 3), 1, 1)[:, : self._channels]


class Loader:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "Flexiffusion"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": ("STRING", {})}}

    def load(self, family):
        return TINY.model(family), Words(family), Pictures(family)


class ControlLoader(Loader):
    RETURN_TYPES = ("CONTROL_NET",)

    def load(self, family):
        config = {**TINY.model(family).model.model_config.unet_config, "hint_channels": 3}
        del config["out_channels"], config["transformer_depth_output"]
        network = comfy.cldm.cldm.ControlNet(**config, device=torch.device("cpu"))
        rng = torch.Generator().manual_seed(11)
        for value in network.parameters():
            value.data.copy_(torch.randn(value.shape, generator=rng) * value[:1].numel() ** -0.5 / 4)
        return (comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu")),)


NODE_CLASS_MAPPINGS = {"FlexiTinyLoader": Loader, "FlexiTinyControlLoader": ControlLoader}
