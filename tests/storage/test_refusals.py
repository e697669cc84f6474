"""What a store refuses is told at once, in its own words, with the way out; what is no store's reply is told too."""

from __future__ import annotations

import itertools

import pytest

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.storage import StorageConfig

ACTIONS = {
    "read": storage.read,
    "exists": storage.exists,
    "list": storage.list_files,
    "size": storage.size,
    "write": lambda url: storage.write(url, b"x"),
    "create": lambda url: storage.create(url, b"x"),
}
REFUSALS = [
    (400, "ExpiredToken", "AWS_SESSION_TOKEN"),
    (400, "TokenRefreshRequired", "log in again"),
    (400, "InvalidToken", "AWS_SESSION_TOKEN"),
    (403, "RequestTimeTooSkewed", "clock"),
    (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    (403, "AccessDenied", "may read, write, list and delete"),
    (403, "InvalidObjectState", "restore"),
    (404, "NoSuchBucket", "bucket's name"),
    (301, "PermanentRedirect", "AWS_DEFAULT_REGION"),
    (400, "AuthorizationHeaderMalformed", "AWS_DEFAULT_REGION"),
    (507, "InsufficientStorage", "space"),
    (200, "AccessDenied", "may read, write, list and delete"),
]
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture
def url(faulty_s3) -> str:
    """An object behind the proxy, whose requests may take three seconds before one gives up."""
    storage.write(storage.join(faulty_s3.base, "x"), b"x")
    storage.configure(StorageConfig(backoff_base_s=0.01, total_timeout_s=3))
    return storage.join(faulty_s3.base, "x")


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert not isinstance(caught.value, storage.NotFoundError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_refusal_is_told_in_the_stores_words_with_the_way_out_and_never_as_nothing_there(faulty_s3, url):
    for status, code, way_out in REFUSALS:
        error = f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>by request</Message></Error>".encode()
        fault = faulty_s3.fail("reply", status=status, body=error)
        for name, action in ACTIONS.items():
            if status == 200 and name in ("read", "exists", "size"):
                continue  # Not a refusal of these: see below.
            before = fault.struck
            told = refusal(lambda action=action: action(url))
            assert code in told and "by request" in told and way_out in told, (name, told)
            assert url in told
            # A HEAD has no body: its reason takes another request, and botocore looks for the bucket's region.
            assert fault.struck - before <= 4, (name, code)
        faulty_s3.heal()


def test_a_clock_that_is_wrong_is_told_with_its_difference(faulty_s3, url):
    faulty_s3.fail("status", status=403, code="RequestTimeTooSkewed", date="Mon, 01 Jan 2001 00:00:00 GMT")
    told = refusal(lambda: storage.exists(url))
    assert " s ahead of the store's" in told and "RequestTimeTooSkewed" in told


def test_a_web_page_in_place_of_a_reply_is_never_an_object_nor_an_empty_folder(faulty_s3, url):
    for status, page in itertools.product((200, 301, 403, 407), (PAGE, b"<html><p>not even<br>closed")):
        fault = faulty_s3.fail("reply", status=status, body=page, content="text/html; charset=utf-8")
        for name, action in ACTIONS.items():
            before = fault.struck
            told = refusal(lambda action=action: action(url))
            assert "web page" in told and "HTTPS_PROXY" in told and "AWS_ENDPOINT_URL" in told, (name, told)
            assert fault.struck - before <= 4, (name, status)
        faulty_s3.heal()
    assert storage.read(url) == b"x"


def test_an_error_that_comes_as_an_object_is_tried_again_and_never_read_as_one(faulty_s3, url):
    error = b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>"
    fault = faulty_s3.fail("reply", times=2, status=200, body=error, method="GET")
    assert storage.read(url) == b"x"
    assert fault.struck == 2
    faulty_s3.fail("reply", status=200, body=error, method="GET")
    assert "XML" in refusal(lambda: storage.read(url))
    faulty_s3.heal()
    faulty_s3.fail("reply", times=2, status=200, method="HEAD")
    assert storage.size(url) == 1


def test_a_key_that_is_read_as_another_stops_the_listing_and_a_folders_own_empty_key_is_no_file(faulty_s3, url):
    def listing(*keys: str) -> bytes:
        root = storage.absolute(url).removeprefix("s3://speech/")
        found = "".join(f"<Contents><Key>{root}/{key}</Key><Size>{len(key) % 2}</Size></Contents>" for key in keys)
        return f"<?xml version='1.0'?><ListBucketResult>{found}</ListBucketResult>".encode()

    faulty_s3.fail("reply", times=1, status=200, body=listing("", "sub/s/", "b1", ".hidden//x"))
    assert storage.list_files(url) == ["b1"]
    for key in ("b//c", "/b", "a&#10;b"):
        faulty_s3.fail("reply", times=1, status=200, body=listing(key, "b1"))
        told = refusal(lambda: storage.list_files(url))
        assert repr(key.replace("&#10;", "\n"))[1:-1] in told


def test_a_bucket_with_dots_is_a_bucket(s3, tmp_path):
    filesystem = storage._open("s3://x/y")[0]
    filesystem.call_s3("create_bucket", Bucket="my.own.bucket")
    storage.write("s3://my.own.bucket/a/b", b"x")
    assert storage.list_files("s3://my.own.bucket") == storage.list_files("S3://my.own.bucket/") == ["a/b"]
    assert storage.read("s3://my.own.bucket//a/./b") == b"x"
