"""Where platforms keep a mesh's state, for its tests: rows in PostgreSQL, artifacts in S3 (by moto)."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.services.admission.postgres import NoPostgresError, running_postgres


@contextmanager
def elsewhere() -> Iterator[dict[str, str]]:
    """Settings for all services. Skips the test where no PostgreSQL can start."""
    try:
        with running_postgres() as postgres, running_s3() as url:
            yield {"MUXTUNE_DATABASE_URL": postgres.new_database(), "MUXTUNE_ARTIFACT_URL": url}
    except NoPostgresError as error:
        pytest.skip(f"no PostgreSQL can start here: {error}")


@contextmanager
def running_s3() -> Iterator[str]:
    """The URL of a folder in a bucket "muxtune"; who is in the block or started in it has the keys."""
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
