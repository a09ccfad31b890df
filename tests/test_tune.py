"""Schedules from recorded full runs, on a network whose answers away from the teacher's states are known exactly."""

import itertools
import json

import numpy as np
import pytest
import torch

from flexi_core import FlexiError, Schedule
from flexi_core.metrics import data_range, psnr_db
from flexi_core.run.null_steps.basis import rule_of
from flexi_core.run.null_steps.extrapolation import PredictionHistory
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.runtime.sampling import solver_of, traits_of
from flexi_core.schedule.presets import all_full, even
from flexi_core.stages.bounds import Stages
from flexi_core.tune import (
    Answer,
    AnswerMeter,
    Facts,
    GramRecorder,
    Learner,
    LevelMoves,
    Planned,
    Recording,
    Shelf,
    nearest,
    plan_front,
)
from flexi_core.tune.answer import DEVIATION
from flexi_core.tune.ascent import PlaceAscent
from flexi_core.tune.fit import linear_response
from flexi_core.tune.simulation import term_weights

STEPS, ROWS, SHAPE = 16, 3, (4, 6, 6)
SIGMAS = torch.tensor([*np.geomspace(14.6, 0.03, STEPS), 0.0])
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")


def network(x: torch.Tensor, sigma: float, seed: int = 5) -> torch.Tensor:
    """Return Gaussian data's denoised latents, their mean moving with the noise level in four directions of its own."""
    gain = DEVIATION**2 / (DEVIATION**2 + sigma**2)
    pushes = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = float(np.log(sigma))
    mean = sum(np.sin((k + 1) * level / 2 + k) * push for k, push in enumerate(pushes))
    return gain * x + (1 - gain) * 0.5 * mean.to(x)


def run(sampler: str, schedule: Schedule, observer=None, stages: Stages | None = None) -> torch.Tensor:
    """Return where a run under a schedule ends, in float64; each stage has another network."""
    plan = make_plan(schedule, SIGMAS.tolist(), traits_of(sampler, SIGMAS), stages=stages)
    run = Run(plan, observer=observer)
    start = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * SIGMAS[0]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return run.predict(x, sigma, lambda: network(x, sigma, 5 + (stages.at(sigma) if stages else 0)))

    return solver_of(sampler)(denoise, start, plan.sampled(SIGMAS.double()), 3)


def rule(sampler: str):
    """Return how extrapolated steps are predicted under a sampler."""
    return rule_of(even(STEPS, 8), traits_of(sampler, SIGMAS))


def recorded(sampler: str, stages: Stages | None = None) -> Recording:
    """Return a recording of the run of all steps."""
    recorder = GramRecorder()
    schedule = Schedule(all_full(STEPS).segments, basis=rule(sampler).basis)
    return recorder.recording(run(sampler, schedule, recorder, stages), {"sampler": sampler})


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_front_over_several_networks_begins_each_with_a_full_step_and_carries_nothing_to_it(sampler):
    starts = (6, 11)
    stages = Stages(tuple(float(SIGMAS[start]) for start in starts), ("high", "middle", "low"))
    assert stages.starts(SIGMAS.tolist()) == starts
    response = linear_response(solver_of(sampler), SIGMAS, rule(sampler).basis).numpy()
    known = exact(Answer.guess(SIGMAS[:-1].tolist()))
    planned = plan_front(recorded(sampler, stages), response, known, rule(sampler), starts=starts)
    teacher = run(sampler, all_full(STEPS), stages=stages)
    assert planned[0].full >= 3
    for p in planned:
        assert all(p.schedule.letters[start] == "F" for start in starts)
        assert p.schedule.letters.count("F") == p.full
        made = float(psnr_db(run(sampler, p.schedule, stages=stages), teacher, data_range(teacher)).mean())
        assert p.predicted_db > 60 or p.predicted_db == pytest.approx(made, abs=0.1), p.schedule


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


def facts(sampler="euler", sigmas=SIGMAS, **identity):
    """Return what a run of the exact network is."""
    traits = traits_of(sampler, sigmas)
    return Facts({"sampler": sampler, **identity}, traits, sigmas.tolist(), solver_of(sampler), latent_bytes=1000, rows=ROWS)


def learned(learner, sampler="euler", **identity):
    """Return the lesson of a run, which is sampled as it says."""
    lesson = learner.lesson(facts(sampler, **identity))
    if lesson.schedule is not None:
        run(sampler, lesson.schedule, lesson.observer)
        lesson.finish()
    return lesson


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "learned")


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_a_run_is_recorded_then_planned_and_comes_as_near_as_foretold(shelf, sampler):
    learner = Learner(shelf, speedup=2.0, runs=ROWS + 1)
    first, second = learned(learner, sampler), learned(learner, sampler)
    assert first.schedule.is_all_full and second.schedule.is_all_full
    third = learned(learner, sampler)
    assert third.schedule.letters.count("F") == STEPS // 2
    assert third.observer is None
    assert first.words[0].startswith(f"Recording 1 of {ROWS + 1}")
    assert second.words[0].startswith(f"Recording {ROWS + 1} of {ROWS + 1}")
    foretold = float(third.words[0].split("Predicted: ")[1].split(" ")[0])
    # Its answers stray nowhere, which is not known before.
    assert foretold - 3 < true_db(sampler, third.schedule)
    assert true_db(sampler, third.schedule) > true_db(sampler, even(STEPS, STEPS // 2))


def test_another_learner_goes_on_from_the_same_folder(shelf):
    learned(Learner(shelf, runs=1))
    lesson = learned(Learner(Shelf(shelf.folder), runs=1))
    assert lesson.schedule.letters.count("F") == STEPS // 2
    again = Learner(Shelf(shelf.folder), speedup=4.0, runs=1)
    assert learned(again).schedule.letters.count("F") == STEPS // 4
    assert again.learned == [learned(again).schedule]


def test_what_is_forgotten_is_recorded_again(shelf):
    learner = Learner(shelf, runs=1)
    learned(learner)
    learned(learner)
    assert learner.forget() == 1
    assert list(shelf.folder.iterdir()) == []
    assert learned(learner).words[0].startswith("Recording 1 of 1")


def test_a_new_run_says_what_is_new_about_it(shelf):
    learner = Learner(shelf, runs=1)
    assert "new" not in learned(learner, size=[8, 8], patches="a").words[0]
    assert "(new LoRA)" in learned(learner, size=[8, 8], patches="b").words[0]
    assert "(new size)" in learned(learner, size=[9, 9], patches="b").words[0]


def test_a_schedule_that_is_frozen_runs_and_nothing_is_recorded(shelf):
    learner = Learner(shelf, frozen=[even(STEPS, 3)])
    lesson = learned(learner)
    assert lesson.schedule == even(STEPS, 3)
    assert lesson.observer is None
    assert not shelf.folder.exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler": "heun"}, "several times a step"),
        ({"sigmas": SIGMAS[-4:]}, "3 steps"),
        ({"sigmas": torch.linspace(10, 0, 202)}, "201 steps"),
    ],
)
def test_a_run_that_cannot_be_learned_is_plain_and_says_why(shelf, changed, said):
    lesson = Learner(shelf).lesson(facts(**changed))
    assert lesson.schedule is None
    assert said in lesson.words[0]


def test_latents_that_are_too_large_are_not_recorded(shelf):
    given = facts()
    huge = Facts(given.identity, given.traits, given.sigmas, given.solve, latent_bytes=2**30)
    assert "larger than 1024 MiB" in Learner(shelf).lesson(huge).words[0]


def test_a_shelf_keeps_the_newest_runs_within_its_bounds(shelf, monkeypatch):
    monkeypatch.setattr("flexi_core.tune.shelf.MOST_RUNS", 2)
    learner = Learner(shelf, runs=100)
    for number in range(8):
        learned(learner, number=number)
    assert len(list(shelf.folder.iterdir())) == 4
    assert shelf.recording({"sampler": "euler", "number": 7}) is not None
    monkeypatch.setattr("flexi_core.tune.shelf.MOST_BYTES", 1)
    learned(learner, number=9)
    assert list(shelf.folder.iterdir()) == []


@pytest.mark.parametrize("spoilt", ["{", '{"format": "other"}', '{"format": "flexiffusion-front-1", "identity": {}}'])
def test_a_broken_front_is_planned_again(shelf, spoilt):
    learner = Learner(shelf, runs=1)
    learned(learner)
    expected = learned(learner).schedule
    (path,) = shelf.folder.glob("*.json")
    path.write_text(spoilt)
    assert learned(Learner(shelf, runs=1)).schedule == expected


def test_a_folder_that_takes_nothing_costs_the_learning_alone(tmp_path):
    (tmp_path / "learned").write_text("in the way")
    learner = Learner(Shelf(tmp_path / "learned"), runs=1)
    assert learned(learner).schedule.is_all_full
    assert learned(learner).schedule.is_all_full


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_moved_levels_come_as_near_as_foretold_and_nearer_than_before(sampler):
    how = rule(sampler)
    response = linear_response(solver_of(sampler), SIGMAS, how.basis)
    known = exact(Answer.guess(SIGMAS[:-1].tolist()))
    front = plan_front(recorded(sampler), response.numpy(), known, how)
    moves = LevelMoves(recorded(sampler), SIGMAS, solver_of(sampler), response, known, how)
    for full in (4, 6):
        planned = nearest(front, full)
        moved = moves.moved(planned)
        assert moved is not None
        assert moved.schedule.letters.count("F") == planned.full
        assert moved.schedule.sigmas is not None
        assert moved.predicted_db > planned.predicted_db
        assert true_db(sampler, moved.schedule) > true_db(sampler, planned.schedule)
        # Between the recorded levels the network is a curve through four of them.
        assert moved.predicted_db == pytest.approx(true_db(sampler, moved.schedule), abs=6)


def test_unmoved_levels_are_foretold_as_planned():
    how = rule("dpmpp_2m")
    response = linear_response(solver_of("dpmpp_2m"), SIGMAS, how.basis)
    known = Answer.guess(SIGMAS[:-1].tolist())
    moves = LevelMoves(recorded("dpmpp_2m"), SIGMAS, solver_of("dpmpp_2m"), response, known, how)
    for planned in plan_front(recorded("dpmpp_2m"), response.numpy(), known, how)[2:6]:
        own = Schedule(planned.schedule.segments, basis=planned.schedule.basis, sigmas=tuple(SIGMAS.tolist()))
        assert moves._foretold(own)[1] == pytest.approx(planned.predicted_db, abs=0.05)


def test_an_answer_at_the_levels_it_was_measured_at_is_itself():
    known = Answer.guess(SIGMAS[:-1].tolist())
    again = known.at(known.sigmas)
    np.testing.assert_allclose(again.gain, known.gain, rtol=1e-9)
    np.testing.assert_allclose(again.rest, known.rest, rtol=1e-9)


def test_an_ascent_in_places_finds_the_best_ones_near_by():
    best = Schedule.parse("FXX|FX|FXXX|FX")
    letters = best.letters

    def score(schedule):
        return -sum(a != b for a, b in zip(schedule.letters, letters, strict=True))

    start = Schedule.parse("FX|FXXX|FX|FXX")
    ascent = PlaceAscent(start, [float(score(start))])
    tried = []
    for schedule in ascent:
        tried.append(schedule.letters)
        assert schedule.letters.count("F") == 4 and schedule.letters[0] == "F"
        ascent.tell([float(score(schedule))])
    assert ascent.schedule.letters == letters
    assert len(tried) == len(set(tried))
    held = PlaceAscent(start, [float(score(start))], fixed=(6,))
    assert {schedule.letters[6] for schedule in held} == {"F"}
