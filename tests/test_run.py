"""A run of a sampler under a plan, on Gaussian data, where the denoiser and every trajectory's end are known exactly."""

import pytest
import torch

from flexi_core import Schedule
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.run.sampler import SamplerTraits
from flexi_core.runtime.sampling import sample_dpmpp_2m, sample_euler, sample_heun
from flexi_core.schedule.kinds import StepKind
from flexi_core.schedule.presets import all_full, segments_for_speedup, uniform

SAMPLERS = [sample_euler, sample_heun, sample_dpmpp_2m]


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)])
def test_samplers_converge_to_the_exact_end_at_their_order(gaussian, sampler, order):
    x, end = gaussian.start(10.0), gaussian.end(gaussian.start(10.0), 10.0)
    # The last step from sigma 0.001 to 0 is Euler's in every sampler; down there it adds no error that counts.
    errors = [rms(sampler(gaussian.denoise, x, gaussian.sigmas(n, low=0.001)), end) for n in (80, 160)]
    assert errors[1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_full_schedule_equals_plain_sampling(gaussian, sampler):
    sigmas, x = gaussian.sigmas(20), gaussian.start(10.0)
    sampled, run = gaussian.sample(sampler, all_full(20), sigmas, x)
    assert torch.equal(sampled, sampler(gaussian.denoise, x, sigmas))
    assert all(record.evaluations for record in run.records)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("text", ["10*(FN)", "FFF|5*(FNN)|FN", "F" + "N" * 19])
def test_removed_steps_equal_the_same_sampler_on_the_remaining_sigmas(gaussian, sampler, text):
    sigmas, x = gaussian.sigmas(20), gaussian.start(10.0)
    kept = [i for i, letter in enumerate(Schedule.parse(text).letters) if letter != "N"]
    sampled, _ = gaussian.sample(sampler, text, sigmas, x)
    assert torch.equal(sampled, sampler(gaussian.denoise, x, sigmas[[*kept, 20]]))


@pytest.mark.parametrize("full", [1, 4, 10, 13])
def test_with_euler_holding_the_derivative_equals_removing_the_step(gaussian, full):
    sigmas, x = gaussian.sigmas(20), gaussian.start(10.0)
    held = Schedule(uniform(20, full).segments, order=0)
    removed = uniform(20, full, StepKind.NULL)
    torch.testing.assert_close(
        gaussian.sample(sample_euler, held, sigmas, x)[0],
        gaussian.sample(sample_euler, removed, sigmas, x)[0],
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("full", [5, 10, 15, 20])
def test_linear_extrapolation_comes_nearer_to_the_teacher_than_holding(gaussian, full):
    sigmas, x = gaussian.sigmas(50), gaussian.start(10.0)
    teacher = sample_euler(gaussian.denoise, x, sigmas)
    error = {
        order: rms(gaussian.sample(sample_euler, Schedule(uniform(50, full).segments, order), sigmas, x)[0], teacher)
        for order in (0, 1)
    }
    assert error[1] < 0.5 * error[0]


def test_more_full_steps_bring_the_candidate_nearer_to_the_teacher(gaussian):
    sigmas, x = gaussian.sigmas(60), gaussian.start(10.0)
    teacher = sample_euler(gaussian.denoise, x, sigmas)
    speedups = (10, 5, 3, 2, 1.5, 1)
    errors = [rms(gaussian.sample(sample_euler, segments_for_speedup(60, s), sigmas, x)[0], teacher) for s in speedups]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_before_two_steps_are_computed_an_extrapolated_step_holds(gaussian):
    sigmas, x = gaussian.sigmas(4), gaussian.start(10.0)
    linear, _ = gaussian.sample(sample_euler, "FXXX; order=1", sigmas, x)
    held, _ = gaussian.sample(sample_euler, "FXXX; order=0", sigmas, x)
    assert torch.equal(linear, held)


def test_extrapolated_steps_ask_no_network_and_are_counted(gaussian):
    _, run = gaussian.sample(sample_euler, "FFXX|FX", gaussian.sigmas(6), gaussian.start(10.0))
    assert [record.evaluations for record in run.records] == [1] * 6
    assert [record.seconds > 0 for record in run.records] == [True, True, False, False, True, False]
    assert not any(record.fallbacks for record in run.records)


def test_a_sampler_that_asks_twice_a_step_gets_the_kind_of_the_sigma_it_asks_at(gaussian):
    asked = []

    def model(x, sigma):
        asked.append(float(sigma))
        return gaussian.denoise(x, sigma)

    sigmas = gaussian.sigmas(6)
    run = Run(make_plan(Schedule.parse("FXF|FXX"), sigmas.tolist()))
    sample_heun(lambda x, s: run.predict(x, float(s), lambda: model(x, s)), gaussian.start(10.0), sigmas)
    assert set(asked) == {float(sigmas[i]) for i in (0, 2, 3)}
    assert sum(record.evaluations for record in run.records) == 11


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_sampler_that_goes_back_to_an_earlier_sigma_stays_finite(gaussian, order):
    # heunpp2 asks at its next two sigmas and then steps from the first of them.
    sigmas = gaussian.sigmas(8)
    run = Run(make_plan(Schedule.parse(f"FFFX|FXXX; order={order}"), sigmas.tolist()))
    x = gaussian.start(10.0)
    for i in range(6):
        for sigma in sigmas[i : i + 3]:
            denoised = run.predict(x, float(sigma), lambda sigma=sigma: gaussian.denoise(x, sigma))
            assert denoised.isfinite().all()


def test_an_evaluation_that_must_be_computed_is_computed_and_reasoned(gaussian):
    sigmas, x = gaussian.sigmas(2), gaussian.start(10.0)
    run = Run(make_plan(Schedule.parse("FX"), sigmas.tolist()))
    run.predict(x, float(sigmas[0]), lambda: x)
    exact = gaussian.denoise(x, sigmas[1])
    assert torch.equal(run.predict(x, float(sigmas[1]), lambda: exact, must_compute="the sampler listens"), exact)
    assert run.records[1].fallbacks == {"the sampler listens": 1}


def test_a_changed_shape_is_computed_and_reasoned(gaussian):
    sigmas, x = gaussian.sigmas(2), gaussian.start(10.0)
    run = Run(make_plan(Schedule.parse("FX"), sigmas.tolist()))
    run.predict(x, float(sigmas[0]), lambda: gaussian.denoise(x, sigmas[0]))
    other = x[:3]
    assert torch.equal(run.predict(other, float(sigmas[1]), lambda: other * 2), other * 2)
    assert run.records[1].fallbacks == {"no computed step of this shape to extrapolate from": 1}


def test_a_second_run_of_one_plan_starts_empty(gaussian):
    sigmas, x = gaussian.sigmas(2), gaussian.start(10.0)
    plan = make_plan(Schedule.parse("FX"), sigmas.tolist())
    first = Run(plan)
    first.predict(x, float(sigmas[0]), lambda: gaussian.denoise(x, sigmas[0]))
    second = Run(plan)
    second.predict(x, float(sigmas[1]), lambda: x)
    assert second.records[1].fallbacks == {"no computed step of this shape to extrapolate from": 1}


def test_a_released_run_remembers_nothing_but_its_records(gaussian):
    sigmas, x = gaussian.sigmas(2), gaussian.start(10.0)
    run = Run(make_plan(Schedule.parse("FX"), sigmas.tolist()))
    run.predict(x, float(sigmas[0]), lambda: gaussian.denoise(x, sigmas[0]))
    run.release()
    assert torch.equal(run.predict(x, float(sigmas[1]), lambda: x * 3), x * 3)
    assert [record.evaluations for record in run.records] == [1, 1]


@pytest.mark.parametrize("text", ["FFFF", "FXXX", "FFXX; order=2", "FNNN"])
def test_the_samplers_own_tensor_is_never_written_to(gaussian, text):
    sigmas, x = gaussian.sigmas(4), gaussian.start(10.0)
    before = x.clone()
    gaussian.sample(sample_euler, text, sigmas, x)
    assert torch.equal(x, before)


def test_a_reason_is_logged_once_however_often_it_is_counted(gaussian, caplog):
    sigmas, x = gaussian.sigmas(4), gaussian.start(10.0)
    run = Run(make_plan(Schedule.parse("FXXX"), sigmas.tolist()))
    for sigma in sigmas[:-1]:
        run.predict(x, float(sigma), lambda: x, must_compute="the sampler listens")
    assert sum(record.fallbacks.total() for record in run.records) == 3
    assert [message for message in caplog.messages if "the sampler listens" in message] == [
        "Flexiffusion: step 2 ran in full: the sampler listens"
    ]


def asks(text: str, questions: list[float], **traits: object) -> tuple[Run, list[float]]:
    """Return a run at 10, 5, 1, 0 and its answers to a sampler's questions, each of a latent of its own."""
    run = Run(make_plan(Schedule.parse(text), [10.0, 5.0, 1.0, 0.0], SamplerTraits(**traits)))
    answers = [
        float(run.predict(torch.full((1,), float(i)), s, lambda i=i: torch.tensor([2.0**i]))) for i, s in enumerate(questions)
    ]
    return run, answers


def test_a_question_between_two_steps_of_a_sampler_that_asks_at_their_starts_alone_is_computed_and_reasoned():
    run, _ = asks("FXF", [10, 3], asks_between=False)
    assert run.records[1].fallbacks == {"the sampler asked at a noise level at which no step of the run begins": 1}
    for questions, between in (([10, 5], False), ([10, 3], True)):
        run, _ = asks("FXF", questions, asks_between=between)
        assert not run.records[1].fallbacks and run.records[1].kinds == {StepKind.EXTRAPOLATED: 1}


def test_another_latent_at_the_same_level_is_new_noise_where_the_sampler_asks_once_at_each():
    for goes_back, rises in ((-1, 1), (0, 0), (1, 0)):
        assert asks("FFX", [10, 5, 5], goes_back=goes_back)[0].rises == rises
    run, x = Run(make_plan(Schedule.parse("FFX"), [10.0, 5.0, 1.0, 0.0], SamplerTraits(goes_back=-1))), torch.ones(2)
    for latent, rises in ((x, 0), (x, 0), (x.clone(), 0), (torch.ones(3), 1), (torch.zeros(3), 2)):
        run.predict(latent, 10.0, lambda latent=latent: latent)
        assert run.rises == rises
    run.predict(torch.ones(3), 5.0, lambda: torch.ones(3))
    assert run.rises == 2, "a lower level is the next step"


def test_after_new_noise_nothing_of_before_is_gone_on_from():
    run, answers = asks("FXX; basis=denoised, order=0", [10, 5, 10, 5, 10, 1], goes_back=0)
    assert answers == [1, 1, 4, 4, 16, 16] and run.rises == 2
    run, answers = asks("FXX; basis=denoised, order=0", [10, 1, 5], goes_back=0)
    assert answers == [1, 1, 4]
    assert run.records[1].fallbacks == {"no step was computed since the sampler went back up to a higher noise level": 1}


def test_questions_at_another_level_than_the_samplers_own_are_counted():
    run, x = Run(make_plan(Schedule.parse("FF"), [10.0, 5.0, 0.0])), torch.ones(1)
    for sigma, level, count in ((10.0, None, 0), (10.0005, 10.0, 0), (9.9, 10.0, 1), (5.0, 5.0, 1), (4.9, 5.0, 2)):
        run.predict(x, sigma, lambda: x, level=level)
        assert run.asked_elsewhere == count


def test_a_question_within_the_answer_to_another_is_a_part_of_it():
    run, x = Run(make_plan(Schedule.parse("FX"), [10.0, 5.0, 0.0])), torch.ones(1)
    assert run.predict(x, 10.0, lambda: 2 * run.predict(x, 5.0, lambda: 3 * x)) == 6
    assert [record.evaluations for record in run.records] == [1, 0]
