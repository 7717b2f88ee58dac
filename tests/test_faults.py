"""Each system call and each allocation of a daemon's life fails once (faults.h),
and no promise is broken by it."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
from concurrent import futures

import pytest

import harness
from harness import EICAR, HEADER, Failed, Gone, until

# The errors with which a call may fail.  0 means that it moves a single byte.  The
# first one is always tried, the others in the long cases.
FAULTS = {
    "accept4": "EMFILE ECONNABORTED EINTR ENOMEM",
    "bind": "EADDRINUSE",
    "connect": "ECONNREFUSED EAGAIN ENOENT",
    "dup2": "EBUSY",
    "execl": "ENOMEM",
    "fcntl": "ENOLCK EAGAIN",
    "fork": "EAGAIN ENOMEM",
    "fstat": "EIO",
    "fsync": "EIO EINTR ENOSPC",
    "ftruncate": "EIO",
    "getaddrinfo": "EAGAIN",
    "getcwd": "ENOENT",
    "getrlimit": "EPERM",
    "getsockname": "ENOBUFS",
    "getsockopt": "ENOBUFS",
    "link": "EIO ENOSPC EEXIST",
    "listen": "EADDRINUSE",
    "malloc": "ENOMEM",
    "mkostemp": "ENOSPC EMFILE EACCES",
    "open": "EMFILE EINTR ENOSPC EACCES",
    "pipe2": "EMFILE",
    "poll": "EINTR ENOMEM",
    "pread": "EIO 0 EINTR",
    "pwrite": "ENOSPC 0 EIO",
    "pwritev": "0 ENOSPC EINTR EIO",
    "read": "EINTR EAGAIN 0",
    "recv": "ECONNRESET 0 EAGAIN EINTR ETIMEDOUT",
    "send": "EPIPE 0 EAGAIN EINTR ECONNRESET ENOBUFS",
    "sendfile": "EIO 0 EINVAL EAGAIN EINTR EPIPE",
    "setrlimit": "EPERM",
    "setsockopt": "ENOBUFS",
    "socket": "EMFILE ENOBUFS",
    "syscall": "ENOSYS",
    "unlink": "EIO",
    "waitpid": "EINTR",
    "write": "ENOSPC 0 EAGAIN EINTR",
}
# Calls in the background, as another user, in the sandbox.
AT_START = {
    "chdir": "EACCES", "dup2": "EBUSY", "fork": "EAGAIN", "getaddrinfo": "EAGAIN",
    "getpwnam": "ENOENT", "initgroups": "EPERM", "open": "EMFILE",
    "pipe2": "EMFILE", "prctl": "EINVAL", "read": "EINTR", "setgid": "EPERM",
    "setuid": "EAGAIN", "syscall": "ENOSYS", "waitpid": "EINTR",
}
# EINTR, EAGAIN and short calls, again and again, as signals and full sockets can
# cause them.
STORMS = {
    "EINTR": "accept4 poll pwritev recv send sendfile waitpid",
    "EAGAIN": "accept4 recv send sendfile",
    "0": "pread pwritev recv send sendfile",
}
# Errors that can last for a while.
LASTING = {
    "accept4": "EMFILE", "connect": "ECONNREFUSED", "fork": "EAGAIN",
    "fsync": "EIO", "link": "ENOSPC", "malloc": "ENOMEM", "open": "EMFILE",
    "pipe2": "EMFILE", "pread": "EIO", "pwritev": "ENOSPC", "recv": "ECONNRESET",
    "send": "EPIPE", "sendfile": "EIO", "socket": "EMFILE",
}

IDLE = 9        # descriptors: 0 to 2, signals (2), listeners (3), pid file
MANY = 20000    # calls of poll(); a daemon that spins soon reaches this
LOST = "lines of the log were lost"

# Writes the copy's path, if the descriptors are right.
ACTION = "[ /proc/self/fd/2 -ef /dev/null ] || EMAIL=open; echo $EMAIL >>%s"


def number(how):
    return 0 if how == "0" else getattr(errno, how)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def with_header(body):
    return body.replace(b"\r\n\r\n", b"\r\n" + HEADER + b"\r\n", 1)


class Mail:
    def __init__(self, verb, text):
        self.verb, self.text, self.infected = verb, text, EICAR in text


LINES = (b"x" * 70 + b"\r\n") * 500     # several reads
DOTS = Mail("DATA", b".a line\r\n" + LINES)
PLAIN = Mail("DATA", LINES)              # by sendfile
CHUNK = Mail("BDAT", b".\r\n")
VIRUS = Mail("DATA", EICAR + b"\r\n")


class Attempt:
    """One attempt to send a mail.  All mails are different."""

    tokens = itertools.count(100000)

    def __init__(self, mail):
        self.mail, self.said = mail, ""      # "": the connection broke
        self.token = b"%d" % next(self.tokens)
        self.body = b"Subject: %s\r\n\r\n%s" % (self.token, mail.text)


class Run:
    """A daemon from its start to its end, and a client that repeats each mail until
    it is accepted."""

    def __init__(self, scene, fault=""):
        self.scene, self.fault = scene, fault
        self.dir = scene.path("run%d" % next(scene.runs))
        self.spool, self.acted = self.path("spool"), self.path("acted")
        self.attempts = []
        self.client = self.daemon = None
        os.makedirs(self.spool)
        self.faults = harness.Faults(self.path("faults"), fault)
        self.calls = self.faults.calls
        for seen in scene.hop.sessions, scene.clamd.scans, scene.tcp.scans:
            seen.clear()

    def path(self, name):
        return os.path.join(self.dir, name)

    # -- the daemon

    def settings(self, **settings):
        return dict(dict(
            Listen=[self.path("listen"), "127.0.0.1:0"],
            OutAddress=self.scene.hop.address,
            ClamAddress=self.scene.clamd.address,
            TempDirectory=self.spool, PidFile=self.path("pid"),
            StatusListen=self.path("status"),
            Quarantine="on", VirusAction=ACTION % self.acted), **settings)

    def launch(self, level):
        self.daemon = harness.Daemon(
            self.dir, binary=self.scene.program, level=level, wait=False,
            env=self.faults.env,
            **self.settings())

    def start(self):
        """Whether it runs; if not, it has said why."""
        self.launch(level=3)
        until(lambda: self.daemon.listening() or not self.alive(),
              "the daemon listens")
        return self.alive() or self.refused()

    def refused(self):
        assert self.daemon.wait_exit() in (1, 2)
        assert self.daemon.text(), "it ended without a word"
        self.nothing_left()

    def alive(self):
        return self.daemon.alive()

    def nothing_left(self):
        until(lambda: not harness.processes(self.daemon.mark), "it ends")
        assert not self.daemon.left(), "left: %s" % self.daemon.left()
        assert not self.daemon.spooled(), "left: %s" % self.daemon.spooled()
        assert self.calls("poll") < MANY, "it spins"

    # -- the client

    def reply(self):
        while True:
            line = self.client.stream.line()
            if line[3:4] != b"-":
                return line[:3].decode()

    def dialogue(self, mail, body):
        """The reply to the mail, or the first that refuses something."""
        if self.client is None:
            self.client = harness.Client(self.address)
            said = self.reply()
            if said != "220":
                return said
            self.client.send("EHLO client.example\r\n")
            self.reply()
        self.client.send(b"MAIL FROM:<a@example.com>\r\n"
                         b"RCPT TO:<b@example.com>\r\n")
        if mail.verb == "DATA":
            self.client.send("DATA\r\n")
        else:
            self.client.chunk(body, last=True)
        for want in ["250", "250"] + ["354"] * (mail.verb == "DATA"):
            said = self.reply()
            if said != want:
                return said
        if mail.verb == "DATA":
            self.client.send(harness.stuff(body) + b".\r\n")
        return self.reply()

    def attempt(self, mail):
        attempt = Attempt(mail)
        self.attempts.append(attempt)
        try:
            attempt.said = self.dialogue(mail, attempt.body)
        except (OSError, Gone):
            pass
        if attempt.said[:1] != "2":
            self.hang_up()
        assert self.alive(), "it has ended"
        return attempt.said[:1] == "2"

    def hang_up(self):
        if self.client is not None:
            self.client.close()
            self.client = None

    def deliver(self, *mails):
        for mail in mails:
            until(lambda: self.attempt(mail), "a mail gets through")

    # -- its life

    def live(self):
        if self.start():
            self.address = self.path("listen")
            self.deliver(DOTS, PLAIN, CHUNK, VIRUS)
            self.hang_up()
            self.reload()
            self.deliver(PLAIN)
            self.ask_health()
            self.daemon.send_signal(signal.SIGUSR1)
            self.deliver(VIRUS)
            self.finish()

    def reload(self):
        """Reload the daemon.  From then on the scans use TCP."""
        self.daemon.write(self.settings(ClamAddress=[
            "%s:%d" % (harness.localhost(), self.scene.tcp.port),
            self.scene.clamd.address]))
        self.daemon.send_signal(signal.SIGHUP)
        self.daemon.wait_log("reloaded|keeping the old settings|" + LOST)
        self.address = max(address for address in self.daemon.listening()
                           if not address.endswith(":0"))   # the port, if known

    def ask_health(self):
        """Ask for /healthz.  There may be no answer, but the connection must
        end."""
        with contextlib.suppress(OSError):
            client = harness.Client(self.path("status"))
            client.send("GET /healthz HTTP/1.0\r\n\r\n")
            self.health = client.rest()
            client.close()

    def finish(self):
        self.hang_up()
        until(lambda: not self.daemon.children(), "children are reaped")
        until(lambda: self.daemon.fds() <= IDLE, "descriptors are closed")
        self.idle = self.daemon.fds()
        if self.fault.startswith("unlink"):     # then a file must stay
            self.daemon.spool, self.daemon.own = None, set()
        self.daemon.allowed = set(map(os.path.basename, self.copies()))
        self.daemon.stop()
        self.nothing_left()
        self.judge()

    def end(self):
        self.hang_up()
        if self.daemon:
            self.daemon.kill()

    # -- the promises

    def copies(self):
        """The quarantine copies that the log has, as far as we have the log."""
        if self.daemon.log(LOST):
            return [os.path.join(self.spool, name)
                    for name in os.listdir(self.spool)]
        return [line.split(": ")[-1]
                for line in self.daemon.log("quarantined virus file as: ")]

    def judge(self):
        for session in self.scene.hop.sessions:
            session.wait_end()
        for attempt in self.attempts:
            try:
                if attempt.mail.infected:
                    self.judge_virus(attempt)
                else:
                    self.judge_clean(attempt)
            except AssertionError as error:
                raise Failed("mail %s, reply %r: %s" % (
                    attempt.token, attempt.said, error)) from None

    def judge_clean(self, attempt):
        hop, scans = self.scene.hop, self.scene.clamd.scans + self.scene.tcp.scans
        got = [m.body for m in hop.messages if attempt.token in m.body]
        for body in got:
            harness.same(body, with_header(attempt.body))
        if any(attempt.token in s.raw for s in hop.sessions):
            assert attempt.body in [s.mail for s in scans], "went out unseen"
        if attempt.said[:1] == "2":
            assert len(got) == 1, "is at the next hop %d times" % len(got)
        elif attempt.said and not self.daemon.log("it may have accepted the message"):
            assert not got, "is at the next hop"
        else:           # the client cannot know
            assert len(got) <= 1, "is at the next hop %d times" % len(got)

    def judge_virus(self, attempt):
        assert not any(attempt.token in s.raw for s in self.scene.hop.sessions), \
            "went out"
        if attempt.said[:1] == "2":
            kept = [path for path in self.copies() if read(path) == attempt.body]
            assert len(kept) == 1, "was kept %d times" % len(kept)
            acted = read(self.acted).split() if os.path.exists(self.acted) else []
            assert os.fsencode(kept[0]) in acted or \
                self.daemon.log("VirusAction|" + LOST), "no VirusAction"


class Background(Run):
    """The same without -d, as another user, in the sandbox."""

    def settings(self):
        os.chmod(self.dir, 0o777)
        os.chmod(self.spool, 0o777)
        return dict(Listen=self.path("listen"), User="nobody",
                    OutAddress="%s:%d" % (harness.localhost(), self.scene.hop.port),
                    ClamAddress=self.scene.clamd.address,
                    TempDirectory=self.spool, PidFile=self.path("pid"))

    def start(self):
        self.launch(level=None)
        return self.daemon.wait_exit() == 0 or self.refused()

    def alive(self):
        return harness.processes(self.daemon.mark)

    def live(self):
        if self.start():
            self.address = self.path("listen")
            self.deliver(PLAIN)
            self.hang_up()
            os.kill(int(read(self.path("pid"))), signal.SIGTERM)
            self.nothing_left()
            self.judge()


class Lasting(Run):
    """The fault begins while the daemon runs, and ends after it has hit a call."""

    def live(self):
        kind = self.fault.split(":")[0]
        self.faults.switch(on=False)
        self.start()
        self.address = self.path("listen")
        self.deliver(PLAIN)
        met, turns = self.calls(kind), self.calls("poll")
        self.faults.switch(on=True)
        with futures.ThreadPoolExecutor() as pool:
            attempts = pool.submit(self.attempt_both)
            try:
                until(lambda: self.calls(kind) > met, "the fault is met")
                harness.never(lambda: self.calls("poll") > turns + 1000, "it spins")
            finally:
                self.faults.switch(on=False)
        attempts.result()
        self.deliver(DOTS, CHUNK, VIRUS)
        self.finish()

    def attempt_both(self):
        """Send the mail in the existing session, and in a new one."""
        self.attempt(VIRUS)
        self.hang_up()
        self.attempt(PLAIN)


class Scene:
    """A next hop and two clamds for one daemon after another."""

    def __init__(self, site, program):
        self.path, self.program = site.path, program
        self.runs = itertools.count()
        self.hop = site.new_hop(chunking=True)
        self.clamd = site.new_clamd()
        self.tcp = site.new_clamd(tcp=True)

    def run(self, fault="", kind=Run):
        run = kind(self, fault)
        try:
            run.live()
        except (AssertionError, OSError) as error:
            raise Failed("%s: %s\n%s" % (
                fault, error, "\n".join(run.daemon.log()[-8:]))) from None
        finally:
            run.end()
        return run

    def run_all(self, kind, how, life=Run):
        """Run the daemon once for each call."""
        broken = []
        for n in itertools.count(1):
            try:
                run = self.run("%s:%d:0:%d" % (kind, n, number(how)), life)
                if run.calls(kind) < n:
                    break
                shutil.rmtree(run.dir)
            except Failed as failed:
                broken.append(str(failed))
            assert len(broken) < 5, "\n\n".join(broken)
        assert n > 1, "never called"
        assert not broken, "\n\n".join(broken)


@pytest.fixture
def program(faulty_build):
    if os.environ.get("TEST_BYTES"):
        pytest.skip("it would take hours")
    return faulty_build


@pytest.fixture
def scene(site, program):
    return Scene(site, program)


def test_fault_none_all_mail_arrives(scene):
    """Without faults all mail arrives, which the other tests assume."""
    run = scene.run()
    assert [a.said for a in run.attempts] == ["250"] * 6
    assert b" 200 " in run.health and run.idle == IDLE


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_of_each_call_once_loses_no_mail(scene, kind):
    if kind == "getaddrinfo" and harness.localhost() != "localhost":
        pytest.skip("/etc/hosts has no name for 127.0.0.1")
    scene.run_all(kind, FAULTS[kind].split()[0])


@pytest.mark.long
@pytest.mark.parametrize("kind, how", [
    (kind, how) for kind, hows in FAULTS.items() for how in hows.split()[1:]])
def test_fault_of_each_call_in_other_ways_loses_no_mail(scene, kind, how):
    scene.run_all(kind, how)


@pytest.mark.parametrize("kind", AT_START)
def test_fault_of_each_call_at_start_is_survived_or_reported(open_site, program, kind):
    Scene(open_site, program).run_all(kind, AT_START[kind], Background)


@pytest.mark.parametrize("how", STORMS)
def test_faults_at_random_lose_no_mail(scene, how):
    run = scene.run(" ".join("%s:1:3:%d" % (kind, number(how))
                             for kind in STORMS[how].split()))
    assert [a.said for a in run.attempts] == ["250"] * 6


@pytest.mark.parametrize("kind", LASTING)
def test_fault_that_lasts_and_ends_lets_mail_flow(scene, kind):
    scene.run("%s:1:1:%d" % (kind, number(LASTING[kind])), Lasting)


@pytest.mark.covers("clamsmtpd.conf.5 Quarantine: copy first")
def test_fault_of_each_fsync_of_a_copy_gives_451(scene):
    """Both fsync() of a quarantine copy must succeed."""
    for n in 1, 2, 3, 4:
        run = scene.run("fsync:%d:0:%d" % (n, errno.EIO))
        replies = [a.said for a in run.attempts if a.mail.infected]
        assert sorted(replies) == ["250", "250", "451"]


class Replay(Run):
    """Large mail, and mail with lines that begin with a dot."""

    def live(self):
        judged = harness.Hold("OK")
        self.scene.clamd.verdict = [judged]
        self.start()
        self.address = self.path("listen")
        with futures.ThreadPoolExecutor() as pool:
            mail = pool.submit(self.deliver, Mail("DATA", b".\r\n" + 50 * LINES))
            judged.reached()
            before = self.calls("pread"), self.calls("poll")
            judged.go()
        mail.result()
        self.pieces = self.calls("pread") - before[0]
        self.turns = self.calls("poll") - before[1]
        self.finish()


def test_next_hop_fast_delays_no_other_session(scene):
    """PROMISE 5: a next hop that takes a message fast delays no other session."""
    run = scene.run(kind=Replay)
    assert run.pieces > 200 and run.turns > run.pieces / 5, \
        "%d pieces in %d turns" % (run.pieces, run.turns)
