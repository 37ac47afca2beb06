"""The ways to install COTS that pages, messages and configurations name."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _texts() -> dict[str, str]:
    folders = ("cots", "demo", "docs", "index", "pretrain", "configs")
    files = [
        file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".md", ".yaml")
    ]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in (ROOT / "README.md", *files)}


def test_whatever_is_to_be_installed_is_an_extra_by_the_name_that_every_pip_finds() -> None:
    named = {(file, name) for file, text in _texts().items() for name in re.findall(r"cots\[([\w-]+)\]", text)}
    assert {file for file, name in named if name not in EXTRAS} == set()
    assert {"cots/model/open_clip_architecture.py", "index/ann.py", "index/place.py"} <= {file for file, _ in named}
    assert [name for name in EXTRAS if re.search("[A-Z_.]", name)] == []


def test_extras_are_added_in_one_way_after_the_first_installation() -> None:
    """`pip install '.[EXTRA]'` works in one folder only, and puts a copy in the place of a checkout."""
    others = {file: re.findall(r"\S*'\.\[.*?\]'", text) for file, text in _texts().items() if "'.[" in text}
    assert others == {"README.md": ["'.[cpu,demo]'"]}


def test_the_readme_names_every_extra() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == set(EXTRAS)
