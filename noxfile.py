"""Development tasks. ``nox -l`` lists them; ``nox --no-venv -s NAME`` runs one in the current environment."""

from __future__ import annotations

import difflib
import shutil
import tomllib
from pathlib import Path

import nox
from nox.virtualenv import PassthroughEnv

ROOT = Path(__file__).parent
METHODS = "rtn,sq,quarot,mquant"

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests"]


def install(session: nox.Session, *groups: str, project: bool = True) -> None:
    """Installs dependency groups at the pinned versions; does nothing where the current environment is used."""
    if isinstance(session.virtualenv, PassthroughEnv):
        return
    selection = [f"--group={group}" if project else f"--only-group={group}" for group in groups]
    environment = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location}
    session.run_install("uv", "sync", "--quiet", "--inexact", *selection, env=environment, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and import order."""
    install(session, "lint", project=False)
    session.run("ruff", "check", ".", *session.posargs)


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy over everything that is packaged."""
    install(session, "typecheck")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, without benchmarks: ``nox -s tests -- tests/test_table.py -k caption``."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Timings of kernels and of quantization (pytest-benchmark)."""
    install(session, "test")
    session.run("pytest", "tests/benchmarks", "--timeout=0", *session.posargs)


@nox.session
def tables(session: nox.Session) -> None:
    """Renders every table and figure again from ``results/records``; fails where ``results/rendered`` differs."""
    install(session)
    committed, now = ROOT / "results" / "rendered", Path(session.create_tmp()) / "rendered"
    shutil.rmtree(now, ignore_errors=True)
    for kind in ("table", "figure"):
        session.run("mqbench", kind, "all", "--render", str(now), silent=True)
    session.run("mqbench", "bench", "report", "--render", str(now), silent=True)
    names = sorted({path.name for folder in (committed, now) for path in folder.iterdir() if is_compared(path)})
    changed = [name for name in names if not is_current(session, committed / name, now / name)]
    if changed:
        what = "mqbench table all, mqbench figure all, mqbench bench report"
        session.error(f"not what the records say: {', '.join(changed)}; run {what}")


def is_compared(path: Path) -> bool:
    """All but drawings, which differ between versions of the drawing library; their data and captions count."""
    return path.suffix not in {".png", ".svg", ".pdf"}


def is_current(session: nox.Session, committed: Path, now: Path) -> bool:
    """Compares one file with what was rendered now; shows the difference."""
    old, new = (path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in (committed, now))
    for line in difflib.unified_diff(old, new, f"{committed.name} (committed)", f"{now.name} (now)", lineterm=""):
        session.log(line)
    return old == new and committed.is_file() and now.is_file()


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on four rows per benchmark: minutes shorter than the whole, and no evidence."""
    install(session)
    out = session.create_tmp()
    what = ("--models", "all", "--methods", METHODS, "--limit", "4")
    session.run("mqbench", "eval", *what, "--out", out, *session.posargs)


@nox.session(venv_backend="none")
def pins(session: nox.Session) -> None:
    """Prints the pinned versions as a constraints file for pip: ``nox -s pins > constraints.txt``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    print(*settings["tool"]["uv"]["constraint-dependencies"], sep="\n")
