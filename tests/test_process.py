"""How the program starts and ends: foreign files in its way, streams that are closed or not Unicode, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import store_cases

ROOT = Path(__file__).resolve().parents[1]


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's line in a folder, with this project found by its path."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "PY": sys.executable, **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=known, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["train.py", "store.py", "kernels.py", "train/__init__.py", "kernels/__init__.py"])
def test_a_file_of_a_package_s_name_is_said_and_not_run(name: str, tmp_path: Path) -> None:
    """`-m` looks into the working directory first, and everybody has a train.py there."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("print('MINE RAN')")
    done = shell('"$PY" -m engine.run --help', tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    package = Path(name).with_suffix("").parts[0]
    assert done.stderr.startswith(f"error: {file} is taken for this program's package {package}, as Python looks there")
    assert done.stderr.count("\n") == 1
    assert "rename it" in done.stderr


def test_the_console_script_is_not_in_the_way_of_a_train_py(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('MINE RAN')")
    script = tmp_path / "bin" / "vit-attention"
    script.parent.mkdir()
    script.write_text("import sys\nfrom engine.run import main\nsys.exit(main())\n")
    done = shell('"$PY" bin/vit-attention --help', tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: vit-attention study [--config study.toml]")


def test_the_other_package_kernels_is_said(tmp_path: Path) -> None:
    (tmp_path / "kernels-0.17.2.dist-info").mkdir()
    done = shell('"$PY" -m engine.run --help', tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Hugging Face's package kernels is installed too")
    done = shell('"$PY" -c "import kernels"', tmp_path)
    assert done.stderr.splitlines()[-1].startswith("ImportError: Hugging Face's package kernels is installed too")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    store_cases.capture(path)
    return path


def test_a_reader_that_ends_early_ends_the_command(store: Path, tmp_path: Path) -> None:
    done = shell(f'"$PY" -m engine.run info {store} | true; echo "${{PIPESTATUS[0]}}"', tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")
    done = shell('"$PY" -m engine.run info none.zarr 2>&1 | true; echo "${PIPESTATUS[0]}"', tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_closed_streams(store: Path, tmp_path: Path) -> None:
    done = shell(f'"$PY" -m engine.run info {store} >&-', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = shell('"$PY" -m engine.run stduy 2>&-', tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_terminal_without_unicode(store: Path, tmp_path: Path) -> None:
    """What it cannot show is escaped; JSON stays JSON."""
    done = shell('"$PY" -m engine.run café', tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith("error: caf\\xe9 is not a command")
    path = tmp_path / "é.zarr"
    path.symlink_to(store)
    (tmp_path / "é.ledger").symlink_to(store.with_suffix(".ledger"))
    done = shell('"$PY" -m engine.run info é.zarr', tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(path)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell('cd gone && rmdir ../gone && "$PY" -m engine.run train', tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the folder that this was started in is gone; change to one")


def test_an_interrupt_while_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import builtins, runpy\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest, **more):\n"
        "    if name == 'tomllib':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = slow\n"
        "runpy.run_module('engine.run', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
