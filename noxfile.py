"""The tests on every Python that is installed: ``nox``, or ``make matrix``."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.13t", "3.14t"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Install metastore, as a user would, and run the tests against it."""
    session.install("-e", ".[dev,demo]")
    # An extension that does not declare itself safe would switch the lock on again.
    session.run("python", "-W", "error", "-c", "import metastore")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest dependencies that pyproject.toml allows."""
    session.install("-e", ".[dev,demo]")
    project = nox.project.load_toml("pyproject.toml")["project"]
    session.install(*(line.replace(">=", "==") for line in project["dependencies"]))
    session.run("python", "-m", "pytest", *session.posargs)
