"""Schedules from recorded full runs, on a network whose answers away from the teacher's states are known exactly."""

import itertools
import json

import numpy as np
import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.basis import rule_of
from flexi_core.demo.sampling import solver_of, traits_of
from flexi_core.extrapolation import PredictionHistory
from flexi_core.fit import linear_response
from flexi_core.metrics import data_range, psnr_db
from flexi_core.plan import make_plan
from flexi_core.presets import all_full, even
from flexi_core.run import Run
from flexi_core.tune import Answer, AnswerMeter, GramRecorder, Planned, Recording, plan_front
from flexi_core.tune.answer import DEVIATION
from flexi_core.tune.simulation import term_weights

STEPS, ROWS, SHAPE = 16, 3, (4, 6, 6)
SIGMAS = torch.tensor([*np.geomspace(14.6, 0.03, STEPS), 0.0])
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")


def network(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return Gaussian data's denoised latents, their mean moving with the noise level in four directions of its own."""
    gain = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    pushes = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    level = float(np.log(sigma))
    mean = sum(np.sin((k + 1) * level / 2 + k) * push for k, push in enumerate(pushes))
    return gain * x + (1 - gain) * 0.5 * mean.to(x)


def run(sampler: str, schedule: Schedule, observer=None) -> torch.Tensor:
    """Return where a run under a schedule ends, in float64."""
    plan = make_plan(schedule, SIGMAS.tolist(), traits_of(sampler, SIGMAS))
    run = Run(plan, observer=observer)
    start = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * SIGMAS[0]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return run.predict(x, sigma, lambda: network(x, sigma))

    return solver_of(sampler)(denoise, start, SIGMAS.double(), 3)


def rule(sampler: str):
    """Return how extrapolated steps are predicted under a sampler."""
    return rule_of(even(STEPS, 8), traits_of(sampler, SIGMAS))


def recorded(sampler: str) -> Recording:
    """Return a recording of the run of all steps."""
    recorder = GramRecorder()
    schedule = Schedule(all_full(STEPS).segments, basis=rule(sampler).basis)
    return recorder.recording(run(sampler, schedule, recorder), {"sampler": sampler})


def exact(known: Answer) -> Answer:
    """Return an answer without anything that goes elsewhere, as the network here."""
    return Answer(known.sigmas, known.gain, np.zeros_like(known.rest))


def front(sampler: str) -> list[Planned]:
    """Return all schedules of a sampler, planned with what is known of the network."""
    response = linear_response(solver_of(sampler), SIGMAS, rule(sampler).basis).numpy()
    return plan_front(recorded(sampler), response, exact(Answer.guess(SIGMAS[:-1].tolist())), rule(sampler))


def true_db(sampler: str, schedule: Schedule) -> float:
    """Return the mean PSNR of a schedule's run to the run of all steps, in float64."""
    teacher = run(sampler, all_full(STEPS))
    return float(psnr_db(run(sampler, schedule), teacher, data_range(teacher)).mean())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recording_changes_nothing_of_the_run(sampler):
    assert torch.equal(run(sampler, all_full(STEPS), GramRecorder()), run(sampler, all_full(STEPS)))


def test_a_recording_holds_the_products_of_the_start_and_the_predictions(monkeypatch):
    monkeypatch.setattr("flexi_core.tune.trajectories._CHUNK", 50)  # several pieces, the last one smaller
    vectors = torch.randn(4, ROWS, *SHAPE, generator=torch.Generator().manual_seed(2))
    recorder = GramRecorder()
    for index, prediction in enumerate(vectors[1:]):
        recorder.see(index, vectors[0], prediction)
    flat = vectors.flatten(2).double()
    expected = torch.einsum("ibn,jbn->bij", flat, flat) / flat.shape[2]
    np.testing.assert_allclose(recorder.recording(vectors[0], {}).gram, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_predicted_comes_out_where_the_answer_is_known(sampler):
    planned = [p for p in front(sampler) if p.predicted_db < 60]  # above it the four digits of a blend tell
    assert len(planned) >= 5
    for p in planned:
        assert p.predicted_db == pytest.approx(true_db(sampler, p.schedule), abs=0.1), p.schedule


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_front_is_better_than_even_places_and_rises_with_the_full_steps(sampler):
    planned = front(sampler)
    for p in planned:
        assert p.schedule.letters.count("F") == p.full
        assert len(p.schedule) == STEPS
        assert p.full < 3 or true_db(sampler, p.schedule) > true_db(sampler, even(STEPS, p.full))
    for fewer, more in itertools.pairwise(planned):
        assert more.full > fewer.full
        assert more.predicted_db > fewer.predicted_db
    assert planned == front(sampler)


def test_a_plan_goes_no_further_than_the_full_steps_asked_for():
    response = linear_response(solver_of("euler"), SIGMAS).numpy()
    planned = plan_front(recorded("euler"), response, Answer.guess(SIGMAS[:-1].tolist()), rule("euler"), most_full=5)
    assert max(p.full for p in planned) == 5


def test_answers_that_stray_are_predicted_to_cost():
    response, known = linear_response(solver_of("euler"), SIGMAS).numpy(), Answer.guess(SIGMAS[:-1].tolist())
    straying = plan_front(recorded("euler"), response, known, rule("euler"))
    straight = plan_front(recorded("euler"), response, exact(known), rule("euler"))
    at = {p.full: p.predicted_db for p in straying}
    assert all(at[p.full] < p.predicted_db for p in straight if p.full in at and p.full > 2)


def test_the_terms_of_a_blend_are_those_of_a_run():
    places = (2, 3, 7)
    history = PredictionHistory(3)
    for place in places:
        history.add(float(place), torch.zeros(1))
    for at in (8, 9, 12):
        expected = np.array(history.changes(float(at), 3))[:, ::-1]  # newest first
        np.testing.assert_allclose(term_weights(np.array([at]), np.array(places[::-1])), expected, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_accelerated_run_tells_the_answer(sampler):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watch(GramRecorder):
        def see(self, index, x, prediction):
            seen.append((x, prediction))

    run(sampler, Schedule(all_full(STEPS).segments, basis=rule(sampler).basis), Watch())
    schedule = even(STEPS, 8)
    states, predictions = (torch.stack(each) for each in zip(*seen, strict=True))
    levels = SIGMAS[:-1].tolist()
    meter = AnswerMeter(states, predictions, [letter == "F" for letter in schedule.letters], levels, rule(sampler))
    run(sampler, schedule, meter)
    truth = Answer.guess(levels)
    wrong = Answer(truth.sigmas, 2 * truth.gain, truth.rest)
    measured = meter.answer(wrong)
    computed = [i for i, letter in enumerate(schedule.letters) if letter == "F" and i]
    np.testing.assert_allclose(measured.gain[computed], truth.gain[computed], rtol=0.2)
    assert np.abs(measured.rest * measured.sigmas)[computed].max() < 1e-2
    assert meter.answer(wrong).gain.shape == (STEPS,)


def test_nothing_measured_leaves_the_answer_as_it_was():
    known = Answer.guess(SIGMAS[:-1].tolist())
    zeros = torch.zeros(STEPS, ROWS, *SHAPE)
    assert AnswerMeter(zeros, zeros, [True] * STEPS, SIGMAS[:-1].tolist(), rule("euler")).answer(known) is known


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_an_answer_in_a_basis_is_what_the_network_does_there(sampler):
    sigma = 2.0
    gain, _ = Answer.guess([sigma]).in_basis(rule(sampler))
    x, moved = torch.zeros(1, *SHAPE, dtype=torch.float64), torch.full((1, *SHAPE), 0.01, dtype=torch.float64)
    change = rule(sampler).value(x + moved, sigma, network(x + moved, sigma)) - rule(sampler).value(x, sigma, network(x, sigma))
    torch.testing.assert_close(change, gain[0] * moved)


def test_a_recording_comes_back_from_its_file(tmp_path):
    kept = recorded("euler")
    kept.save(tmp_path / "folder" / "run.safetensors")
    again = Recording.load(tmp_path / "folder" / "run.safetensors")
    np.testing.assert_array_equal(again.gram, kept.gram)
    np.testing.assert_array_equal(again.span, kept.span)
    assert again.identity == {"sampler": "euler"}
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["run.safetensors"]


def test_recordings_of_one_kind_are_put_together_and_others_refused():
    kept = recorded("euler")
    assert kept.and_those_of(kept).gram.shape == (2 * ROWS, STEPS + 1, STEPS + 1)
    with pytest.raises(FlexiError, match="differ in sampler"):
        kept.and_those_of(recorded("dpmpp_2m"))


@pytest.mark.parametrize("content", [b"", b"no recording", b"\xff" * 100])
def test_a_damaged_recording_is_one_clear_error(tmp_path, content):
    (tmp_path / "run.safetensors").write_bytes(content)
    with pytest.raises(FlexiError, match="no recording"):
        Recording.load(tmp_path / "run.safetensors")


@pytest.mark.parametrize("spoilt", ["format", "identity", "shape", "nan"])
def test_a_file_of_other_content_is_one_clear_error(tmp_path, spoilt):
    from safetensors.numpy import save_file

    gram = np.ones((2, 3, 4 if spoilt == "shape" else 3))
    if spoilt == "nan":
        gram[0, 0, 0] = np.nan
    identity = "[1]" if spoilt == "identity" else json.dumps({})
    metadata = {"format": "other" if spoilt == "format" else "flexiffusion-recording-1", "identity": identity}
    save_file({"gram": gram, "span": np.ones(2)}, tmp_path / "run.safetensors", metadata)
    with pytest.raises(FlexiError, match=r"no recording|not finite"):
        Recording.load(tmp_path / "run.safetensors")


def test_a_plan_of_other_steps_than_the_recording_is_refused():
    short = linear_response(solver_of("euler"), SIGMAS[2:]).numpy()
    with pytest.raises(FlexiError, match=r"16 steps.*14"):
        plan_front(recorded("euler"), short, Answer.guess(SIGMAS[:-1].tolist()), rule("euler"))


def test_a_run_that_was_not_seen_to_its_end_is_refused():
    recorder = GramRecorder()
    recorder.see(0, torch.zeros(1, 4), torch.zeros(1, 4))
    recorder.see(2, torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(FlexiError, match="3 steps 2 were seen"):
        recorder.recording(torch.zeros(1, 4), {})
