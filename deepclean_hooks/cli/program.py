"""The program: its commands, and its exit codes."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from deepclean_hooks.cli import parser
from deepclean_hooks.cli.forget import Forget, forget, is_first
from deepclean_hooks.guard.guard import GuardError
from deepclean_hooks.report.printable import printable, shortened

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {"forget": (Forget, forget)}


def add_commands(commands: Any) -> None:
    """Adds every command to an argparse parser's subparsers."""
    for name, (options, _) in COMMANDS.items():
        words = (options.__doc__ or "").splitlines()[0]
        parser.add_options(commands.add_parser(name, help=words, description=words), options)


def run(given: dict[str, Any]) -> int:
    """0 if all went well, 1 if frozen weights moved, 2 for what cannot be followed or read, in one
    line; 3, with the trace, for anything else."""
    name = given["command"]
    kind, command = COMMANDS[name]
    try:
        options = parser.read(kind, given)
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
