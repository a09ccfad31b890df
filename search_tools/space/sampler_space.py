"""What a run's sampler leaves to the search: in which bases extrapolated steps are, and whether steps may go or move.

Candidates are compared with the teacher pair by pair, under the same noise. Noise that is drawn call by call is another one
for every later step once a step is removed, and noise of a Brownian path is that of the noise levels between which it is drawn.
"""

from __future__ import annotations

from typing import Any

from flexi_core.run.null_steps.basis import DENOISED, DERIVATIVE
from flexi_core.run.sampler import SamplerTraits


def space_under(sampler: SamplerTraits) -> dict[str, Any]:
    """Return what a sampler makes of a `Space`: its `bases`, `removes` and `moves`."""
    if sampler.draws_noise:
        return {"bases": (DENOISED,), "removes": sampler.noise_of_interval, "moves": False}
    return {"bases": (DERIVATIVE, DENOISED) if sampler.memory else (DERIVATIVE,), "removes": True, "moves": True}


def left_out(sampler: SamplerTraits) -> str:
    """Return in words what is not searched under a sampler, and why; empty where all is."""
    if not sampler.draws_noise:
        return ""
    if sampler.noise_of_interval:
        return (
            "The sampler draws noise, which belongs to the noise levels of its steps. Moved noise levels are left out: they "
            "meet other noise and end in another picture than the teacher's. Schedules with removed steps (N) are not fitted."
        )
    return (
        "The sampler draws noise anew in every step. Removed steps (N) and moved noise levels are left out: after them the run "
        "draws other noise and ends in another picture than the teacher's."
    )
