"""The list of commands, which stands apart from them: `pgqueue --help` imports none."""

from __future__ import annotations

import click
import pytest

from pgqueue.cli.main import cli


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_a_command_is_listed_as_it_says_itself(name: str) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert not command.hidden
    assert cli.commands[name] is not command
    for room in (45, 1000):
        assert cli.commands[name].get_short_help_str(room) == command.get_short_help_str(room)


def test_the_help_is_what_click_would_print() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    plain = click.Group(commands={name: command for name, command in commands.items() if command})
    plain.list_commands = cli.list_commands  # type: ignore[method-assign]
    lazily, at_once = click.HelpFormatter(width=80), click.HelpFormatter(width=80)
    cli.format_commands(context, lazily)
    plain.format_commands(click.Context(plain), at_once)
    assert lazily.getvalue() == at_once.getvalue()


@pytest.mark.parametrize("start", ["", "in", "d", "--", "nothing"])
def test_a_shell_completes_what_click_would(start: str) -> None:
    context = click.Context(cli)
    lazily = {(item.value, item.help) for item in cli.shell_complete(context, start)}
    assert lazily == {(item.value, item.help) for item in click.Group.shell_complete(cli, context, start)}


def test_a_misspelt_command_is_recognised() -> None:
    with pytest.raises(click.UsageError, match="No such command 'enqeue'"):
        cli.resolve_command(click.Context(cli), ["enqeue"])
    assert cli.get_command(click.Context(cli), "enqeue") is None
