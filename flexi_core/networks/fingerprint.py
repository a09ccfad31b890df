"""Fingerprints of a network: what a schedule was made for, short enough to travel in its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_SAMPLES = 64  # values read from each tensor


def architecture_fingerprint(network: nn.Module) -> str:
    """Return a digest of the parameters' names and shapes, the same in every runtime and precision."""
    digest = hashlib.sha256()
    for name, value in sorted(network.named_parameters()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def weights_fingerprint(network: nn.Module, originals: Mapping[str, torch.Tensor] | None = None) -> str:
    """Return a digest of evenly spread values of every parameter, rounded so that fp16 and fp32 copies agree.

    Args:
        network: any.
        originals: by name, the values of parameters that stand in the network changed for a while, as by a LoRA.
    """
    digest, originals = hashlib.sha256(), originals or {}
    for name, value in sorted(network.named_parameters()):
        flat = originals.get(name, value).detach().flatten()
        count = min(_SAMPLES, flat.numel())
        picks = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(name.encode())
        digest.update(flat[picks.to(flat.device)].to("cpu", torch.float16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a digest of what a run is, JSON values by name: 64 hexadecimal digits, which may be cut for a file's name."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
