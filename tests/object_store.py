"""The S3 server of the tests, which is that of the benches."""

from cpcscale.bench.object_store import ObjectStore, running

__all__ = ["ObjectStore", "running"]
