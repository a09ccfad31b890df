"""What noise levels are clustered by: a set of data, a network's own predictions, or its full runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flexi_core.demo.model import SmallModel
from flexi_core.errors import FlexiError
from flexi_core.networks.unet import NetworkCall
from flexi_core.runtime.sampling import SCHEDULERS, make_noise, sample
from flexi_core.schedule.schedule import Schedule
from flexi_core.stages.clustering import Predictions, network_predictions, optimal_predictions

from .measures.references import SCENES, SUFFIXES, folder_images, scenes

LATENT_SUFFIXES = (".safetensors", ".latent")
_OWN_SAMPLE_STEPS = 20


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a kind of model: how they are gone through, and how people count them.

    Args:
        sigmas: training noise levels [1000] of a model for x = y + sigma z, ascending; None for a flow model.
        shift: of a flow model, for which x = (1 - sigma) y + sigma z.
    """

    sigmas: torch.Tensor | None = None
    shift: float = 1.0

    def grid(self, count: int) -> list[float]:
        """Return noise levels [count] of x = y + sigma z, falling, even in the model's time."""
        if self.sigmas is not None:
            index = torch.linspace(len(self.sigmas) - 1, 0, count, dtype=torch.float64).round().long()
            return self.sigmas[index].double().tolist()
        return [level / (1 - level) for level in self._flow(count + 1)[1:]]

    def run(self, scheduler: str, steps: int) -> list[float]:
        """Return where the steps of a run begin [steps], as noise levels of x = y + sigma z."""
        if self.sigmas is not None:
            return SCHEDULERS[scheduler](_Levels(self.sigmas), steps)[:-1].double().tolist()
        return [math.inf, *(level / (1 - level) for level in self._flow(steps)[1:])]

    def counted(self, level: float) -> tuple[float, float]:
        """Return a noise level of x = y + sigma z as the model's own sigma, and as a share of its time."""
        if self.sigmas is None:
            own = level / (1 + level)
            return own, own
        time = np.interp(math.log(level), self.sigmas.log().double().numpy(), np.arange(len(self.sigmas)))
        return level, float(time) / (len(self.sigmas) - 1)

    def _flow(self, steps: int) -> list[float]:
        times = [1 - i / steps for i in range(steps)]
        return [self.shift * t / (1 + (self.shift - 1) * t) for t in times]


class _Levels(SmallModel):
    """A model's noise levels without a network, for the grids of schedulers."""

    def __init__(self, sigmas: torch.Tensor) -> None:
        self.sigmas = sigmas

    def conditioning(self, prompts, count: int) -> tuple[None, None]:
        return None, None


def data_of(source: str, count: int, size: Sequence[int], seed: int) -> torch.Tensor:
    """Return data [N, ...], of the scale that models are trained in: scenes, or what a folder has.

    Args:
        source: `scenes`, or a folder of pictures, or of latents ([N, ...] or [...] in safetensors files, a ComfyUI's .latent).
        count: most of them.
        size: height and width to which pictures are brought.
        seed: of scenes.

    Raises:
        FlexiError: the folder has neither, or latents of several shapes.
    """
    if source == SCENES:
        return scenes(count, seed)
    folder = Path(source)
    files = sorted(path for path in folder.iterdir() if path.suffix in LATENT_SUFFIXES) if folder.is_dir() else []
    return _latents(files)[:count] if files else folder_images(folder, *size, count)


def _latents(files: Sequence[Path]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for path in files:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FlexiError(f"{path}: cannot be read as latents ({error}); repair it or take it out") from error
        for name in sorted(tensors):
            value = tensors[name]
            if value.ndim < 3 or not value.is_floating_point():
                continue  # a ComfyUI's .latent has a tensor that names its format
            rows = value if value.ndim > 3 else value[None]
            if found and rows.shape[1:] != found[0].shape[1:]:
                raise FlexiError(
                    f"{path}: latents of shape {list(rows.shape[1:])}, those before are {list(found[0].shape[1:])}; give a "
                    "folder of one size"
                )
            found.append(rows.float())
    if not found:
        raise FlexiError(f"{files[0].parent}: no latents in its files; expected tensors [N, C, H, W], or {', '.join(SUFFIXES)}")
    return torch.cat(found)


def by_data(data: torch.Tensor, levels: NoiseLevels, count: int, samples: int, seed: int) -> Predictions:
    """Return what the optimal denoiser of data predicts at `count` noise levels."""
    return optimal_predictions(data, levels.grid(count), samples, seed)


@torch.inference_mode()
def by_network(model: SmallModel, count: int, samples: int, seed: int) -> Predictions:
    """Return what a network predicts, without a prompt, in samples of its own at `count` noise levels."""
    steps = SCHEDULERS["normal"](model, _OWN_SAMPLE_STEPS)
    noise = make_noise(seed, samples, model.latent_shape)
    drawn, _ = sample(model, Schedule.parse(f"{_OWN_SAMPLE_STEPS}*(F)"), steps, noise, cfg=1.0)
    context, _ = model.conditioning(None, samples)

    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        level = torch.tensor(sigma, dtype=torch.float32)
        rows = (level**2 + 1).sqrt()
        call = NetworkCall(x / rows, model.timestep(level[None]).expand(len(x)), context, options={"cond_or_uncond": [0]})
        return (x - model.denoised(x, level, call.run(model.unet._forward))) / level

    return network_predictions(predict, drawn, NoiseLevels(model.sigmas).grid(count), seed)


class _Recorder:
    """Keeps the derivative at every step of a run."""

    def __init__(self) -> None:
        self.eps: list[torch.Tensor] = []

    def see(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        self.eps.append(prediction.flatten(1).float())

    def blend(self, index: int, history: object) -> None:
        return None


@torch.inference_mode()
def by_run(model: SmallModel, count: int, samples: int, seed: int) -> Predictions:
    """Return what a network predicts along full Euler runs of its own, of `count` steps."""
    recorder, sigmas = _Recorder(), SCHEDULERS["normal"](model, count)
    noise = make_noise(seed, samples, model.latent_shape)
    sample(model, Schedule.parse(f"{count}*(F); basis=derivative"), sigmas, noise, cfg=1.0, observer=recorder)
    return Predictions(tuple(sigmas[:-1].tolist()), torch.stack(recorder.eps))
