"""The project's laws of dependency and safety, held by reading its source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# ComfyUI's own top-level modules, `comfy` apart, that node files may use.
HOST_MODULES = {"comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "node_helpers", "nodes", "server"}


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no modules in {folders}"
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, at its top or inside, relative ones resolved from the repository root."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def importers(name: str, *folders: str) -> set[str]:
    """Return the files that import a top-level module or anything in it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in modules(*folders)
        if any(module.split(".")[0] == name for module in imports(path))
    }


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the dotted name and the node of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_reader_sees_relative_absolute_and_hidden_imports():
    path = ROOT / "flexi_core" / "demo" / "model.py"
    assert {"flexi_core.errors.FlexiError", "flexi_core.runtime.unet", "torch", "json"} <= set(imports(path))
    assert "flexi_core.run.report" not in set(imports(path))
    assert "matplotlib.pyplot" in set(imports(ROOT / "search_tools" / "report" / "pictures.py"))  # inside a function


def test_only_the_adapters_import_comfy():
    found = importers("comfy", "flexi_core", "nodes", "search_tools")
    assert "flexi_core/host/wrappers.py" in found
    back_end = {f"search_tools/backends/comfyui/{part}.py" for part in ("host", "node", "features")}
    assert {path for path in found if not path.startswith("flexi_core/host/")} <= back_end


def test_the_core_imports_no_other_part_and_no_host_module():
    for name in ("nodes", "search_tools", *HOST_MODULES):
        assert importers(name, "flexi_core") == set()


def test_no_module_imports_itself_by_way_of_others():
    def name_of(path: Path) -> str:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    named = {name_of(path): path for path in modules("flexi_core", "search_tools")}
    # Imports inside functions count too.
    asked = {name: {other for other in imports(path) if other in named and other != name} for name, path in named.items()}
    assert len(named) > 100 and sum(map(len, asked.values())) > len(named)
    TopologicalSorter(asked).prepare()  # an error names the circle


def test_nodes_and_search_never_meet():
    assert importers("search_tools", "nodes") == set()
    assert importers("nodes", "search_tools") == set()


def test_only_the_adapter_is_imported_for_the_host():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in modules("flexi_core", "search_tools")
        if any(module.startswith("flexi_core.host") for module in imports(path)) and path.parent != ROOT / "flexi_core" / "host"
    }
    assert found <= {"search_tools/backends/comfyui/backend.py", "search_tools/backends/comfyui/node.py"}


def test_nodes_reach_the_core_by_relative_imports_only():
    # The host imports the pack under a path-like name; `import flexi_core` fails there.
    for path in [*modules("nodes"), ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [name for name in names if name.split(".")[0] in ("flexi_core", "nodes", "search_tools")], path


def test_the_core_asks_for_nothing_that_the_host_does_not_ship():
    shipped = {"torch", "torchsde", "numpy", "scipy", "einops", "safetensors", "PIL", "comfy", "flexi_core"}
    for path in modules("flexi_core"):
        used = {module.split(".")[0] for module in imports(path)} - {""}
        assert not used - shipped - sys.stdlib_module_names, path


@pytest.mark.parametrize("path", modules("flexi_core", "nodes"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_executed_or_unpickled(path):
    assert not {module.split(".")[0] for module in imports(path)} & {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "subprocess",
        "runpy",
        "code",
    }
    for name, node in calls(path):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), f"{path}: {name}"
        if name == "torch.load":
            assert any(k.arg == "weights_only" and ast.literal_eval(k.value) is True for k in node.keywords), path


@pytest.mark.parametrize("path", modules("flexi_core"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_core_logs_and_never_prints(path):
    assert "print" not in {name for name, _ in calls(path)}


@pytest.mark.parametrize("path", modules("flexi_core", "nodes", "search_tools"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_importing_a_module_does_nothing(path):
    """A module's top level defines, imports and assigns; a call on its own or a loop would be work."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not isinstance(node, ast.For | ast.While | ast.With), f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "code", ["import flexi_core", "import sys; sys.argv[1:] = ['--help']; from search_tools.entry import main; main()"]
)
def test_what_needs_no_torch_loads_none(code):
    asks = "import atexit, sys; atexit.register(lambda: print('loaded', *{'torch', 'optuna', 'scipy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{asks}; {code}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded"]
