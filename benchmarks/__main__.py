"""``python -m benchmarks run NAME | list | table | plot``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import results, runner
from benchmarks.harness import Options
from benchmarks.members import MEMBERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benchmarks")
    run = commands.add_parser("run", help="measure and write JSON")
    run.add_argument("names", nargs="+", choices=[*MEMBERS, "all"], metavar="NAME")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32"
    )
    run.add_argument("--case", action="append", help="only cases whose name contains this text")
    run.add_argument("--side", action="append", help="only this side and the baseline")
    run.add_argument("--seconds", type=float, help="time for the timed rounds of each case")
    run.add_argument("--threads", type=int, help="torch.set_num_threads; default torch's own")
    run.add_argument(
        "--quick", action="store_true", help="tiny inputs, figures without meaning, to try it"
    )
    run.add_argument(
        "--output",
        type=Path,
        help="folder for the JSON; benchmarks/results, or with --quick, --case or --side nowhere",
    )
    for name, text in (("table", "print Markdown"), ("plot", "write a PNG beside each JSON")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--results", type=Path, default=results.FOLDER)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    options = Options(
        arguments.device,
        arguments.dtype,
        arguments.quick,
        arguments.seconds,
        arguments.threads,
        arguments.side,
    )
    # must not replace a full result
    partial = arguments.quick or arguments.case or arguments.side
    folder = arguments.output or (None if partial else results.FOLDER)
    names = list(MEMBERS) if "all" in arguments.names else arguments.names
    for name in names:
        try:
            result = runner.run(
                MEMBERS[name],
                options,
                arguments.case,
                lambda s: print(s, flush=True),
                lambda part: folder is not None and results.write(part, folder),
            )
        except (runner.WorkerFailedError, ValueError) as error:
            print(f"{name}: nothing is reported. {error}", file=sys.stderr)
            return 1
        print(results.table(result))
        if folder is not None:
            print(f"wrote {results.write(result, folder)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command == "list":
        for name, member in MEMBERS.items():
            print(f"{name:24} {member.about}")
        return 0
    if arguments.command == "run":
        return _run(arguments)
    found = results.load_all(arguments.results)
    if not found:
        print(f"no results in {arguments.results}", file=sys.stderr)
        return 1
    for path, result in found:
        if arguments.command == "table":
            print(results.table(result))
        else:
            from benchmarks.plot import plot

            print(f"wrote {plot(result, path.with_suffix('.png'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
