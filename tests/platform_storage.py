"""Runs the storage of a platform for tests of a mesh: PostgreSQL for rows, S3 (by moto) for artifacts."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.services.admission.postgres import NoPostgresError, running_postgres


@contextmanager
def platform_storage() -> Iterator[dict[str, str]]:
    """Yield the settings of all services. Skips the test if no PostgreSQL can start."""
    try:
        with running_postgres() as postgres, running_s3() as url:
            yield {"MUXTUNE_DATABASE_URL": postgres.new_database(), "MUXTUNE_ARTIFACT_URL": url}
    except NoPostgresError as error:
        pytest.skip(f"no PostgreSQL can start here: {error}")


@contextmanager
def running_s3() -> Iterator[str]:
    """Yield the URL of a folder in the bucket "muxtune". Within the block the environment has its credentials."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="muxtune")
            yield "s3://muxtune/mesh"
    finally:
        server.stop()
