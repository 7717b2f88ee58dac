"""Starts the daemon, and measures it."""

import contextlib
import functools
import os
import time

import harness
from real import die_with_us

# Wait for what must happen.  The limit is generous, because it measures nothing.
until = functools.partial(harness.until, limit=4 * harness.WAIT)


class Daemon(harness.Daemon):
    def __init__(self, program, directory, config, level):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, "stderr"))    # of the daemon before
        super().__init__(directory, config=config, binary=program, level=level,
                         wait=False, preexec=die_with_us)
        self.read = 0                   # bytes of the log

    def news(self):
        """Returns the lines logged since the last call."""
        with open(self.stderr, "rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[:text.rfind(b"\n") + 1]
        self.read += len(text)
        return text.decode("utf-8", "backslashreplace")

    def memory(self):
        """Returns the resident memory and the part that is not shared, in KiB."""
        return self.rss(), int(self.proc("RssAnon").split()[0])

    def cpu(self):
        """Returns the CPU time used, in seconds."""
        with open("/proc/%d/schedstat" % self.pid) as file:
            return int(file.read().split()[0]) / 1e9

    def sleeps(self):
        """Returns whether the daemon uses almost no CPU for a moment."""
        start, used = time.monotonic(), self.cpu()
        time.sleep(.1)
        return self.cpu() - used < .2 * (time.monotonic() - start)
