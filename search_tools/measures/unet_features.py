"""What Frechet distances of an unknown model are measured on: the middle block of its own U-Net, with nothing downloaded."""

from __future__ import annotations

import torch

from flexi_core.demo.model import SmallModel
from flexi_core.networks.unet import NetworkCall, block_count, full_pass

_TIMESTEP = 50  # of 1000: the network expects a picture with little noise, and still looks at what the picture is of
_BATCH = 16


class MiddleBlockFeatures:
    """The feature after the middle block, averaged over its places [N, D]; the picture is read without conditioning or noise.

    Args:
        model: the teacher's.
    """

    name = "the teacher's middle block"

    def __init__(self, model: SmallModel) -> None:
        self._model = model

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._read(rows) for rows in latents.split(_BATCH)])

    @torch.inference_mode()
    def _read(self, latents: torch.Tensor) -> torch.Tensor:
        unet, timestep = self._model.unet, torch.tensor([_TIMESTEP])
        _, uncond = self._model.conditioning(None, len(latents))
        scaled = latents / (self._model.sigma(timestep.float()) ** 2 + 1).sqrt()
        call = NetworkCall(scaled, timestep.expand(len(latents)), uncond)
        # What enters the deepest output block is what left the middle block.
        _, feature = full_pass(unet, call, unet._forward, block_count(unet))
        return feature.mean(dim=(2, 3))
