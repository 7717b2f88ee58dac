"""Connections and servers, blocking, in threads.

All peers share a world (world.py): the messages by number, the accounts, and
a gate that makes all of them halt at once.
"""

import os
import select
import socket
import struct
import threading
import time

from harness import WAIT, Gone, Stream, hold_port, reset

LIMIT = 3 * int(WAIT)   # seconds until a silence is taken for the end; no measure


class Conn(Stream):
    """One that halts when all have to, and does not wait for ever."""

    def __init__(self, world, sock):
        super().__init__(sock)
        self.world = world
        # In the kernel: Python's own time-outs cost a system call each.
        limit = struct.pack("ll", LIMIT, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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
        self.world.accounts.fail("stuck", "%s waited %d s in vain" % (
            threading.current_thread().name, LIMIT))
        raise Gone

    def reply(self):
        """All lines of one, in one."""
        lines = b""
        while True:
            line = self.line()
            lines += line
            if line[3:4] != b"-":
                return lines

    def readable(self, seconds):
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    # -- endings

    def wait_end(self, seconds):
        """Until the other end goes, or for so long."""
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


class Server:
    """Threads that accept and serve, on listeners that come and go."""

    def __init__(self, world, threads):
        self.world, self.accounts = world, world.accounts
        self.threads = threads          # for each listener
        self.listeners = {}             # name: socket; None when it is down
        self.accepted = 0

    def listen(self, name, sock):
        known = name in self.listeners
        self.listeners[name] = sock
        for i in range(0 if known else self.threads):
            threading.Thread(target=self.run, args=(name,), daemon=True,
                             name="%s %s %d" % (type(self).__name__, name, i)).start()

    def down(self):
        for name, sock in self.listeners.items():
            self.listeners[name] = None
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def run(self, name):
        while True:
            try:
                sock, _ = self.listeners[name].accept()
            except (OSError, AttributeError):
                time.sleep(.02)
                continue
            number = self.world.serving(1)
            try:
                self.serve(Conn(self.world, sock), number)
            except Gone:
                pass
            except Exception as error:      # of ours, not of the daemon's
                self.accounts.fail("soak", "%s: %r" % (
                    threading.current_thread().name, error))
            sock.close()
            self.world.serving(-1)

    def serve(self, c, number):
        raise NotImplementedError


def tcp_listener(host, port):
    sock = hold_port(host, port)
    sock.listen(512)
    return sock


def unix_listener(path):
    if os.path.exists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(512)
    return sock
