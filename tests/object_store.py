"""The S3 server of the tests, which is that of the benches."""

from cpcscale.bench.object_store import ObjectStore, run_object_store

__all__ = ["ObjectStore", "run_object_store"]
