"""Fitted blends: a solver's response, the law that a fit is no worse where it was made, and its worth on unseen seeds."""

from __future__ import annotations

import pytest
import torch

from flexi_core import Schedule
from flexi_core.metrics import psnr_db
from flexi_core.run.plan import make_plan
from flexi_core.run.replay import PredictionStore
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import sample_dpmpp_2m, sample_euler, sample_heun
from flexi_core.schedule.presets import all_full
from flexi_core.tune.fit import BlendFit, TrajectoryRecorder, linear_response
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import JUDGE_SEEDS, SEARCH_SEEDS, TeacherSettings

TEXT = "FXX|FXXX|FXXX|F"
SIGMAS = torch.tensor([14.6, 9.0, 6.1, 4.2, 3.0, 2.1, 1.5, 1.1, 0.8, 0.5, 0.25, 0.1, 0.0])
STEPS = len(SIGMAS) - 1


@pytest.fixture(scope="module", params=["euler", "dpmpp_2m"])
def backend(request, backend_on, small_model):
    return backend_on(small_model, TeacherSettings(request.param, steps=STEPS))


@pytest.mark.parametrize("solve", [sample_euler, sample_dpmpp_2m])
def test_a_solvers_states_follow_from_its_response(solve):
    derivatives, states = torch.randn(STEPS, 2, 3, dtype=torch.float64), []
    start = torch.randn(2, 3, dtype=torch.float64)

    def denoise(x, sigma):
        states.append(x)
        return x - sigma * derivatives[len(states) - 1]

    states.append(solve(denoise, start, SIGMAS.double()))
    everything = torch.cat([start[None], derivatives]).flatten(1)
    followed = linear_response(solve, SIGMAS) @ everything
    torch.testing.assert_close(followed, torch.stack(states).flatten(1), rtol=1e-6, atol=1e-6)


def _noisy(denoise, x, sigmas):
    return sample_euler(denoise, x, sigmas) + torch.randn_like(x)


def _squares(denoise, x, sigmas):
    return sample_euler(denoise, x, sigmas) ** 2


@pytest.mark.parametrize("solve", [sample_heun, _noisy, _squares, lambda denoise, x, sigmas: x])
def test_a_solver_that_asks_twice_draws_noise_or_is_not_linear_has_no_response(solve):
    assert linear_response(solve, SIGMAS) is None


@pytest.mark.parametrize("solve", [sample_euler, sample_dpmpp_2m])
def test_a_fit_is_never_worse_at_the_end_than_what_it_began_from(gaussian, solve):
    """One stretch, whose target is the run's end: least squares over factors that hold the linear extrapolation."""
    schedule, x = Schedule.parse("4*(F)|F" + "X" * (STEPS - 5)), gaussian.start(14.6)
    recorder = TrajectoryRecorder()
    teacher = _run(gaussian, solve, all_full(STEPS), x, recorder)
    response = linear_response(solve, SIGMAS)
    fit = BlendFit(make_plan(schedule, SIGMAS.tolist()), response, response)
    fit.begin(recorder.trajectory)
    fitted = _run(gaussian, solve, schedule, x, fit)
    plain = _run(gaussian, solve, schedule, x)
    assert (fitted - teacher).square().sum() < 0.5 * (plain - teacher).square().sum()
    again = _run(gaussian, solve, fit.schedule(schedule), x)
    assert torch.equal(again, fitted), "the text holds all that the fit did"


def _run(gaussian, solve, schedule, x, observer=None):
    run = Run(make_plan(schedule, SIGMAS.tolist()), observer=observer)
    return solve(lambda x, s: run.predict(x, float(s), lambda: gaussian.denoise(x, s)), x, SIGMAS.to(x.dtype))


def test_fitted_schedules_are_nearer_to_the_teacher_on_unseen_seeds(backend, tmp_path):
    backend = EmbeddedBackend(backend.settings, tmp_path)  # of pictures that it was trained for
    schedule = Schedule.parse(TEXT)
    fitted, macs = backend.fit(schedule, SEARCH_SEEDS, 4)
    assert fitted.letters == schedule.letters and macs > 0
    assert [segment.blend is not None for segment in fitted.segments] == [True, True, True, False]
    teacher = backend.teacher(JUDGE_SEEDS, 4)
    before, after = (psnr_db(backend.sample(s, JUDGE_SEEDS, 4).latents, teacher).mean() for s in (schedule, fitted))
    assert after > before + 1


def test_a_fit_repeats_bit_for_bit_and_takes_what_is_known_from_the_store(backend):
    store = PredictionStore()
    first, macs = backend.fit(Schedule.parse(TEXT), SEARCH_SEEDS, 2, store)
    again, macs_again = backend.fit(Schedule.parse(TEXT), SEARCH_SEEDS, 2, store)
    assert again == first and macs > 0 and macs_again == 0
    assert backend.sample(first, SEARCH_SEEDS, 2, predictions=store).macs == 0, "the fitted run is the run that fitted"
    elsewhere, _ = backend.fit(Schedule.parse(TEXT), SEARCH_SEEDS, 2)
    assert elsewhere == first


def test_samples_one_after_the_other_fit_nearly_as_well_as_together(backend, backend_on, small_model):
    alone = backend_on(small_model, backend.settings)
    alone.batch = 1
    apart, macs = alone.fit(Schedule.parse(TEXT), 0, 4)
    together, macs_together = backend.fit(Schedule.parse(TEXT), 0, 4)
    assert apart != together and macs == pytest.approx(macs_together), "every sample is run once"
    teacher = backend.teacher(JUDGE_SEEDS, 4)
    one, other = (psnr_db(backend.sample(s, JUDGE_SEEDS, 4).latents, teacher).mean() for s in (apart, together))
    assert abs(one - other) < 1.5


def test_a_back_end_fits_on_no_more_samples_than_it_says(backend, backend_on, small_model):
    few = backend_on(small_model, backend.settings)
    few.most_fitted = 2
    assert few.fit(Schedule.parse(TEXT), 0, 4) == backend.fit(Schedule.parse(TEXT), 0, 2)


def test_what_extrapolates_nothing_stays_as_it_is(backend):
    for text in ("12*(F)", "6*(FN)", "4*(FPP@1)"):
        assert backend.fit(Schedule.parse(text), 0, 2) == (Schedule.parse(text), 0.0)


def test_removed_steps_beside_extrapolated_ones_are_fitted_on_the_kept_noise_levels(backend):
    schedule = Schedule.parse("FNN|FXXX|FXXX|F")
    fitted, _ = backend.fit(schedule, SEARCH_SEEDS, 4)
    teacher = backend.teacher(JUDGE_SEEDS, 4)
    before, after = (psnr_db(backend.sample(s, JUDGE_SEEDS, 4).latents, teacher).mean() for s in (schedule, fitted))
    assert fitted.segments[0].blend is None and after > before


def test_a_sampler_that_cannot_be_fitted_leaves_the_schedule_as_it_is(backend_on, small_model):
    heun = backend_on(small_model, TeacherSettings("heun", steps=4))
    assert heun.fit(Schedule.parse("2*(FX)"), 0, 1)[0] == Schedule.parse("2*(FX)")
