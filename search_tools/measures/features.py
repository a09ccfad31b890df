"""What networks read from pictures: Inception features and LPIPS from weights given by path, class probabilities.

Nothing is downloaded. The packages are an extra of this project (`pip install -e .[perceptual]`), and both need a torchvision
that was built for the torch beside it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flexi_core.errors import FlexiError

from ..backends.protocol import Features

_BATCH = 16  # at 299 x 299 pixels a batch of 64 takes 5 GB
_LPIPS_LEAST_SIZE = 32  # pixels; AlexNet's last pooling leaves nothing of smaller pictures


class InceptionFeatures:
    """Pool features [N, 2048] of the Inception network that FID was defined on (Heusel et al., 2017), by torch-fidelity.

    Args:
        weights: torch-fidelity's own file `weights-inception-2015-12-05-*.pth`, or the same tensors as safetensors.
        pictures: from latents [N, ...] to pictures [N, 3, H, W], -1..1.

    Raises:
        FlexiError: the package cannot be imported, or the file does not fit it.
    """

    name = "Inception pool features (torch-fidelity)"

    def __init__(self, weights: Path, pictures: Callable[[torch.Tensor], torch.Tensor]) -> None:
        package = _import("torch_fidelity", "--inception-weights")
        state = load_weights(weights)
        # torch-fidelity unpickles whatever file it is given; it gets the tensors that were read safely instead.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        try:
            self._network = package.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], safe)
        except RuntimeError as error:
            raise FlexiError(f"{weights}: not the weights of torch-fidelity's Inception ({_one_line(error)})") from error
        self._pictures = pictures

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Return features [N, 2048] of samples [N, ...]."""
        return self.of_pictures(self._pictures(latents))

    def of_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return features [N, 2048] of pictures [N, 3, H, W], -1..1."""
        return self._read(pictures)[0]

    def class_probabilities(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Return the probabilities of ImageNet's classes [N, 1008], in a list of one."""
        return [self._read(self._pictures(latents))[1].softmax(dim=1)]

    @torch.inference_mode()
    def _read(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise FlexiError(f"pictures of shape {tuple(pictures.shape)}; Inception reads [N, 3, H, W]")
        whole = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts = [self._network(part) for part in whole.split(_BATCH)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class Lpips:
    """The learned distance LPIPS v0.1 with AlexNet (Zhang et al., 2018), by the lpips package; lower is nearer.

    Args:
        weights: of AlexNet as torchvision publishes it (`alexnet-owt-*.pth`), or the same tensors as safetensors; the layers on
            top come with the package.

    Raises:
        FlexiError: the package cannot be imported, or the file does not fit it.
    """

    def __init__(self, weights: Path) -> None:
        package = _import("lpips", "--lpips-weights")
        self._network = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
        state = load_weights(weights)
        trunk = self._network.net
        wanted = {key: f"features.{key.split('.', 1)[1]}" for key in trunk.state_dict()}
        if missing := [name for name in wanted.values() if name not in state]:
            raise FlexiError(f"{weights}: not torchvision's AlexNet: it lacks {missing[0]}")
        try:
            trunk.load_state_dict({key: state[name] for key, name in wanted.items()})
        except RuntimeError as error:
            raise FlexiError(f"{weights}: not torchvision's AlexNet ({_one_line(error)})") from error

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the distance of each pair of pictures [N, 3, H, W], -1..1, as [N]."""
        if pictures.shape != reference.shape or pictures.shape[1] != 3 or min(pictures.shape[2:]) < _LPIPS_LEAST_SIZE:
            raise FlexiError(
                f"pictures of shapes {tuple(pictures.shape)} and {tuple(reference.shape)}; LPIPS compares pairs "
                f"[N, 3, H, W] of at least {_LPIPS_LEAST_SIZE} pixels"
            )
        pairs = zip(pictures.clamp(-1, 1).split(_BATCH), reference.clamp(-1, 1).split(_BATCH), strict=True)
        return torch.cat([self._network(a, b).flatten() for a, b in pairs])


def class_probabilities(features: Features, latents: torch.Tensor) -> list[torch.Tensor] | None:
    """Return the class probabilities that a network reads from samples, one [N, K] for each thing it tells apart.

    The embedded classifier tells five attributes apart, Inception one set of classes; None where features have no classes.
    """
    if hasattr(features, "class_probabilities"):
        return features.class_probabilities(latents)
    if hasattr(features, "classifier"):
        with torch.inference_mode():
            return [logits.softmax(dim=1) for logits in features.classifier(latents).values()]
    return None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, safetensors or a plain state dict; nothing in it is executed.

    Raises:
        FlexiError: it cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise FlexiError(f"{path}: cannot be read ({_one_line(error)})") from error
    except Exception as error:  # what torch raises on a foreign file is of many types
        raise FlexiError(f"{path}: not a plain file of tensors ({_one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FlexiError(f"{path}: holds {type(state).__name__}; expected a state dict, names with tensors")
    return state


def _import(name: str, option: str) -> ModuleType:
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another build raises RuntimeError
        raise FlexiError(
            f"{option} needs the package {name.replace('_', '-')}, which cannot be imported ({_one_line(error)}); install "
            "the extra `perceptual` and a torchvision built for this torch (see pytorch.org)"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
