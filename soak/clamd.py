"""clamd, with all that has been seen of it and some more."""

import array
import os
import re
import socket
import struct

from accounts import virus_names
from conn import Server
from harness import Gone
from plan import VERDICTS, dice, pick

MARK = re.compile(rb"soak-(\d+)-")


class Clamd(Server):
    """Reads what it is given, and answers as planned for the message."""

    STRANGE = {None: 97, "close": 1, "stall": 1, "reset": 1}

    def serve(self, c, number):
        strange = pick(dice(self.world.seed, "scan", number), self.STRANGE)
        if strange:
            self.accounts.inject("clamd: %s before anything" % strange)
            if strange == "stall":
                c.wait_end(.3)
            if strange == "reset":
                c.reset()
            return
        command, fd = self.command(c)
        if command == b"zPING\0":
            c.send(b"PONG\0")
            return
        if fd is None:
            name, data, m = b"stream", *self.stream(c)
        else:
            name = b"fd[%d]" % fd
            data = read_all(fd)
            m = self.message(data)
        kind = next_scan(m)
        if data is not None:
            if m:
                self.accounts.scanned(m, data)
            elif data.count(b"\n") != 1:
                self.accounts.fail("altered", "nobody sent what clamd got: %r"
                                   % data[:200])
        if m and m.leave in ("scan", "flood") and m.client_goes():
            m.gone_first = not m.said & {"ok"}
        self.answer(c, m, name, kind)

    def command(self, c):
        """And the descriptor that comes with FILDES."""
        fds = array.array("i")
        while c.ahead not in (b"zPING\0", b"zINSTREAM\0", b"zFILDES\0\0"):
            try:
                got, extra, _, _ = c.sock.recvmsg(10 - len(c.ahead),
                                                  socket.CMSG_SPACE(4))
            except OSError:
                got = b""
            for _, _, numbers in extra if got else ():
                fds.frombytes(numbers)
            if not got:
                raise Gone
            c.ahead += got
        return c.take(10), fds[0] if fds else None

    def stream(self, c):
        """What is sent, and whose it is.  Where the plan says that it is too
        much only a part is read, and no data returned."""
        data, m = bytearray(), None
        while (size := struct.unpack("!I", c.exactly(4))[0]) != 0:
            first = not data
            data += c.exactly(min(size, 2000))
            if first:
                m = self.message(data)
                if m and m.clamd[m.scans:m.scans + 1] == ["limit"]:
                    return None, m
            data += c.exactly(size - min(size, 2000))
        return bytes(data), m or self.message(data)

    def message(self, data):
        mark = MARK.search(data)
        return self.world.messages[int(mark[1])] if mark else None

    def answer(self, c, m, name, kind):
        if m:
            m.said.add(kind)
        if kind not in VERDICTS:
            self.accounts.inject("clamd: " + kind)
        if kind == "hang":
            c.wait_end(2.2)
        elif kind == "late":
            c.wait_end(2.5)
            m.said.add("ok")
            c.send(name + b": OK\0")
        elif kind == "reset":
            c.reset()
        elif kind == "virus":
            c.send(name + b": %s FOUND\0" % virus_names(m)[0].encode())
        elif kind != "close":
            c.send(ANSWERS[kind].replace(b"%s", name))


# With "close", "hang" and "late" all that has gone wrong in the field.
ANSWERS = {
    "ok": b"%s: OK\0",
    "error": b"%s: Can't allocate memory ERROR\0",
    "half": b"%s: O",
    "timed out": b"COMMAND READ TIMED OUT\n",
    "newline": b"%s: OK\n",
    "bare": b"%s: OK",
    "behind": b"%s: OK\0%s: Soak FOUND\0",
    "x ok": b"%s: x OK\0",
    "lines": b"%s: one\n%s: OK\0",
    "megabyte": b"%s: " + b"a" * (1 << 20) + b" OK\0",
    "refuse": b"UNKNOWN COMMAND\0",
    "denied": b"%s: Access denied. ERROR\0",
    "limit": b"INSTREAM size limit exceeded. ERROR\0",
}


def next_scan(m):
    """How this scan of the message is to end."""
    if m is None:
        return "ok"
    m.scans += 1
    if m.scans <= len(m.clamd):
        return m.clamd[m.scans - 1]
    return "virus" if m.virus else "ok"


def read_all(fd):
    data, got = bytearray(), True
    while got:
        got = os.pread(fd, 1 << 20, len(data))
        data += got
    os.close(fd)
    return bytes(data)
