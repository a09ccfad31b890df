"""Training of stage models: one encoder, a decoder for each stage, one stage in a batch (Zhang et al., arXiv 2312.09181)."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..demo.model import DemoModel
from ..errors import FlexiError
from ..networks.fingerprint import weights_fingerprint
from ..runtime.file_model import FileModel
from ..runtime.unet import UNet
from ..runtime.unet_config import unet_arguments
from ..tensor_files import save_tensors
from .bounds import Stages
from .decoders import begin_decoder
from .embedded import EmbeddedParts
from .network import MOST_STAGES, MOST_WIDTH, with_decoder

FORMAT, VERSION = "flexiffusion-stage-training", 1
_SAVE_S = 60.0
_SHOWN = 0.98  # of a stage's loss that is shown stays at each batch of it

# (rows, generator) -> clean data [rows, C, H, W], context [rows, M, D] or None
Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Objective:
    """What a network is asked for in training.

    Args:
        prediction: one of the models' own kinds, eps or v; mean squared errors of it are made small.
        noise_spread: standard deviation of the log of the noise's size.
        weight: of the error at noise levels [B, 1, 1, 1]; as published, none.
    """

    prediction: str = "eps"
    noise_spread: float = 0.0
    weight: Callable[[torch.Tensor], torch.Tensor] | None = None

    def errors(
        self,
        network: nn.Module,
        x0: torch.Tensor,
        timesteps: torch.Tensor,
        sigmas: torch.Tensor,
        noise: torch.Tensor,
        context: torch.Tensor | None,
        bf16: bool = False,
    ) -> torch.Tensor:
        """Return the weighted error of each row [B].

        Args:
            network: that predicts.
            x0: clean data [B, C, H, W].
            timesteps: training timesteps [B].
            sigmas: their noise levels [B].
            noise: as x0.
            context: tokens [B, M, D], or None.
            bf16: products in bfloat16.
        """
        sigma = sigmas.view(-1, 1, 1, 1)
        scale = (sigma**2 + 1).sqrt()
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
            made = network._forward((x0 + sigma * noise) / scale, timesteps, context)
        # v = (noise - sigma x0) / sqrt(sigma^2 + 1) (Salimans and Ho, 2022, Appendix D).
        wanted = noise if self.prediction == "eps" else (noise - sigma * x0) / scale
        errors = (made.float() - wanted).square()
        return (errors if self.weight is None else self.weight(sigma) * errors).flatten(1).mean(1)


@dataclass(frozen=True)
class StageTraining:
    """How a stage model is trained.

    Args:
        stages: boundaries and names.
        widths: of the decoders, from high noise to low.
        scratch: everything begins anew; otherwise the decoders begin as the base's.
        encoder: the encoder, the time embedding and a shared middle block train too; otherwise they stay the base's.
        own_middle: each stage has a middle block.
        density: how often each stage is drawn, in any unit; empty: all the same.
        batch: rows of one stage in each iteration.
        learning_rate: of Adam, after the warm-up.
        warmup: iterations over which it rises.
        clip: largest norm of the gradients.
        ema: share of the averaged weights that stays at each iteration; less at the beginning.
        bf16: products in bfloat16.
        seed: of weights, data and noise.

    Raises:
        FlexiError: a value is out of its range.
    """

    stages: Stages
    widths: tuple[int, ...]
    scratch: bool = False
    encoder: bool = False
    own_middle: bool = False
    density: tuple[float, ...] = ()
    batch: int = 32
    learning_rate: float = 2e-4
    warmup: int = 1000
    clip: float = 1.0
    ema: float = 0.9999
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.stages.names)
        if count > MOST_STAGES:
            raise FlexiError(f"{count} stages are asked for; at most {MOST_STAGES} go into a file")
        if len(self.widths) != count or not all(1 <= width <= MOST_WIDTH for width in self.widths):
            raise FlexiError(
                f"{count} stages have the widths {', '.join(map(str, self.widths))}; give one for each, 1 to {MOST_WIDTH} "
                "channels, from high noise to low"
            )
        if self.density and (
            len(self.density) != count or not sum(self.density) > 0 or not all(0 <= d < math.inf for d in self.density)
        ):
            found = ", ".join(f"{d:g}" for d in self.density)
            raise FlexiError(f"{count} stages have the density {found}; give one number for each, 0 or more, not all 0")
        if not 0 <= self.ema < 1:
            raise FlexiError(f"the averaged weights keep {self.ema:g} at each iteration; give 0 or more and below 1")
        if not (self.learning_rate > 0 and self.clip > 0 and self.batch > 0 and self.warmup >= 0):
            raise FlexiError("learning rate, clip and batch are above 0, and the warm-up is not below it; one of them is not")
        if self.scratch and not self.encoder:
            raise FlexiError("an encoder that begins anew has to train; leave it frozen only with a base")


def levels_of(stages: Stages, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """Return the training timesteps of each stage.

    Args:
        stages: boundaries and names.
        sigmas: training noise levels [1000], ascending.

    Raises:
        FlexiError: a stage has none.
    """
    at = torch.tensor([stages.at(float(sigma)) for sigma in sigmas])
    found = [(at == i).nonzero()[:, 0] for i in range(len(stages.names))]
    for name, levels in zip(stages.names, found, strict=True):
        if not len(levels):
            raise FlexiError(
                f"the stage {name!r} has none of the model's noise levels, {sigmas[0]:.3g} to {sigmas[-1]:.4g}; give "
                "boundaries between them, in sigma"
            )
    return found


class StagedUNet(nn.Module):
    """A U-Net and a decoder for each stage.

    Args:
        unet: whose encoder, and middle block if the decoders have none, the stages share.
        decoders: from high noise to low.
    """

    def __init__(self, unet: UNet, decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.unet, self.decoders = unet, nn.ModuleList(decoders)

    def network(self, stage: int) -> nn.Module:
        """Return the network of a stage."""
        return with_decoder(self.unet, self.decoders[stage])

    def trained(self, settings: StageTraining) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name."""
        shared = ["unet.time_embed.", "unet.input_blocks."] + ["unet.middle_block."] * (not settings.own_middle)
        parts = ("decoders.", *shared) if settings.encoder else ("decoders.",)
        return {name: value for name, value in self.named_parameters() if name.startswith(parts)}


@dataclass
class _State:
    """What a training has come to; `shown` is each stage's mean loss of late."""

    done: int = 0
    batches: list[int] = field(default_factory=list)
    shown: list[float] = field(default_factory=list)


class StageTrainer:
    """A training that goes on from its checkpoint, bit for bit as if it had never stopped.

    Args:
        base: whose encoder, and whose decoder to begin with, the stages have; it is not changed.
        settings: of the training.
        draw: returns data.
        objective: of the training.
        checkpoint: file to go on from and to write.
        device: that trains.

    Raises:
        FlexiError: a stage has no noise levels, attention heads do not fit a width, or the checkpoint is another training's.
    """

    def __init__(
        self,
        base: DemoModel | FileModel,
        settings: StageTraining,
        draw: Draw,
        objective: Objective,
        checkpoint: Path,
        device: str = "cpu",
    ) -> None:
        self.settings, self._draw, self._objective, self._checkpoint = settings, draw, objective, Path(checkpoint)
        self.levels, self._sigmas = levels_of(settings.stages, base.sigmas), base.sigmas
        self._device, arguments = torch.device(device), unet_arguments(base.unet_config)
        _check_attention(base, arguments, settings.widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            unet = UNet(**arguments) if settings.scratch else copy.deepcopy(base.unet)
            self._began_from = weights_fingerprint(unet)
            decoders = [
                begin_decoder(EmbeddedParts, unet, arguments, width, settings.own_middle, settings.scratch)
                for width in settings.widths
            ]
        self.model = StagedUNet(unet, decoders).requires_grad_(False).to(self._device)
        self.averaged = copy.deepcopy(self.model)
        self._trained, self._kept = self.model.trained(settings), self.averaged.trained(settings)
        for value in self._trained.values():
            value.requires_grad_(True)
        self._optimizer = torch.optim.Adam(self._trained.values(), lr=settings.learning_rate, fused=True)
        self._rng = torch.Generator().manual_seed(settings.seed)
        count = len(settings.widths)
        self._state = _State(0, [0] * count, [0.0] * count)
        share = torch.tensor(settings.density or [1.0] * count, dtype=torch.float64)
        self._density = share.cumsum(0) / share.sum()
        if self._checkpoint.exists():
            self._resume()

    @property
    def done(self) -> int:
        """Iterations so far."""
        return self._state.done

    @property
    def batches(self) -> tuple[int, ...]:
        """Iterations of each stage so far."""
        return tuple(self._state.batches)

    @property
    def losses(self) -> tuple[float | None, ...]:
        """Each stage's mean loss of late; None before its first batch."""
        return tuple(
            loss / (1 - _SHOWN**count) if count else None
            for loss, count in zip(self._state.shown, self._state.batches, strict=True)
        )

    def run(
        self,
        iterations: int,
        progress: Callable[[StageTrainer, float], None] = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train until there are so many iterations in all, and write the checkpoint.

        Args:
            iterations: in all, those before the checkpoint included.
            progress: called after each with the trainer and the seconds left.
            stop: asked after each whether to leave off.

        Returns:
            whether it is done; otherwise it was stopped, between two iterations.

        Raises:
            FlexiError: the loss is no number any more.
            OSError: the checkpoint cannot be written.
        """
        began, at_start, saved = time.monotonic(), self.done, time.monotonic()
        while self.done < iterations and not (stopped := stop()):
            self._iterate()
            now = time.monotonic()
            progress(self, (now - began) / (self.done - at_start) * (iterations - self.done))
            if now - saved > _SAVE_S:
                self.save()
                saved = time.monotonic()
        if self.done > at_start or not self._checkpoint.exists():
            self.save()
        return self.done >= iterations or not stopped

    def _iterate(self) -> None:
        settings, state = self.settings, self._state
        stage = int(torch.searchsorted(self._density, torch.rand((), generator=self._rng, dtype=torch.float64), right=True))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (state.done + 1) / max(settings.warmup, 1))
        self._optimizer.zero_grad(set_to_none=True)
        with _attention(self._device):
            loss = self._loss(stage)
            loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), settings.clip)
        self._optimizer.step()
        state.done += 1
        kept = min(settings.ema, (1 + state.done) / (10 + state.done))
        get_ema_multi_avg_fn(kept)(list(self._kept.values()), list(self._trained.values()), None)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FlexiError(
                f"the loss is {value} after {state.done} iterations; go on from the last checkpoint with a lower learning rate"
            )
        state.batches[stage] += 1
        state.shown[stage] = _SHOWN * state.shown[stage] + (1 - _SHOWN) * value

    def _loss(self, stage: int) -> torch.Tensor:
        rows, levels = self.settings.batch, self.levels[stage]
        x0, context = self._draw(rows, self._rng)
        # Stratified timesteps: the same marginal as uniform ones, less variance from batch to batch.
        t = levels[((torch.arange(rows) + torch.rand(rows, generator=self._rng)) * (len(levels) / rows)).long()]
        spread = (self._objective.noise_spread * torch.randn(rows, 1, 1, 1, generator=self._rng)).exp()
        noise = spread * torch.randn(x0.shape, generator=self._rng)
        on_device = [None if value is None else value.to(self._device) for value in (x0, t, self._sigmas[t], noise, context)]
        return self._objective.errors(self.model.network(stage), *on_device, self.settings.bf16).mean()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {"rng": self._rng.get_state()}
        for name, value in self._trained.items():
            tensors[f"model.{name}"], tensors[f"averaged.{name}"] = value.detach(), self._kept[name]
            tensors |= {f"adam.{name}.{part}": of for part, of in self._optimizer.state.get(value, {}).items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "began_from": self._began_from}
        metadata |= {"settings": json.dumps(self._described()), "state": json.dumps(asdict(self._state))}
        save_tensors(tensors, self._checkpoint, metadata)

    def _described(self) -> dict[str, Any]:
        of = {"prediction": self._objective.prediction, "noise_spread": self._objective.noise_spread}
        return json.loads(json.dumps({**asdict(self.settings), **of}))

    def _resume(self) -> None:
        try:
            with safe_open(self._checkpoint, framework="pt", device=str(self._device)) as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError) as error:
            raise FlexiError(f"{self._checkpoint}: cannot be read ({error}); move it away to begin anew") from error
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
            raise FlexiError(f"{self._checkpoint}: no checkpoint of a stage training of this version; give another folder")
        had, wanted = json.loads(metadata["settings"]), self._described()
        if differ := sorted(name for name in {*had, *wanted} if had.get(name) != wanted.get(name)):
            said = "; ".join(f"{name} {had.get(name)}, now {wanted.get(name)}" for name in differ)
            raise FlexiError(f"{self._checkpoint}: it is of another training ({said}); give the same again, or another folder")
        if metadata["began_from"] != self._began_from:
            raise FlexiError(f"{self._checkpoint}: it began from another base; give that one, or another folder")
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(found[f"model.{name}"])
                self._kept[name].copy_(found[f"averaged.{name}"])
                parts = {part: found.get(f"adam.{name}.{part}") for part in ("step", "exp_avg", "exp_avg_sq")}
                if parts["step"] is not None:  # else its stage was not drawn yet
                    self._optimizer.state[value] = parts
        self._rng.set_state(found["rng"].cpu())
        self._state = _State(**json.loads(metadata["state"]))


def _check_attention(base: DemoModel | FileModel, arguments: Mapping[str, Any], widths: Sequence[int]) -> None:
    """Refuse decoders that would attend to their own features in place of a context, where these are of another width."""
    width = arguments["model_channels"]
    if base.conditioning(None, 1)[0] is None and any(arguments["transformer_depth_output"]) and {*widths} != {width}:
        raise FlexiError(
            f"the base has transformers and is without conditioning, so that all decoders have its width, {width}; a config "
            "without transformers leaves it free"
        )


def _attention(device: torch.device) -> AbstractContextManager:
    # On the CPU the fused attention's backward is several times slower than plain matrix products at 64 tokens.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def held_out_loss(
    network: Callable[[int], nn.Module],
    levels: Sequence[torch.Tensor],
    sigmas: torch.Tensor,
    objective: Objective,
    data: tuple[torch.Tensor, torch.Tensor | None],
    seed: int,
    rows: int = 64,
) -> list[torch.Tensor]:
    """Return each row's loss in each stage [B], with the same noise levels and noise for every network.

    Args:
        network: returns a stage's network.
        levels: training timesteps of each stage.
        sigmas: training noise levels.
        objective: of the training.
        data: clean data [B, C, H, W] and context [B, M, D] or None, none of it trained on.
        seed: of noise levels and noise.
        rows: in a batch.
    """
    found, (x0, context) = [], data
    for stage, of in enumerate(levels):
        generator, count = torch.Generator().manual_seed(seed + stage), len(x0)
        t = of[((torch.arange(count) + torch.rand(count, generator=generator)) * (len(of) / count)).long()]
        spread = (objective.noise_spread * torch.randn(count, 1, 1, 1, generator=generator)).exp()
        noise = spread * torch.randn(x0.shape, generator=generator)
        parts = [
            objective.errors(network(stage), x0[at], t[at], sigmas[t[at]], noise[at], None if context is None else context[at])
            for at in torch.arange(count).split(rows)
        ]
        found.append(torch.cat(parts))
    return found
