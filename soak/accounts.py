"""Who was told what, and whether it is true."""

import collections
import json
import re
import threading

from real import EICAR_NAME
from vectors import header_place

DISCARDED = b"Virus Detected; Discarded Email"
INFECTED = re.compile(rb"X-Virus-Infected: ([!-~]+)\r\n\Z")
UNSCANNED = re.compile(rb"X-Virus-Unscanned: [ -~]+\r\n\Z")
KINDS = ("lost", "invented", "altered", "left behind")
# Replies of the daemon's own, and what must have happened for them.
EXCUSES = (
    (rb"4\d\d .*Local Error \(next mail server", "next hop"),
    (rb"4\d\d .*Local Error \(clamd", "clamd"),
    (rb"45[12] .*Local Error \((TempDirectory|quarantine|memory)", "full"),
    (rb"421 4.3.2 Service shutting down", "stop"),
    (rb"421 4.4.2 Timeout", "timeout"),
    (rb"550 5.7.1 Virus Detected", "virus"),
    (rb"552 5.3.4 ", "size"),
)


def header_found(m, content):
    """Which header was added to the message and where; None: it is another
    message than what was sent."""
    base = m.base()
    size = len(content) - len(base)
    for received in False, True:
        at, parting = header_place(base, received)
        if size >= 0 and content[:at] == base[:at] and \
                content[at + size:] == base[at:]:
            header = content[at:at + size]
            if size > 0 and parting:
                header = header[:-2] if header.endswith(b"\r\n\r\n") else b"?"
            return at, header
    return None


class Accounts:
    def __init__(self):
        self.lock = threading.Lock()
        self.injected = collections.Counter()
        self.told = collections.Counter()
        self.unknown = collections.Counter()
        self.failures = collections.Counter()
        self.texts = []             # of failures
        self.messages = self.by_real_clamd = self.copies = self.scripts_run = 0
        self.faultless = self.delivered = 0

    def inject(self, what):
        with self.lock:
            self.injected[what] += 1

    def fail(self, kind, text):
        with self.lock:
            self.failures[kind] += 1
            self.texts.append("%s: %s" % (kind, text))

    # -- while it happens

    def scanned(self, m, data):
        """clamd was given this."""
        if data.partition(b"\n")[2] != m.base():
            self.fail("altered", "clamd got %d bytes, not those that were sent: %s"
                      % (len(data), m))

    def forwarded(self, m):
        """The next hop is asked to take it: promise 4."""
        m.asked += 1
        settings = m.session.settings
        if "virus" in m.said or (m.virus and any(s.real for s in settings)):
            allowed = "pass" in self.actions(m)
        else:
            allowed = "ok" in m.said or not m.first or not m.virus and \
                any(s.real for s in settings)
        if not allowed and not any(s.scan_failure == "pass" for s in settings):
            self.fail("invented", "forwarded without clamd's OK: %s" % m)

    def content(self, m, content, as_chunks):
        """The next hop has all of it; under which header?"""
        found = header_found(m, content)
        if found is None:
            self.fail("altered", "the next hop got %d bytes, not the %d that were sent "
                      "and a header: %s" % (len(content), len(m.base()), m))
            return "another"
        at, header = found
        kind = self.header_kind(m, header)
        if kind is None:
            self.fail("altered", "with the header %r: %s" % (header, m))
        elif header and at != header_place(
                m.base(), header.startswith(b"Received:"))[0]:
            self.fail("altered", "the header is at %d: %s" % (at, m))
        elif kind == "clean" and m.virus:
            self.fail("invented", "a virus under the header of clean mail: %s" % m)
        if as_chunks != m.as_chunks():
            self.fail("altered", "DATA and BDAT changed places: %s" % m)
        return kind or "another"

    @staticmethod
    def header_kind(m, header):
        if any(header == s.header_line(m.session) for s in m.session.settings):
            return "clean"
        infected = INFECTED.match(header)
        if infected and infected[1].decode() in virus_names(m):
            return "infected"
        if UNSCANNED.match(header) and \
                any(s.scan_failure == "pass" for s in m.session.settings):
            return "unscanned"
        return None

    @staticmethod
    def actions(m):
        return {s.action(v) for s in m.session.settings for v in virus_names(m)}

    # -- when all is over

    def log_lines(self, text, messages):
        """Of a log in JSON: what the client was told is what was logged."""
        for line in map(json.loads, text.splitlines()):
            if line.get("event") != "mail" or line["from"] == "twice@soak":
                continue
            number = line["from"].split("@")[0]
            m = messages.get(int(number) if number.isdigit() else None)
            if m is None or m.told_at == "body" and \
                    not m.told.startswith(line["reply"].encode()):
                self.fail("unexplained", "the log says %s: %s" % (line, m))

    def judge(self, m, copies):
        """copies: numbers of the messages in quarantine."""
        self.messages += 1
        self.told[self.verdict(m)] += 1
        self.by_real_clamd += m.asked and not m.said and m.first != b"" and \
            any(s.real for s in m.session.settings)
        code = (m.told or b"")[:1]
        excuse = self.excuse(m)
        if len(m.taken) > 1:
            self.fail("invented", "%d copies: %s" % (len(m.taken), m))
        elif m.taken and not m.sent_all:
            self.fail("invented", "its end was never sent: %s" % m)
        elif m.taken and m.gone_first:
            self.fail("invented", "its client had gone before: %s" % m)
        elif m.taken and code in (b"4", b"5"):
            if not m.answered or "stopped at once" in m.session.windows:
                self.unknown["taken, but the reply was lost on its way"] += 1
            else:
                self.fail("invented", "taken and refused: %s" % m)
        elif code == b"2" and not m.taken:
            self.judge_discarded(m, copies)
        elif m.left and m.sent_all and not m.gone_first and not m.told:
            self.unknown["client gone after its last byte: %s" % (
                "taken" if m.taken else "not taken")] += 1
        if not m.told and not m.left and not m.session.windows & {"stopped at once"}:
            self.fail("unexplained", "no reply: %s" % m)
        elif code in (b"4", b"5") and not excuse:
            self.fail("unexplained", "refused: %s" % m)
        elif code == b"2" and DISCARDED not in m.told and \
                b"soak %d took" % m.number not in m.told:
            self.fail("unexplained", "another's reply: %s" % m)
        if m.faultless() and not m.session.windows:
            self.faultless += 1
            self.delivered += code == b"2" or excuse == "virus"

    def judge_discarded(self, m, copies):
        settings = m.session.settings
        if DISCARDED not in m.told or not m.virus or "drop" not in self.actions(m):
            self.fail("lost", str(m))
        elif all(s.quarantine for s in settings) and m.number not in copies:
            self.fail("lost", "no copy in quarantine: %s" % m)

    @staticmethod
    def verdict(m):
        if m.told is None:
            return "nothing, it had left" if m.left else "nothing"
        if DISCARDED in m.told:
            return "250 by the daemon, virus dropped"
        if m.told[:1] == b"2":
            return "250 by the next hop"
        for pattern, what in EXCUSES:
            if re.match(pattern, m.told):
                return "%s by the daemon, %s" % (m.told[:3].decode(), what)
        return "%s by the next hop" % m.told[:3].decode("latin-1")

    def excuse(self, m):
        """Why it could be refused, if there is a reason."""
        if not m.told or m.told[:1] == b"2":
            return None
        hop = {**m.session.hop, **m.hop}
        settings = m.session.settings
        impatient = m.session.impatient()
        if b"soak %d " % m.number in m.told:
            return "next hop" if hop else None
        what = next((w for p, w in EXCUSES if re.match(p, m.told)), None)
        size = len(m.base())
        well = {
            "next hop": hop or impatient or
                        m.session.windows & {"next hop down", "stopped at once"},
            "clamd": True,      # others of its faults belong to no message
            "full": "full" in m.session.windows,
            "stop": "stopped at once" in m.session.windows or
                    "stop" in m.session.windows and m.told_at != "body",
            "timeout": m.leave == "silent" or impatient,
            "virus": m.virus and "bounce" in self.actions(m),
            "size": "limit" in m.said or 0 < m.session.limit < size or
                    any(0 < s.max_scan_size < size for s in settings),
        }
        return what if what and well[what] else None


def virus_names(m):
    """By the scripted clamd and by the real one."""
    if not m.virus:
        return ()
    return ("PUA.Soak.%d" if m.number % 2 else "Soak.%d") % m.number, EICAR_NAME
