"""Find the application that a command or a worker is for: `module:attribute`."""

from __future__ import annotations

import importlib
import os
import sys

from pgqueue.app import PgQueue
from pgqueue.errors import ConfigError, shown


def load_app(target: str) -> PgQueue:
    """Import the application named `module:attribute`, also from the current directory.

    Raises:
        ConfigError: There is no such module or attribute, or it is no PgQueue. Whatever else importing it
        raises
            comes through.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon:
        attribute = "app"
    parts = [*module_name.split("."), attribute]
    if not all(part.isidentifier() for part in parts):  # a relative name, a path: importing says less of them
        raise ConfigError(
            f"an application is named module:attribute, got {shown(target)}; for example shop.app:app"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"no module {error.name!r} here ({os.getcwd()}) or on the Python path, needed for -A {target}"
        ) from error
    app = getattr(module, attribute, None)
    if not isinstance(app, PgQueue):
        found = sorted(name for name, value in vars(module).items() if isinstance(value, PgQueue))
        hint = f"; there is {', '.join(f'{module_name}:{name}' for name in found)}" if found else ""
        raise ConfigError(
            f"{target!r} must be a PgQueue, {module_name} has {attribute!r} = {shown(app)}{hint}"
        )
    return app
