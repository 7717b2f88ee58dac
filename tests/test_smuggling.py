"""PROMISE 3: one message in, at most one out, whatever bytes are around a dot.

The next hop in these tests is strict and keeps the bytes.  The models in vectors.py
then show how lax next hops would read them.  The tests also check that the daemon
changes nothing but the newlines, as the manual page says.
"""

import fcntl
import random
import struct
import termios
import time

import pytest

import harness
import vectors
from harness import HEADER, Failed, same, stuff

ENVELOPE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n"
WAYS = ("DATA", "BDAT", "BDAT to DATA")


class Talk:
    """One session, compared with the strict model."""

    def __init__(self, site, way):
        self.site, self.way = site, way
        site.hop = site.new_hop(chunking=way != "BDAT to DATA")
        # as servers do; the model relies on it
        site.hop.on("RCPT", lambda s, line: None if s.mail else "503 5.5.1 no")
        # TIOCOUTQ of a unix socket is 0 when the other end has read all.
        site.start(level=3, Listen=site.path("listen"))
        self.client = site.session()
        self.hop = site.hop.session
        self.seen = 0

    def wait_read(self):
        """Wait until the daemon has read what was sent, so that the next piece
        comes alone."""
        end = time.monotonic() + harness.WAIT
        while struct.unpack("i", fcntl.ioctl(self.client.sock, termios.TIOCOUTQ,
                                             bytes(4)))[0]:
            if time.monotonic() > end:
                raise Failed("the daemon does not read")

    def send(self, stream, start, cuts):
        """Send the envelope and the body after it (from start), cut at these
        places, and where a client has to wait for a reply."""
        codes, messages, stops = vectors.strict(stream)
        stops = dict(stops)
        at = stream.index(b"\r\n", start - 2) + 2 if start else 0
        cuts = [at, *(at + cut for cut in cuts if cut > 0)] if cuts else []
        seen = last = 0
        for end in sorted({*stops, *(c for c in cuts if 0 < c < len(stream)),
                           len(stream)}):
            if last and last not in stops:
                self.wait_read()
            self.client.send(stream[last:end])
            if end in stops:
                self.expect(codes[seen:stops[end]])
                seen = stops[end]
            last = end
        self.expect(codes[seen:])
        self.refused = any(code[0] == "5" for code in codes)
        return messages

    def expect(self, codes):
        for i, code in enumerate(codes):
            got = self.client.reply()
            assert got.code == code, "reply %d of %s is %r" % (i, codes, got)

    def data(self, body, cuts=()):
        start = ENVELOPE + b"DATA\r\n"
        self.check(self.send(start + body + b"\r\n.\r\n", len(start), cuts))
        if self.refused:
            self.again()

    def bdat(self, body, chunks=(), cuts=()):
        parts = vectors.pieces(body, chunks)
        stream = b"".join(b"BDAT %d%s\r\n" % (
            len(part), b" LAST" * (i == len(parts) - 1)) + part
            for i, part in enumerate(parts))
        self.check(self.send(ENVELOPE + stream, len(ENVELOPE), cuts))

    def check(self, messages):
        """The next hop received exactly the messages of the model."""
        came = self.hop.messages[self.seen:]
        scans = self.site.clamd.scans[self.seen:]
        self.seen += len(came)
        assert len(came) == len(messages), \
            "%d messages sent, %d came: %r" % (len(messages), len(came), came)
        for message, scan, (sender, _, body) in zip(came, scans, messages):
            assert message.mail == sender.decode()
            want = body if self.way == "BDAT" else vectors.normal(body)
            assert message.how == ("BDAT" if self.way == "BDAT" else "DATA")
            # A server that counts octets has one message, and these are all
            # of its bytes.  Every other one:
            if message.how == "DATA":
                found = vectors.smuggled(message.wire + b".\r\n")
                assert not found, "smuggled: %r" % found
            same(scan.mail, want, "what clamd saw")
            at, parted = vectors.header_place(want)
            want = want[:at] + HEADER + parted + want[at:]
            same(message.wire, stuff(want) if message.how == "DATA" else want)
        assert len(scans) == len(came)

    def again(self):
        """Begin another session: the daemon ends one with too many refusals."""
        self.no_evil()
        self.client.close()
        self.client = self.site.session()
        self.hop = self.site.hop.session
        self.seen = 0
        self.site.clamd.scans.clear()

    def close(self):
        self.client.quit()
        self.no_evil()

    def no_evil(self):
        assert not any("evil" in c for c in self.hop.commands) or \
            any("evil" in m.mail for m in self.hop.messages)


def try_all(talk, cases):
    """Try all vectors, so that a failure names all that fail."""
    bad = []
    for name, case in cases:
        try:
            case()
        except AssertionError as error:
            bad.append("%s: %s" % (name, str(error).split("\n")[0]))
            if isinstance(error, Failed) and "nothing came" in str(error):
                break
            talk.again()            # in step with the model again
        if len(bad) > 20:
            break
    assert not bad, "%d vectors:\n%s" % (len(bad), "\n".join(bad))
    talk.close()


# ---------------------------------------------------------------- the models

@pytest.mark.parametrize("name, wire", [
    ("LF.LF", b"x\n.\nNOOP\r\n.\r\n"), ("LF.CRLF", b"x\n.\r\nNOOP\r\n.\r\n"),
    ("CRLF.LF", b"x\r\n.\nNOOP\r\n.\r\n"), ("CR.CR", b"x\r.\rNOOP\r\n.\r\n"),
    ("CRLF.CR", b"x\r\n.\rNOOP\r\n.\r\n"), ("any of them", b".\nNOOP\r\n.\r\n"),
    ("CR becomes LF", b"x\r.\rNOOP\r\n.\r\n"),
    ("drops CR", b"x\r\r\n.\r\r\nNOOP\r\n.\r\n"),
    ("drops NUL", b"x\r\n\0.\r\nNOOP\r\n.\r\n"),
    ("C strings", b"x\r\n.\0y\r\nNOOP\r\n.\r\n"),
])
def test_models_of_next_hops_are_smuggled_without_the_rules(name, wire):
    """A vector smuggles a message past each next hop by the weakness in its name.
    A body that is stuffed line by line smuggles past none."""
    assert name in vectors.smuggled(wire)
    assert not vectors.smuggled(vectors.sent(b"..\r\n.\r\n.\0x\r\n"))


# ---------------------------------------------------------------- vectors

@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: end of data",
    "clamsmtpd.8 TRANSPARENCY: bare LF", "clamsmtpd.8 TRANSPARENCY: bare CR",
    "clamsmtpd.8 TRANSPARENCY: NULs")
@pytest.mark.core
@pytest.mark.parametrize("before", vectors.ENDS)
@pytest.mark.parametrize("way", WAYS)
def test_smuggling_by_line_ends_is_stopped(site, way, before):
    """Each vector of each pair of line ends is sent whole, and in eight ways in
    pieces."""
    talk = Talk(site, way)
    cases = []
    for after in vectors.ENDS:
        for vector in vectors.vectors(before, after):
            send = talk.data if way == "DATA" else talk.bdat
            cases.append((vector.name, lambda s=send, v=vector: s(v.body)))
        for tail in vectors.TAILS:
            vector = vectors.Vector(before, after, tail)
            for cuts in vector.cuts():
                name = "%s cut at %s" % (vector.name, cuts)
                if way == "DATA":
                    cases.append((name, lambda v=vector, c=cuts: talk.data(
                        v.body, cuts=c)))
                else:
                    # chunks cut there; with the last ones, packets too
                    cases.append((name, lambda v=vector, c=cuts: talk.bdat(
                        v.body, c, range(60) if len(c) > 2 else ())))
    try_all(talk, cases)


@pytest.mark.long
@pytest.mark.parametrize("before, after", vectors.PAIRS)
@pytest.mark.parametrize("way", WAYS)
def test_smuggling_at_any_split_is_stopped(site, way, before, after):
    """The bodies are cut at each place, and at any two places around the dot."""
    talk = Talk(site, way)
    cases = []
    for vector in vectors.vectors(before, after):
        usual = vector.head == vectors.HEAD and vector.middle == b"."
        if way != "DATA" and not usual:
            continue
        for cuts in vector.all_cuts(way == "DATA" and usual):
            name = "%s cut at %s" % (vector.name, cuts)
            if way == "DATA":
                cases.append((name, lambda v=vector, c=cuts: talk.data(
                    v.body, cuts=c)))
                continue
            cases.append((name, lambda v=vector, c=cuts: talk.bdat(v.body, c)))
            if len(cuts) == 1:
                command = len("BDAT 100 LAST\r\n")
                cases.append((name + " (packets)",
                              lambda v=vector, c=cuts[0] + command:
                              talk.bdat(v.body, cuts=(c,))))
    try_all(talk, cases)


# ---------------------------------------------------------------- random bodies

def some_bodies(site, way, count, seed):
    talk = Talk(site, way)
    for number in range(count):
        rng = random.Random("%s %d %d" % (way, seed, number))
        body = vectors.random_body(rng)
        cuts = [rng.randrange(len(body)) for _ in range(rng.randrange(4))]
        try:
            if way == "DATA":
                talk.data(body, cuts)
            else:
                talk.bdat(body, [rng.randrange(len(body))
                                 for _ in range(rng.randrange(4))], cuts)
        except AssertionError as error:
            raise AssertionError("body %d of seed %d (%d bytes): %s" % (
                number, seed, len(body), error)) from None
    talk.close()


@pytest.mark.parametrize("way, count", [("DATA", 300), ("BDAT", 50),
                                        ("BDAT to DATA", 50)])
def test_smuggling_by_random_bodies_is_stopped(site, way, count):
    some_bodies(site, way, count, seed=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_smuggling_by_many_random_bodies_is_stopped(site, seed):
    some_bodies(site, "DATA", 1000, seed)
