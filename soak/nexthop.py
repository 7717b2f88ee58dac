"""The next hop: a strict SMTP server that fails as planned."""

import re
import socket
import time

from conn import Server
from harness import Gone, ehlo_reply, end_of_data, unstuff

EARLY = ("450", "550", "250", "354")    # replies before the end of the data


class NextHop(Server):
    def talk(self, c, _):
        # None for a client on a unix socket.  Its EHLO contains the number.
        s = self.world.session_at(c.sock.getsockname()[0])
        m, mail, rcpts = None, False, 0
        if s and any(m.leave == "replay" or "body" in m.hop for m in s.messages):
            c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.reply(c, s, m, "greeting", b"220 next.hop ESMTP\r\n")
        while True:
            line = c.line()
            verb = line[:4].upper()
            if verb in (b"EHLO", b"HELO"):
                s = self.world.sessions[int(re.search(rb" s(\d+)\.", line)[1])]
                self.reply(c, s, m, "EHLO", hello(s, verb))
            elif verb == b"MAIL" and not mail:
                m = self.message(line)
                mail = self.reply(c, s, m, "MAIL", b"250 2.1.0 ok\r\n")
            elif line == b"RCPT TO:<b@soak>\r\n":
                if mail:
                    rcpts += self.reply(c, s, m, "RCPT", b"250 2.1.5 ok\r\n")
                else:
                    c.send(b"503 5.5.1 no MAIL\r\n")
            elif verb in (b"DATA", b"BDAT") and m and rcpts:
                self.receive_message(c, s, m, line)
                m, mail, rcpts = None, False, 0
            elif verb in (b"RSET", b"NOOP"):
                self.reply(c, s, m, verb.decode(), b"250 2.0.0 ok\r\n")
                if verb == b"RSET":
                    m, mail, rcpts = None, False, 0
            elif verb == b"QUIT":
                c.send(b"221 2.0.0 bye\r\n")
                return
            else:
                self.accounts.fail("invented", "the next hop received %r after %s"
                                   % (line[:200], m))
                c.send(b"503 5.5.1 soak\r\n")

    def message(self, line):
        number = re.match(rb"MAIL FROM:<(\d+)@soak>\r\n\Z", line)
        if number:
            return self.world.messages[int(number[1])]
        if line != b"MAIL FROM:<twice@soak>\r\n":
            self.accounts.fail("invented", "no client sent %r" % line)
        return None

    # -- replies

    def reply(self, c, s, m, stage, usual):
        """Send a reply, or do what is planned instead.  Returns whether the reply was
        sent."""
        kind = (m.hop if m else s.hop if s else {}).get(stage)
        if kind:
            self.misbehave(c, s, m, stage, kind)
            return False
        if s and s.style == "drip":
            c.drip(usual)
        elif s and s.style == "lines" and usual[3:4] == b" ":
            c.send(usual[:3] + b"-one\r\n" + usual[:3] + b"-two\r\n" + usual)
        else:
            c.send(usual)
        return True

    def misbehave(self, c, s, m, stage, kind, before=b""):
        """Fail as planned.  before: bytes to send in one piece with the reply."""
        self.accounts.inject("next hop: %s at %s" % (kind, stage))
        number = m.number if m else s.messages[0].number
        if kind in ("450", "550", "421"):
            text = b"%s-4.0.0 soak %d refused\r\n%s 4.0.0 at %s\r\n" % (
                kind.encode(), number, kind.encode(), stage.encode())
        elif kind == "half":
            text = b"250-soak %d took" % number
        elif kind == "250" or kind == "odd" and stage == "DATA":
            text = b"250 soak %d took\r\n" % number
        elif kind in ("354", "odd"):
            text = b"354 soak odd\r\n"
        else:
            text = b""
        c.send(before + text)
        if kind in (*EARLY, "odd"):
            return
        if kind == "stall":
            c.wait_end(4 if s.impatient() else .5)
        elif kind == "reset":
            c.reset()
        raise Gone

    # -- the message

    def receive_message(self, c, s, m, line):
        self.accounts.forwarded(m)
        kind, early, size = m.hop.get("body"), None, None
        if line[:4] == b"BDAT":
            size = int(re.match(rb"BDAT (\d+) LAST\r\n\Z", line)[1])
            if m.leave == "hop":
                m.here.set()
        elif m.leave == "hop":
            m.gone_first = m.client_goes()
        if size is None and kind in EARLY and m.cut < .5:
            # In one piece with 354, the reply comes early for small messages, too.
            self.misbehave(c, s, m, "body", kind, b"354 go ahead\r\n")
            early, kind = kind, None
        elif size is None and not self.reply(c, s, m, "DATA", b"354 go ahead\r\n"):
            return
        content, later = self.body(c, s, m, size, kind)
        if size is None:
            content = unstuff(content)
        header = self.accounts.content(m, content, size is not None)
        kind = early or later or m.hop.get("dot")
        if kind not in ("450", "550", "421"):
            m.answered = kind is None
            m.taken.append(header)
        if not (early or later):
            self.reply(c, s, m, "dot", b"250 2.0.0 soak %d took\r\n" % m.number)

    def body(self, c, s, m, size, kind):
        """Returns the content without the dot, and the reply sent before its end."""
        early, seen, most = None, 0, 1 << 18
        length = len(m.base())
        while True:
            if kind and len(c.ahead) >= m.cut * length:
                if kind == "slow":
                    self.accounts.inject("next hop: slow reader")
                    most = 700
                else:
                    self.misbehave(c, s, m, "body", kind)
                    early = kind
                kind = None
            if m.leave == "replay" and len(c.ahead) > 100000 and not m.gone_first:
                left = length - len(c.ahead)
                m.gone_first = m.client_goes() and left > self.world.in_flight
            at = end_of_data(c.ahead, seen) if size is None else \
                size if len(c.ahead) >= size else -1
            if at >= 0:
                content = c.take(at)
                c.take(3 if size is None else 0)
                return content, early
            seen = len(c.ahead)
            c.fill(most)
            if most == 700:
                time.sleep(.0005)
                most = 700 if seen < 50000 else 1 << 18


def hello(s, verb):
    if verb == b"HELO":
        return b"250 next.hop\r\n"
    return ehlo_reply(["next.hop", "8BITMIME", "DSN", "STARTTLS"] +
                      ["CHUNKING"] * s.chunking + ["SIZE %d" % (s.limit or 100 << 20)])
