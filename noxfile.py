"""Tasks: ``nox`` runs the quick loop. docs/CONTRIBUTING.md says what the others are for."""

import nox

nox.options.sessions = ["lint", "types", "quick"]
nox.options.reuse_existing_virtualenvs = True
CONSTRAINTS = ".ci/constraints.txt"
QUICK = "not engine and not scale and not slow"


def install(session: nox.Session, extra: str) -> None:
    session.install("-c", CONSTRAINTS, "-e", f".[{extra}]")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    install(session, "dev")
    session.run("mypy")


@nox.session
def quick(session: nox.Session) -> None:
    """All tests but those with real engines, those that measure memory, and long lists of inputs."""
    install(session, "test")
    session.run("pytest", "-n", "2", "--dist", "loadfile", "-m", QUICK, *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests, as CI runs them."""
    install(session, "test")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """What the quick tests run through. Under Python 3.11 that takes three times as long as without."""
    install(session, "test")
    session.run("pytest", "-n", "2", "--dist", "loadfile", "-m", QUICK, "--cov", *session.posargs)


@nox.session
def changelog(session: nox.Session) -> None:
    """Collect docs/changes into the changelog, under the version in pyproject.toml."""
    session.install("towncrier>=24")
    session.run("towncrier", "build", "--yes", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build wheel and sdist, and run the demo from the wheel alone."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", session.create_tmp(), "--wheel", "--sdist", ".")
    wheels = session.run(
        "python",
        "-c",
        f"import glob; print(glob.glob({session.create_tmp()!r} + '/*.whl')[0])",
        silent=True,
    )
    session.install("-c", CONSTRAINTS, str(wheels).strip())
    session.run("ckpt-tool", "demo")
