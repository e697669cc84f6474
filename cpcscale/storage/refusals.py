"""What a store's refusal means: its own reason, and the way out.

botocore and s3fs are not imported here: their errors carry the reply as `response`.
"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

# Codes of refusals that last, and what to do; a retry cures none of them.
_LASTING = {
    "ExpiredToken|ExpiredTokenException|TokenRefreshRequired|RequestExpired": (
        "the session has ended: log in again, or set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    ),
    "InvalidToken|InvalidSecurity": "check AWS_SESSION_TOKEN, which belongs to other keys: unset it for keys that last",
    "RequestTimeTooSkewed": "set this machine's clock{skew}",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that AWS_ENDPOINT_URL is the store of this key",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, and that no proxy changes requests on their way",
    "AccessDenied|AllAccessDisabled|AccountProblem|NotSignedUp": (
        "check that the owner of AWS_ACCESS_KEY_ID may read, write, list and delete there, and AWS_SECRET_ACCESS_KEY"
    ),
    "NoSuchBucket|InvalidBucketName": "check the bucket's name, and AWS_ENDPOINT_URL",
    "PermanentRedirect|TemporaryRedirect|Redirect|301|307|AuthorizationHeaderMalformed"
    "|IllegalLocationConstraintException": "the bucket is in another region: set AWS_DEFAULT_REGION{region}",
    "InvalidObjectState": "the object is archived: restore it first (aws s3api restore-object)",
    "KeyTooLongError": "use shorter names",
    "QuotaExceeded|InsufficientStorage|XMinioStorageFull|507": "free some space in the store",
    "NotImplemented|501|MethodNotAllowed|405": "the store does not offer this: use another one, or a local folder",
}
_NO_STORE = "check AWS_ENDPOINT_URL, which may name no S3 server, and HTTPS_PROXY, which may need a login"


def lasts(code: str) -> bool:
    """Whether a refusal with this code comes again, whatever its status."""
    return any(re.fullmatch(codes, code) for codes in _LASTING)


def is_page(content_type: str) -> bool:
    """Whether a reply is a page for people, as proxies and consoles send it."""
    return "html" in content_type.lower()


def reply_of(error: BaseException) -> dict[str, Any]:
    """The store's reply in `error`, empty where the store did not reply."""
    found = (getattr(one, "response", None) for one in (error, error.__cause__))
    return next((response for response in found if isinstance(response, dict)), {})


def status_and_code(error: BaseException) -> tuple[int, str]:
    """(HTTP status, error code) of the store's reply in `error`; (0, "") where the store did not reply."""
    reply = reply_of(error)
    return int(reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), str(reply.get("Error", {}).get("Code", ""))


def explain(error: BaseException) -> tuple[str, str]:
    """(the reason in the store's words, the way out) of an error; the way out is empty where none is known."""
    reply, (status, code) = reply_of(error), status_and_code(error)
    headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if is_page(headers.get("content-type", "")):
        return f"a web page came in place of the store's reply, HTTP {status}", _NO_STORE
    if not reply:
        return f"{type(error).__name__}: {error}", ""
    told = reply.get("Error", {})
    known = {"skew": _skew(headers.get("date", "")), "region": ""}
    if region := headers.get("x-amz-bucket-region") or told.get("Region"):
        known["region"] = f"={region}"
    way_out = next((way for codes, way in _LASTING.items() if re.fullmatch(codes, code)), "")
    return f"the store says {code}: {told.get('Message', '')}", way_out.format(**known)


def clock_s(date: str) -> float | None:
    """How many seconds this machine's clock is ahead of a `Date` header; None without one."""
    try:
        return time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None


def _skew(date: str) -> str:
    ahead = clock_s(date)
    if ahead is None:
        return ""
    return f", which is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
