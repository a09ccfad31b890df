"""The embedded model: weights and captions; and what every small model has: a U-Net, noise levels, a kind of prediction."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FlexiError
from ..runtime.unet import UNet
from ..stages.bounds import Stages
from ..tensor_files import save_tensors
from .captions import embed_captions
from .scenes import IMAGE_SIZE, Caption

WEIGHTS = Path(__file__).parent / "weights" / "unet.safetensors"
DEFAULT_CFG = 3.0
LATENT_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
TOKEN_TABLE = "token_embedding.weight"
PREDICTIONS = ("eps", "v")
BETA_SCHEDULE = "linear 0.00085 0.012"  # Stable Diffusion's: linear in the square root


def training_sigmas(beta_schedule: str) -> torch.Tensor:
    """Return the 1000 training noise levels, ascending, of `linear START END` (betas linear in the square root).

    Raises:
        FlexiError: the text has another form, or its betas are not between 0 and 1.
    """
    try:
        kind, *ends = beta_schedule.split()
        start, end = map(float, ends)
    except ValueError:
        kind, start, end = "", 0.0, 0.0
    if kind != "linear" or not 0 < start <= end < 1:
        raise FlexiError(f"the beta_schedule is {beta_schedule!r}; expected `linear START END`, such as linear 0.00085 0.012")
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()


class SmallModel(ABC):
    """A U-Net with the noise levels that it was trained on: what the embedded runtime samples.

    Args:
        unet: the network.
        sigmas: training noise levels [1000], ascending.
        prediction: what the network predicts, one of `PREDICTIONS`.
        latent_shape: of one sample (C, H, W).
    """

    def __init__(
        self, unet: UNet, sigmas: torch.Tensor, prediction: str = "eps", latent_shape: tuple[int, int, int] = LATENT_SHAPE
    ) -> None:
        self.unet, self.sigmas, self.prediction, self.latent_shape = unet, sigmas, prediction, latent_shape

    stages: Stages | None = None  # of noise levels with a network each

    def network(self, sigma: float) -> UNet:
        """Return the network of a noise level: one for all, but in a stage model."""
        return self.unet

    @abstractmethod
    def conditioning(self, prompts: Sequence[Any] | None, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return context tokens [count, M, D] with and without the prompts; None and None where the model takes none."""

    @cached_property
    def _log_sigmas(self) -> torch.Tensor:
        return self.sigmas.log()

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the nearest training timestep [B], 0..999, of noise levels [B], in log sigma."""
        return (sigma.log()[None] - self._log_sigmas[:, None]).abs().argmin(dim=0)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the noise level of fractional timesteps, log-linear between the training levels."""
        low, high, weight = timestep.floor().long(), timestep.ceil().long(), timestep.frac()
        return ((1 - weight) * self._log_sigmas[low] + weight * self._log_sigmas[high]).exp()

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return the denoised latent that the network's output stands for.

        Args:
            x: noisy latent [B, C, H, W], x0 + sigma noise.
            sigma: noise level, scalar.
            output: of the network for x / sqrt(sigma^2 + 1).
        """
        if self.prediction == "eps":
            return x - sigma * output
        # v = (noise - sigma x0) / sqrt(sigma^2 + 1) (Salimans and Ho, 2022, Appendix D), solved for x0.
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()


class DemoModel(SmallModel):
    """An eps-predicting U-Net on Stable Diffusion's noise levels, for captioned 32x32 scenes.

    Args:
        unet: the network.
        token_table: embedding table of the caption tokens [rows, D].
        unet_config: the arguments that the network was made with, also the host's.
        sigmas: training noise levels [1000], ascending.
    """

    def __init__(self, unet: UNet, token_table: torch.Tensor, unet_config: dict, sigmas: torch.Tensor) -> None:
        super().__init__(unet, sigmas)
        self.token_table, self.unet_config = token_table, unet_config

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> DemoModel:
        """Return the model of a weights file.

        Raises:
            FlexiError: the file is missing or not a demo model.
        """
        config, weights, beta_schedule = read_weights(path)
        table = weights.pop(TOKEN_TABLE)
        unet = UNet(**config)
        unet.load_state_dict(weights)
        return cls(unet.eval().requires_grad_(False), table, config, training_sigmas(beta_schedule))

    def save(self, path: Path, unet: UNet, **metadata: str) -> None:
        """Write the model's weights file, in float32.

        Args:
            path: safetensors.
            unet: in place of the model's own.
            metadata: more of it.
        """
        config = {"unet_config": json.dumps(self.unet_config), "prediction": self.prediction, "beta_schedule": BETA_SCHEDULE}
        save_tensors({**unet.state_dict(), TOKEN_TABLE: self.token_table}, path, {**metadata, **config})

    def context(self, captions: Sequence[Caption]) -> torch.Tensor:
        """Return the conditioning tokens [n, 5, D]."""
        return embed_captions(self.token_table, captions)

    def conditioning(self, prompts: Sequence[Caption] | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of captions, and those of the empty caption [count, 5, D]."""
        free = [Caption()] * count
        return self.context(free if prompts is None else prompts), self.context(free)


def read_weights(path: Path = WEIGHTS) -> tuple[dict, dict[str, torch.Tensor], str]:
    """Return the U-Net's configuration, its float32 tensors with the token table, and the beta schedule of a weights file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict: it cannot be iterated)
    except (OSError, SafetensorError) as error:
        raise FlexiError(f"{path}: the embedded model's weights cannot be read ({error}); run flexi train-demo") from error
    if not {"unet_config", "beta_schedule"} <= metadata.keys() or TOKEN_TABLE not in weights:
        raise FlexiError(f"{path}: not a demo model: it lacks unet_config or beta_schedule in its metadata, or {TOKEN_TABLE}")
    return json.loads(metadata["unet_config"]), weights, metadata["beta_schedule"]
