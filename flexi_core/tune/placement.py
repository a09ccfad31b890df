"""Where the full steps go, and how the others are blended, for every speed-up at once; no network is asked.

A run is built from its start, one full step after the other (`Simulation`): a beam search over the step and the number of full
steps until then.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FlexiError
from ..run.null_steps.basis import Rule
from ..schedule.kinds import StepKind
from ..schedule.schedule import Schedule
from ..schedule.segment import Segment
from .answer import Answer
from .simulation import Arrival, Ground, Simulation, States
from .trajectories import Recording

WIDTH = 3  # of the beam, for each step and number of full steps
LONGEST = 16  # steps from one full step to the next
# What is predicted is off by, standard deviation in dB (benchmarks/tuned.py).
SPREAD_DB = 2.0
_DIGITS = 4  # of a factor
_MOST_DB = 99.0


@dataclass(frozen=True)
class Planned:
    """A schedule and what it is predicted to come to.

    Args:
        schedule: full and extrapolated steps with their blends.
        full: how many full ones.
        predicted_db: mean PSNR to the run of all steps.
    """

    schedule: Schedule
    full: int
    predicted_db: float

    @property
    def interval_db(self) -> tuple[float, float]:
        """Between which it comes out in nineteen runs of twenty."""
        return self.predicted_db - 2 * SPREAD_DB, self.predicted_db + 2 * SPREAD_DB


def plan_front(
    recording: Recording,
    response: np.ndarray,
    answer: Answer,
    rule: Rule,
    most_full: int | None = None,
    width: int = WIDTH,
    starts: Sequence[int] = (),
) -> list[Planned]:
    """Return the best schedule of each number of full steps, from few to many; one that more steps do not better is left out.

    Args:
        recording: of full runs of n steps.
        response: of the solver in the rule's basis [n + 1, n + 1] (`fit.linear_response`).
        answer: of the network at the run's noise levels.
        rule: how extrapolated steps are predicted.
        most_full: no more full steps than that; by default all but one.
        width: of the beam.
        starts: steps at which another network begins: they are full, and nothing is carried to them.

    Raises:
        FlexiError: recording, response and answer are not of one number of steps.
    """
    n = recording.steps
    if response.shape != (n + 1, n + 1) or len(answer.sigmas) != n:
        raise FlexiError(
            f"the recording is of {n} steps, the solver's response of {len(response) - 1}, the answer of {len(answer.sigmas)}"
        )
    ground = Ground.own(recording.gram, response, answer, rule)
    found = _beam(Simulation(ground, starts), most_full or n - 1, width)
    front: list[Planned] = []
    for full, end in sorted(found.items()):
        db = psnr_of(recording.span, end.errors)
        if not front or db > front[-1].predicted_db:
            front.append(Planned(schedule_of(n, end.places, end.blends, rule), full, db))
    return front


def _beam(simulation: Simulation, most: int, width: int) -> dict[int, Arrival]:
    """Return the best end for each number of full steps."""
    n = simulation.steps
    # By step and number of full steps before it.
    arrivals: list[dict[int, list[Arrival]]] = [{} for _ in range(n + 1)]
    for step in range(n):
        for states in [simulation.start()] if step == 0 else _states(simulation, step, arrivals[step]):
            last = min(n, step + LONGEST, *(start for start in simulation.starts if start > step))
            for stop in range(step + 1, last + 1):
                for arrival in simulation.arrived(states, step, stop):
                    full = len(arrival.places)
                    if stop == n or full < most:
                        kept = arrivals[stop].setdefault(full, [])
                        bisect.insort(kept, arrival)
                        del kept[width:]
        arrivals[step] = {}
    return {full: kept[0] for full, kept in arrivals[n].items()}


def _states(simulation: Simulation, step: int, arrivals: Mapping[int, Sequence[Arrival]]) -> Iterator[States]:
    """Yield the runs that come to a full step, with its prediction: those together whose blends have as many terms."""
    alike: dict[int, list[Arrival]] = {}
    for _, kept in sorted(arrivals.items()):
        for arrival in kept:
            alike.setdefault(len(simulation.history((*arrival.places, step))), []).append(arrival)
    for _, group in sorted(alike.items()):
        yield simulation.built(step, group)


def psnr_of(span: np.ndarray, errors: np.ndarray) -> float:
    """Return the mean PSNR in dB of samples' squared errors [B], on the scale of `Recording.span`."""
    return float(np.minimum(10 * np.log10(span**2 / errors), _MOST_DB).mean())


def schedule_of(steps: int, places: Sequence[int], blends: Sequence[np.ndarray | None], rule: Rule) -> Schedule:
    """Return the schedule of full steps at places, with the blends of the stretches after them."""
    segments = []
    for start, stop, blend in zip(places, [*places[1:], steps], blends, strict=True):
        kinds = (StepKind.FULL, *(StepKind.EXTRAPOLATED,) * (stop - start - 1))
        segments.append(Segment(kinds, None, None if blend is None else tuple(round(float(f), _DIGITS) for f in blend)))
    return Schedule(tuple(segments), basis=rule.basis)
