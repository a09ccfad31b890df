"""Steps that reuse guidance: exact where the guidance difference is constant, half the rows, the same twice."""

from __future__ import annotations

import pytest
import torch

from flexi_core import Schedule
from flexi_core.demo.model import DemoModel
from flexi_core.demo.scenes import parse_caption
from flexi_core.run.cost import NetworkCost, predicted_speedup
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import make_noise, sample, sample_euler, sigmas_normal

CAPTIONS = [parse_caption("a large red circle at the center on a navy background")] * 2
STEPS = 6


@pytest.fixture(scope="module")
def model():
    return DemoModel.load()


@pytest.fixture
def draw(model):
    def made(text: str, cfg: float = 3.0):
        return sample(model, Schedule.parse(text), sigmas_normal(model, STEPS), make_noise(5, 2), CAPTIONS, cfg=cfg)

    return made


@pytest.mark.parametrize("text", ["F|5*(f)", "FX|f|F|fX"])
def test_reuse_is_exact_where_the_guidance_difference_is_constant(text):
    """The halves differ by a constant eps, so that the last step's difference is this step's."""
    offset, sigmas, x = torch.randn(1, 3, 4, 4), torch.linspace(6, 0, 7), torch.randn(1, 3, 4, 4) * 6

    def denoiser(run: Run | None):
        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            def halves(both: bool):
                conditional = x / (1 + sigma**2)
                return conditional, conditional + sigma * offset if both else torch.full_like(x, torch.nan)

            def guided():
                with_, without = halves(True) if run is None else run.guide(x, float(sigma), halves)
                return without + 3 * (with_ - without)

            return guided() if run is None else run.predict(x, float(sigma), guided)

        return denoise

    schedule = Schedule.parse(text)
    every = Schedule.parse(text.upper())
    reused, plain = (sample_euler(denoiser(Run(make_plan(each, sigmas.tolist()))), x, sigmas) for each in (schedule, every))
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-5)


def test_a_step_with_reused_guidance_runs_half_the_rows_and_costs_half(draw):
    _, run = draw("FP@2|fp@2|F|f")
    assert [sum(record.calls.values()) for record in run.records] == [4, 4, 2, 2, 4, 2]
    assert [{kind.value: count for kind, count in record.kinds.items()} for record in run.records] == [{k: 1} for k in "FPfpFf"]
    assert not any(record.fallbacks for record in run.records)
    cost = NetworkCost(100.0)
    assert predicted_speedup(Schedule.parse("F|f"), cost) == pytest.approx(2 / 1.5)


def test_reused_guidance_is_near_the_teacher_and_the_second_run_is_the_first(draw):
    teacher, reused, other = (draw(text)[0] for text in ("6*(F)", "3*(F)|3*(f)", "3*(F)|3*(f)"))
    assert torch.equal(reused, other)
    assert 1e-4 < (reused - teacher).square().mean().sqrt() < 0.1


def test_without_guidance_there_is_nothing_to_reuse_and_nothing_changes(draw):
    teacher, reused = draw("6*(F)", cfg=1.0)[0], draw("3*(F)|3*(f)", cfg=1.0)[0]
    assert torch.equal(teacher, reused)


def test_guidance_of_another_size_is_not_reused():
    run = Run(make_plan(Schedule.parse("F|f"), [2.0, 1.0, 0.0]))
    run.guide(torch.zeros(1, 3, 4, 4), 2.0, lambda both: (torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)))
    asked = []

    def halves(both: bool):
        asked.append(both)
        return torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)

    run.guide(torch.zeros(1, 3, 8, 8), 1.0, halves)
    assert asked == [True] and "another size" in next(iter(run.records[1].fallbacks))


def test_a_forecast_comes_nearer_than_a_held_feature_and_its_order_zero_is_held(draw):
    teacher = draw("6*(F)")[0]
    held, zero, forecast, again = (draw(f"F|F|FP@2{order}|FP@2{order}")[0] for order in ("", "^0", "^1", "^1"))
    assert torch.equal(held, zero) and torch.equal(forecast, again)
    assert (forecast - teacher).square().mean() < (held - teacher).square().mean()


def test_context_windows_keep_their_own_guidance():
    run = Run(make_plan(Schedule.parse("F|f"), [2.0, 1.0, 0.0]))
    x = torch.zeros(1, 1)
    for window, difference in (((0, 1), 1.0), ((1, 2), 5.0)):
        run.guide(x, 2.0, lambda both, d=difference: (x, x + d), window)
    found = [run.guide(x, 1.0, lambda both: (x, x), window)[1].item() for window in ((0, 1), (1, 2))]
    assert found == [0.5, 2.5]


def test_a_run_mapped_to_other_steps_opens_with_a_full_step():
    plan = make_plan(Schedule.parse("FX|fX|FpX@2|f"), torch.linspace(1, 0, 5).tolist())
    assert plan.letters[0] == "F" and plan.terms == 2
