"""What extrapolated steps carry on: the derivative without noise, the denoised latent under it."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexi_core import Schedule, ScheduleError
from flexi_core.run.null_steps.basis import DENOISED, DERIVATIVE, Rule, rule_of
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.run.sampler import PLAIN, SamplerTraits
from flexi_core.runtime.sampling import make_noise, sample, sigmas_of, traits_of
from flexi_core.runtime.solvers import SAMPLERS, STOCHASTIC, sample_euler
from flexi_core.schedule.file import from_dict, to_dict

NOISY, NOISY_TWICE = SamplerTraits(draws_noise=True), SamplerTraits(draws_noise=True, evaluations=2)
REMEMBERS = SamplerTraits(memory=2)
LEVELS = [14.6, 9.0, 5.0, 3.0, 1.5, 0.7, 0.3, 0.03, 0.0]


@pytest.mark.parametrize(
    ("text", "sampler", "rule"),
    [
        ("10*(FX)", PLAIN, Rule(DERIVATIVE, (1.0, 1.0))),
        ("10*(FX); order=0", PLAIN, Rule(DERIVATIVE, (1.0,))),
        ("10*(FX); order=2", PLAIN, Rule(DERIVATIVE, (1.0, 1.0, 1.0))),
        ("10*(FX)", REMEMBERS, Rule(DENOISED, (1.0, 0.5))),
        ("10*(FX)", NOISY, Rule(DENOISED, (1.0, 0.5))),
        ("10*(FX)", NOISY_TWICE, Rule(DENOISED, (1.0,))),
        ("10*(FX); order=2", NOISY, Rule(DENOISED, (1.0, 1.0, 1.0))),
        ("10*(FX~1,0.7)", PLAIN, Rule(DERIVATIVE, (1.0, 1.0))),
        ("10*(FX~1,0.7)", REMEMBERS, Rule(DERIVATIVE, (1.0, 1.0))),
        ("10*(FX~1,0.7)", NOISY, Rule(DENOISED, (1.0, 0.5), own_blends=False)),
        ("10*(FX~1,0.7); basis=denoised", PLAIN, Rule(DENOISED, (1.0, 0.5))),
        ("10*(FX~1,0.7); basis=denoised", NOISY, Rule(DENOISED, (1.0, 0.5))),
        ("10*(FX); basis=derivative", NOISY, Rule(DERIVATIVE, (1.0, 1.0))),
        ("10*(FX~1,0.7); basis=derivative", NOISY, Rule(DERIVATIVE, (1.0, 1.0))),
    ],
)
def test_what_is_carried_on_follows_the_text_then_the_sampler(text, sampler, rule):
    assert rule_of(Schedule.parse(text), sampler) == rule


def test_a_file_without_a_basis_keeps_the_derivative_but_under_noise():
    schedule = Schedule.parse("10*(FX)").with_info(teacher={"sampler": "dpmpp_2m"})
    assert rule_of(schedule, REMEMBERS).basis == rule_of(schedule, PLAIN).basis == DERIVATIVE
    assert rule_of(schedule, NOISY).basis == DENOISED


@pytest.mark.parametrize("basis", [DERIVATIVE, DENOISED])
def test_a_carried_on_value_stands_for_the_denoised_latent(basis):
    x, denoised = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    rule = Rule(basis, (1.0,))
    torch.testing.assert_close(rule.denoised(x, 3.5, rule.value(x, 3.5, denoised)), denoised)


@pytest.mark.parametrize("text", ["10*(FX)", "FFFF|4*(FXXX)", "4*(FXXXX~1,0.7); order=2"])
def test_old_texts_are_what_they_were_under_euler_bit_for_bit(gaussian, text):
    """The derivative, linear (or as the text says), by hand."""
    sigmas, x = gaussian.sigmas(20), gaussian.start(10.0)
    found, run = gaussian.sample(sample_euler, text, sigmas, x)
    assert torch.equal(
        found, gaussian.sample(sample_euler, f"{text}{',' if ';' in text else ';'} basis=derivative", sigmas, x)[0]
    )
    assert run.plan.rule.basis == DERIVATIVE and run.plan.rule.own_blends
    if text == "10*(FX)":
        known = []
        for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            if i % 2:
                (a, older), (b, newer) = known[-2:] if i > 1 else [(0, known[0][1])] * 2
                d = newer if i == 1 else older + (newer - older) / (b - a) * (i - a)
            else:
                d = (x - gaussian.denoise(x, sigma)) / sigma
                known.append((i, d))
            x = x + d * (following - sigma)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_a_typed_text_carries_the_denoised_latent_on_under_noise(tiny_model, sampler):
    sigmas, noise = sigmas_of(tiny_model, sampler, "simple", 8), make_noise(3, 2)

    def run(text):
        return sample(tiny_model, Schedule.parse(text), sigmas, noise, sampler=sampler, cfg=1.0)

    (typed, made), (said, _), (grainy, _) = run("4*(FX)"), run("4*(FX); basis=denoised"), run("4*(FX); basis=derivative")
    assert made.plan.rule.basis == DENOISED
    assert torch.equal(typed, said) and not torch.equal(typed, grainy)
    # Blends of the derivative give way to those of the run.
    assert torch.equal(run("4*(FX~1,0.9,0.3)")[0], typed)
    assert not torch.equal(run("4*(FX~1,0.9,0.3); basis=denoised")[0], typed)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in STOCHASTIC])
def test_without_noise_blends_are_the_texts_own(tiny_model, sampler):
    plan = make_plan(Schedule.parse("4*(FX~1,0.9,0.3)"), LEVELS, traits_of(sampler, torch.tensor(LEVELS)))
    assert plan.rule.basis == DERIVATIVE
    assert [plan.blend(i) for i in (1, 3)] == [(1.0, 0.9, 0.3)] * 2 and plan.terms == 3


@pytest.mark.parametrize("basis", [None, DERIVATIVE, DENOISED])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("sigmas", [None, (9.0, 5.0, 3.0, 1.0, 0.0)])
def test_the_basis_round_trips_in_text_and_file(basis, order, sigmas):
    schedule = Schedule(Schedule.parse("2*(FX~1,0.5)").segments, order, sigmas, basis)
    assert Schedule.parse(str(schedule)) == schedule
    assert from_dict(to_dict(schedule)) == schedule
    assert (f"basis={basis}" in str(schedule)) is (basis is not None)


def test_options_may_come_in_any_order():
    assert Schedule.parse("FX; basis=denoised, sigmas=3/2/0") == Schedule.parse("FX; sigmas=3/2/0, basis=denoised")
    assert Schedule.parse("FX ;basis = denoised").basis == DENOISED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FX; basis=velocity", "the basis is 'velocity'; it is one of derivative, denoised"),
        ("FX; basis=", "expected a basis: derivative or denoised, found 'the end'"),
        ("FX; basis=3", "expected a basis: derivative or denoised, found '3'"),
        ("FX; base=denoised", "unknown option 'base'; known: order, basis, sigmas"),
    ],
)
def test_an_unknown_basis_is_refused_in_words(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def asked(text: str, sigmas: list[float], questions: list[float], sampler: SamplerTraits = NOISY) -> list[float]:
    """Return the answers to a sampler's questions, where the network's answer to question number i is 2**i."""
    run, answers = Run(make_plan(Schedule.parse(text), sigmas, sampler)), []
    for i, sigma in enumerate(questions):
        answers.append(float(run.predict(torch.zeros(1), sigma, lambda i=i: torch.tensor([2.0**i]))))
    return answers


def test_a_restart_goes_on_from_what_lies_before_it():
    # Up again to 10, the answer at 5 is forgotten; what is held is the newest answer at 10.
    assert asked("FX", [10.0, 5.0, 0.0], [10, 5, 10, 5]) == [1, 1, 4, 4]
    held = "FXF; basis=denoised, order=0"
    assert asked(held, [10.0, 7.0, 5.0, 0.0], [10, 7, 5, 10, 7, 5]) == [1, 1, 4, 8, 8, 32]


def test_a_restart_extrapolates_from_its_own_round():
    line = "FFX~1,1; basis=denoised"
    assert asked(line, [10.0, 5.0, 1.0, 0.0], [10, 5, 10, 5, 1]) == [1, 2, 4, 8, 12]
    assert asked(line, [10.0, 5.0, 1.0, 0.0], [10, 5, 1, 10, 5, 1]) == [1, 2, 3, 8, 16, 24]


def test_questions_between_two_steps_are_answered_and_not_gone_on_from():
    # A midpoint at 7 and a corrector's guess at 5, which the step's own answer there replaces.
    line = "FFX~1,1; basis=denoised"
    assert asked(line, [10.0, 5.0, 1.0, 0.0], [10, 7, 5, 5, 1]) == [1, 2, 4, 8, 15]
