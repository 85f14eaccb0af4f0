"""A zarr store that also works on file systems without hard links."""

from __future__ import annotations

import errno

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

#: Errors of file systems without hard links: BeeGFS, Samba, exFAT, some FUSE.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMLINK}


class AnyDiskStore(LocalStore):
    """A store on a local path that does not need hard links.

    To create a file without replacing an existing one, zarr makes a hard link. If the file system refuses it, this
    store writes the file unless it exists. If two processes create the same file at the same moment, the later one
    wins; this program creates metadata in one process only.
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
