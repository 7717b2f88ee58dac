"""The programs that are measured, and what they are measured with."""

import base64
import collections
import contextlib
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

BENCH = os.path.dirname(os.path.abspath(__file__))
TICK = os.sysconf("SC_CLK_TCK")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

KB, MB = 1 << 10, 1 << 20
SIZES = 2 * KB, 50 * KB, MB, 10 * MB
HEADER = "X-Virus-Scanned: ClamAV using ClamSMTP\r\n"
PATIENCE = 20       # seconds before a run counts as hung

NONE, PROXY, OURS, ORIGINAL = "no filter", "TCP proxy", "clamsmtpd", "original 1.10"

# What bench/load.c is told, and, the last two, smtp-source.
EACH, MANY, HOLD, SOURCE_EACH, SOURCE_MANY = "each", "many", "hold", "", "-d"

Cell = collections.namedtuple("Cell", "size sessions mode")
Turn = collections.namedtuple("Turn", "cpu rate p50 p99")      # seconds, 1/seconds


class Failed(Exception):
    """A program did not do what was asked of it."""


def until(condition, what, limit=10):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise Failed("waited in vain: " + what)
        time.sleep(0.002)


def output(*command, **more):
    """What a command prints; "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              **more).stdout
    except OSError:
        return ""


def listening(path=None):
    """A listening socket; our helpers get it as their standard input."""
    sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    sock.bind(path or ("127.0.0.1", 0))
    sock.listen(4096)
    return sock


def free_port():
    with listening() as sock:
        return sock.getsockname()[1]


class Tools:
    """A directory with what the measurements need: our helpers, built, the
    messages, and Debian's programs, unpacked where they are not installed."""

    def __init__(self, directory):
        self.dir = directory
        self.env = dict(os.environ)
        self.apt_options = []
        for name in "scanner", "proxy", "sink", "load":
            subprocess.run(["cc", "-O2", "-D_GNU_SOURCE", "-o", self.file(name),
                            "%s/%s.c" % (BENCH, name)], check=True)
        self.mails = [self.write_mail(size) for size in SIZES]
        self.source = self.find("postfix", "smtp-source")

    def file(self, name):
        return os.path.join(self.dir, str(name))

    def write_mail(self, size):
        """Base64, no line like another; the first byte tells the size.  For
        smtp-source LF only, and without the empty line that it adds."""
        head = b"%c: bench\r\nFrom: a@example.com\r\nSubject: %d\r\n\r\n" % (
            65 + SIZES.index(size), size)
        data = random.Random(size).randbytes(size * 3 // 4)
        text = head + base64.encodebytes(data).replace(b"\n", b"\r\n")
        text = text[:size - 6] + b"xx\r\n\r\n"
        with open(self.file("%d.source" % size), "wb") as file:
            file.write(text[:-4].replace(b"\r\n", b"\n"))
        with open(self.file(size), "wb") as file:
            file.write(text)
        return file.name

    def find(self, package, program):
        """A program of Debian's, unpacked if it is not installed, or None."""
        return shutil.which(program, path=PATH) or self.unpack(package, program)

    def unpack(self, package, program):
        where = self.file("debian")
        os.makedirs(where + "/lists/partial", exist_ok=True)

        def apt(*command):
            return output("apt-get", "-q", *self.apt_options, *command, cwd=where)

        def wanted():
            """What would be installed, the libraries that are missing included."""
            return re.findall(r"^Inst (\S+)", apt(
                "-s", "--no-install-recommends", "--reinstall", "install", package), re.M)

        if not wanted():
            # no package lists, as in a new container: have some of our own
            self.apt_options = ["-o", "Dir::State::Lists=%s/lists" % where]
            apt("update")
        apt("download", *wanted())
        output("sh", "-c", 'for f in *.deb; do dpkg -x "$f" . && rm "$f"; done',
               cwd=where)
        libraries = {root for root, _, files in os.walk(where)
                     if any(".so" in file for file in files)}
        self.env["LD_LIBRARY_PATH"] = ":".join(sorted(libraries))
        return shutil.which(program, path=where + "/usr/sbin")

    def original(self):
        """ClamSMTP 1.10, or None."""
        for find in self.find, self.unpack:
            path = find("clamsmtp", "clamsmtpd")
            if path and "1.10" in output(path, "-v", env=self.env):
                return path
        return None


class Chain:
    """A sink and, unless path is None, a program before it: a filter with its
    scanner, or the proxy.  prefix is a command to run that program under."""

    def __init__(self, tools, name, path, conns=1000, prefix=()):
        self.tools, self.name, self.path = tools, name, path
        self.conns, self.prefix = conns, list(prefix)
        self.sent = self.failed = 0

    def __enter__(self):
        self.process, self.helpers, self.counts = None, [], None
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        processes = self.helpers + [self.process] * bool(self.process)
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.counts:
            self.counts.close()

    def restart(self):
        self.__exit__()
        self.__enter__()

    def helper(self, sock, name, *args, prefix=(), stdout=subprocess.DEVNULL):
        with sock:
            return subprocess.Popen([*prefix, self.tools.file(name), *args], stdin=sock,
                                    stdout=stdout,
                                    stderr=subprocess.DEVNULL if prefix else None)

    def start(self):
        self.dir = tempfile.mkdtemp(dir=self.tools.dir)
        sock = listening()
        self.port = sink = sock.getsockname()[1]
        self.counts = tempfile.TemporaryFile(dir=self.dir)
        self.counts.truncate(40)
        self.helpers.append(self.helper(
            sock, "sink", "" if self.path in (None, PROXY) else HEADER,
            *self.tools.mails, stdout=self.counts))
        if self.path == PROXY:
            sock = listening()
            self.port = sock.getsockname()[1]
            self.process = self.helper(sock, "proxy", str(sink), prefix=self.prefix)
        elif self.path:
            self.helpers.append(self.helper(listening(self.dir + "/clamd"), "scanner"))
            self.start_filter(sink)

    def start_filter(self, sink):
        self.port = free_port()
        with open(self.dir + "/conf", "w") as file:
            file.write("Listen: 127.0.0.1:%d\nOutAddress: 127.0.0.1:%d\n"
                       "ClamAddress: %s/clamd\nTempDirectory: %s\nMaxConnections: %d\n"
                       % (self.port, sink, self.dir, self.dir, self.conns))
        self.process = subprocess.Popen(
            self.prefix + [self.path, "-d", "1", "-f", self.dir + "/conf"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self.listens, self.path + " listens", PATIENCE)
        self.settle()

    def listens(self):
        self.check()
        try:
            with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock:
                return sock.recv(100).startswith(b"220")
        except OSError:
            return False

    def check(self, patience=0):
        for helper in self.helpers:
            if helper.poll() is not None:
                raise SystemExit("%s has ended: %d" % (helper.args[0], helper.returncode))
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(patience)
                raise Failed("aborts: %s" % signal.Signals(-code).name if code < 0
                             else "ends, exit status %d" % code)

    def seen(self):
        """The sink's counts: good, bad, sessions, first, last."""
        return struct.unpack("5Q", os.pread(self.counts.fileno(), 40, 0))

    def settle(self, sessions=0):
        until(lambda: self.seen()[2] == sessions, "the sessions end")

    def cpu(self):
        """Seconds so far, those of children that have ended included."""
        if not self.process:
            return 0
        with open("/proc/%d/stat" % self.process.pid) as file:
            fields = file.read().rsplit(")", 1)[1].split()
        # clock_getcpuclockid(3) makes the number of another process's clock so
        own = time.clock_gettime(~self.process.pid << 3 | 2)
        return own + (int(fields[13]) + int(fields[14])) / TICK

    def memory(self, file, name):
        """KiB, from a file in /proc/PID."""
        with open("/proc/%d/%s" % (self.process.pid, file)) as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith(name))

    def load(self, cell, count):
        if cell.mode in (SOURCE_EACH, SOURCE_MANY):
            if not self.tools.source:
                raise Failed("no smtp-source")
            return [self.tools.source, "-s", str(cell.sessions), "-m", str(count), "-F",
                    self.tools.file("%d.source" % cell.size), *cell.mode.split(),
                    "127.0.0.1:%d" % self.port]
        return [self.tools.file("load"), str(self.port), self.tools.file(cell.size),
                str(cell.sessions), str(count), cell.mode]

    def run(self, cell, count):
        """One Turn."""
        self.check()
        good, bad, idle, _, _ = self.seen()
        os.pwrite(self.counts.fileno(), bytes(8), 24)
        before = self.cpu()
        try:
            done = subprocess.run(self.load(cell, count), env=self.tools.env,
                                  timeout=PATIENCE, capture_output=True, text=True,
                                  check=False)
        except subprocess.TimeoutExpired:
            raise Failed("hangs") from None
        self.check(1 if done.returncode else 0)
        now = self.seen()
        self.sent += count
        if done.returncode or now[:2] != (good + count, bad):
            self.failed += count - (now[0] - good)
            raise Failed("%d of %d messages came intact, %d did not: %s" % (
                now[0] - good, count, now[1] - bad, done.stderr.strip()))
        self.settle(idle)
        latency = [float(text) / 1e6 for text in done.stdout.split()]
        return Turn((self.cpu() - before) / count, count / (now[4] - now[3]) * 1e9,
                    *(latency or (None, None)))

    @contextlib.contextmanager
    def idle(self, count):
        """So many more sessions that have sent a message and say nothing more."""
        with subprocess.Popen(self.load(Cell(SIZES[0], 5, HOLD), count),
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as held:
            try:
                ready, _, _ = select.select([held.stdout], [], [], 3 * PATIENCE)
                if not ready or not held.stdout.readline():
                    held.kill()
                    self.check(1)
                    raise Failed("hangs" if not ready else "closes sessions")
                yield
            finally:
                held.stdin.close()
