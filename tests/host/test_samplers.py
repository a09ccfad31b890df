"""Every sampler and scheduler of the host under a schedule with all kinds of step."""

import pytest

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
