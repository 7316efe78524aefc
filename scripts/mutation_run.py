"""Mutation testing of the operator, the policy and the processors.

    pip install cosmic-ray coverage
    python -m scripts.mutation_run mutants.json --number 100

First every test file runs once, and the lines that each test reaches are recorded. Then, for every
mutant of cosmic-ray, the tests that reach its line run, the quickest first. Each runs in a process
forked from one that has already imported torch and Diffusers.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDERS = ("ops", "policy", "processors")
COPIED = ("xattn_video", "tests", "eval_vbench", "benchmarks", "scripts", "integrations", "docs")
USES_THEM = re.compile(r"from (xattn_video(\.(ops|policy|processors|compat)\S*)?|hunyuan) import")
# Operators that are equivalent for small integers and singletons.
SAME = ("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")
BASELINE_SECONDS = 600.0
# Of the tests that reach a line, as many run as fit in this time.
TEST_SECONDS = 15.0
# If the tests take longer, the mutant is taken to have made them hang.
TIMEOUT_SECONDS = 120.0


def draw_mutants(number: int, seed: int, folders: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Draw random mutants: first a place in the code, then an operator for it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name) for name in operator_names() if not name.endswith(SAME)}
    places = collections.defaultdict(list)
    for path in (path for name in folders for path in Path("xattn_video", name).rglob("*.py")):
        code = path.read_text()
        nodes, skipped = list(ast_nodes(get_ast(code))), list(_skipped_ranges(ast.parse(code)))
        for name, operator in operators.items():
            # Operators with arguments need names of variables.
            positions = [] if operator.arguments() else map(operator().mutation_positions, nodes)
            for count, (start, end) in enumerate(place for found in positions for place in found):
                if not any(first <= start < last for first, last in skipped):
                    places[str(path), start, end].append((name, count))
    draw = random.Random(seed)
    for place in draw.sample(sorted(places), min(number, len(places))):
        file, (line, _), _ = place
        name, count = draw.choice(places[place])
        before = Path(file).read_text()
        after = mutate_code(before, operators[name](), count)
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        with contextlib.suppress(SyntaxError):
            compile(after, file, "exec")
            yield {"file": file, "line": line, "diff": list(lines)[3:], "code": after}


def _skipped_ranges(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges without mutants: annotations, decorators, f-strings and raise statements."""
    skipped: list[Any] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg):
            skipped.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            skipped += [getattr(node, "returns", None), *node.decorator_list]
        elif isinstance(node, ast.JoinedStr | ast.Raise):
            skipped.append(node)
    for node in filter(None, skipped):
        yield (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def tests_of(mutant: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The quickest tests that reach the line, or the file if the line runs at import."""
    file, line = mutant["file"], mutant["line"]
    reaching = [test for test, (_, lines) in known.items() if line in lines.get(file, ())]
    reaching = reaching or [test for test, (_, lines) in known.items() if file in lines]
    chosen, seconds = [], 0.0
    for test in sorted(reaching, key=lambda test: known[test][0]):
        seconds += known[test][0]
        if seconds < TEST_SECONDS:
            chosen.append(test)
    return chosen


def meet(tree: Path, mutant: dict[str, Any], tests: list[str]) -> str:
    """The outcome of a mutant."""
    if not tests:
        return "no test"
    path = tree / mutant["file"]
    before = path.read_text()
    path.write_text(mutant["code"])
    code = run_apart(tree, tests, TIMEOUT_SECONDS, None)
    path.write_text(before)
    return {None: "timeout", 0: "survived"}.get(code, "killed")


def run_apart(tree: Path, tests: list[str], seconds: float, notes: Path | None) -> int | None:
    """The exit code of pytest in a separate process; None if it took too long."""
    child: Any = multiprocessing.get_context("fork").Process(
        target=_run_tests, args=(tree, tests, notes)
    )
    child.start()
    child.join(seconds)
    code: int | None = child.exitcode
    with contextlib.suppress(ProcessLookupError):
        # Also ends the processes that the tests started.
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    return code


def _run_tests(tree: Path, tests: list[str], notes: Path | None) -> None:
    import coverage
    import pytest

    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    here = Path.cwd()
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path) != here)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if notes is None:
        os._exit(pytest.main([*options, "-x", *tests]))
    watch = coverage.Coverage(data_file=None, config_file=False, source=[str(tree / COPIED[0])])
    seconds: dict[str, float] = {}

    class Notes:
        """Records which test runs, and the seconds of those that pass."""

        @pytest.hookimpl
        def pytest_runtest_logstart(self, nodeid: str) -> None:
            watch.switch_context(nodeid)

        @pytest.hookimpl
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" and report.passed:
                seconds[report.nodeid] = report.duration

    watch.start()
    pytest.main([*options, *tests], plugins=[Notes()])
    watch.stop()
    reached: dict[str, dict[str, list[int]]] = {test: {} for test in seconds}
    for file in watch.get_data().measured_files():
        for line, contexts in watch.get_data().contexts_by_lineno(file).items():
            for test in reached.keys() & set(contexts):
                reached[test].setdefault(str(Path(file).relative_to(tree)), []).append(line)
    notes.write_text(json.dumps({test: (seconds[test], reached[test]) for test in seconds}))
    os._exit(0)


def write_results(path: Path, mutants: list[dict[str, Any]]) -> None:
    """Replace the file; `xattn_video.files` must not be imported here, as mutants change it."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(mutants, indent=1))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def typed_path(text: str) -> Path:
    """A path with ~ and $VARIABLES expanded."""
    return Path(os.path.expandvars(os.path.expanduser(text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=typed_path, help="the JSON file to write")
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", nargs="*", default=FOLDERS, choices=FOLDERS)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument(
        "--tests", nargs="*", help="test files; default: all that use the mutated code"
    )
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    mutants = list(draw_mutants(args.number, args.seed, args.folders))
    files = args.tests or [
        str(path) for path in Path("tests").glob("test_*.py") if USES_THEM.search(path.read_text())
    ]
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        tree, known = Path(folder), {}
        for name in (*COPIED, "pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md"):
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy
            copy(name, tree / name)
        for file in files:
            notes = tree / "notes.json"
            notes.unlink(missing_ok=True)
            run_apart(tree, [file], BASELINE_SECONDS, notes)
            known |= json.loads(notes.read_text()) if notes.exists() else {}
        for mutant in mutants:
            tests = tests_of(mutant, known)
            mutant["outcome"] = "not run" if time.monotonic() > end else meet(tree, mutant, tests)
            mutant["tests"], mutant["code"] = len(tests), ""
            write_results(args.results, mutants)
    print(dict(collections.Counter(mutant["outcome"] for mutant in mutants)))


if __name__ == "__main__":
    main()
