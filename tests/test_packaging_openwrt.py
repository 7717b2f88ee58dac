"""The init script of the OpenWrt package, run by busybox sh with each setting and
each fault of the UCI file.  Functions replace OpenWrt's shell library and procd.
README.md of the package records a run with the real ones."""

import os
import re
import shutil
import signal
import stat
import subprocess

import pytest

from harness import (BAD, CLAMSMTPD, Daemon, TOP, VIRUS, WAIT, complaints, until,
                     wait_listener)

OPENWRT = os.path.join(TOP, "packaging", "openwrt")
INIT = os.path.join(OPENWRT, "files", "clamsmtpd.init")
CONFIG = os.path.join(OPENWRT, "files", "clamsmtpd.config")

pytestmark = pytest.mark.skipif(not shutil.which("busybox"),
                                reason="no busybox here")

# Small versions of rc.common, /lib/functions.sh, procd.sh and validate_data.  The
# calls of procd are written to $CALLS.
LIBRARY = r'''
note() { printf '%s\037' "$@"; echo; } >>"$CALLS"
for word in open_instance close_instance set_param add_jail add_jail_mount \
    add_jail_mount_rw add_reload_trigger add_validation; do
	eval "procd_$word() { note $word \"\$@\"; }"
done
logger() { tee -a "$LOG" >&2; }
chown() { note chown "$@"; }

reset_cb() {
	config_cb() { :; }
	option_cb() { :; }
	list_cb() { :; }
}
config() {
	CONFIG_SECTION=${2:-cfg0123ab}
	config_cb "$1" "$CONFIG_SECTION"
}
option() { eval "CONFIG_${CONFIG_SECTION}_$1=\$2"; option_cb "$1" "$2"; }
list() { list_cb "$1" "$2"; }
config_load() {
	CONFIG_SECTION=
	. "$UCI/$1"
	config_cb
}

uci_load_validate() {
	local package=$1 section=$3 function=$4 spec type value
	shift 4
	for spec do eval "local ${spec%%:*}"; done
	config_load "$package"
	for spec do
		type=${spec#*:} type=${type%%:*}
		eval "value=\$CONFIG_${section}_${spec%%:*}"
		[ "$value" ] || { value=${spec#*:"$type"} value=${value#:}; }
		eval "${spec%%:*}=\$value"
	done
	"$function" "$section" "$INVALID"
}

restart() {
	stop
	start
}
reset_cb
. "$1"
PROG=$CLAMSMTPD CONF=$VAR/clamsmtpd.conf

# Whatever start_service returns, procd is sent what there is.
start() {
	note open_service
	start_service
	service_triggers
	note close_service
}
stop() { note kill; }
reload() { reload_service; }
"$2"
'''


class Router:
    """The /etc/config, /var and service of a router."""

    def __init__(self, home):
        self.uci, self.var = home / "config", home / "var"
        self.uci.mkdir()
        self.spool = home / "spool.new"
        self.conf = self.var / "clamsmtpd.conf"
        self.calls_file, self.log = home / "calls", home / "log"

    def shipped(self):
        """The configuration as shipped, with a spool directory of the test."""
        with open(CONFIG) as file:
            return file.read().replace("'/tmp/clamsmtpd'", "'%s'" % self.spool)

    def configure(self, *lines, **options):
        """Write the shipped configuration, enabled, with some more lines and
        options."""
        text = self.shipped()
        options.setdefault("enabled", 1)
        for name, value in options.items():
            text = re.sub(r"\n\t(option|list) %s '.*'" % name, "", text)
            for one in value if isinstance(value, list) else [value]:
                text += "\t%s %s '%s'\n" % (
                    "list" if isinstance(value, list) else "option", name, one)
        (self.uci / "clamsmtpd").write_text("\n".join((text,) + lines) + "\n")

    def run(self, action, invalid="0"):
        self.calls_file.write_text("")
        env = dict(os.environ, UCI=str(self.uci), VAR=str(self.var),
                   CALLS=str(self.calls_file), LOG=str(self.log),
                   CLAMSMTPD=CLAMSMTPD, INVALID=invalid)
        return subprocess.run(["busybox", "sh", "-c", LIBRARY, "sh", INIT, action],
                              env=env, stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=WAIT)

    def start(self):
        done = self.run("start")
        assert done.returncode == 0 and not done.stderr, done.stderr

    def calls(self, word):
        """The arguments of each call of this function."""
        lines = self.calls_file.read_text().split("\n")[:-1]
        return [line.split("\x1f")[1:-1] for line in lines
                if line.startswith(word + "\x1f")]

    def params(self):
        """The parameters of the instance that procd received."""
        assert len(self.calls("open_instance")) == 1
        return {call[0]: call[1:] for call in self.calls("set_param")}


@pytest.fixture
def router(tmp_path):
    router = Router(tmp_path)
    router.configure()
    return router


@pytest.fixture
def effective(router, run):
    """The settings that the daemon reads from the generated file."""
    def effective():
        done = run("-n", "-f", str(router.conf))
        assert done.returncode == 0 and not complaints(done)
        return done.stdout.split("\n")
    return effective


def test_script_is_plain_shell():
    subprocess.run(["busybox", "sh", "-n", INIT], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    # dash: it has local.  Variables are for rc.common (2034) or from
    # uci_load_validate (2154); functions are called by the library (2317,
    # and 2329 of a newer shellcheck).
    subprocess.run(["shellcheck", "-s", "dash", "-e", "SC2034,SC2154,SC2317,SC2329",
                    INIT], check=True)


# ---------------------------------------------------------------- UCI

def test_configuration_as_shipped_starts_nothing(router):
    (router.uci / "clamsmtpd").write_text(router.shipped())
    router.start()
    assert router.calls("open_service") and not router.calls("open_instance")
    assert not router.conf.exists()


def test_configuration_as_shipped_suits_a_router(router, effective):
    router.start()
    for line in ("Listen: 192.168.1.1:10025", "OutAddress: 192.168.1.2:25",
                 "ClamAddress: 192.168.1.2:3310", "Action: bounce",
                 "User: clamsmtp", "TempDirectory: %s" % router.spool,
                 "MaxConnections: 8", "MaxScans: 4", "MaxScanSize: 10485760"):
        assert line in effective()


def test_option_of_each_setting_is_written(router, effective):
    router.start()
    unset = {"VirusAction": "true", "PidFile": "/run/x.pid",
             "ProxyFrom": "10.0.0.0/8", "StatusListen": "127.0.0.1:10080"}
    other = {"off": "on", "drop": "pass", "tempfail": "pass", "classic": "json"}
    options = {}
    for line in effective()[:-1]:
        name, value = re.match(r"(?:# )?(\w+):(?: (.*))?", line).groups()
        if value is None:
            value = unset[name]
        elif value.isdigit():
            value = int(value) + 1
        options[name] = other.get(value, value)
    router.configure(**options)
    router.start()
    assert effective()[:-1] == ["%s: %s" % option for option in options.items()]


def test_list_keeps_its_order_and_its_blanks(router, effective):
    router.configure(ClamAddress=["10.0.0.1:3310", "[fd00::2]:3310", "10.0.0.3"],
                     Action=["pass PUA.* Heuristics.Phishing.*", "drop"])
    router.start()
    got = effective()
    assert [l for l in got if l.startswith("ClamAddress")] == [
        "ClamAddress: 10.0.0.1:3310", "ClamAddress: [fd00::2]:3310",
        "ClamAddress: 10.0.0.3"]
    assert [l for l in got if l.startswith("Action")] == [
        "Action: pass PUA.*", "Action: pass Heuristics.Phishing.*", "Action: drop"]


@pytest.mark.parametrize("value", [
    r"X-Scan: %i\r\nX-Two: it'\''s \"so\" # $HOME `id` \\x", ""])
def test_option_header_keeps_its_quotes_and_escapes(router, effective, value):
    router.configure(Header=value)
    router.start()
    shown, = [l for l in effective() if l.startswith("Header:")]
    assert shown == "Header: " + value.replace(r"'\''", "'")


@pytest.mark.parametrize("line, message", [
    ("config clamsmtpd 'other'", "section clamsmtpd other: not read"),
    ("config clamsmtpd", "section clamsmtpd without a name: not read"),
    ("config clamd 'main2'", "section clamd main2: not read")])
def test_section_of_another_name_is_reported_and_not_read(
        router, effective, line, message):
    """A setting without effect is logged."""
    router.configure(line, "\toption MaxScans '9'")
    done = router.run("start")
    assert done.returncode == 0 and message in done.stderr
    assert message in router.log.read_text()
    assert "MaxScans: 4" in effective()


def test_section_without_a_name_is_reported(router):
    """No daemon runs then, and the log says why."""
    (router.uci / "clamsmtpd").write_text(
        router.shipped().replace("config clamsmtpd 'main'", "config clamsmtpd"))
    done = router.run("start")
    assert "section clamsmtpd without a name: not read" in done.stderr
    assert not router.calls("open_instance")


@pytest.mark.parametrize("name", ["User", "OutAddress", "Action", "TempDirectory"])
@pytest.mark.parametrize("kind", [str, lambda value: [value]], ids=["option", "list"])
def test_option_with_a_line_break_is_refused(router, name, kind):
    """PROMISE 8: a user who may set one value cannot set another one with it."""
    router.configure(**{name: kind("x\nVirusAction: touch /tmp/x")})
    done = router.run("start")
    assert done.returncode != 0 and not router.calls("open_instance")
    assert "%s: its value has a line break in it" % name in done.stderr
    assert "VirusAction" not in (router.var / "clamsmtpd.conf.new").read_text()


@pytest.mark.parametrize("name, value, message", [
    ("MaxScans", "many", 'MaxScans: "many" is not a number from 1 to 1000'),
    ("MaxConections", "8", '"MaxConections" is not the name of a setting'),
    ("ClamAddress", "10.0.0.1:0", 'ClamAddress: "10.0.0.1:0" is not an address'),
    ("OutAddress", "", "OutAddress"),
])
def test_option_with_a_bad_value_changes_nothing(router, name, value, message):
    router.configure(**{name: value})
    for action in "start", "restart", "reload":
        done = router.run(action)
        assert done.returncode != 0
        assert not router.calls("kill") and not router.calls("close_service")
        assert message in done.stderr and message in router.log.read_text()
    assert not router.conf.exists()


@pytest.mark.parametrize("action", ["start", "restart", "reload"])
def test_options_that_validate_data_refuses_change_nothing(router, action):
    done = router.run(action, invalid="255")
    assert done.returncode != 0
    assert not router.calls("kill") and not router.calls("close_service")
    assert "loglevel 0 to 4" in router.log.read_text()


# ---------------------------------------------------------------- procd

def test_spool_missing_is_created_for_the_user(router):
    router.start()
    assert stat.S_IMODE(router.spool.stat().st_mode) == 0o700
    assert router.calls("chown") == [["clamsmtp", str(router.spool)]]


def test_spool_existing_is_not_changed(router):
    router.spool.mkdir()
    router.spool.chmod(0o1777)
    router.start()
    assert stat.S_IMODE(router.spool.stat().st_mode) == 0o1777
    assert not router.calls("chown")


class Running:
    """The daemon, started with the command that procd gets.  clamd is remote."""

    def __init__(self, router, site, syslog, **options):
        self.router, self.site = router, site
        self.syslog, preexec = syslog
        self.listen = site.path("in.sock")
        self.settings = dict(
            Listen=self.listen, OutAddress=site.hop.address,
            ClamAddress=site.new_clamd(tcp=True).address,
            TempDirectory=site.spool, **options)
        self.configure()
        router.start()
        command = router.params()["command"]
        site.daemon = Daemon(router.var, level=None, args=command[3:], wait=False,
                             preexec=preexec, config=router.conf.read_bytes(),
                             **self.settings)
        site.daemons.append(site.daemon)
        assert site.daemon.command == command
        wait_listener(self.listen)

    def session(self):
        return self.site.session(address=self.listen)

    def wait_log(self, line):
        """Wait for a line of syslog with this severity."""
        until(lambda: self.syslog.recv(4096).decode() == line, line)

    def configure(self, **options):
        self.router.configure(User=str(os.geteuid()), **self.settings, **options)


@pytest.fixture
def running(router, site, syslog):
    return Running(router, site, syslog)


def test_command_for_procd_filters_mail(running):
    """The log goes to syslog, with severities."""
    client = running.session()
    client.mail()
    client.mail(body=BAD, want="550")
    client.quit()
    running.wait_log("<22>clamsmtpd: 100000: from=a@example.com, to=b@example.com, "
                     "status=VIRUS:" + VIRUS)
    assert running.site.daemon.text() == ""
    clamd = running.site.servers[-1]
    assert [scan.command for scan in clamd.scans] == ["INSTREAM", "INSTREAM"]


def test_reload_gives_the_daemon_the_new_settings(running):
    inode = running.router.conf.stat().st_ino
    running.configure(Action="drop")
    assert running.router.run("reload").returncode == 0
    assert running.router.params()["reload_signal"] == ["HUP"]
    # a jail has this very file
    assert running.router.conf.stat().st_ino == inode
    running.site.daemon.send_signal(signal.SIGHUP)
    running.wait_log("<21>clamsmtpd: %s: reloaded" % running.site.daemon.file)
    client = running.session()
    client.mail(body=BAD, want="250")
    client.quit()


def test_reload_of_a_bad_value_changes_nothing(router):
    router.start()
    before = router.conf.read_text()
    router.configure(MaxScans="many")
    assert router.run("reload").returncode != 0
    assert not router.calls("close_service")    # no call of procd
    assert router.conf.read_text() == before
    assert 'MaxScans: "many"' in router.log.read_text()


def test_reload_of_a_disabled_service_ends_it(router):
    router.start()
    router.configure(enabled=0, MaxScans="many")
    assert router.run("reload").returncode == 0
    assert router.calls("open_service") and not router.calls("open_instance")


def test_version_of_the_makefile_is_that_of_the_program():
    with open(os.path.join(TOP, "clamsmtpd.h")) as file:
        version = re.search(r'define VERSION\s+"(.*)"', file.read()).group(1)
    with open(os.path.join(OPENWRT, "Makefile")) as file:
        assert "PKG_VERSION:=%s\n" % version in file.read()
