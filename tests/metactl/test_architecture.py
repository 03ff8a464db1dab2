import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "ray stable_baselines3 transformers lightning matplotlib models envs".split()


def imported(path):
    """Top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = path.relative_to(ROOT).parts[0]
            found.add(own if node.level else str(node.module).partition(".")[0])
    return found


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 3, package
    return files


def python(code, cwd, **variables):
    """Runs code in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def foreign(tmp_path):
    """A folder with packages of its own called `models` and `envs`."""
    for name in ("models", "envs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a foreign package')\n")
    return tmp_path


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("models", {"metactl", "envs"}), ("metactl", {"models", "envs"}), ("envs", set())],
)
def test_imports_go_one_way(package, forbidden):
    offending = {
        str(path.relative_to(ROOT)): sorted(imported(path) & forbidden)
        for path in sources(package)
        if imported(path) & forbidden
    }
    assert offending == {}


def test_environments_stand_on_models_and_metactl():
    together = set().union(*(imported(path) for path in sources("envs")))
    assert {"models", "metactl"} <= together


def test_importing_metactl_loads_nothing_heavy():
    code = f"import sys, metactl; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code, ROOT).strip() == "[]"


def test_metactl_can_be_imported_beside_foreign_models_and_envs(foreign):
    output = python("import metactl; print(metactl.__file__)", foreign).strip()
    assert Path(output) == ROOT / "metactl" / "__init__.py"


def test_a_foreign_package_called_envs_is_refused_with_what_to_do(foreign):
    code = """
from metactl.shards import require_own_package
try:
    require_own_package("envs")
except ImportError as error:
    print(error)
require_own_package("somebody_elses")
"""
    message = python(code, foreign, PYTHONPATH=str(foreign))
    assert str(foreign / "envs") in message
    assert f"its own package 'envs' at {ROOT / 'envs'}" in message
    assert "Rename that folder, run from another directory" in message
    assert "sys.path" in message


def test_the_own_package_called_envs_is_accepted():
    assert python("from metactl.shards import require_own_package as r; r('envs')", ROOT) == ""


def test_a_foreign_package_called_models_is_refused_with_what_to_do(foreign):
    (foreign / "envs" / "__init__.py").unlink()
    (foreign / "envs").rmdir()
    code = """
try:
    import envs.registration
except ImportError as error:
    print(error)
"""
    message = python(code, foreign, PYTHONPATH=str(foreign))
    assert str(foreign / "models") in message
    assert "Rename that folder" in message
