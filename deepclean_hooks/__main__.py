"""`python -m deepclean_hooks verify report.json CHECKPOINT`: does a report fit a model?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepclean_hooks.report.verify import verify
from deepclean_hooks.stored import checkpoint


def main(arguments: list[str] | None = None) -> int:
    """0 if every check holds, 1 if one does not, 2 for files that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m deepclean_hooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="recompute the digests and figures of a report")
    command.add_argument("report", type=Path, help="report.json, as Report.to_json() wrote it")
    command.add_argument("checkpoint", type=Path, help="the unlearned model's state_dict")
    command.add_argument("--original", type=Path, help="the original model's state_dict")
    given = parser.parse_args(arguments)
    try:
        report = json.loads(given.report.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError(f"{given.report} holds no report")
        names = report.get("checkpoint_after", {})
        after = checkpoint.read(given.checkpoint, names)
        before = None if given.original is None else checkpoint.read(given.original, names)
        checks = verify(report, after, before)
    except (OSError, ValueError, KeyError, TypeError) as reason:
        print(f"cannot verify: {type(reason).__name__}: {reason}", file=sys.stderr)
        return 2
    wrong, skipped = (sum(check.right is right for check in checks) for right in (False, None))
    print("\n".join(map(str, checks)))
    held = f"{len(checks) - skipped} checks hold" + (f", {skipped} skipped" if skipped else "")
    print(f"{wrong} of {len(checks)} checks failed" if wrong else held)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
