"""Moved noise levels: what runs at them, when they are left out, and the search's last stage, which moves them."""

from __future__ import annotations

import math
from dataclasses import replace

import optuna
import pytest
import torch

from flexi_core import Schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.report import RunReport
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import SAMPLERS, make_noise, sample, sample_dpmpp_2m, sample_euler
from flexi_core.tune.fit import linear_response, response_at
from flexi_core.tune.levels import at_levels
from search_tools.backends.teacher import TeacherSettings
from search_tools.fitness import Evaluation, Fitness
from search_tools.settings import SearchSettings
from search_tools.strategies.moving import best_moved, move_levels
from search_tools.study.candidate import best_trial
from search_tools.study.front import found_in, with_search_results
from search_tools.study.study import best_of, open_study, run_search, settings_of

GRID = (14.0, 9.0, 5.0, 2.0, 1.0, 0.25, 0.0)
MOVED = (14.0, 7.5, 5.0, 2.5, 1.0, 0.5, 0.0)
TEXT = "FX|FN|F|F"


def made_for(schedule: Schedule, sigmas) -> Schedule:
    return schedule.with_info(teacher={"sigmas": list(sigmas)})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_at_moved_levels_is_the_samplers_own_run_there(tiny_model, sampler):
    noise, prompts = make_noise(3, 2), None
    moved = torch.tensor(MOVED)
    schedule = replace(Schedule.parse("6*(F)"), sigmas=tuple(moved.tolist()))
    ours, run = sample(tiny_model, schedule, torch.tensor(GRID), noise, prompts, sampler=sampler, cfg=1.0)
    theirs, _ = sample(tiny_model, Schedule.parse("6*(F)"), moved, noise, prompts, sampler=sampler, cfg=1.0)
    assert torch.equal(ours, theirs)
    assert [step.sigma for step in RunReport(run, 1.0).steps] == list(MOVED[:-1])


def test_the_runs_own_levels_as_the_schedules_change_nothing(tiny_model):
    noise, sigmas = make_noise(3, 2), tiny_model.sigma(torch.tensor([999.0, 800.0, 600.0, 400.0, 200.0, 100.0]))
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    schedule = Schedule.parse(TEXT)
    plain, _ = sample(tiny_model, schedule, sigmas, noise, cfg=1.0)
    same, _ = sample(tiny_model, replace(schedule, sigmas=tuple(sigmas.tolist())), sigmas, noise, cfg=1.0)
    assert torch.equal(plain, same)


def test_levels_that_fit_take_the_place_of_the_runs():
    schedule = replace(Schedule.parse(TEXT), sigmas=MOVED)
    for made in (schedule, made_for(schedule, GRID)):
        plan = make_plan(made, GRID)
        assert (plan.sigmas, plan.moved, plan.mapping) == (MOVED, True, "")
        assert plan.sampled(torch.tensor(GRID)).tolist() == [14.0, 7.5, 5.0, 1.0, 0.5, 0.0], "without the removed step's"
        assert "The noise levels of the steps are the schedule's own." in str(RunReport(Run(plan), 1.0))


@pytest.mark.parametrize(
    ("teacher", "run", "message"),
    [
        (None, (14.0, 9.0, 5.0, 2.0, 1.0, 0.0), "6 steps mapped to 5 by position in the run, without its own noise levels"),
        (GRID, (14.0, 9.0, 5.0, 2.0, 1.0, 0.0), "6 steps mapped to 5 by noise level, without its own noise levels"),
        (GRID, (14.0, 8.0, 6.0, 3.0, 0.5, 0.2, 0.0), "6 steps mapped to 6 by noise level, without its own noise levels"),
        (None, (9.0, 8.0, 6.0, 3.0, 0.5, 0.2, 0.0), "noise levels are left out, the run begins or ends elsewhere"),
        (None, (14.0, 8.0, 6.0, 3.0, 0.5, 0.2, 0.1), "noise levels are left out, the run begins or ends elsewhere"),
    ],
)
def test_another_run_keeps_its_own_levels_and_says_so(teacher, run, message):
    schedule = replace(Schedule.parse(TEXT), sigmas=MOVED)
    plan = make_plan(made_for(schedule, teacher) if teacher else schedule, run)
    assert plan.sigmas == run and not plan.moved
    assert plan.mapping == message


def test_the_full_steps_of_another_run_are_those_nearest_to_the_schedules_own_levels():
    grid = [*torch.linspace(14, 0.5, 28).tolist(), 0.0]
    levels = [14.0, 6.2, 2.3, 0.6]  # far from an even spread over this grid
    schedule = made_for(at_levels(levels, grid), grid)
    run = [*torch.linspace(14, 0.4, 40).tolist(), 0.0]
    plan = make_plan(schedule, run)
    full = [run[i] for i, step in enumerate(plan.steps) if step.kind.is_full]
    assert all(min(abs(level - at) for at in full) < 0.4 for level in levels)
    assert all(min(abs(level - at) for level in levels) < 0.8 for at in full)


@pytest.mark.parametrize("solve", [sample_euler, sample_dpmpp_2m])
def test_the_teachers_state_between_two_levels_is_where_its_own_shorter_step_ends(solve):
    derivatives, start = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    sigmas, levels = torch.tensor(GRID), torch.tensor(MOVED)
    rows = response_at(solve, sigmas, linear_response(solve, sigmas), levels)
    followed = rows @ torch.cat([start[None], derivatives])
    for i, level in enumerate(MOVED):
        states = []

        def denoise(x, sigma, states=states):
            states.append(x)
            return x - sigma * derivatives[len(states) - 1]

        before = sigmas[sigmas > level].double()
        there = solve(denoise, start.clone(), torch.cat([before, torch.tensor([level, *[0.0] * (level > 0)]).double()]))
        state = there if level == 0 else states[len(before)]
        torch.testing.assert_close(followed[i], state, rtol=1e-5, atol=1e-5)


class Valley:
    """A fitness that costs nothing: full steps, and noise levels near to wanted ones in log sigma.

    Args:
        wanted: noise levels.
        luck: error that moved levels have on samples that no move is chosen on.
        far_off: times the mean paired error that moved levels have in the finals, as of a few samples that are far off.
    """

    stages, macs, teacher_seconds, sigmas = (1, 3), 0.0, 0.0, list(GRID)

    def __init__(self, wanted=MOVED, luck: float = 0.0, far_off: float = 1.0) -> None:
        self.wanted, self.luck, self.far_off = torch.tensor(wanted[:-1]), luck, far_off
        self.fits, self.fails_at = 0, 0

    def fitted(self, schedule: Schedule) -> Schedule:
        self.fits += 1
        if self.fits == self.fails_at:
            raise KeyboardInterrupt
        return schedule

    def error(self, schedule: Schedule) -> float:
        levels = torch.tensor((schedule.sigmas or GRID)[:-1])
        return float((levels / self.wanted).log().abs().sum()) + 0.01 + sum(letter != "F" for letter in schedule.letters)

    def psnr_db(self, schedule: Schedule) -> float:
        return -10 * self.error(schedule)

    def staged(self, schedule: Schedule):
        for _ in self.stages:
            yield schedule, self.error(schedule)

    def evaluate(self, schedule: Schedule) -> Evaluation:
        return Evaluation(self.error(schedule), self.psnr_db(schedule), self.error(schedule))

    def final(self, schedule: Schedule) -> Evaluation:
        luck = self.luck / 2 if schedule.sigmas else 0.0
        far = self.far_off if schedule.sigmas else 1.0
        return Evaluation(self.error(schedule) + luck, self.psnr_db(schedule) - 10 * luck, far * self.error(schedule))


@pytest.fixture
def searched(backend_on, small_model, monkeypatch):
    """A function of (fitness, evaluations): the study of a search in which every step may be full, and its result.

    It is in Optuna's memory, and in a database where it has to be `stored`: what goes on from it is what was written down.
    """
    backend = backend_on(small_model, TeacherSettings(steps=6))

    def run(fitness, evaluations: int, name: str = "s", stored: bool = False, **others):
        settings = SearchSettings.of(backend, 1.0, samples=16, families=("free",), **others)
        with monkeypatch.context() as patch:
            if not stored:
                patch.setattr("search_tools.study.study.open_storage", lambda _: optuna.storages.InMemoryStorage())
            study = open_study("sqlite://", name, settings)
        return study, run_search(study, settings.space(backend.cost), fitness, evaluations=evaluations)

    return run


def moves_of(study) -> dict:
    (known,) = study.user_attrs["flexi:moves"].values()
    return known


def test_the_last_stage_moves_levels_towards_less_error(searched):
    study, result = searched(Valley(), 30)
    moved = result.best.schedule.sigmas
    assert moved[0] == GRID[0] and moved[-1] == GRID[-1]
    assert all(abs(math.log(at / wanted)) < abs(math.log(was / wanted)) or at == was == wanted
               for at, was, wanted in zip(moved[1:-1], GRID[1:-1], MOVED[1:-1], strict=True))  # fmt: skip
    still = best_trial(study)
    assert result.best.evaluation.mse < 0.5 * still.user_attrs["mse"]
    assert best_of(study) == result.best
    best = next(one for one in found_in(study) if one.is_best)
    assert best.schedule == result.best.schedule and best.evaluation == result.best.evaluation
    assert best.as_searched.schedule.sigmas is None and best.as_searched.evaluation.mse == still.user_attrs["mse"]
    file = with_search_results(best, settings_of(study), "s", {"sampler": "euler"}, None, by="a test")
    assert file.teacher_sigmas == GRID, "without it another scheduler's run would be moved"


def test_a_descent_that_is_cut_off_goes_on_where_it_was(searched):
    whole, _ = searched(Valley(), 30)
    expected = best_moved(whole, best_trial(whole))
    assert expected is not None
    unmoved, _ = searched(Valley(), 30, stored=True, move=False)
    for tries in (1, 2, 7, 12):
        fitness, name, storage = Valley(), f"cut at {tries}", unmoved._storage
        optuna.copy_study(from_study_name="s", from_storage=storage, to_storage=storage, to_study_name=name)
        study, before = optuna.load_study(study_name=name, storage=storage), fitness.fits
        fitness.fails_at = before + tries
        with pytest.raises(KeyboardInterrupt):
            move_levels(study, fitness, 60)
        assert sum(len(known["tries"]) for known in study.user_attrs.get("flexi:moves", {}).values()) == tries - 1
        move_levels(study, fitness, 60)
        assert fitness.fits - before == len(moves_of(whole)["tries"]) + 2, "the try that was cut off, and the result"
        found = best_moved(study, best_trial(study))
        assert (found.schedule, found.final) == (expected.schedule, expected.final)
        at = fitness.fits
        move_levels(study, fitness, 60)
        move_levels(study, fitness, 1)
        assert fitness.fits == at and best_moved(study, best_trial(study)).schedule == expected.schedule


def test_a_descent_that_goes_on_keeps_what_it_had_until_it_has_better(searched):
    fitness = Valley()
    study, first = searched(fitness, 6, stored=True)
    assert first.best.schedule.sigmas is not None
    fitness.fails_at = fitness.fits + 10
    with pytest.raises(KeyboardInterrupt):
        move_levels(study, fitness, 60)
    assert best_of(study) == first.best
    fitness.luck = 10.0
    move_levels(study, fitness, 60)
    assert best_of(study) == first.best, "what went on was worse on unseen samples"
    assert moves_of(study)["judged"] == len(moves_of(study)["tries"]) > 6


def test_a_new_best_candidate_takes_the_place_of_a_moved_one_only_where_it_is_nearer(searched):
    fitness = Valley()
    study, first = searched(fitness, 30)
    assert first.best.schedule.sigmas is not None
    for share, taken in ((0.9, first.best.schedule), (0.01, Schedule.parse("6*(F); order=3"))):
        mse = share * best_trial(study).user_attrs["mse"]
        evaluation = vars(Evaluation(mse, -10 * mse, mse))
        attributes = {"schedule": f"6*(F); order={2 + (share < 0.5)}", "spent": 6.0, "errors": [mse, mse], "mse": mse}
        attributes |= {"evaluation": evaluation, "seconds": 1.0}
        study.add_trial(optuna.trial.create_trial(value=mse, user_attrs=attributes))
        assert best_trial(study).user_attrs["schedule"] == attributes["schedule"]
        assert best_of(study).schedule == taken
        assert {str(one.schedule) for one in found_in(study) if one.is_best} == {str(taken)}


def test_moves_are_no_more_than_asked_for_and_none_are_made_without_time(searched):
    fitness = Valley()
    study, _ = searched(fitness, 3)
    assert len(moves_of(study)["tries"]) == 2 * 3
    study.set_user_attr("flexi:moves", {})
    move_levels(study, fitness, seconds=0.0)
    known = moves_of(study)
    assert known["tries"] == [] and known["moved"] is None
    move_levels(study, fitness)
    assert len(moves_of(study)["tries"]) > 5 * 2 * 3, "till the strides are short"


@pytest.mark.parametrize("luck", [10.0, 1.2])  # on the search's samples there is 1.1 to gain
def test_levels_that_lose_on_unseen_samples_are_not_moved(searched, luck):
    study, result = searched(Valley(luck=luck), 30)
    assert result.best.schedule.sigmas is None
    assert moves_of(study)["moved"] is None


def test_levels_that_leave_some_samples_far_off_are_not_moved(searched):
    for far_off, moved in ((100.0, False), (1.2, True)):
        _, result = searched(Valley(far_off=far_off), 30, f"far off by {far_off}")
        assert (result.best.schedule.sigmas is not None) == moved


def test_levels_that_cannot_be_bettered_stay(searched):
    study, result = searched(Valley(wanted=GRID), 30)
    assert result.best.schedule.sigmas is None
    assert len(moves_of(study)["tries"]) == 5 * 2 * 4, "every step, both ways, at every stride"


def test_a_front_is_not_moved(searched):
    study, _ = searched(Valley(), 12, strategy="nsga2")
    assert "flexi:moves" not in study.user_attrs


def test_the_levels_of_a_real_schedule_are_moved_nearer_to_the_teacher(backend_on, small_model):
    backend = backend_on(small_model, TeacherSettings("dpmpp_2m", steps=9))
    backend.features = lambda latents: latents.mean(dim=(2, 3))  # the classifier reads larger ones
    settings = SearchSettings.of(backend, 3.0, samples=6, families=("free",), guesses=0, finalists=0)
    fitness = Fitness(backend, (3, 6))
    study = open_study("sqlite://", "s", settings)
    result = run_search(study, settings.space(backend.cost, sampler=backend.traits), fitness, evaluations=4)
    still = best_trial(study)
    moved = best_moved(study, still)
    assert moved is not None and result.best.schedule == moved.schedule
    assert moved.evaluation.psnr_db > still.user_attrs["evaluation"]["psnr_db"]
    assert moved.schedule.letters == Schedule.parse(still.user_attrs["schedule"]).letters
    assert Schedule.parse(str(moved.schedule)) == moved.schedule
