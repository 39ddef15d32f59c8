"""Make .venv ready to run pgqueue, from nothing but Python 3.11 and a package index.

    python3 scripts/bootstrap.py install    # what `make install` runs
    python3 scripts/bootstrap.py lock       # what `make lock` runs

Standard library only. The environment is built in four steps (venv, pip, the pinned packages,
pgqueue itself), and a stamp is written last: a second run with nothing changed ends at once, a run
that was interrupted is started over from an empty .venv. Two runs at once wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "pgqueue-install.stamp"
UNFINISHED = VENV / "pgqueue-install.unfinished"
LOG = VENV / "pgqueue-install.log"
LOCK = ROOT / "requirements.lock"
PYPROJECT = ROOT / "pyproject.toml"
DEBIAN_WHEELS = Path("/usr/share/python-wheels")
DEBIAN_PYTHON = "/usr/bin/python3"

LOCK_HEADER = """\
# The exact versions that `make install` puts into .venv: pgqueue with all its extras, for every
# supported Python and platform. Written by `make lock` from pyproject.toml; do not edit by hand.
"""


class BootstrapError(Exception):
    """Something the person at the keyboard can mend; shown as one line."""


def say(message: str) -> None:
    print(f"install: {message}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv ready to run pgqueue.")
    parser.add_argument("command", choices=["install", "lock"])
    parser.add_argument("--base", metavar="PYTHON", help="rebuild .venv if it was made by another Python")
    arguments = parser.parse_args()
    try:
        if sys.version_info < (3, 11):  # noqa: UP036  (this runs before anything has checked)
            raise BootstrapError(f"pgqueue needs Python 3.11 or newer, this is {sys.version.split()[0]}")
        with one_at_a_time():
            install(base=arguments.base)
            if arguments.command == "lock":
                lock()
    except BootstrapError as error:
        print(f"install: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall: interrupted; the next run starts over", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a file lock, so that a second `make` in the same checkout waits for the first."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (ROOT / ".venv.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another install is running here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def install(*, base: str | None) -> None:
    if base and PYTHON.exists() and venv_home() != base_home(base):
        say(f".venv was made by another Python than {base}; building it anew")
        shutil.rmtree(VENV)
    wanted = fingerprint()
    if not UNFINISHED.exists() and read(STAMP) == wanted and venv_works():
        return
    started = time.monotonic()
    # A package whose files were half copied still counts as installed for pip: only an empty .venv is
    # known to be good after an interruption.
    if VENV.exists() and (UNFINISHED.exists() or not STAMP.exists() or not venv_works()):
        say("the .venv here is unfinished or broken; building it anew")
        shutil.rmtree(VENV)
    if not VENV.exists():
        say(f"making .venv with Python {sys.version.split()[0]} ({sys.executable})")
        VENV.mkdir()
        UNFINISHED.touch()
        make_venv()
    UNFINISHED.touch()
    pip = find_pip()
    install_pinned(pip)
    say("installing pgqueue itself (editable)")
    editable = ["--no-deps", "--no-build-isolation", "--no-compile", "--editable", str(ROOT)]
    run_logged([*pip, "install", *editable])
    compile_all()
    # The new stamp first: with both files there, or neither, the next run does the safe thing.
    scratch = STAMP.with_suffix(".new")
    scratch.write_text(fingerprint())
    scratch.replace(STAMP)
    UNFINISHED.unlink()
    say(f"done in {time.monotonic() - started:.0f} s")


def lock() -> None:
    pip = find_pip()
    if not (PYTHON.parent / "uv").exists():
        say("getting uv, which writes the lock file")
        run_logged([*pip, "install", "uv"])
    say("resolving")
    scratch = LOCK.with_suffix(".lock.new")
    if LOCK.exists():
        shutil.copyfile(LOCK, scratch)  # keeps what is pinned where it still fits
    command = [str(PYTHON.parent / "uv"), "pip", "compile", "pyproject.toml", "--no-config", "--quiet"]
    command += ["--all-extras", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-emit-index-url", "--no-header", "--output-file", scratch.name]
    if os.environ.get("UPGRADE"):
        command.append("--upgrade")
    try:
        if subprocess.run(command, cwd=ROOT).returncode:
            raise BootstrapError("uv could not resolve pyproject.toml; its message is above")
        body = scratch.read_text()
        if "://" in body:
            raise BootstrapError("the lock names a host; make sure that every package comes from the index")
        scratch.write_text(LOCK_HEADER + body)
        scratch.replace(LOCK)
    finally:
        scratch.unlink(missing_ok=True)
    say(f"wrote {LOCK.name}; `make install` brings .venv up to it")


def fingerprint() -> str:
    """What the installed .venv depends on. The path is part of it: a venv cannot be moved."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (PYPROJECT, LOCK):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def venv_works() -> bool:
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    return PYTHON.exists() and not venv_was_moved() and quiet([str(PYTHON), "-I", "-S", "-c", code])


def venv_was_moved() -> bool:
    """Its Python would still run, but its commands name the Python of the place where it was made."""
    made = re.search(r"^command\s*=\s*(.+)$", read(VENV / "pyvenv.cfg") or "", re.MULTILINE)
    return made is not None and not made[1].endswith(str(VENV))


def venv_home() -> str | None:
    found = re.search(r"^home\s*=\s*(.+)$", read(VENV / "pyvenv.cfg") or "", re.MULTILINE)
    return os.path.realpath(found[1]) if found else None


def base_home(python: str) -> str:
    code = "import sys, os; print(os.path.dirname(os.path.realpath(sys._base_executable)))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def make_venv() -> None:
    """A venv without pip: this much works even where Debian has split ensurepip off."""
    try:
        import venv
    except ImportError:
        raise BootstrapError(
            f"{sys.executable} has no venv module; run `apt-get install python3-venv` or use another Python"
        ) from None
    builder = venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False)
    try:
        builder.create(VENV)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BootstrapError(f"could not make {VENV}: {error}") from error


def find_pip() -> list[str]:
    """The command line of a pip that installs into .venv, from the first source that has one."""
    for source in (pip_inside, pip_by_ensurepip, pip_of_the_system, pip_from_debian_wheels, pip_by_apt):
        pip = source()
        if pip:
            return [*pip, "--disable-pip-version-check", "--no-input"]
    raise BootstrapError(
        "no pip for .venv: this Python has no ensurepip and the system has no pip 22.3 or newer; "
        "run `apt-get install python3-venv` as root (or install pip), then `make install` again"
    )


def pip_inside() -> list[str] | None:
    pip = [str(PYTHON), "-m", "pip"]
    return pip if quiet([*pip, "--version"]) else None


def pip_by_ensurepip() -> list[str] | None:
    if not quiet([str(PYTHON), "-c", "import ensurepip; ensurepip.version()"]):
        return None
    say("putting pip into .venv (ensurepip)")
    quiet([str(PYTHON), "-m", "ensurepip", "--upgrade", "--default-pip"])
    return pip_inside()


def pip_of_the_system() -> list[str] | None:
    for python in dict.fromkeys((sys.executable, DEBIAN_PYTHON)):
        pip = [python, "-m", "pip", "--python", str(PYTHON)]
        if os.access(python, os.X_OK) and quiet([*pip, "--version"]):
            say(f"using the pip of {python}")
            return pip
    return None


def pip_from_debian_wheels() -> list[str] | None:
    for wheel in sorted(DEBIAN_WHEELS.glob("pip-*.whl"), reverse=True):
        pip = [str(PYTHON), str(wheel / "pip")]
        if quiet([*pip, "--version"]):
            say(f"using {wheel}")
            return pip
    return None


def pip_by_apt() -> list[str] | None:
    if os.name == "nt" or os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    say("apt-get install python3-pip python3-venv (no pip was found)")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "python3-pip", "python3-venv"]
    if not quiet(apt, env=env):
        quiet(["apt-get", "update", "-q"], env=env)
        quiet(apt, env=env)
    return pip_by_ensurepip() or pip_of_the_system() or pip_from_debian_wheels()


def install_pinned(pip: list[str]) -> None:
    total = sum(1 for line in LOCK.read_text().splitlines() if re.match(r"[A-Za-z0-9].*==", line))
    say(f"installing up to {total} pinned packages from {LOCK.name}; the first time takes about a minute")
    command = [*pip, "install", "--progress-bar=off", "--require-hashes", f"--requirement={LOCK}"]
    # The lock is complete, so pip need not resolve; Python compiles what it imports. 49 s became 27 s.
    run_logged([*command, "--no-deps", "--no-compile"], total=total)


def compile_all() -> None:
    """Where Python keeps no bytecode, every process would compile all it imports: seconds for each worker."""
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        say("compiling, because PYTHONDONTWRITEBYTECODE is set")
        quiet(
            [
                str(PYTHON),
                "-m",
                "compileall",
                "-q",
                "-j",
                "0",
                str(PYTHON.parent.parent),
                str(ROOT / "pgqueue"),
            ]
        )


def run_logged(command: list[str], *, total: int = 0) -> None:
    """Run pip with its output in the log, showing one short line of progress."""
    terminal = sys.stdout.isatty()
    seen = 0
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None  # noqa: S101
        try:
            for line in process.stdout:
                log.write(line)
                found = re.match(r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)", line)
                if found and total:
                    seen += 1
                    if terminal:
                        print(f"\r\033[Kinstall: {seen}/{total} {found[1]}", end="", flush=True)
                    elif seen % 25 == 0:
                        say(f"{seen}/{total}")
                elif line.startswith("Installing collected"):
                    if terminal:
                        print("\r\033[K", end="")
                    say("unpacking")
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if terminal and total:
        print("\r\033[K", end="", flush=True)
    if status:
        tail = LOG.read_text(errors="replace").splitlines()[-15:]
        print("\n".join(f"    {line}" for line in tail), file=sys.stderr)
        raise BootstrapError(f"pip failed (its last lines are above, all of it is in {LOG})")


def quiet(command: list[str], env: dict[str, str] | None = None) -> bool:
    try:
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
