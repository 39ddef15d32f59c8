"""docker-compose.yml is valid, and what it names is there.

compose-spec.json is the Compose Specification's JSON schema, published by the compose-spec project
under the Apache License 2.0 (the text in LICENSE), taken unchanged from check-jsonschema 0.39.0.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text())


def load(text: str | None = None) -> dict[str, Any]:
    document = yaml.safe_load(text or (ROOT / "docker-compose.yml").read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture
def services() -> dict[str, Any]:
    found = load()["services"]
    assert isinstance(found, dict)
    return found


def seconds(duration: str) -> float:
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    assert parts, f"{duration!r} is no duration"
    return sum(int(number) * units[unit] for number, unit in parts)


def our_arguments(service: dict[str, Any]) -> list[list[str]]:
    """The pgqueue command lines that a service runs, without `pgqueue` itself."""
    lines = [service["command"]] if "command" in service else []
    check = service.get("healthcheck", {}).get("test", [])
    if check[:2] == ["CMD", "pgqueue"]:
        lines.append(check[2:])
    return lines


def test_it_follows_the_compose_specification() -> None:
    jsonschema.validate(load(), SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("stop_grace_period:", "stop_grace_perod:"),
        ("condition: service_healthy", "condition: service_helthy"),
        ("restart: unless-stopped", "restart: [unless-stopped]"),
    ],
)
def test_the_check_sees_mistakes(right: str, wrong: str) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert right in text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(load(text.replace(right, wrong)), SCHEMA, cls=jsonschema.Draft202012Validator)


def test_dependencies_are_services_and_can_become_what_is_waited_for(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} depends on {needed}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], f"{name} waits for {needed}, which has no check"


def test_ports_are_open_to_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_the_database_keeps_its_data(services: dict[str, Any]) -> None:
    assert services["postgres"]["image"] == "postgres:18"
    assert services["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert "postgres" in load()["volumes"]


def test_the_worker_may_finish_before_it_is_killed(services: dict[str, Any]) -> None:
    assert seconds(services["worker"]["stop_grace_period"]) > 25


def test_the_url_names_the_database_service(services: dict[str, Any]) -> None:
    database = services["postgres"]["environment"]
    for name in ("migrate", "worker"):
        url = services[name]["environment"]["PGQUEUE_DSN"]
        user, database_name = database["POSTGRES_USER"], database["POSTGRES_DB"]
        assert url == f"postgresql://{user}:{database['POSTGRES_PASSWORD']}@postgres:5432/{database_name}"


def test_the_commands_exist(services: dict[str, Any]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["pgqueue"] == "pgqueue.cli.main:main"
    module = importlib.import_module("pgqueue.cli.main")
    assert callable(module.main)
    group = next(value for value in vars(module).values() if isinstance(value, click.Group))
    lines = [line for service in services.values() for line in our_arguments(service)]
    assert len(lines) == 3
    for line in lines:
        parse(group, line)


def parse(command: click.Command, line: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line down to its last subcommand without running anything."""
    context = command.make_context(command.name, list(line), parent=parent)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, f"no command {name!r}"
        parse(found, rest, context)


def test_the_shop_is_where_the_worker_looks(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = services["worker"]["command"]
    module, attribute = command[command.index("-A") + 1].split(":")
    assert "ENV PYTHONPATH=/app/examples" in (ROOT / "Dockerfile").read_text()
    monkeypatch.syspath_prepend(ROOT / "examples")
    known = set(sys.modules)
    try:
        assert hasattr(importlib.import_module(module), attribute)
    finally:
        for name in set(sys.modules) - known:
            if name.split(".")[0] == module.split(".")[0]:
                del sys.modules[name]


def test_the_image_is_built_from_files_that_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER (?!root)\w+", dockerfile, re.MULTILINE), "the image runs as root"
    kept = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"COPY {source}"
            assert f"!{source}\n" in kept, f"{source} is not in the build context"
