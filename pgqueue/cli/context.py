"""What the options before the command say: which application, which database."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import click

from pgqueue.errors import AppNotLoaded, PgQueueError

if TYPE_CHECKING:
    from pgqueue.app import PgQueue
    from pgqueue.config import Config


@dataclass
class Context:
    """The root command's options."""

    target: str | None
    dsn: str | None
    schema: str | None

    @cached_property
    def application(self) -> str | None:
        """Which application to load, as module:attribute: what -A says, else the only one installed.

        Raises:
            ConfigError: Several are installed.
        """
        from pgqueue.discovery import find_target

        return find_target(self.target)

    @cached_property
    def app(self) -> PgQueue | None:
        """The application, imported with its tasks; None when -A was not given and a database was."""
        if self.target is None and (self.dsn or os.environ.get("PGQUEUE_DSN")):
            return None  # it can do without: what happens to be installed need not even be importable
        target = self.application
        if target is None:
            return None
        from pgqueue.loading import load_app

        try:
            with contextlib.redirect_stdout(sys.stderr):  # what it prints is not what the command answers
                app = load_app(target)
                app.configure(dsn=self.dsn, schema=self.schema)
                app.import_tasks()
        except AppNotLoaded as error:
            raise AppNotLoaded(f"cannot load {target}: {error}") from error
        except PgQueueError:
            raise  # it says by itself what is wrong, and where
        except (Exception, SystemExit) as error:
            where = traceback.format_exc().rstrip()
            raise AppNotLoaded(f"cannot load {target}: {type(error).__name__}: {error}\n{where}") from error
        return app

    @cached_property
    def config(self) -> Config:
        """The settings: flags beat the application's, which beat the environment."""
        if self.app is not None:
            return self.app.config
        from pgqueue.config import Config

        return Config.load(os.environ, dsn=self.dsn, schema=self.schema)

    @property
    def database(self) -> str:
        """The DSN; a usage error when nobody names one."""
        if self.config.dsn is None:
            raise click.UsageError("no database: pass --dsn, set PGQUEUE_DSN, or name an application with -A")
        return self.config.dsn
