"""Laws that every strategy of the search keeps: the seeds first, the budget always, the same draws after a resume."""

from __future__ import annotations

from itertools import pairwise

import optuna
import pytest

from flexi_core import FlexiError, Schedule
from flexi_core.run.cost import NetworkCost
from search_tools.settings import SearchSettings
from search_tools.space.space import Space
from search_tools.strategies.strategies import STRATEGIES, ask_schedule, directions, make_sampler

COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 140.0, ("input", 2): 160.0, ("input", 3): 620.0,
                            **{("output", i): 0.0 for i in range(4)}})  # fmt: skip
TRIALS = 60


def _space(strategy: str, families=("free",)) -> Space:
    return Space(20, 4.0, COST, families, front=strategy == "nsga2")


def _search(strategy: str, trials: int, seed: int = 0, study=None, space=None) -> optuna.Study:
    """Search for a known optimum: full steps as near as possible to the end; the sampler is made anew at every call."""
    space = space or _space(strategy)
    study = study or optuna.create_study(directions=directions(strategy))
    study.sampler = make_sampler(strategy, space, seed, lambda finished: len(finished) / TRIALS)
    for _ in range(trials):
        trial, schedule = ask_schedule(study, space)
        error = sum(20 - i for i, letter in enumerate(schedule.letters) if letter == "F") + 60 / schedule.letters.count("F")
        trial.set_user_attr("errors", [error])
        trial.set_user_attr("seconds", 1.0)
        study.tell(trial, [error, space.spent(schedule)][: len(study.directions)])
    return study


def _texts(study: optuna.Study) -> list[str]:
    return [trial.user_attrs["schedule"] for trial in study.trials]


@pytest.fixture(scope="module", params=STRATEGIES)
def searched(request):
    return request.param, _search(request.param, TRIALS)


def test_a_strategy_starts_from_the_known_good_points_and_keeps_the_budget(searched):
    strategy, study = searched
    space = _space(strategy)
    seeds = [str(seed) for seed in space.seeds()]
    assert set(_texts(study)[: len(seeds)]) == set(seeds)
    for text in _texts(study):
        schedule = Schedule.parse(text)
        assert len(schedule) == 20 and space.spent(schedule) <= space.budget


def test_a_search_that_was_stopped_and_goes_on_draws_what_an_uninterrupted_one_draws(searched):
    strategy, whole = searched
    parts = None
    for trials in (7, 20, 1, 32):
        parts = _search(strategy, trials, study=parts)
    assert _texts(parts) == _texts(whole)


def test_another_seed_draws_other_schedules(searched):
    strategy, study = searched
    assert _texts(_search(strategy, TRIALS, seed=1)) != _texts(study)


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "random"])
def test_a_strategy_that_learns_improves_on_its_seeds(strategy):
    errors = [trial.user_attrs["errors"][0] for trial in _search(strategy, TRIALS).trials]
    assert min(errors) < min(errors[: len(_space(strategy).seeds())])


def test_a_front_holds_schedules_of_many_costs():
    study = _search("nsga2", TRIALS)
    spent = {trial.values[1] for trial in study.trials}
    assert min(spent) <= 2 and max(spent) > 4.5 and len({trial.values[1] for trial in study.best_trials}) >= 2


def test_annealing_takes_worse_schedules_while_it_is_warm_and_none_at_the_end():
    space = _space("annealing")
    study = _search("annealing", TRIALS)
    sampler = make_sampler("annealing", space, 0, lambda finished: len(finished) / TRIALS)
    walk = [sampler._current(study.trials[:k]).user_attrs["errors"][0] for k in range(len(space.seeds()) + 1, TRIALS)]
    assert any(b > a for a, b in pairwise(walk)), "it never took a worse one"
    late = walk[-TRIALS // 4 :]
    assert late == sorted(late, reverse=True) and late[-1] == min(t.user_attrs["errors"][0] for t in study.trials[:-1])


def test_settings_refuse_a_strategy_that_is_not_known():
    with pytest.raises(FlexiError, match="known: evolution, annealing"):
        SearchSettings({}, {}, {}, 2.0, strategy="gradient")


@pytest.mark.parametrize("strategy", ["tpe", "nsga2", "evolution"])
def test_a_space_with_reused_guidance_is_searched_by_every_kind_of_strategy(strategy):
    space = Space(20, 5.0, COST, front=strategy == "nsga2", reuse_guidance=True)
    texts = _texts(_search(strategy, TRIALS, space=space))
    assert any("f" in text for text in texts)
    assert all(space.spent(Schedule.parse(text)) <= space.budget for text in texts)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_levels_of_their_own_are_searched_by_every_strategy_and_after_a_stop_too(strategy):
    grid = (*(14.6 * 0.75**i for i in range(20)), 0.0)
    space = Space(20, 5.0, COST, ("levels",), front=strategy == "nsga2", sigmas=grid)
    whole = _search(strategy, TRIALS, space=space)
    schedules = [Schedule.parse(text) for text in _texts(whole)]
    seeds = {str(seed) for seed in space.seeds()}
    assert all(schedule.sigmas and space.spent(schedule) <= space.budget for schedule in schedules)
    assert len({str(schedule) for schedule in schedules} - seeds) > 10
    parts = _search(strategy, 23, space=space)
    assert _texts(_search(strategy, TRIALS - 23, study=parts, space=space)) == _texts(whole)
