"""Patched models and weights of other types: a partial step has to see the patches that a full step sees."""

import importlib
from types import SimpleNamespace

import pytest
import torch

MIXED = "2*(F)|FPX@2|FPN@3"  # 8 steps
PARTIAL = "F|FPPP@2|FP@4"  # 7 steps
# SD1.5's description with fewer and narrower blocks: six input blocks, transformers 0 and 1 in them, 2 in the middle.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
BLOCKS = 6
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}


@pytest.fixture(scope="module")
def make_unet(host, generated):
    """A function of (dtype, compute, seed): a small U-Net that the host takes for SD1.5; `compute` is what it casts to."""

    def make(dtype=torch.float32, compute=None, seed=0):
        config = importlib.import_module("comfy.supported_models").SD15(UNET)
        config.set_inference_dtype(dtype, compute)
        cpu = torch.device("cpu")
        inner = config.get_model({}, device=cpu).eval()
        generated(inner.diffusion_model, seed)
        return host.comfy.model_patcher.ModelPatcher(inner.requires_grad_(False), load_device=cpu, offload_device=cpu)

    return make


@pytest.fixture(scope="module")
def unet(make_unet):
    return make_unet()


@pytest.fixture(scope="module")
def prompts():
    rng = torch.Generator().manual_seed(1)
    return {name: [[torch.randn(1, 7, 64, generator=rng), {}]] for name in ("positive", "negative")}


@pytest.fixture(scope="module")
def sample(host, prompts):
    """A function of a model that samples 8 steps, or as many as told, of a 16x16 latent."""

    def run(model, steps=8, **options):
        torch.manual_seed(0)  # some patches draw from the global generator
        return host.sample(model, steps=steps, noise=noise(1), **prompts, **options)

    return run


def noise(batch):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def twice(host, apply, prompts):
    """A function of (model, depth) that asks a full step and then a partial one at the same input of the network.

    Two noise levels of one timestep, and latents that scale to the same input: returns the predictions [2, B, C, H, W] that
    guidance makes of them, and the report.
    """

    def predictions(model, depth, *extra, text=None, cfg=3.0):
        training = model.get_model_object("model_sampling").sigmas
        sigma = float(training[600])
        sigmas = torch.tensor([sigma * 1.001, sigma * 0.999, 0.0])
        found = []

        def sampler(denoiser, x, sigmas, extra_args=None, **_):
            found.clear()  # it is tried before the run
            inputs = x / (sigmas[0] ** 2 + 1) ** 0.5
            for level in sigmas[:-1]:
                x = inputs * (level**2 + 1) ** 0.5
                found.append((x - denoiser(x, level.expand(len(x)), **extra_args)) / level)
            return x

        patched, handle = apply(model, text or f"FP@{depth}")
        start = noise(2)
        torch.manual_seed(0)
        host.comfy.sample.sample_custom(
            patched,
            start,
            cfg,
            host.comfy.samplers.KSAMPLER(sampler),
            sigmas,
            prompts["positive"],
            prompts["negative"],
            torch.zeros_like(start),
            disable_pbar=True,
        )
        return torch.stack(found), handle.report

    return predictions


def assert_one_prediction(predictions, report, tolerance=1e-4):
    assert report.letters == "FP", str(report)
    full, partial = predictions
    torch.testing.assert_close(partial, full, rtol=0, atol=tolerance * float(full.abs().max()))


def patched_by(extra, name, model):
    """Return the model with one of the host's patches, as its node makes it."""
    if name == "FreeU":
        return extra("freelunch", "FreeU")(model, 1.3, 1.4, 0.5, 0.2)[0]
    if name == "FreeU_V2":
        return extra("freelunch", "FreeU_V2")(model, 1.3, 1.4, 0.5, 0.2)[0]
    if name == "HyperTile":
        return extra("hypertile", "HyperTile")(model, 64, 1, 0, False)[0]
    if name == "HyperTile with random tiles":
        return extra("hypertile", "HyperTile")(model, 32, 3, 1, True)[0]
    if name == "ToMe":
        return extra("tomesd", "TomePatchModel")(model, 0.5)[0]
    if name == "SAG":
        return extra("sag", "SelfAttentionGuidance")(model, 0.7, 2.0)[0]
    if name == "PAG":
        return extra("pag", "PerturbedAttentionGuidance")(model, 3.0)[0]
    if name == "RescaleCFG":
        return extra("model_advanced", "RescaleCFG")(model, 0.7)[0]
    if name == "attention multiply":
        return extra("attention_multiply", "UNetSelfAttentionMultiply")(model, 1.3, 1.0, 0.7, 1.2)[0]
    patched = model.clone()
    if name == "attn1 patch":
        patched.set_model_attn1_patch(lambda q, k, v, options: (q * 1.5, k, v * 0.5))
    elif name == "attn2 patch":
        patched.set_model_attn2_patch(lambda q, k, v, options: (q, torch.cat([k, k * 2], 1), torch.cat([v, v * 2], 1)))
    elif name == "attn1 output patch":
        patched.set_model_attn1_output_patch(lambda out, options: out * (1 + options["transformer_index"]))
    elif name == "attn2 output patch":
        patched.set_model_attn2_output_patch(lambda out, options: out * (1 + options["block"][1]))
    elif name == "input block patch":
        patched.set_model_input_block_patch(lambda h, options: h * (1 + 0.1 * options["block"][1]))
    elif name == "input block patch after the skip":
        patched.set_model_input_block_patch_after_skip(lambda h, options: h * (1 + 0.1 * options["block"][1]))
    elif name == "output block patch":
        patched.set_model_output_block_patch(lambda h, skip, options: (h.mul_(1.1), skip * (1 + options["block"][1])))
    elif name == "patch after the middle block":
        require_middle_patches(patched)
        patched.set_model_patch(lambda args: {"h": args["h"] * 1.5}, "middle_block_after_patch")
    elif name == "embedding patch":
        patched.set_model_emb_patch(lambda emb, channels, options: emb * 1.5)
    return patched


GUIDANCE = ("SAG", "PAG", "RescaleCFG")
OWN_RANDOM = ("ToMe", "HyperTile with random tiles")  # what a step draws depends on what the steps before it drew
PATCHES = (
    "FreeU",
    "FreeU_V2",
    "HyperTile",
    "HyperTile with random tiles",
    "ToMe",
    *GUIDANCE,
    "attention multiply",
    "attn1 patch",
    "attn2 patch",
    "attn1 output patch",
    "attn2 output patch",
    "input block patch",
    "input block patch after the skip",
    "output block patch",
    "embedding patch",
    "patch after the middle block",
)


def require_middle_patches(model):
    """Skip where the host does not know patches after the middle block."""
    if not hasattr(model, "set_model_middle_block_after_patch"):
        pytest.skip("this host has no patches after the middle block")


@pytest.mark.matrix("Patches and weights", "{name}")
@pytest.mark.parametrize("name", PATCHES)
def test_patch_keeps_the_laws_and_reaches_partial_steps(unet, sample, cell, twice, extra, name):
    model = patched_by(extra, name, unet)
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model, 2), sample(unet, 2)), "the patch does nothing here"
    if name in OWN_RANDOM:
        return
    for depth in range(1, BLOCKS):
        assert_one_prediction(*twice(model, depth))


class Adapter(torch.nn.Module):
    """Stands for one of SUPIR's: fuses what it is given, by a strength of its own."""

    def __init__(self, number):
        super().__init__()
        self.strength = 1 + 0.1 * number

    def forward(self, control, *parts, control_scale):
        return torch.cat(parts[::-1], 1) * self.strength + control * control_scale


@pytest.mark.matrix("Patches and weights", "SUPIR")
def test_patches_that_count_the_blocks_run_in_full_and_say_so(unet, sample, cell):
    """The host's own patch: it takes its adapters one after another, from the middle block on."""
    require_middle_patches(unet)
    supir = importlib.import_module("comfy.ldm.supir.supir_patch").SUPIRPatch
    ups = sum("Upsample" in type(layer).__name__ for layer in unet.model.diffusion_model.output_blocks.modules())
    features = [torch.tensor(0.05)] * (1 + BLOCKS)
    net = SimpleNamespace(model=SimpleNamespace(control_model=lambda *_: features))
    adapters = torch.nn.ModuleList(Adapter(number) for number in range(1 + BLOCKS + ups))
    model = unet.clone()
    supir(net, adapters, torch.zeros(1, 4, 16, 16), 1.0, 1.0).register(model)
    assert not torch.equal(sample(model, 2), sample(unet, 2))
    does = "full, removed, extrapolated steps as planned; partial ones run in full, with the reason"
    report = cell(model, sample, MIXED, ran="FFFFXFFN", does=does)
    assert "SUPIRPatch patches the middle block and others" in str(report)


@pytest.mark.matrix("Patches and weights", "{name} on the embedded model")
@pytest.mark.parametrize("name", ["FreeU_V2", "SAG", "PAG", "attn2 output patch"])
def test_patch_keeps_the_laws_on_the_embedded_model(host, demo_model, cell, extra, name):
    model = patched_by(extra, name, demo_model)
    cell(model, lambda model: host.sample(model, noise=host.noise(1)), MIXED)
    assert not torch.equal(host.sample(model, steps=2), host.sample(demo_model, steps=2))


@pytest.mark.matrix("Patches and weights", "IPAdapter and InstantID: attention replaced by block number")
@pytest.mark.parametrize("with_index", [False, True], ids=["block", "block and transformer block"])
def test_replaced_attention_sees_its_own_block_on_partial_steps(unet, sample, cell, twice, with_index):
    attention = importlib.import_module("comfy.ldm.modules.attention").optimized_attention
    seen, numbers = [], iter(range(1, 100))
    model = unet.clone()

    class Adapter:
        """Adds tokens of its own, as an image prompt's adapter does, and has one set of them for each block."""

        def __init__(self, place):
            self.place, self.number = place, next(numbers)

        def __call__(self, q, k, v, options):
            assert options["block"] == self.place
            seen.append((options["block"], options["transformer_index"], options["block_index"]))
            b = len(q) // len(options["cond_or_uncond"])
            strength = torch.tensor([1.0 - slot for slot in options["cond_or_uncond"]]).repeat_interleave(b)
            own = torch.randn(len(q), 3, k.shape[-1], generator=torch.Generator().manual_seed(self.number))
            out = attention(q, k, v, options["n_heads"])
            return out + strength[:, None, None] * attention(q, own, own, options["n_heads"])

    index = (0,) if with_index else ()
    for part, i in (("input", 1), ("input", 3), ("middle", 0), *(("output", i) for i in range(2, BLOCKS))):
        model.set_model_attn2_replace(Adapter((part, i)), part, i, *index)
    whole = [("input", 1), ("input", 3), ("middle", 0), ("output", 2), ("output", 3), ("output", 4), ("output", 5)]
    whole = [(block, transformer, 0) for transformer, block in enumerate(whole)]
    for depth in range(1, BLOCKS):
        seen.clear()
        predictions, report = twice(model, depth)
        assert_one_prediction(predictions, report)
        shallow = [entry for entry in whole if runs(entry[0], depth)]
        assert seen == [*whole, *shallow], depth
    cell(model, sample, PARTIAL.replace("FP@4", "FPX@4"))
    assert not torch.equal(sample(model, 2), sample(unet, 2))


def runs(block, depth):
    """Return whether a block runs on a partial step of a depth."""
    part, i = block
    return i < depth if part == "input" else part == "output" and i >= BLOCKS - depth


@pytest.mark.matrix("Patches and weights", "Kohya deep shrink, partial steps above the shrunk block")
def test_deep_shrink_that_ends_within_a_segment_keeps_the_shrunk_feature(unet, sample, cell, twice, extra):
    # The shrinking ends with the first of the two noise levels: the shallow step still has the full one's prediction.
    node = extra("model_downscale", "PatchModelAddDownscale")
    shrunk = node(unet, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")[0]
    assert not torch.equal(sample(shrunk, 2), sample(unet, 2))
    cell(shrunk, sample, MIXED)
    for depth in (1, 2, 3):
        assert_one_prediction(*twice(shrunk, depth))
        assert_one_prediction(*twice(ending_between(node, unet), depth))


@pytest.mark.matrix("Patches and weights", "Kohya deep shrink, partial steps below the shrunk block")
def test_deep_shrink_that_ends_within_a_deep_segment_runs_full_and_says_so(unet, sample, apply, cell, twice, extra):
    node = extra("model_downscale", "PatchModelAddDownscale")
    whole_run = node(unet, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")[0]
    for depth in (4, 5):
        assert_one_prediction(*twice(whole_run, depth))
    ending = ending_between(node, unet, 1)
    predictions, report = twice(ending, 4)
    expected, _ = twice(ending, 4, text="2*(F)")
    assert report.letters == "FF"
    assert torch.equal(predictions, expected)
    assert "blocks of another size" in str(report)
    part = node(unet, 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")[0]
    report = cell(part, sample, "F|FPPPPPP@4", ran="FFPFPPPP", does="one full step where the feature's shape changes")
    assert "blocks of another size" in str(report)


def ending_between(node, model, block=3):
    """Return the model shrunk at the first noise level of `twice` alone."""
    sampling = model.get_model_object("model_sampling")
    sigma, low, high = float(sampling.sigmas[600]), 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if sampling.percent_to_sigma(middle) > sigma else (low, middle)
    assert sigma * 0.999 < sampling.percent_to_sigma(low) < sigma * 1.001
    return node(model, block, 2.0, 0.0, low, True, "bicubic", "bicubic")[0]


@pytest.fixture(scope="module")
def lora_file(host, unet):
    """A LoRA file in the host's folder, in the names that trainers write, for transformers at both ends of the U-Net."""
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(3)
    folder = host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for block, width in (("down_blocks_0_attentions_0", 32), ("mid_block_attentions_0", 128), ("up_blocks_2_attentions_1", 32)):
        for layer, size in (("attn1_to_q", width), ("attn2_to_v", 64)):
            name = f"lora_unet_{block}_transformer_blocks_0_{layer}"
            tensors[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=rng)
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, size, generator=rng) * 0.3
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, str(folder / "small.safetensors"))
    return "small.safetensors"


@pytest.fixture(scope="module")
def with_lora(lora_file, repatched):
    """A function of a model that returns it with the LoRA, loaded by the host's own node."""
    loader = importlib.import_module("nodes").LoraLoaderModelOnly()
    return lambda model: loader.load_lora_model_only(model, lora_file, 0.8)[0]


@pytest.mark.matrix("Patches and weights", "LoRA from a file")
def test_lora_keeps_the_laws_and_reaches_partial_steps(unet, sample, cell, twice, with_lora):
    model = with_lora(unet)
    assert len(model.patches) == 6
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sample(unet))
    for depth in range(1, BLOCKS):
        assert_one_prediction(*twice(model, depth))


@pytest.mark.matrix("Patches and weights", "LoRA after the schedule in the graph")
def test_lora_after_the_schedule_gives_the_same_latent(unet, sample, apply, with_lora, record_property):
    before, _ = apply(with_lora(unet), MIXED)
    after, handle = apply(unet, MIXED)
    assert torch.equal(sample(with_lora(after)), sample(before))
    assert handle.report.letters == "FFFPXFPN"
    assert not torch.equal(sample(after), sample(before))
    record_property("does", "the latent of a LoRA before the schedule")


@pytest.mark.matrix("Patches and weights", "weight patches: {kind}")
@pytest.mark.parametrize("kind", ["diff", "set", "in the skipped blocks alone"])
def test_weight_patch_keeps_the_laws(unet, sample, cell, twice, kind):
    part = "middle_block.0.in_layers.2.weight" if kind.startswith("in") else "output_blocks.5.0.in_layers.2.weight"
    key = f"diffusion_model.{part}"
    weight = unet.model.state_dict()[key]
    values = weight.flip(0).contiguous() if kind == "set" else torch.full_like(weight, 0.05)
    model = unet.clone()
    assert model.add_patches({key: ("set" if kind == "set" else "diff", (values,))}) == [key]
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sample(unet))
    for depth in (1, 3):
        assert_one_prediction(*twice(model, depth))


@pytest.mark.matrix("Patches and weights", "ModelMergeSimple")
def test_merged_model_keeps_the_laws(host, unet, sample, cell, twice, make_unet, extra):
    merge = extra("model_merging", "ModelMergeSimple")
    other = make_unet(seed=5)
    model = merge(unet, other, 0.6)[0]
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sample(unet))
    assert_one_prediction(*twice(model, 2))


@pytest.mark.matrix("Patches and weights", "ModelMergeSimple of two models with schedules")
def test_merge_samples_under_the_first_models_schedule(host, unet, sample, apply, record_property, make_unet, extra):
    merge = extra("model_merging", "ModelMergeSimple")
    other = make_unet(seed=5)
    first, handle = apply(unet, MIXED)
    second, unused = apply(other, "8*(F)")
    latent = sample(merge(first, second, 0.6)[0])
    assert torch.equal(latent, sample(apply(merge(unet, other, 0.6)[0], MIXED)[0]))
    assert handle.report.letters == "FFFPXFPN"
    assert unused.report is None
    record_property("does", "the first model's schedule is used")


TYPES = {
    "float16": (torch.float16, None, 2e-2),
    "bfloat16": (torch.bfloat16, None, 1e-1),
    "float16 cast to float32": (torch.float16, torch.float32, 1e-4),
    "bfloat16 cast to float32": (torch.bfloat16, torch.float32, 1e-4),
    "fp8_e4m3fn cast to float32": (torch.float8_e4m3fn, torch.float32, 1e-4),
    "fp8_e4m3fn cast to bfloat16": (torch.float8_e4m3fn, torch.bfloat16, 1e-1),
    "fp8_e5m2 cast to float32": (torch.float8_e5m2, torch.float32, 1e-4),
}


@pytest.fixture(params=list(TYPES))
def typed(request, host, sample, make_unet):
    """A U-Net with weights of a type, and the tolerance of its arithmetic; skipped where plain sampling fails."""
    dtype, compute, tolerance = TYPES[request.param]
    model = make_unet(dtype, compute)
    try:
        sample(model, 1)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"plain sampling fails on this CPU: {error}")
    return request.param, model, tolerance


@pytest.mark.matrix("Patches and weights", "weights: {typed}")
def test_weights_of_another_type_keep_the_laws(typed, sample, cell, twice):
    _, model, tolerance = typed
    report = cell(model, sample, MIXED)
    assert report.cost is not None, "the MACs are not counted for this type"
    assert_one_prediction(*twice(model, 2), tolerance)


def test_fp8_weights_cost_the_same_macs_as_float32_ones(host, unet, sample, apply, make_unet):
    reports = []
    for model in (unet, make_unet(torch.float8_e4m3fn, torch.float32)):
        patched, handle = apply(model, MIXED)
        sample(patched)
        reports.append(handle.report)
    assert reports[0].macs == reports[1].macs > 0


def test_macs_are_counted_where_the_hosts_attention_needs_a_real_device(host, sample, apply, make_unet, monkeypatch):
    attention = importlib.import_module("comfy.ldm.modules.attention")
    chosen, met = attention.attention_pytorch, []

    @attention.wrap_attn
    def accelerated(q, *args, **kwargs):
        if q.is_meta:
            raise NotImplementedError("no kernel for the meta device")
        met.append(q)
        return chosen(q, *args, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", accelerated)
    patched, handle = apply(make_unet(torch.float32, None), MIXED)
    sample(patched)
    assert met and handle.report.cost is not None


def test_macs_are_counted_while_the_sampler_still_runs_where_somebody_looks(host, sample, make_unet, monkeypatch):
    counted, told = [], []
    report = importlib.import_module("flexi_core.run.report")
    live = importlib.import_module("flexi_core.run.live").LiveRun
    count = report.count_macs
    monkeypatch.setattr(report, "count_macs", lambda *call: counted.append(call) or count(*call))
    schedule = importlib.import_module("flexi_core").Schedule.parse(MIXED)
    watched = host.adapter.apply_schedule(
        make_unet(torch.float32, None), schedule, live=lambda plan, text: live(told.append, plan)
    )
    sample(watched[0])
    assert counted and "fewer MACs than all steps full" in told[-1]["details"]
    met = len(counted)
    assert "MAC" in str(watched[1].report) and len(counted) == met


@pytest.mark.matrix("Patches and weights", "LoRA on fp8 weights")
def test_lora_on_fp8_weights_keeps_the_laws(host, sample, cell, twice, with_lora, make_unet):
    plain = make_unet(torch.float8_e4m3fn, torch.float32)
    model = with_lora(plain)
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sample(plain))
    assert_one_prediction(*twice(model, 2))


@pytest.mark.matrix("Patches and weights", "ModelComputeDtype (bf16)")
def test_compute_type_of_the_node_keeps_the_laws(host, sample, cell, make_unet, extra):
    plain = make_unet(torch.float16, torch.float32)
    model = extra("model_advanced", "ModelComputeDtype")(plain, "bf16")[0]
    cell(model, sample, MIXED)
    assert not torch.equal(sample(model), sample(plain))


@pytest.mark.matrix("Patches and weights", "partly offloaded weights (low VRAM), with a LoRA")
def test_partly_offloaded_weights_keep_the_laws(host, sample, cell, twice, with_lora, make_unet):
    # The host has no two devices here; what it does to a model that it offloads is done by its own function all the same:
    # weights cast at every call and, for those, patches computed at every call.
    callbacks = importlib.import_module("comfy.patcher_extension").CallbacksMP
    plain = make_unet()
    model = with_lora(plain)
    loaded = sample(model)
    freed = []

    def offload(patcher):
        freed.append(patcher.partially_unload(patcher.offload_device, patcher.model_size() * 0.6))

    model.add_callback(callbacks.ON_PRE_RUN, offload)
    torch.testing.assert_close(sample(model), loaded, rtol=0, atol=1e-4)
    assert 0 < freed[-1] < model.model_size()
    assert model.model.model_lowvram
    cell(model, sample, MIXED)
    for depth in (1, 4):
        assert_one_prediction(*twice(model, depth))


LEVELS = (
    "OUTER_SAMPLE",
    "PREPARE_SAMPLING",
    "SAMPLER_SAMPLE",
    "PREDICT_NOISE",
    "CALC_COND_BATCH",
    "APPLY_MODEL",
    "DIFFUSION_MODEL",
)


def with_wrappers(model, calls, key):
    """Return the model with a wrapper at every level that counts its calls; the innermost one changes the context."""
    kinds = importlib.import_module("comfy.patcher_extension").WrappersMP
    wrapped = model.clone()
    for level in (level for level in LEVELS if hasattr(kinds, level)):

        def count(executor, *args, level=level, **kwargs):
            calls.setdefault(level, 0)
            calls[level] += 1
            if level == "DIFFUSION_MODEL":
                x, t, context, *rest = args
                args = x, t, context * 1.5, *rest
            return executor(*args, **kwargs)

        wrapped.add_wrapper_with_key(getattr(kinds, level), key, count)
    return wrapped


@pytest.mark.matrix("Patches and weights", "another pack's wrappers at every level, {place} the schedule in the graph")
@pytest.mark.parametrize("place", ["before", "after"])
def test_wrappers_of_another_pack_are_called_and_heard_on_every_step(unet, sample, apply, cell, twice, place, record_property):
    text, calls = "2*(F)|FPP@2|FPX@2", {}
    if place == "before":
        model = with_wrappers(unet, calls, "other")
        cell(model, sample, text)
        for depth in (1, 3):
            assert_one_prediction(*twice(model, depth))
        calls.clear()
        patched, handle = apply(model, text)
        latent = sample(patched)
    else:
        plain = sample(with_wrappers(unet, {}, "other"))
        assert torch.equal(sample(with_wrappers(apply(unet, "8*(F)")[0], {}, "other")), plain)
        patched, handle = apply(unet, text)
        latent = sample(with_wrappers(patched, calls, "other"))
    assert handle.report.letters == "FFFPPFPX"
    # A step that is not computed asks neither the guidance nor the network.
    assert calls.pop("PREDICT_NOISE", 7) in (7, 8)
    once = {"OUTER_SAMPLE": 1, "PREPARE_SAMPLING": 1, "SAMPLER_SAMPLE": 1}
    assert calls == once | {"CALC_COND_BATCH": 7, "APPLY_MODEL": 7, "DIFFUSION_MODEL": 7}
    before, after = apply(with_wrappers(unet, {}, "other"), text)[0], with_wrappers(apply(unet, text)[0], {}, "other")
    assert torch.equal(sample(before if place == "after" else after), latent), "the order of the two changes the latent"
    assert not torch.equal(latent, sample(apply(unet, text)[0]))
    record_property("does", "called on every full and partial step; the order in the graph does not matter")


def with_step_cache(extra, name, model):
    return extra("easycache", f"{name}Node")(model, 2.0, 0.1, 0.95, False)[0]


@pytest.mark.matrix("Patches and weights", "{name}, {place} the schedule in the graph")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", ["LazyCache", "EasyCache"])
def test_schedule_stands_down_beside_another_step_cache(unet, sample, apply, record_property, extra, name, place):
    cached = sample(with_step_cache(extra, name, unet), cfg=1.0)
    assert not torch.equal(cached, sample(unet, cfg=1.0)), "the other cache skips nothing here"
    if place == "before":
        model, handle = apply(with_step_cache(extra, name, unet), MIXED)
    else:
        patched, handle = apply(unet, MIXED)
        model = with_step_cache(extra, name, patched)
    assert torch.equal(sample(model, cfg=1.0), cached)
    assert handle.report.letters == ""
    assert f"The schedule stood down: {name} skips steps of this model too" in str(handle.report)
    record_property("does", "stands down and says so: the other cache runs alone")


@pytest.mark.matrix("Patches and weights", "two FlexiApply nodes in a row")
def test_later_of_two_schedules_wins_and_says_so(unet, sample, apply, record_property):
    earlier, first = apply(unet, "8*(F)")
    both, second = apply(earlier, MIXED)
    alone, third = apply(unet, MIXED)
    assert torch.equal(sample(both), sample(alone))
    assert first.report is None
    assert second.report.letters == "FFFPXFPN"
    sentence = "takes the place of an earlier one"
    assert sentence in str(second.report)
    assert sentence not in str(third.report)
    record_property("does", "the later schedule is used, and the report says so")


@pytest.fixture(scope="module")
def compiled(extra):
    """A function of (model, backend) that returns the model as the host's node compiles it."""
    node = extra("torch_compile", "TorchCompileModel")

    def compile_with(model, backend):
        torch.compiler.reset()
        return node(model, backend)[0]

    yield compile_with
    torch.compiler.reset()


@pytest.mark.matrix("Patches and weights", "TorchCompileModel ({backend})")
@pytest.mark.parametrize("backend", ["eager"])
def test_compiled_model_keeps_the_laws(unet, sample, cell, twice, compiled, backend):
    model = compiled(unet, backend)
    cell(model, sample, "2*(F)|FPX@2|FPN@2")
    assert_one_prediction(*twice(model, 2))


def test_compiled_model_has_one_graph_for_each_kind_of_pass(unet, sample, apply, compiled):
    from torch._dynamo.utils import counters

    model = compiled(unet, "eager")
    counters.clear()
    graphs = []
    for text in ("2*(F)|FPPPPP@2", "3*(F)|FPP@2|FP@2"):
        patched, handle = apply(model, text)
        sample(patched)
        assert "P" in handle.report.letters
        graphs.append(counters["stats"]["unique_graphs"])
    # Full, full with a feature to keep, partial; the bookkeeping of a run is in none of them.
    assert graphs == [3, 3]


@pytest.fixture(scope="module")
def tiny_flux(host):
    """A small Flux with random weights, and how to sample it."""
    supported = importlib.import_module("comfy.supported_models")
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    params = importlib.import_module("comfy.ldm.flux.model").FluxParams.__annotations__
    newer = {name: value for name, value in {"txt_ids_dims": []}.items() if name in params}
    inner = supported.Flux(FLUX | newer | {"dtype": torch.float32}).get_model({}, device=cpu).eval().requires_grad_(False)
    for value in (*inner.diffusion_model.parameters(), *inner.diffusion_model.buffers()):
        value.copy_(torch.randn(value.shape, generator=rng) * 0.05)
    flux = host.comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)
    prompts = [[[torch.randn(1, 4, 32, generator=rng), {"pooled_output": torch.randn(1, 32, generator=rng)}]] for _ in range(2)]
    start = torch.randn(1, 16, 8, 8, generator=rng)
    return flux, lambda model: host.sample(model, noise=start, positive=prompts[0], negative=prompts[1])


@pytest.mark.matrix("Patches and weights", "TorchCompileModel (eager) of a transformer")
@pytest.mark.parametrize("plain_first", [True, False])
def test_compiled_transformer_keeps_the_laws(cell, apply, compiled, tiny_flux, plain_first):
    """Newer hosts keep the graph of a network's first call, whatever hooks the next one has."""
    from torch._dynamo.utils import counters

    flux, sample = tiny_flux
    model, text = compiled(flux, "eager"), "2*(FPP@3)|FP"
    counters.clear()
    if plain_first:
        sample(model)
    patched, handle = apply(model, text)
    latent = sample(patched)
    assert handle.report.letters == "FPPFPPFP"
    graphs = []
    for _ in range(3):
        sample(patched)
        sample(model)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[1], "compiled anew in a later run"
    cell(model, sample, text)
    torch.testing.assert_close(sample(model), sample(flux), rtol=0, atol=1e-4)
    torch.testing.assert_close(latent, sample(apply(flux, text)[0]), rtol=0, atol=1e-4)
