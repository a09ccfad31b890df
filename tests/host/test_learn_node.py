"""Flexi Learn: recorded while it samples plainly, then sampled under what was learned."""

import sys

import pytest
import torch

STEPS = 12


@pytest.fixture
def shelf(schedule_folder):
    """The folder of what is learned; emptied in the end."""
    folder = schedule_folder / "learned"
    yield folder
    for path in folder.glob("*"):
        path.unlink()


@pytest.fixture
def learn(node, demo_model, shelf):
    """A function of changed inputs that returns the node's model and run."""
    cls = node("FlexiLearn")

    def make(model=demo_model, speedup=2.0, quality_db=0.0, frozen=""):
        return cls.execute(model=model, speedup=speedup, quality_db=quality_db, frozen=frozen).args

    return make


def words(run):
    return run.report.words[0]


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_two_plain_runs_are_recorded_and_the_third_samples_under_what_they_taught(host, demo_model, learn, sampler):
    model, run = learn()
    for number in (1, 2):
        options = {"noise": host.noise(1, 16, seed=number), "seed": number}
        made = host.sample(model, sampler, STEPS, **options)
        assert torch.equal(made, host.sample(demo_model, sampler, STEPS, **options))
        assert words(run).startswith(f"Recording {number} of 2")
        assert run.report.letters == "F" * STEPS
    options = {"noise": host.noise(1, 16, seed=3), "seed": 3}
    made, whole = host.sample(model, sampler, STEPS, **options), host.sample(demo_model, sampler, STEPS, **options)
    assert run.report.letters.count("F") == STEPS // 2
    assert words(run).startswith(f"6 of {STEPS} steps are computed, 2x fewer. Predicted: ")
    assert psnr(made, whole) > psnr(host.sample(demo_model, sampler, STEPS // 2, **options), whole) + 3
    again = host.sample(model, sampler, STEPS, **options)
    assert torch.equal(again, made)


def test_what_was_learned_is_there_in_another_session(host, learn):
    first, _ = learn()
    for seed in (1, 2, 3):
        made = host.sample(first, "euler", STEPS, noise=host.noise(1, 16, seed=3), seed=seed)
    other, run = learn()
    again = host.sample(other, "euler", STEPS, noise=host.noise(1, 16, seed=3), seed=3)
    assert torch.equal(again, made)
    assert "Predicted" in words(run)


def test_a_batch_is_as_many_recordings(host, learn):
    model, run = learn()
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16, seed=1), seed=1)
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16, seed=2), seed=2)
    assert "Predicted" in words(run)


def test_each_kind_of_run_learns_for_itself_and_says_what_is_new(host, demo_model, learn, shelf):
    model, run = learn()
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16))
    assert words(run) == "Recording 1 of 2: plain sampling, every step computed."
    for changed, new in (
        ({"sampler": "dpmpp_2m"}, "sampler"),
        ({"cfg": 4.0}, "guidance scale"),
        ({"noise": host.noise(1, 24)}, "size"),
        ({"steps": 10}, "number of steps, scheduler or steps"),
    ):
        how = {"sampler": "euler", "steps": STEPS, "noise": host.noise(1, 16), **changed}
        host.sample(model, how.pop("sampler"), how.pop("steps"), **how)
        assert words(run).startswith("Recording 1 of 2 (new ")
        assert all(name in words(run) for name in new.split(", ")[:1])
    lora, key = demo_model.clone(), "diffusion_model.output_blocks.5.0.in_layers.2.weight"
    lora.add_patches({key: ("diff", (torch.ones_like(lora.model.state_dict()[key]) * 0.01,))})
    model, run = learn(model=lora)
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert words(run).startswith("Recording 1 of 2 (new LoRA)")


def test_a_quality_takes_as_many_steps_as_it_needs_or_all_of_them(host, learn):
    model, run = learn(quality_db=35.0)
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16))
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    few = run.report.letters.count("F")
    assert 1 < few < STEPS
    model, run = learn(quality_db=45.0)
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert few < run.report.letters.count("F") < STEPS
    model, run = learn(quality_db=90.0)
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert words(run).startswith("No schedule is known that comes within 90 dB")


def test_a_frozen_schedule_runs_at_once_and_others_are_learned(host, learn, shelf):
    model, run = learn(frozen=f"{STEPS // 2}*(FX)\n5*(FX)")
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert run.report.letters == "FX" * (STEPS // 2)
    assert words(run).startswith("Frozen: 6 of 12 steps are computed")
    assert not list(shelf.glob("*"))
    host.sample(model, "euler", 8, noise=host.noise(1, 16))
    assert words(run).startswith("Recording 1 of 2")


def test_a_broken_frozen_line_is_refused_in_the_parsers_words(node):
    cls = node("FlexiLearn")
    assert cls.validate_inputs(frozen="4*(FX)\n\n") is True
    assert "Q" in cls.validate_inputs(frozen="FQ")
    assert "16 at most" in cls.validate_inputs(frozen="FX\n" * 17)


@pytest.mark.parametrize(("sampler", "said"), [("heun", "several times a step"), ("euler_cfg_pp", "without the prompt")])
def test_a_run_that_cannot_be_learned_samples_plainly_and_says_why(host, demo_model, learn, shelf, sampler, said):
    model, run = learn()
    options = {"noise": host.noise(1, 16)}
    assert torch.equal(host.sample(model, sampler, STEPS, **options), host.sample(demo_model, sampler, STEPS, **options))
    assert said in words(run)
    assert not list(shelf.glob("*"))


def test_a_broken_file_or_a_disk_that_takes_nothing_costs_the_learning_alone(host, demo_model, learn, shelf, monkeypatch):
    model, run = learn()
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16))
    (path,) = shelf.glob("*.safetensors")
    path.write_bytes(b"no recording")
    options = {"noise": host.noise(1, 16)}
    whole = host.sample(demo_model, "euler", STEPS, **options)
    assert torch.equal(host.sample(model, "euler", STEPS, **options), whole)
    assert words(run).startswith("Recording 1 of 2")
    for left in shelf.glob("*"):
        left.unlink()
    shelf.rmdir()
    shelf.write_text("in the way")  # no folder can be made
    try:
        assert torch.equal(host.sample(model, "euler", STEPS, **options), whole)
    finally:
        shelf.unlink()
    assert run.report is not None


def module_of(thing):
    return sys.modules[thing.__module__]


def test_what_was_learned_is_forgotten_by_the_button(host, node, learn, shelf):
    model, run = learn()
    host.sample(model, "euler", STEPS, noise=host.noise(2, 16))
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    (*_, learner) = module_of(node("FlexiLearn"))._learners.values()
    assert [schedule.letters.count("F") for schedule in learner.learned] == [6]
    assert learner.forget() == 1
    assert not list(shelf.glob("*"))
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert words(run) == "Recording 1 of 2: plain sampling, every step computed."


def test_what_is_kept_stays_small(host, node, learn, shelf, monkeypatch):
    model, _ = learn()
    monkeypatch.setattr(module_of(module_of(node("FlexiLearn")).Shelf), "MOST_RUNS", 2)
    for steps in range(6, 12):
        host.sample(model, "euler", steps, noise=host.noise(1, 16))
    kept = list(shelf.glob("*"))
    assert len(kept) == 4
    assert sum(path.stat().st_size for path in kept) < 2**14


def test_a_second_pass_and_the_windows_of_a_run_learn_for_themselves(host, learn):
    model, run = learn()
    first, second = {"noise": host.noise(2, 16)}, {"noise": host.noise(2, 16), "denoise": 0.5}
    for options in (first, second):
        host.sample(model, "euler", STEPS, **options)
        assert words(run).startswith("Recording 1 of 2")
    for start, end in ((0, 6), (6, STEPS)):
        host.sample(model, "euler", STEPS, noise=host.noise(2, 16), start_step=start, last_step=end)
        assert words(run).startswith("Recording 1 of 2")
    for options in (first, second):
        host.sample(model, "euler", STEPS, **options)
        assert "Predicted" in words(run), words(run)


def test_an_interrupted_run_teaches_nothing(host, demo_model, learn, shelf):
    import comfy.model_management as management

    def stop(step, *_):
        if step == 3:
            raise management.InterruptProcessingException

    model, run = learn()
    with pytest.raises(management.InterruptProcessingException):
        host.sample(model, "euler", STEPS, noise=host.noise(1, 16), callback=stop)
    assert not list(shelf.glob("*"))
    host.sample(model, "euler", STEPS, noise=host.noise(1, 16))
    assert words(run).startswith("Recording 1 of 2")
