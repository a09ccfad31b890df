"""Every sampler and scheduler of the host under a schedule with all kinds of step."""

from __future__ import annotations

import pytest
import torch

from flexi_core.metrics import data_range, psnr_db
from flexi_core.run.sampler import SamplerTraits, probe
from flexi_core.schedule.presets import Preset, full_steps

# draws noise, of the interval, questions a step, memory
TOLD = {
    "euler": (False, False, 1, 0),
    "ddim": (False, False, 1, 0),
    "heun": (False, False, 2, 0),
    "heunpp2": (False, False, 3, 0),
    "dpm_2": (False, False, 2, 0),
    "lms": (False, False, 1, 2),
    "dpmpp_2m": (False, False, 1, 1),
    "res_multistep": (False, False, 1, 1),
    "gradient_estimation": (False, False, 1, 2),
    "ipndm": (False, False, 1, 2),
    "ipndm_v": (False, False, 1, 2),
    "deis": (False, False, 1, 2),
    "uni_pc": (False, False, 1, 2),
    "uni_pc_bh2": (False, False, 1, 2),
    "euler_ancestral": (True, False, 1, 0),
    "ddpm": (True, False, 1, 0),
    "lcm": (True, False, 1, 0),
    "dpm_2_ancestral": (True, False, 2, 0),
    "dpmpp_2s_ancestral": (True, False, 2, 0),
    "res_multistep_ancestral": (True, False, 1, 1),
    "er_sde": (True, False, 1, 2),
    "seeds_2": (True, False, 2, 0),
    "seeds_3": (True, False, 3, 0),
    "sa_solver": (True, False, 1, 2),
    "sa_solver_pece": (True, False, 2, 0),
    "dpmpp_sde": (True, True, 2, 0),
    "dpmpp_2m_sde": (True, True, 1, 1),
    "dpmpp_2m_sde_heun": (True, True, 1, 1),
    "dpmpp_3m_sde": (True, True, 1, 2),
}
CAPTIONS = (
    "a large red circle at the center on a navy background",
    "a small yellow triangle at the top left on a grey background",
)
RUNS = (8, 20)  # steps
MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps
OWN_GRID = ("dpm_fast", "dpm_adaptive")


@pytest.mark.matrix("Samplers", "{sampler_name}")
def test_sampler_keeps_the_laws(host, demo_model, cell, sampler_name):
    def sample(model):
        return host.sample(model, sampler_name, noise=host.noise(batch=1))

    if sampler_name in OWN_GRID:
        report = cell(demo_model, sample, MIXED, ran="", does="stands down: the sampler chooses its own noise levels")
        assert f"{sampler_name} chooses its own noise levels" in str(report)
        return
    # These read the unguided prediction, which an extrapolated step does not have.
    computes = "cfg_pp" in sampler_name
    does = "extrapolated steps are computed: the sampler reads the unguided prediction" if computes else None
    report = cell(demo_model, sample, MIXED, ran="FFFPFFPN" if computes else None, does=does)
    assert all(step.network_calls == 0 for step in report.steps if step.ran.is_null)
    assert ("unguided prediction" in str(report)) is computes


@pytest.mark.matrix("Schedulers", "euler and dpmpp_2m, {scheduler_name}")
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_scheduler_keeps_the_laws(host, demo_model, cell, sampler, scheduler_name):
    cell(demo_model, lambda model: host.sample(model, sampler, scheduler=scheduler_name, noise=host.noise(batch=1)), MIXED)


@pytest.mark.matrix("Samplers", "{sampler_name}")
def test_preset_is_nearer_to_all_steps_than_as_many_plain_ones(host, demo_model, captions, record_property, sampler_name):
    if sampler_name.endswith("_gpu") or sampler_name == "ddim":
        pytest.skip("the same function, on a CPU, as another sampler's")

    patched, handle = host.adapter.apply_schedule(demo_model, Preset("2x"))

    def sample(model, steps, run):
        # The run of all steps, or fewer, on the grid that people take for the sampler.
        scheduler = "karras" if run == 20 and sampler_name.startswith("dpmpp") else "normal"
        return host.sample(model, sampler_name, steps, scheduler=scheduler, noise=host.noise(len(CAPTIONS)), positive=captions)

    for run in RUNS:  # the shortest that the preset has something for
        teacher, made = sample(demo_model, run, run), sample(patched, run, run)
        report = handle.report
        if report.steps:
            break
        assert torch.equal(made, teacher), "standing down changed the picture"
    else:
        (why,) = (*report.words, *report.notes)
        record_property("picture", f"plain sampling: {why}")
        return
    full = report.letters.count("F")
    assert full_steps(run, 2) <= full < run and set(report.letters) == {"F", "X"}, str(report)
    # Over both pictures at once: of one alone, a sampler that draws noise may miss a whole shape.
    whole, scale = teacher.flatten(0, 1)[None], data_range(teacher)
    near, plain = (float(psnr_db(each.flatten(0, 1)[None], whole, scale)) for each in (made, sample(demo_model, full, run)))
    record_property("picture", f"{run} steps, {run / full:.3g}x: {near:.1f} dB, {full} plain steps {plain:.1f} dB")
    assert near > plain, f"{near:.2f} dB, {full} plain steps {plain:.2f} dB: {report}"


@pytest.fixture(scope="module")
def captions(host):
    """The conditioning of a batch with a caption each."""
    found = [host.adapter.demo_conditioning(caption)[0] for caption in CAPTIONS]
    return [[torch.cat([cond for cond, _ in found]), found[0][1]]]


def test_samplers_that_no_step_can_be_skipped_of_stand_down_with_one_sentence(host, demo_model, sampler_name):
    if sampler_name not in OWN_GRID and "cfg_pp" not in sampler_name:
        pytest.skip("steps of this sampler can be skipped")
    patched, handle = host.adapter.apply_schedule(demo_model, Preset("2x"))
    host.sample(patched, sampler_name, noise=host.noise(1))
    lines = str(handle.report).splitlines()
    assert len(lines) == 3 and lines[0] == "Flexiffusion: plain sampling, every step full."
    assert ("CFG++" if "cfg_pp" in sampler_name else "chooses its own noise levels") in lines[1]


@pytest.fixture
def tried(host, demo_model):
    """A function of (sampler object or name, scheduler, steps) that returns what it is told to be."""

    def told(sampler, scheduler="normal", steps=20):
        sampler = host.comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        return probe(host.adapter.HostSolver(sampler, demo_model), host.sigmas(demo_model, scheduler, steps).tolist())

    return told


def test_every_sampler_is_told_right(tried, sampler_name):
    name = sampler_name.removesuffix("_gpu")
    for scheduler in ("normal", "simple", "karras"):
        told = tried(sampler_name, scheduler)
        if name in OWN_GRID:
            assert not told.keeps_levels
        elif name.endswith("_cfg_pp"):
            assert told.reads_guidance and told.keeps_levels
            assert told.draws_noise is ("ancestral" in name)
        elif name not in TOLD:
            pytest.skip("newer than this table")
        else:
            assert told == SamplerTraits(*TOLD[name], renews=name == "lcm")


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("euler_ancestral", {"eta": 0.0}),
        ("euler_ancestral", {"s_noise": 0.0}),
        ("dpm_2_ancestral", {"eta": 0.0}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}),
        ("dpmpp_2m_sde", {"eta": 0.0}),
        ("dpmpp_3m_sde", {"s_noise": 0.0}),
        ("dpmpp_sde", {"eta": 0.0}),
        ("er_sde", {"s_noise": 0.0}),
    ],
)
def test_a_sampler_whose_noise_is_turned_off_is_told_to_draw_none(host, tried, sampler, options):
    assert tried(sampler).draws_noise
    told = tried(host.comfy.samplers.ksampler(sampler, options))
    assert not told.draws_noise and not told.noise_of_interval and told.keeps_levels


def test_churn_of_euler_is_told_to_be_noise(host, tried):
    assert not tried("euler").draws_noise
    told = tried(host.comfy.samplers.ksampler("euler", {"s_churn": 10.0, "s_noise": 1.0}))
    assert told.draws_noise or not told.keeps_levels


def test_trying_a_sampler_leaves_the_random_state_and_asks_no_network(host, demo_model, tried, monkeypatch, sampler_name):
    asked = []
    monkeypatch.setattr(type(demo_model.model), "apply_model", lambda *_, **__: asked.append(1))
    before = torch.get_rng_state()
    tried(sampler_name)
    assert torch.equal(torch.get_rng_state(), before) and not asked
