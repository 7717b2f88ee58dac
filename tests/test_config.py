"""The configuration file, the command line, addresses."""

import fcntl
import functools
import os
import re
import subprocess

import pytest

from harness import (CLAMSMTPD, bind, effective, has_ipv6, localhost, mounting, own_host,
                     until)

MINIMAL = "OutAddress: 10026\n"


@pytest.fixture
def check(tmp_path, run):
    """check(text, *flags): clamsmtpd -n on a file of this text; env=: variables."""
    def check(text, *flags, env=()):
        check.file = str(tmp_path / "test.conf")
        with open(check.file, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return run("-n", "-f", check.file, *flags, env=dict(os.environ, **dict(env)))
    return check


DEFAULTS = [
    ("Action", "drop"),
    ("DebugFiles", "off"),
    ("Header", "X-Virus-Scanned: ClamAV using ClamSMTP"),
    ("KeepAlives", "0"),
    ("LogFormat", "classic"),
    ("MaxConnections", "64"),
    ("MaxScans", "10"),
    ("MaxScanSize", "0"),
    ("Quarantine", "off"),
    ("ScanFailure", "tempfail"),
    ("ScanTimeOut", "180"),
    ("TempDirectory", "/tmp"),
    ("TimeOut", "180"),
    ("TransparentProxy", "off"),
    ("XClient", "off"),
]


@pytest.mark.covers("clamsmtpd.conf.5 DebugFiles: default",
    "clamsmtpd.conf.5 Quarantine: default",
    "clamsmtpd.conf.5 TransparentProxy: default",
    "clamsmtpd.conf.5 XClient: default",
    "clamsmtpd.conf.5 MaxScanSize: default",
    "clamsmtpd.conf.5 TempDirectory: default",
    "clamsmtpd.conf.5 KeepAlives: none by default",
    "clamsmtpd.conf.5 MaxConnections: range", "clamsmtpd.conf.5 MaxScans: range",
    "clamsmtpd.conf.5 TimeOut: range")
@pytest.mark.parametrize("name, value", DEFAULTS)
def test_setting_unset_has_its_default(check, name, value):
    assert effective(check(MINIMAL))[name.lower()] == [value]


@pytest.mark.covers("clamsmtpd.conf.5 Listen: default")
def test_listen_unset_is_port_10025(check):
    assert effective(check(MINIMAL))["listen"] == ["10025"]


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: -n", "clamsmtpd.conf.5 PidFile",
    "clamsmtpd.conf.5 VirusAction")
@pytest.mark.parametrize("name", ["PidFile", "User", "VirusAction", "ProxyFrom",
                                  "StatusListen"])
def test_setting_without_a_default_is_a_comment(check, name):
    result = check(MINIMAL)
    assert name.lower() not in effective(result)
    assert "\n# %s:\n" % name in result.stdout


@pytest.mark.covers("clamsmtpd.conf.5 ScanTimeOut: range and default")
def test_scantimeout_unset_is_timeout(check):
    assert effective(check(MINIMAL + "TimeOut: 77\n"))["scantimeout"] == ["77"]


VALUES = [
    ("Action", "bounce", "bounce"),
    ("Action", "reject", "bounce|reject"),
    ("Action", "drop", "drop"),
    ("Action", "pass", "pass"),
    ("Action", "BOUNCE", "bounce"),
    ("Action", "pass PUA.* Heuristics.*", r"pass PUA\.\*"),
    ("Action", "pass PUA.* Heuristics.*", r"pass Heuristics\.\*"),
    ("Header", "X-Filter: yes", "X-Filter: yes"),
    ("Header", "", ""),
    ("KeepAlives", "0", "0"),
    ("KeepAlives", "86400", "86400"),
    ("MaxConnections", "2", "2"),
    ("MaxConnections", "65535", "65535"),
    ("MaxScans", "1", "1"),
    ("MaxScans", "1000", "1000"),
    ("MaxScanSize", "1000", "1000"),
    ("MaxScanSize", "64K", "65536"),
    ("MaxScanSize", "64k", "65536"),
    ("MaxScanSize", "25M", "26214400"),
    ("MaxScanSize", "25m", "26214400"),
    ("MaxScanSize", "2G", "2147483648"),
    ("MaxScanSize", "2g", "2147483648"),
    ("MaxScanSize", "9223372036854775807", "9223372036854775807"),
    ("PidFile", "/run/x.pid", "/run/x.pid"),
    ("Quarantine", "on", "on"),
    ("Quarantine", "yes", "on"),
    ("Quarantine", "true", "on"),
    ("Quarantine", "1", "on"),
    ("Quarantine", "ON", "on"),
    ("Quarantine", "off", "off"),
    ("Quarantine", "no", "off"),
    ("Quarantine", "false", "off"),
    ("Quarantine", "0", "off"),
    ("ScanFailure", "pass", "pass"),
    ("ScanFailure", "tempfail", "tempfail"),
    ("ScanTimeOut", "1", "1"),
    ("ScanTimeOut", "86400", "86400"),
    ("TempDirectory", "/var/tmp", "/var/tmp"),
    ("TimeOut", "1", "1"),
    ("TimeOut", "86400", "86400"),
    ("TransparentProxy", "on", "on"),
    ("User", "nobody", "nobody"),
    ("User", "0", "0|root"),
    ("VirusAction", "/bin/true --x \"y z\" # all of it",
     r'/bin/true --x "y z" # all of it'),
    ("XClient", "on", "on"),
]


@pytest.mark.covers("clamsmtpd.conf.5 KeepAlives: range",
    "clamsmtpd.conf.5 MaxConnections: range",
    "clamsmtpd.conf.5 MaxScans: range",
    "clamsmtpd.conf.5 TimeOut: range",
    "clamsmtpd.conf.5 ScanTimeOut: range and default",
    "clamsmtpd.conf.5 DESCRIPTION: comment",
    "clamsmtpd.conf.5 MaxConnections", "clamsmtpd.conf.5 MaxScanSize",
    "clamsmtpd.conf.5 SETTINGS: on and off")
@pytest.mark.parametrize("name, value, want", VALUES)
def test_setting_value_is_taken(check, name, value, want):
    got = effective(check(MINIMAL + "%s: %s\n" % (name, value)))
    shown = got.get(name.lower(), [""])
    assert any(re.fullmatch(want, one) for one in shown), shown


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: blanks",
    "clamsmtpd.conf.5 DESCRIPTION: case of names")
@pytest.mark.parametrize("line", [
    "maxconnections: 17", "MAXCONNECTIONS: 17", "MaxConnections:17",
    "  MaxConnections  :  17  ", "\tMaxConnections\t:\t17\t",
])
def test_names_in_any_case_and_blanks_ignored(check, line):
    got = effective(check(MINIMAL + line + "\n"))
    assert got["maxconnections"] == ["17"]


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: comment")
def test_comments_and_empty_lines_are_skipped(check):
    got = effective(check("# one\n\n   \n  # two: three\n" + MINIMAL +
                          "#MaxConnections: 5\n"))
    assert got["maxconnections"] == ["64"]


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: comment")
def test_value_is_the_rest_of_its_line(check):
    """No quote, number sign or backslash in it has a meaning."""
    value = "'a' \"b\"#c # d \\\\ e \\"
    got = effective(check(MINIMAL + "VirusAction: %s\nTimeOut: 9\n" % value))
    assert (got["virusaction"], got["timeout"]) == ([value], ["9"])


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: line ends")
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=repr)
def test_line_of_a_file_ends_in_lf_or_crlf(check, end):
    got = effective(check("# one\n%s\nTimeOut: 9\n".replace("\n", end)
                          % MINIMAL.strip()))
    assert (got["outaddress"], got["timeout"]) == (["10026"], ["9"])


def test_last_line_needs_no_newline(check):
    assert effective(check(MINIMAL + "TimeOut: 9"))["timeout"] == ["9"]


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -n", "clamsmtpd.conf.5 DESCRIPTION: -n",
    "clamsmtpd.8 EXIT STATUS: 0")
def test_output_of_n_is_a_configuration_file(check):
    """The output of -n can be read back and gives the same settings."""
    first = check(MINIMAL + "TimeOut: 9\nListen: 127.0.0.1:1\nAction: pass P*\n"
                  "ClamAddress: /x/y\nMaxScanSize: 3K\nXClient: on\n")
    assert first.returncode == 0
    second = check(first.stdout)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout


BAD = [
    ("Action", "explode"), ("Action", ""),
    ("ClamAddress", "127.0.0.1:99999"), ("ClamAddress", "relative/path"),
    ("KeepAlives", "-1"), ("KeepAlives", "86401"), ("KeepAlives", "ten"),
    ("Listen", "127.0.0.1:65536"), ("Listen", "[::1"), ("Listen", "::1:x"),
    ("Listen", "127.0.0.1:"), ("Listen", "127.0.0.1:25x"), ("Listen", ""),
    ("Listen", "two words:25"), ("Listen", "/" + "p" * 107),
    ("MaxConnections", "1"), ("MaxConnections", "65536"),
    ("MaxConnections", "12x"), ("MaxConnections", "0x10"),
    ("MaxConnections", "1 2"), ("MaxConnections", "99999999999999999999"),
    ("MaxConnections", "+"), ("MaxConnections", ""),
    ("MaxScans", "0"), ("MaxScans", "1001"),
    ("MaxScanSize", "-1"), ("MaxScanSize", "5X"), ("MaxScanSize", "5MB"),
    ("MaxScanSize", "K"), ("MaxScanSize", "9223372036854775808"),
    ("MaxScanSize", "9007199254740992K"),
    ("OutAddress", "host:port"), ("OutAddress", "[1.2.3.4"),
    ("OutAddress", ""), ("OutAddress", "0"), ("OutAddress", "10.0.0.1:0"),
    ("Quarantine", "perhaps"), ("Quarantine", "2"), ("Quarantine", ""),
    ("ScanFailure", "drop"), ("ScanFailure", ""),
    ("ScanTimeOut", "0"), ("ScanTimeOut", "86401"),
    ("Header", "no name"), ("Header", r"A: b\r\n \r\nC: d"), ("Header", r"A: b\nc"),
    ("StatusListen", "0"), ("StatusListen", "127.0.0.1:0"),
    ("OutAddress", "[mail.example]"), ("OutAddress", "[1.2.3.4]"),
    ("TimeOut", "0"), ("TimeOut", "86401"), ("TimeOut", "5s"),
    ("TransparentProxy", "maybe"),
    ("Listen", "10.0.0.256:25"), ("Listen", "999.1"), ("Listen", "a_b,c:25"),
    ("XClient", "onn"),
]


@pytest.mark.covers("clamsmtpd.conf.5 KeepAlives: range",
    "clamsmtpd.conf.5 MaxConnections: range",
    "clamsmtpd.conf.5 MaxScans: range",
    "clamsmtpd.conf.5 TimeOut: range",
    "clamsmtpd.conf.5 ScanTimeOut: range and default",
    "clamsmtpd.conf.5 Header: newline",
    "clamsmtpd.conf.5 ADDRESSES: /path",
    "clamsmtpd.conf.5 ADDRESSES: port",
    "clamsmtpd.8 EXIT STATUS: 2",
    "clamsmtpd.8 DIAGNOSTICS: FILE:LINE: NAME: ...",
    "clamsmtpd.conf.5 DESCRIPTION: errors")
@pytest.mark.parametrize("name, value", BAD)
def test_bad_value_error_names_file_line_setting_and_value(check, name, value):
    result = check("# one\n" + MINIMAL * (name != "OutAddress") +
                   "%s: %s\n" % (name, value))
    assert result.returncode == 2, (result.stdout, result.stderr)
    want = "%s:%d: %s: " % (check.file, 2 if name == "OutAddress" else 3, name)
    want += '"%s" is not ' % value if value else "the value is missing\n"
    assert want in result.stderr
    right = {"MaxConnections": "a number from 2 to 65535", "XClient": "on or off",
             "Action": "bounce, drop or pass", "Header": "lines of the form Name: text"}
    assert not value or right.get(name, "") in result.stderr.partition(want)[2]


@pytest.mark.parametrize("escape", ["%d", "%i", "%l"])
def test_header_that_no_buffer_holds_is_an_error(check, escape):
    """The limit is for the header with its escapes filled in, at their greatest
    length."""
    result = check(MINIMAL + "Header: X-Long: %s\n" % (escape * 2000))
    assert result.returncode == 2
    assert "%s:2: Header: " % check.file in result.stderr


def test_file_of_the_original_with_all_settings_gives_no_warning(check):
    """PROMISE 9: a file of ClamSMTP 1.10 gives no error and no warning."""
    settings = [
        ("OutAddress", "127.0.0.1:10026"), ("MaxConnections", "32"),
        ("TimeOut", "120"), ("KeepAlives", "30"), ("XClient", "on"),
        ("Listen", "0.0.0.0:10025"), ("ClamAddress", "/var/run/clamav/clamd"),
        ("Header", "X-Virus-Scanned: ClamAV using ClamSMTP at %l"),
        ("TempDirectory", "/tmp"), ("Action", "bounce"), ("Quarantine", "on"),
        ("TransparentProxy", "off"), ("User", "root"), ("DebugFiles", "off"),
        ("VirusAction", "/usr/local/bin/script"), ("PidFile", "/run/x.pid")]
    result = check("# as it was\n\n" + "".join("%s: %s\n" % s for s in settings))
    assert result.stderr == ""
    found = effective(result)
    assert {n: found[n.lower()] for n, _ in settings} == {n: [v] for n, v in settings}


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
def test_unknown_setting_is_an_error(check):
    result = check(MINIMAL + "NoSuchThing: 5\n")
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr
    assert "NoSuchThing" in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
@pytest.mark.parametrize("later", ["StatusListens: 1", "nonsense", ":", ": x"])
def test_line_that_is_no_setting_is_an_error(check, later):
    result = check(MINIMAL + later + "\n")
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: FILE:LINE: NAME: ...",
    "clamsmtpd.conf.5 DESCRIPTION: all errors at once")
def test_errors_of_a_file_are_reported_at_once(check):
    result = check("TimeOut: x\n" + MINIMAL + "Foo: 1\nXClient: 7\nMaxScans: 0\n")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "clamsmtpd: %s:%s" % (check.file, error) for error in (
            '1: TimeOut: "x" is not a number from 1 to 86400',
            '3: "Foo" is not the name of a setting; clamsmtpd.conf(5) has them all',
            '4: XClient: "7" is not on or off',
            '5: MaxScans: "0" is not a number from 1 to 1000')]


def test_errors_of_many_lines_are_logged_in_their_order(check):
    """All errors are logged in the order of the lines, even if they are more than
    the log keeps until its format is known."""
    result = check("".join("MaxScans: x%d\n" % n for n in range(400)))
    assert re.findall('"x(\\d+)" is not', result.stderr) == [str(n) for n in range(400)]


def test_errors_for_a_slow_reader_arrive_whole(tmp_path):
    """At the start the program waits for the reader of standard error instead of
    losing lines."""
    file = tmp_path / "test.conf"
    file.write_text("".join("MaxScans: x%d\n" % n for n in range(400)))
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([CLAMSMTPD, "-n", "-f", file], stderr=write)
    os.close(write)

    def waits():
        with open("/proc/%d/stat" % process.pid) as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] in "SZ"
    with open(read) as errors:
        until(waits, "it waits for the reader, or has ended")
        found = re.findall('"x(\\d+)" is not', errors.read())
    assert process.wait() == 2
    assert found == [str(n) for n in range(400)]


def test_errors_quote_control_characters_harmlessly(check):
    result = check(MINIMAL + "Action: a\x1b[2Jb\n")
    assert result.returncode == 2
    assert "\x1b" not in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
@pytest.mark.parametrize("value", ["A: b\rc", "A: \x1b[2J", "A:\x0bb", "A: b\x7f",
                                   "A: b\x85c"], ids=repr)
def test_control_characters_in_the_file_are_errors(check, value):
    """Control characters would be sent on with every mail."""
    result = check(MINIMAL + "Header: %s\n" % value)
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr


def test_nul_in_the_file_is_an_error(check):
    result = check(MINIMAL.encode() + b"Header: X-A: \0b\n")
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
def test_line_of_4096_bytes_is_taken_and_a_longer_one_is_an_error(check):
    value = "x" * (4096 - len("VirusAction: "))
    line = "VirusAction: %s\n"
    assert effective(check(MINIMAL + line % value))["virusaction"] == [value]
    result = check(MINIMAL + line % (value + "x"))
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
def test_line_too_long_is_an_error(check):
    result = check(MINIMAL + "Header: X: " + "y" * 100000 + "\nTimeOut: q\n")
    assert result.returncode == 2
    assert "%s:2: " % check.file in result.stderr
    assert "%s:3: " % check.file in result.stderr
    assert len(result.stderr) < 5000


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: setting twice")
def test_repeated_name_is_a_warning_and_the_last_counts(check):
    result = check(MINIMAL + "TimeOut: 5\ntimeout: 6\n")
    assert effective(result)["timeout"] == ["6"]
    assert "%s:3: " % check.file in result.stderr
    assert "TimeOut" in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: setting twice",
    "clamsmtpd.conf.5 Action: first match")
@pytest.mark.parametrize("first, second, name", [
    ("Action: drop", "Action: bounce", "Action"),
    ("Action: drop", "Bounce: on", "Action"),
    ("Bounce: on", "Action: drop", "Action"),
    ("Bounce: on", "Bounce: off", "Action"),
    ("Header: X-A: 1", "ScanHeader: X-B: 1", "Header"),
    ("ScanHeader: X-A: 1", "Header: X-B: 1", "Header"),
])
def test_setting_repeated_by_either_name_is_a_warning(check, first, second, name):
    """An old name and the new one, or two Action lines for all viruses, are the
    same setting set twice; the second line counts."""
    alone = effective(check(MINIMAL + second + "\n"))
    result = check(MINIMAL + first + "\n" + second + "\n")
    assert effective(result) == alone
    assert ("%s:3: %s is set twice; the last one counts\n" % (check.file, name)
            in result.stderr)


@pytest.mark.parametrize("lines", [
    "Bounce: on\nAction: pass PUA.*", "Action: pass PUA.*\nBounce: on",
    "Action: bounce\nAction: pass PUA.*",
])
def test_bounce_beside_an_action_with_patterns_counts(check, lines):
    """An Action line with patterns replaces neither Bounce nor Action: bounce, in
    either order."""
    result = check(MINIMAL + lines + "\n")
    assert effective(result)["action"] == ["pass PUA.*", "bounce"]
    assert "twice" not in result.stderr


def test_action_of_the_file_replaces_all_of_a_flag(check):
    """Bounce and Action of the file replace the -b flag without a warning."""
    result = check(MINIMAL + "Bounce: off\nAction: pass PUA.*\n", "-b")
    assert effective(result)["action"] == ["pass PUA.*", "drop"]
    assert "twice" not in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: 32 times",
    "clamsmtpd.conf.5 Listen: 32 times", "clamsmtpd.conf.5 ProxyFrom: 32 networks")
@pytest.mark.parametrize("name, value", [
    ("Listen", "127.0.0.1:%d"), ("ClamAddress", "/%d"), ("ProxyFrom", "10.0.%d.0/24")])
def test_setting_repeated_is_taken_32_times(check, name, value):
    lines = ["%s: %s\n" % (name, value % n) for n in range(1, 34)]
    assert len(effective(check(MINIMAL + "".join(lines[:32])))[name.lower()]) == 32
    result = check(MINIMAL + "".join(lines))
    assert result.returncode == 2
    assert "%s:34: %s: " % (check.file, name) in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 ProxyFrom: 32 networks")
def test_proxyfrom_lines_with_several_networks_are_taken_for_32_in_all(check):
    lines = ["ProxyFrom: 10.0.%d.0/24 10.1.%d.0/24\n" % (n, n) for n in range(16)]
    assert check(MINIMAL + "".join(lines)).returncode == 0
    result = check(MINIMAL + "".join(lines) + "ProxyFrom: unix\n")
    assert result.returncode == 2
    assert "%s:18: ProxyFrom: " % check.file in result.stderr


@pytest.mark.parametrize("name, values", [
    ("Listen", ["127.0.0.1:1", "127.0.0.1:2"]),
    ("ClamAddress", ["/a/b", "127.0.0.1:3310"]),
    ("Action", ["pass PUA.*", "bounce Eicar*", "drop"]),
])
def test_setting_that_can_be_repeated_has_all_values(check, name, values):
    result = check(MINIMAL + "".join("%s: %s\n" % (name, v) for v in values))
    assert result.stderr == ""
    got = effective(result)[name.lower()]
    assert len(got) == len(values)


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: byte order mark")
def test_byte_order_mark_at_the_start_is_skipped(check):
    """Windows editors write one.  Elsewhere in the file it is no setting."""
    mark = b"\xef\xbb\xbf"
    got = effective(check(mark + MINIMAL.encode() + b"TimeOut: 9\r\n"))
    assert (got["outaddress"], got["timeout"]) == (["10026"], ["9"])
    result = check(MINIMAL.encode() + mark + b"TimeOut: 9\n")
    assert result.returncode == 2 and "%s:2: " % check.file in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 OutAddress: required")
def test_outaddress_is_required(check):
    result = check("TimeOut: 5\n")
    assert result.returncode == 2
    assert "OutAddress" in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 OutAddress: required")
def test_outaddress_is_not_required_when_transparent(check):
    assert check("TransparentProxy: on\n").returncode == 0


def test_outaddress_is_required_with_a_bad_transparentproxy(check):
    """A bad value of TransparentProxy does not hide that OutAddress is missing."""
    result = check("TransparentProxy: maybe\n")
    assert '"maybe" is not on or off' in result.stderr
    assert "OutAddress is missing" in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: missing file")
def test_missing_file_is_a_warning_and_outaddress_is_missing(run, tmp_path):
    missing = str(tmp_path / "nothing.conf")
    result = run("-n", "-f", missing)
    assert result.returncode == 2
    assert missing in result.stderr and "OutAddress" in result.stderr


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: missing file")
def test_missing_file_is_only_a_warning(run, check, tmp_path):
    missing = str(tmp_path / "nothing.conf")
    result = run("-n", "-f", missing, "127.0.0.1:25")
    assert effective(result) == effective(check("OutAddress: 127.0.0.1:25\n"))
    assert missing in result.stderr


# ---------------------------------------------------------------- the environment

@pytest.mark.parametrize("end", ["x", "\xe9", "\u20ac", "\U0001f40c"])
def test_environment_value_that_is_too_long_is_an_error(check, end):
    """Wherever it is cut: a part of it is never used."""
    for size in range(4078, 4090):
        value = "a" * size + end + "b" * 20
        result = check(MINIMAL, env={"CLAMSMTPD_VIRUSACTION": value})
        assert result.returncode == 2
        assert "VIRUSACTION" in result.stderr or "4096" in result.stderr


@pytest.mark.covers("clamsmtpd.8 ENVIRONMENT: CLAMSMTPD_NAME",
    "clamsmtpd.conf.5 DESCRIPTION: environment")
@pytest.mark.parametrize("name", ["CLAMSMTPD_TIMEOUT", "CLAMSMTPD_TimeOut",
                                  "CLAMSMTPD_timeout"])
def test_environment_overrides_the_file(check, name):
    """A variable in upper or lower case replaces the line of the file."""
    result = check(MINIMAL + "TimeOut: 8\n", env={name: "9"})
    assert (effective(result)["timeout"], result.stderr) == (["9"], "")


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: environment",
    "clamsmtpd.conf.5 DESCRIPTION: several values in the environment")
def test_environment_can_have_each_setting(check):
    """The output of -n has each setting once, unset ones as comments."""
    names = set(re.findall(r"(?m)^(?:# )?(\w+):", check(MINIMAL).stdout))
    values = {name: value for name, value, _ in VALUES}
    values.update(OutAddress="10027", LogFormat="json", DebugFiles="on", StatusListen="/s",
                  Header="X-A: b", Quarantine="on", ScanFailure="pass", MaxScanSize="7",
                  Listen="10.0.0.1:1\n10.0.0.2:2", ClamAddress="/a\n/b",
                  ProxyFrom="10.0.0.0/8\nunix", Action="pass A*\nbounce")
    assert set(values) == names
    got = effective(check("", env={"CLAMSMTPD_" + name.upper(): value
                                   for name, value in values.items()}))
    assert got == {name.lower(): value.split("\n") for name, value in values.items()}


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: several values in the environment")
def test_environment_list_replaces_that_of_the_file(check):
    """A variable has the values of a repeated setting one per line."""
    got = effective(check(MINIMAL + "Listen: 127.0.0.1:7\nListen: 127.0.0.1:8\n",
                          env={"CLAMSMTPD_LISTEN": "127.0.0.1:9\n\n/run/in.sock\n"}))
    assert got["listen"] == ["127.0.0.1:9", "/run/in.sock"]


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: empty variable")
@pytest.mark.parametrize("name, value", [("TimeOut", "8"), ("Header", "")])
def test_environment_empty_variable_is_unset_except_for_header(check, name, value):
    """An empty variable leaves a setting alone; an empty Header adds no header."""
    got = effective(check(MINIMAL + "TimeOut: 8\nHeader: A: b\n",
                          env={"CLAMSMTPD_" + name.upper(): ""}))
    assert got[name.lower()] == [value]


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: unknown variable")
def test_environment_unknown_variable_is_a_warning(check):
    """Kubernetes sets CLAMSMTPD_PORT for a service with the name clamsmtpd."""
    result = check(MINIMAL, env={"CLAMSMTPD_PORT": "tcp://10.0.0.1:25"})
    assert effective(result)["outaddress"] == ["10026"]
    assert re.search('environment: .*"PORT" is not the name', result.stderr)


@pytest.mark.covers("clamsmtpd.conf.5 DESCRIPTION: errors")
def test_environment_bad_value_is_an_error(check):
    result = check(MINIMAL, env={"CLAMSMTPD_TIMEOUT": "x"})
    assert result.returncode == 2
    assert re.search('environment: TimeOut: "x"', result.stderr)


def test_directory_as_configuration_is_an_error(run, tmp_path):
    """There is no other error, since the content of the file is unknown."""
    result = run("-n", "-f", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == "clamsmtpd: %s: Is a directory\n" % tmp_path


def test_too_large_file_is_the_only_error(check):
    """A file above 1 MiB is not read, and there is no other error."""
    result = check("#" * (1 << 20))
    assert result.returncode == 2
    assert result.stderr == "clamsmtpd: %s: larger than 1 MiB\n" % check.file


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -n warnings", "clamsmtpd.conf.5 Bounce",
    "clamsmtpd.conf.5 ScanHeader")
@pytest.mark.parametrize("old, name, value", [
    ("ScanHeader: X-Old: 1", "Header", "X-Old: 1"), ("ScanHeader:", "Header", ""),
    ("Bounce: on", "Action", "bounce"), ("Bounce: off", "Action", "drop"),
])
def test_old_name_still_works_with_a_note(check, old, name, value):
    result = check(MINIMAL + old + "\n")
    assert effective(result)[name.lower()] == [value]
    assert result.stderr == "clamsmtpd: %s:2: %s is deprecated, use %s\n" % (
        check.file, old.partition(":")[0], name)


# ------------------------------------------------------------ command line

@pytest.mark.covers("clamsmtpd.8 OPTIONS: -v", "clamsmtpd.8 EXIT STATUS: 0")
def test_v_prints_version_and_default_file(run):
    result = run("-v")
    assert result.returncode == 0
    assert re.search(r"\d+\.\d+", result.stdout)
    assert "clamsmtpd.conf" in result.stdout
    assert result.stderr == ""


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -f", "clamsmtpd.8 FILES: /etc/clamsmtpd.conf",
    "clamsmtpd.conf.5 FILES: /etc/clamsmtpd.conf")
def test_configuration_without_f_is_the_default_file(run, mounts, tmp_path):
    """The file is the one that -v prints.  In a usual build it is in /etc.  With -f it
    is not read."""
    path = re.search(r"/\S*clamsmtpd\.conf", run("-v").stdout)[0]
    (tmp_path / "clamsmtpd.conf").write_text(MINIMAL + "TimeOut: 71\nMaxScans: 5\n")
    (tmp_path / "other.conf").write_text(MINIMAL + "TimeOut: 72\n")
    there = mounting(bind(str(tmp_path), os.path.dirname(path)))
    got = effective(run("-n", preexec_fn=there))
    assert (got["timeout"], got["maxscans"]) == (["71"], ["5"])
    got = effective(run("-n", "-f", str(tmp_path / "other.conf"), preexec_fn=there))
    assert (got["timeout"], got["maxscans"]) == (["72"], ["10"])


@pytest.mark.covers("clamsmtpd.8 EXIT STATUS: 2")
@pytest.mark.parametrize("args", [
    ["-Z"], ["-d"], ["-f"], ["-p"], ["-d", "x"], ["-d", "5"], ["-d", "-1"],
    ["-d", ""], ["127.0.0.1:1", "127.0.0.1:2"], ["--help"],
])
def test_usage_error_is_status_2(run, args):
    result = run(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr != ""


def test_usage_text_names_the_flags(run):
    result = run("-Z")
    assert "usage" in result.stderr.lower()
    for flag in ("-d", "-f", "-p"):
        assert flag in result.stderr


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -b", "clamsmtpd.8 OPTIONS: -c",
    "clamsmtpd.8 OPTIONS: -D", "clamsmtpd.8 OPTIONS: -h", "clamsmtpd.8 OPTIONS: -l",
    "clamsmtpd.8 OPTIONS: -m", "clamsmtpd.8 OPTIONS: -q", "clamsmtpd.8 OPTIONS: -t",
    "clamsmtpd.8 OPTIONS: -X", "clamsmtpd.8 OPTIONS: operand")
@pytest.mark.parametrize("args, name, value", [
    (["-b"], "action", "bounce|reject"),
    (["-c", "/x/clamd"], "clamaddress", "/x/clamd"),
    (["-D", "/var/tmp"], "tempdirectory", "/var/tmp"),
    (["-h", "X-Old: yes"], "header", "X-Old: yes"),
    (["-l", "127.0.0.1:77"], "listen", r"127\.0\.0\.1:77"),
    (["-m", "99"], "maxconnections", "99"),
    (["-q"], "quarantine", "on"),
    (["-t", "33"], "timeout", "33"),
    (["-X"], "debugfiles", "on"),
    (["127.0.0.1:99"], "outaddress", r"127\.0\.0\.1:99"),
])
def test_older_flag_works_with_a_warning(check, args, name, value):
    result = check("" if name == "outaddress" else MINIMAL, *args)
    assert re.fullmatch(value, effective(result)[name][0])
    assert check.file in result.stderr


def test_old_flag_with_a_bad_value_is_an_error(check):
    result = check(MINIMAL, "-m", "many")
    assert result.returncode == 2
    assert '"many"' in result.stderr


@pytest.mark.covers("clamsmtpd.8 OPTIONS: the file overrides options")
@pytest.mark.parametrize("args, line, name, value", [
    (["-m", "99"], "MaxConnections: 11", "maxconnections", "11"),
    (["-l", "127.0.0.1:77"], "Listen: 127.0.0.1:78", "listen", r"127\.0\.0\.1:78"),
    (["-c", "/x/y"], "ClamAddress: /z", "clamaddress", "/z"),
    (["-b"], "Action: pass", "action", "pass"),
    (["-D", "/var/tmp"], "TempDirectory: /", "tempdirectory", "/"),
    (["-h", "A: b"], "Header:", "header", ""), (["-q"], "Quarantine: off", "quarantine", "off"),
    (["-t", "33"], "TimeOut: 44", "timeout", "44"),
    (["-X"], "DebugFiles: off", "debugfiles", "off"),
    (["127.0.0.1:99"], "", "outaddress", "10026"),
])
def test_file_overrides_old_flags(check, args, line, name, value):
    got = effective(check(MINIMAL + line + "\n", *args))[name]
    assert len(got) == 1 and re.fullmatch(value, got[0])


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -p")
def test_p_overrides_pidfile(check):
    got = effective(check(MINIMAL + "PidFile: /run/a\n", "-p", "/run/b"))
    assert got["pidfile"] == ["/run/b"]


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -n warnings")
@pytest.mark.parametrize("line, warning", [
    ("User: no-such-user", 'User: "no-such-user" is not a user of this system'),
    ("User: -5", 'User: "-5" is not a user of this system'),
    ("TempDirectory: /no/such", "TempDirectory: /no/such is not a directory "
     "of this system"),
    ("TempDirectory: /dev/null", "TempDirectory: /dev/null is not a directory "
     "of this system"),
    ("User: nobody", ""), ("User: 54321", ""), ("TempDirectory: /", ""),
])
def test_n_warns_of_a_missing_user_or_directory(check, line, warning):
    """A user or directory that does not exist gives a warning on standard error.
    The settings are still printed, since they may be for another machine."""
    result = check(MINIMAL + line + "\n")
    name, _, value = line.partition(": ")
    assert effective(result)[name.lower()] == [value]
    assert result.stderr == (warning and "clamsmtpd: %s\n" % warning)


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -d", "clamsmtpd.8 LOGGING: levels",
    "clamsmtpd.8 LOGGING: dialogue")
@pytest.mark.parametrize("level", range(5))
def test_d_selects_what_is_logged(site, level):
    """The log has an error, a warning, a notice, information and the dialogue, as
    far as the level selects them.  It never has the text of a message."""
    texts = ["^clamd .*: unexpected answer", "^100000: client attempted use of privileged XCLIENT",
             "^clamd .*: works again", "^100000: accepted connection", "^100000: CLIENT < EHLO"]
    site.clamd.verdict = ["sick ERROR"]
    site.start(level=level, wait=False, Listen=site.path("in.sock"))
    daemon = site.daemon
    until(lambda: os.path.exists(site.path("in.sock")) or not daemon.alive(),
          "the listener")
    client = connected(site, site.path("in.sock"))
    client.hello()
    client.cmd("XCLIENT NAME=x", "554")
    client.mail(want="451")
    client.mail(body=b"Subject: secret\r\n\r\ntext\r\n")
    client.quit()
    site.daemon.stop()
    assert [bool(daemon.log(text)) for text in texts] == [
        n <= level for n in range(5)]
    dialogue = ["CLIENT < EHLO", "SERVER > EHLO", "SERVER < 250", "CLIENT > 250",
                "CLAMAV <", "CLAMAV >"]
    assert [text in daemon.text() for text in dialogue] == [level == 4] * 6
    assert "secret" not in daemon.text()


def connected(site, path):
    """A connected socket.  bind() comes before listen(), so this tries until there
    is a listener."""
    def attempt():
        try:
            return site.client(address=path)
        except OSError:
            return None
    return until(attempt, "a listener on " + path)


def test_log_lines_begin_with_the_name(site):
    site.session().quit()
    lines = site.daemon.text().splitlines()
    assert lines and all(l.startswith("clamsmtpd: ") for l in lines)


# ---------------------------------------------------------------- addresses

@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: port",
    "clamsmtpd.conf.5 ADDRESSES: default host", "clamsmtpd.conf.5 Listen: default")
@pytest.mark.parametrize("listen, want", [
    ("127.0.0.1:0", r"127\.0\.0\.1:[1-9]\d*"),
    ("0", r"0\.0\.0\.0:[1-9]\d*"),
    (localhost() + ":0", r"(127\.0\.0\.1|\[::1\]):[1-9]\d*"),
    ("[::1]:0", r"\[::1\]:[1-9]\d*"),
    ("[::ffff:127.0.0.1]:0", r"127\.0\.0\.1:[1-9]\d*"),
    ("[::]:0", r"\[::\]:[1-9]\d*"),
])
def test_listen_address_of_each_form_is_opened(site, listen, want):
    if "::1" in listen and not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    site.start(Listen=listen)
    assert re.fullmatch(want, site.daemon.address)
    client = site.session()
    client.mail()
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Listen: IPv6")
def test_ipv4_client_of_an_ipv6_listener_has_an_ipv4_address(site):
    """Log and header have no ::ffff:, and the next hop is on the client's own
    loopback address."""
    if not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    site.start(Listen="[::]:0", OutAddress=str(site.hop.port),
               Header="X-Via: %i %l")
    port = site.daemon.address.rpartition(":")[2]
    client = site.session(address="127.0.0.1:" + port)
    client.mail(body=b"Subject: x\r\n\r\nhello\r\n")
    client.quit()
    assert b"\r\nX-Via: 127.0.0.1 127.0.0.1\r\n" in site.hop.messages[0].body
    assert site.daemon.log("accepted connection from: 127.0.0.1$")


@pytest.mark.covers("clamsmtpd.conf.5 Listen", "clamsmtpd.conf.5 Listen: mode 0666",
    "clamsmtpd.conf.5 Listen: socket removed")
def test_listen_unix_socket_has_mode_0666_and_is_removed(site):
    site.start(Listen=site.path("in.sock"))
    client = site.session()
    client.mail()
    client.quit()
    assert os.stat(site.path("in.sock")).st_mode & 0o777 == 0o666
    site.daemon.wait_log("accepted connection from: local")
    site.daemon.settle()
    site.daemon.stop()
    assert not os.path.exists(site.path("in.sock"))


@pytest.mark.covers("clamsmtpd.conf.5 Listen")
@pytest.mark.core
def test_listen_repeated_opens_each_address(site):
    site.start(Listen=["127.0.0.1:0", site.path("in.sock"), "127.0.0.2:0"])
    assert len(set(site.daemon.addresses)) == 3
    for address in site.daemon.addresses:
        client = site.session(address=address)
        client.mail()
        client.quit()
    assert len(site.hop.messages) == 3


@pytest.fixture(params=["unix", "ipv4", "ipv6", "name"])
def place(request, site):
    """place(new): a new server of this kind, and its address as a setting has
    it."""
    kind = request.param
    if kind == "ipv6" and not has_ipv6():
        pytest.skip("no IPv6 loopback here")

    def place(new):
        server = new(**{"unix": {"path": site.path("peer.sock")},
                        "ipv6": {"host": "::1"}}.get(kind, {}))
        if kind == "name":
            return server, "%s:%d" % (localhost(), server.port)
        return server, server.address
    return place


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: /path",
    "clamsmtpd.conf.5 ADDRESSES: a.b.c.d", "clamsmtpd.conf.5 ADDRESSES: v6",
    "clamsmtpd.conf.5 ADDRESSES: name", "clamsmtpd.conf.5 OutAddress")
def test_outaddress_of_each_form_is_connected_to(site, place):
    site.hop, address = place(site.new_hop)
    site.start(OutAddress=address)
    site.session().mail()
    assert len(site.hop.messages) == 1


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: /path")
def test_clamaddress_of_each_form_is_connected_to(site, place):
    site.clamd, address = place(functools.partial(site.new_clamd, tcp=True))
    site.start(ClamAddress=address)
    site.session().mail()
    assert len(site.clamd.scans) == 1


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: /path",
    "clamsmtpd.conf.5 ADDRESSES: a.b.c.d", "clamsmtpd.conf.5 ADDRESSES: v6",
    "clamsmtpd.conf.5 ADDRESSES: name", "clamsmtpd.conf.5 ADDRESSES: port",
    "clamsmtpd.conf.5 ADDRESSES: a.b.c.d, v6, name")
@pytest.mark.parametrize("value", [
    "10026", "192.0.2.1", "192.0.2.1:26", "mail.example.com", "[2001:db8::1]",
    "mail.example.com:2525", "/run/out.sock", "[2001:db8::1]:26", "2001:db8::1",
    "[::ffff:192.0.2.1]:26", "localhost", "65535", "1", "/" + "p" * 106,
])
@pytest.mark.parametrize("name", ["OutAddress", "ClamAddress", "Listen"])
def test_address_of_each_form_is_taken(check, name, value):
    text = ("" if name == "OutAddress" else MINIMAL) + "%s: %s\n" % (name, value)
    assert effective(check(text))[name.lower()] == [value]


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: a.b.c.d, v6, name",
    "clamsmtpd.conf.5 ADDRESSES: default port")
@pytest.mark.parametrize("name, port", [
    ("OutAddress", 25), ("ClamAddress", 3310), ("Listen", 10025)])
def test_address_without_a_port_has_the_default_port(site, name, port):
    host = own_host(77)
    try:
        if name == "OutAddress":
            site.hop = site.new_hop(host=host, port=port)
        elif name == "ClamAddress":
            site.clamd = site.new_clamd(tcp=True, host=host, port=port)
        else:
            site.start(Listen=host)
            assert site.daemon.address == "%s:%d" % (host, port)
    except OSError as error:
        pytest.skip("cannot bind port %d: %s" % (port, error))
    if name != "Listen":
        site.start(**{name: host})
    client = site.session()
    client.mail()
    client.quit()
    assert len(site.hop.messages) == len(site.clamd.scans) == 1


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: default host")
def test_clamaddress_port_alone_is_at_127_0_0_1(site):
    site.clamd = site.new_clamd(tcp=True)
    site.start(ClamAddress=str(site.clamd.port))
    client = site.session()
    client.mail()
    client.quit()
    assert len(site.clamd.scans) == 1


@pytest.mark.covers("clamsmtpd.conf.5 ADDRESSES: name that cannot be resolved")
def test_name_that_cannot_be_resolved_stops_no_start(site):
    site.start(OutAddress="no-such-host.invalid:25",
               ClamAddress="no-such-clamd.invalid:3310")
    client = site.client()
    client.expect("421 4.4.1")
    client.eof()
