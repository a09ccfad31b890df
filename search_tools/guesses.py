"""The first population from sensitivities: measured once for a study, kept in it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import optuna

from flexi_core.tune import SampleProgress

from .backend import Backend
from .sensitivity import Sensitivities, measure_sensitivities
from .space import Space
from .storage import storage_errors

_SENSITIVITIES = "flexi:sensitivities"  # of the study
_SECONDS = "flexi:sensitivity_seconds"
_FRONT = (1.0, 0.75, 0.55, 0.4, 0.3, 0.2)  # shares of the budget for which a front is given guesses
_LEAST_STEPS = 8  # in shorter runs there is nothing between the places that are measured


def with_guesses(
    study: optuna.Study,
    backend: Backend,
    space: Space,
    count: int,
    progress: SampleProgress = lambda done, total: None,
) -> Space:
    """Return a space whose seeds begin with the schedules of least predicted error.

    Args:
        study: keeps what was measured, so that a resumed search and other workers start from the same guesses.
        backend: samples.
        space: of the search; one without segments of any length has no guesses.
        count: of guesses; 0 measures nothing.
        progress: called with the samples' steps done and those in all.
    """
    if not count or "free" not in space.families or space.steps < _LEAST_STEPS:
        return space
    known = study.user_attrs.get(_SENSITIVITIES)
    if known is None:
        kinds = ("X", "f") if space.reuse_guidance else ("X",)
        began = time.monotonic()
        measured = measure_sensitivities(backend, kinds, progress=progress).as_dict()
        with storage_errors(f"the study {study.study_name!r} cannot keep its sensitivities"):
            study.set_user_attr(_SENSITIVITIES, measured)
            study.set_user_attr(_SECONDS, time.monotonic() - began)
            known = study.user_attrs[_SENSITIVITIES]  # the same for all workers
    sensitivities = Sensitivities.from_dict(known)
    if not all(math.isfinite(stretch.error) for stretch in sensitivities.stretches):
        return space  # a run that diverges tells nothing of its neighbours
    if not space.front:
        return replace(space, guesses=tuple(sensitivities.plan(space, count)))
    shares = [share for share in _FRONT if space.budget * share >= 2 + len(space.cuts)]
    cheaper = [replace(space, speedup=space.speedup / share, front=False) for share in shares]
    return replace(space, guesses=tuple(guess for each in cheaper for guess in sensitivities.plan(each, max(1, count // 3))))


def measuring_seconds(study: optuna.Study) -> float:
    """Return the time that measuring took."""
    return study.user_attrs.get(_SECONDS, 0.0)


def measuring_macs(study: optuna.Study) -> float:
    """Return the MACs that measuring took."""
    known = study.user_attrs.get(_SENSITIVITIES)
    return Sensitivities.from_dict(known).macs if known else 0.0
