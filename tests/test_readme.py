"""The python blocks of README and docs run as they stand: in order, a namespace a page, on one rank and on several."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import sharded_dadamw.checkpoint
import sharded_dadamw.interchange
from tests.forked import names_for
from tests.pool import on_ranks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number in the file, source) of every fenced block marked python."""
    return [
        (text.count("\n", 0, match.start(2)) + 1, match.group(2))
        for match in re.finditer(r"^```(python|py)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def run_blocks(text: str, file: str) -> list[int]:
    """Runs every block; returns the line numbers of those that ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = python_blocks(text)
    for line, source in blocks:
        # Blank lines in front make a traceback point at the README's own lines.
        exec(compile("\n" * (line - 1) + source, file, "exec"), namespace)
    return [line for line, _ in blocks]


def run_blocks_on_a_rank(_: Any, text: str, file: str, folder: str) -> list[int]:
    """Here the default group exists already: starting and ending it is the pool's business, not the README's."""
    init, destroy, cwd = dist.init_process_group, dist.destroy_process_group, os.getcwd()
    names = dict(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(names)
    os.chdir(folder)
    dist.init_process_group = lambda *args, **kwargs: None
    dist.destroy_process_group = lambda *args, **kwargs: None
    try:
        return run_blocks(text, file)
    finally:
        dist.init_process_group, dist.destroy_process_group = init, destroy
        os.chdir(cwd)
        for name in names:
            del os.environ[name]


@every_page
def test_blocks_run_on_one_rank(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    for name, value in names_for(1)[0].items():  # so that a block may call init_process_group
        monkeypatch.setenv(name, value)
    try:
        ran = run_blocks(text, str(page))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(ran) == text.count("\n```python") + text.startswith("```python"), "a block was not recognised"


@every_page
def test_blocks_run_on_several_ranks(page: Path, tmp_path: Path) -> None:
    """On all of the pool's ranks, because a block that names no group uses the default one."""
    text = page.read_text()
    ran = on_ranks(4, run_blocks_on_a_rank, text, str(page), str(tmp_path))
    assert ran == [[line for line, _ in python_blocks(text)]] * 4


@every_page
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_site_builds_and_its_reference_finds_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "api.html").read_text()
    public = [*sharded_dadamw.__all__, *sharded_dadamw.checkpoint.__all__, *sharded_dadamw.interchange.__all__]
    assert [name for name in public if not re.search(rf'id="sharded_dadamw[\w.]*\.{name}"', reference)] == []
