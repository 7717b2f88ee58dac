"""The state that all threads share."""

import re
import threading

from conn import LIMIT
from harness import Failed
from plan import Session

MARK = re.compile(rb"soak-(\d+)-")


class World:
    def __init__(self, seed, target, accounts):
        self.seed, self.accounts = seed, accounts
        self.target = target            # messages
        self.tcp = self.unix = self.status = None   # where the daemon listens
        self.settings = []              # all of the run
        self.oldest = 0                 # the oldest that a new session may get
        self.windows = set()            # disturbances of the daemon now
        self.sessions, self.messages = {}, {}       # by number, until judged
        self.number = 0                 # of the last session
        self.begun = 0                  # messages
        self.gate = threading.Event()   # shut: all peers halt
        self.gate.set()
        self.cond = threading.Condition()
        self.up = False                 # there is a daemon to connect to
        self.ends = 0                   # of daemons
        self.over = False
        self.active = set()             # sessions that have a client
        self.accepted = self.served = 0     # connections to our servers
        with open("/proc/sys/net/ipv4/tcp_wmem") as file:
            # The most bytes in the buffers to a next hop that does not read.
            self.in_flight = int(file.read().split()[2]) + (1 << 19)

    # -- for the client

    def next_session(self):
        with self.cond:
            if self.over or self.begun >= self.target:
                return None
            self.number += 1
            number = self.number
        return Session(self.seed, number)

    def session_begins(self, s):
        """Wait until there is a daemon.  Returns whether there is one."""
        with self.cond:
            self.cond.wait_for(lambda: self.up or self.over)
            if self.over:
                return False
            self.active.add(s)
            s.windows = set(self.windows)
            s.oldest = self.oldest
            s.settings = self.settings[s.oldest:]
            self.sessions[s.number] = s
            for m in s.messages:
                self.messages[m.number] = m
            return True

    def session_is_greeted(self, s):
        """Note the settings that the session may have.  They no longer change."""
        s.settings = self.settings[s.oldest:]

    def session_ends(self, s):
        with self.cond:
            self.active.discard(s)
            self.cond.notify_all()

    def begin(self, m):
        with self.cond:
            self.begun += not m.begun
            m.begun = True

    # -- for the servers

    def session_at(self, address):
        """Returns the session for which the daemon connected to the next hop at this
        address, or None."""
        _, b, c, d = map(int, address.split("."))
        return self.sessions.get(((b & 127) - 1) << 16 | c << 8 | d) if b else None

    def message_in(self, data):
        """Returns the message that contains these bytes, or None."""
        mark = MARK.search(data)
        return self.messages[int(mark[1])] if mark else None

    def serving(self, change):
        """Count a connection that begins or ends.  Returns its number."""
        with self.cond:
            self.served += change
            self.accepted += change > 0
            self.cond.notify_all()
            return self.accepted

    # -- for the director

    def open(self, up):
        with self.cond:
            self.up = up
            self.cond.notify_all()

    def end(self):
        self.gate.set()
        self.over = True
        self.open(False)

    def enter(self, window):
        with self.cond:
            self.windows.add(window)
            for s in self.active:
                s.windows.add(window)

    def leave(self, window):
        with self.cond:
            self.windows.discard(window)

    def wait_quiet(self):
        """Wait until no client has a session and no server a connection."""
        with self.cond:
            if not self.cond.wait_for(lambda: not self.active and not self.served,
                                      4 * LIMIT):
                raise Failed("sessions do not end: %s; connections: %d" % (
                    [str(m) for s in self.active for m in s.messages][:3], self.served))
