"""Locks on open local files, which the kernel releases when their process ends, also where a file system has none."""

from __future__ import annotations

import errno
import fcntl

# Lustre without the mount option flock, some NFS; the last two where a lock needs a right that the open file lacks.
_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


def lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool | None:
    """Locks an open file or folder. False: another process has it, and this one is not to wait. None: no locks here."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return None
    return True
