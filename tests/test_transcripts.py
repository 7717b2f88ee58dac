"""The dialogues of tests/transcripts, played with the daemon line by line.  The
README there explains their format."""

import contextlib
import glob
import os
import re
import threading
from queue import Queue

import pytest

from harness import Gone, Server, Stream, WAIT, piece_sizes, shown

DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "transcripts")
ENDS = {r"\n": b"\n", r"\0": b"\0"}     # a line without one of these ends in CRLF


class Line:
    """A line of a transcript: the peer, the direction, and the text."""

    def __init__(self, text):
        self.prefix, self.text = re.fullmatch("( *[CFNVL]:) ?(.*)", text).groups()
        self.speaker = self.prefix[-2]
        self.peer = {2: "client", 10: "next hop", 18: "clamd"}[len(self.prefix)]
        end = ENDS.get(self.text[-2:])
        self.data = self.text[:-2].encode() + end if end else self.text.encode() + b"\r\n"


class Peer(Server):
    """A next hop or a clamd that the test plays."""

    def __init__(self, **kw):
        self.connections, self.pings = Queue(), 0
        self.done = threading.Event()
        super().__init__(**kw)

    def serve(self, sock):
        stream = Stream(sock)
        if self.path and stream.exactly(5) == b"zPING":     # comes at any time
            self.send(sock, b"PONG\0")
            self.pings += 1
            return
        self.connections.put(stream)
        self.done.wait()

    def close(self):
        self.done.set()
        super().close()


class Scanned(Stream):
    """The bytes that clamd receives after its command, without the lengths of the
    pieces."""

    def __init__(self, wire):
        super().__init__(wire.sock)
        assert wire.exactly(5) == b"REAM\0"
        self.wire, self.sizes = wire, piece_sizes(wire.exactly)
        self.ahead += b"zINSTREAM\0"

    def fill(self):
        size = next(self.sizes, None)
        if size is None:
            raise Gone("the end of the message")
        self.ahead += self.wire.exactly(size)


def line_of(stream):
    """Read the next line, which ends in LF or NUL, or the part of it that was
    sent."""
    line = b""
    with contextlib.suppress(Gone):
        while line[-1:] not in (b"\n", b"\0"):
            line += stream.exactly(1)
    return line


class Play:
    def __init__(self, site, settings):
        self.site = site
        site.hop, site.clamd = Peer(), Peer(path=site.path("clamd"))
        self.peers = {"next hop": site.hop, "clamd": site.clamd}
        site.servers += self.peers.values()
        site.start(**settings)
        self.streams = {"client": site.client().stream}

    def stream(self, peer):
        if peer not in self.streams:
            wire = self.peers[peer].connections.get(timeout=WAIT)
            self.streams[peer] = Scanned(wire) if peer == "clamd" else wire
        return self.streams[peer]

    def expect_end(self, peer):
        assert line_of(self.stream(peer)) == b"", "the %s received more" % peer

    def step(self, line):
        """Play one line.  Returns it as it was received or sent."""
        got = line.text
        if line.speaker == "L":
            self.site.daemon.wait_log("^%s$" % re.escape(got))
        elif line.speaker == "F":
            sent = line_of(self.stream(line.peer))
            got = got if sent == line.data else shown(sent)
        else:
            if line.peer == "clamd":
                self.expect_end("clamd")
            for peer, stream in self.streams.items():
                assert not stream.more(), "too early for the " + peer
            self.stream(line.peer).sock.sendall(line.data)
            if line.peer == "clamd":
                del self.streams["clamd"]       # one connection per scan
        return "%s %s" % (line.prefix, got) if got else line.prefix


@pytest.mark.covers("clamsmtpd.8 DESCRIPTION: 2xx after the next hop")
@pytest.mark.parametrize("path", sorted(glob.glob(DIRECTORY + "/*.txt")),
                         ids=os.path.basename)
def test_transcript_is_what_the_daemon_does(site, path):
    """The daemon sends each line of the transcript to the right peer, and nothing
    else."""
    with open(path) as file:
        script = [line for line in file.read().splitlines()
                  if line and not line.startswith("#")]
    settings = [line.split(": ", 2)[1:] for line in script if line.startswith("conf: ")]
    play = Play(site, dict(settings))
    played = []
    try:
        for text in script[len(settings):]:
            played.append(play.step(Line(text)))
            assert played == script[len(settings):][:len(played)]
        assert played
        for peer in play.streams:
            play.expect_end(peer)
    finally:
        for peer in play.peers.values():
            peer.close()
