"""Environments with other packages than the one the tests run in: other releases, other frameworks.

Each is made once and kept: a virtual environment with the packages named, which takes all else from the
interpreter that runs the tests. CKPT_TOOL_TEST_ENVS says where they are (default: a directory in the user's
cache).
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def python_with(*requirements: str) -> Path:
    """The interpreter of an environment with these packages (``name==version``), without what they
    require; made where there is none yet."""
    torch = importlib.metadata.version("torch").split("+")[0]
    packages = "_".join(requirement.replace("==", "") for requirement in requirements)
    directory = _cache() / f"python{sysconfig.get_python_version()}_torch{torch}_{packages}"
    _cache().mkdir(parents=True, exist_ok=True)
    with (_cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "complete").exists():
            shutil.rmtree(directory, ignore_errors=True)
            _make(directory, requirements)
            (directory / "complete").touch()
        _borrow_packages(directory)
    return directory / "bin" / "python"


def _cache() -> Path:
    chosen = os.environ.get("CKPT_TOOL_TEST_ENVS")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt_tool_test_envs"


def _make(directory: Path, requirements: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-build-isolation", "--target", str(_packages_of(directory)), *requirements]
    done = subprocess.run(
        pip, capture_output=True, text=True, timeout=600, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    if done.returncode:
        pytest.fail(f"{' '.join(requirements)} cannot be installed: {done.stderr.strip()[-300:]}")


def _packages_of(directory: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(directory)}))


def _borrow_packages(directory: Path) -> None:
    """By a .pth file: the interpreter of an earlier run may be gone by now."""
    layers = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (_packages_of(directory) / "layers.pth").write_text("".join(f"{path}\n" for path in layers))
