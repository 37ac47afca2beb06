"""The house of CONTRIBUTING.md: a file imports only from its own part and from floors below, and is on the map."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS: dict[int, list[tuple[str, ...]]] = {  # the parts of each floor; a part may be several modules
    1: [
        (
            "cots.bad_files",
            "cots.errors",
            "cots.embedded",
            "cots.full_precision",
            "cots.onednn",
            "cots.recording",
            "cots.single_core",
        ),
        ("cots.stopwatch",),
    ],
    2: [("cots.settings", "cots.config", "cots.model_config", "cots.tokenizer_config")],
    3: [("cots.data",), ("cots.moments",)],
    4: [("cots.model",)],
    5: [("cots.objectives",), ("cots.embed",)],
    6: [("cots.evaluation",), ("index",)],
    7: [("pretrain",), ("demo",)],
    8: [("cots.cli", "cots.commands")],
}
PARTS = {module: (floor, part) for floor, parts in FLOORS.items() for part in parts for module in part}
FACE = "cots/__init__.py"  # lazy: it names what lies on every floor


def _part(module: str) -> tuple[int, tuple[str, ...]] | None:
    """The floor and the part of a module, or None of what is not ours."""
    names = [name for name in PARTS if module == name or module.startswith(f"{name}.")]
    return PARTS[max(names, key=len)] if names else None


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _files() -> list[Path]:
    folders = ("cots", "pretrain", "index", "demo")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def test_a_file_imports_only_from_its_own_part_and_from_below() -> None:
    upwards = []
    for file in _files():
        name = file.relative_to(ROOT).as_posix()
        if name == FACE:
            continue
        own = _part(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert own is not None, f"{name} stands on no floor; give it one here and in CONTRIBUTING.md"
        for module in _imported(ast.parse(file.read_text(encoding="utf-8"))):
            other = _part(module)
            if other is not None and other != own and other[0] >= own[0]:
                upwards.append(f"{name} (floor {own[0]}) imports {module} (floor {other[0]})")
    assert upwards == []


def _map() -> dict[str, str]:
    """What CONTRIBUTING.md says of each part, by the folder or file that begins it."""
    said: dict[str, str] = {}
    part = ""
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            part = line[13:36].strip() or part
            said[part] = f"{said.get(part, '')} {line[13:]}"
        elif said:
            break
    return said


def test_every_module_is_on_the_map() -> None:
    said = _map()
    words = {part: set(re.findall(r"\w+\*?", text)) for part, text in said.items()}
    lost = []
    for file in _files():
        folder, name = f"{file.parent.relative_to(ROOT).as_posix()}/", file.stem
        if name.startswith("__"):
            continue
        if folder.startswith("demo/gallery_sources"):
            folder, name = "demo/", "gallery_sources"
        part = {"cots/commands/": "cots/cli.py"}.get(folder, folder)
        there = words[part] if part in words else set.union(*words.values())
        if name not in there and f"{name.partition('_')[0]}_*" not in there:
            lost.append(file.relative_to(ROOT).as_posix())
    assert lost == []
