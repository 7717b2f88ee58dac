"""Real programs around the daemon: a clamd with a database of its own, mail for it
to scan, and a Postfix.  This module needs only Python's standard library."""

import base64
import ctypes
import glob
import hashlib
import io
import os
import pwd
import re
import shutil
import signal
import struct
import subprocess
import tarfile
import tempfile
import zipfile

from harness import TOP, Client, Failed, WAIT, connect, hold_port, until

# Written in two parts, since a scanner would find this file otherwise.
EICAR = (rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-STANDARD-"
         rb"ANTIVIRUS-TEST-FILE!$H+H*")
EICAR_NAME = "Test.Eicar.UNOFFICIAL"
FILES = "/usr/share/clamav-testfiles"
FILES_NAME = "Test.Clam.UNOFFICIAL"

os.environ["PATH"] += ":/usr/sbin:/sbin"


def die_with_us():
    """For preexec_fn: a killed test leaves no server behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


def user(name):
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def find(program):
    return shutil.which(program)


def public_directory(prefix):
    """A directory that other users can enter.  They cannot enter pytest's own."""
    path = tempfile.mkdtemp(prefix="clamsmtpd-" + prefix + ".")
    os.chmod(path, 0o755)
    return path


SIGNATURES = 27800                      # version of RealClamd's, and their time
SIGNATURES_AT = 1763800000


def write_database(path):
    """Write a daily database without a digital signature (.cud).  clamd takes the
    version and the time of its signatures from this file."""
    head = b"ClamAV-VDB:22 Nov 2025 08-26 +0000:%d:1:90:X:X:clamsmtpd:%d" % (
        SIGNATURES, SIGNATURES_AT)
    signature = b"Test.Daily:0:*:%s\n" % b"clamsmtpd-daily-test".hex().encode()
    info = b"%s\ndaily.ndb:%d:%s\n" % (head, len(signature), hashlib.sha256(
        signature).hexdigest().encode())
    with open(path, "wb") as file:
        file.write(head.ljust(512))
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in (("COPYING", b"-\n"), ("daily.info", info),
                               ("daily.ndb", signature)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class RealClamd:
    """clamd on a unix socket and a TCP port of its own, as user clamav where
    there is one; it knows EICAR and the files of clamav-testfiles."""

    def __init__(self, **settings):
        self.dir = public_directory("clamd")
        self.path = os.path.join(self.dir, "clamd.sock")
        self.log = os.path.join(self.dir, "log")
        self.user = user("clamav") if os.geteuid() == 0 else None
        self.process = None
        database = os.path.join(self.dir, "db")
        os.mkdir(database)
        write_database(os.path.join(database, "daily.cud"))
        with open(os.path.join(database, "test.ndb"), "w") as file:
            file.write("Test.Eicar:0:*:%s\n" % EICAR.hex())
        try:
            with open(os.path.join(FILES, "clam.exe"), "rb") as file:
                exe = file.read()
            with open(os.path.join(database, "test.hsb"), "w") as file:
                file.write("%s:%d:Test.Clam\n"
                           % (hashlib.sha256(exe).hexdigest(), len(exe)))
        except FileNotFoundError:
            pass
        self.held = hold_port()
        port = self.held.getsockname()[1]
        self.tcp = "127.0.0.1:%d" % port
        self.settings = dict(
            DatabaseDirectory=database, LocalSocket=self.path,
            LocalSocketMode="666", FixStaleSocket="yes", Foreground="yes",
            TCPAddr="127.0.0.1", TCPSocket=port, TemporaryDirectory=self.dir,
            # One of clamav-testfiles is as deep as the default allows, and the
            # mail that contains it is deeper.
            MaxRecursion="60", MaxThreads="20", SelfCheck="0")
        self.settings.update(settings)
        # The AppArmor profile of some systems forbids clamd this directory.  The
        # profile applies to the program's path, so we run a copy.
        self.program = os.path.join(self.dir, "clamd")
        shutil.copy(find("clamd"), self.program)
        if self.user:
            for path in (self.dir, database):
                os.chown(path, self.user.pw_uid, self.user.pw_gid)
        self.start()

    def start(self):
        config = os.path.join(self.dir, "clamd.conf")
        with open(config, "w") as file:
            for name, value in self.settings.items():
                file.write("%s %s\n" % (name, value))
        who = {}
        if self.user:
            who = dict(user=self.user.pw_uid, group=self.user.pw_gid,
                       extra_groups=[])
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [self.program, "-c", config], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, preexec_fn=die_with_us, **who)
        until(lambda: self.answers() or self.process.poll() is not None,
              "clamd answers")
        if self.process.poll() is not None:
            with open(self.log, errors="replace") as log:
                raise Failed("clamd does not start:\n" + log.read()[-2000:])

    def answers(self):
        try:
            return (self.ask(self.path, b"zPING\0") == b"PONG\0" and
                    self.ask(self.tcp, b"zPING\0") == b"PONG\0")
        except OSError:
            return False

    def ask(self, address, command):
        with connect(address) as sock:
            sock.sendall(command)
            return sock.makefile("rb").read()

    def scan(self, data):
        """Send these bytes to clamd directly; return its answer."""
        answer = self.ask(self.path, b"zINSTREAM\0" + struct.pack(
            "!I", len(data)) + data + bytes(4))
        return answer.rstrip(b"\0").decode()

    def scan_path(self, path):
        return self.ask(self.path, b"zSCAN %s\0" % path.encode()).decode()

    def kill(self):
        """Kill clamd at once.  Its socket is left behind."""
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(WAIT)
            except subprocess.TimeoutExpired:
                self.kill()
        self.held.close()
        shutil.rmtree(self.dir, ignore_errors=True)


# ---------------------------------------------------------------- mail

HEADERS = (b"Received: from somewhere by here; Thu, 1 Jan 1970 00:00:00 +0000\r\n"
           b"From: a@example.com\r\nTo: b@example.com\r\n"
           b"Subject: a mail\r\nMessage-ID: <1@example.com>\r\n")
CLEAN = HEADERS + (b"\r\nNothing to see here.\r\n"
                   b".\r\n..\r\n.a line with a dot\r\n\xe4\xf6\xfc\r\n\r\nbye\r\n")


def encoded(data):
    """base64 in lines of 76."""
    return base64.encodebytes(data).replace(b"\n", b"\r\n")


def attached(data, name="file.bin", headers=HEADERS):
    """A mail that has this data as a base64 attachment."""
    return headers + (
        b"MIME-Version: 1.0\r\n"
        b'Content-Type: multipart/mixed; boundary="=-parts"\r\n\r\n'
        b"--=-parts\r\nContent-Type: text/plain\r\n\r\nSee the file.\r\n"
        b"--=-parts\r\nContent-Type: application/octet-stream\r\n"
        b'Content-Disposition: attachment; filename="%s"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\n%s--=-parts--\r\n"
        % (name.encode(), encoded(data)))


def zipped(data, name="eicar.com"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def test_files():
    return sorted(os.path.basename(p) for p in glob.glob(FILES + "/*"))


test_files.__test__ = False


# ---------------------------------------------------------------- recipes

EXAMPLES = os.path.join(TOP, "docs/examples")


def example(path, table):
    """The text of a file of docs/examples.  Only its ports, paths and users are
    replaced, as the table says."""
    with open(os.path.join(EXAMPLES, path)) as file:
        text = file.read()
    return re.sub("|".join(map(re.escape, table)), lambda m: table[m[0]], text)


def start_example(site, recipe, ports, listeners=1, binary=None, **settings):
    """Start the daemon with the configuration of the recipe and these settings.  The
    site must be open to other users (open_site)."""
    if "ClamAddress" not in settings:
        settings["ClamAddress"] = site.clamd.address
    table = dict(ports, **{"User: clamsmtp": "User: nobody",
                           "/var/spool/clamsmtp": site.spool})
    return site.start(
        config=example(recipe + "/clamsmtpd.conf", table),
        Listen=[None] * listeners,      # start() waits for so many
        OutAddress=None, ClamAddress=None, binary=binary,
        env={"CLAMSMTPD_" + name.upper(): value
             for name, value in settings.items()})


def quarantined(site):
    """The path of the one quarantine copy."""
    line, = site.daemon.wait_log("quarantined virus file as: ")
    name = os.path.basename(line.rpartition(": ")[2])
    site.daemon.allowed.add(name)
    return os.path.join(site.spool, name)


def speak(site, address, source=None):
    """A client that is connected to a mail server directly and has sent EHLO."""
    client = Client(address, source)
    site.clients.append(client)
    client.expect("220")
    client.cmd("EHLO client.example", "250")
    return client


def titled(name, attachment=b"harmless"):
    return attached(attachment, headers=b"Subject: %s\r\n" % name)


def insist(action, condition, what):
    """Repeat the action until the condition is true: the first time may be too
    early."""
    def helped():
        action()
        try:
            return until(condition, what, 1)
        except Failed:
            return None
    return until(helped, what)


def check_after_queue(site, clamd, server):
    """Check a recipe for a filter after the queue, from a client of the mail server
    to the mailbox.  A clean mail arrives and is scanned once.  A virus is not
    delivered, and no sender or recipient gets a message about it.  Mail waits while
    clamd is down.  There are no bounces and no loops.
    """
    def send(mail):
        client = speak(site, server.address("smtp"))
        client.mail(body=mail)
        client.quit()

    def arrived(title):
        return [m for m in server.arrived() if b"Subject: %s\n" % title in m]

    def empty():
        return not server.queued()

    send(titled(b"well"))
    until(lambda: arrived(b"well"), "the clean mail arrives")
    send(titled(b"sick", EICAR))
    site.daemon.wait_log("status=VIRUS:" + EICAR_NAME)
    with open(quarantined(site), "rb") as file:
        assert encoded(EICAR) in file.read()
    until(empty, "nothing is left of the virus")

    clamd.kill()
    send(titled(b"late"))
    site.daemon.wait_log("status=CLAMAV-ERROR")
    assert not empty()
    assert not arrived(b"late")
    clamd.start()

    insist(server.flush, lambda: arrived(b"late"), "what has waited arrives")
    until(empty, "nothing is queued")

    every = server.arrived()
    assert not [m for m in every
                if re.search(rb"(?im)^from:.*mailer-daemon", m)], "a bounce"
    assert arrived(b"sick") == []
    for title in b"well", b"late":
        mail, = arrived(title)
        assert mail.count(b"X-Virus-Scanned: ") == 1
    assert len(site.daemon.log("status=CLEAN$")) == 2, "scanned again"
    assert len(site.daemon.log("status=VIRUS:")) == 1


def unix(data):
    """Text with LF line ends, as mail servers store it."""
    return data.replace(b"\r\n", b"\n")


# ---------------------------------------------------------------- Postfix

MAIN = """
compatibility_level = 3.6
queue_directory = {dir}/queue
data_directory = {dir}/data
maillog_file = {dir}/maillog
maillog_file_prefixes = {dir}
myhostname = mail.example.net
mydestination =
mynetworks = 127.0.0.0/8 [::1]/128
inet_protocols = all
alias_maps =
alias_database =
smtpd_peername_lookup = no
local_header_rewrite_clients =
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_recipient_restrictions =
smtpd_client_connection_count_limit = 0
notify_classes =
in_flow_delay = 0s
disable_dns_lookups = yes
virtual_mailbox_domains = example.com
virtual_mailbox_maps = static:box/
virtual_mailbox_base = {dir}/mail
virtual_minimum_uid = 1
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
message_size_limit = 20480000
"""

# The services that master itself needs.
MASTER = """
pickup unix n - n 1 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd -o max_idle=1d -o max_use=1000000
"""

# These are added to the services of a recipe: "smtp" for clients, if the recipe has
# no such service, and "other", which accepts XCLIENT or filters without
# speed_adjust.
BESIDES = {"postfix-after-queue": """
127.0.0.1:{smtp} inet n - n - - smtpd
127.0.0.1:{other} inet n - n - - smtpd
    -o content_filter=
    -o smtpd_helo_required=yes
    -o smtpd_authorized_xclient_hosts=127.0.0.0/8,[::1]/128
""", "postfix-before-queue": """
127.0.0.1:{other} inet n - n - - smtpd
    -o smtpd_proxy_filter=127.0.0.1:{filter}
"""}


class Postfix:
    """A Postfix with a recipe.  `more' is added to main.cf; `table' is for
    example()."""

    def __init__(self, recipe="postfix-after-queue", more="", table=()):
        self.recipe, self.more, self.table = recipe, more, dict(table)
        self.dir = public_directory("postfix")
        # This shell ends Postfix after we have died.  die_with_us() does not last,
        # since it is lost whenever master changes its user.
        self.watch = subprocess.Popen(
            ["sh", "-c", 'while read -r p; do pid=$p; done; kill -KILL "-$pid";'
             'rm -rf "$1"', "sh", self.dir],
            stdin=subprocess.PIPE, start_new_session=True)
        self.held = {name: hold_port()
                     for name in ("smtp", "filter", "back", "other")}
        self.port = {name: sock.getsockname()[1] for name, sock in self.held.items()}
        owner, nobody = user("postfix"), user("nobody")
        self.config = os.path.join(self.dir, "etc")
        self.log = os.path.join(self.dir, "maillog")
        self.mail = os.path.join(self.dir, "mail")
        for name, uid, mode in [
                ("etc", 0, 0o755), ("queue", 0, 0o755), ("queue/pid", 0, 0o755),
                ("data", owner.pw_uid, 0o700), ("mail", nobody.pw_uid, 0o700)]:
            path = os.path.join(self.dir, name)
            os.mkdir(path, mode)
            os.chown(path, uid, -1)
        group = os.stat(find("postdrop")).st_gid
        for name in ("active bounce corrupt defer deferred flush hold incoming "
                     "private saved trace maildrop public").split():
            path = os.path.join(self.dir, "queue", name)
            os.mkdir(path, 0o700)
            os.chown(path, owner.pw_uid, -1)
            if name in ("maildrop", "public"):
                os.chown(path, owner.pw_uid, group)
                os.chmod(path, 0o1730 if name == "maildrop" else 0o2710)
        self.start()

    def configure(self):
        """Write the configuration: what any Postfix has, then the recipe."""
        nobody, port = user("nobody"), self.port
        self.ports = {"10025": str(port["filter"]), "10026": str(port["back"]),
                      "smtp      inet": "127.0.0.1:%d inet" % port["smtp"]}
        text = {"main.cf": MAIN.format(dir=self.dir, uid=nobody.pw_uid,
                                       gid=nobody.pw_gid) + self.more,
                "master.cf": MASTER + BESIDES[self.recipe].format(**port)}
        for path in glob.glob("%s/%s/*.cf" % (EXAMPLES, self.recipe)):
            text[os.path.basename(path)] += example(
                path, dict(self.ports, **self.table))
        for name in text:
            with open(os.path.join(self.config, name), "w") as file:
                file.write(text[name])

    def start(self):
        self.configure()
        directory = self.run("postconf", "-h", "daemon_directory").strip()
        with open(os.path.join(self.dir, "stderr"), "ab") as err:
            self.master = subprocess.Popen(
                [os.path.join(directory, "master"), "-d", "-c", self.config],
                stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                env=dict(os.environ, MAIL_CONFIG=self.config),
                start_new_session=True)
        self.watch.stdin.write(b"%d\n" % self.master.pid)
        self.watch.stdin.flush()
        until(lambda: self.answers() or self.master.poll() is not None,
              "Postfix answers")
        if self.master.poll() is not None:
            raise Failed("Postfix does not start:\n" + self.text())

    def run(self, command, *args):
        return subprocess.run([command, "-c", self.config, *args], check=True,
                              capture_output=True, text=True).stdout

    def answers(self):
        try:
            with connect(self.address("back")) as sock:
                return sock.recv(100).startswith(b"220")
        except OSError:
            return False

    def address(self, name):
        return "127.0.0.1:%d" % self.port[name]

    def text(self):
        text = ""
        for path in (os.path.join(self.dir, "stderr"), self.log):
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    text += file.read()
        return text

    def wait_log(self, pattern):
        try:
            return until(lambda: re.search(pattern, self.text(), re.M),
                         "the mail log has " + pattern)
        except Failed as failed:
            raise Failed("%s; it ends:\n%s" % (
                failed, self.text()[-3000:])) from None

    def delivered(self):
        """The mails that have reached the mailbox, as (headers, body)."""
        found = []
        for path in sorted(glob.glob(self.mail + "/box/new/*")):
            with open(path, "rb") as file:
                head, _, body = file.read().partition(b"\n\n")
            found.append((head + b"\n", body))
        return found

    # -- for check_after_queue()

    def arrived(self):
        return [b"\n".join(message) for message in self.delivered()]

    def queued(self):
        return self.run("postqueue", "-j").splitlines()

    def flush(self):
        self.run("postqueue", "-f")

    def wait_delivered(self, subject, count=1):
        want = b"Subject: %s\n" % subject
        try:
            return until(
                lambda: (lambda got: got if len(got) >= count else None)(
                    [m for m in self.delivered() if want in m[0]]),
                "mail of subject %r is delivered" % subject)
        except Failed as failed:
            raise Failed("%s; the mail log ends:\n%s" % (
                failed, self.text()[-3000:])) from None

    def close(self):
        self.watch.kill()
        self.watch.wait()
        self.watch.stdin.close()
        for number in signal.SIGTERM, signal.SIGKILL:
            try:
                os.killpg(self.master.pid, number)
                self.master.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        for sock in self.held.values():
            sock.close()
        shutil.rmtree(self.dir, ignore_errors=True)
