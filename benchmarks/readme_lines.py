"""The README's sentence on its first command, and its three lines on long context."""

from benchmarks.causal_table import attention_alone
from benchmarks.prefill_table import PREFILLS
from benchmarks.results_files import RESULTS, ResultRow, read_json, read_reports
from benchmarks.ruler_table import RulerRuns, share_of_all

# A comparison of the command's settings on a CPU.
FIRST_COMMAND = RESULTS / "first_command" / "two-cores.json"


def first_command() -> str:
    """Speed and picture of the first command's sparse steps, and how they were compared."""
    record = read_json(FIRST_COMMAND)
    (row,) = (row for row in record["rows"] if row["method"]["sparse"])
    return (
        f"On two CPU cores, a sparse step was {row['step_speedup']:.1f} times as fast as a dense "
        f"one, at a PSNR of {row['psnr']:.0f} dB against the dense video\n"
        f"(`{record['command']}`).\n"
    )


def long_context() -> str:
    """The lines on speed, the longest prompt and accuracy."""
    files = read_reports(PREFILLS).values()
    compared = max((one for one in files if "speedup" in one), key=lambda one: one["tokens"])
    longest = max(files, key=lambda one: one["tokens"])
    lines = [_speed(compared), _memory(longest), _accuracy(RulerRuns.read())]
    return "".join(f"- {line}\n" for line in lines)


def _speed(file: ResultRow) -> str:
    sparse, dense = file["runs"]["sparse"], file["runs"]["dense"]
    report = sparse["report"]
    layers = [one["sparse"] > 0 for one in report["layers"]]
    share = share_of_all(report["density"], sum(layers), len(layers))
    return (
        f"Speed: {_what(file)} in {sparse['seconds']:.1f} s instead of {dense['seconds']:.1f} s, "
        f"{file['speedup']:.2f}x as fast, with {_blocks(share, report['density'])} "
        f"({file['device']}, random weights){attention_alone(file['tokens'])}."
    )


def _memory(file: ResultRow) -> str:
    sparse = file["runs"]["sparse"]
    return (
        f"Length: {_what(file)} in {sparse['seconds']:.1f} s and "
        f"{sparse['peak_memory_gib']:.1f} GiB ({file['device']}, random weights); `--plan` tells "
        "the memory beforehand."
    )


def _accuracy(runs: RulerRuns | None) -> str:
    if runs is None or not runs.solved:
        return "Accuracy: not measured on a trained model yet."
    length = runs.lengths[-1]
    dense, *others = runs.settings
    name = f"the model `{runs.reports[0]['model']}`"
    if runs.solved == runs.tasks:
        where = f"{name} on all {len(runs.tasks)} RULER tasks run here"
    else:
        where = (
            f"on the {len(runs.solved)} of the {len(runs.tasks)} RULER tasks run here that "
            f"{name} solves"
        )
    parts = []
    for setting in others:
        found = runs.scores(runs.solved, length, setting)
        share = runs.share_of_all(runs.solved, length, setting)
        parts.append(f"{found.score:.3f} with {setting} ({_blocks(share, found.density)})")
    return (
        f"Accuracy: {where}, at {length:,} tokens, "
        f"{runs.scores(runs.solved, length, dense).score:.3f} with dense attention, "
        f"{', '.join(parts)}."
    )


def _blocks(share: float | None, density: float | None) -> str:
    """The share of all layers' blocks, and that of the sparse layers' where some are dense."""
    of_all = f"{share:.1%} of the blocks"
    return of_all if share == density else f"{of_all}, {density:.1%} in its sparse layers"


def _what(file: ResultRow) -> str:
    return f"{file['tokens']:,} tokens prefilled at the size of {file['model'].split(':')[-1]}"
