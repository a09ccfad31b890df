"""Laws of the sensitivities: what is measured, the additive model, and the schedules that it plans."""

from __future__ import annotations

import json
from itertools import product

import optuna
import pytest

from flexi_core import FlexiError, Schedule
from flexi_core.metrics import latent_mse
from flexi_core.run.cost import NetworkCost
from flexi_core.tune import nearest
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings
from search_tools.space.space import Space
from search_tools.strategies.guesses import TunedFront, with_guesses
from search_tools.strategies.sensitivity import EXPONENTS, Sensitivities, Stretch, _Paths, measure_sensitivities

# Partial steps of depth 1, 2, 3 cost 8, 22 and 38 % of a full one.
COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 140.0, ("input", 2): 160.0, ("input", 3): 620.0,
                            **{("output", i): 0.0 for i in range(4)}})  # fmt: skip


def _made_up(steps: int, kinds: str = "XPf") -> Sensitivities:
    """Errors that fall along the run and grow with the length, of every kind."""
    worth = {"X": 4e-5, "P": 6e-6, "f": 2e-5}
    places = sorted({0, 1, steps // 3, steps // 2, steps - 3})
    stretches = [
        Stretch(kind, after, length, worth[kind] * length**3 / (after + 1), 1 if kind == "P" else 0)
        for kind, after, length in product(kinds, places, (1, 3))
        if after + length < steps
    ]
    return Sensitivities(steps, 4, 0.0, tuple(stretches))


@pytest.fixture(scope="module")
def backend(backend_on, small_model):
    return backend_on(small_model, TeacherSettings(steps=6))


@pytest.fixture(scope="module")
def measured(backend):
    return measure_sensitivities(backend, ("X", "P", "f"), samples=2, places={"X": 3, "P": 2, "f": 2})


def test_a_measured_error_is_that_of_the_run_that_is_full_but_for_the_stretch(backend, measured):
    teacher = backend.teacher(0, 2)
    runs = {"X": "F|F|FX|F|F", "P": "F|F|FP@1|F|F", "f": "F|F|F|f|F|F"}
    for kind, text in runs.items():
        (stretch,) = (s for s in measured.stretches if (s.kind, s.after, s.length) == (kind, 2, 1))
        latents = backend.sample(Schedule.parse(text), 0, 2).latents
        assert stretch.error == pytest.approx(float(latent_mse(latents, teacher).mean()), rel=1e-4)


def test_every_kind_is_measured_at_several_places_and_lengths_and_at_the_last_step(measured):
    for kind in "XPf":
        found = {(s.after, s.length) for s in measured.stretches if s.kind == kind}
        assert len({after for after, _ in found}) > 1 and len({length for _, length in found}) > 1
        assert max(after + length for after, length in found) == measured.steps - 1


def test_the_steps_before_a_stretch_are_computed_once(backend):
    found = measure_sensitivities(backend, ("X",), samples=1, places={"X": 3})
    computed = found.steps + sum(found.steps - 1 - s.after - s.length for s in found.stretches)
    assert found.macs == 2 * computed * backend.cost.full_macs  # with and without the prompt


def test_a_network_that_cannot_be_partial_has_no_partial_stretches(backend_on, small_model):
    class Whole(EmbeddedBackend):
        cost = NetworkCost(1000.0)

    found = measure_sensitivities(backend_on(small_model, TeacherSettings(steps=3), Whole), ("P", "X"), samples=1)
    assert found.kinds == ("X",)


def test_sensitivities_survive_json(measured):
    assert Sensitivities.from_dict(json.loads(json.dumps(measured.as_dict()))) == measured


def test_sensitivities_of_another_version_are_refused():
    with pytest.raises(FlexiError, match="measure them again"):
        Sensitivities.from_dict({"steps": 6, "stretches": [{"place": 3}]})


def test_unknown_kinds_and_runs_too_short_are_refused(backend, backend_on, small_model):
    with pytest.raises(FlexiError, match="unknown kinds of step: N"):
        measure_sensitivities(backend, ("N",))
    with pytest.raises(FlexiError, match="from 3 on"):
        measure_sensitivities(backend_on(small_model, TeacherSettings(steps=2)))


def test_a_longer_stretch_and_a_wider_gap_are_never_predicted_better(measured):
    for model in (measured, _made_up(20)):
        for kind, depth in (("X", 0), ("P", 1), ("f", 0)):
            for after in range(model.steps - 2):
                errors = [model.rms(kind, after, length, depth=depth) for length in range(1, model.steps - after)]
                assert errors == sorted(errors)
    held = [_made_up(20).rms("X", 8, 3, gap) for gap in (3, 5, 7)]
    assert held == sorted(held)


def test_the_model_repeats_what_it_was_made_from():
    model = _made_up(20)
    for stretch in model.stretches:
        if (stretch.kind, stretch.after) == ("X", 0):
            assert model.rms("X", 0, stretch.length) ** 2 == pytest.approx(stretch.error)
    off = [model.rms(s.kind, s.after, s.length, depth=s.depth) ** 2 / s.error for s in model.stretches]
    assert min(off) > 0.2 and max(off) < 5


def test_a_schedule_without_cheaper_steps_has_no_error():
    assert _made_up(8).predict(Schedule.parse("|".join("F" * 8))) == 0.0


def test_a_schedule_of_another_length_or_with_unmeasured_steps_is_refused():
    with pytest.raises(FlexiError, match="has 3 steps, the sensitivities are of 8"):
        _made_up(8).predict(Schedule.parse("FXX"))
    with pytest.raises(FlexiError, match="N were not measured"):
        _made_up(8).predict(Schedule.parse("FXXFNNNN"))


def _every(steps: int, kinds: str):
    """Every schedule of F and these kinds, partial steps at depth 1."""
    for letters in product("F" + kinds, repeat=steps - 1):
        text = "F" + "".join(letters)
        if "XP" in text or "fP" in text:
            continue
        segments = text.replace("F", "|F").replace("f", "|f")[1:].split("|")
        yield Schedule.parse("|".join(s + "@1" if "P" in s else s for s in segments))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize(("kinds", "speedup"), [("X", 2.0), ("Xf", 2.5), ("XP", 2.0), ("XPf", 3.0), ("f", 1.5)])
def test_the_planned_schedules_are_the_best_of_all_in_order(kinds, speedup, exponent):
    steps = 7 if len(kinds) < 3 else 6
    model, space = _made_up(steps), Space(steps, speedup, COST)
    # The plan counts partial steps in twentieths of a full one, rounded up: 8 % as 10 %.
    price = {"F": 1.0, "f": 0.5, "P": 0.1, "X": 0.0}
    fitting = [s for s in _every(steps, kinds) if sum(price[letter] for letter in s.letters) <= space.budget]
    best = sorted(model.predict(s, exponent) for s in fitting)[:20]
    paths = _Paths(model, space, kinds, exponent).best()
    planned = [next(paths) for _ in best]
    assert len(set(planned)) == len(planned)
    assert [model.predict(s, exponent) for s in planned] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("kinds", [None, ("X",), ("X", "f"), ("X", "P")])
@pytest.mark.parametrize(("steps", "speedup"), [(20, 3.0), (12, 1.0), (7, 7.0), (16, 2.7)])
def test_plans_keep_the_budget_and_differ(steps, speedup, kinds):
    space = Space(steps, speedup, COST, reuse_guidance=True)
    planned = _made_up(steps).plan(space, 6, kinds)
    assert planned and len(set(planned)) == len(planned) <= 6
    for schedule in planned:
        assert len(schedule) == steps and space.spent(schedule) <= space.budget
        assert set(schedule.letters) <= {"F", *(kinds or "XPf")}


def test_the_first_plans_compute_the_last_step():
    assert _made_up(25).plan(Space(25, 4.0, COST), 1, ("X",))[0].letters.endswith("F")


def test_plans_are_the_same_again_and_from_json():
    model, space = _made_up(25), Space(25, 4.0, COST)
    again = Sensitivities.from_dict(json.loads(json.dumps(model.as_dict())))
    assert model.plan(space, 5) == model.plan(space, 5) == again.plan(space, 5)


def test_guidance_is_reused_only_where_the_space_reuses_it():
    without, with_reuse = (_made_up(20).plan(Space(20, 4.0, COST, reuse_guidance=reuse), 3) for reuse in (False, True))
    assert not any("f" in schedule.letters for schedule in without)
    assert any("f" in schedule.letters for schedule in with_reuse)


def test_a_space_of_equal_segments_has_no_plans():
    assert _made_up(20).plan(Space(20, 4.0, COST, ("paper",)), 5) == []


def test_a_space_of_another_run_is_refused():
    with pytest.raises(FlexiError, match="the space is of 20 steps, the sensitivities are of 25"):
        _made_up(25).plan(Space(20, 4.0, COST), 5)


def test_the_first_guess_is_the_tuned_schedule_for_the_budget(backend_on, small_model):
    backend, study = backend_on(small_model, TeacherSettings(steps=10)), optuna.create_study()
    space = Space(10, 2.0, backend.cost)
    guesses = with_guesses(study, backend, space, 6, samples=2).guesses
    front = TunedFront.from_dict(study.user_attrs["flexi:tuned"], 10)
    assert guesses[0].letters == nearest(front.planned, 5).schedule.letters
    assert [guess.letters.count("F") for guess in guesses] == [5] * len(guesses)
    assert front.full_runs > 2
    assert with_guesses(study, None, space, 1).guesses == guesses[:1]


def test_a_study_that_has_sensitivities_goes_on_with_them():
    study, space, model = optuna.create_study(), Space(20, 4.0, COST), _made_up(20, "X")
    study.set_user_attr("flexi:sensitivities", model.as_dict())
    assert with_guesses(study, None, space, 3).guesses == tuple(model.plan(space, 3))


@pytest.mark.parametrize(
    "values",
    [None, 3, {}, {"front": [{"schedule": "FX", "full": 1}]}, {"front": [{"schedule": "?", "full": 1, "predicted_db": 9.0}]},
     {"front": [{"schedule": "FX", "full": 1, "predicted_db": 9.0}], "full_runs": 1.0},
     {"front": [{"schedule": "9*(F)|F", "full": 3, "predicted_db": 9.0}], "full_runs": 1.0}],
)  # fmt: skip
def test_tuned_schedules_of_a_study_that_are_none_are_refused_in_words(values):
    study = optuna.create_study()
    study.set_user_attr("flexi:tuned", values)
    with pytest.raises(FlexiError, match=r"the study's tuned schedules .* give another --study"):
        with_guesses(study, None, Space(10, 2.0, COST), 3)


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("sampler", ["euler", "heun"])  # the one is tuned, the other has sensitivities
def test_a_study_measures_once_and_starts_from_the_guesses(backend_on, small_model, front, sampler):
    backend = backend_on(small_model, TeacherSettings(sampler, steps=8))
    study, space = optuna.create_study(), Space(8, 2.0, backend.cost, front=front)
    first = with_guesses(study, backend, space, 3, samples=2)
    assert ("flexi:tuned" in study.user_attrs) == (sampler == "euler")
    assert ("flexi:sensitivities" in study.user_attrs) == (sampler == "heun")
    assert first.guesses and first.seeds()[: len(first.guesses)] == list(first.guesses)
    assert all(space.spent(guess) <= space.budget for guess in first.guesses)
    assert with_guesses(study, None, space, 3) == first, "another worker takes them from the study"
    assert with_guesses(study, None, space, 0) == space
    paper = Space(8, 2.0, backend.cost, ("paper",))
    assert with_guesses(study, None, paper, 3) == paper
