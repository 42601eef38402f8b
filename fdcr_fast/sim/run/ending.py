"""How commands end that do not end well: bad input, a full disk, Ctrl-C."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from pydantic import ValidationError

from fdcr_fast.sim.notation import explain
from fdcr_fast.sim.run.callbacks import PartError
from fdcr_fast.sim.run.folder import RunFolder

PROGRAM = "fdcr-fast"
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


def command_line(*arguments: str | Path) -> str:
    """A command of this program, quoted for a shell."""
    return shlex.join([PROGRAM, *map(str, arguments)])


def resume_command(folder: Path | None) -> str:
    """What to do about a run that was to be in a folder: how to resume it, if it has begun."""
    if folder is None:
        return "Nothing is kept of a run without --out."
    if not RunFolder(folder).config_path.exists():
        return "The run had not begun: start it anew."
    return f"Resume with: {command_line('simulate', '--resume', folder)}"


@contextmanager
def clear_ending(advice: Callable[[], str]) -> Iterator[None]:
    """End in a message instead of a traceback: exit code 1 for bad input and errors of the system, 130 for Ctrl-C.

    Args:
        advice: Tells how to go on with what has begun, after Ctrl-C or an error of the system, such as a full disk.
    """
    try:
        yield
    except ValidationError as error:
        raise click.ClickException(explain(error)) from error
    except (ValueError, OSError) as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None
        raise click.ClickException(f"{error}\n{advice()}" if of_the_system else str(error)) from error
    except PartError as error:
        raise click.ClickException(f"{error}\n{advice()}") from error
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. {advice()}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
