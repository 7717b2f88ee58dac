"""The clients, which go away early, and send what no client should."""

import time

from conn import Conn
from harness import Gone, connect


class Client:
    """Runs sessions, one after the other."""

    def __init__(self, world):
        self.world, self.accounts = world, world.accounts

    def run(self):
        while (s := self.world.next_session()) is not None:
            c = self.connect(s)
            if c is None:
                continue
            try:
                self.session(c, s)
            except Gone:
                pass
            c.sock.close()
            self.world.session_ends(s)

    def connect(self, s):
        """Connect until the daemon greets the client.  Returns None when the run is
        over."""
        while self.world.session_begins(s):
            try:
                c = self.try_connect(s)
                s.greeting = b"" if s.leave == "greeting" else c.reply()
                if b"421 4.3.2 Server busy" not in s.greeting:
                    self.world.session_is_greeted(s)
                    return c
                self.accounts.inject("daemon: MaxConnections reached")
                c.sock.close()
            except (OSError, Gone) as error:
                if "stop" not in s.windows:
                    self.accounts.fail("unexplained", "session %d, no greeting: %r"
                                       % (s.number, error))
            self.world.session_ends(s)
            time.sleep(.02)
        return None

    def try_connect(self, s):
        c = Conn(self.world, connect(self.world.unix) if s.unix else
                 connect(self.world.tcp, s.address))
        if s.proxy:
            c.send(s.proxy_header())
        return c

    def session(self, c, s):
        m = s.messages[0]
        if s.leave or s.greeting[:1] != b"2":
            self.world.begin(m)
        if s.leave == "greeting":
            self.leave(c, m)
        if s.greeting[:1] != b"2":
            m.reply = s.greeting
            if "next hop down" in s.windows:
                time.sleep(.1)
            return
        c.send(b"%s s%d.example\r\n" % (s.hello.encode(), s.number))
        if s.leave == "EHLO":
            self.leave(c, m)
        reply = c.reply()
        if reply[:1] != b"2":
            self.world.begin(m)
            m.reply = reply
            return
        for m in s.messages:
            self.world.begin(m)
            if not self.mail(c, m):
                return
        if s.end != "close":
            self.quit(c, s)

    def quit(self, c, s):
        try:
            c.send(b"QUIT\r\n")
            c.reply()
        except Gone:
            if "stop" not in s.windows:
                self.accounts.fail("unexplained", "no reply to QUIT: %s"
                                   % s.messages[-1])

    def mail(self, c, m):
        """Send a message.  Returns whether the session continues."""
        if m.begin_twice and not self.begin_and_reset(c, m):
            return False
        half = m.session.end == "half" and m is m.session.messages[-1]
        for group in groups(m):
            self.send(c, m, group, half)
            if not self.replies(c, m, group):
                return False
            if m.reply:
                break
        if half and m.sent_all:
            self.quit_reply(c, m)
            return False
        if m.reply_to != "body":
            c.send(b"RSET\r\n")
            c.reply()
        return continues(m)

    def begin_and_reset(self, c, m):
        """Begin a transaction and reset it."""
        c.send(b"MAIL FROM:<twice@soak>\r\nRCPT TO:<b@soak>\r\n"
               b"BDAT 6\r\nhello\nRSET\r\n")
        for _ in range(4):
            reply = c.reply()
            if reply[:1] != b"2":
                m.reply = reply
                return False
        return True

    def send(self, c, m, group, half):
        data = b""
        for stage, part in group:
            if stage == m.leave_at:
                m.left = True
                c.send(data + part[:m.leave_cut(part)])
                if m.leave == "silent":
                    self.wait_for_421(c, m)
                self.leave(c, m)
            data += part
        if group[-1][0] == "body":
            m.sent_all = True
            if m.leave:
                self.send_and_leave(c, m, data)
            if half:
                data += b"QUIT\r\n"
        if m.pace == "drip":
            c.drip(data)
        else:
            c.send(data)
        if half and m.sent_all:
            c.shutdown()

    def replies(self, c, m, group):
        for stage, _ in group:
            reply = c.reply()
            good = reply[:3] == b"354" if stage == "DATA" else reply[:1] == b"2"
            if good and stage == "DATA" and m.reply:
                self.accounts.fail("unexplained", "354 without MAIL: %s" % m)
            if m.reply is None and (stage == "body" or not good):
                m.reply, m.reply_to = reply, stage
            if reply[:3] == b"421":
                return False
        return True

    def quit_reply(self, c, m):
        try:
            c.reply()
        except Gone:
            if continues(m) and "stop" not in m.session.windows:
                self.accounts.fail("unexplained", "no reply to QUIT: %s" % m)

    def wait_for_421(self, c, m):
        while c.readable(4 if m.session.impatient() else .3):
            reply = c.reply()
            if reply[:1] in (b"4", b"5"):       # others are for earlier commands
                m.reply, m.left = reply, False
                raise Gone

    def send_and_leave(self, c, m, data):
        """Send the whole message, and leave without waiting for the reply."""
        m.left = True
        c.send(data + {"partial": b"NOO", "flood": b"NOOP\r\n" * 17000,
                       "deaf": b"NOOP\r\n" * 50}.get(m.leave, b""))
        if m.leave == "deaf":
            time.sleep(.2)
        if m.here:
            m.here.wait(1)
        self.leave(c, m)

    def leave(self, c, m):
        m.left = True
        self.accounts.inject("client: gone at %s" % (m.session.leave or m.leave))
        if m.leave_how == "rst":
            c.reset()
        else:
            c.shutdown()
        if m.gone:
            m.gone.set()
        raise Gone


def groups(m):
    """Returns the steps of a message, grouped by what is sent at once."""
    envelope = [("MAIL", b"MAIL FROM:<%d@soak>\r\n" % m.number),
                ("RCPT", b"RCPT TO:<b@soak>\r\n")]
    if m.bdat:
        *chunks, last = m.chunks()
        steps = envelope + [("chunk", b"BDAT %d\r\n%s" % (len(p), p)) for p in chunks]
        last = ("body", b"BDAT %d LAST\r\n%s" % (len(last), last))
    else:
        steps = envelope + [("DATA", b"DATA\r\n")]
        last = ("body", m.wire() + b".\r\n")
    if m.pace in ("steps", "drip"):
        return [[step] for step in steps + [last]]
    if m.pace == "pipelined" and not m.bdat:
        return [steps, [last]]
    return [steps + [last]]


def continues(m):
    """Returns whether the daemon keeps the session open after this message."""
    return not (m.reply[:3] == b"421" or b" 4.4.2 " in m.reply or any(
        kind not in ("450", "550", "slow") or stage in ("body", "RSET", "NOOP")
        for stage, kind in m.hop.items()))
