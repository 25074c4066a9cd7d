"""`grit`: one command, each subcommand imported only when it is used."""

from __future__ import annotations

import importlib
import sys

import click

from grit_impl.errors import GRITError, RunFailed
from grit_impl.processes import place

# name: (module, attribute, one line for `grit --help`)
COMMANDS = {
    "verify": ("grit_impl.verify.commands", "verify", "Train, export, evaluate and judge all arms (runs pytest)."),
    "try": ("grit_impl.tryout.commands", "try_", "Does GRIT help on my data? Tuned LoRA against GRIT, one page."),
    "train": ("grit_impl.runs.commands", "train", "Train one arm and leave a run record."),
    "export": ("grit_impl.export.commands", "export", "Write a run as GGUF, adapter or Ollama model, and verify it."),
    "serve": ("grit_impl.serve.commands", "serve", "Serve GGUF files through Ollama's API."),
    "deploy": ("grit_impl.export.commands", "deploy", "Create a model in a real Ollama."),
    "evaluate": ("grit_impl.evaluate.commands", "evaluate", "Evaluate models behind an Ollama API."),
    "alignment-index": (
        "grit_impl.evaluate.commands_alignment",
        "alignment_index",
        "How far apart a model keeps safe and unsafe prompts.",
    ),
    "compare": ("grit_impl.curves.commands", "compare", "Compare runs that already exist, from their logs."),
    "verdict": ("grit_impl.ledger.commands", "verdict", "Did a run's modified gradients matter, and if not, why not?"),
    "probe": ("grit_impl.probe.commands", "probe", "Show which callback events and hooks fire, in which order."),
    "faults": ("grit_impl.zoo.matrix", "faults", "Print the confusion matrix of the fault zoo."),
    "sweep": ("grit_impl.sweep.commands", "sweep", "Compare update rules over many small trainings, by a plan."),
    "report": ("grit_impl.verify.commands", "report", "Write the report again, or against an earlier one."),
    "baseline": ("grit_impl.verify.commands", "baseline", "Promote results to the baseline of later reports."),
}

# What a command needs beside the core, as pyproject.toml names it; the others need nothing more.
EXTRAS = {
    "verify": "all",
    "try": "train,export,evaluate",
    "train": "train",
    "export": "export",
    "serve": "serve",
    "deploy": "export",
    "evaluate": "evaluate",
    "alignment-index": "evaluate",
    "compare": "logs",
    "probe": "train",
    "faults": "train",
    "sweep": "train,report",
    "report": "all",
    "baseline": "all",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, line = COMMANDS[cmd_name]
        if ctx.resilient_parsing or "--help" in sys.argv[1:2]:
            return click.Command(cmd_name, short_help=line)
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _with_extra(name, line)) for name, (_, _, line) in COMMANDS.items()])


def _with_extra(name: str, line: str) -> str:
    return f"{line}  [{EXTRAS[name]}]" if name in EXTRAS else line


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="grit-verify", prog_name="grit")
def cli() -> None:
    """GRIT: Fisher-preconditioned LoRA, and evidence for every claim about it.

    In a checkout, start with `make verify`: it needs no GPU, no model hub and no Ollama. Elsewhere with `grit train`,
    and `grit verdict` on what it leaves. In brackets: what a command needs beside the core, pip install
    'grit-verify[NAME]'.
    """


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit status 2."""
    try:
        status = cli.main(standalone_mode=False)
    except GRITError as error:
        # Of processes that train together, the first says for all what all of them find.
        if isinstance(error, RunFailed) or place()[0] == 0:
            click.echo(f"error: {_one_line(str(error))}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        command, package = next(iter(sys.argv[1:]), ""), (error.name or "").partition(".")[0]
        if command not in EXTRAS or package in ("", "grit_impl"):
            raise
        click.echo(
            f"error: grit {command} needs the package {package}: pip install 'grit-verify[{EXTRAS[command]}]'", err=True
        )
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written, a name that is too long
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        click.echo(f"error: {_one_line(what)}", err=True)
        sys.exit(2)
    except RecursionError:  # json follows some thousand brackets; no file of ours, of a server's or of a model has them
        click.echo("error: a file or an answer that was read is nested too deeply", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    # Without standalone mode click returns the status of ctx.exit instead of leaving with it.
    sys.exit(status if isinstance(status, int) else 0)


def _one_line(text: str) -> str:
    """With what would end a line, or cannot be printed, in its escaped form: messages quote what users gave."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    main()
