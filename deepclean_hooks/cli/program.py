"""The program: its commands, and its exit codes."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepclean_hooks.cli import parser
from deepclean_hooks.cli.forget import Forget, forget
from deepclean_hooks.cli.judging import Compare, Evaluate, compare, evaluate
from deepclean_hooks.cli.listing import Methods, methods
from deepclean_hooks.cli.measuring import Measure, Sweep, measure, sweep
from deepclean_hooks.cli.request import is_first
from deepclean_hooks.guard.guard import GuardError
from deepclean_hooks.report.printable import printable, shortened

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "forget": (Forget, forget),
    "measure": (Measure, measure),
    "sweep": (Sweep, sweep),
    "evaluate": (Evaluate, evaluate),
    "compare": (Compare, compare),
    "methods": (Methods, methods),
}


def add_commands(commands: Any) -> None:
    """Adds every command to an argparse parser's subparsers."""
    for name, (options, _) in COMMANDS.items():
        words = (options.__doc__ or "").splitlines()[0]
        made = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        parser.add_options(made, options)


def run(given: Mapping[str, Any], unknown: Sequence[str]) -> int:
    """0 if all went well, 1 if nothing was selected or frozen weights moved, 2 for what cannot be
    followed or read, in one line; 3, with the trace, for anything else."""
    name = given["command"]
    kind, command = COMMANDS[name]
    try:
        options = parser.read(kind, given, unknown)
        if given.get("print_config"):
            sys.stdout.write(parser.as_yaml(options))
            return 0
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _warned
            return command(options)
    except GuardError as reason:
        return _told(name, reason, 1)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as reason:
        return _told(name, reason, 2)
    except Exception:
        traceback.print_exc()
        return 3


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    if is_first():
        print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _told(name: str, reason: Exception, code: int) -> int:
    line = " ".join(str(reason).split())
    print(f"cannot {name}: {shortened(printable(line), 1500)}", file=sys.stderr)
    return code
