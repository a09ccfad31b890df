"""The paper's evolution, mutation and selection, on Optuna's genetic base class (Flexiffusion, arXiv 2409.17566)."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler
from optuna.trial import FrozenTrial, TrialState

from flexi_core.schedule.schedule import Schedule

from ..space.space import Space

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
PAIRED_MARGIN = 1.3
_TRIES = 200  # schedules drawn before a repeat is accepted


class EvolutionSampler(BaseGASampler):
    """Elitist evolution: the best `parents` of all generations so far are mutated; repeats are not asked for again.

    The best are those of lowest value among the trials that `near_best` leaves.

    The space's known good points come first. Trials that the screen ended count towards their generation and are no parents.
    What is drawn depends on the seed and on the finished trials alone, so that a killed and resumed search goes the way of an
    uninterrupted one.

    Args:
        space: draws, mutates and encodes schedules.
        seed: of the search.
        population: finished trials per generation.
        parents: how many survive.
    """

    def __init__(self, space: Space, seed: int, population: int = 6, parents: int = 3) -> None:
        super().__init__(population_size=population)
        self._space, self._seed, self._parents = space, seed, parents

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        return len(_finished(study)) // self.population_size

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        of_generation = _finished(study)[generation * self.population_size :][: self.population_size]
        return [trial for trial in of_generation if trial.state is TrialState.COMPLETE]

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        candidates = self.get_population(study, generation - 1) + self.get_parent_population(study, generation - 1)
        return sorted(near_best(candidates), key=_rank)[: self._parents]

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        before = candidates_before(study, trial)
        tried = {t.user_attrs["schedule"] for t in before if "schedule" in t.user_attrs}
        rng = np.random.default_rng([self._seed, len(before)])
        # Optuna gives the parents back in the order of their trials.
        parents = sorted(self.get_parent_population(study, self.get_trial_generation(study, trial)), key=_rank)
        return self._space.encode(self._draw(tried, parents, rng))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise RuntimeError(f"gene {param_name} was not drawn with its schedule")

    def _draw(self, tried: set[str], parents: list[FrozenTrial], rng: np.random.Generator) -> Schedule:
        for seed in self._space.seeds():
            if str(seed) not in tried:
                return seed
        for attempt in range(_TRIES):
            if parents and attempt < _TRIES // 2:
                parent = parents[min(rng.geometric(0.5) - 1, len(parents) - 1)]
                schedule = self._space.decode(parent.params)
                # Under a tight budget many mutations are repaired back to what is known: they grow until one is new.
                for _ in range(1 + attempt // 10):
                    schedule = self._space.mutate(schedule, rng)
            else:
                schedule = self._space.random(rng)
            if str(schedule) not in tried:
                break
        return schedule


def _rank(trial: FrozenTrial) -> tuple[float, int]:
    return trial.value, trial.number


def near_best(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials whose paired error ("mse" of their user attributes) is within `PAIRED_MARGIN` of the least.

    rFID of some dozens of samples is noisy: a search by it alone left schedules 3 dB nearer to the teacher for gains in rFID
    of a hundredth. So it chooses among those that are paired well.
    """
    limit = PAIRED_MARGIN * min((trial.user_attrs.get("mse", 0.0) for trial in trials), default=0.0)
    return [trial for trial in trials if trial.user_attrs.get("mse", 0.0) <= limit]


def candidates_before(study: optuna.Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """Return the finished candidates, and those that other workers began before this one and still evaluate."""
    trials = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
    running = (t for t in trials if t.state is TrialState.RUNNING and t.number < trial.number)
    return [*(t for t in trials if t.state in FINISHED), *running]


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)
