"""Every command in the documentation runs, in order, as a reader would type it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ELSEWHERE = ("make", "python3", ".venv/bin/pip", ".venv/bin/paring", "pip", "python")
BLOCK = re.compile(r"^( *)```(console|yaml|python)\n(.*?)^\1```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    found = []
    for indent, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        found.append((kind, "\n".join(line[len(indent) :] for line in text.splitlines())))
    return found


DEMO = ["paring", "demo", "--keep", "demo"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves; pages that begin with it share one run."""
    folder = tmp_path_factory.mktemp("docs") / "demo"
    command = "from paring.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "demo", "--keep", str(folder)], check=True, capture_output=True)
    return folder


def run_command(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from paring.cli import main

    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as stop:
        said = capsys.readouterr()
        assert not stop.code, f"{shlex.join(words)} ended with {stop.code}: {said.err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.timeout(600)
# Keras variables predate NumPy 2's `copy`.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_command_of_the_page_runs(page, demo, tmp_path, capsys, monkeypatch, request):
    if "delegate_path()" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("native")
    if any(call in page.read_text(encoding="utf-8") for call in ("bench_algorithms(", "saved_model.save(")):
        request.getfixturevalue("tensorflow")
    if "--runtime native" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("operators")
    monkeypatch.chdir(tmp_path)
    for kind, text in blocks(page):
        if kind != "console" and (name := re.match(r"# (\S+\.(?:yaml|py))\n", text)):
            Path(name[1]).write_text(text, encoding="utf-8")
        elif kind == "python":
            subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path, capture_output=True)
        elif kind == "console":
            for line in text.splitlines():
                words = shlex.split(line.removeprefix("$ ")) if line.startswith("$ ") else []
                if words[:1] == ["cd"]:
                    os.chdir(words[1])
                elif words == DEMO:
                    shutil.copytree(demo, "demo")
                elif words[:1] == ["paring"]:
                    run_command(words, capsys, monkeypatch)
                elif words:
                    assert words[0] in ELSEWHERE, f"{page.name}: no test runs {line!r}"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
