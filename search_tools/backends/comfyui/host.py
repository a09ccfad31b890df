"""ComfyUI inside this process: brought up as its server does it, without a port; computes parts of workflows."""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flexi_core.errors import FlexiError

from .workflow import Graph, upstream

SCHEDULES = "flexi_schedules"
_LONGEST_MESSAGE = 400  # a host's error may list every model file


class ComfyHost:
    """A ComfyUI that was brought up; see `open_host`.

    Args:
        checkout: its folder.
        base: where its models, custom nodes, input and output are.
    """

    def __init__(self, checkout: Path, base: Path) -> None:
        self._heard = _Heard()
        self._received: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        try:
            with self._quietly():
                self._bring_up(checkout, base)
        except ImportError as error:
            raise FlexiError(
                f"ComfyUI in {checkout} cannot be imported ({error}); run flexi with the Python that runs ComfyUI"
            ) from error
        except OSError as error:
            raise FlexiError(f"ComfyUI in {checkout} cannot be brought up: {error}; is {base} writable?") from error
        except (TypeError, AttributeError, KeyError) as error:  # what a changed interface answers with
            raise FlexiError(
                f"ComfyUI {_version(checkout)} in {checkout} cannot be brought up ({type(error).__name__}: {error}): "
                "this version is not known here; please report it, and use another one until then"
            ) from error

    def _bring_up(self, checkout: Path, base: Path) -> None:
        if sys.path[0] != str(checkout):
            sys.path.insert(0, str(checkout))
        from comfy.cli_args import args

        if "comfy.model_management" not in sys.modules and not _has_accelerator():
            # Both are read when comfy.model_management is imported; the host's own attention is slow on a CPU.
            args.cpu = args.use_pytorch_cross_attention = True
        if "folder_paths" not in sys.modules and base != checkout:
            args.base_directory = str(base)
        args.front_end_root = str(checkout)  # no page is served, so none has to be installed
        import folder_paths

        for what, is_, wanted in (
            ("ComfyUI", Path(folder_paths.__file__).parent, checkout),
            ("base directory", Path(folder_paths.base_path), base),
        ):
            if is_.resolve() != wanted:
                raise FlexiError(f"this process runs with the {what} {is_}; give {wanted} to a process of its own")
        _add_model_paths(checkout)
        _run_prestartup_scripts(folder_paths.get_folder_paths("custom_nodes"))
        import comfy.utils
        import execution
        import server

        nodes = importlib.import_module("nodes")  # the host's; a plain import would read as one of this pack's
        comfy.utils.set_progress_bar_enabled(False)
        self._comfy_utils, self._execution, self._nodes, self._paths = comfy.utils, execution, nodes, folder_paths
        # Packs register routes with the server's instance when they are imported.
        self._server = getattr(server.PromptServer, "instance", None) or _made(server.PromptServer, self._loop)
        self._loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        self._executor = _made(execution.PromptExecutor, self._server)

    @property
    def schedule_folder(self) -> Path:
        """Where FlexiLoadSchedule finds schedule files."""
        if SCHEDULES in self._paths.folder_names_and_paths:
            return Path(self._paths.get_folder_paths(SCHEDULES)[0])
        return Path(self._paths.models_dir) / SCHEDULES

    def find_model(self, folder: str, name: str) -> str:
        """Return the path of a model file.

        Raises:
            FlexiError: there is none of this name; it lists those that there are.
        """
        path = self._paths.get_full_path(folder, name)
        if path is None:
            known = ", ".join(self._paths.get_filename_list(folder)) or "none"
            raise FlexiError(f"there is no {name!r} in models/{folder}; there are: {_shortened(known)}")
        return path

    def define(self, kind: str) -> dict[str, Any] | None:
        """Return the definition of a node class, as the server's /object_info gives it; None where there is none."""
        cls = self._nodes.NODE_CLASS_MAPPINGS.get(kind)
        if cls is None:
            return None
        if hasattr(cls, "GET_NODE_INFO_V1"):
            return cls.GET_NODE_INFO_V1()
        inputs = cls.INPUT_TYPES()
        return {"input": inputs, "input_order": {part: list(names) for part, names in inputs.items()}}

    def options(self, kind: str, key: str) -> list:
        """Return what may be chosen for an input of a node class; empty where it is no choice, or is not known."""
        for part in ((self.define(kind) or {}).get("input") or {}).values():
            spec = part.get(key)
            if spec:
                chosen = spec[0] if isinstance(spec[0], list | tuple) else (spec[1:] or [{}])[0].get("options")
                return list(chosen or ())
        return []

    def evaluate(self, graph: Graph, node: str, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return the inputs of a node, computed by the host's own executor from everything upstream of them.

        What was computed for an earlier graph and is the same in this one is not computed again.

        Args:
            graph: API format.
            node: its id.
            only: these inputs; all by default.

        Raises:
            FlexiError: a node is not known, has a bad input, or fails.
        """
        standing = copy.deepcopy(graph)  # validation writes to it
        kind = standing[node]["class_type"]
        inputs = {name: value for name, value in standing[node]["inputs"].items() if only is None or name in only}
        standing[node] = {"class_type": self._capturing(kind, only), "inputs": inputs}
        self._received.clear()
        with self._quietly():
            self._execute(upstream(standing, node), graph, node)
        if not self._received:
            raise FlexiError(f"node {node} ({kind}) got nothing to work on: a node before it blocks its branch")
        received = self._received[0]
        self._received.clear()
        return received

    def call(self, kind: str, inputs: dict[str, Any], on_step: Callable[[int, int], None] | None = None) -> tuple:
        """Return the outputs of a node of the host, run as its server does.

        Args:
            kind: its class.
            inputs: by name.
            on_step: called with the steps done and those in all, where the node counts them.
        """
        cls = self._class(kind)
        function = cls.execute if hasattr(cls, "GET_SCHEMA") else getattr(cls(), cls.FUNCTION)
        earlier = self._comfy_utils.PROGRESS_BAR_HOOK
        if on_step is not None:
            self._comfy_utils.set_progress_bar_global_hook(lambda value, total, *_, **__: on_step(int(value), int(total)))
        try:
            with self._quietly(), torch.inference_mode():
                out = function(**inputs)
        finally:
            self._comfy_utils.set_progress_bar_global_hook(earlier)
        return getattr(out, "result", out)

    def _class(self, kind: str) -> type:
        cls = self._nodes.NODE_CLASS_MAPPINGS.get(kind)
        if cls is None:
            failed = "; ".join(line for line in self._heard.lines if line.startswith("Cannot import"))
            raise FlexiError(
                f"this ComfyUI has no node {kind}; install the pack that it comes from"
                + (f". Not loaded: {_shortened(failed)}" if failed else "")
            )
        return cls

    def _capturing(self, kind: str, only: tuple[str, ...] | None) -> str:
        """Return the name of a node class that takes another's inputs and hands them over."""
        name = f"FlexiCapture {kind} {' '.join(only or ())}".strip()
        # The host's own registry of nodes: packs add theirs to it.
        self._nodes.NODE_CLASS_MAPPINGS.setdefault(name, _capture_class(self._class(kind), only, self._received))
        return name

    def _execute(self, prompt: Graph, graph: Graph, node: str) -> None:
        for each in prompt.values():
            self._class(each["class_type"])
        valid, error, good, node_errors = self._loop.run_until_complete(
            self._execution.validate_prompt("flexi", prompt, [node])
        )
        if not valid or node not in good:
            for name, found in node_errors.items():
                first = found["errors"][0]
                raise FlexiError(
                    f"node {name} ({graph[name]['class_type']}): {first['message']}: {_shortened(first['details'])}"
                )
            raise FlexiError(f"the workflow is not valid: {error['message']}: {_shortened(error['details'])}")
        self._loop.run_until_complete(self._executor.execute_async(prompt, "flexi", {}, [node]))
        if not self._executor.success:
            failed = next((data for event, data in self._executor.status_messages if event == "execution_error"), None)
            if failed is None:
                raise FlexiError("the workflow was interrupted by one of its nodes")
            name = failed["node_id"]
            message = " ".join(failed["exception_message"].split())
            kind = graph.get(name, {}).get("class_type", failed["node_type"])
            raise FlexiError(f"node {name} ({kind}) failed: {_shortened(message) or failed['exception_type']}")

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Keep what the host and its packs say from the results on stdout; errors are told in our own words."""
        root = logging.getLogger()  # the host logs there; our own log is another
        root.addFilter(self._heard)
        try:
            with redirect_stdout(io.StringIO()):
                yield
        finally:
            root.removeFilter(self._heard)


def open_host(checkout: str, base_directory: str | None = None) -> ComfyHost:
    """Return a ComfyUI in this process, the same for every call; a process can have only one.

    Args:
        checkout: its folder; where it is not there, the first of $COMFYUI_PATH.
        base_directory: as the host's own option; the checkout by default.

    Raises:
        FlexiError: there is none, it is too old, its packages are missing, or another one is loaded.
    """
    folder = Path(checkout).expanduser()
    if not folder.is_dir() and os.environ.get("COMFYUI_PATH"):
        folder = Path(os.environ["COMFYUI_PATH"].split(os.pathsep)[0])
    folder = folder.resolve()
    if not (folder / "comfy" / "samplers.py").is_file():
        raise FlexiError(f"{checkout}: no ComfyUI there (it has no comfy/samplers.py); give --comfyui its folder")
    if not (folder / "comfy_api" / "latest").is_dir():
        raise FlexiError(f"{checkout}: this ComfyUI is too old for a search; it needs 0.3.48 or newer")
    base = folder if base_directory is None else Path(base_directory).expanduser().resolve()
    if not base.is_dir():
        raise FlexiError(f"the base directory {base_directory} does not exist")
    return _host(folder, base)


_host = cache(ComfyHost)


class _Heard(logging.Filter):
    """Keeps the warnings of the host and lets none of its records pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.lines = [*self.lines[-99:], record.getMessage()]
        return False


def _capture_class(cls: type, only: tuple[str, ...] | None, received: list[dict[str, Any]]) -> type:
    """Return a node class with the inputs of another that puts what it gets into a list."""

    class Capture:
        RETURN_TYPES = ()
        FUNCTION = "capture"
        OUTPUT_NODE = True
        CATEGORY = "Flexiffusion"

        @classmethod
        def INPUT_TYPES(cls_) -> dict[str, Any]:
            types = cls.INPUT_TYPES()
            return {
                part: {name: kind for name, kind in types.get(part, {}).items() if only is None or name in only}
                for part in ("required", "optional")
            }

        @classmethod
        def IS_CHANGED(cls_, **_: Any) -> float:
            return float("nan")  # equal to nothing: never taken from the executor's cache

        def capture(self, **values: Any) -> tuple:
            received.append(values)
            return ()

    return Capture


def _made(cls: type, first: Any) -> Any:
    """Return an object of a class of the host that is made of more arguments in newer versions.

    Args:
        cls: PromptServer or PromptExecutor.
        first: its first argument, which it has always had.
    """
    wanted = inspect.signature(cls).parameters
    given: dict[str, Any] = {}
    if "cache_args" in wanted:  # read in every run, whatever the cache
        given["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    if "asset_manager" in wanted:
        given["asset_manager"] = importlib.import_module("app.assets.manager").default_asset_manager()
    return cls(first, **given)


def _version(checkout: Path) -> str:
    """Return the version that a checkout states, for messages."""
    file = checkout / "comfyui_version.py"
    stated = re.search(r'__version__ = "(.+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return stated[1] if stated else "of an unknown version"


def _has_accelerator() -> bool:
    xpu = getattr(torch, "xpu", None)  # of newer versions
    return torch.cuda.is_available() or torch.backends.mps.is_available() or (xpu is not None and xpu.is_available())


def _add_model_paths(checkout: Path) -> None:
    """Add the folders of `extra_model_paths.yaml`, as the host's main.py does."""
    # Imported in any case: later, the host's nodes put another `utils` before this one.
    config, listed = importlib.import_module("utils.extra_config"), checkout / "extra_model_paths.yaml"
    if listed.is_file():
        config.load_extra_path_config(str(listed))


def _run_prestartup_scripts(folders: list[str]) -> None:
    """Run the packs' `prestartup_script.py`, as the host's main.py does; one that fails is the pack's own matter."""
    for script in sorted(path for folder in folders for path in Path(folder).glob("*/prestartup_script.py")):
        if script.parent.name.endswith(".disabled"):
            continue
        try:
            spec = importlib.util.spec_from_file_location(str(script.with_suffix("")), script)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:  # whatever a pack's code raises
            logging.warning("Cannot import %s: %s", script, error)


def _shortened(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."
