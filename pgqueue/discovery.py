"""What installed distributions offer: applications by name, and task modules for an application.

Two groups of entry points, in the words of a distribution's `pyproject.toml`::

    [project.entry-points."pgqueue.apps"]
    shop = "shop.app:app"            # `-A shop`; with no -A the only one that is installed

    [project.entry-points."pgqueue.tasks"]
    shop = "shop_reports.tasks"      # a module that workers of PgQueue("shop") import

Reading them imports nothing of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pgqueue.errors import ConfigError, shown

APPS: Final = "pgqueue.apps"
TASKS: Final = "pgqueue.tasks"


@dataclass(frozen=True, slots=True, order=True)
class Offer:
    """One entry point.

    Attributes:
        value: `module:attribute`, or a module.
        by: The distribution that offers it, with its version.
    """

    name: str
    value: str
    by: str


def offers(group: str, name: str | None = None) -> list[Offer]:
    """The entry points of a group, sorted; of this name only, if one is given."""
    from importlib.metadata import entry_points

    chosen = entry_points(group=group) if name is None else entry_points(group=group, name=name)
    found: dict[tuple[str, str], Offer] = {}
    for each in chosen:
        # Two distributions may carry the same files: one offer.
        by = f"{each.dist.name} {each.dist.version}" if each.dist is not None else "an unknown distribution"
        found.setdefault((each.name, each.value), Offer(each.name, each.value, by))
    return sorted(found.values())


def task_modules(application: str) -> list[tuple[str, str]]:
    """Modules with tasks for the application of this name, each with the distribution that offers it."""
    return [(offer.value.partition(":")[0].strip(), offer.by) for offer in offers(TASKS, application)]


def find_target(target: str | None) -> str | None:
    """The application as `module:attribute`, or as `target` says it, if that is no installed one's name.

    Args:
        target: None for the only one that is installed.

    Returns:
        None if there is none.

    Raises:
        ConfigError: Several applications are installed, or have this name.
    """
    if target is not None and (not target or ":" in target):
        return target
    found = offers(APPS, target)
    if not found:
        return target
    if len(found) > 1:
        listed = ", ".join(f"{offer.name} ({offer.value}, of {offer.by})" for offer in found)
        if target is None:
            raise ConfigError(
                f"{len(found)} applications are installed: {listed}; choose one with -A NAME or "
                "-A module:attribute"
            )
        raise ConfigError(
            f"{len(found)} installed applications are named {shown(target)}: {listed}; choose one with "
            "-A module:attribute"
        )
    return found[0].value
