# SPDX-License-Identifier: Apache-2.0
"""Imports inside of faexport: no cycle, and only in the directions that docs/architecture.md gives, whose table of
layers is read here. Imports for types and imports inside of functions count as well."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "export" / "faexport"

# Each part of understand/ and the parts of it that it may import.
ALLOWED = {
    "shapes": set(),
    "index": {"shapes"},
    "mask": {"shapes", "index"},
    "layout": {"shapes"},
    "core": {"shapes", "layout"},
}


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """The modules of faexport that this one names in an import, wherever in the file it stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            found |= submodules & known.keys()
            if not submodules <= known.keys():
                found.add(base)
    return (found & known.keys()) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(name, path, known) for name, path in known.items()}


def a_cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one again at the end."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges[name]):
            found = search(other, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next(filter(None, (search(name, []) for name in edges)), None)


def test_a_cycle_is_found():
    assert a_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
    assert a_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_module_imports_itself_through_others():
    assert a_cycle(graph()) is None


def layers() -> list[set[str]]:
    """The rows of the table in docs/architecture.md, from its top."""
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text("utf-8")
    table = page.partition("`export/faexport` is in layers")[2].partition("| part | question |")[2].partition("\n\n")[0]
    return [set(re.findall(r"`(\w+)/?`", row.split("|")[1])) for row in table.splitlines()[2:]]


def unit_of(name: str) -> str:
    """The package or file directly in faexport: "match" for faexport.match.caches."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_part_stands_in_one_layer():
    assert sorted(part for layer in layers() for part in layer) == sorted({unit_of(name) for name in modules()})


def test_layers_import_only_those_above_them_in_the_table():
    height = {part: n for n, layer in enumerate(layers()) for part in layer}
    wrong = {(a, b) for a, found in graph().items() for b in found if height[unit_of(a)] < height[unit_of(b)]}
    assert not wrong


def part_of(name: str) -> str | None:
    """ "shapes" for faexport.understand.shapes.dims."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "understand" else None


@pytest.mark.parametrize("part", ALLOWED)
def test_parts_of_understand_import_in_one_direction(part):
    edges = {name: found for name, found in graph().items() if part_of(name) == part}
    assert edges
    for name, found in edges.items():
        for other in found:
            assert part_of(other) in (None, part, *ALLOWED[part]), f"{name} imports {other}"


def test_every_file_of_understand_is_in_a_part():
    assert {part_of(name) for name in modules() if name.startswith("faexport.understand.")} == ALLOWED.keys()


# Reads of constants. One place says what is constant; the files that read, write and run models aren't asked.
CONSTANTS = re.compile(r"\bconst_value\b|\bget_const_tensor\b")
PROVERS = ("understand/", "match/", "write/", "fallback/", "precision/core.py", "pipeline.py")


def test_constants_are_evaluated_in_one_place():
    """An initializer that a caller may override is no constant: whoever reads tensors past that place forgets it."""
    paths = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}
    proving = {name: path for name, path in paths.items() if name.startswith(PROVERS)}
    found = {name for name, path in proving.items() if CONSTANTS.search(path.read_text("utf-8"))}
    assert found == {"understand/shapes/constants.py"}


def test_temporary_folders_are_made_in_one_place():
    """One that scratch.py made is removed by the next run where this one is killed; tempfile's would stay."""
    makers = re.compile(r"\b(TemporaryDirectory|NamedTemporaryFile|mkdtemp|mkstemp)\b")
    found = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if makers.search(p.read_text("utf-8"))}
    assert found == {"files/scratch.py"}


def test_no_file_is_long():
    parts = ("csrc", "plugin", "export", "tests", "benchmarks", "demos", "docs")
    paths = [path for part in parts for path in (ROOT.parents[1] / part).rglob("*")]
    source = [path for path in paths if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".def", ".md")]
    assert len(source) > 300
    assert not {path.name: n for path in source if (n := len(path.read_text("utf-8").splitlines())) > 500}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of its body, beside the signature and the docstring."""
    first = function.body[1] if ast.get_docstring(function) is not None and function.body[1:] else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def test_no_function_is_long():
    parts = ("plugin", "export", "tests", "benchmarks", "demos", "wheels")
    functions = {
        f"{path.name}: {node.name}": lines_of(node)
        for part in parts
        for path in (ROOT.parents[1] / part).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert len(functions) > 3000
    assert not {name: n for name, n in functions.items() if n > 50}
