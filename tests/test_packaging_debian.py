"""The systemd unit, checked by systemd's own tools, and the Debian package, installed
on a copy of this machine.  tests/vm runs both in a virtual machine."""

import glob
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile

import pytest

import harness
from harness import CLAMSMTPD, EICAR, TOP, WAIT

SYSTEMD = os.path.join(TOP, "packaging", "systemd")
UNIT = os.path.join(SYSTEMD, "clamsmtpd.service")
DROP_IN = os.path.join(SYSTEMD, "virusaction.conf")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"),
                             reason="no systemd here")


def values(name, text=None):
    """The values that the unit has for a setting, one per line."""
    if text is None:
        with open(UNIT) as file:
            text = file.read()
    return re.findall(r"(?m)^%s=(.*)$" % name, text)


def systemd_says(*command):
    got = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT)
    if "Failed to create directory '/run/systemd" in got.stderr:
        pytest.skip("no systemd runs here, and only root can create its /run/systemd")
    return got


# ---------------------------------------------------------------- the unit

@systemd
@pytest.mark.parametrize("drop_in", [None, DROP_IN])
def test_unit_passes_systemd_analyze(tmp_path, drop_in):
    with open(UNIT) as file:
        unit = file.read().replace("/usr/sbin/clamsmtpd", CLAMSMTPD)
    path = tmp_path / "clamsmtpd.service"
    # systemd-analyze also checks that the manual pages are installed.
    path.write_text(re.sub(r"(?m)^Documentation=.*\n", "", unit))
    if drop_in:
        os.mkdir(tmp_path / "clamsmtpd.service.d")
        shutil.copy(drop_in, tmp_path / "clamsmtpd.service.d")
    got = systemd_says("systemd-analyze", "verify", str(path))
    assert (got.returncode, got.stdout + got.stderr) == (0, "")


@systemd
def test_unit_exposure_is_that_of_the_readme():
    got = systemd_says("systemd-analyze", "--no-pager", "security", "--offline=true",
                       "--threshold=20", UNIT)
    assert got.returncode == 0, got.stdout + got.stderr
    figure = re.search(r"Overall exposure level .*: ([\d.]+)", got.stdout).group(1)
    with open(os.path.join(SYSTEMD, "README.md")) as file:
        said, version = re.search(r"reports ([\d.]+) \(systemd (\d+);",
                                  file.read()).groups()
    mine = systemd_says("systemd-analyze", "--version").stdout.split()[1]
    assert figure == said or mine != version


def test_unit_drop_in_relaxes_all_that_implies_no_new_privileges():
    """systemd.exec(5) has the list, at NoNewPrivileges=."""
    with open(DROP_IN) as file:
        relaxed = file.read()
    for name in """LockPersonality MemoryDenyWriteExecute NoNewPrivileges
            PrivateDevices ProtectClock ProtectHostname ProtectKernelLogs
            ProtectKernelModules ProtectKernelTunables RestrictAddressFamilies
            RestrictNamespaces RestrictRealtime RestrictSUIDSGID
            SystemCallArchitectures SystemCallFilter""".split():
        assert values(name), name
        assert values(name, relaxed) in (["no"], [""]), name


@systemd
@as_root
def test_unit_user_and_spool_are_created(tmp_path):
    """systemd's own tools create them in a root directory of the test."""
    for kind in ("sysusers", "tmpfiles"):
        directory = tmp_path / "usr/lib" / (kind + ".d")
        os.makedirs(directory)
        shutil.copy(os.path.join(SYSTEMD, "clamsmtpd." + kind),
                    directory / "clamsmtpd.conf")
    os.mkdir(tmp_path / "etc")
    root = "--root=%s" % tmp_path
    subprocess.run(["systemd-sysusers", root, "clamsmtpd.conf"], check=True)
    subprocess.run(["systemd-tmpfiles", root, "--create", "clamsmtpd.conf"], check=True)
    name, _, uid, gid, _, home, shell = \
        (tmp_path / "etc/passwd").read_text().strip().split(":")
    assert [name] == values("User") and shell.endswith("nologin")
    spool = os.stat(str(tmp_path) + home)
    assert (spool.st_uid, spool.st_gid) == (int(uid), int(gid))
    assert spool.st_mode & 0o7777 == 0o700
    # If it is missing, the daemon must start and log it, and not systemd fail.
    assert ["-" + home] == values("ReadWritePaths")


def test_unit_starts_before_postfix_and_its_instance():
    """On Debian 12 postfix.service is empty, and postfix@-.service runs it."""
    before = values("Before")[0].split()
    assert before == ["postfix.service", "postfix@-.service"]


# ---------------------------------------------------------------- its commands

def command(line, config):
    """A command of the unit, changed to use this program and configuration."""
    words = shlex.split(line)
    assert words[0] == "/usr/sbin/clamsmtpd" and words[-2:] == \
        ["-f", "/etc/clamsmtpd.conf"]
    return [CLAMSMTPD] + words[1:-1] + [config]


def test_unit_start_has_no_option_but_the_file(run, tmp_path):
    """systemd does not start the daemon again after exit status 2, an error in the
    file."""
    start = command(values("ExecStart")[0], str(tmp_path))
    assert start == [CLAMSMTPD, "-f", str(tmp_path)]
    assert [str(run(*start[1:]).returncode)] == values("RestartPreventExitStatus")


def test_unit_reload_of_a_bad_file_fails(site):
    one = site.start()
    check, hup = values("ExecReload")
    assert subprocess.run(command(check, one.file), check=True,
                          capture_output=True).stderr == b""
    one.write({}, config="OutAddress: 127.0.0.1:1\nAction: explode\n")
    bad = subprocess.run(command(check, one.file), capture_output=True, text=True)
    assert bad.returncode == 2 and "explode" in bad.stderr
    assert hup == "/bin/kill -HUP $MAINPID"


def allowed_calls():
    """SystemCallFilter= of the unit as a set of names."""
    def expand(name):
        if not name.startswith("@"):
            return {name}
        listed = systemd_says("systemd-analyze", "--no-pager", "syscall-filter", name)
        words = [line.strip() for line in listed.stdout.split("\n")[1:]]
        return set().union(*map(expand, (w for w in words if w and w[0] != "#")))

    allowed = set()
    for line in values("SystemCallFilter"):
        names = set().union(*map(expand, line.lstrip("~").split()))
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed | expand("@default")


@systemd
@pytest.mark.skipif(not shutil.which("strace"), reason="no strace here")
@pytest.mark.parametrize("action", [None, "echo $VIRUS > $TMPDIR/seen"])
def test_unit_allows_each_system_call_of_the_daemon(site, action):
    calls, program = site.path("calls"), site.path("traced")
    with open(program, "w") as file:
        file.write("#!/bin/sh\nexec strace -D -f -qq -e signal=none -o %s %s \"$@\"\n"
                   % (calls, CLAMSMTPD))
    os.chmod(program, 0o755)
    # A sanitizer finds leaks by ptrace(2), which strace already uses.
    one = site.start(binary=program, env={"ASAN_OPTIONS": "detect_leaks=0"},
                     Quarantine="on", VirusAction=action,
                     ClamAddress=[site.clamd.address, site.new_clamd(tcp=True).address],
                     Listen=["127.0.0.1:0", site.path("in.sock")],
                     StatusListen=site.path("status"), PidFile=site.path("pid"))
    client = site.session()
    client.mail()
    site.clamd.down()                   # on to the one over TCP
    client.mail(body=b"\r\n" + EICAR + b"\r\n")
    client.quit()
    if action:
        harness.wait_file(os.path.join(site.spool, "seen"))
    one.send_signal(signal.SIGHUP)
    one.wait_log("reloaded")
    one.allowed.update(os.listdir(site.spool))
    one.stop()
    with open(calls) as file:
        text = file.read()
    made = set(re.findall(r"(?m)^\d+ +(\w+)\(", text))
    assert {"poll", "accept4", "sendto", "unlink"} <= made
    assert made - allowed_calls() == set()
    families = set(re.findall(r"socket\((AF_\w+)", text))
    assert families - set(values("RestrictAddressFamilies")[0].split()) == set()


# ---------------------------------------------------------------- the package

class Machine:
    """A shell on a copy of this machine, which tests/overlay.sh makes."""

    def __init__(self, directory):
        self.output = os.path.join(directory, "output")
        self.shell = subprocess.Popen(
            ["tests/overlay.sh", "debhelper", "systemd", "--", "sh"], cwd=TOP,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True)
        if self.answer("echo here") is None:
            pytest.skip(self.shell.communicate()[1].strip())

    def answer(self, line):
        """The next line that the shell prints, or None if the shell has ended."""
        try:
            self.shell.stdin.write(line + "\n")
            self.shell.stdin.flush()
        except BrokenPipeError:
            pass
        return self.shell.stdout.readline().strip() or None

    def does(self, commands):
        """Run commands; return their output.  If one of them fails, this fails."""
        status = self.answer("(set -e; %s) </dev/null >%s 2>&1; echo $?"
                             % (commands, self.output))
        with open(self.output, errors="replace") as file:
            output = file.read()
        assert status == "0", "%s: %s\n%s" % (commands, status, output[-3000:])
        return output

    def files(self):
        """All files, except those that dpkg and the account tools write."""
        found = self.does("find /etc /lib /usr /opt /var /run -xdev "
                          "! -path '*/__pycache__*' -print0")
        return {name for name in found.split("\0") if not re.match(
            r"/var/(lib/dpkg|lib/apt|cache|log|tmp)/|/etc/(passwd|shadow|group|gshadow)-"
            r"|/etc/sub[ug]id-?|/etc/\.pwd\.lock", name)}

    def close(self):
        self.shell.stdin.close()
        self.shell.wait(WAIT)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_scripts_are_plain_shell():
    scripts = glob.glob(os.path.join(TOP, "packaging/debian/clamsmtp.post*"))
    assert len(scripts) == 2
    subprocess.run(["shellcheck", "-s", "sh"] + scripts, check=True)


SOURCES = """*.c *.h *.8 *.5 Makefile LICENSE README.md CHANGES clamsmtpd.conf docs
             packaging tests""".split()


@pytest.fixture(scope="module")
def machine():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not shutil.which("dpkg"):
        pytest.skip("no Debian")
    with tempfile.TemporaryDirectory(prefix="clamsmtpd-test.") as directory:
        machine = Machine(directory)
        try:
            machine.deb = build(machine, directory)
            yield machine
        finally:
            machine.close()


def build(machine, directory):
    tree = os.path.join(directory, "clamsmtp")
    os.mkdir(tree)
    names = sum((glob.glob(os.path.join(TOP, name)) for name in SOURCES), [])
    subprocess.run(["cp", "-r", *names, tree], check=True)
    machine.does("cd %s; cp -r packaging/debian .; "
                 "DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage -b -us -uc" % tree)
    return glob.glob(directory + "/clamsmtp_*.deb")[0]


@pytest.fixture
def bare(machine):
    """The machine without the clamsmtp package and its user."""
    machine.does("dpkg -P clamsmtp; rm -rf /var/spool/clamsmtp;"
                 "! id clamsmtp || userdel clamsmtp")
    yield machine
    machine.does("dpkg -P clamsmtp")


def settings(machine):
    shown = machine.does("clamsmtpd -n")
    return dict(line.split(": ", 1) for line in shown.splitlines() if line[0] != "#")


@pytest.mark.long
def test_package_passes_lintian(machine):
    """There are no errors and no warnings, and each override is explained."""
    try:
        machine.does("apt-get -q -y --no-install-recommends install lintian </dev/null")
    except AssertionError:
        pytest.skip("lintian is not to be had")
    changes, = glob.glob(os.path.dirname(machine.deb) + "/clamsmtp_*.changes")
    said = machine.does("lintian --allow-root --fail-on error,warning " + changes)
    assert not re.findall(r"(?m)^[EW]: .*", said)


@pytest.mark.long
def test_package_program_is_hardened(machine):
    """The compiler gets CPPFLAGS, too, with _FORTIFY_SOURCE."""
    tree = os.path.join(os.path.dirname(machine.deb), "clamsmtp")
    assert "__memcpy_chk" in machine.does(
        "nm -D %s/debian/clamsmtp/usr/sbin/clamsmtpd" % tree)


@pytest.mark.long
def test_package_installed_and_purged_leaves_nothing(bare):
    before = bare.files()
    bare.does("dpkg -i " + bare.deb)
    assert bare.does("stat -c '%U %G %a' /var/spool/clamsmtp").split() == \
        ["clamsmtp", "clamsmtp", "700"]
    assert bare.does("cat /etc/systemd/system/multi-user.target.wants/clamsmtp.service")
    bare.does("touch /var/spool/clamsmtp/virus.abcdef; dpkg -r clamsmtp")
    left = bare.files() - before
    assert {"/etc/clamsmtpd.conf", "/var/spool/clamsmtp/virus.abcdef"} <= left
    assert not [name for name in left if name.startswith(("/lib/", "/usr/"))]
    bare.does("dpkg -P clamsmtp")
    assert bare.files() - before == set()


@pytest.fixture
def distributed(bare):
    """The machine with the clamsmtp package of the distribution."""
    try:
        bare.does("apt-get -q -y --no-install-recommends install clamsmtp </dev/null")
    except AssertionError:
        pytest.skip("the distribution has no clamsmtp any more")
    return bare


@pytest.mark.long
def test_package_replaces_the_distributions(distributed):
    distributed.does("sed -i 's/^#*Quarantine:.*/Quarantine: on/' /etc/clamsmtpd.conf;"
                     "touch /var/spool/clamsmtp/virus.abcdef")
    before = distributed.does("cat /etc/clamsmtpd.conf; id clamsmtp")
    distributed.does("dpkg --force-confold -i " + distributed.deb)
    assert distributed.does("cat /etc/clamsmtpd.conf; id clamsmtp") == before
    assert settings(distributed)["Quarantine"] == "on"
    distributed.does("test -e /var/spool/clamsmtp/virus.abcdef;"
                     "test ! -e /etc/init.d/clamsmtp")
    assert not distributed.does("find /etc/rc?.d -name '*clamsmtp'")
    distributed.does("dpkg -P clamsmtp")
    assert not [name for name in distributed.files() if "clamsmtp" in name]
    assert not distributed.does("debconf-show clamsmtp")


@pytest.mark.long
def test_package_replaces_an_unmodified_file_and_keeps_its_settings(distributed):
    def ports():
        text = distributed.does("cat /etc/clamsmtpd.conf")
        return {name: values(name, text.replace(": ", "="))[0].split(":")[-1]
                for name in ("Listen", "OutAddress", "ClamAddress",
                             "TempDirectory", "User")}

    before = ports()
    distributed.does("dpkg -i " + distributed.deb)
    assert ports() == before
    assert "MaxScanSize" in distributed.does("cat /etc/clamsmtpd.conf")
