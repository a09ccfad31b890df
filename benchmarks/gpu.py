"""The check on a GPU: laws that a CPU cannot show, times against MACs, memory, and a compiled network, in one command.

    python benchmarks/gpu.py --comfyui ~/comfy/ComfyUI               # on a machine with a GPU; writes docs/results/gpu.md
    python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu.md   # does every part run?

It needs ComfyUI's own requirements, no network and no weights: the networks have random ones. The parts run in the order of
their worth and end when the minutes are up; what is left out is named on the page, and the page is written anew with every row.
"""

from __future__ import annotations

import gc
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from overhead import CHECKOUT, DTYPES, NETWORKS, device_name
from rich.console import Console

from flexi_core import FlexiError, Schedule
from flexi_core.files import replace_file
from flexi_core.run.cost import predicted_speedup

PAGE = Path(__file__).parents[1] / "docs" / "results" / "gpu.md"
CAPTION = "a large red circle at the center on a navy background"
# Ten steps of every kind. The samplers: one of core's plainest, one with a memory, and those that draw noise on the GPU.
MIXED, GUIDED = "F|FPPX@3|FPXN@3|F", "F|FPPX@3|FpX@3|fF"
SAMPLERS = {
    "euler": MIXED,
    "dpmpp_2m": MIXED,
    "euler_ancestral": MIXED,
    "dpmpp_2m_sde_gpu": MIXED,
    "dpmpp_sde_gpu": MIXED,
    "euler, guidance reused": GUIDED,
}
SCHEDULES = ("10*(FX)", "4*(FPPNN@3)", "5*(FPPP@1)", "2*(F)|6*(FPX@2)", "2*(F)|3*(FPPXXX@3)")  # 20 steps each
CACHED = "4*(FPPNN@3)"
CAPTURED = MIXED
COMPILED = "4*(FPPNN@2)"
COMPILE_S = 90  # after which a compiler is not waited for
TEN = 10  # steps of a run that is timed for one step's sake
_MIB = 2**20
_err = Console(stderr=True)

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
}
_TINY_UNET = {"channel_mult": (1, 2), "num_res_blocks": [1, 1], "context_dim": 32, "transformer_depth_middle": 1}
_TINY_SD15 = {"model_channels": 32, "transformer_depth": [1] * 2, "transformer_depth_output": [1] * 4}
_TINY_SDXL = {"model_channels": 64, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
_FLUX = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True}
_FLUX |= {"guidance_embed": True, "txt_ids_dims": []}


@dataclass(frozen=True)
class Network:
    """A network of the host, of real size and tiny.

    Args:
        title: what the page calls it.
        kind: class in the host's supported models.
        layout: what the host's detection would find in a weights file.
        tiny: what of the layout is another for a try.
        latent: of one picture or video, real and tiny; of several streams, one shape for each.
        text: tokens of a prompt and their width, real and tiny.
        pooled: width of the pooled text.
        batch: pictures at once.
        cfg: guidance scale; 1 runs the conditional half alone.
        scheduler: of the host.
    """

    title: str
    kind: str
    layout: dict[str, Any]
    tiny: dict[str, Any]
    latent: tuple[Any, Any]
    text: tuple[tuple[int, int], tuple[int, int]]
    pooled: int = 0
    batch: int = 2
    cfg: float = 5.0
    scheduler: str = "normal"


SUBJECTS = {
    "sd15": Network(
        "SD1.5, 64x64 latents",
        NETWORKS["sd15"][0],
        {**_UNET, **NETWORKS["sd15"][1]},
        {**_TINY_UNET, **_TINY_SD15},
        ((4, 64, 64), (4, 8, 8)),
        ((77, 768), (8, 32)),
    ),
    "sdxl": Network(
        "SDXL, 128x128 latents",
        NETWORKS["sdxl"][0],
        {**_UNET, **NETWORKS["sdxl"][1]},
        {**_TINY_UNET, **_TINY_SDXL},
        ((4, 128, 128), (4, 8, 8)),
        ((77, 2048), (8, 32)),
        1280,
    ),
    "flux": Network(
        "A Flux of 4 double and 8 single blocks, 1024x1024 pixels",
        "Flux",
        {**_FLUX, "hidden_size": 3072, "num_heads": 24, "depth": 4, "depth_single_blocks": 8, "axes_dim": [16, 56, 56]}
        | {"vec_in_dim": 768, "context_in_dim": 4096},
        {
            "hidden_size": 64,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 3,
            "axes_dim": [8, 12, 12],
            "context_in_dim": 32,
        },
        ((16, 128, 128), (16, 8, 8)),
        ((512, 4096), (4, 32)),
        768,
        cfg=1.0,
        scheduler="simple",
    ),
    "wan": Network(
        "A Wan 2.1 of 10 blocks, 33 frames of 832x480 pixels",
        "WAN21_T2V",
        {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096, "num_heads": 12}
        | {"num_layers": 10},
        {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 32, "num_heads": 2, "num_layers": 4},
        ((16, 9, 60, 104), (16, 2, 8, 8)),
        ((512, 4096), (4, 32)),
        batch=1,
        scheduler="simple",
    ),
    "captured": Network(
        "LTX-2 of 6 blocks, pictures and sound",
        "LTXAV",
        {"num_layers": 6, "attention_head_dim": 128, "num_attention_heads": 16, "cross_attention_dim": 2048}
        | {"audio_attention_head_dim": 64, "audio_num_attention_heads": 16, "audio_cross_attention_dim": 1024}
        | {"caption_channels": 1024, "connector_attention_head_dim": 64, "connector_num_attention_heads": 8},
        {"attention_head_dim": 32, "num_attention_heads": 2, "cross_attention_dim": 64, "audio_attention_head_dim": 16}
        | {"audio_num_attention_heads": 2, "audio_cross_attention_dim": 32, "caption_channels": 32}
        | {"connector_attention_head_dim": 16, "connector_num_attention_heads": 2},
        (((128, 4, 16, 24), (8, 26, 16)), ((128, 2, 4, 4), (8, 6, 16))),
        ((64, 2048), (4, 64)),
        batch=1,
        cfg=3.0,
        scheduler="simple",
    ),
    "compiled": Network(
        "A U-Net with the first two levels of SD1.5, 64x64 latents",
        NETWORKS["sd15"][0],
        {**_UNET, **NETWORKS["sd15"][1], "channel_mult": (1, 2), "num_res_blocks": [1, 1]}
        | {"transformer_depth": [1] * 2, "transformer_depth_output": [1] * 4},
        {"model_channels": 32, "context_dim": 32},
        ((4, 64, 64), (4, 8, 8)),
        ((77, 768), (8, 32)),
    ),
}


def main(
    comfyui: Annotated[Path, typer.Option(help="A ComfyUI checkout.", envvar="COMFYUI_PATH")] = CHECKOUT,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    minutes: Annotated[float, typer.Option(min=0, help="At most so long, from the start of the process.")] = 8,
    only: Annotated[str, typer.Option(help="Parts by name, with commas between; all of them without it.")] = "",
    tiny: Annotated[bool, typer.Option(help="Networks and runs as small as can be: to try the check itself.")] = False,
    out: Annotated[Path | None, typer.Option(help="The page; docs/results/gpu.md without it.")] = None,
) -> None:
    """Check, measure and write the page."""
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise FlexiError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if dtype not in DTYPES or device not in ("cuda", "cpu"):
        raise FlexiError(f"dtypes: {', '.join(DTYPES)}; devices: cuda, cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise FlexiError("torch finds no GPU here")
    if out is None and (device == "cpu" or tiny):
        raise FlexiError("the page of the GPU check is not for a try: give another with --out")
    if not (comfyui / "comfy" / "samplers.py").is_file():
        raise FlexiError(f"{comfyui} is no ComfyUI checkout; give one with --comfyui")
    clock, page = Clock(minutes), Page(out or PAGE, _head(comfyui, device, dtype, tiny, minutes, only))
    check: Check | None = None
    with torch.inference_mode():  # as the host runs everything
        for part in (PARTS[name] for name in names):
            _err.print(f"{part.title}: {clock.left:.0f} s left")
            page.part(part.title)
            began = time.perf_counter()
            try:
                clock.require(0 if tiny else part.seconds)
                with clock.limit(part.limit):
                    check = check or Check(comfyui, device, DTYPES[dtype], tiny, clock, page)
                    part.run(check)
            except OutOfTime as reason:
                page.say(f"{'Cut off' if page.has_rows else 'Left out'}: {reason}.")
            except Exception as error:  # the other parts are worth their time
                _err.print_exception()
                page.fail(f"**Failed**: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            if check:
                check.drop()
            _err.print(f"{part.title}: took {time.perf_counter() - began:.1f} s")
    page.end(f"The check took {clock.past / 60:.1f} minutes of {minutes:g}.")
    print(page.path.read_text(encoding="utf-8"))
    sys.stdout.flush()
    if page.failures:
        raise FlexiError(f"{page.failures} of what was checked did not hold or failed; see {page.path}")


class OutOfTime(BaseException):
    """Ends a part. No Exception: a compiler that catches those shall not take it for one of its own."""


class Clock:
    """The time that the check has, from the start of its process."""

    def __init__(self, minutes: float) -> None:
        self._began = psutil.Process().create_time()
        self._seconds = 60 * minutes

    @property
    def past(self) -> float:
        return time.time() - self._began

    @property
    def left(self) -> float:
        return self._seconds - self.past

    def require(self, seconds: float) -> None:
        """End the part where it is when less is left."""
        if self.left <= 0:
            raise OutOfTime("the time was over")
        if self.left < seconds:
            raise OutOfTime(f"it takes about {seconds:.0f} s and {self.left:.0f} s were left")

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the part in the block when so many seconds, or all of them, are over."""
        seconds = max(min(seconds, self.left), 0.001)

        def end(*_: Any) -> None:
            raise OutOfTime(f"after {seconds:.0f} s its time was over")

        earlier = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds, 2.0)  # again, where a first one fell into a callback that swallowed it
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)


class Page:
    """The page as far as it is known; whole and valid on the disk after every row."""

    def __init__(self, path: Path, head: Sequence[str]) -> None:
        self.path, self.failures, self.held = path, 0, 0
        self._head, self._lines, self._end = list(head), [], ["The check has not come to its end."]
        self.has_rows = False  # in the last part
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def part(self, title: str) -> None:
        self._lines += ["", f"## {title}"]
        self.has_rows = False
        self._write()

    def table(self, *columns: str) -> None:
        self._lines += ["", f"| {' | '.join(columns)} |", "|-" * len(columns) + "|"]

    def row(self, *cells: str) -> None:
        _err.print(*cells, sep=" | ", markup=False, highlight=False)
        self._lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        self.has_rows = True
        self._write()

    def say(self, text: str) -> None:
        _err.print(text, markup=False, highlight=False)
        self._lines += ["", text]
        self._write()

    def fail(self, text: str) -> None:
        self.failures += 1
        self.say(text)

    def law(self, holds: bool, otherwise: str) -> str:
        """Return a law's cell, and count it."""
        self.held, self.failures = self.held + holds, self.failures + (not holds)
        return "yes" if holds else f"**no**: {otherwise}"

    def end(self, text: str) -> None:
        self._end = [text]
        self._write()

    def _write(self) -> None:
        verdict = f"{self.held} laws held; {self.failures} did not, or the part failed."
        with replace_file(self.path) as temporary:
            text = "\n".join([*self._head, "", " ".join([verdict, *self._end]), *self._lines])
            temporary.write_text(text + "\n", encoding="utf-8")


class Subject:
    """A network of the host with random weights, and how to sample it."""

    def __init__(self, check: Check, network: Network) -> None:
        self._check, self._network = check, network
        layout = {**network.layout, **(network.tiny if check.tiny else {})}
        latent, (tokens, width) = network.latent[check.tiny], network.text[check.tiny]
        inner = _build(getattr(check.comfy.supported_models, network.kind), layout, check.dtype, check.device).eval()
        _fill(inner.diffusion_model, check.device)
        self.model = check.comfy.model_patcher.ModelPatcher(inner, load_device=check.device, offload_device=torch.device("cpu"))
        rng = torch.Generator().manual_seed(1)
        pooled = {"pooled_output": torch.randn(1, network.pooled, generator=rng)} if network.pooled else {}
        self._prompts = [[[torch.randn(1, tokens, width, generator=rng), pooled]] for _ in range(2)]
        self._noise = self._drawn(latent, rng)
        guided = "guided, cfg " + f"{network.cfg:g}" if network.cfg != 1 else "not guided"
        self.about = f"Batch {network.batch}, {guided}, {sum(p.numel() for p in inner.parameters()) / 1e6:.0f} M weights."

    def _drawn(self, latent: tuple, rng: torch.Generator) -> Any:
        """Return noise of a shape, or the host's NestedTensor of several."""
        if isinstance(latent[0], int):
            return torch.randn(self._network.batch, *latent, generator=rng)
        from comfy.nested_tensor import NestedTensor

        return NestedTensor([torch.randn(self._network.batch, *stream, generator=rng) for stream in latent])

    def apply(self, text: str, model: Any = None, cache: str = "auto") -> tuple[Any, Any]:
        """Return the model under a schedule, and the handle of its reports."""
        return self._check.adapter.apply_schedule(model or self.model, Schedule.parse(text), cache=cache)

    def sample(self, model: Any, steps: int, sampler: str = "euler") -> torch.Tensor:
        latent = self._check.comfy.sample.sample(
            model, self._noise, steps, self._network.cfg, sampler, self._network.scheduler, *self._prompts,
            self._noise * 0.0, disable_pbar=True, seed=0,
        )  # fmt: skip
        return self._check.adapter.packed(latent)

    def seconds(self, model: Any, steps: int) -> float:
        """Return the seconds of a whole run, the device's work included."""
        self._check.wait()
        began = time.perf_counter()
        self.sample(model, steps)
        self._check.wait()
        return time.perf_counter() - began


class Check:
    """The host, and the parts of the page.

    Args:
        comfyui: the host's checkout.
        device: cuda or cpu.
        dtype: of the weights.
        tiny: networks and runs as small as can be.
        clock: the time that is left.
        page: where the rows go.
    """

    def __init__(self, comfyui: Path, device: str, dtype: torch.dtype, tiny: bool, clock: Clock, page: Page) -> None:
        sys.path.insert(0, str(comfyui.resolve()))
        from comfy.cli_args import args

        args.cpu, args.use_pytorch_cross_attention = device == "cpu", True  # read when the host is imported
        import comfy.model_management
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models

        from flexi_core import host

        self.comfy, self.adapter = comfy, host
        self.device, self.dtype, self.tiny = comfy.model_management.get_torch_device(), dtype, tiny
        self._clock, self._page = clock, page
        self._subjects: dict[str, Subject] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, count: int) -> range:
        """Return how often something is timed."""
        return range(1 if self.tiny else count)

    def drop(self) -> None:
        """Forget the networks."""
        self._subjects.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _subject(self, name: str) -> Subject:
        if name not in self._subjects:
            self._subjects[name] = Subject(self, SUBJECTS[name])
        return self._subjects[name]

    def laws(self) -> None:
        """Bit for bit, on SD1.5."""
        page, subject = self._page, self._subject("sd15")
        page.say(
            f"{SUBJECTS['sd15'].title}. {subject.about} Runs of {TEN} steps; the mixed ones have full, partial, extrapolated "
            "and removed steps. Latents are compared bit for bit."
        )
        page.table("sampler", "no node, twice", "all full and no node", "mixed, twice", "steps of the mixed run")
        for title, text in SAMPLERS.items():
            sampler = title.split(",")[0]
            plain = subject.sample(subject.model, TEN, sampler)
            page.row(
                title, self._same(subject.sample(subject.model, TEN, sampler), plain), *self._laws_of(plain, text, sampler)
            )
        page.table("where", "all full and no node", "mixed, twice", "steps of the mixed run")
        on_device, _ = subject.apply(MIXED, cache="gpu")
        in_ram, handle = subject.apply(MIXED, cache="ram")
        latents = subject.sample(on_device, TEN), subject.sample(in_ram, TEN)
        page.row("features in RAM, and on the device", "", self._same(*latents), handle.report.letters)
        with self._little_memory():
            plain = subject.sample(subject.model, TEN)
            loaded, size = subject.model.loaded_size() / _MIB, subject.model.model_size() / _MIB
            page.row(f"weights in RAM but {loaded:.0f} of {size:.0f} MiB", *self._laws_of(plain, MIXED, "euler"))

    def _laws_of(self, plain: torch.Tensor, text: str, sampler: str) -> tuple[str, str, str]:
        subject = self._subject("sd15")
        full, _ = subject.apply(f"{TEN}*(F)")
        all_full = self._same(subject.sample(full, TEN, sampler), plain)
        mixed, handle = subject.apply(text)
        first = subject.sample(mixed, TEN, sampler)
        letters, planned = handle.report.letters, Schedule.parse(text).letters
        ran = letters if letters == planned else self._page.law(False, f"{letters} instead of {planned}")
        return all_full, self._same(subject.sample(mixed, TEN, sampler), first), ran

    def _same(self, latent: torch.Tensor, other: torch.Tensor) -> str:
        """Return the cell of a law that two latents are the same, bit for bit, and numbers at all."""
        if not (latent.isfinite().all() and other.isfinite().all()):
            return self._page.law(False, "not finite")
        share = float((latent - other).abs().max() / other.abs().max())
        return self._page.law(torch.equal(latent, other), f"up to {share:.1e} of the largest value")

    @contextmanager
    def _little_memory(self) -> Iterator[None]:
        """Let the host believe that the device has no memory for weights, as its --reserve-vram does."""
        management = self.comfy.model_management
        kept = management.EXTRA_RESERVED_VRAM
        management.unload_all_models()
        management.EXTRA_RESERVED_VRAM = management.get_free_memory(self.device)
        try:
            yield
        finally:
            management.EXTRA_RESERVED_VRAM = kept
            management.unload_all_models()

    def network(self, name: str) -> None:
        """Times of a step of every kind and of whole schedules."""
        page, subject = self._page, self._subject(name)
        page.say(f"{subject.about} Times with the host's work around them; medians.")
        full, handle = subject.apply(f"{TEN}*(F)")
        for model in (subject.model, full):  # kernels are chosen and loaded at their first run
            subject.seconds(model, TEN)
        self._overhead(subject, full)
        cost = handle.report.cost
        self._null_step(subject)
        self._partial_steps(subject, cost)
        self._schedules(subject, cost)
        self._places(subject)

    def _overhead(self, subject: Subject, full: Any) -> None:
        models = {"no node": subject.model, "node, all full": full}
        times: dict[str, list[float]] = {name: [] for name in models}
        for i in self.times(5):
            for name in list(models) if i % 2 else list(models)[::-1]:
                times[name].append(subject.seconds(models[name], TEN))
        without, with_node = times.values()
        more = [b / a - 1 for a, b in zip(without, with_node, strict=True)]
        self._full = statistics.median(without) / TEN
        self._page.table("", "a full step, ms", "more", "least to most")
        self._page.row("no node", f"{1000 * self._full:.2f}", "", "")
        spread = f"{min(more):+.1%} to {max(more):+.1%} of {len(more)} pairs of runs of {TEN} steps"
        self._page.row(
            "node, all full", f"{1000 * statistics.median(with_node) / TEN:.2f}", f"{statistics.median(more):+.1%}", spread
        )

    def _null_step(self, subject: Subject) -> None:
        count = 20
        (short, _), (long, _) = subject.apply("F|F"), subject.apply("F|F" + "X" * count)
        times = [(subject.seconds(long, 2 + count) - subject.seconds(short, 2)) / count for _ in self.times(3)]
        step = statistics.median(times)
        self._page.row("node, an extrapolated step", f"{1000 * step:.2f}", f"{step / self._full:.1%} of a full one", "")

    def _partial_steps(self, subject: Subject, cost: Any) -> None:
        page = self._page
        if cost is None:
            page.say("The MACs of this network could not be counted.")
            return
        page.table("depth", "share of MACs", "share of time", "a partial step, ms", "cache, MiB")
        for depth in cost.partial_macs:
            self._clock.require(2 * TEN * self._full)
            model, handle = subject.apply(f"F|FPPPP@{depth}|FPPP@{depth}")
            subject.sample(model, TEN)
            report = handle.report
            full = statistics.median(step.seconds for step in report.steps[1:] if step.ran.value == "F")
            partial = [step.seconds for step in report.steps if step.ran.value == "P"]
            if len(partial) != 7:
                page.row(str(depth), f"{cost.share(depth):.1%}", f"ran {report.letters}", "", "")
                continue
            ms = statistics.median(partial)
            page.row(str(depth), f"{cost.share(depth):.1%}", f"{ms / full:.1%}", f"{1000 * ms:.2f}", f"{report.cache_mib:.1f}")

    def _schedules(self, subject: Subject, cost: Any) -> None:
        page = self._page
        page.table("schedule", "predicted by MACs", "measured against no node", "least to most", "measured / predicted")
        before = subject.seconds(subject.model, 2 * TEN)
        for text in SCHEDULES[:2] if self.tiny else SCHEDULES:
            schedule = Schedule.parse(text)
            self._clock.require(3 * len(schedule) * self._full)
            model, _ = subject.apply(text)
            fast = [subject.seconds(model, len(schedule)) for _ in self.times(2)]
            after = subject.seconds(subject.model, len(schedule))
            ratios = [(before + after) / 2 / seconds for seconds in fast]
            before = after
            measured = statistics.median(ratios)
            predicted = math.nan if cost is None else predicted_speedup(schedule, cost)
            spread = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
            page.row(f"`{text}`", f"{predicted:.2f}x", f"{measured:.2f}x", spread, f"{measured / predicted:.3f}")

    def _places(self, subject: Subject) -> None:
        """The cache on the device and in RAM."""
        page, steps = self._page, len(Schedule.parse(CACHED))
        page.table(f"cache of `{CACHED}`", "s for a run", "cache, MiB", "most allocated on the device, MiB")
        runs = {"no node": (subject.model, None)}
        runs |= {name: subject.apply(CACHED, cache=place) for name, place in (("on the device", "gpu"), ("in RAM", "ram"))}
        for name, (model, handle) in runs.items():
            self._clock.require(3 * steps * self._full)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds = statistics.median(subject.seconds(model, steps) for _ in self.times(2))
            most = f"{torch.cuda.max_memory_allocated(self.device) / _MIB:.0f}" if self.device.type == "cuda" else ""
            page.row(name, f"{seconds:.3f}", "" if handle is None else f"{handle.report.cache_mib:.1f}", most)

    def growth(self) -> None:
        """What many runs leave behind."""
        page, model = self._page, self.adapter.load_demo_model()
        prompts = self.adapter.demo_conditioning(CAPTION), self.adapter.demo_conditioning("")
        noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        patched, _ = self.adapter.apply_schedule(model, Schedule.parse(MIXED))
        page.say(f"The embedded model, batch 2, guided, `{MIXED}`. Counted after a collection of garbage.")
        page.table("runs", "allocated on the device, bytes", "more than at first", "the process's memory, MiB")
        counts, done, first = (1, 2, 4, 8) if self.tiny else (10, 50, 100, 200), 0, None
        for count in counts:
            while done < count:
                self.comfy.sample.sample(
                    patched, noise, TEN, 3.0, "euler", "normal", *prompts, torch.zeros_like(noise), disable_pbar=True, seed=done
                )
                done += 1
            self.wait()
            gc.collect()
            held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
            first = held if first is None else first
            more = "" if held is None else f"{held - first:+d}"
            page.row(str(count), "" if held is None else str(held), more, f"{psutil.Process().memory_info().rss / _MIB:.0f}")

    def captured(self) -> None:
        """Bit for bit, on a network that newer hosts run in a captured memory graph: what a run keeps is made outside it."""
        page = self._page
        if not hasattr(self.comfy.supported_models, SUBJECTS["captured"].kind):
            page.say(f"Not checked: this host has no {SUBJECTS['captured'].kind}.")
            return
        subject = self._subject("captured")
        paused = hasattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph")
        graph = "runs it in a memory graph" if paused else "has no memory graph: nothing of that is shown here"
        page.say(f"{subject.about} This host {graph}.")
        page.table("", "same", "steps")
        plain = subject.sample(subject.model, TEN)
        page.row("no node, twice", self._same(subject.sample(subject.model, TEN), plain), "")
        mixed, handle = subject.apply(CAPTURED)
        first = subject.sample(mixed, TEN)
        page.row("mixed, twice", self._same(subject.sample(mixed, TEN), first), handle.report.letters)
        in_ram, handle = subject.apply(CAPTURED, cache="ram")
        page.row("features in RAM, and on the device", self._same(subject.sample(in_ram, TEN), first), handle.report.letters)
        page.row("no node, before and after", self._same(subject.sample(subject.model, TEN), plain), "")

    def compiled(self) -> None:
        """What torch.compile and the node are to each other."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        page, subject = self._page, self._subject("compiled")
        backend = "inductor" if self.device.type == "cuda" else "eager"
        compiled = subject.model.clone()
        set_torch_compile_wrapper(model=compiled, backend=backend)
        page.say(f"{SUBJECTS['compiled'].title}. {subject.about} Compiled with {backend} by the host's own TorchCompileModel.")
        page.table("", "first run, s", "20 steps, s", "from the same run without compiling, at most")
        steps, texts = (
            len(Schedule.parse(COMPILED)),
            {"no node": "", f"node, `{COMPILED}`": COMPILED, "node, all full": "20*(F)"},
        )
        for name, text in texts.items():
            latents = []
            for kind, base in (("eager", subject.model), ("compiled", compiled)):
                model = subject.apply(text, base)[0] if text else base
                began = time.perf_counter()
                latents.append(subject.sample(model, steps))
                self.wait()
                first = time.perf_counter() - began
                seconds = statistics.median(subject.seconds(model, steps) for _ in self.times(3))
                share = float((latents[-1] - latents[0]).abs().max() / latents[0].abs().max())
                far = "" if len(latents) == 1 else f"{share:.1e} of the largest value"
                page.row(f"{name}, {kind}", f"{first:.1f}", f"{seconds:.3f}", far)


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Args:
        title: its heading.
        run: writes its rows.
        seconds: that it takes on a GPU; with less left it is left out.
        limit: seconds after which it is cut off.
    """

    title: str
    run: Callable[[Check], None]
    seconds: float
    limit: float = field(default=math.inf)


PARTS = {
    "laws": Part("Laws", Check.laws, 20),
    "sd15": Part(SUBJECTS["sd15"].title, lambda check: check.network("sd15"), 10),
    "sdxl": Part(SUBJECTS["sdxl"].title, lambda check: check.network("sdxl"), 20),
    "flux": Part(SUBJECTS["flux"].title, lambda check: check.network("flux"), 20),
    "growth": Part("Memory after many runs", Check.growth, 15),
    "wan": Part(SUBJECTS["wan"].title, lambda check: check.network("wan"), 20),
    "captured": Part(SUBJECTS["captured"].title, Check.captured, 20),
    "compiled": Part("A compiled network", Check.compiled, 30, COMPILE_S),
}


def _build(config: Any, layout: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return the host's model, without those switches that are off and that an older host does not have."""
    settings = config({**layout, "dtype": dtype})
    settings.set_inference_dtype(dtype, None)
    try:
        return settings.get_model({}, device=device)
    except TypeError as error:
        unknown = next((name for name, value in layout.items() if not value and f"'{name}'" in str(error)), None)
        if unknown is None:
            raise
        return _build(config, {name: value for name, value in layout.items() if name != unknown}, dtype, device)


def _fill(network: torch.nn.Module, device: torch.device) -> None:
    """Give a network random weights, scaled to keep what goes through."""
    rng = torch.Generator(device).manual_seed(0)
    for name, value in network.named_parameters():
        value.requires_grad_(False)
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=rng)
        else:
            value.normal_(0, 0.1, generator=rng).add_(name.endswith(("weight", "scale", "gamma")))  # those of norms are near 1


def _head(comfyui: Path, device: str, dtype: str, tiny: bool, minutes: float, only: str) -> list[str]:
    version = comfyui / "comfyui_version.py"
    stated = re.search(r'__version__ = "(.+)"', version.read_text(encoding="utf-8")) if version.is_file() else None
    used = [f"--minutes {minutes:g}", *(["--tiny"] if tiny else []), *([f"--device {device}"] if device != "cuda" else [])]
    used += [f"--only {only}"] if only else []
    cuda = f", CUDA {torch.version.cuda}" if device == "cuda" else ""
    return [
        "# The check on a GPU" if device == "cuda" else "# A try of the GPU check on a CPU: its numbers say nothing",
        "",
        f"Made by `python benchmarks/gpu.py {' '.join(used)}` on {device_name(device)}, torch {torch.__version__}{cuda}, "
        f"ComfyUI {stated[1] if stated else 'of an unknown version'}, {dtype}, networks with random weights.",
    ]


if __name__ == "__main__":
    try:
        typer.run(main)
    except FlexiError as error:
        raise SystemExit(str(error)) from error
