"""A bucket of a real S3 API on this machine (moto), for tests of object storage."""

import contextlib
import itertools

from moto.server import ThreadedMotoServer

NAMES = itertools.count()


@contextlib.contextmanager
def s3_server(environment):
    """A server; `environment` (a pytest MonkeyPatch) then leads every S3 client, also of child processes, to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        environment.setenv(name, value)
    try:
        yield
    finally:
        server.stop()


def new_bucket():
    """The URL of a new bucket."""
    import s3fs

    name = f"bucket{next(NAMES)}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"
