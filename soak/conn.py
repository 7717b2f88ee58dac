"""Connections and servers of tests/harness.py, for many messages.

All peers share a world (world.py).  It contains the messages by number, the
accounts, and a gate that makes all peers halt at once.
"""

import select
import socket
import struct
import threading
import time

import harness
from harness import WAIT, Gone, Stream, reset

LIMIT = 3 * int(WAIT)   # seconds of silence before a connection counts as stuck


class Conn(Stream):
    """A connection that halts when all peers halt, and does not wait forever."""

    def __init__(self, world, sock):
        super().__init__(sock)
        self.world = world
        # The kernel's time limits save the system calls that Python's would cost.
        sock.settimeout(None)
        limit = struct.pack("ll", LIMIT, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    # -- sending

    def send(self, data):
        self.world.gate.wait()
        try:
            self.sock.sendall(data)
        except BlockingIOError:
            self.stuck()
        except OSError:
            raise Gone from None

    def drip(self, data):
        for i in range(len(data)):
            self.send(data[i:i + 1])

    # -- receiving

    def fill(self, most=1 << 18):
        self.world.gate.wait()
        try:
            got = self.sock.recv(most)
        except BlockingIOError:
            self.stuck()
        except OSError:
            raise Gone from None
        if not got:
            raise Gone
        self.ahead += got

    def stuck(self):
        self.world.accounts.fail("stuck", "%s waited %d s without success" % (
            threading.current_thread().name, LIMIT))
        raise Gone

    def readable(self, seconds):
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    # -- endings

    def wait_end(self, seconds):
        """Wait until the peer closes, or for this many seconds."""
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                if self.readable(left) and not self.sock.recv(1 << 18):
                    break
        except OSError:
            pass

    def shutdown(self):
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            raise Gone from None

    def reset(self):
        reset(self.sock)


class Server(harness.Server):
    """A server whose connections the world counts."""

    def __init__(self, world, **kw):
        self.world, self.accounts = world, world.accounts
        super().__init__(**kw)

    def serve(self, sock):
        number = self.world.serving(1)
        try:
            self.talk(Conn(self.world, sock), number)
        except Gone:
            pass
        except Exception as error:      # a fault of the test, not of the daemon
            self.accounts.fail("soak", "%s: %r" % (
                threading.current_thread().name, error))
        sock.close()
        self.world.serving(-1)

    def talk(self, c, number):
        raise NotImplementedError
