"""The plain `lm_eval` command knows our models after `pip install`, and nothing else changes.

Everything here runs in interpreters of its own, in virtual environments into which the project is
really installed: as a wheel, or editable. They see this environment's packages, less this project,
through a folder of links.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from spade_eval.plugin import MODELS


class Environment:
    """A virtual environment that sees the packages this project needs."""

    def __init__(self, folder: Path, packages: Path) -> None:
        command = [sys.executable, "-m", "venv", "--without-pip", folder]
        subprocess.run(command, check=True)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        self.work = folder / "work"  # a current directory that is not the repository
        self.work.mkdir()
        self.site = Path(self.call("import sysconfig; print(sysconfig.get_path('purelib'))"))
        (self.site / "packages.pth").write_text(f"{packages}\n")

    def pip(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        result = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def install(self, *what: str | Path) -> None:
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
        self.pip("install", *options, *what)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SPADE_EVAL"))}
        return subprocess.run(
            [self.python, *arguments],
            env=clean | variables,
            cwd=self.work,
            capture_output=True,
            text=True,
        )

    def call(self, code: str, **variables: str) -> str:
        """Run `code`, which has to succeed without a word on standard error."""
        result = self.run("-c", code, **variables)
        assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
        return result.stdout.strip()

    def files(self) -> set[Path]:
        """What is installed, byte code apart."""
        found = (*self.site.rglob("*"), *self.bin.iterdir())
        return {path for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to this environment's packages, less this project and all .pth files."""
    folder = tmp_path_factory.mktemp("packages")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(site).iterdir():
            if path.suffix != ".pth" and not path.name.startswith(("spade_eval", "__pycache__")):
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet", "-w", folder]
    subprocess.run([sys.executable, "-m", "pip", *build, ROOT], check=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Environment:
    """An environment without this project, for comparison."""
    return Environment(tmp_path_factory.mktemp("bare"), packages)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, packages: Path, wheel: Path) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"), packages)
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable"), packages)
    environment.install("--editable", ROOT)
    return environment


# Which of our names the registry has once lm-eval's models are imported.
_KNOWN = f"""
import lm_eval.models
from lm_eval.api.registry import model_registry
print(*[name for name in {list(MODELS)} if name in model_registry])
"""
ALL = " ".join(MODELS)


def test_wheel_holds_package_tasks_and_hook(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tasks = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tasks").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"spade_eval/{task}" for task in tasks} <= names
    assert {"spade_eval.pth", "spade_eval.start", "spade_eval/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "tasks", "results"))]


def test_entry_points_are_the_models_of_the_plugin(wheel: Path) -> None:
    entry_points = ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points.read_string(archive.read(file).decode())
    assert dict(entry_points["lm_eval.models"]) == MODELS


def test_models_resolve_and_built_in_ones_still_do(installed: Environment) -> None:
    names = ("spade_layer", "simlens", "logit_lens", "hf")
    classes = installed.call(
        "from lm_eval.api.registry import get_model\n"
        f"print(*[get_model(name).__name__ for name in {names}])",
        HF_HUB_OFFLINE="1",
    )
    assert classes.split() == ["SpadeLayerLM", "SpadeLayerLM", "LogitLensLM", "HFLM"]


def test_plain_lm_eval_command_reaches_our_models(installed: Environment) -> None:
    tasks = installed.call("from spade_eval.cli import tasks_path; print(tasks_path())")
    result = installed.run(
        *("-m", "lm_eval", "--include_path", tasks, "--tasks", "spade_mini_science"),
        *("--model", "no_such_model"),
    )
    message = result.stderr.splitlines()[-1]
    assert "Supported model names" in message
    assert {*MODELS, "hf", "dummy"} <= set(message.split(": ")[-1].split(", "))


def test_console_script_finds_the_tasks_of_the_wheel(installed: Environment) -> None:
    command = [installed.bin / "spade-eval", "tasks-path"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()).samefile(installed.site / "spade_eval" / "tasks")


def test_names_are_known_however_lm_eval_is_started(installed: Environment) -> None:
    assert installed.call(_KNOWN) == ALL
    isolated = installed.run("-I", "-c", _KNOWN)
    assert isolated.stdout.strip() == ALL
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_KNOWN!r}], check=True)"
    )
    assert installed.call(child) == ALL


@pytest.mark.parametrize(("value", "known"), [("1", ""), ("yes", ""), ("0", ALL), ("", ALL)])
def test_opt_out(installed: Environment, value: str, known: str) -> None:
    assert installed.call(_KNOWN, SPADE_EVAL_NO_AUTOLOAD=value) == known


def test_register_works_without_the_hook(installed: Environment) -> None:
    code = f"from spade_eval.plugin import register\nregister()\nregister()\n{_KNOWN}"
    assert installed.call(code, SPADE_EVAL_NO_AUTOLOAD="1") == ALL


def test_hook_leaves_no_trace_in_the_import_system(installed: Environment) -> None:
    finders = "import sys; print(*[f for f in sys.meta_path if 'spade' in repr(f)])"
    assert "_WaitForLmEval" in installed.call(finders)
    assert installed.call("import lm_eval.models\n" + finders) == ""
    # Looking for the module without importing it is not yet the moment.
    look = "import importlib.util\nimportlib.util.find_spec('lm_eval.models')\n"
    assert installed.call(look + _KNOWN) == ALL


def test_start_file_names_the_same_hook(installed: Environment) -> None:
    """Python 3.15 reads `spade_eval.start` instead of the .pth file's import line (PEP 829)."""
    lines = (installed.site / "spade_eval.start").read_text().split()
    assert lines == ["spade_eval.plugin:install"]
    twice = "from spade_eval.plugin import install\ninstall()\ninstall()\n"
    assert installed.call(twice + _KNOWN) == ALL
    late = "import lm_eval.models\nfrom spade_eval.plugin import install\ninstall()\n"
    assert installed.call(f"{late}install()\n{_KNOWN}") == ALL


# A stand-in for lm-eval: its registry writes down what is registered, and by whom.
_FAKE_REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        print("registered", name)
        self[name] = target

model_registry = Registry()
"""


@pytest.fixture
def fake_lm_eval(tmp_path: Path) -> Any:
    """Make a stand-in whose `lm_eval.models` runs the given code; returns its import path."""

    def make(models: str, registry: str = _FAKE_REGISTRY) -> str:
        for name in ("lm_eval", "lm_eval/api", "lm_eval/models"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / "lm_eval" / "api" / "registry.py").write_text(registry)
        (tmp_path / "lm_eval" / "models" / "__init__.py").write_text(models)
        return str(tmp_path)

    return make


def test_does_nothing_where_lm_eval_finds_the_entry_points(
    installed: Environment, fake_lm_eval: Any
) -> None:
    """As the releases after 0.4.13 do: they scan the entry points themselves."""
    path = fake_lm_eval(
        "from importlib.metadata import entry_points\n"
        "from lm_eval.api.registry import model_registry\n"
        "for entry_point in entry_points(group='lm_eval.models'):\n"
        "    model_registry[entry_point.name] = entry_point\n"
    )
    code = (
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "for name, entry_point in sorted(model_registry.items()):\n"
        "    print(name, entry_point.value)"
    )
    want = [f"{name} {target}" for name, target in sorted(MODELS.items())]
    assert installed.call(code, PYTHONPATH=path).splitlines() == want
    # The same stand-in without that step: the hook steps in.
    (Path(path) / "lm_eval" / "models" / "__init__.py").write_text("")
    registered = installed.call("import lm_eval.models", PYTHONPATH=path).splitlines()
    assert registered == [f"registered {name}" for name in MODELS]


def test_a_failing_registration_warns_and_lets_lm_eval_be(
    installed: Environment, fake_lm_eval: Any
) -> None:
    path = fake_lm_eval("loaded = True", registry="raise RuntimeError('all is different now')")
    code = "import lm_eval.models; print(lm_eval.models.loaded)"
    result = installed.run("-c", code, PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (0, "True\n")
    assert "RuntimeWarning: spade_eval could not add its models" in result.stderr
    assert "all is different now" in result.stderr
    assert "Traceback" not in result.stderr


def test_lm_evals_own_import_error_is_its_own(installed: Environment, fake_lm_eval: Any) -> None:
    path = fake_lm_eval("raise ImportError('broken by itself')")
    result = installed.run("-c", "import lm_eval.models", PYTHONPATH=path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ImportError: broken by itself"
    assert "could not add" not in result.stderr


def test_without_lm_eval_nothing_happens(installed: Environment) -> None:
    gone = "import sys; sys.modules['lm_eval'] = None\ntry:\n import lm_eval.models\n"
    assert installed.call(gone + "except ImportError:\n print('absent')") == "absent"


def test_editable_install(editable: Environment) -> None:
    assert editable.call(_KNOWN) == ALL
    where = "import spade_eval; from spade_eval.cli import tasks_path\n"
    printed = editable.call(where + "print(spade_eval.__file__, tasks_path())")
    assert printed.split() == [str(ROOT / "spade_eval" / "__init__.py"), str(ROOT / "tasks")]
    assert not (editable.site / "spade_eval").exists(), "a copy would shadow the repository"


def test_editable_install_whose_source_is_gone_stays_silent(tmp_path: Path, packages: Path) -> None:
    environment = Environment(tmp_path / "environment", packages)
    environment.install("--editable", ROOT)
    (path_file,) = (
        file for file in environment.site.glob("*.pth") if str(ROOT) in file.read_text()
    )
    path_file.write_text(str(tmp_path / "moved away"))
    assert environment.call("print('started')") == "started"
    assert environment.call(_KNOWN) == ""


def test_uninstall_leaves_nothing(tmp_path: Path, packages: Path, wheel: Path) -> None:
    environment = Environment(tmp_path / "environment", packages)
    before = environment.files()
    environment.install(wheel)
    environment.call(_KNOWN)
    assert environment.files() > before
    environment.pip("uninstall", "--yes", "--quiet", "spade-eval")
    assert environment.files() == before
    assert environment.call(_KNOWN) == ""


def test_start_up_loads_two_small_modules_only(installed: Environment, bare: Environment) -> None:
    loaded = "import sys; print(*sys.modules)"
    extra = set(installed.call(loaded).split()) - set(bare.call(loaded).split())
    assert extra == {"spade_eval", "spade_eval.plugin"}


def test_start_up_costs_a_small_share_of_pythons_own(installed: Environment) -> None:
    """A twelfth; with `re`, which the interpreter has not loaded by then, it would be three quarters."""
    line = (installed.site / "spade_eval.pth").read_text().strip()
    code = (
        f"import os, sys, time; sys.path.append({str(installed.site)!r}); own = time.process_time(); "
        f"exec({line!r}); print('spade_eval.plugin' in sys.modules, time.process_time() / own - 1)"
    )
    shares = []
    for _ in range(20):
        loaded, share = installed.run("-S", "-c", code).stdout.split()
        assert loaded == "True"
        shares.append(float(share))
    assert min(shares) <= 0.15  # other load on the machine only ever adds time
