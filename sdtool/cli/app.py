"""The typer application: commands that load when they are asked for, with common options."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup, TyperOption

from sdtool import __version__
from sdtool.cli.invocation import Invocation
from sdtool.model.scope import Scope

COMMANDS = {
    "list": "sdtool.cli.units",
    "trace": "sdtool.cli.units",
    "port": "sdtool.cli.ports",
    "ports": "sdtool.cli.ports",
    "pid": "sdtool.cli.units",
    "stop": "sdtool.cli.stop",
    "doctor": "sdtool.cli.doctor",
    "sandbox": "sdtool.cli.sandbox",
}
"""Each command and the module that has it, in the order of the help."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported on their first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command and give it the common options."""
        if cmd_name not in COMMANDS:
            return None
        function = getattr(import_module(COMMANDS[cmd_name]), f"{cmd_name}_command")
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        settings = getattr(function, "context_settings", {})
        app.command(cmd_name, context_settings=settings)(function)
        command = typer.main.get_command(app)
        command.params += [*getattr(function, "options", ()), *common_options()]
        return command


def build_app(invocation: Invocation) -> click.Command:
    """The application, ready to parse into ``invocation``."""
    app = typer.Typer(cls=LazyGroup, rich_markup_mode=None)
    settings = {"obj": invocation, "help_option_names": ["-h", "--help"]}

    @app.callback(invoke_without_command=True, context_settings=settings)
    def sdtool(
        ctx: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=print_version)
        ] = False,
    ) -> None:
        """See systemd's units with their processes and ports, and stop them while watching."""
        invocation.command = ctx.invoked_subcommand or ""
        if ctx.invoked_subcommand is None:
            typer.echo(ctx.get_help())

    return typer.main.get_command(app)


def print_version(wanted: bool) -> None:
    """One line, then the end."""
    if wanted:
        typer.echo(f"sdtool {__version__}")
        raise typer.Exit


def common_options() -> list[click.Parameter]:
    """The options that every command takes; they land in the ``Invocation``."""
    return [
        _option("--user/--system", "scope", "Ask your own user manager. [default: --system]"),
        _option("--json", "json", "Print one JSON document.", is_flag=True),
        _option(
            "--color",
            "color",
            "When to colour.",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
        ),
        _option("-v/ ", "verbose", "Say more.", is_flag=True),
        _option("--debug", "debug", "Log what is done; show tracebacks.", is_flag=True),
    ]


def _option(declaration: str, name: str, text: str, **settings: Any) -> TyperOption:
    return TyperOption(
        param_decls=[*declaration.removesuffix("/ ").split(" "), name],
        help=text,
        expose_value=False,
        callback=_store,
        **settings,
    )


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    invocation = ctx.find_object(Invocation)
    if invocation is None or value is None:
        return
    if param.name == "scope":
        invocation.scope = Scope.USER if value else Scope.SYSTEM
    elif param.name == "json":
        invocation.json = invocation.json or value
    else:
        setattr(invocation, param.name or "", value)
