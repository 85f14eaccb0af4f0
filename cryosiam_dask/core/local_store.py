"""Zarr stores on the disks that users have."""

from __future__ import annotations

import errno

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

#: What file systems say that have no hard links: BeeGFS, Samba, exFAT, some FUSE.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMLINK}


class AnyDiskStore(LocalStore):
    """A store on a local path, also where the file system has no hard links.

    zarr links a new file to its name where it must not replace another one. Where that is not possible, the file is
    written if none is there: of two processes that create the same one at the same time, the later one's stays. This
    program creates metadata in one process alone.
    """

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """See `zarr.abc.store.Store`."""
        try:
            await super().set_if_not_exists(key, value)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not await self.exists(key):
                await self.set(key, value)
