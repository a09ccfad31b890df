"""The held-back U-Net as nodes of the host: its file as a MODEL, a class as CONDITIONING, an empty latent."""

import json

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from safetensors import safe_open


class _Latents(comfy.latent_formats.LatentFormat):
    latent_channels = 12


class _Config(comfy.supported_models_base.BASE):
    unet_config = {}
    unet_extra_config = {}  # the host's own would overwrite num_heads
    latent_format = _Latents
    memory_usage_factor = 1.0
    sampling_settings = {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012}


def _read(file):
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return json.loads(opened.metadata()["unet_config"]), tensors, tensors.pop("class_embedding.weight")


class Model:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "Flexiffusion benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def load(self, file):
        config, tensors, _ = _read(file)
        described = _Config({**config, "use_spatial_transformer": True, "legacy": False, "dtype": torch.float32})
        model = comfy.model_base.BaseModel(described, comfy.model_base.ModelType.V_PREDICTION)
        model.diffusion_model.load_state_dict(tensors)
        management = comfy.model_management
        devices = {"load_device": management.get_torch_device(), "offload_device": management.unet_offload_device()}
        return (comfy.model_patcher.ModelPatcher(model.eval(), **devices),)


class Class:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "Flexiffusion benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "text": ("STRING", {})}}

    def encode(self, file, text):
        """The token of a class number; the last row, none, for the empty text."""
        table = _read(file)[2]
        return ([[table[int(text) if text else -1].view(1, 1, -1), {}]],)


class Latent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "Flexiffusion benchmarks"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return ({"samples": torch.zeros(1, 12, 16, 16)},)


NODE_CLASS_MAPPINGS = {"HeldBackModel": Model, "HeldBackClass": Class, "HeldBackLatent": Latent}
