"""Moved noise levels: what runs at them, when they are left out, and the search's last stage, which moves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexi_core import Schedule
from flexi_core.demo.sampling import SAMPLERS, make_noise, sample, sample_dpmpp_2m, sample_euler
from flexi_core.fit import linear_response, response_at
from flexi_core.plan import make_plan
from flexi_core.report import RunReport
from flexi_core.run import Run
from search_tools.candidate import best_trial
from search_tools.embedded import EmbeddedBackend
from search_tools.fitness import Evaluation, Fitness
from search_tools.front import found_in
from search_tools.moving import FRACTIONS, move_levels, moved_of
from search_tools.settings import SearchSettings
from search_tools.study import best_of, open_study, run_search
from search_tools.teacher import TeacherSettings

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
    """A fitness that costs nothing: full steps, and noise levels near to wanted ones in log sigma."""

    stages, macs, teacher_seconds, sigmas = (1, 3), 0.0, 0.0, list(GRID)

    def __init__(self, wanted=MOVED, luck: float = 0.0) -> None:
        self.wanted, self.luck, self.fits = torch.tensor(wanted[:-1]), luck, 0

    def fitted(self, schedule: Schedule) -> Schedule:
        self.fits += 1
        return schedule

    def error(self, schedule: Schedule) -> float:
        levels = torch.tensor((schedule.sigmas or GRID)[:-1])
        return float((levels / self.wanted).log().abs().sum()) + 0.01 + sum(letter != "F" for letter in schedule.letters)

    def staged(self, schedule: Schedule):
        for _ in self.stages:
            yield schedule, self.error(schedule)

    def evaluate(self, schedule: Schedule) -> Evaluation:
        return Evaluation(self.error(schedule), 20.0, self.error(schedule))

    def final(self, schedule: Schedule) -> Evaluation:
        worse = self.luck if schedule.sigmas else 0.0
        return Evaluation(self.error(schedule) + worse, 20.0, self.error(schedule) + worse)


@pytest.fixture
def searched(tmp_path):
    """A function of (fitness, evaluations): the study of a search in which every step is full, and its result."""
    backend = EmbeddedBackend(TeacherSettings(steps=6), tmp_path)
    settings = SearchSettings.of(backend, 1.0, samples=16, families=("free",))

    def run(fitness, evaluations: int, name: str = "s"):
        study = open_study(f"sqlite:///{tmp_path}/s.db", name, settings)
        return study, run_search(study, settings.space(backend.cost), fitness, evaluations=evaluations)

    return run


def test_the_last_stage_moves_levels_towards_less_error(searched):
    study, result = searched(Valley(), 30)
    moved = result.best.schedule.sigmas
    assert moved[1] == 7.0 and moved[3] == 2.75, "half or a quarter of a step towards what is wanted"
    assert moved[5] == 0.46875 and moved[0] == 14.0 and moved[-1] == 0.0
    assert result.best.evaluation.mse < 0.5 * best_trial(study).user_attrs["mse"]
    assert best_of(study) == result.best
    best = next(one for one in found_in(study) if one.is_best)
    assert best.schedule == result.best.schedule and best.evaluation == result.best.evaluation


def test_a_descent_that_is_cut_off_goes_on_where_it_was(searched):
    whole, _ = searched(Valley(), 12)
    for tries in (1, 2, 7):
        fitness = Valley()
        study, _ = searched(fitness, 12, f"cut at {tries}")
        study.set_user_attr("flexi:moves", {})
        before = fitness.fits
        move_levels(study, fitness, tries)
        first = fitness.fits - before
        move_levels(study, fitness, 12)
        assert fitness.fits - before - first <= 12 - tries + 1, "no try is made twice"
        text = best_trial(study).user_attrs["schedule"]
        assert moved_of(study, text) == moved_of(whole, text) is not None
        move_levels(study, fitness, 12)
        move_levels(study, fitness, 1)
        assert moved_of(study, text) == moved_of(whole, text), "what is finished stays"


def test_moves_are_no_more_than_asked_for_and_none_are_made_without_time(searched):
    fitness = Valley()
    study, _ = searched(fitness, 3)
    assert len(study.user_attrs["flexi:moves"]["errors"]) == 3
    study.set_user_attr("flexi:moves", {})
    move_levels(study, fitness, seconds=0.0)
    assert study.user_attrs["flexi:moves"] == {"schedule": "6*(F)", "errors": [], "seconds": 0.0, "moved": None}
    move_levels(study, fitness)
    assert 5 < len(study.user_attrs["flexi:moves"]["errors"]) <= 5 * 2 * len(FRACTIONS)


def test_levels_that_lose_on_the_finals_samples_are_not_moved(searched):
    study, result = searched(Valley(luck=10.0), 30)
    assert result.best.schedule.sigmas is None
    assert study.user_attrs["flexi:moves"]["moved"] is None


def test_levels_that_cannot_be_bettered_stay(searched):
    study, result = searched(Valley(wanted=GRID), 30)
    assert result.best.schedule.sigmas is None and len(study.user_attrs["flexi:moves"]["errors"]) == 20


def test_the_levels_of_a_real_schedule_are_moved_nearer_to_the_teacher(tmp_path):
    backend = EmbeddedBackend(TeacherSettings("dpmpp_2m", steps=12), tmp_path / "teacher")
    settings = SearchSettings.of(backend, 3.0, samples=8, families=("free",), guesses=0, finalists=0)
    fitness = Fitness(backend, (4, 8))
    study = open_study(f"sqlite:///{tmp_path}/s.db", "s", settings)
    result = run_search(study, settings.space(backend.cost), fitness, evaluations=4)
    still = best_trial(study)
    moved = moved_of(study, still.user_attrs["schedule"])
    assert moved is not None and result.best.schedule == moved.schedule
    assert moved.evaluation.mse < still.user_attrs["mse"]
    assert moved.schedule.letters == Schedule.parse(still.user_attrs["schedule"]).letters
    assert Schedule.parse(str(moved.schedule)) == moved.schedule
