"""The strategies of the search, each an Optuna sampler of genes of the space.

What every one of them draws depends on the seed of the search and on the candidates before it alone, so that a search that
was killed and goes on takes the way of an uninterrupted one; and every one of them starts from the space's known good points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from flexi_core.schedule.schedule import Schedule

from ..space.space import Space
from .evolution import FINISHED, EvolutionSampler, candidates_before

STRATEGIES = ("evolution", "annealing", "nsga2", "tpe", "random")
Progress = Callable[[list[FrozenTrial]], float]  # finished trials -> the share of the search's budget that they spent

_TRIES = 200  # schedules drawn before a repeat is accepted
_START_TEMPERATURE = 0.5  # in the log of the paired error: a candidate of e^0.5 times the error is taken with chance 1/e
_CLIMB_FROM = 0.6  # share of the budget after which the annealing climbs hills alone
_POPULATION = 16  # of NSGA-II


def make_sampler(strategy: str, space: Space, seed: int, progress: Progress) -> BaseSampler:
    """Return the sampler of a strategy.

    Args:
        strategy: one of `STRATEGIES`.
        space: draws, mutates and encodes schedules.
        seed: of the search.
        progress: for strategies that cool down.
    """
    if strategy == "evolution":
        return EvolutionSampler(space, seed)
    if strategy == "annealing":
        return AnnealingSampler(space, seed, progress)
    if strategy == "random":
        return RandomScheduleSampler(space, seed)
    return GeneSampler(space, seed, _NATIVE[strategy])


class RandomScheduleSampler(BaseSampler):
    """Random schedules of the space, none twice; what the other strategies have to beat."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        before = candidates_before(study, trial)
        tried = {t.user_attrs["schedule"] for t in before if "schedule" in t.user_attrs}
        rng = np.random.default_rng([self._seed, len(before)])
        seeds = [seed for seed in self._space.seeds() if str(seed) not in tried]
        schedule = seeds[0] if seeds else self._new(study, tried, rng)
        return self._space.encode(schedule)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise RuntimeError(f"gene {param_name} was not drawn with its schedule")

    def _new(self, study: optuna.Study, tried: set[str], rng: np.random.Generator) -> Schedule:
        for attempt in range(_TRIES):
            schedule = self._propose(study, rng, attempt)
            if str(schedule) not in tried:
                break
        return schedule

    def _propose(self, study: optuna.Study, rng: np.random.Generator, attempt: int) -> Schedule:
        return self._space.random(rng)


class AnnealingSampler(RandomScheduleSampler):
    """Annealing, then hill climbing, in the paired error under the budget (BudCache, 2026).

    A candidate is a neighbour of the current schedule, and takes its place when it is better, or worse with the chance
    exp(-difference of the log errors / temperature). The temperature falls to 0 over the first part of the budget; from
    there the best schedule is climbed from. A screened candidate is compared on the samples that it had.

    Args:
        space: draws, mutates and encodes schedules.
        seed: of the search.
        progress: the share of the search's budget that is spent.
    """

    def __init__(self, space: Space, seed: int, progress: Progress) -> None:
        super().__init__(space, seed)
        self._progress = progress

    def _propose(self, study: optuna.Study, rng: np.random.Generator, attempt: int) -> Schedule:
        current = self._current([*study.get_trials(deepcopy=False, states=FINISHED)])
        if current is None or attempt >= _TRIES // 2:
            return self._space.random(rng)
        schedule = Schedule.parse(current.user_attrs["schedule"])
        for _ in range(1 + attempt // 10):  # mutations grow until one is new
            schedule = self._space.mutate(schedule, rng)
        return schedule

    def _current(self, finished: list[FrozenTrial]) -> FrozenTrial | None:
        """Return where the walk stands, from the candidates in their order."""
        current = best = None
        seeds = len(self._space.seeds())
        for k, trial in enumerate(finished):
            best = trial if best is None or _log_ratio(trial, best) < 0 else best
            warmth = 1 - self._progress(finished[:k]) / _CLIMB_FROM
            if warmth <= 0 or k < seeds:
                current = best
                continue
            worse = _log_ratio(trial, current)
            draw = np.random.default_rng([self._seed, k, 1]).random()
            if worse < 0 or draw < math.exp(-worse / (_START_TEMPERATURE * warmth)):
                current = trial
        return current


class GeneSampler(BaseSampler):
    """A sampler of Optuna's own, which draws gene by gene; genes that do not fit each other are repaired.

    Args:
        space: describes the genes and decodes them.
        seed: of the search.
        make: returns the sampler of a seed; one is made for every candidate, so that nothing but the study is remembered.
    """

    def __init__(self, space: Space, seed: int, make: Callable[[int], BaseSampler]) -> None:
        self._space, self._seed, self._make = space, seed, make
        self._inner = make(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        rank = len(candidates_before(study, trial))
        self._inner = self._make(int(np.random.SeedSequence([self._seed, rank]).generate_state(1)[0]))
        inferred = self._inner.infer_relative_search_space(study, trial)
        return self._space.distributions() if rank < len(self._space.seeds()) else inferred

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        drawn = self._inner.sample_relative(study, trial, search_space)
        rank, seeds = len(candidates_before(study, trial)), self._space.seeds()
        if rank >= len(seeds):
            return drawn
        unused = {name: _least(gene) for name, gene in self._space.distributions().items()}
        return unused | self._space.encode(seeds[rank])

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)


# TPE: one density for each gene (Bergstra et al., 2011); what other workers are evaluating counts as bad.
# NSGA-II over (error, cost), for a whole front (Deb et al., 2002).
_NATIVE: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=10, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION),
}


def directions(strategy: str) -> list[str]:
    """Return what a study of this strategy minimises: the error, or error and cost."""
    return ["minimize", "minimize"] if strategy == "nsga2" else ["minimize"]


def ask_schedule(study: optuna.Study, space: Space) -> tuple[optuna.Trial, Schedule]:
    """Return a new trial of a study with one of these samplers, and its schedule, whose text the trial remembers."""
    trial, genes = study.ask(), space.distributions()
    if text := trial.user_attrs.get("schedule"):  # a candidate whose worker was lost, tried again
        return trial, Schedule.parse(text)
    drawn_one_by_one = isinstance(study.sampler, GeneSampler)
    names = genes if drawn_one_by_one else trial.relative_params
    schedule = space.decode({name: _suggest(trial, name, genes[name]) for name in names})
    if drawn_one_by_one and not space.front:
        schedule = space.filled(schedule)
    trial.set_user_attr("schedule", str(schedule))
    return trial, schedule


def _suggest(trial: optuna.Trial, name: str, gene: BaseDistribution) -> int | float | str:
    if isinstance(gene, CategoricalDistribution):
        return trial.suggest_categorical(name, gene.choices)
    if isinstance(gene, FloatDistribution):
        return trial.suggest_float(name, gene.low, gene.high, log=gene.log)
    return trial.suggest_int(name, gene.low, gene.high)


def _least(gene: BaseDistribution) -> int | float | str:
    return gene.choices[0] if isinstance(gene, CategoricalDistribution) else gene.low


def _log_ratio(trial: FrozenTrial, other: FrozenTrial) -> float:
    """Return the log of the paired error of one candidate over another's, on the last samples that both had."""
    a, b = trial.user_attrs["errors"], other.user_attrs["errors"]
    last = min(len(a), len(b)) - 1
    return math.log(max(a[last], 1e-300)) - math.log(max(b[last], 1e-300))
