"""What a graph that plain sampling would survive does with bad input: it survives too, and says what happened."""

import gc
import os
import weakref

import pytest
import torch

from flexi_core import FlexiError, Schedule, ScheduleError

MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps


@pytest.mark.matrix("Bad input", "NaN in the latent")
@pytest.mark.parametrize("text", ["8*(F)", MIXED, "4*(FX)"])
def test_nan_latents_stay_nan_and_raise_nothing(host, demo_model, apply, record_property, text):
    noise = host.noise()
    noise[0, 0, 0, 0] = float("nan")
    model, handle = apply(demo_model, text)
    latent = host.sample(model, noise=noise)
    assert latent.isnan()[0].any() and latent[1].isfinite().all()
    assert handle.report.letters == Schedule.parse(text).letters.replace("P", "F").replace("X", "F")
    assert text == "8*(F)" or "From step 1 on the run's numbers were not finite" in str(handle.report)
    record_property("does", "samples on, every step in full; the row with NaN has NaN, other rows are as they were")


@pytest.mark.matrix("Bad input", "a run of no steps")
def test_run_without_steps_is_that_of_plain_sampling(host, demo_model, apply, record_property):
    model, _ = apply(demo_model, MIXED)
    noise, sampler, sigmas = host.noise(), host.comfy.samplers.sampler_object("euler"), torch.tensor([])

    def run(model):
        return host.comfy.sample.sample_custom(
            model, noise, 3.0, sampler, sigmas, host.positive, host.negative, noise, disable_pbar=True
        )

    assert torch.equal(run(model), run(demo_model))
    record_property("does", "plain sampling")


@pytest.mark.matrix("Bad input", "a depth that the network does not have")
def test_depth_beyond_the_network_runs_full_and_says_so(host, demo_model, cell):
    report = cell(
        demo_model,
        lambda model: host.sample(model),
        "F|FPP@900|F|FXX",
        ran="FFFFFFXX",
        does="partial steps run in full, with the reason",
    )
    assert "depth 900 needs more than the network's 6 blocks" in str(report)


@pytest.mark.matrix("Bad input", "a file for another architecture")
def test_file_for_another_architecture_runs_and_says_so(host, demo_model, record_property):
    schedule = Schedule.parse(MIXED).with_info(teacher={"architecture": "sha256:0000", "sampler": "dpmpp_2m"})
    model, handle = host.adapter.apply_schedule(demo_model, schedule)
    assert torch.equal(host.sample(model), host.sample(model))
    assert "the network's architecture differs" in str(handle.report)
    assert handle.report.letters == schedule.letters
    refusing, _ = host.adapter.apply_schedule(demo_model, schedule, "refuse")
    with pytest.raises(FlexiError, match="architecture differs"):
        host.sample(refusing)
    record_property("does", "runs and says so; refuse stops with an error, off samples plainly")


@pytest.mark.matrix("Bad input", "a schedule of another length")
def test_schedule_of_another_length_is_mapped_refused_or_off(host, demo_model, apply, record_property):
    mapped, handle = apply(demo_model, "4*(FX)")
    assert host.sample(mapped, steps=6).isfinite().all()
    assert "8 steps mapped to 6 by position" in str(handle.report)
    off, _ = apply(demo_model, "4*(FX)", "off")
    assert torch.equal(host.sample(off, steps=6), host.sample(demo_model, steps=6))
    with pytest.raises(FlexiError, match="the schedule has 8 steps, the run 6"):
        host.sample(apply(demo_model, "4*(FX)", "refuse")[0], steps=6)
    record_property("does", "mapped by position or noise level, and said; refuse and off do as they say")


@pytest.mark.matrix("Bad input", "schedule text: empty, or too long")
@pytest.mark.parametrize(("text", "words"), [("", "text is empty"), ("   ", "text is empty"), ("F" + "X" * 10_000, "10000")])
def test_bad_text_is_one_clear_error(text, words, record_property):
    with pytest.raises(ScheduleError, match=words):
        Schedule.parse(text)
    record_property("does", "refused before the graph runs, in words")


@pytest.mark.matrix("Bad input", "a schedule of 10,000 steps")
def test_ten_thousand_steps_are_mapped_to_a_short_run(host, demo_model, apply, record_property):
    model, handle = apply(demo_model, "2000*(FXXXX)")
    assert host.sample(model, steps=5).isfinite().all()
    assert str(handle.report).startswith("This schedule saves nothing here: made for 10000 steps, laid over 5")
    record_property("does", "mapped to the run")


@pytest.mark.matrix("Memory", "a cache limit that a feature does not fit")
def test_cache_limit_turns_partial_steps_full_and_says_so(host, demo_model, apply, record_property):
    schedule = Schedule.parse("2*(F)|FPPP@3|FX")
    bounded, handle = host.adapter.apply_schedule(demo_model, schedule, "map", "auto", 0.01)
    unbounded, other = host.adapter.apply_schedule(demo_model, schedule)
    latent = host.sample(bounded)
    same, _ = apply(demo_model, "6*(F)|FX")
    assert torch.equal(latent, host.sample(same))
    assert handle.report.letters == "FFFFFFFX"
    assert "does not fit into the cache limit of 0 MiB" in str(handle.report)
    assert not torch.equal(host.sample(unbounded), latent)
    assert other.report.letters == schedule.letters
    record_property("does", "the partial steps run in full, with the reason")


@pytest.mark.matrix("Memory", "the cache in RAM")
def test_cache_in_ram_gives_the_same_latent(host, demo_model, record_property):
    schedule = Schedule.parse("2*(F)|FPPP@3|FX")
    latents = [host.sample(host.adapter.apply_schedule(demo_model, schedule, "map", place)[0]) for place in ("gpu", "ram")]
    assert torch.equal(*latents)
    record_property("does", "the same latent")


@pytest.mark.matrix("Memory", "the cache's size")
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_cache_bytes_are_those_predicted(host, demo_model, apply, depth, record_property):
    model, handle = apply(demo_model, f"2*(F)|FPPP@{depth}|FX")
    host.sample(model, noise=host.noise(batch=3))
    assert handle.report.cache_mib == handle.report.predicted_cache_mib > 0
    record_property("does", "predicted to the byte, and reported")


@pytest.mark.matrix("Memory", "after a run, and after one that failed")
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_cache_is_left(host, demo_model, apply, fails, monkeypatch, record_property):
    from flexi_core.run.cache import FeatureCache

    kept = []
    store = FeatureCache.store

    def watched(self, keys, feature, *args):
        kept.extend(value for value in feature.values())
        return store(self, keys, feature, *args)

    monkeypatch.setattr(FeatureCache, "store", watched)
    model, _ = apply(demo_model, MIXED)

    def callback(step, *_):
        if fails and step == 4:
            raise RuntimeError("broken off")

    if fails:
        with pytest.raises(RuntimeError, match="broken off"):
            host.sample(model, callback=callback)
    else:
        host.sample(model, callback=callback)
    assert kept
    references = [weakref.ref(value) for value in kept]
    kept.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)
    record_property("does", "nothing of the cache is left")


@pytest.mark.matrix("Memory", "200 runs with changing sizes")
def test_two_hundred_runs_leave_memory_where_it_was(host, demo_model, apply, record_property):
    model, _ = apply(demo_model, "F|FPX@2|FP@1")
    sizes = (8, 16, 24, 32, 40)

    def rounds(count):
        for i in range(count):
            host.sample(model, steps=6, noise=host.noise(batch=1, size=sizes[i % len(sizes)]))

    rounds(50)  # allocators and kernels settle
    before = resident_mib()
    rounds(200)
    grown = resident_mib() - before
    assert grown < 16, f"{grown:.0f} MiB more after 200 runs"
    record_property("does", "memory stays where it was")


def resident_mib():
    """Return the resident set size of this process in MiB."""
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")
def test_a_pipe_in_the_folder_of_schedules_holds_nothing_up(node, schedule_folder):
    cls, path = node("FlexiLoadSchedule"), schedule_folder / "pipe.json"
    os.mkfifo(path)
    try:
        cls.define_schema()  # lists the folder
        assert "no schedule file 'pipe.json'" in cls.validate_inputs(file="pipe.json")
        for ask in (cls.execute, cls.fingerprint_inputs):
            with pytest.raises(Exception, match=r"no schedule file 'pipe\.json'"):
                ask(file="pipe.json")
    finally:
        path.unlink()
