"""Presets become a schedule when the run is known, and offer only what was measured to be ahead of fewer plain steps."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from flexi_core import Schedule, ScheduleError, StepKind
from flexi_core.run.cost import predicted_speedup
from flexi_core.run.plan import make_plan
from flexi_core.run.sampler import PLAIN, SamplerTraits
from flexi_core.runtime.sampling import SCHEDULERS, make_noise, sample, sigmas_of, traits_of
from flexi_core.runtime.solvers import SAMPLERS
from flexi_core.schedule.file import from_dict, made_for
from flexi_core.schedule.presets import (
    DEMO_FAMILY,
    FAMILY,
    FEWEST_STEPS,
    MODELS,
    PRESETS,
    Preset,
    all_full,
    at_places,
    deepcache,
    from_kinds,
    full_steps,
    is_served,
    preset,
    preset_words,
    segments_for_speedup,
    setting,
    uniform,
)
from flexi_core.schedule.segment import BASES
from search_tools.backends.embedded import EmbeddedBackend
from search_tools.backends.teacher import TeacherSettings

STEPS = [*range(1, 61), 100, 999, 1000, 10_000]
SPEEDUPS = [name for name in PRESETS if name.endswith("x")]
KNOWN = json.loads(FAMILY.read_text(encoding="utf-8"))
ENTRIES = [
    (kind, where, int(steps), int(full), entry)
    for kind, settings in KNOWN.items()
    for where, counts in settings.items()
    for steps, entries in counts.items()
    for full, entry in entries.items()
]


def levels(steps: int, high: float = 14.6, low: float = 0.03) -> list[float]:
    """Return noise levels [steps + 1] that fall evenly in log sigma to a last one and 0."""
    return [*(high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)), 0.0]


def run_of(where: str, steps: int) -> tuple[list[float], bool]:
    """Return noise levels and guidance of a run that has a setting."""
    grids = [levels(steps, high=0.06), levels(steps, low=1.0), [*levels(steps, low=1.0)[:-2], 0.03, 0.0]]
    return next((grid, guided) for grid in grids for guided in (True, False) if setting(grid, guided) == where)


def traits_of_kind(kind: str) -> SamplerTraits:
    """Return the traits of a kind of sampler."""
    noise, memory, evaluations, *renewed = kind.split(", ")
    own = noise == "brownian"
    counts = int(evaluations.split()[0]), int(memory.removeprefix("memory "))
    return SamplerTraits(own or noise == "noise", own, *counts, renews=bool(renewed))


def test_every_entry_of_the_file_is_ahead_of_plain_steps_and_is_what_its_keys_say():
    assert ENTRIES
    for kind, where, steps, full, entry in ENTRIES:
        schedule, measured = Schedule.parse(entry["schedule"]), entry["measured"]
        # Those that were judged first have no standard error: they are ahead by what is taken for it.
        sure = measured.get("least_sure_db", measured["least_lead_db"] - 1)
        assert sure > 0 and measured.get("read", 1) >= measured.get("plain_read", 0), (kind, where, steps, full)
        assert len(schedule) == steps and schedule.letters.count("F") == full < steps
        assert schedule.letters.startswith("F") and set(schedule.letters) == {"F", "X"}
        assert schedule.basis in BASES
        assert steps >= FEWEST_STEPS
        assert measured["psnr_db"] > measured["plain_db"] and measured["other"] in ("normal", "karras", "simple", "beta")
        assert all(math.isfinite(measured[key]) for key in ("psnr_db", "plain_db", "other_db"))


def test_every_kind_and_setting_of_the_file_is_one_that_a_run_can_have():
    for kind, where, steps, _, _ in ENTRIES:
        assert traits_of_kind(kind).kind == kind
        assert setting(*run_of(where, steps)) == where
    # Every embedded sampler that has presets is found among the kinds.
    probed = {traits_of(name, torch.tensor(levels(20))).kind for name in SAMPLERS}
    assert PLAIN.kind in KNOWN and probed & set(KNOWN)


@pytest.mark.parametrize("kind", KNOWN)
def test_a_measured_run_gets_the_measured_schedule(kind):
    for where, counts in KNOWN[kind].items():
        for steps, entries in counts.items():
            sigmas, guided = run_of(where, int(steps))
            for name in SPEEDUPS:
                found = Preset(name).resolve(traits_of_kind(kind), sigmas, guided)
                least = full_steps(int(steps), Preset(name).speedup)
                wanted = min((full for full in map(int, entries) if full >= least), default=None)
                if wanted is None:
                    assert found.schedule is None
                    continue
                entry = entries[str(wanted)]
                assert str(found.schedule) == str(Schedule.parse(entry["schedule"]))
                assert found.schedule.info["preset"] == {"steps": int(steps), "measured": entry["measured"]}
                assert ("is the most for" in found.words[0]) is (wanted > least)
                assert f"{wanted} of {steps} steps are computed" in found.words[0]


@pytest.mark.parametrize("kind", KNOWN)
def test_any_run_gets_as_many_steps_as_it_has_and_never_more_saved_than_asked(kind):
    for where, name, steps in itertools.product(KNOWN[kind], SPEEDUPS, (1, 2, 3, 4, 5, 7, 12, 20, 28, 45, 60, 100)):
        sigmas, guided = run_of(where, steps) if steps > 2 else (levels(steps), True)
        found = Preset(name).resolve(traits_of_kind(kind), sigmas, guided)
        if found.schedule is None:
            (why,) = found.words
            assert "no schedule is known" in why
            continue
        assert steps >= FEWEST_STEPS and len(found.schedule) == steps
        full = found.schedule.letters.count("F")
        assert full_steps(steps, Preset(name).speedup) <= full < steps
        assert found.schedule.letters.startswith("F") and found.schedule.basis in BASES
        assert f"{full} of {steps} steps are computed" in found.words[0]


def test_two_x_of_a_common_run_is_two_x():
    for steps in (20, 24, 28, 40, 50):
        for guided in (True, False):
            schedule = Preset("2x").resolve(PLAIN, levels(steps, low=1.0), guided).schedule
            assert schedule.letters.count("F") == full_steps(steps, 2)


@pytest.mark.parametrize("name", SPEEDUPS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_runs_too_short_to_save_are_sampled_plainly_with_one_sentence(name, steps):
    found = Preset(name).resolve(PLAIN, levels(steps) if steps else [0.0], True)
    assert found.schedule is None and len(found.words) == 1
    assert Preset(name).resolve(PLAIN, [], True).schedule is None


@pytest.mark.parametrize("name", PRESETS)
def test_no_number_of_steps_is_an_error_when_sampling_starts(name):
    for sigmas in ([], [0.0], [1.0, 0.0], [1.0] * 10_001 + [0.0], levels(5, low=1.0)):
        assert Preset(name).resolve(PLAIN, sigmas, True).words


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (None, "could not be tried"),
        (SamplerTraits(keeps_levels=False), "its own noise levels"),
        (SamplerTraits(reads_guidance=True), "reads the prediction without the prompt"),
        (SamplerTraits(True, False, 7, 3, False), "draws noise, asks 7 times a step, goes by earlier steps too, no schedule"),
    ],
)
def test_samplers_that_nothing_serves_are_sampled_plainly_with_one_sentence(sampler, why):
    for name, model in itertools.product(SPEEDUPS, MODELS):
        found = Preset(name, model=model).resolve(sampler, levels(20), True)
        assert found.schedule is None and len(found.words) == 1 and why in found.words[0]
    assert sampler is None or not is_served(sampler) or not sampler.keeps_levels
    assert Preset("all-full").resolve(sampler, levels(20), True).schedule == all_full(20)


@pytest.mark.parametrize(
    ("sampler", "asked", "taken"),
    [("euler", "3x", "3x"), ("euler", "5x", "3x"), ("dpmpp_2m", "3x", "2x"), ("dpmpp_2m", "2x", "2x")],
)
def test_over_two_networks_a_preset_is_no_larger_than_it_is_known_to_be_ahead(sampler, asked, taken):
    sigmas = torch.tensor(levels(20))
    found, plain = (
        Preset(name).resolve(traits_of(sampler, sigmas), sigmas.tolist(), True, changes)
        for name, changes in ((asked, True), (taken, False))
    )
    assert found.schedule == plain.schedule and len(plain.schedule) == 20
    said = f"{taken} in place of {asked}, which is not known to be ahead where the network changes within the run."
    assert found.words == ((said, *plain.words) if asked != taken else plain.words)
    assert Preset("deepcache").resolve(PLAIN, sigmas.tolist(), True, True).schedule.letters.startswith("FPP")


def test_over_two_networks_a_sampler_that_was_not_measured_there_takes_the_next_smaller_preset():
    sigmas = torch.tensor(levels(20))
    kind = SamplerTraits(memory=7)
    assert Preset("1.25x").resolve(kind, sigmas.tolist(), True, True).schedule is None
    for asked, taken in (("2x", "1.5x"), ("5x", "3x")):
        words = Preset(asked).resolve(kind, sigmas.tolist(), True, True).words
        assert words == Preset(taken).resolve(kind, sigmas.tolist(), True).words, "nothing is known of it at all"


def test_a_preset_for_other_steps_says_so_and_promises_nothing():
    for name in PRESETS:
        found = Preset(name, 20).resolve(PLAIN, levels(8), True)
        assert found.words == (
            "Flexi Preset is set to 20 steps, the run has 8: set its steps to 0, and it takes the run's own.",
        )
        assert len(found.schedule) == 20
    short = Preset("2x", 3).resolve(PLAIN, levels(20), True)
    assert short.schedule is None and len(short.words) == 2
    assert Preset("2x", 20).resolve(PLAIN, levels(20), True) == Preset("2x").resolve(PLAIN, levels(20), True)


def test_the_window_of_a_run_is_a_run():
    whole = levels(40, low=1.0)
    for window in (whole[:21], whole[20:], whole[6:30]):
        found = Preset("2x").resolve(PLAIN, window, True)
        assert len(found.schedule) == len(window) - 1
        assert found.schedule.letters.count("F") == full_steps(len(window) - 1, 2)


def test_before_the_run_a_preset_says_what_can_be_known():
    for name in PRESETS:
        unknown = Preset(name).before_run()
        assert unknown.schedule is None and unknown.words
        assert ("decided when sampling starts" in unknown.words[-1]) is (name in SPEEDUPS)
        for steps in (20, 50):
            known = Preset(name, steps).before_run()
            assert known.schedule == preset(name, steps) and len(known.schedule) == steps
            assert ("samplers like euler" in known.words[-1]) is (name in SPEEDUPS)
    assert Preset("2x", 3).before_run().schedule is None and preset("2x", 3) == all_full(3)


@pytest.mark.parametrize(
    ("near", "said"),
    [
        (55.0, "No difference can be seen: 55 dB"),
        (44.0, "Hardly a difference can be seen: 44 dB"),
        (33.0, "The same picture, small details differ: 33 dB"),
        (26.0, "The same scene, details differ: 26 dB"),
        (12.0, "Roughly the same scene: 12 dB"),
    ],
)
def test_how_near_a_preset_comes_is_said_in_words_first(near, said):
    measured = {"psnr_db": near, "plain_db": near - 8, "other": "beta", "other_db": near - 6}
    words = preset_words(2.0, Schedule.parse("10*(FX)"), {"steps": 20, "measured": measured})
    assert words[0] == "10 of 20 steps are computed, 2x fewer."
    assert words[1].startswith(said) and f"have {near - 8:.0f} dB" in words[1]
    assert len(words) == 2
    as_near = {**measured, "other_db": near}
    assert "scheduler beta come as near" in preset_words(2.0, Schedule.parse("10*(FX)"), {"steps": 20, "measured": as_near})[2]
    elsewhere = preset_words(5.0, Schedule.parse("10*(FX)"), {"steps": 25, "measured": measured})
    assert elsewhere[0].startswith("2x is the most for 20 steps") and "of 25 steps" in elsewhere[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_shortest_runs_of_the_embedded_runtime_do_not_fail(tiny_model, sampler, steps):
    for scheduler in SCHEDULERS:
        sigmas, noise = sigmas_of(tiny_model, sampler, scheduler, steps), make_noise(3, 1)
        found = Preset("2x").resolve(traits_of(sampler, sigmas), sigmas.tolist(), False)
        assert (found.schedule is None) or steps >= FEWEST_STEPS
        latents, _ = sample(tiny_model, found.schedule or all_full(steps), sigmas, noise, sampler=sampler, cfg=1.0)
        assert latents.isfinite().all()


def test_a_schedule_is_scaled_with_its_basis_order_and_blend():
    for name, steps in itertools.product(SPEEDUPS, (21, 23, 33, 47, 100)):
        found = Preset(name).resolve(PLAIN, levels(steps, low=1.0), True).schedule
        if found is None:
            continue
        blends = {segment.blend for segment in found.segments if "X" in segment.letters}
        assert len(blends) == 1 and blends.pop()
        assert make_plan(found, levels(steps, low=1.0)).mapping == ""


@pytest.mark.parametrize("steps", [20, 25, 30, 50])
@pytest.mark.parametrize("name", [name for name in SPEEDUPS if name in json.loads(DEMO_FAMILY.read_text(encoding="utf-8"))])
def test_the_embedded_model_has_a_searched_schedule_of_its_own(name, steps):
    searched, cost = preset(name, steps, "demo"), EmbeddedBackend(TeacherSettings("euler", "normal", steps)).cost
    teacher, measured = (searched.info[part] for part in ("teacher", "measured"))
    assert (len(searched), teacher["model"], teacher["sampler"], teacher["steps"]) == (steps, "embedded", "euler", steps)
    assert measured["speedup_macs"] == pytest.approx(predicted_speedup(searched, cost))
    assert measured["speedup_macs"] >= Preset(name).speedup
    said = made_for(searched)
    assert said.startswith(f"made for {steps} euler steps, normal, cfg 3, 32x32; ") and said.endswith(" dB")
    # Only on the very run that it was searched for, whatever the node's steps.
    found = Preset(name, model="demo").resolve(PLAIN, teacher["sigmas"], True)
    assert found.schedule == searched and "found by a search" in found.words[1]
    for sigmas, sampler in ((levels(steps, low=1.0), PLAIN), (teacher["sigmas"], SamplerTraits(memory=1))):
        other = Preset(name, model="demo").resolve(sampler, sigmas, True)
        assert other.schedule == Preset(name).resolve(sampler, sigmas, True).schedule != searched


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "steps"), [("5x", 28), ("deepcache", 20), ("all-full", 50)])
def test_what_no_search_was_made_for_is_the_same_for_every_model(name, steps, model):
    assert preset(name, steps, model) == preset(name, steps)
    assert made_for(preset(name, steps, model)) == made_for(preset(name, steps))


def test_every_searched_schedule_of_the_embedded_model_loads():
    for counts in json.loads(DEMO_FAMILY.read_text(encoding="utf-8")).values():
        for steps, data in counts.items():
            assert len(from_dict(data)) == int(steps)


def test_segments_of_a_speedup_have_their_first_full_steps_together_and_the_rest_evenly():
    for steps in (20, 25, 50, 100):
        for speedup in (2, 3, 5):
            letters = segments_for_speedup(steps, speedup).letters
            full = letters.count("F")
            head = len(letters) - len(letters.lstrip("F"))
            assert head >= round(0.3 * full)
            gaps = [len(gap) for gap in letters[head:].split("F")]
            assert max(gaps) - min(gaps[:-1]) <= 1 and gaps[-1] <= max(gaps)


def test_deepcache_is_one_full_step_then_partial_ones():
    schedule = preset("deepcache", 8)
    assert schedule.letters == "FPPFPPFP"
    assert {segment.depth for segment in schedule.segments} == {3}
    assert str(deepcache(10, interval=5, depth=1)) == "2*(FPPPP@1)"
    assert str(deepcache(10, interval=5, depth=1, forecast=1)) == "2*(FPPPP@1^1)"
    assert deepcache(4, interval=1) == all_full(4)


def test_all_full_is_the_teacher():
    for steps in STEPS:
        assert preset("all-full", steps).is_all_full


def test_uniform_spreads_its_full_steps_evenly():
    assert uniform(20, 5).letters == "FXXX" * 5
    assert uniform(20, 5, StepKind.NULL).letters == "FNNN" * 5
    for steps in (7, 25, 50):
        for full in range(1, steps + 1):
            letters = uniform(steps, full).letters
            assert letters.count("F") == full and letters[0] == "F"
            gaps = [len(gap) for gap in letters.split("F")[1:]]
            assert max(gaps) - min(gaps) <= 1


def test_full_steps_can_be_put_anywhere_with_one_blend():
    schedule = at_places(7, (0, 1, 4), (1.0, 0.5))
    assert str(schedule) == "F|2*(FXX~1,0.5)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("4x", 20), f"unknown preset '4x'; known: {', '.join(PRESETS)}"),
        (lambda: Preset("4x"), "unknown preset '4x'"),
        (lambda: preset("2x", 20, "sdxl"), "unknown model 'sdxl' of a preset; known: any, demo"),
        (lambda: preset("2x", 0), "a run has 0 steps; presets are for 1 to 10000"),
        (lambda: Preset("2x", -1), "a run has -1 steps"),
        (lambda: preset("deepcache", -1), "a run has -1 steps"),
        (lambda: preset("all-full", 10_001), "a run has 10001 steps"),
        (lambda: deepcache(20, interval=0), "the interval is 0"),
        (lambda: deepcache(20, depth=0), "has depth 0; a depth is 1 to 1000"),
        (lambda: uniform(20, 0), "0 full steps do not fit a run of 20"),
        (lambda: uniform(20, 21), "21 full steps do not fit a run of 20"),
        (lambda: segments_for_speedup(20, 0.5), "the speed-up is 0.5; 1 means every step full"),
        (lambda: from_kinds([]), "the first step of a schedule is full"),
        (lambda: from_kinds([StepKind.NULL, StepKind.FULL]), "the first step of a schedule is full"),
        (lambda: from_kinds([StepKind.FULL, StepKind.PARTIAL]), "has depth None"),
    ],
)
def test_what_no_run_can_have_is_refused(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50])
def test_any_number_of_full_steps_can_be_asked_for(steps):
    for full in range(1, steps + 1):
        assert segments_for_speedup(steps, steps / full).letters.count("F") == full


def test_what_a_saved_preset_was_measured_on_is_said_in_words():
    schedule = Preset("2x", 20).before_run().schedule
    measured = schedule.info["preset"]["measured"]
    near, plain = f"{measured['psnr_db']:.0f} dB", f"{measured['plain_db']:.0f} dB"
    assert made_for(schedule) == f"Flexi Preset's, {near} on test models of 20 steps; as few plain steps {plain}"


@pytest.mark.parametrize(
    "odd", ["x", {"measured": 3}, {"measured": {"psnr_db": 1}}, {"measured": {"psnr_db": "x", "plain_db": 2}}]
)
def test_an_odd_preset_entry_of_a_file_says_nothing(odd):
    assert made_for(all_full(3).with_info(preset=odd)) == ""
