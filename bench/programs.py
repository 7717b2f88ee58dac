"""The programs that are measured, and the tools that measure them."""

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
PATIENCE = 20       # seconds before a program counts as hung

ORIGINAL, PROXY, OURS = "original 1.10", "TCP proxy", "clamsmtpd"
CLAMD = " with clamd"       # added to the name of a filter with a real clamd

EACH, MANY, HOLD = "each", "many", "hold"       # the modes of bench/load.c

Cell = collections.namedtuple("Cell", "size sessions mode")
TEN = Cell(2 * KB, 10, MANY)
BUSY = Cell(2 * KB, 1000, MANY)
MAIN = (Cell(2 * KB, 10, EACH), TEN, BUSY, Cell(MB, 10, EACH), Cell(10 * MB, 10, EACH))
ALONE = (Cell(2 * KB, 1, EACH), Cell(MB, 1, EACH))
MEDIUM = Cell(50 * KB, 10, EACH)
# Seconds; cpu, scanner and time are per message.
Turn = collections.namedtuple("Turn", "cpu scanner p50 p99 time")


class Failed(Exception):
    """A program did not do what was asked of it."""


def until(condition, what, limit=10):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise Failed("waited in vain: " + what)
        time.sleep(0.002)


def output(*command, **more):
    """Returns the output of a command, or "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              **more).stdout
    except OSError:
        return ""


def listening(path=None):
    """Returns a listening socket, for the standard input of a helper."""
    sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    sock.bind(path or ("127.0.0.1", 0))
    sock.listen(4096)
    return sock


def free_port():
    with listening() as sock:
        return sock.getsockname()[1]


def cpu(process):
    """Returns the CPU seconds of a process, with those of its ended children."""
    if not process:
        return 0
    with open("/proc/%d/stat" % process.pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    # clock_getcpuclockid(3) makes the number of another process's clock so
    own = time.clock_gettime(~process.pid << 3 | 2)
    return own + (int(fields[13]) + int(fields[14])) / TICK


class Tools:
    """A directory with the compiled helpers, the messages, and the Debian programs
    that are not installed."""

    def __init__(self, directory):
        self.dir = directory
        self.env = dict(os.environ)
        self.apt_options = []
        for name in "scanner", "proxy", "sink", "load":
            subprocess.run(["cc", "-O2", "-D_GNU_SOURCE", "-o", self.file(name),
                            "%s/%s.c" % (BENCH, name)], check=True)
        self.mails = [self.write_mail(size) for size in SIZES]
        self.clamd = self.find("clamav-daemon", "clamd")

    def file(self, name):
        return os.path.join(self.dir, str(name))

    def write_mail(self, size):
        """Write a message with a random attachment.  Its first byte identifies the
        size."""
        head = (b"%c: bench\r\nFrom: a@example.com\r\nSubject: %d\r\nMIME-Version: 1.0\r\n"
                b"Content-Type: application/octet-stream\r\n"
                b"Content-Transfer-Encoding: base64\r\n\r\n" % (
                    65 + SIZES.index(size), size))
        data = random.Random(size).randbytes(size * 3 // 4)
        text = head + base64.encodebytes(data).replace(b"\n", b"\r\n")
        with open(self.file(size), "wb") as file:
            file.write(text[:size - 2] + b"\r\n")
        return file.name

    def find(self, package, program):
        """Returns a program of Debian, unpacked if it is not installed, or None."""
        return shutil.which(program, path=PATH) or self.unpack(package, program)

    def unpack(self, package, program):
        where = self.file("debian")
        os.makedirs(where + "/lists/partial", exist_ok=True)

        def apt(*command):
            return output("apt-get", "-q", *self.apt_options, *command, cwd=where)

        def wanted():
            """Returns the packages to install, with missing libraries."""
            return re.findall(r"^Inst (\S+)", apt(
                "-s", "--no-install-recommends", "--reinstall", "install", package), re.M)

        if not wanted():
            # A new container has no package lists, so fetch them.
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
        """Returns the path of ClamSMTP 1.10, or None."""
        for find in self.find, self.unpack:
            path = find("clamsmtp", "clamsmtpd")
            if path and "1.10" in output(path, "-v", env=self.env):
                return path
        return None


class Chain:
    """A sink, and a filter with its scanner or the proxy before it.  prefix is a
    command that runs the program."""

    # The original accepts at most 1,023 connections.
    def __init__(self, tools, name, path, conns=1023, prefix=()):
        self.tools, self.name, self.path = tools, name, path
        self.conns, self.prefix = conns, list(prefix)
        self.sent = 0

    def __enter__(self):
        self.process, self.scanner, self.helpers, self.counts = None, None, [], None
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
        self.counts.truncate(24)
        self.helpers.append(self.helper(
            sock, "sink", "" if self.path == PROXY else HEADER,
            *self.tools.mails, stdout=self.counts))
        if self.path == PROXY:
            sock = listening()
            self.port = sock.getsockname()[1]
            self.process = self.helper(sock, "proxy", str(sink), prefix=self.prefix)
        else:
            self.start_filter(sink)
        until(self.listens, self.path + " listens", PATIENCE)
        self.settle()

    def start_filter(self, sink):
        socket_path = self.dir + "/clamd"
        if self.name.endswith(CLAMD):
            self.scanner = self.start_clamd(socket_path)
        else:
            self.scanner = self.helper(listening(socket_path), "scanner")
        self.helpers.append(self.scanner)
        until(lambda: self.check() or os.path.exists(socket_path), "clamd listens",
              3 * PATIENCE)
        self.port = free_port()
        with open(self.dir + "/conf", "w") as file:
            file.write("Listen: 127.0.0.1:%d\nOutAddress: 127.0.0.1:%d\n"
                       "ClamAddress: %s\nTempDirectory: %s\nMaxConnections: %d\n"
                       % (self.port, sink, socket_path, self.dir, self.conns))
        self.process = subprocess.Popen(
            self.prefix + [self.path, "-d", "1", "-f", self.dir + "/conf"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_clamd(self, socket_path):
        """Start clamd with one signature, which matches no message."""
        os.mkdir(self.dir + "/db")
        with open(self.dir + "/db/bench.ndb", "w") as file:
            file.write("Bench:0:*:%s\n" % b"not in any message".hex())
        with open(self.dir + "/clamd.conf", "w") as file:
            file.write("DatabaseDirectory %s/db\nTemporaryDirectory %s\nLocalSocket %s\n"
                       "Foreground yes\n" % (self.dir, self.dir, socket_path))
        # a copy, because AppArmor confines the installed one to its usual places
        program = shutil.copy(self.tools.clamd, self.dir + "/program")
        return subprocess.Popen([program, "-c", self.dir + "/clamd.conf"],
                                env=self.tools.env, stdout=subprocess.DEVNULL)

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
        """Returns the sink's counts: good, bad, sessions."""
        return struct.unpack("3Q", os.pread(self.counts.fileno(), 24, 0))

    def settle(self, sessions=0):
        until(lambda: self.seen()[2] == sessions, "the sessions end")

    def memory(self, file, name):
        """Returns KiB, from a file in /proc/PID."""
        with open("/proc/%d/%s" % (self.process.pid, file)) as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith(name))

    def load(self, cell, count):
        """Start bench/load.c, which ends when its standard input ends."""
        return subprocess.Popen(
            [self.tools.file("load"), str(self.port), self.tools.file(cell.size),
             str(cell.sessions), str(count), cell.mode], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self, load):
        """Returns the next line of bench/load.c, or raises Failed."""
        if select.select([load.stdout], [], [], 3 * PATIENCE)[0]:
            line = load.stdout.readline()
            if line:
                return line
        load.kill()
        self.check(1)
        raise Failed(load.stderr.read().strip() or "hangs")

    def run(self, cell, count):
        """Run and return one Turn."""
        self.check()
        good, bad, idle = self.seen()
        with self.load(cell, count) as load:
            self.line(load)
            start = cpu(self.process), cpu(self.scanner), time.monotonic()
            load.stdin.write("\n")
            load.stdin.flush()
            p50, p99 = (float(text) / 1e6 for text in self.line(load).split())
            end = time.monotonic()
            self.settle(idle + (cell.sessions if cell.mode == MANY else 0))
            turn = Turn((cpu(self.process) - start[0]) / count,
                        (cpu(self.scanner) - start[1]) / count,
                        p50, p99, (end - start[2]) / count)
        self.settle(idle)
        now = self.seen()
        self.sent += count
        if now[:2] != (good + count, bad):
            raise Failed("%d of %d messages arrived intact, %d did not" % (
                now[0] - good, count, now[1] - bad))
        return turn

    @contextlib.contextmanager
    def idle(self, count):
        """Open this many more sessions, which send one message and then nothing."""
        with self.load(Cell(SIZES[0], 5, HOLD), count) as load:
            self.line(load)
            yield
