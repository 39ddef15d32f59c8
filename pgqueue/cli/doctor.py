"""`pgqueue doctor`: what is wrong, what it means, and the command that mends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, Final

import click
from rich.text import Text

from pgqueue import __version__
from pgqueue.cli.context import Context
from pgqueue.cli.options import Duration, json_option, who
from pgqueue.cli.output import clean, plural, progress_bar, show, show_json, table
from pgqueue.cli.status import ExitStatus, status_of
from pgqueue.database.doctor.examine import CHECKS, examine, fix, open_visit, unreachable, why_not
from pgqueue.database.doctor.report import LEVELS, Check, Finding, Level, at_least
from pgqueue.errors import DatabaseUnavailable, PgQueueError, shown

_STYLES: Final = {
    "error": "bold red",
    "warning": "bold yellow",
    "hint": "cyan",
    "ok": "green",
    "fixed": "green",
    "skipped": "dim",
}


class _CheckName(click.Choice[str]):
    """One of many: too many for an error message to name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        near = get_close_matches(str(value), self.choices, n=1)
        if value not in self.choices:
            way = f"did you mean {near[0]!r}? " if near else ""
            self.fail(f"must be the name of a check, got {shown(value)}; {way}see --list", param, ctx)
        return str(value)


@click.command(
    epilog="""\b
Examples:
  pgqueue doctor
  pgqueue doctor --fix
  pgqueue doctor --only snapshots --only dead-rows --older-than 30s
  pgqueue doctor --json --fail-on warning | jq '.checks[].findings[] | .mend'

Exit status: 0 if there is nothing at --fail-on or above it, 1 if there is; 4 if the database cannot be
reached, 5 if the schema is missing or at a revision that this release does not work with."""
)
@click.option(
    "--fix",
    "fixes",
    is_flag=True,
    help="Do what is safe: make partitions, set storage settings, vacuum, end canvases that hang; each act "
    "is written to the audit log.",
)
@click.option(
    "--fail-on",
    type=click.Choice(LEVELS),
    default="error",
    show_default=True,
    help="The least level that makes the exit status 1.",
)
@click.option(
    "--only",
    type=_CheckName(list(CHECKS)),
    multiple=True,
    metavar="CHECK",
    help="Make only this check; may be given again.",
)
@click.option(
    "--older-than",
    type=Duration(),
    default="5m",
    show_default=True,
    metavar="TIME",
    help="A transaction older than this is a warning, one twelve times as old an error.",
)
@click.option("--list", "names_only", is_flag=True, help="List the checks, and make none.")
@json_option
@click.pass_obj
def doctor(
    context: Context,
    fixes: bool,
    fail_on: Level,
    only: tuple[str, ...],
    older_than: float,
    names_only: bool,
    as_json: bool,
) -> int:
    """Look for what is wrong with the queue and its database, and say what mends it.

    It only reads, unless there is --fix, and takes a second or two however many jobs there are.
    """
    names = [name for name in CHECKS if name in only or not only]
    if names_only:
        _list(names, as_json=as_json)
        return ExitStatus.DONE
    dsn, config = context.database, context.config
    failure: PgQueueError | None
    try:
        with (
            progress_bar("looking", len(names), shown=True) as advance,
            open_visit(
                dsn,
                schema=config.schema,
                listen=config.listen,
                listen_dsn=config.listen_dsn,
                old=older_than,
                release=__version__,
            ) as visit,
        ):
            checks = examine(visit, names, advance)
            if fixes:
                for check in checks:
                    fix(visit, check, by=who())
            failure = why_not(visit, names)
    except DatabaseUnavailable as error:
        failure, checks = error, unreachable(error, dsn, names)
    failed = [check for check in checks if at_least(check.level, fail_on)]
    status = status_of(failure) if failure is not None else ExitStatus.FAILED if failed else ExitStatus.DONE
    if as_json:
        show_json({"ok": status == ExitStatus.DONE, "checks": [_document(check) for check in checks]})
    else:
        for check in checks:
            _show(check, fixes=fixes)
        show(Text(f"\n{plural(len(checks), 'check')}: {_summary(checks)}"))
    if status != ExitStatus.DONE:
        said = clean(failure) if failure is not None else f"doctor has found {_summary(checks)}"
        click.echo(f"pgqueue: {said}", err=True)
    return status


def _list(names: list[str], *, as_json: bool) -> None:
    if as_json:
        show_json([{"name": name, "about": CHECKS[name].about} for name in names])
    else:
        show(table(("check", "looks at"), [(name, CHECKS[name].about) for name in names]))


def _document(check: Check) -> dict[str, Any]:
    findings = [
        {name: value for name, value in asdict(each).items() if name not in ("atomic", "act")}
        for each in check.findings
    ]
    return {
        "name": check.name,
        "level": check.level,
        "fact": check.fact,
        "skipped": check.skipped,
        "findings": findings,
    }


def _show(check: Check, *, fixes: bool) -> None:
    if not check.findings:
        _line(check.level, check.name, check.skipped or check.fact)
    for finding in check.findings:
        _line("fixed" if finding.fixed else finding.level, check.name, finding.what)
        _part("means:", finding.means, show_text)
        fix_does_it = "   (--fix does it)" if finding.fixable and not fixes else ""
        _part("mend: ", f"{clean(finding.mend)}{fix_does_it}", click.echo)  # not wrapped: it is copied
        if finding.fixed:
            _part("done: ", "by --fix, and written to the audit log", show_text)
        elif finding.refused is not None:
            _part("not done:", finding.refused, show_text)


def show_text(text: str) -> None:
    """A line, wrapped on a terminal."""
    show(Text(text))


def _line(level: str, name: str, text: str) -> None:
    show(Text.assemble((f"{level:<9}", _STYLES[level]), f"{name:<16}", clean(text)))


def _part(word: str, text: str, tell: Callable[[str], None]) -> None:
    tell(f"    {word} {clean(text)}")


def _summary(checks: list[Check]) -> str:
    """`1 error, 2 warnings`, of what is left."""
    left: list[Finding] = [each for check in checks for each in check.findings if not each.fixed]
    counts = Counter(finding.level for finding in left)
    said = [plural(counts[level], level) for level in reversed(LEVELS) if counts[level]]
    fixed = sum(each.fixed for check in checks for each in check.findings)
    return ", ".join([*said, *([f"{fixed} fixed"] if fixed else [])]) or "nothing is wrong"
