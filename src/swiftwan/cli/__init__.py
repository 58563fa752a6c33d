"""The command line: one function a verb, and the one place where errors become words and exit codes.

Exit codes: 0 done, 1 failed, 2 the request is wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from swiftwan.cli import bench, convert, distill, doctor, generate, info, models, serve, train, ui, verify
from swiftwan.errors import Cancelled, SwiftwanError

app = typer.Typer(
    name="swiftwan",
    help="Run, measure and fine-tune Wan video models, fast.",
    epilog="First video: swiftwan generate 'a red circle moves left over a blue background'",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)
for verb in (
    generate.generate,
    generate.explain,
    models.models,
    convert.convert,
    info.info,
    doctor.doctor,
    bench.bench,
    verify.verify,
    serve.serve,
    ui.ui,
):
    app.command()(verb)
train.app.command()(distill.distill)
app.add_typer(train.app, name="train", help="Fine-tune a LoRA, distill few-step students, train the embedded model.")


@app.callback(invoke_without_command=True)
def _before_any_verb(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from swiftwan.device import versions

        typer.echo(f"swiftwan {versions()['swiftwan']}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing raised by a user's mistake passes through."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _end("cancelled", Cancelled.exit_code)
    except Cancelled as error:
        return _end(str(error), error.exit_code)
    except SwiftwanError as error:
        return _end(f"error: {error}", error.exit_code)
    except Exception as error:
        # A wrong option or verb. Typer 0.20 raises click's class and 0.29 its own; both have this method.
        if hasattr(error, "format_message"):
            told = error.format_message()
            return _end(f"error: {told}", 2) if told else 2  # 'swiftwan train' alone has already shown its help
        if os.environ.get("SWIFTWAN_TRACEBACK"):
            traceback.print_exc()
        told = f"error: unexpected {type(error).__name__}: {error}"
        return _end(f"{told}; please report; run again with SWIFTWAN_TRACEBACK=1 for the traceback", 1)
    if code == Cancelled.exit_code:  # Typer catches Ctrl-C itself, and says nothing
        return _end("cancelled", code)
    return code if isinstance(code, int) else 0


def _end(line: str, code: int) -> int:
    typer.echo(" ".join(line.split()), err=True)
    sys.stderr.flush()
    return code
