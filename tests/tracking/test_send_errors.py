"""Which refusals of a tracking store cost a record, and which make it wait."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from cpcscale.tracking import tracker
from cpcscale.tracking.outbox import StoreAwayError


def test_a_record_waits_for_a_store_that_may_take_it_later_and_else_does_not_hold_up_the_rest(caplog):
    for_good = ["BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS", "NOT_IMPLEMENTED", "FEATURE_DISABLED"]
    for_good += ["INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "QUOTA_EXCEEDED"]
    later = ["INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"]
    later += ["PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND"]
    sink = tracker._MlflowSink(None, "a run")
    for code in for_good:
        with sink._errors(f"the values {code}"):
            raise MlflowException(f"no: {code}", getattr(databricks_pb2, code))
        assert f"refuses the values {code}" in caplog.text
    for code in later:
        with pytest.raises(StoreAwayError), sink._errors("the values"):
            raise MlflowException("not now", getattr(databricks_pb2, code))
    with pytest.raises(StoreAwayError), sink._errors("the values"):
        raise ConnectionRefusedError
