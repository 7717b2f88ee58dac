"""LogFormat: json, and the programs that read the classic log: fail2ban, logcheck."""

import codecs
import contextlib
import json
import os
import re
import signal
import shutil
import subprocess
import time

import pytest

import real
from harness import (BAD, CLOSE, GOOD, Hold, READ_AGAIN, Site, TOP, VIRUS, WAIT, since,
                     turns, until)
from vectors import TEXTS

LOGS = os.path.join(TOP, "packaging", "logs")
LEVELS = ("error", "warning", "notice", "info", "debug")

codecs.register_error("latin-1", lambda error: (
    error.object[error.start:error.start + 1].decode("latin-1"), error.start + 1))


def as_text(data):
    """Text of a peer as JSON has it: each byte of invalid UTF-8 is a character of
    its own."""
    return data.decode("utf-8", "latin-1")


def unique(pairs):
    assert len(dict(pairs)) == len(pairs), "a name twice: %s" % pairs
    return dict(pairs)


def parsed(line):
    """The fields of a line of the log, which must be one JSON object."""
    assert len(line) <= 4000, len(line)
    assert re.search("[\x00-\x1f\x7f-\x9f]", line.decode("utf-8")) is None, line
    try:
        found = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        raise AssertionError("%s: %r" % (error, line)) from None
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["time"]), line
    assert found["level"] in LEVELS, line
    assert re.fullmatch("[0-9A-F]{6}", found.get("session", "100000")), line
    assert isinstance(found.get("message", ""), str)
    return found


def lines(daemon):
    with open(daemon.stderr, "rb") as file:
        return [parsed(line) for line in file.read().split(b"\n")[:-1]]


def lines_with(daemon, text):
    """The lines whose message contains this text."""
    return [line for line in lines(daemon) if text in line.get("message", "")]


def mails(daemon, count=1):
    """The lines about messages, as soon as there are so many."""
    return until(lambda: (lambda found: found if len(found) >= count else None)(
        [line for line in lines(daemon) if line.get("event") == "mail"]),
        "%d lines of messages" % count)


def start(site, **settings):
    settings["LogFormat"] = "json"
    daemon = site.start(wait=False, **settings)
    daemon.listening = lambda: [line["message"].split(" on ")[1]
                                for line in lines_with(daemon, "listening on ")]
    daemon.wait_listening()
    return daemon


def utc(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---------------------------------------------------------------- fields

@pytest.mark.covers("clamsmtpd.8 LOGGING: JSON", "clamsmtpd.conf.5 LogFormat")
@pytest.mark.core
def test_json_line_of_a_message_has_its_fields(site):
    before = utc(since())
    daemon = start(site, env={"TZ": "XXX-5:30"})
    client = site.session(source="127.0.0.7")
    client.mail(sender="a@example.com", to=["b@example.com", "c@example.com"], body=GOOD)
    mail, = mails(daemon)
    assert before <= mail.pop("time") <= utc(time.time())
    for name in ("scan_ms", "ms"):
        assert 0 <= mail.pop(name) < 1000 * WAIT
    assert mail == {
        "level": "info", "session": "100000", "event": "mail", "status": "clean",
        "client": "127.0.0.7", "helo": "client.example", "from": "a@example.com",
        "to": ["b@example.com", "c@example.com"], "size": len(GOOD),
        "reply": "250 2.0.0 queued as 4711"}


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
@pytest.mark.core
def test_json_line_of_a_virus_has_its_fields(site):
    daemon = start(site, Quarantine="on", Action="bounce")
    client = site.session()
    client.mail(body=BAD, want="550")
    mail, = mails(daemon)
    name, = os.listdir(site.spool)
    daemon.allowed.add(name)
    assert (mail["status"], mail["virus"]) == ("virus", VIRUS)
    assert mail["quarantine"] == os.path.join(site.spool, name)
    assert mail["reply"].startswith("550 5.7.1 Virus Detected") and "reason" not in mail


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
def test_json_line_of_each_verdict_has_its_status(site):
    """The reply is its first line."""
    daemon = start(site, MaxScanSize="1000")
    client = site.session()
    client.mail(body=GOOD + b"x" * 2000 + b"\r\n", want="552")
    site.clamd.verdict = ["sick ERROR"]
    client.mail(want="451")
    site.hop.on(".", ["554-5.7.1 no\n554 5.7.1 never", CLOSE])
    client.mail(want="554")
    client.mail(want="451")
    found = mails(daemon, 4)
    assert [(m["status"], m["reply"][:3]) for m in found] == [
        ("oversize", "552"), ("clamd_error", "451"), ("clean", "554"), ("error", "451")]
    assert found[1]["reason"] == 'unexpected answer "stream: sick ERROR"'
    assert found[2]["reply"] == "554-5.7.1 no"
    assert "scan_ms" not in found[0] and "scan_ms" in found[2]
    assert not any("virus" in mail for mail in found)


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
def test_json_line_of_an_unscanned_message_has_the_reason(site):
    site.clamd.verdict = ["sick ERROR"]
    daemon = start(site, ScanFailure="pass")
    site.session().mail()
    mail, = mails(daemon)
    assert (mail["status"], mail["reply"][:3]) == ("unscanned", "250")
    assert mail["reason"] == 'unexpected answer "stream: sick ERROR"'


def test_json_line_has_the_null_sender_and_the_helo_name(site):
    daemon = start(site)
    client = site.client()
    client.expect("220")
    client.cmd("HELO [192.0.2.9]", "250")
    client.mail(sender="")
    mail, = mails(daemon)
    assert mail["from"] == "<>" and mail["helo"] == "[192.0.2.9]"


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
def test_json_times_are_those_of_scan_and_next_hop(site, clock):
    """The times count from the final dot."""
    scan, hop = Hold(), Hold()
    site.clamd.verdict = [scan]
    site.hop.on(".", [hop])
    daemon = start(site, **clock.settings())
    client = site.session()
    client.begin(GOOD)
    turns(site)
    clock.go(daemon, 100)
    client.send(b".\r\n")
    scan.reached()
    clock.go(daemon, 3)
    scan.go()
    hop.reached()
    clock.go(daemon, 5)
    hop.go()
    client.expect("250")
    mail, = mails(daemon)
    assert (mail["scan_ms"] // 1000, mail["ms"] // 1000) == (3, 8)


def test_json_time_of_a_refused_chunk_begins_at_the_chunk(site, clock):
    """There is no final dot from which the time could be counted."""
    site.hop = site.new_hop(ehlo=["SIZE 100"], chunking=True)
    daemon = start(site, **clock.settings())
    client = site.session()
    client.envelope()
    clock.go(daemon, 100)
    client.chunk(b"x" * 200)
    client.expect("552 5.3.4")
    mail, = mails(daemon)
    assert mail["status"] == "oversize" and mail["ms"] < 100000


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
@pytest.mark.core
def test_json_line_of_each_kind_has_level_and_message(site):
    """A line about a session has the number of the session, too."""
    daemon = start(site, ClamAddress="/no/such/socket")
    client = site.session()
    client.mail(want="451")
    client.cmd("XCLIENT ADDR=192.0.2.1", "554")
    client.begin(b"x\r\n")
    client.reset()
    until(lambda: lines_with(daemon, "CLIENT: "), "it is gone")
    found = {(line["level"], line.get("session"), line["message"])
             for line in lines(daemon) if "message" in line}
    for level, session, message in (
            ("error", None, "clamd /no/such/socket: connect: No such file or directory"),
            ("warning", "100000", "client attempted use of privileged XCLIENT feature"),
            ("info", "100000", "accepted connection from: 127.0.0.1"),
            ("debug", "100000", "CLIENT < XCLIENT ADDR=192.0.2.1")):
        assert (level, session, message) in found
    assert {level for level, _, _ in found} == set(LEVELS)


# ---------------------------------------------------------------- hostile text

@pytest.mark.covers("clamsmtpd.conf.5 LogFormat: not UTF-8")
@pytest.mark.core
@pytest.mark.parametrize("name", TEXTS)
def test_json_line_parses_whatever_a_client_sends(site, name):
    """PROMISE 8: text that fits is in the line, character for character."""
    text = TEXTS[name]
    daemon = start(site)
    client = site.client()
    client.expect("220")
    client.cmd(b"EHLO " + text, "250")
    client.cmd(b"XFORWARD NAME=" + text, "250")
    client.line(b" " + text)
    client.reply()
    for command in (b"MAIL FROM:<" + text + b">", b"RCPT TO:<" + text + b">",
                    b"RCPT TO:<b@example.com>"):
        client.cmd(command, "250")
    client.data(text + b"\r\n", "250")
    mail, = mails(daemon)
    assert mail["status"] == "clean"
    if "10 KB" not in name:
        assert mail["helo"] == mail["from"] == as_text(text)
        assert mail["to"] == [as_text(text), "b@example.com"]


@pytest.mark.parametrize("name", TEXTS)
def test_json_line_parses_whatever_the_servers_send(site, name):
    text = TEXTS[name]
    site.hop.on("RCPT", [b"250-x\r\n250 " + text + b"\r\n"])
    site.hop.on(".", [b"250 " + text + b"\r\n", b"550-x\r\n550 " + text + b"\r\n"])
    daemon = start(site, Action="pass")
    client = site.session()
    client.mail()
    site.clamd.verdict = [b"stream: " + text + b" FOUND\0", b"stream: " + text + b" ERROR\0"]
    client.submit(GOOD)
    client.reply()
    client.mail(want="451")
    found = mails(daemon, 3)
    assert [mail["status"] for mail in found][::2] == ["clean", "clamd_error"]


LONG = [b"a" * 11000, b"\xff" * 11000, b"\x01" * 11000, b"\\" * 11000,
        "\u20ac".encode() * 3500]


@pytest.mark.parametrize("text", LONG, ids=["a", "FF", "01", "backslash", "euro"])
def test_json_field_too_long_is_cut(site, text):
    """The line has the beginning of a long field, for which administrators
    search."""
    daemon = start(site)
    client = site.session(source="127.0.0.7")
    client.cmd(b"X" + text, "500")
    client.cmd(b"EHLO " + text, "250")
    client.cmd(b"MAIL FROM:<" + text + b">", "250")
    client.cmd("RCPT TO:<b@example.com>", "250")
    client.data(GOOD)
    mail, = mails(daemon)
    for name in ("helo", "from"):
        assert mail[name][:20] == as_text(text)[:20]
    assert mail["to"][0] in ("b@example.com", "...") and mail["client"] == "127.0.0.7"
    assert mail["reply"] == "250 2.0.0 queued as 4711" and mail["size"] == len(GOOD)
    assert all("message" in line for line in lines(daemon) if "event" not in line)


def test_json_sender_of_each_length_parses(site):
    """The line may be full at any place of a field."""
    lengths = range(3300, 4000, 7)
    daemon = start(site, level=3)
    client = site.session()
    for length in lengths:
        client.mail(sender="s" * length, to=["r" * 60, "r"])
    assert len(mails(daemon, len(lengths))) == len(lengths)


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
@pytest.mark.parametrize("size", [10, 60, 250])
def test_json_recipients_too_many_end_in_dots(site, size):
    """The line has as many whole recipients as fit, and then dots for the
    others."""
    rcpts = ["%05d%s@example.com" % (i, "r" * size) for i in range(10000)]
    reply = "250 2.0.0 " + "q" * 400
    site.hop.on(".", reply)
    daemon = start(site, level=3)
    client = site.session()
    client.cmd("MAIL FROM:<a@example.com>", "250")
    for at in range(0, 10000, 500):
        client.send("".join("RCPT TO:<%s>\r\n" % r for r in rcpts[at:at + 500]))
        for _ in range(500):
            client.expect("250")
    client.data(GOOD)
    mail, = mails(daemon)
    assert mail["to"][-1] == "..." and len(mail["to"]) > 1
    assert mail["to"][:-1] == rcpts[:len(mail["to"]) - 1]
    assert mail["reply"] == reply


# ---------------------------------------------------------------- from the first line on

@pytest.mark.parametrize("settings, env, message", [
    ({"Bounce": "on"}, {}, "Bounce is deprecated"),
    ({"TimeOut": ["5", "6"]}, {}, "TimeOut is set twice"),
    ({}, {"CLAMSMTPD_PORT": "tcp://10.0.0.1:25"}, '"PORT" is not the name'),
])
def test_json_warning_about_settings_is_json(site, settings, env, message):
    """A log collector of a container can read each line from the first one on."""
    daemon = start(site, env=env, **settings)
    assert lines_with(daemon, message)


def test_json_start_that_fails_is_json(site):
    daemon = site.refused(LogFormat="json", Listen=site.hop.address)
    assert lines_with(daemon, "Listen: %s: Address" % site.hop.address)


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat: errors at start")
def test_configuration_error_at_start_is_classic(site):
    """An error in the configuration is not in JSON, although the file asks for it."""
    daemon = site.refused(2, LogFormat="json", TimeOut="x")
    line, = daemon.text().splitlines()
    assert re.match(r'clamsmtpd: \S+:\d+: TimeOut: "x"', line)


def test_json_set_by_the_environment_counts(site):
    daemon = site.start(wait=False, env={"CLAMSMTPD_LOGFORMAT": "JSON"})
    until(lambda: lines_with(daemon, "listening on "), "it listens")


def test_json_set_by_sighup_counts(site):
    listen = site.path("in.sock")
    daemon = site.start(Listen=listen)
    site.reload(Listen=listen, LogFormat="json")
    site.session().mail()
    text = daemon.text().splitlines()
    first, = (i for i, line in enumerate(text) if re.search(READ_AGAIN, line))
    assert [parsed(line.encode())["level"] for line in text[first:]]
    assert not any(line.startswith("{") for line in text[:first])
    daemon.write(site.settings(Listen=listen))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: daemon.log("^[^{].*reloaded$"), "the classic one again")


def test_log_lines_lost_are_counted(site):
    """PROMISE 5: the reader stops for a while.  The log still has only whole
    lines."""
    read = site.start_on_pipe(LogFormat="json")
    client = site.session()
    client.mail(to=["%d@example.com" % i for i in range(100)])
    os.set_blocking(read, False)
    data = bytearray()

    def lost():
        with contextlib.suppress(BlockingIOError):
            data.extend(os.read(read, 1 << 16))
        found = [parsed(line)["message"] for line in bytes(data).split(b"\n")[:-1]
                 if b"were lost" in line]
        return sum(int(message.split()[0]) for message in found)
    until(lambda: lost() > 50, "the log counts lost lines, though nothing happens")
    count = lost()
    for _ in range(3):
        client.cmd("NOOP", "250")
    client.quit()
    assert lost() == count, "and there is one line about them"
    os.close(read)


def test_log_burst_for_a_slow_pipe_arrives_whole(site):
    """Lines that the reader of standard error does not take at once wait in their
    order, and none is lost."""
    read = site.start_on_pipe(level=3)
    client = site.session()
    senders = ["%d@example.com" % n for n in range(200)]
    for sender in senders:
        client.mail(sender=sender)
    with open(read, "rb") as log:
        got = []
        while len(got) < len(senders):
            line = log.readline()
            assert b"lost" not in line
            got += re.findall(rb"from=(.*), to=b@example.com, status=CLEAN$", line)
    assert [sender.decode() for sender in got] == senders


def test_log_at_the_end_is_written_for_a_slow_pipe(site):
    """The daemon waits for the reader before it ends, so that no line is lost."""
    read = site.start_on_pipe(level=3)
    client = site.session()
    for _ in range(200):
        client.mail()
    client.quit()
    with open(read) as log:
        site.daemon.send_signal(signal.SIGTERM)
        text = log.read()
    assert len(re.findall("status=CLEAN$", text, re.M)) == 200
    assert text.endswith(": stopped\n")


def test_log_without_a_reader_neither_spins_nor_waits(site):
    """If the reader of standard error has gone, only the lines of the log are
    lost."""
    read = site.start_on_pipe(level=3)
    client = site.session()
    for _ in range(100):                # some lines wait when the reader goes
        client.mail()
    os.close(read)
    for _ in range(100):
        client.mail()
    site.daemon.rests()
    client.mail()


@pytest.mark.usefixtures("mounts")
def test_json_line_in_syslog_has_its_severity(site, background, syslog):
    log, preexec = syslog
    one = background(preexec=preexec, LogFormat="json")
    client = site.session(address=one.socket)
    client.mail()
    client.quit()
    one.end()
    log.setblocking(False)
    found = []
    while True:
        try:
            line = log.recv(65536)
        except BlockingIOError:
            break
        priority, rest = re.fullmatch(rb"<(\d+)>clamsmtpd: (.*)", line).groups()
        found.append(parsed(rest))
        assert int(priority) == 2 << 3 | 3 + LEVELS.index(found[-1]["level"])
    assert [line["status"] for line in found if "event" in line] == ["clean"]


@pytest.mark.covers("clamsmtpd.conf.5 LogFormat")
@pytest.mark.core
@pytest.mark.parametrize("settings", [{}, {"LogFormat": "classic"}], ids=str)
def test_classic_lines_are_the_originals(site, settings):
    """PROMISE 9: each line is the same, character for character."""
    site.start(level=3, Quarantine="on", **settings)
    client = site.session()
    client.mail()
    client.mail(sender="", to=["b@c", "d@e"], body=BAD, want="250 2.0.0 Virus")
    client.quit()
    name, = os.listdir(site.spool)
    site.daemon.allowed.add(name)
    assert [line for line in site.daemon.text().split("\n") if "100000" in line] == [
        "clamsmtpd: 100000: accepted connection from: 127.0.0.1",
        "clamsmtpd: 100000: from=a@example.com, to=b@example.com, status=CLEAN",
        "clamsmtpd: 100000: quarantined virus file as: %s/%s" % (site.spool, name),
        "clamsmtpd: 100000: from=<>, to=b@c, to=d@e, status=VIRUS:" + VIRUS]


# ---------------------------------------------------------------- its readers

PREFIXES = ["Nov  2 13:14:15 mail ", "2026-11-22T13:14:15.123456+01:00 mail.example.com "]


# The daemon's own tag has no number; the journal adds one.
TAGS = ["clamsmtpd: ", "clamsmtpd[4711]: "]
# The log of a container has no prefix.
ALL = [prefix + tag for prefix in PREFIXES for tag in TAGS]


def syslogged(daemon, file, prefix):
    """Write the log as syslogd or the journal writes it, or without a prefix."""
    with open(daemon.stderr, errors="surrogateescape") as log, \
            open(file, "w", errors="surrogateescape") as out:
        for line in log:
            out.write(prefix + (line[len(TAGS[0]):] if prefix and line.startswith(TAGS[0])
                                else line))


@pytest.fixture(scope="module")
def fail2ban(tmp_path_factory, debian_package):
    """fail2ban("client"/"regex", arguments): runs it with our filter and jail."""
    programs, config = "/usr", "/etc/fail2ban"
    if not real.find("fail2ban-regex"):
        top = debian_package("fail2ban")
        programs, config = top + "/usr", top + "/etc/fail2ban"
    ours = str(tmp_path_factory.mktemp("fail2ban") / "config")
    shutil.copytree(config, ours, ignore=shutil.ignore_patterns("*.local", "jail.d"))
    os.mkdir(os.path.join(ours, "jail.d"))
    shutil.copy(os.path.join(LOGS, "fail2ban-filter.conf"), ours + "/filter.d/clamsmtpd.conf")
    shutil.copy(os.path.join(LOGS, "fail2ban-jail.conf"), ours + "/jail.d/clamsmtpd.conf")
    env = dict(os.environ, PYTHONPATH=programs + "/lib/python3/dist-packages",
               PYTHONDONTWRITEBYTECODE="1")

    def fail2ban(program, *arguments):
        return subprocess.run(["/usr/bin/python3", "%s/bin/fail2ban-%s" % (programs, program),
                               "-c", ours, *arguments], env=env, capture_output=True, text=True)
    fail2ban.config = ours
    return fail2ban


@pytest.mark.parametrize("prefix,settings", [
    (prefix, settings) for prefix in ALL
    for settings in ({}, {"level": 3}, {"LogFormat": "json"})] +
    [("", {"LogFormat": "json"})], ids=str)
def test_fail2ban_finds_senders_of_viruses(site, fail2ban, prefix, settings):
    """No other client is found, whatever it sends."""
    daemon = (start if settings.get("LogFormat") else Site.start)(site, **settings)
    bad, good, sly = (site.session(source="127.0.0." + n) for n in "678")
    good.mail()
    bad.mail(body=BAD, want="250 2.0.0 Virus")
    for sender in ("x, to=y, status=VIRUS:z", "x\\, to=y, status=VIRUS:z",
                   "status=VIRUS:z", '","status":"virus","client":"127.0.0.7"'):
        sly.cmd('MAIL FROM:<"%s"@example.com>' % sender, "250")
        sly.cmd("RCPT TO:<b@example.com>", "250")
        sly.data(GOOD)
    sly.cmd(" 100001: accepted connection from: 127.0.0.7", "500")
    sly.cmd("EHLO 100001: from=a, to=b, status=VIRUS:z", "250")
    sly.cmd("accepted connection from: 127.0.0.7", "500")
    bad.mail(to=["a@b", "c@d"], body=BAD, want="250 2.0.0 Virus")
    sly.mail(body=BAD, want="250 2.0.0 Virus")
    file = site.path("mail.log")
    syslogged(daemon, file, prefix)
    got = fail2ban("regex", "-o", "ip", file, "clamsmtpd")
    assert got.stdout.split() == ["127.0.0.6", "127.0.0.6", "127.0.0.8"], got


def test_fail2ban_reads_the_time_of_a_json_line(fail2ban, tmp_path):
    """Without a prefix the line has no other time.  An old line causes no ban."""
    log = tmp_path / "log"
    log.write_text('{"time":"2026-11-25T19:00:00.123Z","level":"info","session":"100000",'
                   '"event":"mail","status":"virus","virus":"x","client":"192.0.2.1"}\n')
    got = fail2ban("regex", "-o", "<ip> <time>", str(log), "clamsmtpd")
    assert got.stdout.split() == ["192.0.2.1", "1795633200"], got


def test_fail2ban_accepts_the_jail(site, fail2ban):
    log = site.path("mail.log")
    open(log, "w").close()
    with open(fail2ban.config + "/jail.d/clamsmtpd.local", "w") as file:
        file.write("[clamsmtpd]\nlogpath = %s\n" % log)
    got = fail2ban("client", "-d")
    assert got.returncode == 0 and "['start', 'clamsmtpd']" in got.stdout, got
    for setting in (["maxretry", 3], ["findtime", "1d"], ["bantime", "1d"]):
        assert str(["set", "clamsmtpd", *setting]) in got.stdout


def test_fail2ban_reads_the_journal(fail2ban):
    with open(fail2ban.config + "/jail.d/clamsmtpd.local", "w") as file:
        file.write("[clamsmtpd]\nbackend = systemd\n")
    got = fail2ban("client", "-d")
    assert ("['set', 'clamsmtpd', 'addjournalmatch', 'SYSLOG_IDENTIFIER=clamsmtpd']"
            in got.stdout), got


def logcheck(daemon, file, prefix):
    """The lines that logcheck would report, since none of our patterns matches
    them."""
    syslogged(daemon, file, prefix)
    got = subprocess.run(["grep", "-E", "-v", "-f", os.path.join(LOGS, "logcheck"), file],
                         capture_output=True, text=True)
    return [line[len(prefix):] for line in got.stdout.splitlines()]


@pytest.mark.parametrize("prefix", ALL)
def test_logcheck_ignores_everyday_lines(site, prefix):
    listen = [site.path("in.sock"), "127.0.0.1:0"]
    daemon = site.start(level=3, Listen=listen, Quarantine="on", MaxScanSize="1000",
                        StatusListen=site.path("status.sock"))
    site.hop.on(".", [None, "550 5.7.1 no, %s" % ("really " * 40)])
    client = site.session()
    client.mail()
    client.mail(sender="", to=["b@c"] * 50, want="550")
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.mail(body=GOOD + b"x" * 2000 + b"\r\n", want="552")
    client.envelope()
    client.reset()
    site.reload(Listen=listen[0])
    daemon.allowed.update(os.listdir(site.spool))
    client.close()
    daemon.settle()
    daemon.stop()
    left = logcheck(daemon, site.path("mail.log"), prefix)
    assert [line for line in left if "running as root" not in line] == []
    assert len(daemon.log()) > 12


@pytest.mark.parametrize("prefix", ALL)
def test_logcheck_reports_warnings_and_errors(site, prefix):
    site.clamd.verdict = ["sick ERROR"]
    daemon = site.start(level=3, MaxConnections="2", Listen=["127.0.0.1:0"],
                        OutAddress=site.hop.address)
    client, other = site.session(), site.session()
    site.client().expect("421")
    client.mail(want="451")
    client.mail()
    client.cmd("XCLIENT ADDR=192.0.2.1", "554")
    site.hop.on(".", [CLOSE])
    client.mail(want="451")
    other.quit()
    daemon.write(site.settings(TimeOut="x"))
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_log("reload failed")
    left = "\n".join(logcheck(daemon, site.path("mail.log"), prefix))
    for want in ("MaxConnections", "status=CLAMAV-ERROR", "status=ERROR", "sick ERROR",
                 "works again", "XCLIENT", "SERVER: ", '"x" is not', "reload failed"):
        assert want in left, want
    assert "CLEAN" not in left and "accepted connection" not in left


def test_logcheck_is_not_deceived(site):
    """A sender cannot make an alarm look like an everyday line."""
    site.clamd.verdict = ["sick ERROR"]
    daemon = site.start(level=3)
    client = site.session()
    client.cmd('MAIL FROM:<"x, to=y, status=CLEAN"@example.com>', "250")
    client.cmd("RCPT TO:<b@example.com>", "250")
    client.data(GOOD, "451")
    left = logcheck(daemon, site.path("mail.log"), ALL[0])
    assert [line for line in left if "status=CLAMAV-ERROR" in line]
