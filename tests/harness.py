"""Scripted peers for the tests of clamsmtpd: a daemon, a next hop, a clamd and
a client.  Python's standard library only.

Every peer runs in threads of its own, with blocking calls.  Every wait has the
limit WAIT.  No test sleeps for a fixed time: it waits until a condition is true.
"""

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent import futures

WAIT = float(os.environ.get("TEST_WAIT", "30"))  # seconds; never a measure
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLAMSMTPD = os.path.abspath(
    os.environ.get("CLAMSMTPD", os.path.join(TOP, "clamsmtpd")))

READ_AGAIN = "clamsmtpd.conf: reloaded"
GOOD = b"Subject: x\r\n\r\nnothing\r\n"
BAD = b"Subject: x\r\n\r\nEICAR\r\n"
LARGE = GOOD + 600 * (70 * b"x" + b"\r\n")    # does not stay in memory
EICAR = b"EICAR"            # what the scripted clamd calls a virus
VIRUS = "Eicar-Test-Signature"
HEADER = b"X-Virus-Scanned: ClamAV using ClamSMTP\r\n"
# Qemu passes the kernel's number of the error on, which MIPS does not know.
REFUSED = "Connection refused" if "TEST_QEMU" not in os.environ else \
    "(Connection refused|No error information)"
INFECTED = b"X-Virus-Infected: "
REPORT = re.compile(r"(Address|Leak|UndefinedBehavior|Memory)Sanitizer"
                    r"|runtime error:|Assertion .* failed|\bbug\b:")


class Failed(AssertionError):
    """A peer did not do what the test waits for."""


def since():
    """The current second by time(2), or the one before.  The clock that some libcs
    read for time(2) is a tick slower than that of time.time()."""
    return int(time.time() - .1)


def until(condition, what, limit=None):
    """Wait until condition() is true and return what it gave."""
    limit = WAIT if limit is None else limit
    end = time.monotonic() + limit
    pause = 0.001
    while True:
        got = condition()
        if got:
            return got
        if time.monotonic() > end:
            raise Failed("waited %g s in vain: %s" % (limit, what))
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def never(condition, what, turns=20):
    """Check several times that condition() is false; it can only be sampled."""
    for _ in range(turns):
        assert not condition(), "this must not happen: " + what
        time.sleep(0.01)


def at_once(work, count):
    """Run work(0), work(1) ... each in a thread of its own.  Returns the list of
    their results, or raises the exception that one of them raised."""
    with futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def finish_file(command, path):
    """A shell command that writes its output into path.  The file has all of the
    output as soon as it exists."""
    return "(%s) > %s.new 2>&1; mv %s.new %s" % (command, path, path, path)


def wait_listener(path):
    """Wait until a unix socket accepts connections, without a connection to it,
    which the daemon would count."""
    def listens():
        with open("/proc/net/unix") as file:
            return any(line.endswith(" %s\n" % path) and
                       int(line.split()[3], 16) & 0x10000 for line in file)
    until(listens, "a listener on " + path)


def wait_file(path):
    until(lambda: os.path.exists(path), "the file " + path)
    with open(path, "rb") as file:
        return file.read()


# The variables of a VirusAction.
NINE = ["CLIENT", "EMAIL", "RECIPIENTS", "REMOTE", "REMOTE_HELO", "SENDER",
        "SERVER", "TMPDIR", "VIRUS"]


def environment(site, **settings):
    """Start a daemon whose VirusAction saves its environment.  Returns a function
    that waits for this environment and returns it."""
    out = site.path("env")
    site.start(VirusAction=finish_file("cat /proc/self/environ", out), **settings)

    def result():
        return dict(item.split("=", 1) for item in
                    wait_file(out).decode("utf-8", "surrogateescape").split("\0")
                    if item)
    return result


def effective(result):
    """The settings that -n has printed: {lower-case name: [values]}."""
    assert result.returncode == 0, result.stderr
    settings = {}
    for line in result.stdout.splitlines():
        if line.startswith("#"):            # not set
            continue
        name, value = re.match(r"(\w+):?\s*(.*)$", line).groups()
        settings.setdefault(name.lower(), []).append(value)
    return settings


def complaints(result):
    """The lines of -n on standard error, except those about a user or a directory
    that this machine does not have."""
    return [line for line in result.stderr.splitlines()
            if not re.search("is not a (user|directory) of this system$", line)]


def turns(site):
    """Make sure that the daemon has read all that was sent to it before."""
    for _ in range(2):
        client = site.session()
        client.quit()


def report_in(text):
    """The report of a sanitizer or of an assertion in a text, or None."""
    found = REPORT.search(text)
    return text[text.rfind("\n", 0, found.start()) + 1:][:3000] if found else None


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode("utf-8",
                                                            "surrogateescape")


def shown(data, most=400):
    """Bytes for a failure message, without the middle of a long string."""
    if len(data) <= most:
        return repr(bytes(data))
    return "%r ... %r (%d bytes)" % (bytes(data[:most // 2]),
                                     bytes(data[-most // 2:]), len(data))


def same(got, want, what="bytes"):
    """Compare long byte strings; the failure says where they differ."""
    if got == want:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b),
              min(len(got), len(want)))
    raise Failed("%s differ at %d of %d (expected %d): got %r, expected %r"
                 % (what, at, len(got), len(want), bytes(got[max(0, at - 30):at + 30]),
                    bytes(want[max(0, at - 30):at + 30])))


def stuff(body):
    """Dots at line starts doubled (lines end in CRLF)."""
    if body.startswith(b"."):
        body = b"." + body
    return body.replace(b"\r\n.", b"\r\n..")


def unstuff(wire):
    if wire.startswith(b"."):
        wire = wire[1:]
    return wire.replace(b"\r\n.", b"\r\n")


def connect(address, source=None):
    """A socket connected to an address, which is written as clamsmtpd does."""
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT)
        sock.connect(address)
        return sock
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.settimeout(WAIT)
    if source:
        sock.bind((source, 0))
    sock.connect((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def localhost():
    """The name of 127.0.0.1, or the address itself if /etc/hosts has no such name,
    as on a machine made by debootstrap."""
    try:
        with open("/etc/hosts") as file:
            named = re.search(r"(?m)^127\.0\.0\.1\s(.*\s)?localhost\b", file.read())
    except OSError:
        named = None
    return "localhost" if named else "127.0.0.1"


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def hold_port(host="127.0.0.1", port=0):
    """A socket that reserves a port.  Only a program that asks for this very port
    with SO_REUSEADDR, as servers do, can listen on it.  Until then a connection to
    it is refused."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return sock


def own_host(last):
    """A loopback address that only this process uses, for tests that need a
    certain port."""
    pid = os.getpid()
    return "127.%d.%d.%s" % (64 + (pid >> 8 & 63), pid & 255, last)


def reset(sock):
    """Close with an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextlib.contextmanager
def full_listener(path=None, host="127.0.0.1"):
    """The address of a listener that accepts no connection and whose backlog is
    full.  connect() fails with EAGAIN on a unix socket; on a port it hangs."""
    kind = socket.AF_UNIX if path else socket.AF_INET
    with contextlib.ExitStack() as stack:
        def new():
            return stack.enter_context(socket.socket(kind))
        listener = new()
        listener.bind(path or (host, 0))
        listener.listen(0)
        for _ in range(4):              # more than fit
            knock = new()
            knock.setblocking(False)
            knock.connect_ex(listener.getsockname())
        yield path or "%s:%d" % listener.getsockname()


def mounting(*mounts, of=None):
    """For preexec: makes these mounts (source, target, type, flags, data) for the
    new process alone.  With of=PID it makes them in the namespace of PID."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def preexec():
        if of:
            with open("/proc/%d/ns/mnt" % of) as namespace:
                check(libc.setns(namespace.fileno(), 0))
        else:
            check(libc.unshare(0x20000))                    # CLONE_NEWNS
            check(libc.mount(None, b"/", None, 0x44000, None))  # MS_PRIVATE, all
        for source, target, kind, flags, data in mounts:
            check(libc.mount(as_bytes(source), as_bytes(target), as_bytes(kind),
                             flags, as_bytes(data)))
    return preexec


def tmpfs(path, options):
    """A tmpfs on path, for mounting()."""
    return "tmpfs", path, "tmpfs", 0, options


def bind(source, path):
    """A bind mount of source on path, for mounting()."""
    return source, path, "", 0x1000, ""                         # MS_BIND


class Gone(Exception):
    """The other end has closed ("eof") or broken ("reset") the connection."""


class Stream:
    """A socket with a buffer for what has been read ahead."""

    def __init__(self, sock):
        self.sock = sock
        self.ahead = bytearray()
        self.all = bytearray()       # everything that was ever read

    def fill(self):
        try:
            got = self.sock.recv(65536)
        except socket.timeout:
            raise Failed("nothing came for %g s; unread so far: %s"
                         % (WAIT, shown(self.ahead))) from None
        except (ConnectionError, OSError):
            raise Gone("reset") from None
        if not got:
            raise Gone("eof")
        self.ahead += got
        self.all += got

    def take(self, count):
        data = bytes(self.ahead[:count])
        del self.ahead[:count]
        return data

    def line(self):
        """The next line, its LF included."""
        seen = 0
        while True:
            at = self.ahead.find(b"\n", seen)
            if at >= 0:
                return self.take(at + 1)
            seen = len(self.ahead)
            self.fill()

    def exactly(self, count):
        while len(self.ahead) < count:
            self.fill()
        return self.take(count)

    def reply(self):
        """All lines of an SMTP reply."""
        lines = b""
        while True:
            line = self.line()
            lines += line
            if line[3:4] != b"-":
                return lines

    def more(self):
        """Whether there is something to read."""
        if self.ahead:
            return True
        try:                # a time-out of the socket would make recv() wait
            ready, _, _ = select.select([self.sock], [], [], 0)
            return bool(ready and self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False


def ehlo_reply(lines):
    return "".join("250%s%s\r\n" % ("-" if line is not lines[-1] else " ", line)
                   for line in lines).encode()


def end_of_data(data, seen=0):
    """The offset of the dot that ends the body, or -1.  The caller knows that the
    first `seen' bytes have none."""
    if data.startswith(b".\r\n"):
        return 0
    at = data.find(b"\r\n.\r\n", max(0, seen - 4))
    return at + 2 if at >= 0 else -1


def piece_sizes(exactly):
    """The sizes of the pieces of INSTREAM, as an iterator.  exactly(n) reads n bytes.
    The caller reads the pieces themselves."""
    return iter(lambda: struct.unpack("!I", exactly(4))[0], 0)


# ---------------------------------------------------------------- actions
# A scripted server can do these things instead of sending a reply.

class Action:
    pass


class _Close(Action):
    """Close the connection in good order."""


class _Reset(Action):
    """Break the connection with an RST."""


CLOSE, RESET = _Close(), _Reset()


class Then(Action):
    """Send the reply, then do the action (CLOSE or RESET)."""

    def __init__(self, reply, action):
        self.reply, self.action = reply, action


class Drip(Action):
    """Send the reply one byte at a time."""

    def __init__(self, reply):
        self.reply = reply


class Early(Action):
    """For "body": send the reply after so many bytes of the body."""

    def __init__(self, reply, after=1):
        self.reply, self.after = reply, after


class Hold(Action):
    """Stall until go() is called or the test ends, then send the reply, or the
    usual one if none is given.  reached() waits for the stall."""

    def __init__(self, reply=None):
        self.reply = reply
        self._here = threading.Event()
        self._go = threading.Event()
        self.waiting = 0

    def reached(self, count=1):
        until(lambda: self._here.is_set() and self.waiting >= count,
              "a scripted peer reaches its stall")

    def go(self):
        self._go.set()

    def wait(self, server):
        self.waiting += 1
        self._here.set()
        while not self._go.wait(0.02) and not server.closing:
            pass


class Server:
    """A listening socket whose connections run serve() in threads."""

    family = "server"

    def __init__(self, path=None, host="127.0.0.1", port=0, backlog=1024):
        self.path, self.host, self.backlog = path, host, backlog
        self.held = None             # keeps the port while we are down
        if not path:
            self.held = hold_port(host, port)
            self.port = self.held.getsockname()[1]
        self.closing = False
        self.errors = []             # what went wrong in the threads
        self.accepted = 0
        self.lock = threading.RLock()
        self.socks = set()
        self.threads = []
        self.listener = None
        self.up()

    def up(self):
        """Listen; after down(), again on the same address."""
        if self.path:
            if os.path.exists(self.path):
                os.unlink(self.path)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(self.path)
            os.chmod(self.path, 0o666)
            self.address = self.path
        else:
            sock = hold_port(self.host, self.port)
            self.address = "%s:%d" % ("[%s]" % self.host if ":" in self.host
                                      else self.host, self.port)
        sock.listen(self.backlog)
        self.listener = sock
        thread = threading.Thread(target=self._accept, args=(sock,), daemon=True)
        thread.start()
        self.threads.append(thread)

    def down(self):
        """Stop listening.  Open connections stay open."""
        if self.listener:
            try:
                self.listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self.listener.close()
            self.listener = None
        if self.path and os.path.exists(self.path):
            os.unlink(self.path)

    def hang_up(self):
        """End all open connections."""
        with self.lock:                 # a thread closes none of them meanwhile
            for sock in self.socks:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:         # its other end has gone, or act() reset it
                    pass

    def close(self):
        self.closing = True
        self.down()
        if self.held:
            self.held.close()
        self.hang_up()
        for thread in list(self.threads):
            thread.join(WAIT)

    def _accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(None)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.socks.add(sock)
            self.count()
            thread = threading.Thread(target=self._run, args=(sock,), daemon=True,
                                      name="%s %s" % (self.family, self.address))
            self.threads.append(thread)
            thread.start()

    def _run(self, sock):
        try:
            self.serve(sock)
        except Exception as error:           # finish() checks self.errors
            if not self.closing:
                self.errors.append("%s: %s: %s" % (
                    self.family, type(error).__name__, error))
        finally:
            with self.lock:
                self.socks.discard(sock)
            sock.close()
            self.threads.remove(threading.current_thread())

    def count(self):
        """Count a connection as accepted."""
        with self.lock:
            self.accepted += 1

    def serve(self, sock):
        raise NotImplementedError

    def send(self, sock, data):
        try:
            sock.sendall(data)
        except OSError:
            raise Gone("reset") from None

    def error(self, text):
        self.errors.append("%s: %s" % (self.family, text))

    def act(self, sock, spec):
        """Do an action; return the text that was sent."""
        if isinstance(spec, _Close):
            raise Gone("closed")
        if isinstance(spec, _Reset):
            reset(sock)
            raise Gone("closed")
        if isinstance(spec, Then):
            self.send(sock, self.encode(spec.reply))
            return self.act(sock, spec.action)
        if isinstance(spec, Drip):
            data = self.encode(spec.reply)
            for i in range(len(data)):
                self.send(sock, data[i:i + 1])
                time.sleep(0)
            return data
        raise TypeError("not an action: %r" % (spec,))

    def encode(self, spec):
        return as_bytes(spec)


# ---------------------------------------------------------------- next hop

class Message:
    """A message that the next hop has accepted, or refused at its dot."""

    def __init__(self, mail, rcpts, how, wire):
        self.mail = mail             # the MAIL command
        self.rcpts = list(rcpts)     # the RCPT commands it has accepted
        self.how = how               # "DATA" or "BDAT"
        self.wire = wire             # after 354, without the dot line
        self.body = unstuff(wire) if how == "DATA" else wire
        self.reply = b""             # what the next hop said at the end
        self.xforward = {}

    def __repr__(self):
        return "<%s %s %r: %s>" % (self.how, self.mail, self.rcpts,
                                   shown(self.wire))


class HopSession:
    """One connection to the next hop, as it saw it."""

    def __init__(self, sock, hop):
        self.sock, self.hop = sock, hop
        self.stream = Stream(sock)
        self.commands = []           # lines, without CRLF, in order
        self.replies = []            # bytes, in order
        self.messages = []
        self.partial = None          # a body that never saw its dot
        self.ended = None            # "eof", "reset", or "closed" by itself
        self.over = threading.Event()
        self.mail, self.rcpts = None, []
        self.chunks = bytearray()

    def verbs(self):
        return [c.split(" ")[0].upper() for c in self.commands]

    def wait_end(self):
        if not self.over.wait(WAIT):
            raise Failed("the daemon keeps its session with the next hop; "
                         "commands so far: %r" % self.commands)
        return self.ended

    @property
    def raw(self):
        return bytes(self.stream.all)


XCLIENT = "XCLIENT NAME ADDR PROTO HELO PORT LOGIN DESTADDR"


class NextHop(Server):
    """A strict SMTP server that follows a script.

    on(verb, reply): verb is EHLO, MAIL ... or
        "greeting"  the first line
        "."         the reply to a message's end
        "body"      an Early() while the body comes
        "334"       the reply to a continuation line of AUTH
    A reply is text ("250-a\\n250 b"), bytes as they are, an action, a
    function (session, line) giving one of these, or a list of them for
    successive uses (then, as with None, the usual reply).
    """

    family = "next hop"
    USUAL = {
        "greeting": "220 next.hop ESMTP ready",
        "HELO": "250 next.hop",
        "MAIL": "250 2.1.0 sender ok",
        "RCPT": "250 2.1.5 recipient ok",
        "DATA": "354 go ahead",
        ".": "250 2.0.0 queued as 4711",
        "BDAT": "250 2.0.0 chunk ok",
        "RSET": "250 2.0.0 reset",
        "NOOP": "250 2.0.0 noop",
        "QUIT": "221 2.0.0 bye",
        "VRFY": "252 2.0.0 perhaps",
        "EXPN": "250 list@example.com",
        "HELP": "214 no help",
        "ETRN": "250 queuing started",
        "AUTH": "235 2.7.0 authenticated",
        "334": "235 2.7.0 authenticated",
        "XFORWARD": "250 2.0.0 forwarded",
        "XCLIENT": "220 next.hop ESMTP again",
    }

    def __init__(self, ehlo=("PIPELINING", "SIZE 104857600", "ETRN",
                             "8BITMIME", "DSN"), chunking=False, **kw):
        self.replies = {}
        self.ehlo = list(ehlo) + (["CHUNKING"] if chunking else [])
        self.sessions = []
        super().__init__(**kw)

    def on(self, verb, reply):
        """Set a reply."""
        self.replies[verb] = list(reply) if isinstance(reply, list) else reply
        return self

    # -- what tests check

    @property
    def messages(self):
        """The accepted messages (2xx at their end) of all sessions, in order."""
        return [m for s in list(self.sessions) for m in s.messages
                if m.reply[:1] == b"2"]

    @property
    def commands(self):
        return [c for s in list(self.sessions) for c in s.commands]

    @property
    def session(self):
        """The newest session."""
        until(lambda: self.sessions, "a connection to the next hop")
        return self.sessions[-1]

    def received(self, verb):
        """The commands with this verb, as they were received."""
        return [c for c in self.commands if c.split(" ")[0].upper() == verb]

    def wait_messages(self, count):
        until(lambda: len(self.messages) >= count,
              "%d messages at the next hop" % count)
        return self.messages

    # -- one connection

    def encode(self, spec):
        if isinstance(spec, bytes):
            return spec
        return b"".join(as_bytes(line) + b"\r\n" for line in spec.split("\n"))

    def usual(self, verb):
        if verb == "EHLO":
            return ehlo_reply(["next.hop greets you"] + self.ehlo)
        return self.USUAL.get(verb, "502 5.5.2 the next hop knows no such command")

    def reply(self, s, verb, line="", message=None):
        """Send what the script says; return the bytes sent.

        The message has its reply before the client receives it.
        """
        spec = self.replies.get(verb)
        if isinstance(spec, list):
            with self.lock:
                spec = spec.pop(0) if spec else None
        if callable(spec):
            spec = spec(s, line)
        if s.stream.more():
            self.error("bytes came before the reply to %r: %s"
                       % (line or verb, shown(s.stream.ahead)))
        if isinstance(spec, Hold):
            spec.wait(self)
            spec = spec.reply
        if spec is None:
            spec = self.usual(verb)
        if isinstance(spec, Action):
            data = self.act(s.sock, spec)
        else:
            data = self.encode(spec)
            if message:
                message.reply = data
            self.send(s.sock, data)
        s.replies.append(data)
        return data

    def serve(self, sock):
        s = HopSession(sock, self)
        with self.lock:
            self.sessions.append(s)
        try:
            self.talk(s)
        except Gone as gone:
            s.ended = str(gone)
        finally:
            s.over.set()

    def talk(self, s):
        said = self.reply(s, "greeting")
        while True:
            raw = s.stream.line()
            if not raw.endswith(b"\r\n"):
                self.error("a command without CR: %r" % raw)
            if said.startswith(b"334"):
                s.commands.append(raw.rstrip(b"\r\n").decode("latin-1"))
                said = self.reply(s, "334", s.commands[-1])
                continue
            if b"\r" in raw[:-2] or b"\0" in raw:
                self.error("control characters in a command: %r" % raw)
            line = raw.rstrip(b"\r\n").decode("latin-1")
            verb = line.split(" ")[0].upper()
            s.commands.append(line)
            if verb == "BDAT" and "CHUNKING" in self.ehlo:
                said = self.bdat(s, line)
                continue
            said = self.reply(s, verb, line)
            good = said.startswith(b"2")
            if verb == "MAIL" and good:
                s.mail, s.rcpts = line, []
            elif verb == "RCPT" and good:
                s.rcpts.append(line)
            elif verb in ("RSET", "EHLO", "HELO", "XCLIENT") and good:
                s.mail, s.rcpts, s.chunks = None, [], bytearray()
            elif verb == "DATA" and said.startswith(b"354"):
                said = self.data(s)
            elif verb == "QUIT":
                raise Gone("quit")

    def data(self, s):
        """Read the body of DATA.  Only CRLF.CRLF ends it."""
        early = self.replies.get("body")
        if isinstance(early, list):
            early = early.pop(0) if early else None
        seen = 0
        ahead = s.stream.ahead
        while (end := end_of_data(ahead, seen)) < 0:
            seen = len(ahead)
            s.partial = bytes(ahead)
            if early and len(ahead) >= early.after:
                if early.reply is not None:
                    if isinstance(early.reply, Action):
                        self.act(s.sock, early.reply)
                    else:
                        self.send(s.sock, self.encode(early.reply))
                early = None
            s.stream.fill()
        wire = s.stream.take(end)
        s.stream.take(3)
        s.partial = None
        message = Message(s.mail, s.rcpts, "DATA", wire)
        s.messages.append(message)
        s.mail, s.rcpts = None, []
        return self.reply(s, ".", ".", message)

    def bdat(self, s, line):
        words = line.split(" ")
        s.chunks += s.stream.exactly(int(words[1]))
        if [w.upper() for w in words[2:]] != ["LAST"]:
            return self.reply(s, "BDAT", line)
        message = Message(s.mail, s.rcpts, "BDAT", bytes(s.chunks))
        s.messages.append(message)
        s.mail, s.rcpts, s.chunks = None, [], bytearray()
        return self.reply(s, ".", line, message)


# ---------------------------------------------------------------- clamd

class Scan:
    """One scan, as clamd received it."""

    def __init__(self, command, data):
        self.command = command       # "INSTREAM" or "SCAN"
        self.data = data             # all of it, with the extra first line

    @property
    def first(self):
        """The first line, which is scanned but never forwarded."""
        return self.data.partition(b"\n")[0] + b"\n"

    @property
    def mail(self):
        return self.data.partition(b"\n")[2]

    def __repr__(self):
        return "<%s %s>" % (self.command, shown(self.data))


class Clamd(Server):
    """clamd over a unix socket or TCP.

    verdict: a function of the data that returns "OK", "NAME FOUND" or
    "WHY ERROR" (framed as clamd does), bytes (sent as they are), or an action.
    It can also be such a value itself, or a list of them for successive scans;
    the usual verdict follows after the list.

    Health checks (PING, VERSION), which can come at any time, are counted only in
    pings and versions.
    """

    family = "clamd"

    def __init__(self, verdict=None, limit=None, **kw):
        self.verdict = verdict
        self.limit = limit           # StreamMaxLength
        self.deny_all = None         # raw answer to any command
        self.scans = []
        self.commands = []           # as received, framing included
        self.version = "ClamAV 1.4.3/27800/Tue Nov 25 08:31:09 2026"
        self.pings = self.versions = 0      # whose connection has ended
        self.busy = set()            # connections without an answer so far
        self.most = 0                # the most of these at once
        super().__init__(**kw)

    def wait_scans(self, count):
        until(lambda: len(self.scans) >= count, "%d scans" % count)
        return self.scans

    @staticmethod
    def usual(data):
        return VIRUS + " FOUND" if EICAR in data else "OK"

    def count(self):
        """Count nothing yet: talk() counts when it knows the command."""

    def serve(self, sock):
        try:
            self.talk(sock)
        except Gone:
            pass
        finally:
            self.busy.discard(sock)

    def send(self, sock, data):
        self.busy.discard(sock)     # before the daemon can know
        super().send(sock, data)

    def get(self, sock, count=1):
        data = b""
        while len(data) < count:
            try:
                got = sock.recv(min(count - len(data), 65536))
            except OSError:
                raise Gone("reset") from None
            if not got:
                raise Gone("eof")
            data += got
        return data

    def talk(self, sock):
        command = b""
        end = None
        while end is None or not command.endswith(end):
            command += self.get(sock)
            end = {b"z": b"\0", b"n": b"\n"}.get(command[:1], b"\n")
            if len(command) > 4096:
                self.error("an endless command: %s" % shown(command))
                return
        if command == b"zPING\0":
            try:
                self.check(sock, b"PONG")
            finally:
                self.pings += 1
            return
        if command == b"zVERSION\0":
            try:
                self.check(sock, as_bytes(self.version))
            finally:
                self.versions += 1
            return
        with self.lock:
            self.accepted += 1
            self.busy.add(sock)
            self.most = max(self.most, len(self.busy))
        self.commands.append(command)
        if self.deny_all is not None:
            self.send(sock, self.deny_all)
            return
        word = command[:-1] if end == b"\n" and command[:1] != b"n" \
            else command[1:-1]
        if word == b"INSTREAM" and command[:1] in b"zn":
            self.instream(sock, end)
        elif word.startswith(b"SCAN "):
            with open(word[5:].rstrip(b"\r"), "rb") as file:
                self.judge(sock, Scan("SCAN", file.read()),
                           word[5:].decode().rstrip("\r"), end)
        else:
            self.error("unknown command %r" % command)
            self.send(sock, b"UNKNOWN COMMAND" + end)

    def check(self, sock, answer):
        if self.deny_all is None:
            self.send(sock, answer + b"\0")
            self.error("after the command came %r" % self.get(sock))
        else:
            self.send(sock, self.deny_all)

    def instream(self, sock, end):
        data = bytearray()
        for size in piece_sizes(functools.partial(self.get, sock)):
            if self.limit is not None and len(data) + size > self.limit:
                self.send(sock, b"INSTREAM size limit exceeded. ERROR" + end)
                return
            data += self.get(sock, size)
        self.judge(sock, Scan("INSTREAM", bytes(data)), "stream", end)

    def judge(self, sock, scan, name, end):
        with self.lock:
            self.scans.append(scan)
            verdict = self.verdict
            if isinstance(verdict, list):
                verdict = verdict.pop(0) if verdict else None
        if callable(verdict):
            verdict = verdict(scan.data)
        if isinstance(verdict, Hold):
            verdict.wait(self)
            verdict = verdict.reply
        if verdict is None:
            verdict = self.usual(scan.data)
        if isinstance(verdict, Action):
            self.act(sock, verdict)
        elif isinstance(verdict, bytes):
            self.send(sock, verdict)
        else:
            self.send(sock, as_bytes("%s: %s" % (name, verdict)) + end)


# ---------------------------------------------------------------- names

class Names:
    """A name server for the daemon alone, which needs root.  It sends no answer
    before go(); from then on every name has these addresses."""

    def __init__(self, directory):
        self.addresses = ["127.0.0.1"]
        self.host = own_host(53)
        self.asked = threading.Event()
        self._go = threading.Event()
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((self.host, 53))
        self.file = os.path.join(str(directory), "resolv.conf")
        # Several attempts, since conntrack may drop one of two datagrams that are
        # sent at the same time.
        with open(self.file, "w") as file:
            file.write("nameserver %s\noptions timeout:60 attempts:10\n"
                       % self.host)
        # The daemon then uses no other name server (MS_BIND).
        self.preexec = mounting(bind(self.file, "/etc/resolv.conf"))
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def go(self):
        self._go.set()

    def serve(self):
        while True:
            try:
                query, peer = self.sock.recvfrom(512)
            except OSError:
                return
            if len(query) < 17:              # close() wakes us with this
                return
            self.asked.set()
            self._go.wait(WAIT)
            question = query[12:query.index(b"\0", 12) + 5]
            kind = question[-4:-2]
            answers = [b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(a)
                       for a in self.addresses] if kind == b"\0\1" else []
            self.sock.sendto(query[:2] + b"\x81\x80\0\1\0%c\0\0\0\0" %
                             len(answers) + question + b"".join(answers), peer)

    def close(self):
        self.go()
        self.sock.sendto(b"", (self.host, 53))
        self.thread.join(WAIT)
        self.sock.close()


# ---------------------------------------------------------------- client

class Reply:
    """A whole reply of the daemon."""

    def __init__(self, raw):
        self.raw = raw
        self.lines = [l.decode("utf-8", "surrogateescape")
                      for l in raw.split(b"\r\n")[:-1]]
        self.code = self.lines[-1][:3]
        self.text = "\n".join(self.lines)

    def keywords(self):
        """The keywords of an EHLO reply."""
        return [l[4:] for l in self.lines[1:]]

    def __repr__(self):
        return repr(self.text)


class Client:
    """An SMTP client that sends exactly what the test gives it."""

    def __init__(self, address, source=None):
        self.sock = connect(address, source)
        self.stream = Stream(self.sock)

    # -- sending

    def send(self, data):
        """Send bytes as they are."""
        self.sock.sendall(as_bytes(data))

    def line(self, text):
        self.send(as_bytes(text) + b"\r\n")

    def drip(self, data):
        """Send one byte per packet, as far as TCP allows."""
        data = as_bytes(data)
        for i in range(len(data)):
            self.sock.sendall(data[i:i + 1])

    def chunk(self, data, last=False):
        """Send a BDAT command and its octets in one call."""
        self.send(b"BDAT %d%s\r\n" % (len(data), b" LAST" if last else b"")
                  + data)

    # -- receiving

    def reply(self):
        """Read the next reply, all its lines, and check its form."""
        try:
            raw = self.stream.reply()
        except Gone as gone:
            raise Failed("expected a reply, got %s after %s" % (
                gone, shown(self.stream.all[-200:]))) from None
        for line in raw.splitlines(True):
            if not re.match(rb"[2-5][0-9][0-9]([ -][^\r\n]*)?\r\n\Z", line):
                raise Failed("not a line of a reply: %r" % line)
            if raw[:3] != line[:3]:
                raise Failed("the code changes within a reply: %r" % raw)
        return Reply(raw)

    def expect(self, *want):
        """Read the next reply.  Each of the texts must begin one of its lines."""
        got = self.reply()
        for text in want:
            text = str(text)
            assert any(l.startswith(text) for l in got.lines), \
                "expected %r, got %r" % (text, got.text)
        return got

    def cmd(self, text, *want):
        self.line(text)
        return self.expect(*want)

    def eof(self, allow_reset=False):
        """The daemon must close the connection and send nothing before that."""
        try:
            self.stream.fill()
        except Gone as gone:
            if not allow_reset:
                assert str(gone) == "eof", "expected EOF, got an RST"
            return
        raise Failed("expected EOF, got %s" % shown(self.stream.ahead))

    def rest(self):
        """Read everything until the daemon closes the connection."""
        while True:
            try:
                self.stream.fill()
            except Gone:
                return self.stream.take(len(self.stream.ahead))

    # -- whole steps

    def hello(self, name="client.example"):
        self.expect("220 smtp.passthru")
        return self.cmd("EHLO " + name, "250")

    def envelope(self, sender="a@example.com", to=("b@example.com",)):
        to = [to] if isinstance(to, str) else to
        self.cmd("MAIL FROM:<%s>" % sender, "250")
        for rcpt in to:
            self.cmd("RCPT TO:<%s>" % rcpt, "250")

    def begin(self, wire=b""):
        """Send an envelope, DATA, and then these bytes as they are."""
        self.envelope()
        self.cmd("DATA", "354")
        self.send(wire)

    def submit(self, body):
        """Send a whole message (stuffed here), but do not read its reply."""
        self.begin(stuff(as_bytes(body)) + b".\r\n")

    def data(self, body, *want):
        """Send DATA, the body (stuffed here) and the dot; return the final reply."""
        self.cmd("DATA", "354")
        self.send(stuff(as_bytes(body)) + b".\r\n")
        return self.expect(*(want or ("250",)))

    def mail(self, sender="a@example.com", to=("b@example.com",),
             body=b"Subject: hello\r\n\r\nworld\r\n", want="250"):
        self.envelope(sender, to)
        return self.data(body, want)

    def quit(self):
        self.cmd("QUIT", "221")
        self.eof()
        self.close()

    # -- endings

    def half_close(self):
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self):
        reset(self.sock)

    def close(self):
        self.sock.close()


# ---------------------------------------------------------------- daemon

def processes(mark):
    """Pids whose environment has TESTMARK=mark (zombies have none)."""
    want = b"TESTMARK=" + mark.encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/environ" % name, "rb") as file:
                    if want in file.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                pass
    return found


@functools.lru_cache
def sanitized():
    with open(CLAMSMTPD, "rb") as program:
        return b"__asan_init" in program.read()


def build(program, **make):
    """Build the daemon for a test, with the sanitizers of CLAMSMTPD, and with single
    bytes if TEST_BYTES is set."""
    with open(CLAMSMTPD, "rb") as file:
        theirs = file.read()
    if b"__asan" in theirs:
        flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
        make.update(CC="gcc" if b"libasan" in theirs else "clang",
                    CFLAGS="-O1 -g -fno-omit-frame-pointer " + flags,
                    LDFLAGS=flags + " " + make.get("LDFLAGS", ""))
    if os.environ.get("TEST_BYTES"):
        make["CPPFLAGS"] = make.get("CPPFLAGS", "") + " -DIO_MAX=1"
    subprocess.run(["make", "-s", "-C", TOP, "BIN=" + program] +
                   ["%s=%s" % item for item in make.items()], check=True)
    return program


class Clock:
    """The two clocks of a daemon that was built with clock.c."""

    def __init__(self, directory, program):
        self.program = program
        self.file = os.path.join(str(directory), "clock")
        self.real, self.monotonic = 0, 1000
        with open(self.file, "wb+") as file:
            file.truncate(16)
            self.memory = mmap.mmap(file.fileno(), 16)
        self.set()

    def set(self):
        struct.pack_into("qq", self.memory, 0, self.real, self.monotonic)

    def settings(self):
        """Arguments for Site.start()."""
        return {"binary": self.program, "env": {"CLOCK": self.file}}

    def go(self, daemon, seconds, real=None):
        """Move the monotonic clock forward by so many seconds.  It moves in no other
        way.  The wall clock moves as far, or by `real' seconds, forward or back."""
        self.monotonic += seconds
        self.real += seconds if real is None else real
        self.set()
        daemon.send_signal(signal.SIGUSR1)      # it reads its clock again


class Faults:
    """The faults of a daemon that was built with faults.h.  The test turns them on and
    off, and counts the calls."""

    STATE = struct.Struct("Q" + "8sQ" * 255)        # struct faults

    def __init__(self, path, faults, on=True):
        self.file = path
        self.env = {"FAULT": faults, "FAULTS": path}
        with open(path, "wb") as file:
            file.write(bytes(self.STATE.size))
        self.switch(on)

    def switch(self, on):
        with open(self.file, "r+b") as file:
            file.write(struct.pack("Q", not on))

    def calls(self, kind):
        """How often the daemon has made such a call."""
        with open(self.file, "rb") as file:
            slots = self.STATE.unpack(file.read())[1:]
        counts = dict(zip(slots[::2], slots[1::2]))
        return counts.get(kind.encode()[:8].ljust(8, b"\0"), 0)

    def count(self, kind, calls):
        """Have the daemon continue as if it had made so many such calls."""
        with open(self.file, "r+b") as file:
            file.seek(file.read().index(kind.encode()[:8].ljust(8, b"\0")) + 8)
            file.write(struct.pack("Q", calls))


class Daemon:
    """A clamsmtpd in the foreground, with a configuration of its own.

    Settings are keywords (Listen="127.0.0.1:0").  Each value of a list has a line
    of its own; None leaves the setting out.
    """

    def __init__(self, directory, args=(), level=4, config=None, env=None,
                 binary=None, wait=True, preexec=None, **settings):
        self.directory = str(directory)
        self.file = os.path.join(self.directory, "clamsmtpd.conf")
        self.stderr = os.path.join(self.directory, "stderr")
        self.spool = settings.get("TempDirectory")
        self.mark = "%d.%d.%d" % (os.getpid(), id(self), time.monotonic_ns())
        self.allowed = set()         # file names that may stay in the spool
        self.own = set()             # its pid file and sockets: they may not
        self.status = None
        self.stopped = False
        self.write(settings, config)
        command = [binary or CLAMSMTPD]
        if level is not None:
            command += ["-d", str(level)]
        self.command = command + ["-f", self.file] + list(args)
        self.env = dict(os.environ, TESTMARK=self.mark)
        self.env.update(env or {})
        with open(self.stderr, "ab") as err:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                env=self.env, start_new_session=True, preexec_fn=preexec)
        self.pid = self.process.pid
        listen = settings.get("Listen")
        self.wanted = len(listen) if isinstance(listen, list) else 1
        if wait:
            self.wait_listening()

    def write(self, settings, config=None):
        """Write the configuration file again."""
        if config is None:
            config = b""
            for name, value in settings.items():
                for one in value if isinstance(value, (list, tuple)) else [value]:
                    if one is not None:
                        config += b"%s: %s\n" % (name.encode(),
                                                 as_bytes(str(one)))
                    if name in ("PidFile", "Listen") and one and one[0] == "/":
                        self.own.add(one)
        with open(self.file, "wb") as file:
            file.write(as_bytes(config))

    def wait_listening(self):
        until(lambda: len(self.listening()) >= self.wanted or
              self.process.poll() is not None,
              "the daemon listens; it says:\n" + self.text())
        if self.process.poll() is not None:
            raise Failed("the daemon ended with %s:\n%s"
                         % (self.process.poll(), self.text()))
        self.addresses = self.listening()
        self.address = self.addresses[0]
        self.idle = self.fds()       # descriptors without a client

    # -- the log

    def text(self):
        with open(self.stderr, "rb") as file:
            return file.read().decode("utf-8", "backslashreplace")

    def log(self, pattern=None):
        """Lines of the log (without the prefix) that match."""
        lines = [l[len("clamsmtpd: "):] if l.startswith("clamsmtpd: ") else l
                 for l in self.text().split("\n")[:-1]]
        return [l for l in lines if pattern is None or re.search(pattern, l)]

    def wait_log(self, pattern, count=1):
        try:
            return until(lambda: (lambda found: found if len(found) >= count
                                  else None)(self.log(pattern)),
                         "%d log lines like %r" % (count, pattern))
        except Failed as failed:
            raise Failed("%s; the log ends:\n%s" % (
                failed, "\n".join(self.log()[-30:]))) from None

    def listening(self):
        return [l.split("listening on ")[1].strip()
                for l in self.log(r"^listening on ")]

    # -- the process

    def alive(self):
        return self.process.poll() is None

    def fds(self):
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def rss(self):
        """Resident size in KiB."""
        return int(self.proc("VmRSS").split()[0])

    def grown(self, before):
        """The growth of rss() in KiB, or 0 with the address sanitizer, which hides it."""
        return 0 if sanitized() else self.rss() - before

    def proc(self, name):
        """A field of /proc/PID/status."""
        with open("/proc/%d/status" % self.pid) as file:
            for line in file:
                if line.startswith(name + ":"):
                    return line.split(":", 1)[1].strip()
        raise Failed("no %s in /proc/PID/status" % name)

    def ticks(self):
        """CPU time used, in clock ticks."""
        with open("/proc/%d/stat" % self.pid) as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def sleeps(self):
        """Whether the daemon waits for an event at this moment."""
        return self.proc("State").startswith("S")

    def rests(self):
        """The daemon sleeps while nothing happens.  A busy loop never sleeps, however
        little CPU time a busy machine gives it."""
        def idle():
            before = self.ticks()
            for _ in range(25):
                if not self.sleeps():
                    return False
                time.sleep(0.02)        # the interval measured
            return self.ticks() - before < os.sysconf("SC_CLK_TCK") / 20
        until(idle, "the daemon rests")

    def children(self):
        """Children, zombies included."""
        try:
            with open("/proc/%d/task/%d/children" % (self.pid, self.pid)) as file:
                return [int(pid) for pid in file.read().split()]
        except OSError:
            return []

    def send_signal(self, number):
        self.process.send_signal(number)

    def pause(self):
        """Halt the daemon.  It handles all that happens before resume() in one turn of
        its loop."""
        self.send_signal(signal.SIGSTOP)
        until(lambda: self.proc("State").startswith("T"), "the daemon halts")

    def resume(self):
        self.send_signal(signal.SIGCONT)

    def wait_exit(self, limit=None):
        try:
            self.status = self.process.wait(max(WAIT, 15) if limit is None
                                            else limit)
        except subprocess.TimeoutExpired:
            raise Failed("the daemon does not end") from None
        return self.status

    # -- the end

    def settle(self):
        """After its clients have gone, the daemon has no more descriptors than before
        them, and no children."""
        if not self.alive() or not hasattr(self, "idle"):
            return
        until(lambda: self.fds() <= self.idle,
              "descriptors are closed: %d at the start, now %s"
              % (self.idle, self.open_files()))
        until(lambda: not self.children(), "children are gone and reaped")

    def open_files(self):
        names = []
        for fd in os.listdir("/proc/%d/fd" % self.pid):
            try:
                names.append(os.readlink("/proc/%d/fd/%s" % (self.pid, fd)))
            except OSError:
                pass
        return names

    def spooled(self):
        """Files in TempDirectory that the test does not expect."""
        if not self.spool or not os.path.isdir(self.spool):
            return []
        return sorted(set(os.listdir(self.spool)) - set(self.allowed))

    def left(self):
        """The pid file and the sockets that still exist.  An empty pid file does not
        count: a daemon that has changed its user cannot remove it."""
        return [path for path in self.own if os.path.lexists(path) and not
                (os.path.isfile(path) and os.path.getsize(path) == 0)]

    def stop(self, want=0, number=signal.SIGTERM):
        """End the daemon and check that nothing is left behind."""
        if self.stopped:
            return
        self.stopped = True
        try:
            if self.alive():
                self.send_signal(number)
            status = self.wait_exit()
            assert status == want, "exit status %s, expected %s:\n%s" % (
                status, want, "\n".join(self.log()[-30:]))
            until(lambda: not processes(self.mark), "no process is left")
            assert not self.spooled(), \
                "left in TempDirectory: %s" % self.spooled()
            assert not self.left(), "left behind: %s" % self.left()
        finally:
            self.kill()
        self.check_report()

    def check_report(self):
        """No sanitizer has reported a fault, nor a leak at the end."""
        report = report_in(self.text())
        if report:
            raise Failed("a report in the log: " + report)

    def kill(self):
        """Kill the processes of the daemon that still exist."""
        self.stopped = True
        for pid in processes(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Site:
    """A daemon between a client, a next hop and a clamd, for one test."""

    def __init__(self, directory):
        self.dir = str(directory)
        self.spool = os.path.join(self.dir, "spool")
        os.mkdir(self.spool)
        self._hop = self._clamd = None
        self.daemon = None
        self.daemons, self.servers, self.clients = [], [], []
        self.held = []

    def path(self, name):
        return os.path.join(self.dir, name)

    def port(self, host="127.0.0.1"):
        """A port that no other program gets during the test, for tests that cannot
        use port 0."""
        self.held.append(hold_port(host))
        return self.held[-1].getsockname()[1]

    # -- peers

    def new_hop(self, **kw):
        hop = NextHop(**kw)
        self.servers.append(hop)
        return hop

    def new_clamd(self, tcp=False, **kw):
        if not tcp and "path" not in kw:
            kw["path"] = self.path("clamd%d.sock" % len(self.servers))
        clamd = Clamd(**kw)
        self.servers.append(clamd)
        return clamd

    @property
    def hop(self):
        if self._hop is None:
            self._hop = self.new_hop()
        return self._hop

    @hop.setter
    def hop(self, hop):
        self._hop = hop

    @property
    def clamd(self):
        if self._clamd is None:
            self._clamd = self.new_clamd()
        return self._clamd

    @clamd.setter
    def clamd(self, clamd):
        self._clamd = clamd

    # -- the daemon

    def settings(self, **settings):
        """The usual settings, and these."""
        usual = dict(Listen="127.0.0.1:0", TempDirectory=self.spool)
        if "OutAddress" not in settings:
            usual["OutAddress"] = self.hop.address
        if "ClamAddress" not in settings:
            usual["ClamAddress"] = self.clamd.address
        usual.update(settings)
        return usual

    def start(self, args=(), level=4, env=None, wait=True, preexec=None,
              binary=None, **settings):
        directory = self.path("daemon%d" % len(self.daemons))
        os.mkdir(directory)
        wait_check = self.health_check(settings)
        daemon = Daemon(directory, args=args, level=level, env=env, wait=False,
                        preexec=preexec, binary=binary, **self.settings(**settings))
        self.daemons.append(daemon)
        self.daemon = daemon
        if wait:
            daemon.wait_listening()
            wait_check()
            daemon.idle = daemon.fds()
        return daemon

    def start_on_pipe(self, **settings):
        """Start a daemon whose standard error is a pipe that holds 4 KiB.  Returns
        the descriptor from which the test reads the log."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        listen = self.path("in.sock")
        daemon = self.start(wait=False, Listen=listen,
                            preexec=lambda: os.dup2(write, 2), **settings)
        os.close(write)
        wait_listener(listen)
        daemon.address = listen
        return read

    def health_check(self, settings, warnings=0):
        """Call this before a health check.  Returns a function that waits for its end,
        or for a further warning than those in the log.  The function does not wait if
        one of the clamds is not scripted."""
        named = settings.get("ClamAddress", [])
        named = named if isinstance(named, list) else [named]
        known = {clamd.address: clamd for clamd in self.servers
                 if isinstance(clamd, Clamd)}
        if not all(address in known for address in named):
            return lambda: None
        clamds = [known[address] for address in named]
        clamds = [clamd for clamd in clamds if clamd.listener and
                  clamd.deny_all is None] if named else [self.clamd]
        # The first clamd that answers PING ends the check.  With a status page, each
        # clamd gets a PING and a VERSION.
        kind = "versions" if "StatusListen" in settings else "pings"
        if kind == "pings":
            del clamds[1:]
        before = [getattr(clamd, kind) for clamd in clamds]

        def ended():
            if not self.daemon.alive() or \
                    len(self.daemon.log("no clamd answers")) > warnings:
                return True
            # The clamd receives EOF before the daemon closes its descriptor.  The
            # daemon sleeps after that.
            return clamds and all(getattr(clamd, kind) > count for clamd, count in
                                  zip(clamds, before)) and self.daemon.sleeps()
        return lambda: until(ended, "the health check ends")

    def reload(self, **settings):
        """Write new settings, SIGHUP, wait for the log to say so."""
        before = len(self.daemon.log(READ_AGAIN))
        wait_check = self.health_check(
            settings, len(self.daemon.log("no clamd answers")))
        self.daemon.write(self.settings(**settings))
        self.daemon.send_signal(signal.SIGHUP)
        self.daemon.wait_log(READ_AGAIN, before + 1)
        wait_check()

    def refused(self, status=1, **settings):
        """Run a daemon that does not start."""
        daemon = self.start(wait=False, **settings)
        assert daemon.wait_exit() == status
        daemon.stopped = True
        return daemon

    def client(self, source=None, address=None):
        """A connected client.  Starts the daemon if none runs."""
        if address is None:
            if self.daemon is None:
                self.start()
            address = self.daemon.address
        client = Client(address, source)
        self.clients.append(client)
        return client

    def session(self, **kw):
        """A client that has been greeted and has said EHLO."""
        client = self.client(**kw)
        client.hello()
        return client

    # -- the end

    def finish(self):
        """Close the clients, check that nothing is left of them, stop the daemons,
        and check their logs and the peers."""
        for client in self.clients:
            client.close()
        try:
            for daemon in self.daemons:
                if not daemon.stopped:
                    daemon.settle()
            for daemon in self.daemons:
                if not daemon.stopped:
                    daemon.stop()
        finally:
            for one in self.servers + self.held:
                one.close()
            for daemon in self.daemons:
                daemon.kill()
        for daemon in self.daemons:     # also those that a test has ended
            daemon.check_report()
        errors = [e for server in self.servers for e in server.errors]
        assert not errors, "the scripted peers complain: " + "; ".join(errors)

    def report(self):
        """The texts that a failure shows."""
        for i, daemon in enumerate(self.daemons):
            yield ("daemon %d: log (last lines)" % i,
                   "\n".join(daemon.log()[-60:]))
        for server in self.servers:
            if isinstance(server, NextHop):
                yield ("next hop %s" % server.address, "\n".join(
                    "%r ended=%s messages=%d partial=%s" % (
                        s.commands[-20:], s.ended, len(s.messages),
                        s.partial and shown(s.partial))
                    for s in server.sessions[-10:]))
            elif isinstance(server, Clamd):
                yield ("clamd %s" % server.address, "\n".join(
                    [repr(c) for c in server.commands[-10:]] +
                    [repr(s) for s in server.scans[-10:]]))
            if server.errors:
                yield ("complaints", "\n".join(server.errors))
        yield ("files", self.dir)


class Background:
    """A clamsmtpd that has made itself a daemon, listening on a unix socket."""

    def __init__(self, site, **settings):
        self.socket = settings.setdefault("Listen", site.path("in.sock"))
        self.pidfile = settings.setdefault("PidFile", site.path("pid"))
        self.daemon = site.start(level=None, wait=False, **settings)
        self.daemon.stopped = True          # finish() does not stop this one
        self.status = self.daemon.wait_exit()

    def pid(self):
        with open(self.pidfile) as file:
            return int(file.read())

    def end(self):
        os.kill(self.pid(), signal.SIGTERM)
        until(lambda: not processes(self.daemon.mark), "the daemon ends")
