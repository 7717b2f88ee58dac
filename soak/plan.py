"""The plan of a run, which follows from the seed and a number.

The session with the number n has the messages n * 8, n * 8 + 1 and so on.
Settings and daemons are numbered in their order.
"""

import random
import threading
import time

from harness import stuff
from real import EICAR
from vectors import normal

MIB = 1 << 20

# What clamd does with a scan: verdicts, and failures.
VERDICTS = ("ok", "virus")
CLAMD = {
    "error": 12, "close": 4, "half": 6, "timed out": 6, "newline": 6, "bare": 6,
    "two answers": 6, "x ok": 6, "lines": 6, "megabyte": 2, "late": 1, "hang": 1,
    "refuse": 10, "denied": 4, "limit": 6, "reset": 4,
}
# Faults of the next hop, and the steps at which they happen.
REPLIES = {"450": 4, "550": 4, "421": 2, "close": 2, "reset": 2, "half": 2,
           "stall": 1, "odd": 1}
STAGES = {"MAIL": 2, "RCPT": 2, "DATA": 4, "body": 7, "dot": 8, "RSET": 2,
          "NOOP": 1}
IN_BODY = {"450": 2, "550": 2, "250": 2, "354": 1, "close": 2, "reset": 2,
           "stall": 1, "slow": 3}
# Where a client goes away.  Up to "silent", it has not sent the whole message.
LEAVES = {"MAIL": 1, "RCPT": 1, "DATA": 2, "body": 3, "almost": 4, "silent": 1,
          "dot": 5, "partial": 2, "scan": 6, "flood": 3, "hop": 3, "deaf": 2}

TEXTS = (
    b"The quick brown fox", b"jumps over the lazy dog", b"", b"", b"bye",
    b"Name: value", b" indented", b"\ttab", b"From here", b"--=-parts",
    b".", b"..", b".dot", b".\0", b"\0.", b"\0\0..x", b"\0", b"in\0side",
    b"\xe4\xf6\xfc \xff\xfe\x80", b"\x7f\x1b[1m", b"x" * 998, b"y" * 5000,
    b"QUIT", b"DATA", b"RSET",
)
ENDS = (b"\r\n",) * 24 + (b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\0\n", b"\n\n",
                          b"\r\n\0", b"\n.\n", b"\r.\r\n")


def dice(seed, what, number):
    return random.Random("%s %s %d" % (seed, what, number))


def pick(r, weights):
    return r.choices(list(weights), list(weights.values()))[0]


def chance(r, percent):
    return r.random() * 100 < percent


# ---------------------------------------------------------------- content

def head(r, number):
    """Returns a header section, with or without the blank line, or none."""
    mark = b"soak-%d-" % number
    usual = (b"Received: from somewhere by here;\r\n\tThu, 1 Jan 1970 00:00:00 +0000"
             b"\r\nFrom: a@example.com\r\nSubject: %s\r\n" % mark)
    return r.choices((
        usual + b"\r\n", b"\r\n%s\r\n" % mark, mark + b" no header\r\n",
        usual + b"no blank line\r\n", b"Subject: one\r\nX : " + mark + b"\r\n\r\n",
        b"." + mark + b"\r\n", b"Subject: %s\nX: y\r\r\n\n" % mark,
        b"From a@example.com Thu Jan  1 00:00:00 1970\r\n" + usual + b"\r\n",
        b"  " + mark + b" indented\r\n", b">From a\r\n\t%s\r\n\r\n" % mark,
    ), (70, 5, 5, 5, 5, 5, 5, 5, 5, 2))[0]


class Message:
    """A message, its plan, and its outcome."""

    def __init__(self, seed, session, index):
        self.session = session
        self.number = session.number * 8 + index
        r = dice(seed, "message", self.number)
        self.virus = chance(r, 6)
        self.bdat = chance(r, 35)
        self.pace = pick(r, {"steps": 4, "pipelined": 5, "burst": 4, "drip": 1})
        self.begin_twice = chance(r, 5)
        self.plan_faults(r)
        self.plan_body(r)
        # the outcome
        self.begun = False
        self.reply = None           # the final reply that the client received,
        self.reply_to = None        # and its step; "body": the whole message
        self.sent_all = False
        self.left = False           # the client did not wait for the reply
        self.gone_first = False     # surely before the daemon forwarded it
        self.scans = 0
        self.scan_results = set()   # clamd's, of VERDICTS and CLAMD
        self.asked = 0              # DATA and BDAT commands to the next hop
        self.taken = []             # the header of each copy the next hop took
        self.answered = False       # the next hop has sent its whole 2xx

    def plan_faults(self, r):
        self.leave, self.leave_how = None, pick(r, {"fin": 1, "rst": 1})
        self.hop = {}               # stage: fault
        self.cut = r.random()       # the place in the body
        self.clamd = []             # for the first scans; later ones work
        kind = pick(r, {"none": 52, "client": 15, "hop": 16, "clamd": 12,
                        "both": 5})
        if kind == "client":
            self.leave = pick(r, LEAVES)
        if kind in ("hop", "both"):
            stage = pick(r, STAGES)
            self.hop[stage] = pick(r, IN_BODY if stage == "body" else REPLIES)
        if kind in ("clamd", "both"):
            self.clamd = [pick(r, CLAMD) for _ in range(r.choice((1, 1, 2, 4)))]
        if self.leave == "flood" and self.session.unix:
            self.leave = "scan"         # a unix socket has no reset
        if self.pace == "burst" and not self.bdat:
            self.pace = "pipelined"     # DATA is the last command of a group

    def plan_body(self, r):
        """Plan the body, which is first + block * times."""
        self.first, self.block, self.times = b"", b"", 0
        size = pick(r, {"empty": 1, "small": 92, "large": 6, "huge": .25}
                    if "body" not in self.hop else
                    {"small": 70, "large": 25, "huge": 5})
        if chance(r, .04):
            self.leave, self.hop, self.clamd, size = "replay", {}, [], "huge"
        self.leave_stage()
        self.cuts = sorted(r.random() for _ in range(r.randrange(4)))
        if size == "empty":
            self.virus = False
            return
        lines = r.choices(TEXTS, k=r.randrange(60))
        if self.pace == "drip":
            lines = lines[:8]
        ends = r.choices(ENDS, k=len(lines))
        text = b"".join(a + b for a, b in zip(lines, ends))
        self.first = head(r, self.number)
        if self.virus:
            text += b"\r\n" + EICAR + b"\r\n"
        if size == "small" or self.pace == "drip":
            self.first += text
        else:
            self.block = (text or b"x") + b"\r\n"
            most = {"large": 100000, "huge": 3 * MIB}[size]
            if self.leave == "replay":
                most = 8 * MIB
            self.times = most // len(self.block)
        if not self.bdat or self.times or chance(r, 80):
            self.first += b"" if self.first.endswith(b"\r\n") else b"\r\n"

    def leave_stage(self):
        if self.leave == "DATA" and self.bdat:
            self.leave = "body"
        if self.leave in ("flood", "partial"):
            self.leave_how = "rst" if self.leave == "flood" else "fin"
        # The step in which the client goes, or None if after the last one.
        self.leave_at = "body" if self.leave in ("body", "almost", "silent") else \
            self.leave if self.leave in ("MAIL", "RCPT", "DATA") else None
        self.here = self.gone = None    # the client may go; it has gone
        if self.leave in ("scan", "flood", "hop", "replay"):
            self.here, self.gone = threading.Event(), threading.Event()

    def client_goes(self):
        """Let the client go now, and wait until it has gone.  Returns whether the
        daemon must notice that.  An EOF alone is no sign that a client has gone."""
        self.here.set()
        gone = self.gone.wait(20)
        if self.leave_how == "rst":
            time.sleep(.05)     # there is no way to see that a reset has arrived
        return gone and self.leave_how == "rst" and not self.session.unix

    def leave_cut(self, part):
        """Returns how many bytes of that step are still sent."""
        if self.leave == "almost":
            return len(part) - 1 - int(self.cut * 4)
        return len(part) // 2 if self.leave_at == "body" else len(part)

    def raw(self):
        return self.first + self.block * self.times

    def wire(self):
        """Returns the bytes after DATA, without the final dot."""
        return stuff(self.first) + stuff(self.block) * self.times

    def base(self):
        """Returns what clamd and the next hop must receive."""
        if self.as_chunks():
            return self.raw()
        return normal(self.first) + normal(self.block) * self.times

    def as_chunks(self):
        """Returns whether the daemon forwards the message with BDAT."""
        return self.bdat and self.session.chunking

    def chunks(self):
        raw = self.raw()
        at = [0, *(int(len(raw) * c) for c in self.cuts), len(raw)]
        return [raw[a:b] for a, b in zip(at, at[1:])]

    def faultless(self):
        return self.session.faultless() and \
            not (self.leave or self.hop or self.clamd)

    def __str__(self):
        plan = ["BDAT" if self.bdat else "DATA", self.pace, "%d bytes" % (
            len(self.first) + len(self.block) * self.times)]
        plan += ["virus"] * self.virus
        plan += ["client leaves: %s, %s" % (self.leave, self.leave_how)] \
            if self.leave else []
        plan += ["next hop: %s %s" % f
                 for f in {**self.session.hop, **self.hop}.items()]
        plan += ["clamd: " + ", ".join(self.clamd)] if self.clamd else []
        facts = "reply %r%s%s, clamd: %s, next hop asked %d times, took %s%s" % (
            self.reply, "" if self.sent_all else ", not sent whole",
            ", left" + " first" * self.gone_first if self.left else "",
            sorted(self.scan_results) or "nothing", self.asked, self.taken or "nothing",
            "" if self.answered or not self.taken else " without a whole 2xx")
        return "message %d (%s): %s; daemon meanwhile: %s" % (
            self.number, "; ".join(plan), facts,
            sorted(self.session.windows) or "nothing")


class Session:
    """A connection of a client, and the next hop's faults for it."""

    def __init__(self, seed, number):
        self.number = number
        r = dice(seed, "session", number)
        # The client's address contains the session's number.  OutAddress is a
        # port alone, so the daemon connects to the next hop at the client's
        # address, and the next hop knows the session.
        self.unix = chance(r, 5)
        self.proxy = r.choices((0, 1, 2), (8, 1, 1))[0] * (not self.unix)
        self.address = "127.%d.%d.%d" % (
            1 + (number >> 16) | (self.proxy and 128), number >> 8 & 255, number & 255)
        self.hello = r.choices(("EHLO", "HELO"), (19, 1))[0]
        self.chunking = chance(r, 50) and self.hello == "EHLO"
        self.limit = r.choices((0, 20000), (29, 1))[0] if self.hello == "EHLO" else 0
        self.style = pick(r, {"plain": 6, "lines": 2, "drip": 1})
        self.hop = {}
        if chance(r, 4) and not self.unix:
            self.hop[r.choice(("greeting", "EHLO"))] = pick(r, REPLIES)
        self.leave = r.choices((None, "greeting", "EHLO"), (98, 1, 1))[0]
        self.end = pick(r, {"quit": 4, "half": 2, "close": 1})
        count = r.choices((1, 2, 3, 8), (5, 3, 2, 1))[0]
        self.messages = [Message(seed, self, i) for i in range(count)]
        self.settings = []          # those that the session may have
        self.windows = set()        # disturbances of the daemon meanwhile

    def faultless(self):
        return not (self.hop or self.leave)

    def ip(self):
        """Returns the client's address as the daemon logs it."""
        if self.proxy:
            return b"203.0.113.%d" % (self.number & 255)
        return b"local" if self.unix else self.address.encode()

    def proxy_header(self):
        """Returns the PROXY header of a load balancer, in two versions."""
        if self.proxy == 1:
            return b"PROXY TCP4 %s 192.0.2.1 4711 25\r\n" % self.ip()
        if self.proxy == 2:
            return b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(
                (203, 0, 113, self.number & 255, 192, 0, 2, 1, 18, 103, 0, 25))
        return b""

    def impatient(self):
        return any(s.timeout < 10 for s in self.settings)


# ---------------------------------------------------------------- settings

HEADERS = {     # the configured text: the header sent
    None: b"X-Virus-Scanned: ClamAV using ClamSMTP\r\n",
    "": b"",
    "X-Soak: %i": b"X-Soak: %s\r\n",
    r"X-Soak: one\r\n\ttwo 100%%": b"X-Soak: one\r\n\ttwo 100%%\r\n",
    "Received: by soak for %i": b"Received: by soak for %s\r\n",
}


class Settings:
    """The daemon's configuration."""

    def __init__(self, seed, number, clients, scripts, has_real):
        """scripts: None, or a VirusAction that is quick and one that may hang."""
        r = dice(seed, "settings", number)
        self.number = number
        self.actions = [(r.choice(("drop", "bounce", "pass")), None)]
        if chance(r, 50):
            self.actions.insert(0, (r.choice(("drop", "bounce", "pass")), "PUA.*"))
        self.quarantine = chance(r, 50)
        self.scan_failure = r.choices(("tempfail", "pass"), (4, 1))[0]
        self.timeout, self.scan_timeout = r.choices(((60, 2), (2, 1)), (8, 1))[0]
        self.max_scans = r.choices((2, 10, 50), (1, 3, 3))[0]
        self.max_connections = r.choices((500, clients * 3 // 4), (9, 1))[0]
        self.keepalives = r.choices((0, 1), (2, 1))[0]
        self.max_scan_size = r.choices((0, 50000), (4, 1))[0]
        self.header = r.choice(list(HEADERS))
        self.port = r.randrange(2)              # the next hop has two
        self.listeners = r.choice((2, 3))
        self.real = chance(r, 15) and has_real
        self.clamds = r.choices(
            (["a"], ["b"], ["tcp"], ["dead", "a"], ["a", "b"], ["tcp", "dead", "a"],
             ["a", "dead", "tcp", "b"]))[0]
        self.script = scripts and scripts[self.timeout < 10]

    def action(self, virus):
        return next(action for action, pattern in self.actions
                    if pattern is None or virus.startswith(pattern[:-1]))

    def header_line(self, session):
        line = HEADERS[self.header]
        return line % session.ip() if b"%s" in line else line.replace(b"%%", b"%")

    def text(self, listen, hop_ports, clamds, fixed):
        """Returns the file.  listen: addresses; clamds: name to address; fixed: the
        lines that never change."""
        lines = fixed + ["ProxyFrom: 127.128.0.0/9"]
        lines += ["Listen: " + a for a in listen[:self.listeners]]
        lines += ["ClamAddress: " + clamds[c]
                  for c in ["real"] * self.real + self.clamds]
        lines += ["Action: " + " ".join(filter(None, a)) for a in self.actions]
        if self.header is not None:
            lines.append("Header: " + self.header)
        if self.script:
            lines.append("VirusAction: " + self.script)
        return "\n".join(lines + [
            "OutAddress: %d" % hop_ports[self.port],
            "Quarantine: " + ("on" if self.quarantine else "off"),
            "ScanFailure: " + self.scan_failure, "TimeOut: %d" % self.timeout,
            "ScanTimeOut: %d" % self.scan_timeout, "MaxScans: %d" % self.max_scans,
            "MaxConnections: %d" % self.max_connections,
            "KeepAlives: %d" % self.keepalives,
            "MaxScanSize: %d" % self.max_scan_size, ""])
