"""The package as others meet it: what the wheel installs, what an import costs, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moebius

RunPython = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("hf_plugin", "predictors", "gpu_cache", "cpu_experts", "kernels")
MAY_IMPORT = {
    "hf_plugin": {*FOLDERS},
    "predictors": {"predictors", "kernels"},
    "gpu_cache": {"gpu_cache", "kernels"},
    "cpu_experts": {"cpu_experts", "kernels"},
    "kernels": {"kernels"},
}
KERNELS_IN_RANGE = "0.18.9"  # what transformers 5.23 accepts is [0.18.2, 0.19)


def sources() -> list[Path]:
    """Every Python file of the five folders, relative to the root."""
    return [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports anywhere, with their lines; `from a import b` gives "a.b"."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_follow_the_one_direction(path: Path) -> None:
    """A cache that reaches into the CPU executor, or kernels that reach up, turn five parts into one lump."""
    allowed = MAY_IMPORT[path.parts[0]]
    for name, line in imported_names(path):
        parts = name.split(".")
        if parts[0] != "moebius":
            continue
        target = parts[1] if len(parts) > 1 else ""
        public_name = path.parts[0] == "hf_plugin" and target not in FOLDERS  # `import moebius`, `moebius.__version__`
        assert target in allowed or public_name, f"{path}:{line} imports {name}; allowed are {sorted(allowed)}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_folders_are_imported_through_moebius_only(path: Path) -> None:
    """`import kernels` works from the repository root by accident, and is PyPI's package anywhere else."""
    for name, line in imported_names(path):
        assert name.split(".")[0] not in FOLDERS, f"{path}:{line} imports {name}; write moebius.{name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_shadow_no_other_package(folder: str) -> None:
    """With an __init__.py, our kernels/ would be the `kernels` that transformers imports from the repository root."""
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "benchmarks", "examples"])
def test_every_folder_says_what_it_is(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text().startswith("# ")


def test_every_folder_with_sources_is_packaged() -> None:
    """setuptools maps each folder by hand; a forgotten one works in the checkout and is missing in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(project["package-dir"].values()) == {str(path.parent) for path in sources()} | {"moebius"}
    assert set(project["packages"]) == set(project["package-dir"])
    for package, folder in project["package-dir"].items():
        assert package == ("moebius" if folder == "moebius" else f"moebius.{folder.replace('/', '.')}")


def test_constraints_name_every_direct_dependency() -> None:
    """An unpinned dependency lets the suite break without a change of ours (torch: by gigabytes of another build)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = re.findall(r"^([\w-]+)(?:==|>=[\d.]+,<=)[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.split(r"[^\w-]", requirement)[0] for requirement in wanted} <= set(pinned)


def test_import_is_lazy(run_python: RunPython, tmp_path: Path) -> None:
    """`import moebius` must stay free: no torch, no numba, no triton, no transformers until a public name is used."""
    code = """
        import sys, moebius
        assert moebius.__version__ and "patch" in dir(moebius)
        heavy = {"torch", "numba", "triton", "transformers", "numpy"} & set(sys.modules)
        assert not heavy, f"import moebius imported {heavy}"
    """
    run_python(inspect.cleandoc(code), cwd=tmp_path)


def test_public_names_compile_nothing_and_touch_no_gpu(run_python: RunPython, tmp_path: Path) -> None:
    """Loading all of the plugin, as `moebius.patch` does, must neither compile a kernel nor start CUDA."""
    code = """
        import numba.core.dispatcher, numba.core.compiler, torch
        def refuse(*args, **kwargs):
            raise AssertionError("import compiled a Numba function")
        numba.core.compiler.compile_extra = refuse
        numba.core.compiler.CompilerBase.compile_extra = refuse
        import moebius
        for name in moebius.__all__:
            getattr(moebius, name)
        assert not torch.cuda.is_initialized()
    """
    run_python(inspect.cleandoc(code), cwd=tmp_path, MOEBIUS_CACHE_DIR=str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("*.nb?")), "import wrote compiled kernels"


@pytest.mark.parametrize("name", [name for name in moebius.__all__ if name != "__version__"])
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert inspect.getdoc(getattr(moebius, name))


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        moebius.no_such_name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without network and without what earlier builds left behind."""
    build, out = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, build)
    for folder in ("moebius", *FOLDERS):
        shutil.copytree(ROOT / folder, build / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", out]
    done = subprocess.run(command, cwd=build, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


@pytest.fixture
def pypi_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for PyPI's `kernels`, in the range of versions that transformers imports."""
    site = tmp_path / "kernels_site"
    (site / "kernels").mkdir(parents=True)
    lines = [
        f"class {name}:\n    def __init__(self, *args, **kwargs): pass"
        if name[0].isupper()
        else f"def {name}(*args, **kwargs): return lambda decorated: decorated"
        for name in _names_of_kernels()
    ]
    (site / "kernels" / "__init__.py").write_text("\n".join(["ORIGIN = 'PyPI'", *lines]))
    metadata = site / f"kernels-{KERNELS_IN_RANGE}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_IN_RANGE}\n")
    return site


def _names_of_kernels() -> list[str]:
    """What transformers imports from `kernels`, read from its sources."""
    import transformers.integrations.hub_kernels as hub_kernels

    tree = ast.parse(inspect.getsource(hub_kernels))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "kernels")
    return sorted({alias.name for node in found for alias in node.names})


@pytest.mark.slow
def test_wheel_installs_one_name_with_every_source(wheel: Path) -> None:
    """A second top-level name (above all `kernels`) would overwrite files of other distributions."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    version = moebius.__version__
    assert {name.split("/")[0] for name in files} == {"moebius", f"moebius_moe-{version}.dist-info"}
    assert {f"moebius/{path}" for path in sources()} <= files
    assert "moebius/py.typed" in files
    assert any(name.endswith("LICENSE") for name in files)


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [False, True], ids=["without kernels", "with kernels"])
def test_installed_wheel_imports_from_any_folder(
    installed: Path, pypi_kernels: Path, run_python: RunPython, tmp_path: Path, with_kernels: bool
) -> None:
    """An installed wheel must find its own folders, and leave the name `kernels` to whom it belongs."""
    path = (installed, pypi_kernels) if with_kernels else (installed,)
    code = f"""
        import moebius, moebius.kernels.experts, moebius.kernels.routes, importlib.util, pathlib
        assert pathlib.Path(moebius.__file__).is_relative_to({str(installed)!r}), moebius.__file__
        assert pathlib.Path(moebius.kernels.experts.__file__).is_relative_to({str(installed)!r})
        for name in moebius.__all__:
            getattr(moebius, name)
        assert (importlib.util.find_spec("kernels") is not None) == {with_kernels}
    """
    run_python(inspect.cleandoc(code), cwd=tmp_path, path=path)


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [False, True], ids=["without kernels", "with kernels"])
def test_transformers_never_takes_our_kernels_folder(
    pypi_kernels: Path, run_python: RunPython, with_kernels: bool
) -> None:
    """From the repository root `kernels` is a folder of ours; transformers must import PyPI's or none."""
    code = f"""
        import sys
        sys.path.insert(0, "")
        import transformers.integrations.hub_kernels
        from transformers.utils.import_utils import is_kernels_available
        from transformers import Qwen3MoeForCausalLM
        assert is_kernels_available() is {with_kernels}
        loaded = sys.modules.get("kernels")
        assert getattr(loaded, "ORIGIN", None) == {"PyPI" if with_kernels else None!r}, loaded
        import moebius.kernels.experts
    """
    run_python(inspect.cleandoc(code), cwd=ROOT, path=(pypi_kernels,) if with_kernels else ())


def test_command_is_installed() -> None:
    """The entry point must name a function that exists."""
    [entry] = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "moebius"]
    assert callable(entry.load())
