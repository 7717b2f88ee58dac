"""The vectors of vectors.py through the daemon into real mail servers: as many
messages must be in their queues as were sent, from those who sent them.

Postfix runs as in test_real_postfix.py.  Exim and OpenSMTPD, which cannot be on
one machine with it, are installed in an overlay over the machine (overlay.sh),
which is gone when the test ends.
"""

import collections
import glob
import os
import re
import select
import shutil
import subprocess

import pytest

import real
import vectors
from harness import Failed, connect, until
from test_real_postfix import Postfix, quiet_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HERE = os.path.dirname(os.path.abspath(__file__))
INSTALL = 300           # seconds that a package may take


# ---------------------------------------------------------------- vectors

def transactions():
    """(name, bytes from MAIL on) for each pair of line ends, DATA and BDAT,
    with a second envelope; the senders have numbers."""
    for number, (way, (before, after)) in enumerate(
            (w, p) for w in ("DATA", "BDAT") for p in vectors.PAIRS):
        vector = vectors.Vector(before, after, vectors.SECOND)
        body = vector.body.replace(b"evil@", b"evil%d@" % number)
        envelope = (b"MAIL FROM:<v%d@example.com>\r\nRCPT TO:<b@example.com>\r\n"
                    % number)
        if way == "DATA":
            yield vector.name, envelope + b"DATA\r\n" + body + b"\r\n.\r\n"
        else:
            yield vector.name + " by BDAT", envelope + b"BDAT %d LAST\r\n" % len(
                body) + body


def send_all(site, address):
    """A session for sixteen of them.  The senders whose mail must be there now,
    and what went wrong on the way: somebody who takes one message for two says
    more than he was asked."""
    site.start(OutAddress=address, level=3)
    want, wrong = collections.Counter(), []
    client = None
    for number, (name, stream) in enumerate(transactions()):
        codes, messages = vectors.strict(stream)
        want.update(re.search(rb"<(.*)@", m[0])[1].decode() for m in messages)
        got = []
        try:
            if client is None:
                client = site.session()
            client.send(stream)
            for _ in codes:
                got.append(client.reply().code)
            if number % 16 == 15:
                client.quit()
                client = None
        except (AssertionError, OSError):
            client.close()
            client = None
            got.append("no more")
        if got != codes:
            wrong.append("%s: %s, not %s" % (name, got, codes))
    return want, wrong


def compare(want, wrong, queued):
    """One for one."""
    queued = collections.Counter(queued)
    assert (wrong, sorted(queued - want), sorted(want - queued)) == ([], [], []), \
        "trouble with, came too often, came too seldom"
    assert sum(want.values()) > 2 * len(vectors.PAIRS)


# ---------------------------------------------------------------- Postfix

class Holding(Postfix):
    """A Postfix that keeps what it takes in its hold queue."""

    def __init__(self, bare_newline):
        self.bare_newline = bare_newline
        super().__init__()

    def start(self):
        with open(os.path.join(self.config, "main.cf"), "a") as file:
            file.write("smtpd_forbid_bare_newline = %s\n"
                       "smtpd_client_restrictions = "
                       "check_client_access static:HOLD\n"
                       "smtpd_error_sleep_time = 0\n"
                       "smtpd_hard_error_limit = 1000\n" % self.bare_newline)
        super().start()

    def queued(self):
        for name in ("incoming", "active", "deferred", "hold"):
            for path in glob.glob(self.dir + "/queue/" + name + "/**",
                                  recursive=True):
                if os.path.isfile(path):
                    with open(path, "rb") as file:
                        # a record of type S is the sender
                        yield re.search(rb"S.(\w+)@example\.com", file.read(),
                                        re.S)[1].decode()


@pytest.mark.skipif(not real.find("postconf") or not real.user("postfix"),
                    reason="no Postfix installed")
@pytest.mark.parametrize("bare_newline", ["normalize", "no"])
def test_postfix(site, bare_newline):
    """We come from $mynetworks, which is excluded from the rule by default, as
    behind any content filter."""
    postfix = Holding(bare_newline)
    try:
        want, wrong = send_all(site, postfix.address("back"))
        compare(want, wrong, postfix.queued())
    finally:
        postfix.close()


# ---------------------------------------------------------------- in an overlay

EXIM = """
primary_hostname = mail.example.net
spool_directory = {dir}/spool
log_file_path = {dir}/log/%slog
pid_file_path = {dir}/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
host_lookup =
rfc1413_query_timeout = 0s
queue_only = true
acl_smtp_rcpt = anything
tls_advertise_hosts =
chunking_advertise_hosts = *
smtp_max_synprot_errors = 1000
smtp_accept_max_nonmail = 1000
begin acl
anything:
  accept
begin routers
begin transports
begin retry
begin rewrite
begin authenticators
"""

START_EXIM = """
cp {dir}/config /etc/exim4/exim4.conf
install -d -o Debian-exim -g Debian-exim {dir}/spool {dir}/log
exim4 -bdf &
"""

OPENSMTPD = """
listen on 127.0.0.1 port {port}
action "keep" relay host smtp://127.0.0.1:9
match from any for any action "keep"
"""

# Its scheduler keeps what it has when it may not relay.
START_OPENSMTPD = """
mkdir -p /var/spool/smtpd {dir}/spool
chmod 711 /var/spool/smtpd
cp {dir}/config /etc/smtpd.conf
smtpd -d &
until smtpctl pause mta; do sleep 0.1; done
"""

# Whatever line comes, the queue is told; at the end all in the namespace ends.
SERVE = """
echo started
while read -r line; do {queue}; echo end; done
"""


class Overlaid:
    """A mail server from a package that is not installed here."""

    def __init__(self, package, config, start, queue):
        self.dir = real.public_directory(package)
        self.port = quiet_port()
        self.address = "127.0.0.1:%d" % self.port
        what = dict(dir=self.dir, port=self.port, queue=queue.format(dir=self.dir))
        with open(os.path.join(self.dir, "config"), "w") as file:
            file.write(config.format(**what))
        with open(os.path.join(self.dir, "start"), "w") as file:
            file.write("exec 3>&1 >{dir}/out 2>&1\n".format(**what) +
                       start.format(**what) + "exec >&3\n" +
                       SERVE.format(**what))
        self.errors = open(os.path.join(self.dir, "errors"), "w+b")
        self.process = subprocess.Popen(
            [os.path.join(HERE, "overlay.sh"), package, "--", "sh",
             os.path.join(self.dir, "start")],
            cwd=os.path.dirname(HERE), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, preexec_fn=real.die_with_us)

    def wait_started(self):
        ready, _, _ = select.select([self.process.stdout], [], [], INSTALL)
        line = self.process.stdout.readline() if ready else b""
        if line != b"started\n":
            status = self.process.wait(INSTALL)
            if status == 77:
                pytest.skip(self.text().strip().replace("\n", "; "))
            raise Failed("exit status %d: %s" % (status, self.text()))
        until(self.answers, "the mail server answers; it says " + self.text())

    def answers(self):
        try:
            with connect(self.address) as sock:
                return sock.recv(100).startswith(b"220")
        except OSError:
            return False

    def text(self):
        text = ""
        for name in ("errors", "out"):
            path = os.path.join(self.dir, name)
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    text += file.read()[-2000:]
        return text

    def queue(self):
        """The lines that the command for it prints."""
        self.process.stdin.write(b"queue\n")
        self.process.stdin.flush()
        return list(iter(lambda: self.process.stdout.readline().decode().rstrip("\n"),
                         "end"))

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(INSTALL)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.stdout.close()
            self.errors.close()
            shutil.rmtree(self.dir, ignore_errors=True)


def through(site, server, sender):
    try:
        server.wait_started()
        want, wrong = send_all(site, server.address)
        compare(want, wrong,
                [re.search(sender, line)[1] for line in server.queue()])
    finally:
        server.close()


@pytest.mark.skipif(not real.find("unshare"), reason="no unshare here")
def test_exim(site):
    through(site, Overlaid("exim4-daemon-light", EXIM, START_EXIM,
                           "exim4 -bpr | grep '<.*@.*>'"),
            r"<(\w+)@example\.com>")


@pytest.mark.skipif(not real.find("unshare"), reason="no unshare here")
def test_opensmtpd(site):
    through(site, Overlaid("opensmtpd", OPENSMTPD, START_OPENSMTPD,
                           "smtpctl show queue"),
            r"\|(\w+)@example\.com\|")
