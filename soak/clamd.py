"""A scripted clamd, with all failures seen in the field and some more."""

from accounts import virus_names
from conn import Server
from harness import piece_sizes
from plan import VERDICTS, dice, pick


class Clamd(Server):
    """Reads a stream, and answers as planned for the message."""

    STRANGE = {None: 97, "close": 1, "stall": 1, "reset": 1}

    def talk(self, c, number):
        strange = pick(dice(self.world.seed, "scan", number), self.STRANGE)
        if strange:
            self.accounts.inject("clamd: %s before anything" % strange)
            if strange == "stall":
                c.wait_end(.3)
            if strange == "reset":
                c.reset()
            return
        command = c.exactly(6)
        if command == b"zPING\0":
            c.send(b"PONG\0")
            return
        command += c.exactly(3)
        if command == b"zVERSION\0":
            c.send(b"ClamAV 1.4.3\0")
            return
        if command + c.exactly(1) != b"zINSTREAM\0":
            self.accounts.fail("altered", "clamd received the command %r" % command)
        data, m = self.stream(c)
        kind = next_scan(m)
        if data is not None:
            if m:
                self.accounts.scanned(m, data)
            elif data.count(b"\n") != 1:
                self.accounts.fail("altered", "clamd received what no client sent: "
                                   "%r" % data[:200])
        if m and m.leave in ("scan", "flood") and m.client_goes():
            m.gone_first = not m.scan_results & {"ok"}
        self.answer(c, m, kind)

    def stream(self, c):
        """Returns the data received and their message.  Where the plan says that
        the message is too large, it reads only a part, and returns no data."""
        data, m = bytearray(), None
        for size in piece_sizes(c.exactly):
            first = not data
            data += c.exactly(min(size, 2000))
            if first:
                m = self.world.message_in(data)
                if m and m.clamd[m.scans:m.scans + 1] == ["limit"]:
                    return None, m
            data += c.exactly(size - min(size, 2000))
        return bytes(data), m or self.world.message_in(data)

    def answer(self, c, m, kind):
        if m:
            m.scan_results.add(kind)
        if kind not in VERDICTS:
            self.accounts.inject("clamd: " + kind)
        if kind == "hang":
            c.wait_end(2.2)
        elif kind == "late":
            c.wait_end(2.5)
            m.scan_results.add("ok")
            c.send(ANSWERS["ok"])
        elif kind == "reset":
            c.reset()
        elif kind == "virus":
            c.send(b"stream: %s FOUND\0" % virus_names(m)[0].encode())
        elif kind != "close":
            c.send(ANSWERS[kind])


# With "close", "hang" and "late", these are all the failures seen in the field.
ANSWERS = {
    "ok": b"stream: OK\0",
    "error": b"stream: Can't allocate memory ERROR\0",
    "half": b"stream: O",
    "timed out": b"COMMAND READ TIMED OUT\n",
    "newline": b"stream: OK\n",
    "bare": b"stream: OK",
    "two answers": b"stream: OK\0stream: Soak FOUND\0",
    "x ok": b"stream: x OK\0",
    "lines": b"stream: one\nstream: OK\0",
    "megabyte": b"stream: " + b"a" * (1 << 20) + b" OK\0",
    "refuse": b"UNKNOWN COMMAND\0",
    "denied": b"stream: Access denied. ERROR\0",
    "limit": b"INSTREAM size limit exceeded. ERROR\0",
}


def next_scan(m):
    """Returns how this scan of the message must end."""
    if m is None:
        return "ok"
    m.scans += 1
    if m.scans <= len(m.clamd):
        return m.clamd[m.scans - 1]
    return "virus" if m.virus else "ok"
