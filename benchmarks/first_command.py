"""The README's sentence on its first command, from a comparison of its settings on a CPU."""

from benchmarks.results_files import RESULTS, read_json

FILE = RESULTS / "first_command" / "two-cores.json"


def render() -> str:
    """Speed and picture of the first command's sparse steps, and how they were compared."""
    record = read_json(FILE)
    (row,) = (row for row in record["rows"] if row["method"]["sparse"])
    return (
        f"On two CPU cores, a sparse step was {row['step_speedup']:.1f} times as fast as a dense "
        f"one, at a PSNR of {row['psnr']:.0f} dB against the dense video\n"
        f"(`{record['command']}`).\n"
    )
