"""Installing paring: what is in the wheel, and that it installs where nothing compiles C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, need_module, needs

import paring

SOURCES = ("pyproject.toml", "LICENSE", "README.md", "native", "src")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what paring is built from."""
    need_module("scikit-build-core", "scikit_build_core", "not installed; `pip install scikit-build-core`")
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def build(source: Path, what: str, to: Path, **environment: str) -> Path:
    """Calls the build backend as pip does, in an environment of its own -> the file it made."""
    code = f"from scikit_build_core.build import {what} as build; print(build({str(to)!r}))"
    found = {
        name: value for name, value in os.environ.items() if not name.startswith(("CMAKE", "SKBUILD", "CC", "CXX"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=found | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built where CMake works and no compiler does."""
    folder = tmp_path_factory.mktemp("wheel")
    programs = folder / "bin"
    programs.mkdir()
    for program in ("cmake", "ninja", "make"):
        if (found := shutil.which(program)) is not None:
            (programs / program).symlink_to(found)
    if not (programs / "cmake").exists():
        needs("cmake", "CMake is not installed")
    return build(source, "build_wheel", folder, PATH=str(programs), CXX="/nonexistent")


def test_without_a_compiler_the_wheel_is_pure_python_and_says_how_to_get_the_library(wheel: Path, tmp_path: Path):
    assert wheel.name == f"paring-{paring.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import paring; paring.delegate_path()"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PARING_LIBRARY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "NativeError: cannot find the native library" in done.stderr
    assert "apt install g++" in done.stderr and "pip install --force-reinstall" in done.stderr


def test_the_wheel_has_every_file_of_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("paring/")}
    package = REPOSITORY / "src"
    there = {path.relative_to(package).as_posix() for path in (package / "paring").rglob("*") if path.is_file()}
    assert packed == {name for name in there if "__pycache__" not in name}


def test_the_source_distribution_has_all_that_the_library_is_built_from(source: Path, tmp_path: Path):
    with tarfile.open(build(source, "build_sdist", tmp_path)) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    native = {path.relative_to(source).as_posix() for path in (source / "native").rglob("*") if path.is_file()}
    assert native and native <= packed and "pyproject.toml" in packed
