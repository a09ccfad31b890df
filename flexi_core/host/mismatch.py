"""How a run differs from the one that its schedule was made for, in words."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..networks.fingerprint import architecture_fingerprint, weights_fingerprint
from ..run.sampler import SamplerTraits
from ..schedule.file import size_text
from ..schedule.levels import between_ends, same_grid, window_of
from ..schedule.presets import is_served
from ..schedule.schedule import Schedule
from .keys import JOIN, STAGED

_PATCHED = "the network's weights are patched (a LoRA)"
_PATCH_VALUES = 64  # read from each tensor of a patch
_SAME_FUNCTION = {"ddim": "euler", "uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}


def advice_words(schedule: Schedule, traits: SamplerTraits) -> list[str]:
    """Return what the user of a schedule of extrapolated steps should know of the run's sampler."""
    if schedule.basis == "derivative" and traits.draws_noise:
        return [
            "The sampler draws noise, and the schedule carries the derivative on: expect grain. Leave out basis=derivative."
        ]
    if not is_served(traits):
        return [f"With a sampler that {traits.words}, no schedule of extrapolated steps is known to beat as many plain steps."]
    return []


def other_run_words(differences: Sequence[str]) -> list[str]:
    return [f"Made for another run: {difference}." for difference in differences]


def caution_words(differences: Sequence[str]) -> list[str]:
    """Return what other settings than a schedule's own come to, in words; they stand before all else."""
    for part, name in (("the sampler", "sampler"), ("the network's", "model")):
        if any(difference.startswith(part) for difference in differences):
            return [f"Made for another {name}: expect artefacts."]
    return ["Made for other settings: it may come less near."] if differences else []


def grid_mismatches(schedule: Schedule, sigmas: Sequence[float], top: float | None) -> list[str]:
    """Return in words how a run's noise levels [n + 1] differ from those that a schedule was made for.

    A window of such a run does not; `top` is the model's highest noise level.
    """
    if window_of(schedule, sigmas, top) is not None:
        return []
    if len(sigmas) - 1 != len(schedule):
        return [f"the schedule has {len(schedule)} steps, the run {len(sigmas) - 1}"]
    if schedule.teacher_sigmas is not None and not same_grid(schedule.teacher_sigmas, sigmas):
        return ["the noise levels (scheduler, denoise or window) differ"]
    if schedule.sigmas is not None and between_ends(schedule.sigmas, sigmas) is None:
        return ["the schedule's own noise levels begin or end elsewhere than the run's"]
    return []


def teacher_mismatches(teacher: Mapping[str, Any], model: comfy.model_patcher.ModelPatcher, sampler: str) -> list[str]:
    """Return in words how a run's sampler and network differ from the teacher in a schedule's file.

    Args:
        teacher: in a schedule's file; empty where there is none.
        model: the run's.
        sampler: name of the run's sampler function, without `sample_`; empty when not known.
    """
    found, wanted = [], teacher.get("sampler")
    if wanted and sampler and sampler not in (wanted, _SAME_FUNCTION.get(wanted)):
        found.append(f"the sampler was {wanted}, the run's is {sampler}")
    network = model.get_model_object("diffusion_model")
    architecture, weights = teacher.get("architecture"), teacher.get("weights")
    if architecture and architecture != architecture_fingerprint(network):
        found.append("the network's architecture differs")
    elif weights and patches_note(model) != teacher.get("patches", ""):
        found.append("the network's weights are patched otherwise (a LoRA)" if "patches" in teacher else _PATCHED)
    elif weights and weights != weights_fingerprint(network, unpatched_weights(model)):
        found.append("the network's weights differ")
    if weights and teacher.get("networks", "") != networks_note(model):
        found.append("the run changes its network elsewhere, or to another one")
    return found


def setting_mismatches(teacher: Mapping[str, Any], cfg: float | None, shape: Sequence[int]) -> list[str]:
    """Return in words how a run's guidance scale and its latent's size differ from those in a schedule's file.

    Args:
        teacher: in a schedule's file; empty where there is none.
        cfg: the run's; None where its guider has none.
        shape: of the run's latent [B, C, ..., H, W].
    """
    found, wanted = [], teacher.get("cfg")
    if wanted is not None and cfg is not None and not math.isclose(wanted, cfg, rel_tol=1e-3):
        found.append(f"the guidance scale was {wanted:g}, the run's is {cfg:g}")
    size = teacher.get("size")
    if size and list(shape[-len(size) :]) != list(size):
        found.append(f"the latent was {size_text(size)}, the run's is {size_text(shape[-len(size) :])}")
    return found


def patches_note(model: comfy.model_patcher.ModelPatcher) -> str:
    """Return how a model's network is patched, as by a LoRA: how many weights, and a digest; empty where it is not."""
    patches = {key: model.patches[key] for key in sorted(model.patches) if key.startswith("diffusion_model.")}
    digest, waiting = hashlib.sha256(), [patches]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            flat = value.detach().flatten()
            spread = flat[:: max(1, len(flat) // _PATCH_VALUES)]
            digest.update(f"{tuple(value.shape)}".encode() + spread.to("cpu", torch.float16).numpy().tobytes())
        elif isinstance(value, dict):
            waiting += [part for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str | int | float):
            digest.update(repr(value).encode())
        elif hasattr(value, "weights"):  # an adapter of the host
            waiting += [type(value).__name__, value.weights]
    return f"{len(patches)} weights, sha256:{digest.hexdigest()[:16]}" if patches else ""


def teacher_of(model: comfy.model_patcher.ModelPatcher, cfg: float) -> dict[str, Any]:
    """Return what a schedule's file says of a run's model and guidance scale.

    `weights` are the original ones; `patches`, where there are any, what changes them for a while, as a LoRA; `networks` the
    others of a run that has several.
    """
    network, patches = model.get_model_object("diffusion_model"), patches_note(model)
    said = {
        "architecture": architecture_fingerprint(network),
        "weights": weights_fingerprint(network, unpatched_weights(model)),
        "cfg": cfg,
    }
    networks = networks_note(model)
    return said | ({"patches": patches} if patches else {}) | ({"networks": networks} if networks else {})


def networks_note(model: comfy.model_patcher.ModelPatcher) -> str:
    """Return which networks come after a model's own in a run, and where; empty where none does."""
    found = []
    for joined in model.get_additional_models_with_key(JOIN):
        (join,) = model.get_wrappers(WrappersMP.OUTER_SAMPLE, JOIN)
        note = weights_fingerprint(joined.get_model_object("diffusion_model"), unpatched_weights(joined))
        found.append(f"{note} {patches_note(joined)} from {join.boundary.value:g} {join.boundary.unit}, {join.in_grid}")
    for own in model.get_additional_models_with_key(STAGED):
        (outer,) = model.get_wrappers(WrappersMP.OUTER_SAMPLE, STAGED)
        levels = ", ".join(f"{level:g}" for level in outer.args[0].boundaries)
        found.append(f"{weights_fingerprint(own.model)} at {levels}")
    return "; ".join(found)


def unpatched_weights(model: comfy.model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """Return the original weights, by the network's own names, where another clone's patches now stand in their place."""
    return {key.removeprefix("diffusion_model."): kept.weight for key, kept in model.backup.items()}
