"""Searches under samplers that draw noise or have a memory: fits in the denoised basis, the space, whole searches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from typer.testing import CliRunner

from flexi_core import FlexiError, Schedule, load_schedule
from flexi_core.metrics import psnr_db
from flexi_core.run.cost import NetworkCost
from flexi_core.run.null_steps.basis import DENOISED, DERIVATIVE
from flexi_core.run.plan import make_plan
from flexi_core.run.run import Run
from flexi_core.run.sampler import PLAIN, SamplerTraits
from flexi_core.runtime.sampling import SAMPLERS, solver_of, traits_of
from flexi_core.schedule.presets import all_full
from flexi_core.tune.fit import BlendFit, TrajectoryRecorder, linear_response
from flexi_core.tune.levels import at_levels, full_levels, with_level
from search_tools.backends.teacher import SEARCH_SEEDS, TeacherSettings
from search_tools.cli import app
from search_tools.settings import SearchSettings
from search_tools.space.sampler_space import left_out, space_under
from search_tools.space.space import FAMILIES, Space

FITTED = ("euler_ancestral", "lcm", "er_sde", "res_multistep_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
PER_CALL = SamplerTraits(draws_noise=True)
BROWNIAN = SamplerTraits(draws_noise=True, noise_of_interval=True, memory=1)
MEMORY = SamplerTraits(memory=1)
SIGMAS = torch.tensor([14.6, 9.0, 6.1, 4.2, 3.0, 2.1, 1.5, 1.1, 0.8, 0.5, 0.25, 0.1, 0.0])
STEPS = len(SIGMAS) - 1
SEEDS = tuple(range(8))
# Partial steps of depth 1, 2, 3 cost 8, 22 and 38 % of a full one.
COST = NetworkCost(1000.0, {("input", 0): 80.0, ("input", 1): 140.0, ("input", 2): 160.0, ("input", 3): 620.0,
                            **{("output", i): 0.0 for i in range(4)}})  # fmt: skip
GRID = (*(float(level) for level in np.geomspace(14.6, 0.03, 20) ** 1.1), 0.0)


# Fits.


@pytest.mark.parametrize("sampler", FITTED)
@pytest.mark.parametrize("basis", [DERIVATIVE, DENOISED])
def test_the_response_of_a_sampler_is_the_same_whatever_noise_it_draws(sampler, basis):
    solve = solver_of(sampler)
    one, other = (linear_response(lambda *run, seed=seed: solve(*run, seed=seed), SIGMAS, basis) for seed in (1, 2))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_response_of_ancestral_steps_is_that_of_the_formula():
    """x' = D + down / sigma (x - D), down = sigma'^2 / sigma: the step to the lower level, without the noise behind it."""
    expected = torch.zeros(STEPS + 1, STEPS + 1, dtype=torch.float64)
    expected[0, 0] = 1
    for i, (sigma, following) in enumerate(pairwise(SIGMAS.tolist())):
        kept = (following / sigma) ** 2
        expected[i + 1] = kept * expected[i]
        expected[i + 1, 1 + i] += 1 - kept
    found = linear_response(solver_of("euler_ancestral"), SIGMAS, DENOISED)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def _run(sampler, denoise, schedule, observer=None):
    """Run a sampler with the noise of the seeds, from the same start, under a schedule."""
    x = 14.6 * torch.randn(len(SEEDS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    run = Run(make_plan(schedule, SIGMAS.tolist(), traits_of(sampler, SIGMAS)), observer=observer)
    return SAMPLERS[sampler](lambda x, s: run.predict(x, float(s), lambda: denoise(x, s)), x, SIGMAS.double(), SEEDS)


def _fit(sampler, denoise, schedule):
    """Return where the teacher ends, and a schedule with blends fitted to it."""
    recorder = TrajectoryRecorder()
    teacher = _run(sampler, denoise, replace(all_full(STEPS), basis=DENOISED), recorder)
    response = linear_response(solver_of(sampler), SIGMAS, DENOISED)
    fit = BlendFit(make_plan(schedule, SIGMAS.tolist(), traits_of(sampler, SIGMAS)), response, response)
    fit.begin(recorder.trajectory)
    _run(sampler, denoise, schedule, fit)
    return teacher, fit.schedule(schedule)


def _parabola():
    """Return a denoiser whose answers lie on a parabola over the steps' numbers, whatever the state."""
    bend = torch.randn(len(SEEDS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    steps = {float(sigma): i for i, sigma in enumerate(SIGMAS.double())}
    return lambda x, sigma: 10 + bend * steps[float(sigma)] ** 2


@pytest.mark.parametrize("sampler", FITTED)
def test_the_teachers_noise_drops_out_of_what_a_fit_sees_missing(sampler):
    """Where extrapolation of the second order is exact nothing is missing, and the fit leaves it as it is."""
    schedule = Schedule.parse("F|F|F|FXX|FXX|FXX; order=2, basis=denoised")
    teacher, fitted = _fit(sampler, _parabola(), schedule)
    assert all(segment.blend == (1.0, 1.0, 1.0) for segment in fitted.segments if "X" in segment.letters)
    torch.testing.assert_close(_run(sampler, _parabola(), fitted), teacher, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", FITTED)
def test_a_fit_under_noise_finds_the_exact_extrapolation_from_a_default_that_is_another(sampler):
    schedule = Schedule.parse("F|F|F|FXX|FXX|FXX")
    teacher, fitted = _fit(sampler, _parabola(), schedule)
    found, default = (_run(sampler, _parabola(), s) - teacher for s in (fitted, schedule))
    assert fitted.basis == DENOISED and found.abs().max() < 0.01 * default.abs().max()


@pytest.mark.parametrize("sampler", FITTED)
def test_a_fit_under_noise_ends_nearer_to_the_teacher_than_the_default(gaussian, sampler):
    schedule = Schedule.parse("4*(F)|F" + "X" * (STEPS - 5))
    teacher, fitted = _fit(sampler, gaussian.denoise, schedule)
    before, after = (_run(sampler, gaussian.denoise, s) - teacher for s in (schedule, fitted))
    assert after.square().sum() < before.square().sum()


@pytest.fixture(scope="module")
def ancestral(backend_on, small_model):
    return backend_on(small_model, TeacherSettings("euler_ancestral", steps=8))


def test_a_fit_under_noise_is_nearer_on_the_samples_that_it_was_made_on_and_says_its_basis(ancestral):
    schedule = Schedule.parse("FX|FXX|FX|F")
    fitted, macs = ancestral.fit(schedule, SEARCH_SEEDS, 4)
    assert fitted.basis == DENOISED and macs > 0
    teacher = ancestral.teacher(SEARCH_SEEDS, 4)
    before, after = (psnr_db(ancestral.sample(s, SEARCH_SEEDS, 4).latents, teacher).mean() for s in (schedule, fitted))
    assert after > before
    assert Schedule.parse(str(fitted)) == fitted, "its text is read with the same meaning"


@pytest.mark.parametrize("text", ["FN|FXX|FX|F", "FX|FXX|FX|F; sigmas=14.6/9/6/4/3/2/1/.5/0"])
def test_what_takes_the_noise_elsewhere_is_not_fitted(ancestral, text):
    assert ancestral.fit(Schedule.parse(text), 0, 2) == (Schedule.parse(text), 0.0)


def test_each_basis_has_a_fit_of_its_own(backend_on, small_model):
    backend = backend_on(small_model, TeacherSettings("res_multistep", steps=8))
    schedules = [replace(Schedule.parse("FX|FXX|FX|F"), basis=basis) for basis in (DERIVATIVE, DENOISED, None)]
    derivative, denoised, by_sampler = (backend.fit(schedule, SEARCH_SEEDS, 2)[0] for schedule in schedules)
    assert derivative.basis == DERIVATIVE and denoised == by_sampler
    assert all(a.blend != b.blend for a, b in zip(derivative.segments[:-1], denoised.segments[:-1], strict=True))


# The space.


def _space(sampler: SamplerTraits, **others) -> Space:
    return Space(20, 3.0, COST, sigmas=GRID, **others, **space_under(sampler))


def _walk(space: Space, count: int):
    rng = np.random.default_rng(7)
    schedule = space.random(rng)
    for _ in range(count):
        yield schedule
        schedule = space.mutate(schedule, rng) if rng.random() < 0.8 else space.random(rng)


@pytest.mark.parametrize("others", [{}, {"front": True}, {"reuse_guidance": True}, {"families": ("free",)}])
def test_under_noise_of_every_call_no_step_is_removed_or_moved(others):
    space = _space(PER_CALL, **others)
    for schedule in [*space.seeds(), *_walk(space, 500)]:
        assert "N" not in schedule.letters and schedule.sigmas is None and schedule.basis == DENOISED
        assert space.spent(schedule) <= space.budget


def test_under_brownian_noise_steps_may_be_removed_and_none_moves():
    space = _space(BROWNIAN)
    found = [*space.seeds(), *_walk(space, 200)]
    assert all(schedule.sigmas is None and schedule.basis == DENOISED for schedule in found)
    assert any("N" in schedule.letters for schedule in found)


def test_a_sampler_with_a_memory_is_searched_in_both_bases():
    space = _space(MEMORY)
    assert [seed.basis for seed in space.seeds()[:6]] == [DERIVATIVE, DENOISED] * 3
    assert replace(space.seeds()[0], basis=DENOISED) == space.seeds()[1]
    extrapolated = [schedule for schedule in _walk(space, 300) if "X" in schedule.letters]
    assert {schedule.basis for schedule in extrapolated} == {DERIVATIVE, DENOISED}
    rng, kept = np.random.default_rng(0), 0
    for schedule in extrapolated:
        neighbour = space.mutate(schedule, rng)
        kept += neighbour.basis == schedule.basis
    assert 0.8 * len(extrapolated) < kept < len(extrapolated), "most mutations keep the parent's basis"


def test_the_same_steps_come_in_two_bases_only_where_these_make_a_difference():
    texts = [str(seed) for seed in _space(MEMORY).seeds() if "X" not in seed.letters]
    assert len(texts) == len({text.split(";")[0] for text in texts}) > 3


@pytest.mark.parametrize("sampler", [PER_CALL, BROWNIAN, MEMORY], ids=["per call", "brownian", "memory"])
def test_genes_hold_the_basis(sampler):
    space = _space(sampler)
    genes = space.distributions()
    assert ("basis" in genes) == (sampler is MEMORY)
    for schedule in [*space.seeds(), *_walk(space, 150)]:
        encoded = space.encode(schedule)
        assert space.decode(encoded) == schedule
        assert all(genes[name]._contains(genes[name].to_internal_repr(value)) for name, value in encoded.items())
        assert space.filled(schedule).basis == schedule.basis


def test_a_moved_level_keeps_the_basis():
    schedule = replace(at_levels([GRID[0], 4.0, 1.0], GRID), basis=DENOISED)
    moved = with_level(schedule, [i for i, step in enumerate(schedule.steps()) if step.kind.is_full][1], 3.0)
    assert moved.basis == DENOISED and full_levels(moved)[1] == 3.0


def test_genes_of_a_study_from_before_there_were_bases_are_read():
    space, schedule = _space(MEMORY), Schedule.parse("5*(FXXX)")
    genes = {name: value for name, value in space.encode(schedule).items() if name != "basis"}
    assert space.decode(genes) == replace(schedule, basis=DERIVATIVE)


def test_null_steps_have_one_kind_where_none_is_removed():
    assert _space(PER_CALL).distributions()["null_0"] == CategoricalDistribution(("X",))
    assert _space(PER_CALL).families == tuple(family for family in FAMILIES if family not in ("paper", "levels"))


@pytest.mark.parametrize(("family", "words"), [("paper", "removed steps"), ("levels", "moved noise levels")])
def test_a_part_of_the_space_that_noise_leaves_nothing_of_is_refused(family, words):
    with pytest.raises(FlexiError, match=f"nothing is left of the space {family}.*{words}; choose another part"):
        _space(PER_CALL, families=(family,))


# Made by this search before it knew other bases: numbers of seeds, and digests of these and of 300 steps of a walk.
BEFORE = [({}, 43, "91a12b117c6e0996"), ({"front": True}, 51, "7cac226e807a66ed"),
          ({"reuse_guidance": True}, 45, "490f7d76fe7e5cbe")]  # fmt: skip


@pytest.mark.parametrize(("others", "seeds", "digest"), BEFORE)
def test_draws_for_samplers_like_eulers_are_what_they_were(others, seeds, digest):
    space = _space(PLAIN, **others)
    assert len(space.seeds()) == seeds
    texts = "\n".join(map(str, [*space.seeds(), *_walk(space, 300)]))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == digest


def test_what_is_left_out_is_said():
    assert left_out(PLAIN) == left_out(MEMORY) == ""
    assert "Removed steps (N) and moved noise levels are left out" in left_out(PER_CALL)
    assert "Moved noise levels are left out" in left_out(BROWNIAN) and "are left out: they" in left_out(BROWNIAN)


def test_the_settings_of_a_study_stay_as_they_were(ancestral):
    settings = SearchSettings.of(ancestral, 2.0, samples=16)
    assert settings.families == FAMILIES and settings.moves
    space = settings.space(ancestral.cost, ancestral.identity["sigmas"], ancestral.traits)
    assert (space.bases, space.removes, space.moves) == ((DENOISED,), False, False)


# Whole searches.


@pytest.fixture
def flexi(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXI_CACHE", str(tmp_path / "cache"))
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_a_search_under_noise_ends_nearer_than_as_few_plain_steps(flexi, tmp_path, monkeypatch):
    monkeypatch.setattr("search_tools.commands.search.JUDGED", 4)
    run = ["--sampler", "euler_ancestral", "--steps", 8, "--speedup", 2, "--samples", 16, "--guesses", 0]
    found = flexi("search", *run, "--evaluations", 2, "--finalists", 0, "--out", "s.json", "--json")
    assert found.exit_code == 0, found.output
    assert "The sampler draws noise anew in every step." in found.stderr
    schedule = load_schedule(tmp_path / "s.json")
    assert schedule.basis == DENOISED and "basis=denoised" in json.loads(found.stdout)["schedule"]
    table = flexi("evaluate", "s.json", "--samples", 6, "--json")
    rows = {row["name"]: row for row in json.loads(table.stdout)["rows"]}
    assert rows["s"]["psnr_db"] > rows["euler_ancestral, 4 steps"]["psnr_db"] + 3


def test_a_space_that_noise_leaves_nothing_of_makes_no_study(flexi, tmp_path):
    refused = flexi("search", "--sampler", "euler_ancestral", "--steps", 8, "--speedup", 2, "--space", "paper")
    assert refused.exit_code == 2 and "nothing is left of the space paper" in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "flexi_studies.db").exists()
