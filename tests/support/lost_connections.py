"""A process that loses two connections: one in its handshake while the listener stops, and one that it writes to."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

from distributed.batched import BatchedSend
from distributed.comm import Comm, connect, listen
from distributed.security import Security

from cryosiam_dask.runs.cluster import silence_dask


async def lose_connections() -> None:
    """Lose them in the ways that Dask logs."""
    closed = asyncio.Event()

    async def keep_open(comm: Comm) -> None:
        await closed.wait()
        comm.abort()

    keys = Security.temporary()
    listener = await listen("tls://127.0.0.1:0", keep_open, **keys.get_listen_args("scheduler"))
    comm = await connect(listener.contact_address, **keys.get_connection_args("worker"))
    host, _, port = listener.contact_address.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port))) as connection:
        await asyncio.sleep(0.1)  # accepted, but without a handshake
        listener.stop()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.sleep(0.1)
    messages = BatchedSend(interval=0.01)
    messages.start(comm)
    messages.send("lost")
    comm.abort()  # before it is written
    closed.set()
    await asyncio.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--silent"]:
        silence_dask()
    asyncio.run(lose_connections())
