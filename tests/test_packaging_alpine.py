"""The Alpine package, without Alpine.  busybox sh runs the functions of APKBUILD and
of the init script, with stubs for abuild and OpenRC."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest

from harness import CLAMSMTPD, TOP, WAIT, Daemon, processes, until, wait_listener

ALPINE = os.path.join(TOP, "packaging", "alpine")
INITD = os.path.join(ALPINE, "clamsmtpd.initd")
SOURCES = ("clamsmtpd.c", "smtp.c", "clamd.c", "conf.c", "util.c", "clamsmtpd.h",
           "clamsmtpd.8", "clamsmtpd.conf.5", "clamsmtpd.conf", "Makefile",
           "LICENSE", "README.md", "CHANGES")

pytestmark = pytest.mark.skipif(not shutil.which("busybox"),
                                reason="no busybox here")


def tool(directory, name, text):
    """Make a command that comes before the machine's own in PATH."""
    path = directory / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def sh(script, *args, path=None, **env):
    env = dict(os.environ, **env)
    if path:
        env["PATH"] = "%s:%s" % (path, env["PATH"])
    return subprocess.run(["busybox", "sh", "-c", script, "sh", *args], env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=10 * WAIT)


@pytest.mark.parametrize("name, exclude", [
    # variables are for abuild or OpenRC (2034), or from them (2154)
    ("APKBUILD", "SC2034,SC2154"),
    ("clamsmtpd.initd", "SC2034,SC2154,SC2086"),    # 2086: options, to be split
    ("clamsmtpd.confd", "SC2034"),
    ("clamsmtpd.pre-install", None),
])
def test_scripts_are_plain_shell(name, exclude):
    file = os.path.join(ALPINE, name)
    subprocess.run(["busybox", "sh", "-n", file], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    subprocess.run(["shellcheck", "-s", "sh"] +
                   (["-e", exclude] if exclude else []) + [file], check=True)


# ---------------------------------------------------------------- APKBUILD

class Abuild:
    """The directories of an abuild, and its functions."""

    def __init__(self, home):
        self.home = home
        self.src, self.pkg = home / "src", home / "pkg"
        self.tree = self.src / "clamsmtpd-2.0"
        for directory in (self.src, self.pkg, self.tree):
            directory.mkdir()
        for name in SOURCES:
            shutil.copy(os.path.join(TOP, name), self.tree)
        shutil.copytree(os.path.join(TOP, "docs"), self.tree / "docs")
        (self.tree / "tests").mkdir()
        for name in ("conftest.py", "harness.py", "real.py", "test_dialogue.py"):
            shutil.copy(os.path.join(TOP, "tests", name), self.tree / "tests")
        for name in self.value("source").split():
            if name.startswith("clamsmtpd."):
                shutil.copy(os.path.join(ALPINE, name), self.src)

    def call(self, function, **env):
        return sh('''
            # as under fakeroot, an owner is only written down
            install() {
                echo "$*" >>"$INSTALLED"
                for a; do
                    shift
                    case $a in
                    -o | -g) value=yes ;;
                    *) [ "$value" ] || set -- "$@" "$a"; value= ;;
                    esac
                done
                command install "$@"
            }
            set -e
            umask 022
            . "$1/APKBUILD"
            builddir=${builddir:-$srcdir/$pkgname-$pkgver}
            cd "$builddir"
            $2''', ALPINE, function, path=os.path.dirname(sys.executable),
            srcdir=str(self.src), pkgdir=str(self.pkg),
            CC="musl-gcc" if shutil.which("musl-gcc") else "cc",
            CHOST="x86_64-alpine-linux-musl", LDFLAGS="-Wl,--as-needed",
            CFLAGS="-O0 -DVERSION='\"abuild\"'",
            INSTALLED=str(self.home / "installed"), **env)

    @staticmethod
    def value(name):
        return sh('. "$1/APKBUILD"; eval "echo \\"\\$$2\\""', ALPINE, name).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    abuild = Abuild(tmp_path_factory.mktemp("abuild"))
    done = abuild.call("build")
    assert done.returncode == 0, done.stderr
    return abuild


def test_apkbuild_version_is_that_of_the_program():
    with open(os.path.join(TOP, "clamsmtpd.h")) as file:
        version = re.search(r'define VERSION\s+"(.*)"', file.read()).group(1)
    assert Abuild.value("pkgver") == version + "\n"


def test_apkbuild_build_uses_the_flags_of_the_distribution(built):
    program = str(built.tree / "clamsmtpd")
    said = subprocess.run([program, "-v"], capture_output=True, text=True).stdout
    assert "clamsmtpd abuild\n" in said
    assert "/etc/clamsmtpd.conf" in said
    assert subprocess.run("readelf -l %s | grep -q INTERP" % program,
                          shell=True).returncode == 0, "it is static"


@pytest.mark.parametrize("broken", [False, True], ids=["well", "broken"])
def test_apkbuild_check_runs_the_suite(built, broken):
    program = built.tree / "clamsmtpd"
    good = program.read_bytes()
    try:
        if broken:
            tool(built.tree, "clamsmtpd", "exit 1\n")
        with tempfile.TemporaryDirectory(prefix="clamsmtpd-test.") as home:
            done = built.call("check", CLAMSMTPD=str(program), PYTEST_ADDOPTS=
                              "-k greeting_text -p no:xdist --basetemp=%s/t" % home)
    finally:
        program.write_bytes(good)
    assert (done.returncode != 0) == broken, done.stdout
    assert "1 %s" % ("failed" if broken else "passed") in done.stdout


@pytest.fixture(scope="module")
def packaged(built):
    done = built.call("package")
    assert done.returncode == 0, done.stderr
    return built


def test_package_has_these_files(packaged):
    found = {}
    for path in packaged.pkg.rglob("*"):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode) or not list(path.iterdir()):
            found[str(path.relative_to(packaged.pkg))] = stat.S_IMODE(mode)
    docs = {name for name in found if name.startswith("usr/share/doc/clamsmtpd/docs/")}
    assert "usr/share/doc/clamsmtpd/docs/upgrading.md" in docs
    assert {name: found[name] for name in found if name not in docs} == {
        "etc/clamsmtpd.conf": 0o644,
        "etc/conf.d/clamsmtpd": 0o644,
        "etc/init.d/clamsmtpd": 0o755,
        "usr/sbin/clamsmtpd": 0o755,
        "usr/share/doc/clamsmtpd/CHANGES": 0o644,
        "usr/share/doc/clamsmtpd/README.md": 0o644,
        "usr/share/licenses/clamsmtpd/LICENSE": 0o644,
        "usr/share/man/man5/clamsmtpd.conf.5": 0o644,
        "usr/share/man/man8/clamsmtpd.8": 0o644,
        "var/spool/clamsmtp": 0o700,
    }


def test_package_spool_belongs_to_the_user(packaged):
    with open(packaged.home / "installed") as file:
        line = [l for l in file if "var/spool/clamsmtp" in l]
    assert len(line) == 1 and "-o clamsmtp -g clamsmtp" in line[0]
    assert Abuild.value("pkgusers") == Abuild.value("pkggroups") == "clamsmtp\n"


def test_package_configuration_has_no_error(packaged, run):
    """It also has no error after an upgrade from an unedited file of 1.10, which
    had this next hop."""
    conf = packaged.pkg / "etc" / "clamsmtpd.conf"
    done = run("-n", "-f", str(conf))
    assert done.returncode == 0, done.stderr
    for line in ("OutAddress: 10026",
                 "User: clamsmtp", "TempDirectory: /var/spool/clamsmtp",
                 "Listen: 127.0.0.1:10025", "ClamAddress: /run/clamav/clamd.sock"):
        assert line in done.stdout.split("\n")


# ---------------------------------------------------------------- init script

# A small openrc-run: it reads conf.d and the script, and runs X_pre, X and X_post.
OPENRC = r'''
initd=$1 confd=$2 RC_CMD=$3
export RC_SVCNAME=${RC_SVCNAME:-clamsmtpd}
ebegin() { echo "* $* ..."; }
ewarn() { echo "* $*"; }
eend() { [ "$1" = 0 ] || echo "* failed"; return "$1"; }
checkpath() { note checkpath "$@"; }
note() { printf '%s\037' "$@"; echo; } >>"$CALLS"
# Words of options are split, as by OpenRC.
start() { note supervise-daemon $command $command_args $command_args_foreground; }
stop() { note supervise-daemon --stop; }

. "$confd"
. "$initd"
command=$CLAMSMTPD
[ "$supervisor" = supervise-daemon ] || exit 100
if [ "$RC_CMD" = restart ]; then set -- stop start; else set -- "$RC_CMD"; fi
for action; do
	if type "${action}_pre" >/dev/null 2>&1; then "${action}_pre" || exit; fi
	"$action" || exit
	if type "${action}_post" >/dev/null 2>&1; then "${action}_post" || exit; fi
done
'''


class OpenRC:
    """The service, with a configuration and a conf.d of its own."""

    def __init__(self, home):
        self.conf, self.confd = home / "clamsmtpd.conf", home / "confd"
        self.log = home / "calls"
        self.confd.write_text("cfgfile=%s\n" % self.conf)

    def run(self, action, **env):
        self.log.write_text("")
        env.setdefault("CLAMSMTPD", CLAMSMTPD)
        return sh(OPENRC, INITD, str(self.confd), action, CALLS=str(self.log), **env)

    def calls(self, word=""):
        return [line.split("\x1f")[:-1]
                for line in self.log.read_text().split("\n")
                if line.startswith(word)]

    def start(self):
        """The command that supervise-daemon gets."""
        done = self.run("start")
        assert done.returncode == 0, done.stdout + done.stderr
        (call,) = self.calls("supervise-daemon")
        return call[1:]


@pytest.fixture
def openrc(tmp_path):
    openrc = OpenRC(tmp_path)
    openrc.conf.write_text("OutAddress: 127.0.0.1:10026\nUser: clamsmtp\n")
    return openrc


def test_init_command_filters_mail_and_logs_to_syslog(openrc, site, syslog):
    """The test runs the command that supervise-daemon gets.  Its log has
    severities."""
    log, preexec = syslog
    settings = site.settings(Listen=site.path("in.sock"))
    openrc.conf.write_text("".join("%s: %s\n" % one for one in settings.items()))
    command = openrc.start()
    os.mkdir(site.path("etc"))
    site.daemon = Daemon(site.path("etc"), level=None, wait=False, preexec=preexec,
                         args=command[3:], config=openrc.conf.read_text(), **settings)
    site.daemons.append(site.daemon)
    assert site.daemon.command[3:] == command[3:]
    wait_listener(site.path("in.sock"))
    client = site.session(address=site.path("in.sock"))
    client.mail()
    client.quit()
    until(lambda: log.recv(4096) == b"<22>clamsmtpd: 100000: from=a@example.com, "
          b"to=b@example.com, status=CLEAN", "the line of the mail, of severity info")
    assert site.daemon.text() == ""


@pytest.mark.parametrize("line, owner", [("User: clamav\n", "clamav"), ("", "root")])
def test_init_directories_belong_to_the_user_of_the_file(openrc, line, owner):
    openrc.conf.write_text("OutAddress: 10026\n" + line)
    openrc.start()
    assert {call[5] for call in openrc.calls("checkpath")} == {owner}


@pytest.mark.parametrize("action", ["start", "checkconfig", "reload", "restart"])
def test_init_with_a_bad_configuration_changes_nothing(openrc, action):
    openrc.conf.write_text("OutAddress: 10026\nMaxScans: many\n")
    done = openrc.run(action)
    assert done.returncode != 0
    assert 'MaxScans: "many" is not' in done.stderr
    assert openrc.calls() == [[]]


class Unsupervised:
    """Daemons without a supervisor, as 1.10 was.  Their program file can be
    replaced."""

    def __init__(self, site, background, openrc):
        self.site, self.background = site, background
        self.program = site.path("clamsmtpd")
        shutil.copy(CLAMSMTPD, self.program)
        self.old = self.start("old")
        openrc.confd.write_text("cfgfile=%s\n" % self.old.daemon.file)
        with open("/proc/%d/status" % self.old.pid()) as file:
            if "PPid:\t1\n" not in file.read():
                pytest.skip("another process than 1 inherits daemons here")

    def start(self, name):
        return self.background(binary=self.program, Listen=self.site.path(name),
                               PidFile=self.site.path(name + ".pid"))

    def replace(self):
        os.unlink(self.program)
        shutil.copy(CLAMSMTPD, self.program)


@pytest.fixture
def unsupervised(site, background, openrc):
    return Unsupervised(site, background, openrc)


@pytest.mark.parametrize("action", ["start", "restart", "stop"])
@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "same file"])
def test_unsupervised_daemon_of_this_file_is_stopped_and_named(
        openrc, unsupervised, action, replaced):
    """The old daemon would keep the port.  A daemon with another configuration file
    is left alone."""
    old, other = unsupervised.old, unsupervised.start("other")
    pid = old.pid()
    if replaced:
        unsupervised.replace()
    done = openrc.run(action, CLAMSMTPD=unsupervised.program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Stopping process %d, " % pid in done.stdout
    assert not processes(old.daemon.mark)
    assert processes(other.daemon.mark) == [other.pid()]


def test_supervised_daemon_of_this_file_is_not_stopped_by_the_script(
        openrc, unsupervised):
    """The parent of a supervised daemon is not process 1."""
    unsupervised.old.end()
    daemon = unsupervised.site.start(level=None, binary=unsupervised.program,
                                     args=["-F"], wait=False,
                                     Listen=unsupervised.site.path("in.sock"))
    openrc.confd.write_text("cfgfile=%s\n" % daemon.file)
    wait_listener(unsupervised.site.path("in.sock"))
    assert "Stopping" not in openrc.run("start", CLAMSMTPD=unsupervised.program).stdout
    assert daemon.alive()


def test_bad_configuration_leaves_the_unsupervised_daemon_alone(openrc, unsupervised):
    """The old daemon runs until a new one can replace it."""
    old = unsupervised.old
    with open(old.daemon.file, "a") as file:
        file.write("MaxScans: many\n")
    for action in "start", "restart":
        assert openrc.run(action, CLAMSMTPD=unsupervised.program).returncode != 0
    assert processes(old.daemon.mark) == [old.pid()]


@pytest.mark.parametrize("setting, args", [
    ("loglevel=4", ["-F", "-d", "4"]),
    ("OPTS='-p /run/x.pid'", ["-p", "/run/x.pid", "-F", "-d", "3"]),
    ("command_args='-p /run/x.pid'", ["-p", "/run/x.pid", "-F", "-d", "3"]),
])
def test_init_options_come_from_conf_d(openrc, setting, args):
    with openrc.confd.open("a") as file:
        file.write(setting + "\n")
    assert openrc.start()[3:] == args
