"""Fixtures: admission on SQLite, and on PostgreSQL where a module needs both."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.admission.store.database import Database
from services.storage.artifact_store import ArtifactStore
from tests.services.admission.admission_mesh import Admission, Alignment
from tests.services.admission.postgres import NoPostgresError, Postgres, running_postgres
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    try:
        with running_postgres() as server:
            yield server
    except NoPostgresError as error:
        pytest.skip(f"no PostgreSQL can start here: {error}")


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a database with all tables and no rows."""
    path = tmp_path_factory.mktemp("migrated") / "muxtune.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgresql(postgres: Postgres) -> str:
    """Return the URL of a database with all tables and no rows."""
    url = postgres.new_database()
    migrate(url)
    return url


def migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a copy of a migrated database: SQLite in a file, or PostgreSQL as well by
    `parametrize("database_url", DATABASES, indirect=True)`."""
    if getattr(request, "param", "sqlite") == "postgresql":
        url: str = request.getfixturevalue("postgres").new_database(request.getfixturevalue("migrated_postgresql"))
        return url
    shutil.copyfile(request.getfixturevalue("migrated_sqlite"), tmp_path / "muxtune.db")
    return f"sqlite:///{tmp_path / 'muxtune.db'}"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def alignment(tmp_path: Path, tokenizer: Path) -> AsyncIterator[Alignment]:
    running = await Alignment.start(ArtifactStore.open(str(tmp_path / "artifacts")), tokenizer, tmp_path / "scratch")
    yield running
    await running.server.stop(None)


@pytest.fixture
async def admission(database_url: str, tmp_path: Path, alignment: Alignment) -> AsyncIterator[Admission]:
    """Run admission with one executor of the backbone "tiny" registered: executors/one, lease term 1."""
    running = Admission(database_url, tmp_path / "artifacts", alignment.address)
    await running.start()
    await running.register()
    yield running
    await running.close()
