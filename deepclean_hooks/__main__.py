"""The command line: unlearn, and what can be done with a report that was written down."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TextIO

from deepclean_hooks.cli import program
from deepclean_hooks.cli.parser import Misused, Parser, refuse
from deepclean_hooks.report import html, small_sets, stored_report
from deepclean_hooks.report.printable import printable, shortened
from deepclean_hooks.report.verify import unvouched, verify
from deepclean_hooks.stored import checkpoint
from deepclean_hooks.stored.files import write_text


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if a check does not hold, 2 for what cannot be followed or read."""
    try:
        given, unknown = _parser().parse_known_args(arguments)
        if given.command not in program.COMMANDS:
            refuse(unknown, [])
    except Misused as reason:
        _say(str(reason), sys.stderr)
        return 2
    if given.command in program.COMMANDS:
        return program.run(vars(given), unknown)
    try:
        return _verify(given) if given.command == "verify" else _page(given)
    except Exception as reason:  # whatever a damaged file brings about, its reader gets one line
        _say(f"cannot {given.command}: {type(reason).__name__}: {reason}", sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="deepclean-hooks", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    program.add_commands(commands)
    report = "report.json, as Report.to_json() wrote it"
    command = commands.add_parser("verify", help="does a report fit a model?")
    command.add_argument("report", type=Path, help=report)
    command.add_argument("checkpoint", type=Path, help="the unlearned model's file or folder")
    command.add_argument("--original", type=Path, help="the original model's file or folder")
    command.add_argument(
        "--state", help="the only state_dict of the checkpoint to look at: its key"
    )
    command = commands.add_parser("page", help="the page of a report, as one HTML file")
    command.add_argument("report", type=Path, help=report)
    words = "also figures of fewer than ten samples, which tell of single ones"
    command.add_argument("--exact", action="store_true", help=words)
    command.add_argument("--output", type=Path, help="the page (default: beside the report)")
    return parser


def _verify(given: argparse.Namespace) -> int:
    report = stored_report.load(given.report)
    after = checkpoint.read(given.checkpoint)
    before = None if given.original is None else checkpoint.read(given.original)
    checks = verify(report, after, before, state=given.state)
    wrong, skipped = (sum(check.right is right for check in checks) for right in (False, None))
    for check in checks:
        _say(str(check))
    _say(f"nothing here vouches for: {', '.join(unvouched(report))}")
    held = f"{len(checks) - skipped} checks hold" + (f", {skipped} skipped" if skipped else "")
    _say(f"{wrong} of {len(checks)} checks failed" if wrong else held)
    return 1 if wrong else 0


def _page(given: argparse.Namespace) -> int:
    output = given.output or given.report.with_suffix(".html")
    report = stored_report.checked(stored_report.load(given.report))
    if report["digest"] not in (None, stored_report.digest(report)):
        words = "the report was damaged or edited after it was written: its digest does not fit"
        report["warnings"] = [*report["warnings"], words]
    text = html.page(report if given.exact else small_sets.withheld(report))
    write_text(output, text)
    _say(str(output))
    return 0


def _say(line: str, stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = shortened(printable(line), 1500)
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


if __name__ == "__main__":
    sys.exit(main())
