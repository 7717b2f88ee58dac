"""The daemon: started, asked how it is, ended, and what it left behind."""

import os
import re
import signal
import subprocess
import time

from harness import REPORT, WAIT, processes
from real import die_with_us
from world import Broken

PATIENCE = 4 * WAIT     # seconds for what has to happen; no measure


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not (got := condition()):
        if time.monotonic() > end:
            raise Broken("in vain for %g s: %s" % (PATIENCE, what))
        time.sleep(.005)
    return got


class Daemon:
    def __init__(self, program, directory, config, level):
        self.file = os.path.join(directory, "clamsmtpd.conf")
        self.log_file = os.path.join(directory, "log")
        self.read = 0                   # of the log
        self.configure(config)
        self.mark = "soak.%d.%d" % (os.getpid(), time.monotonic_ns())
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [program, "-d", str(level), "-f", self.file], stderr=log,
                stdin=subprocess.DEVNULL, stdout=log, start_new_session=True,
                env=dict(os.environ, TESTMARK=self.mark), preexec_fn=die_with_us)
        self.pid = self.process.pid

    def configure(self, config):
        with open(self.file, "w") as file:
            file.write(config)

    # -- how it is

    def alive(self):
        return self.process.poll() is None

    def log(self):
        """What it has said since the last time."""
        with open(self.log_file, "rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[:text.rfind(b"\n") + 1]
        self.read += len(text)
        return text.decode("utf-8", "backslashreplace")

    def signal(self, number):
        try:
            self.process.send_signal(number)
        except ProcessLookupError:
            pass

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def open_files(self):
        names = []
        for fd in os.listdir("/proc/%d/fd" % self.pid):
            try:
                names.append(os.readlink("/proc/%d/fd/%s" % (self.pid, fd)))
            except OSError:
                pass
        return sorted(names)

    def children(self):
        with open("/proc/%d/task/%d/children" % (self.pid, self.pid)) as file:
            return file.read().split()

    def memory(self):
        """KiB: resident, and of it its own."""
        with open("/proc/%d/status" % self.pid) as file:
            fields = dict(re.findall(r"(\w+):\s+(\d+) kB", file.read()))
        return int(fields["VmRSS"]), int(fields["RssAnon"])

    def cpu(self):
        """Seconds of it that were used."""
        with open("/proc/%d/schedstat" % self.pid) as file:
            return int(file.read().split()[0]) / 1e9

    def rests(self):
        """It uses next to no time for a moment."""
        start, used = time.monotonic(), self.cpu()
        time.sleep(.1)
        return self.cpu() - used < .2 * (time.monotonic() - start)

    # -- its end

    def wait_end(self):
        """Its exit status, and how long it took."""
        start = time.monotonic()
        until(lambda: not self.alive(), "the daemon ends after SIGTERM")
        return self.process.returncode, time.monotonic() - start

    def left(self):
        """Processes."""
        return processes(self.mark)

    def kill(self):
        for pid in processes(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        self.process.wait()


def report_in(text):
    """What a sanitizer, or an assertion, has to say."""
    found = REPORT.search(text)
    return text[text.rfind("\n", 0, found.start()) + 1:][:3000] if found else None
