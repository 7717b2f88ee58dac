"""The accounts: the reply to each client, and whether it is true."""

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
# Replies of the daemon's own, and the fault that each needs.
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
    """Returns where a header was added to the message and which one, or None when
    the content is not the message that was sent."""
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
        self.replies = collections.Counter()
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

    # -- during the run

    def scanned(self, m, data):
        """Check the data that clamd has received."""
        if data.partition(b"\n")[2] != m.base():
            self.fail("altered", "clamd received %d bytes, not those that were sent: %s"
                      % (len(data), m))

    def forwarded(self, m):
        """The next hop has received DATA or BDAT for the message.  That must not
        happen without clamd's OK."""
        m.asked += 1
        settings = m.session.settings
        if "virus" in m.scan_results or (m.virus and any(s.real for s in settings)):
            allowed = "pass" in self.actions(m)
        else:
            allowed = "ok" in m.scan_results or not m.first or not m.virus and \
                any(s.real for s in settings)
        if not allowed and not any(s.scan_failure == "pass" for s in settings):
            self.fail("invented", "forwarded without clamd's OK: %s" % m)

    def content(self, m, content, as_chunks):
        """Check the content that the next hop has received.  Returns the kind of its
        header."""
        found = header_found(m, content)
        if found is None:
            self.fail("altered", "the next hop received %d bytes, not the %d sent "
                      "with a header: %s" % (len(content), len(m.base()), m))
            return "another"
        at, header = found
        kind = self.header_kind(m, header)
        if kind is None:
            self.fail("altered", "the header is %r: %s" % (header, m))
        elif header and at != header_place(
                m.base(), header.startswith(b"Received:"))[0]:
            self.fail("altered", "the header is at %d: %s" % (at, m))
        elif kind == "clean" and m.virus:
            self.fail("invented", "a virus with the header of clean mail: %s" % m)
        if as_chunks != m.as_chunks():
            self.fail("altered", "DATA became BDAT or BDAT became DATA: %s" % m)
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

    # -- after the run

    def log_lines(self, text, messages):
        """Check that a log in JSON has the reply that each client received."""
        for line in map(json.loads, text.splitlines()):
            if line.get("event") != "mail" or line["from"] == "twice@soak":
                continue
            number = line["from"].split("@")[0]
            m = messages.get(int(number) if number.isdigit() else None)
            if m is None or m.reply_to == "body" and \
                    not m.reply.startswith(line["reply"].encode()):
                self.fail("unexplained", "the log has %s: %s" % (line, m))

    def judge(self, m, copies):
        """Judge a message.  copies: the numbers of the messages in quarantine."""
        self.messages += 1
        self.replies[self.verdict(m)] += 1
        self.by_real_clamd += m.asked and not m.scan_results and m.first != b"" and \
            any(s.real for s in m.session.settings)
        code = (m.reply or b"")[:1]
        excuse = self.excuse(m)
        if len(m.taken) > 1:
            self.fail("invented", "%d copies: %s" % (len(m.taken), m))
        elif m.taken and not m.sent_all:
            self.fail("invented", "taken, but its end was never sent: %s" % m)
        elif m.taken and m.gone_first:
            self.fail("invented", "taken, but its client had gone before: %s" % m)
        elif m.taken and code in (b"4", b"5"):
            if not m.answered or "stopped at once" in m.session.windows:
                self.unknown["taken, but the reply was lost on its way"] += 1
            else:
                self.fail("invented", "taken, but refused to the client: %s" % m)
        elif code == b"2" and not m.taken:
            self.judge_discarded(m, copies)
        elif m.left and m.sent_all and not m.gone_first and not m.reply:
            self.unknown["client gone after its last byte: %s" % (
                "taken" if m.taken else "not taken")] += 1
        if not m.reply and not m.left and not m.session.windows & {"stopped at once"}:
            self.fail("unexplained", "no reply: %s" % m)
        elif code in (b"4", b"5") and not excuse:
            self.fail("unexplained", "refused: %s" % m)
        elif code == b"2" and DISCARDED not in m.reply and \
                b"soak %d took" % m.number not in m.reply:
            self.fail("unexplained", "the reply of another message: %s" % m)
        if m.faultless() and not m.session.windows:
            self.faultless += 1
            self.delivered += code == b"2" or excuse == "virus"

    def judge_discarded(self, m, copies):
        settings = m.session.settings
        if DISCARDED not in m.reply or not m.virus or "drop" not in self.actions(m):
            self.fail("lost", str(m))
        elif all(s.quarantine for s in settings) and m.number not in copies:
            self.fail("lost", "no copy in quarantine: %s" % m)

    @staticmethod
    def verdict(m):
        if m.reply is None:
            return "none, the client had left" if m.left else "none"
        if DISCARDED in m.reply:
            return "250 by the daemon, virus dropped"
        if m.reply[:1] == b"2":
            return "250 by the next hop"
        for pattern, what in EXCUSES:
            if re.match(pattern, m.reply):
                return "%s by the daemon, %s" % (m.reply[:3].decode(), what)
        return "%s by the next hop" % m.reply[:3].decode("latin-1")

    def excuse(self, m):
        """Returns the reason for a refusal, or None if there is none."""
        if not m.reply or m.reply[:1] == b"2":
            return None
        hop = {**m.session.hop, **m.hop}
        settings = m.session.settings
        impatient = m.session.impatient()
        if b"soak %d " % m.number in m.reply:
            return "next hop" if hop else None
        what = next((w for p, w in EXCUSES if re.match(p, m.reply)), None)
        size = len(m.base())
        well = {
            "next hop": hop or impatient or
                        m.session.windows & {"next hop down", "stopped at once"},
            "clamd": True,      # some faults of clamd belong to no message
            "full": "full" in m.session.windows,
            "stop": "stopped at once" in m.session.windows or
                    "stop" in m.session.windows and m.reply_to != "body",
            "timeout": m.leave == "silent" or impatient,
            "virus": m.virus and "bounce" in self.actions(m),
            "size": "limit" in m.scan_results or 0 < m.session.limit < size or
                    any(0 < s.max_scan_size < size for s in settings),
        }
        return what if what and well[what] else None


def virus_names(m):
    """Returns the names that the scripted clamd and the real one give the virus."""
    if not m.virus:
        return ()
    return ("PUA.Soak.%d" if m.number % 2 else "Soak.%d") % m.number, EICAR_NAME
