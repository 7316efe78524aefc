"""Mutation testing of the operator, the policy and the processors.

    python -m scripts.mutation_run sample mutants.json --number 320    # needs cosmic-ray
    python -m scripts.mutation_run run mutants.json results.json --jobs 12    # needs coverage

First every test runs once and what lines it reaches is noted; then each mutant meets the tests
that reach its line, the quickest first, in a process that has torch and Diffusers loaded already.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDERS = ("ops", "policy", "processors")
COPIED = ("xattn_video", "tests", "eval_vbench", "benchmarks", "scripts", "integrations", "docs")
USES_THEM = re.compile(r"from (xattn_video(\.(ops|policy|processors|compat)\S*)?|hunyuan) import")
BASELINE_SECONDS = 150.0
# Of the tests that reach a line, as many as fit.
TEST_SECONDS = 15.0
# A mutant whose tests take longer has made them wait for ever.
TIMEOUT_SECONDS = 60.0


def sample(args: argparse.Namespace) -> None:
    """Draw mutants: a place in the code first, then what happens to it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name) for name in operator_names() if _differs(name)}
    places = collections.defaultdict(list)
    for path in (path for name in FOLDERS for path in Path("xattn_video", name).rglob("*.py")):
        code = path.read_text()
        nodes, skipped = list(ast_nodes(get_ast(code))), _skipped_ranges(ast.parse(code))
        for name, operator in operators.items():
            # Those with arguments need names of variables.
            positions = [] if operator.arguments() else map(operator().mutation_positions, nodes)
            for number, (start, end) in enumerate(place for found in positions for place in found):
                if not any(first <= start < last for first, last in skipped):
                    places[str(path), start, end].append((name, number))
    draw = random.Random(args.seed)
    mutants = []
    for place in draw.sample(sorted(places), min(args.number, len(places))):
        file, (line, _), _ = place
        name, number = draw.choice(places[place])
        before = Path(file).read_text()
        after = mutate_code(before, operators[name](), number)
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        with contextlib.suppress(SyntaxError):
            compile(after, file, "exec")
            mutants.append({"file": file, "line": line, "diff": list(lines)[3:], "code": after})
    args.mutants.write_text(json.dumps(mutants, indent=1))
    print(f"{len(mutants)} mutants of {len(places)} places")


def _differs(operator: str) -> bool:
    """Whether it can change what small numbers and singletons compare to."""
    return not operator.endswith(("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq"))


def _skipped_ranges(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Annotations, text, and what is raised: no test has to tell one from another."""
    skipped: list[Any] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg):
            skipped.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            skipped += [getattr(node, "returns", None), *node.decorator_list]
        elif isinstance(node, ast.JoinedStr | ast.Raise):
            skipped.append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and "TypeAlias" in ast.unparse(node):
            skipped.append(node.value)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in skipped
        if node is not None
    ]


def run(args: argparse.Namespace) -> None:
    """Run mutants until the time is over, and write what became of each."""
    end = time.monotonic() + args.seconds
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    # Loaded once; the process of each mutant is forked from this one.
    import coverage  # noqa: F401
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    mutants = json.loads(args.mutants.read_text())
    files = args.tests or [
        str(path) for path in Path("tests").glob("test_*.py") if USES_THEM.search(path.read_text())
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees = collections.deque(_copies(Path(folder), args.jobs))

        def in_tree(work: Callable[[Path], Any]) -> Any:
            tree = trees.popleft()
            try:
                return work(tree)
            finally:
                trees.append(tree)

        known: dict[str, Any] = {}
        for found in pool.map(lambda file: in_tree(lambda tree: _baseline(tree, file)), files):
            known |= found
        print(f"{len(known)} tests pass, {end - time.monotonic():.0f} s are left", flush=True)

        def outcome(mutant: dict[str, Any]) -> None:
            tests = _tests_of(mutant, known)
            mutant["tests"] = len(tests)
            if time.monotonic() > end:
                mutant["outcome"] = "not run"
            elif not tests:
                mutant["outcome"] = "no test"
            else:
                mutant["outcome"] = in_tree(lambda tree: _meet(tree, mutant, tests))

        list(pool.map(outcome, mutants))
    for mutant in mutants:
        del mutant["code"]
    args.results.write_text(json.dumps(mutants, indent=1))
    print(collections.Counter(mutant["outcome"] for mutant in mutants))


def _copies(folder: Path, number: int) -> Iterator[Path]:
    for tree in (folder / str(number) for number in range(number)):
        for name in COPIED:
            shutil.copytree(name, tree / name)
        for path in (*Path().glob("*.toml"), *Path().glob("*.md"), Path("setup.py")):
            shutil.copy(path, tree)
        yield tree


def _baseline(tree: Path, file: str) -> dict[str, Any]:
    """{test: its seconds and the lines that it reaches} of one file's tests that pass."""
    noted = tree / "noted.json"
    noted.unlink(missing_ok=True)
    _fork(tree, [file], BASELINE_SECONDS, noted)
    found: dict[str, Any] = json.loads(noted.read_text()) if noted.exists() else {}
    if not found:
        print(f"{file}: failed or too slow", flush=True)
    return found


def _tests_of(mutant: dict[str, Any], known: dict[str, Any]) -> list[str]:
    file, line = mutant["file"], mutant["line"]
    reaching = [test for test, (_, lines) in known.items() if line in lines.get(file, ())]
    if not reaching:
        # The line ran when the module was imported.
        reaching = [test for test, (_, lines) in known.items() if file in lines]
    chosen, seconds = [], 0.0
    for test in sorted(reaching, key=lambda test: known[test][0]):
        seconds += known[test][0]
        if seconds < TEST_SECONDS:
            chosen.append(test)
    return chosen


def _meet(tree: Path, mutant: dict[str, Any], tests: list[str]) -> str:
    path = tree / mutant["file"]
    before = path.read_text()
    path.write_text(mutant["code"])
    try:
        code = _fork(tree, tests, TIMEOUT_SECONDS, None)
    finally:
        path.write_text(before)
    return {None: "timeout", 0: "survived"}.get(code, "killed")


def _fork(tree: Path, tests: list[str], seconds: float, noted: Path | None) -> int | None:
    """The exit code of pytest in a process of its own; None if it took too long."""
    child: Any = multiprocessing.get_context("fork").Process(
        target=_run_tests, args=(tree, tests, noted)
    )
    child.start()
    child.join(seconds)
    code: int | None = child.exitcode
    with contextlib.suppress(ProcessLookupError):
        # What the tests started ends too.
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    return code


def _run_tests(tree: Path, tests: list[str], noted: Path | None) -> None:
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
    sys.dont_write_bytecode = True
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if noted is None:
        os._exit(pytest.main([*options, "-x", *tests]))
    watch = coverage.Coverage(data_file=None, config_file=False, source=[str(tree / COPIED[0])])
    seconds: dict[str, float] = {}

    class Notes:
        """Notes which test runs, and how long those that pass take."""

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
        name = str(Path(file).relative_to(tree))
        for line, contexts in watch.get_data().contexts_by_lineno(file).items():
            for test in reached.keys() & set(contexts):
                reached[test].setdefault(name, []).append(line)
    noted.write_text(json.dumps({test: (seconds[test], reached[test]) for test in seconds}))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    drawing = commands.add_parser("sample")
    drawing.add_argument("mutants", type=Path)
    drawing.add_argument("--number", type=int, default=320)
    drawing.add_argument("--seed", type=int, default=0)
    drawing.set_defaults(command=sample)
    running = commands.add_parser("run")
    running.add_argument("mutants", type=Path)
    running.add_argument("results", type=Path)
    running.add_argument("--jobs", type=int, default=1)
    running.add_argument("--seconds", type=float, default=3600)
    running.add_argument("--tests", nargs="*")
    running.set_defaults(command=run)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
