"""The recipes of docs/examples for mail servers other than Postfix, and the vectors of
vectors.py, sent through the daemon to all servers.  The queue of a server must then
have as many messages as were sent, with the senders of these messages.

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

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

HERE = os.path.dirname(os.path.abspath(__file__))
INSTALL = 300           # seconds that a package may take


# ---------------------------------------------------------------- vectors

def transactions():
    """(name, bytes from MAIL on) for each pair of line ends, DATA and BDAT, with a
    second envelope.  The senders have numbers."""
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
    """Send all transactions, sixteen per session.  Returns the senders whose mail
    must have arrived, and the replies that were wrong.  A server that reads one
    message as two sends more replies than it should."""
    site.start(OutAddress=address, level=3)
    want, wrong = collections.Counter(), []
    client = None
    for number, (name, stream) in enumerate(transactions()):
        codes, messages, stops = vectors.strict(stream)
        want.update(re.search(rb"<(.*)@", m[0])[1].decode() for m in messages)
        got = []
        try:
            if client is None:
                client = site.session()
            last = 0
            for end, count in [*stops, (len(stream), len(codes))]:
                client.send(stream[last:end])
                last = end
                while len(got) < count:
                    got.append(client.reply().code)
            if number % 16 == 15 or "554" in codes:
                client.quit() if "554" not in codes else client.close()
                client = None
        except (AssertionError, OSError):
            client.close()
            client = None
            got.append("no more")
        if got != codes:
            wrong.append("%s: %s, not %s" % (name, got, codes))
    return want, wrong


def compare(want, wrong, queued):
    """The server has exactly the wanted mails, and no reply was wrong."""
    queued = collections.Counter(queued)
    assert (wrong, sorted(queued - want), sorted(want - queued)) == ([], [], []), \
        "trouble with, came too often, came too seldom"
    assert sum(want.values()) > 2 * len(vectors.PAIRS)


# ---------------------------------------------------------------- Postfix

class Holding(real.Postfix):
    """A Postfix that keeps accepted mail in its hold queue."""

    def __init__(self, bare_newline):
        super().__init__(
            more="smtpd_forbid_bare_newline = %s\n"
                 "smtpd_error_sleep_time = 0\n"
                 "smtpd_hard_error_limit = 1000\n" % bare_newline,
            table={"smtpd_client_restrictions=": "smtpd_client_restrictions="
                   "check_client_access,static:HOLD"})

    def queued(self):
        for name in ("incoming", "active", "deferred", "hold"):
            for path in glob.glob(self.dir + "/queue/" + name + "/**",
                                  recursive=True):
                if os.path.isfile(path):
                    with open(path, "rb") as file:
                        # a record of type S is the sender
                        yield re.search(rb"S.(\w+)@example\.com", file.read(),
                                        re.S)[1].decode()


@pytest.mark.postfix
@pytest.mark.skipif(not real.find("postconf") or not real.user("postfix"),
                    reason="no Postfix installed")
@pytest.mark.parametrize("bare_newline", ["normalize", "no"])
def test_postfix_default_is_not_smuggled(site, bare_newline):
    """Like any filter after the queue we connect from $mynetworks, to which Postfix
    by default does not apply its rule against smuggling."""
    postfix = Holding(bare_newline)
    try:
        want, wrong = send_all(site, postfix.address("back"))
        compare(want, wrong, postfix.queued())
    finally:
        postfix.close()


# ---------------------------------------------------------------- in an overlay

# Runs each line of its input.  At the end of the input all processes of the
# namespace end.
SERVE = """
exec 3>&1 >out 2>&1
{start}
echo started >&3
while read -r line; do eval "$line" >&3; echo end >&3; done
"""


class Overlaid:
    """A mail server from packages that are not installed here.  The files are in the
    directory where it is started.  In their texts, and in `start', @port@ and @dir@
    stand for the port and that directory."""

    def __init__(self, packages, port, start, files):
        self.dir = real.public_directory(packages.split()[0])
        self.port = port
        for name, text in dict(files, serve=SERVE.format(start=start)).items():
            path = os.path.join(self.dir, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text.replace("@port@", str(port))
                           .replace("@dir@", self.dir))
        self.errors = open(os.path.join(self.dir, "errors"), "w+b")
        self.process = subprocess.Popen(
            [os.path.join(HERE, "overlay.sh"), *packages.split(), "--", "sh", "serve"],
            cwd=self.dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, preexec_fn=real.die_with_us)

    def __enter__(self):
        try:
            self.wait_started()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        print(self.text())      # for a failure
        self.close()

    def wait_started(self):
        ready, _, _ = select.select([self.process.stdout], [], [], INSTALL)
        line = self.process.stdout.readline() if ready else b""
        if line != b"started\n":
            status = self.process.wait(INSTALL)
            if status == 77:
                pytest.skip(self.text().strip().replace("\n", "; "))
            raise Failed("exit status %d: %s" % (status, self.text()))
        until(self.answers, "the mail server answers; it says " + self.text())

    def address(self, _="smtp"):
        return "127.0.0.1:%d" % self.port

    def answers(self):
        try:
            with connect(self.address()) as sock:
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

    def run(self, command):
        """Run a command in the overlay; return the lines that it prints."""
        self.process.stdin.write(command.encode() + b"\n")
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


class Exim(Overlaid):
    def __init__(self, port, start, files):
        super().__init__("exim4-daemon-light", port, start + """
            exim4 -bdf &
            tail -F /var/log/exim4/mainlog &""", files)

    def queued(self):
        return [line for line in self.run("exim4 -bpr") if "<" in line]

    def flush(self):
        self.run("exim4 -qff")


class OpenSMTPD(Overlaid):
    def __init__(self, port, start, files):
        # OpenSMTPD 7.6 does not start without root certificates.
        super().__init__("opensmtpd ca-certificates", port, start + """
            mkdir -p /var/spool/smtpd
            chmod 711 /var/spool/smtpd
            cp smtpd.conf /etc
            smtpd -d &""", files)

    def queued(self):
        return self.run("smtpctl show queue")

    def flush(self):
        self.run("smtpctl schedule all")


# ---------------------------------------------------------------- vectors into these

EXIM = """
primary_hostname = mail.example.net
local_interfaces = 127.0.0.1
daemon_smtp_ports = %d
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
"""

# The scheduler keeps its mail while it may not relay.
OPENSMTPD = """
listen on 127.0.0.1 port %d
action "keep" relay host smtp://127.0.0.1:9
match from any for any action "keep"
"""


def through(site, server, sender):
    want, wrong = send_all(site, server.address())
    compare(want, wrong,
            [re.search(sender, line)[1] for line in server.queued()])


def test_exim_is_not_smuggled(site):
    port = site.port()
    with Exim(port, "cp exim4.conf /etc/exim4\n", {"exim4.conf": EXIM % port}) as exim:
        through(site, exim, r"<(\w+)@example\.com>")


def test_opensmtpd_is_not_smuggled(site):
    port = site.port()
    with OpenSMTPD(port, "", {"smtpd.conf": OPENSMTPD % port}) as opensmtpd:
        until(lambda: opensmtpd.run("smtpctl pause mta && echo yes"), "it pauses")
        through(site, opensmtpd, r"\|(\w+)@example\.com\|")


# ---------------------------------------------------------------- recipes

def recipe(site, clamd, name, server, start, table, mailbox):
    """Start the recipe for a filter after the queue of this server, which delivers
    to the next hop or to alice.  Mail of strangers reaches only the addresses it
    should."""
    # Exim takes 127.0.0.1 for itself, and the scripted hop cannot pipeline.
    site.hop = site.new_hop(host="127.0.0.2", ehlo=["8BITMIME"])
    port = site.port()
    ports = {n: str(site.port()) for n in ("10025", "10026")}
    top = os.path.join(real.EXAMPLES, name)
    table = dict(ports, **{
        old: new.format(smtp=port, hop=site.hop.port) for old, new in table.items()})
    files = {os.path.relpath(path, top): real.example(path, table)
             for path in glob.glob(top + "/**", recursive=True) if os.path.isfile(path)}
    with server(port, "useradd -m alice\n" + start, files) as server:
        server.arrived = lambda: [real.unix(m.body) for m in site.hop.messages]
        real.start_example(site, name, ports, ClamAddress=clamd.path)
        real.check_after_queue(site, clamd, server)

        client = real.speak(site, server.address(), "127.0.0.5")
        client.cmd("MAIL FROM:<a@example.com>", "250")
        client.cmd("RCPT TO:<b@example.com>", "550")
        client.cmd("RCPT TO:<nobody-here@localhost>", "550")
        client.cmd("RCPT TO:<alice@localhost>", "250")
        client.data(real.titled(b"local"))
        client.quit()
        until(lambda: server.run("grep X-Virus-Scanned: " + mailbox), "alice has it")


def test_exim_recipe_filters_mail(open_site, real_clamd):
    recipe(open_site, real_clamd, "exim", Exim, """
           cp -r conf.d /etc/exim4
           cat update-exim4.conf.conf >>/etc/exim4/update-exim4.conf.conf
           update-exim4.conf
           """, {"0.0.0.0.25 ; ::0.25": "127.0.0.1.{smtp}",
                 "smarthost.example::587": "127.0.0.2::{hop}"}, "/var/mail/alice")


def test_opensmtpd_recipe_filters_mail(open_site, real_clamd):
    recipe(open_site, real_clamd, "opensmtpd", OpenSMTPD, """
           mkdir -p /etc/mail
           echo alice@localhost >/etc/mail/recipients
           """, {"on 0.0.0.0": "on 127.0.0.1 port {smtp}", "listen on ::": "",
                 "outbound\" relay": "outbound\" relay host smtp://127.0.0.2:{hop}"},
           "~alice/Maildir/new/*")
