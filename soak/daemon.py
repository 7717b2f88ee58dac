"""The daemon: started, and asked how it is."""

import contextlib
import functools
import os
import time

import harness
from real import die_with_us

# What has to happen, with a patience that is no measure.
until = functools.partial(harness.until, limit=4 * harness.WAIT)


class Daemon(harness.Daemon):
    def __init__(self, program, directory, config, level):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, "stderr"))    # of the last one
        super().__init__(directory, config=config, binary=program, level=level,
                         wait=False, preexec=die_with_us)
        self.read = 0                   # of the log

    def news(self):
        """What it has said since the last time."""
        with open(self.stderr, "rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[:text.rfind(b"\n") + 1]
        self.read += len(text)
        return text.decode("utf-8", "backslashreplace")

    def memory(self):
        """KiB: resident, and of it its own."""
        return self.rss(), int(self.proc("RssAnon").split()[0])

    def cpu(self):
        """Seconds of it that were used."""
        with open("/proc/%d/schedstat" % self.pid) as file:
            return int(file.read().split()[0]) / 1e9

    def sleeps(self):
        """It uses next to no time for a moment."""
        start, used = time.monotonic(), self.cpu()
        time.sleep(.1)
        return self.cpu() - used < .2 * (time.monotonic() - start)
