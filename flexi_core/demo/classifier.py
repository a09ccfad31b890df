"""An independent judge of the embedded model: reads the five attributes of a 32x32 scene.

Its penultimate features are the embedded back end's FID features, its accuracy the stand-in for a CLIP score.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .scenes import ATTRIBUTES

FEATURES = 64
WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"


class SceneClassifier(nn.Module):
    """Four strided convolutions, a feature layer, one linear head per attribute."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 2 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        # No pooling before this layer: the place is an attribute.
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [B, 64] of images [B, 3, 32, 32], -1..1."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits [B, values] per attribute name."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return attribute indices [B, 5] in the order of `ATTRIBUTES`."""
        return torch.stack([logits.argmax(dim=1) for logits in self(images).values()], dim=1)


def load_classifier(path: Path = WEIGHTS) -> SceneClassifier:
    """Return the trained classifier in eval mode."""
    model = SceneClassifier()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval().requires_grad_(False)
