"""A wheel of the cpcscale that runs, for environments that are made for one model.

cpcscale is on no index, so a model has to bring it. As `code_paths` of MLflow it would be put before what is installed,
and the second model of a process would get the code of the first. In a wheel it is what an environment installs, and
its name holds a digest of the code: MLflow gives two models with other code other environments.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import zipfile
from pathlib import Path

from cpcscale import __version__

_PACKAGE = Path(__file__).parents[1]
_RELEASED = _PACKAGE / "released"
# The oldest time that a zip file can name, so that the same code gives the same bytes.
_WHEN = (1980, 1, 1, 0, 0, 0)


@functools.cache
def own_wheel() -> tuple[str, bytes]:
    """(file name, bytes) of the wheel. It requires no packages: a model names those that it needs, with versions.

    Released recognisers are left out: they are megabytes that no other model needs.
    """
    files = {
        f"{_PACKAGE.name}/{path.relative_to(_PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(_PACKAGE.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and _RELEASED not in path.parents[1:]
    }
    code = hashlib.sha256(b"".join(name.encode() + hashlib.sha256(data).digest() for name, data in files.items()))
    version = f"{__version__}+{code.hexdigest()[:12]}"
    about = f"cpcscale-{version}.dist-info"
    headers = f"Metadata-Version: 2.1\nName: cpcscale\nVersion: {version}\nLicense: Apache-2.0\n"
    files[f"{about}/METADATA"] = headers.encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: cpcscale\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_hash(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{about}/RECORD"] = "".join([*record, f"{about}/RECORD,,\n"]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _WHEN), data, zipfile.ZIP_DEFLATED)
    return f"cpcscale-{version}-py3-none-any.whl", out.getvalue()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
