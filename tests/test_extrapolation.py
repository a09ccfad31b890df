"""Extrapolated derivatives: the Lagrange polynomial through the last computed places."""

import pytest
import torch

from flexi_core.run.null_steps.extrapolation import PredictionHistory

ALL = (1.0, 1.0, 1.0, 1.0)
PLACES = [0.0, 1.0, 2.5, 3.0, 7.0, 7.25]


def polynomial(place: float, degree: int) -> torch.Tensor:
    """Return two polynomials of a degree at a place [2], float64."""
    coefficients = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-4.0, 0.25, 1.5, -1.0]], dtype=torch.float64)[:, : degree + 1]
    return (coefficients * torch.tensor([place**i for i in range(degree + 1)], dtype=torch.float64)).sum(dim=1)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_polynomials_up_to_the_order_are_exact(order):
    for degree in range(order + 1):
        history = PredictionHistory(order + 1)
        for place in PLACES:
            history.add(place, polynomial(place, degree))
        for place in (7.5, 8.0, 12.0):
            torch.testing.assert_close(
                history.extrapolate(place, ALL[: order + 1]), polynomial(place, degree), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_above_the_order_is_not(order):
    history = PredictionHistory(order + 1)
    for place in PLACES:
        history.add(place, polynomial(place, order + 1))
    assert (history.extrapolate(9.0, ALL[: order + 1]) - polynomial(9.0, order + 1)).abs().max() > 1


def test_order_zero_holds_the_last_derivative_bit_for_bit():
    history = PredictionHistory(1)
    for place in PLACES:
        history.add(place, polynomial(place, 3))
    assert torch.equal(history.extrapolate(11.0, ALL[:1]), polynomial(7.25, 3))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_before_enough_steps_are_computed_the_degree_is_what_they_allow(order):
    history = PredictionHistory(order + 1)
    history.add(0.0, polynomial(0.0, 3))
    assert torch.equal(history.extrapolate(5.0, ALL[: order + 1]), polynomial(0.0, 3))
    history.add(2.0, polynomial(2.0, 3))
    slope = (polynomial(2.0, 3) - polynomial(0.0, 3)) / 2
    torch.testing.assert_close(history.extrapolate(5.0, ALL[: order + 1]), polynomial(2.0, 3) + 3 * slope)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("again", [0, 1, 2])
def test_a_place_computed_again_takes_the_first_ones_stead(order, again):
    history = PredictionHistory(order + 1)
    places = PLACES[:3]
    for place in places:
        history.add(place, torch.full((2,), 100.0) if place == places[again] else polynomial(place, 2))
    history.add(places[again] + 1e-9, polynomial(places[again], 2))
    value = history.extrapolate(4.0, ALL[: order + 1])
    assert value.isfinite().all()
    if order == 2:
        torch.testing.assert_close(value, polynomial(4.0, 2), rtol=1e-6, atol=1e-6)


def test_nothing_fits_before_a_derivative_is_kept_nor_another_shape_after():
    history = PredictionHistory(1)
    assert not history.fits(torch.zeros(2))
    history.add(0.0, torch.zeros(2))
    assert history.fits(torch.ones(2))
    assert not history.fits(torch.ones(3))
    assert not history.fits(torch.ones(1, 2))


def test_what_was_kept_of_another_shape_gives_way():
    # Samplers that make the picture larger on the way.
    history = PredictionHistory(3)
    for place, size in ((0.0, 2), (1.0, 2), (2.0, 3)):
        history.add(place, torch.full((size,), place))
    assert torch.equal(history.extrapolate(3.0, ALL[:3]), torch.full((3,), 2.0))


def test_a_blend_multiplies_the_held_value_and_each_further_change():
    history = PredictionHistory(3)
    for place in (0.0, 1.0, 3.0):
        history.add(place, polynomial(place, 2))
    held, line, parabola = (history.extrapolate(5.0, ALL[:terms]) for terms in (1, 2, 3))
    blended = history.extrapolate(5.0, (0.9, 0.5, -2.0))
    torch.testing.assert_close(blended, 0.9 * held + 0.5 * (line - held) - 2.0 * (parabola - line))
    assert torch.equal(history.extrapolate(5.0, (0.0,)), torch.zeros(2, dtype=torch.float64))
