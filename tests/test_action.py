"""Action, Quarantine and VirusAction, and a spool that cannot be written."""

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal

import pytest

from harness import (CLOSE, EICAR, Faults, GOOD, HEADER, Hold, LARGE, NINE, VIRUS,
                     environment, finish_file, never, processes, same, turns, until, wait_file)

BAD = b"Subject: x\r\n\r\nEICAR is in here\r\n.dot\r\n"


# ---------------------------------------------------------------- Action

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Infected",
    "clamsmtpd.conf.5 Action: drop", "clamsmtpd.8 LOGGING: VIRUS:name")
@pytest.mark.core
def test_action_drop_sends_250_and_forwards_nothing(site):
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus Detected; Discarded Email")
    assert site.hop.session.verbs() == ["EHLO", "MAIL", "RCPT", "RSET"]
    site.daemon.wait_log("^100000: from=a@example.com, to=b@example.com, "
                         "status=VIRUS:%s$" % VIRUS)
    client.mail(body=GOOD)
    assert len(site.hop.messages) == 1
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Infected",
    "clamsmtpd.conf.5 Action", "clamsmtpd.conf.5 Action: bounce")
@pytest.mark.core
@pytest.mark.parametrize("word", ["bounce", "reject", "Bounce"])
def test_action_bounce_sends_550_with_the_name_and_forwards_nothing(site, word):
    site.start(Action=word)
    client = site.session()
    client.envelope()
    got = client.data(BAD, "550 5.7.1 Virus Detected; Content Rejected")
    assert got.text == "550 5.7.1 Virus Detected; Content Rejected (%s)" % VIRUS
    assert site.hop.session.verbs() == ["EHLO", "MAIL", "RCPT", "RSET"]
    client.mail(body=GOOD)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Action: pass")
@pytest.mark.core
def test_action_pass_forwards_with_a_header_of_its_own(site):
    site.start(Action="pass")
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 queued")
    same(site.hop.messages[0].body,
         BAD.replace(b"\r\n\r\n", b"\r\nX-Virus-Infected: " + VIRUS.encode() +
                     b"\r\n\r\n", 1))
    assert HEADER not in site.hop.messages[0].body
    site.daemon.wait_log("status=VIRUS:%s$" % VIRUS)
    client.mail(body=GOOD)
    assert b"X-Virus-Infected" not in site.hop.messages[1].body
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Bounce")
def test_bounce_setting_is_an_action(site):
    site.start(Bounce="on")
    client = site.session()
    client.mail(body=BAD, want="550 5.7.1")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Action: patterns",
    "clamsmtpd.conf.5 Action: first match")
@pytest.mark.parametrize("name, want", [
    ("PUA.Win.Packer", "250 2.0.0 queued"),
    ("Heuristics.Phishing.Email", "250 2.0.0 queued"),
    ("Eicar-Test-Signature", "550 5.7.1"),
    ("Eicar-Other", "550 5.7.1"),
    ("pua.lower.case", "250 2.0.0 Virus Detected; Discarded Email"),
    ("Win.Trojan", "250 2.0.0 Virus Detected; Discarded Email"),
    ("PUA.Andr", "250 2.0.0 queued"),
    ("XPUA.Andr", "250 2.0.0 Virus"),
    ("Bracket1", "550 5.7.1"), ("Bracket9", "250 2.0.0 Virus"),
    ("Bracket11", "250 2.0.0 Virus"), ("One", "550 5.7.1"), ("Oone", "250 2.0.0 Virus"),
    ("Oe", "250 2.0.0 Virus"),
])
def test_action_patterns_first_match_counts(site, name, want):
    site.start(Action=["drop", "pass PUA.* Heuristics.Phishing.*",
                       "bounce Eicar* PUA.Andr Bracket[1-5] O?e"])
    site.clamd.verdict = name + " FOUND"
    client = site.session()
    client.mail(want=want)
    assert len(site.hop.messages) == ("queued" in want)
    client.quit()


def test_action_pattern_of_many_stars_uses_no_cpu(site):
    """PROMISE 5: the match does not start again at each star."""
    site.clamd.verdict = "a" * 150 + " FOUND"
    site.start(Action=["drop " + "*a" * 40 + "*b", "bounce"])
    client = site.session()
    client.mail(body=BAD, want="550 5.7.1 Virus")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Action: first match")
def test_action_patterns_without_a_default_line_leave_drop(site):
    site.start(Action="bounce Other*")
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    client.quit()


@pytest.mark.core
def test_next_hop_gone_while_a_virus_is_refused_changes_no_reply(site):
    """RSET fails; the client still gets the reply of the verdict."""
    site.hop.on("RSET", CLOSE)
    site.start(Action="bounce")
    client = site.session()
    client.mail(body=BAD, want="550 5.7.1 Virus Detected")
    client.rest()


# ---------------------------------------------------------------- Quarantine

@pytest.mark.covers("clamsmtpd.8 FILES: /tmp/virus.XXXXXX",
    "clamsmtpd.conf.5 Quarantine", "clamsmtpd.conf.5 TempDirectory",
    "clamsmtpd.8 TRANSPARENCY: line for clamd")
@pytest.mark.core
@pytest.mark.parametrize("action, want", [
    ("drop", "250 2.0.0 Virus Detected"), ("bounce", "550 5.7.1 Virus"),
    ("pass", "250 2.0.0 queued")])
def test_quarantine_keeps_a_copy_whatever_the_action(site, action, want):
    site.start(Action=action, Quarantine="on")
    client = site.session()
    client.mail(body=BAD, want=want)
    name, = os.listdir(site.spool)
    assert re.fullmatch(r"virus\.\w{6}", name)
    path = os.path.join(site.spool, name)
    with open(path, "rb") as file:
        same(file.read(), BAD, "the quarantined message")
    info = os.stat(path)
    assert info.st_mode & 0o7777 == 0o600 and info.st_nlink == 1
    site.daemon.wait_log("^100000: quarantined virus file as: %s$"
                         % re.escape(path))
    site.daemon.allowed.add(name)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 Quarantine: never deleted")
def test_quarantine_copy_stays_after_a_restart(site):
    """Neither the end of the daemon nor the next start removes a copy."""
    for count in (1, 2):
        site.start(Quarantine="on")
        site.session().mail(body=BAD, want="250 2.0.0 Virus")
        site.daemon.allowed.update(os.listdir(site.spool))
        site.daemon.stop()
        assert len(os.listdir(site.spool)) == count


def test_clean_messages_are_not_quarantined(site):
    site.start(Quarantine="on")
    client = site.session()
    client.mail(body=GOOD)
    assert os.listdir(site.spool) == []
    client.quit()


def test_quarantine_many_viruses_makes_a_copy_of_each(site):
    site.start(Quarantine="on")
    client = site.session()
    for i in range(20):
        client.mail(body=BAD + b"%d\r\n" % i, want="250 2.0.0 Virus")
    client.quit()
    names = os.listdir(site.spool)
    site.daemon.allowed.update(names)
    found = sorted(open(os.path.join(site.spool, n), "rb").read() for n in names)
    assert found == sorted(BAD + b"%d\r\n" % i for i in range(20))


def test_quarantine_large_message_is_copied_whole(site):
    site.start(Quarantine="on")
    body = b"A: b\r\n\r\nEICAR" + b"x" * 3_000_000 + b"\r\n"
    client = site.session()
    client.mail(body=body, want="250 2.0.0 Virus")
    name, = os.listdir(site.spool)
    site.daemon.allowed.add(name)
    with open(os.path.join(site.spool, name), "rb") as file:
        same(file.read(), body)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 When something fails: quarantine copy impossible",
    "clamsmtpd.conf.5 Quarantine: copy fails")
@pytest.mark.core
@pytest.mark.parametrize("action", ["drop", "bounce", "pass"])
def test_quarantine_that_fails_gives_451(site, action):
    """PROMISE 1: a virus that could not be kept as configured is not dropped."""
    hold = Hold(VIRUS + " FOUND")
    site.clamd.verdict = [hold]
    site.start(Action=action, Quarantine="on")
    client = site.session()
    client.begin(b"A: b\r\n\r\nx\r\n.\r\n")
    hold.reached()
    os.rename(site.spool, site.spool + ".away")
    hold.go()
    client.expect("451 4.3.0 Local Error")
    os.rename(site.spool + ".away", site.spool)
    assert site.hop.messages == [] and "DATA" not in site.hop.commands
    site.daemon.wait_log(r"status=ERROR$")
    client.mail(body=GOOD)
    client.quit()


@pytest.fixture
def start_halting(site, faulty_build):
    """Start a daemon whose children halt before the copy gets its name."""
    def start(**settings):
        site.start(Quarantine="on", binary=faulty_build, env={"FAULT": "link:1:0:-1"},
                   **settings)
    return start


def halted(site):
    """The children that have halted."""
    found = []
    for pid in site.daemon.children():
        with contextlib.suppress(OSError), open("/proc/%d/stat" % pid) as file:
            if file.read().rsplit(")", 1)[1].split()[0] == "T":
                found.append(pid)
    return found


@contextlib.contextmanager
def copy_halted(site):
    """While the block runs, such a child has halted; it continues at the end of the
    block."""
    pid, = until(lambda: halted(site), "a copy is made")
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_quarantine_copy_whose_client_is_gone_is_logged(site, start_halting):
    """The client closes while the copy is made.  The copy has its line in the
    log."""
    start_halting()
    client = site.session()
    client.submit(BAD)
    with copy_halted(site):
        client.reset()
        turns(site)                     # the daemon has noticed
    until(lambda: not site.daemon.children(), "the copy is done")
    until(lambda: len(os.listdir(site.spool)) ==
          len(site.daemon.log("quarantined virus file as: ")),
          "as many lines as files")
    site.daemon.allowed.update(os.listdir(site.spool))
    assert site.hop.messages == []


@pytest.mark.parametrize("action", ["drop", "pass"])
def test_client_gone_while_a_copy_is_made_ends_the_message(site, start_halting, action):
    """The client sends the message again, so this one gets no action and no
    verdict."""
    ran = site.path("ran")
    start_halting(Action=action, VirusAction=": >> " + ran)
    client = site.session()
    client.submit(BAD)
    with copy_halted(site):
        client.reset()
        turns(site)
    site.daemon.wait_log("^100000: CLIENT: gone before its message was forwarded$")
    site.daemon.wait_log("^100000: quarantined virus file as: ")
    until(lambda: not site.daemon.children(), "no child is left")
    site.daemon.allowed.update(os.listdir(site.spool))
    assert not os.path.exists(ran) and not site.daemon.log("status=")
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.conf.5 Quarantine: copy first")
def test_daemon_end_while_a_copy_is_made_leaves_none(site, start_halting):
    """The client received no 2xx.  It sends the message again, and then a copy is
    made."""
    start_halting()
    client = site.session()
    client.submit(BAD)
    with copy_halted(site):
        site.daemon.send_signal(signal.SIGTERM)
        site.daemon.wait_log("stopping when")
        site.daemon.send_signal(signal.SIGTERM)
        assert client.reply().code == "421"
    site.daemon.stop()
    assert os.listdir(site.spool) == []


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut",
    "clamsmtpd.8 FILES: /tmp/clamsmtpd.XXXXXX")
def test_copy_that_takes_longer_than_time_out_is_killed(site, start_halting):
    """A child that never continues is killed after TimeOut, and none of its files
    is left."""
    start_halting(TimeOut="1")
    client = site.session()
    client.submit(BAD)
    until(lambda: halted(site), "a copy is made")
    name, = os.listdir(site.spool)
    assert re.fullmatch(r"clamsmtpd\.\w{6}", name)
    client.expect("451 4.3.0 Local Error")
    until(lambda: not site.daemon.children(), "the child is killed")
    until(lambda: os.listdir(site.spool) == [], "its file is removed")
    assert site.daemon.log("quarantine in %s: no copy was made within" % site.spool)


COPIES = 8                  # at once


def test_copies_more_than_eight_wait(site, faulty_build):
    """PROMISE 6: eight children make copies; the others start after those."""
    site.start(Quarantine="on", binary=faulty_build, env={"FAULT": "link:1:1:-1"})
    clients = [site.session() for _ in range(COPIES + 3)]
    for i, client in enumerate(clients):    # the last one has to wait
        client.submit(BAD)
        until(lambda: len(halted(site)) == min(i + 1, COPIES), "the first copies")
    never(lambda: len(site.daemon.children()) > COPIES, "one more")
    clients[-1].reset()

    def all_done():
        for pid in halted(site):
            os.kill(pid, signal.SIGCONT)
        return len(os.listdir(site.spool)) == COPIES + 2 and \
            not site.daemon.children()
    until(all_done, "the copies")
    for client in clients[:-1]:
        client.expect("250 2.0.0 Virus Detected")
    site.daemon.allowed.update(os.listdir(site.spool))


def test_copy_that_waits_longer_than_time_out_is_451(site, faulty_clock):
    """A session waits for its turn no longer than TimeOut."""
    settings = faulty_clock.settings()
    settings["env"]["FAULT"] = "link:1:1:-1"
    site.start(Quarantine="on", **settings)
    clients = [site.session() for _ in range(COPIES + 1)]
    for client in clients:
        client.submit(BAD)
    until(lambda: len(halted(site)) == COPIES, "the first copies")
    site.clamd.wait_scans(COPIES + 1)
    turns(site)
    faulty_clock.go(site.daemon, 180)
    for client in clients:
        client.expect("451 4.3.0 Local Error")
    reason = "quarantine in %s: no copy was %%s within TimeOut$" % site.spool
    assert len(site.daemon.log(reason % "made")) == COPIES
    assert len(site.daemon.log(reason % "begun")) == 1
    until(lambda: not site.daemon.children(), "the children are killed")


@pytest.mark.covers("clamsmtpd.conf.5 MaxConnections: descriptors")
def test_copies_are_counted_in_the_limit_of_descriptors(site):
    """The pipe of each copy takes one of the daemon's descriptors."""
    def needed(**settings):
        daemon = site.refused(MaxConnections="65535", preexec=lambda: (
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
            ctypes.CDLL(None).prctl(24, 24)),           # without CAP_SYS_RESOURCE
            **settings)
        return int(re.search(r"needs (\d+) descriptors", daemon.text()).group(1))
    assert needed(Quarantine="on") == needed() + COPIES


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP],
                         ids=errno.errorcode.get)
def test_quarantine_without_link_makes_the_same_copy(site, faulty_build, error):
    """A file system without hard links (FAT, some FUSE) works as well."""
    site.start(Quarantine="on", binary=faulty_build,
               env={"FAULT": "link:1:1:%d" % error})
    site.session().mail(body=BAD, want="250 2.0.0 Virus Detected")
    name, = os.listdir(site.spool)
    site.daemon.allowed.add(name)
    path = os.path.join(site.spool, name)
    assert site.daemon.log("quarantined virus file as: %s$" % re.escape(path))
    with open(path, "rb") as file:
        same(file.read(), BAD)
    assert os.stat(path).st_mode & 0o7777 == 0o600


def test_quarantine_without_link_killed_halfway_leaves_nothing(site, faulty_build):
    """PROMISE 7: the empty file that has the copy's name is removed as well."""
    site.start(Quarantine="on", TimeOut="1", binary=faulty_build,
               env={"FAULT": "link:1:1:1 rename:1:0:-1"})
    client = site.session()
    client.submit(BAD)
    until(lambda: halted(site), "a copy is made")
    assert len(os.listdir(site.spool)) == 2
    client.expect("451 4.3.0 Local Error")
    until(lambda: os.listdir(site.spool) == [], "both files are removed")


def test_quarantine_killed_between_link_and_unlink_leaves_nothing(
        site, faulty_build):
    """PROMISE 7: both names of the copy are removed."""
    # With Faults the calls of the daemon and of its child are counted together.
    site.start(Quarantine="on", TimeOut="1", binary=faulty_build,
               env=Faults(site.path("faults"), "unlink:1:0:-1").env)
    client = site.session()
    client.submit(BAD)
    until(lambda: halted(site), "a copy is made")
    assert len(os.listdir(site.spool)) == 2
    client.expect("451 4.3.0 Local Error")
    until(lambda: os.listdir(site.spool) == [], "both files are removed")


def test_directory_without_fsync_is_good_enough_for_a_copy(site, faulty_build):
    """On some network file systems fsync(2) of a directory fails with EINVAL."""
    site.start(Quarantine="on", binary=faulty_build,
               env={"FAULT": "fsync:2:0:%d" % errno.EINVAL})
    site.session().mail(body=BAD, want="250 2.0.0 Virus Detected")
    site.daemon.allowed.update(os.listdir(site.spool))


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: quarantine in DIRECTORY: ...")
@pytest.mark.parametrize("fault, why", [
    ("pread:2:0:5", "copy: (I/O|Input/output) error"),
    ("fsync:1:0:5", "fsync: (I/O|Input/output) error"),
    ("link:1:0:1 rename:1:0:30", "link or rename: Read-only file system"),
    ("link:1:0:17", "link or rename: File exists"),
    ("fsync:2:0:5", "fsync of the directory: (I/O|Input/output) error"),
    ("mkostemp:1:0:13", "Permission denied"),
    ("pipe2:2:0:24", "No file descriptors available|Too many open files"),
    ("fork:1:0:11", "Resource temporarily unavailable")])
def test_quarantine_that_fails_logs_the_reason(site, faulty_build, fault, why):
    """The log has the error of each failure, and no file is left."""
    site.start(Quarantine="on", binary=faulty_build, env={"FAULT": fault})
    site.session().mail(body=LARGE + EICAR + b"\r\n",
                        want="451 4.3.0 Local Error")
    site.daemon.wait_log("^100000: quarantine in %s: (%s)$" % (site.spool, why))
    until(lambda: os.listdir(site.spool) == [], "half of a copy is removed")


@pytest.mark.parametrize("farewell", ["421 4.3.2 bye", "500 what", CLOSE])
@pytest.mark.parametrize("action, want", [("drop", "250 2.0.0 Virus Detected"),
                                          ("bounce", "550 5.7.1 Virus")])
def test_virus_reply_is_sent_whatever_the_next_hop_says(
        site, action, want, farewell):
    """Without it the client would send the message again for ever, and each one
    would be kept."""
    noop, verdict = Hold(farewell), Hold(VIRUS + " FOUND")
    site.hop.on("NOOP", [noop])
    site.clamd.verdict = [verdict]
    site.start(Action=action, Quarantine="on", KeepAlives="1")
    client = site.session()
    client.submit(GOOD)
    noop.reached()
    verdict.go()
    site.daemon.wait_log("status=VIRUS")
    noop.go()
    client.expect(want)
    site.daemon.allowed.update(os.listdir(site.spool))
    assert len(os.listdir(site.spool)) == 1 and site.hop.messages == []


def test_next_hop_gone_while_a_copy_is_made_changes_no_reply(
        site, start_halting):
    noop = Hold("421 4.3.2 bye")
    verdict = Hold(VIRUS + " FOUND")
    site.hop.on("NOOP", [noop])
    site.clamd.verdict = [verdict]
    start_halting(KeepAlives="1")
    client = site.session()
    client.submit(GOOD)
    noop.reached()
    verdict.reached()
    verdict.go()
    with copy_halted(site):
        noop.go()
        site.daemon.wait_log("421 4.3.2 bye")
    client.expect("250 2.0.0 Virus Detected")
    site.daemon.wait_log("status=VIRUS")
    site.daemon.allowed.update(os.listdir(site.spool))
    assert len(os.listdir(site.spool)) == 1 and site.hop.messages == []


# ---------------------------------------------------------------- spool

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: error at the dot",
    "clamsmtpd.8 DIAGNOSTICS: message will be refused: ...")
@pytest.mark.core
def test_spool_that_cannot_be_made_gives_the_error_at_the_dot(site):
    """The body is never read as commands."""
    site.start()
    client = site.session()
    client.envelope()
    os.rename(site.spool, site.spool + ".away")
    client.cmd("DATA", "354")
    client.send(LARGE + b"NOOP\r\nRSET\r\nQUIT\r\n")
    line, = site.daemon.wait_log("^100000: message will be refused: 451")
    os.rename(site.spool + ".away", site.spool)
    client.send(b"NOOP\r\n.\r\n")
    assert client.expect("451 4.3.0 Local Error").text == line.split(": ", 2)[2]
    verbs = site.hop.sessions[0].verbs()
    assert verbs[:3] == ["EHLO", "MAIL", "RCPT"] and "NOOP" not in verbs
    client.mail(body=GOOD)
    assert len(site.hop.messages) == 1
    client.quit()


# ---------------------------------------------------------------- VirusAction

@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: CLIENT",
    "clamsmtpd.8 VIRUS ACTIONS: EMAIL", "clamsmtpd.8 VIRUS ACTIONS: RECIPIENTS",
    "clamsmtpd.8 VIRUS ACTIONS: REMOTE", "clamsmtpd.8 VIRUS ACTIONS: REMOTE_HELO",
    "clamsmtpd.8 VIRUS ACTIONS: SENDER", "clamsmtpd.8 VIRUS ACTIONS: SERVER",
    "clamsmtpd.8 VIRUS ACTIONS: TMPDIR", "clamsmtpd.8 VIRUS ACTIONS: VIRUS")
@pytest.mark.core
def test_action_variables_describe_the_message(site):
    result = environment(site, Quarantine="on")
    client = site.session(source="127.0.0.7")
    client.cmd("XFORWARD NAME=mail.example ADDR=192.0.2.5 HELO=their.name", "250")
    client.mail(sender="a@example.com", to=["b@example.com", "c@example.com"],
                body=BAD, want="250 2.0.0 Virus")
    client.quit()
    env = result()
    name, = os.listdir(site.spool)
    site.daemon.allowed.add(name)
    assert {k: env[k].rstrip("\n") for k in NINE} == {
        "CLIENT": "127.0.0.7", "SERVER": "127.0.0.1",
        "SENDER": "a@example.com",
        "RECIPIENTS": "b@example.com\nc@example.com",
        "REMOTE": "192.0.2.5", "REMOTE_HELO": "their.name",
        "TMPDIR": site.spool, "VIRUS": VIRUS,
        "EMAIL": os.path.join(site.spool, name)}


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: EMAIL",
    "clamsmtpd.8 VIRUS ACTIONS: REMOTE")
@pytest.mark.core
def test_action_variables_that_are_unknown_are_unset(site):
    stale = {"EMAIL": "stale", "REMOTE": "stale", "REMOTE_HELO": "stale",
             "SENDER": "stale", "KEPT": "yes"}
    result = environment(site, env=stale)
    client = site.session()
    client.mail(sender="", body=BAD, want="250 2.0.0 Virus")
    client.quit()
    env = result()
    assert not {"EMAIL", "REMOTE", "REMOTE_HELO"} & set(env)
    assert env["SENDER"] == "<>" and env["KEPT"] == "yes"
    assert "PATH" in env


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: CLIENT",
    "clamsmtpd.8 VIRUS ACTIONS: RECIPIENTS")
def test_action_has_local_as_client_and_accepted_recipients_only(site):
    site.hop.on("RCPT", lambda s, line: "550 no" if "no@" in line else None)
    result = environment(site, Listen=site.path("in.sock"))
    client = site.session()
    client.cmd("MAIL FROM:<a@b>", "250")
    for rcpt, want in ("no@d", "550"), ("c@d", "250"), ("no@f", "550"):
        client.cmd("RCPT TO:<%s>" % rcpt, want)
    client.data(BAD, "250 2.0.0 Virus")
    client.quit()
    env = result()
    assert (env["CLIENT"], env["RECIPIENTS"].split()) == ("local", ["c@d"])


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: SENDER")
@pytest.mark.parametrize("command, name, want", [
    ("MAIL FROM:<\"$(touch x)`y`;'>\"@b>", "SENDER", "\"$(touch x)`y`;'>\"@b"),
    ("MAIL FROM:<a=b;c@d> SIZE=5", "SENDER", "a=b;c@d"),
    ("MAIL FROM:a@b", "SENDER", "a@b"),
    ("mail from: <a@b>  BODY=8BITMIME", "SENDER", "a@b"),
])
def test_action_sender_is_bare_text(site, command, name, want):
    result = environment(site)
    client = site.session()
    client.cmd(command, "250")
    client.cmd("RCPT TO:<c@d>", "250")
    client.data(BAD, "250 2.0.0 Virus")
    client.quit()
    assert result()[name] == want


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: printable")
def test_action_variables_have_no_control_characters(site):
    """PROMISE 8: control characters of the client reach no variable."""
    result = environment(site)
    site.clamd.verdict = b"stream: Evil \x07X=y\x1b FOUND\0"
    client = site.session()
    client.cmd(b"XFORWARD ADDR=192.0.2.5+0AREMOTE_HELO=x HELO=a+1B+0Ab", "250")
    client.cmd(b"MAIL FROM:<a\x1b\x07b@c>", "250")
    client.cmd(b"RCPT TO:<x\x0by\xffz@c>", "250")
    client.data(BAD, "250 2.0.0 Virus")
    client.quit()
    env = result()
    for key in NINE:
        if key in env:
            assert not re.search(r"[\x00-\x1f\x7f]", env[key].rstrip("\n")), key
    assert (env["SENDER"], env["RECIPIENTS"].strip()) == ("a??b@c", "x?y?z@c")


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: each virus",
    "clamsmtpd.8 VIRUS ACTIONS: exit status", "clamsmtpd.conf.5 VirusAction")
def test_action_runs_for_each_virus_and_for_no_clean_mail(site):
    out = site.path("count")
    site.start(VirusAction="echo x >> %s" % out)
    client = site.session()
    client.mail(body=GOOD)
    for _ in range(3):
        client.mail(body=BAD, want="250 2.0.0 Virus")
        client.mail(body=GOOD)
    until(lambda: os.path.exists(out) and
          open(out).read() == "x\n" * 3, "three actions have run")
    client.quit()
    site.daemon.settle()
    assert not site.daemon.log("VirusAction: ")


@pytest.mark.covers("clamsmtpd.conf.5 VirusAction",
    "clamsmtpd.8 VIRUS ACTIONS: each virus")
def test_action_is_run_by_bin_sh(site):
    out = site.path("out")
    command = finish_file("readlink /proc/$$/exe; tr '\\0' '\\n' < /proc/$$/cmdline", out)
    site.start(VirusAction=command)
    site.session().mail(body=BAD, want="250 2.0.0 Virus")
    program, name, *rest = wait_file(out).decode().splitlines()
    assert program == os.path.realpath("/bin/sh") and os.path.basename(name) == "sh"
    assert rest == ["-c", command]


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: each virus")
@pytest.mark.parametrize("action", ["bounce", "pass", "drop"])
def test_action_runs_whatever_the_action_setting(site, action):
    out = site.path("ran")
    site.start(Action=action, VirusAction=": > %s" % out)
    client = site.session()
    client.envelope()
    client.data(BAD, "2" if action != "bounce" else "550")
    wait_file(out)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: descriptors and process group")
@pytest.mark.core
def test_action_descriptors_signals_and_group(site):
    """An action starts with the same descriptors, signals and group as a child of
    init."""
    out = site.path("out")
    site.start(VirusAction=finish_file("ls -l /proc/$$/fd; cat /proc/self/status "
                                       "/proc/self/stat", out))
    clients = [site.session() for _ in range(3)]
    clients[0].mail(body=BAD, want="250 2.0.0 Virus")
    text = wait_file(out).decode()
    links = dict(re.findall(r" (\d+) -> (.*)", text))
    assert links == dict.fromkeys("012", "/dev/null")
    assert re.search(r"SigBlk:\s0+\n", text)
    # 32 and 33 are libc's own, and no program can reset them
    ignored = int(re.search(r"SigIgn:\s(\w+)\n", text).group(1), 16)
    assert ignored & 0x7fffffff == 0
    fields = re.search(r"\n\d+ \(cat\) (.*)", text).group(1).split()
    group = int(fields[2])
    assert group not in (site.daemon.pid, os.getpgid(0), os.getpgid(site.daemon.pid))
    for client in clients:
        client.quit()


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: reply does not wait")
@pytest.mark.core
def test_action_that_runs_delays_no_reply(site):
    go = site.path("go")
    out = site.path("done")
    site.start(VirusAction="while [ ! -e %s ]; do sleep 0.05; done; : > %s"
               % (go, out))
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.mail(body=GOOD)
    client.quit()
    assert not os.path.exists(out)
    open(go, "w").close()
    wait_file(out)


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: 8 run, 64 wait")
def test_actions_more_than_eight_wait(site):
    go, out = site.path("go"), site.path("out")
    site.start(VirusAction="echo s >> %s; while [ ! -e %s ]; do sleep 0.05; done;"
               "echo e >> %s" % (out, go, out))
    client = site.session()
    for _ in range(12):
        client.mail(body=BAD, want="250 2.0.0 Virus")

    def text():
        try:
            return open(out).read()
        except OSError:
            return ""
    until(lambda: text().count("s") >= 8, "eight actions")
    never(lambda: text().count("s") > 8, "a ninth action")
    open(go, "w").close()
    until(lambda: text().count("e") == 12, "the others too")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: 8 run, 64 wait")
def test_actions_more_than_sixty_four_waiting_are_logged_and_not_run(site):
    """PROMISE 6: eight actions run and 64 wait.  The log has a line for each
    further one."""
    go, out = site.path("go"), site.path("out")
    site.start(VirusAction="while [ ! -e %s ]; do sleep 0.05; done; echo e >> %s"
               % (go, out))
    client = site.session()
    for _ in range(8 + 64 + 3):
        client.mail(body=BAD, want="250 2.0.0 Virus")
    assert len(site.daemon.wait_log("VirusAction: not run", 3)) == 3
    open(go, "w").close()
    until(lambda: os.path.exists(out) and
          open(out).read().count("e") >= 8 + 64, "those that waited have run")
    client.quit()
    site.daemon.settle()
    assert open(out).read().count("e") == 8 + 64


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: TimeOut", "clamsmtpd.conf.5 TimeOut")
def test_action_at_time_out_gets_sigterm_with_its_group(site, clock):
    started = site.path("started")
    site.start(VirusAction="sleep 1000 & : > %s; sleep 1000" % started,
               **clock.settings())
    site.session().mail(body=BAD, want="250 2.0.0 Virus")
    wait_file(started)
    clock.go(site.daemon, 180)
    until(lambda: processes(site.daemon.mark) == [site.daemon.pid],
          "the action and its own child are gone")


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: TimeOut")
@pytest.mark.parametrize("ignores", ["trap '' TERM; sleep 1000 & {}; wait",
                                     "(trap '' TERM; sleep 1000) & {}; wait"],
                         ids=["it", "its child"])
def test_action_that_ignores_sigterm_is_killed_with_its_group(site, clock, ignores):
    """SIGKILL follows five seconds later.  A child that outlives its parent gets it
    at once."""
    started = site.path("started")
    site.start(VirusAction=ignores.format(": > " + started), **clock.settings())
    site.session().mail(body=BAD, want="250 2.0.0 Virus")
    wait_file(started)
    until(lambda: len(processes(site.daemon.mark)) == 3, "the action and its child")
    clock.go(site.daemon, 179)
    site.session().mail()
    assert len(processes(site.daemon.mark)) == 3
    clock.go(site.daemon, 1)
    site.daemon.wait_log("VirusAction: exceeded TimeOut, stopped: ")
    if ignores.startswith("trap"):
        clock.go(site.daemon, 4)
        site.session().mail()
        assert len(processes(site.daemon.mark)) == 3
        clock.go(site.daemon, 1)
    until(lambda: processes(site.daemon.mark) == [site.daemon.pid], "they are gone")


@pytest.mark.parametrize("command", [
    "exit 0", "exit 3", "kill -KILL $$", "sleep 0.1 & exit", "head -c 9000000 /dev/zero",
    "head -c 9000000 /dev/zero >&2", "cat", "(trap '' TERM; sleep 0.1 &)",
])
def test_action_children_are_reaped_and_delay_nobody(site, command):
    """As process 1 of a container, the daemon inherits the children that an action
    leaves."""
    libc = ctypes.CDLL(None)
    ran = site.path("ran")
    site.start(VirusAction="echo x >> %s; %s" % (ran, command),
               preexec=lambda: libc.prctl(36, 1))       # PR_SET_CHILD_SUBREAPER
    client = site.session()
    for _ in range(10):
        client.mail(body=BAD, want="250 2.0.0 Virus")
    client.mail(body=GOOD)
    client.quit()
    until(lambda: os.path.exists(ran) and os.path.getsize(ran) == 20, "ten actions")
    site.daemon.settle()


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: exit status",
    "clamsmtpd.8 DIAGNOSTICS: VirusAction: ...")
@pytest.mark.parametrize("command, why", [
    ("/no/such/program; exit 77", "exit status 77"), ("kill -9 $$", "killed by signal 9"),
    ("exit 3 # \u20ac", "exit status 3")], ids=str)
def test_action_that_fails_is_named_in_the_log(site, command, why):
    """The log has the command, since it may change over time."""
    site.start(VirusAction=command)
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.mail(body=GOOD)
    client.quit()
    site.daemon.wait_log("^100000: VirusAction: %s: %s$" % (
        why, re.escape(command)))


@pytest.mark.covers("clamsmtpd.8 SIGNALS: nothing left behind",
    "clamsmtpd.8 VIRUS ACTIONS: end of the daemon")
def test_action_still_running_at_the_end_is_killed(site, clock):
    """At the end an action has eight seconds, as messages have."""
    started = site.path("started")
    site.start(VirusAction=": > %s; sleep 1000" % started, **clock.settings())
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    wait_file(started)
    client.quit()
    site.daemon.send_signal(signal.SIGTERM)
    site.daemon.wait_log("^stopping")
    clock.go(site.daemon, 7)
    assert len(processes(site.daemon.mark)) > 1
    clock.go(site.daemon, 1)
    site.daemon.wait_exit()
    site.daemon.stop()
    assert site.daemon.log("^100000: VirusAction: killed, the daemon ends: : > ")


@pytest.mark.covers("clamsmtpd.8 LOGGING: to=...",
    "clamsmtpd.8 VIRUS ACTIONS: RECIPIENTS")
def test_action_recipients_too_many_are_cut_after_a_whole_one(site):
    """PROMISE 6: the kernel accepts 128 KiB in a variable.  The log says that
    RECIPIENTS was cut."""
    result = environment(site, level=3)
    rcpts = ["recipient%05d@example.com" % i for i in range(10000)]
    client = site.session()
    client.cmd("MAIL FROM:<a@example.com>", "250")
    for i in range(0, len(rcpts), 500):
        client.send("".join("RCPT TO:<%s>\r\n" % r for r in rcpts[i:i + 500]))
        for _ in range(500):
            client.expect("250")
    client.data(BAD, "250 2.0.0 Virus")
    client.quit()
    got = result()["RECIPIENTS"].split("\n")
    assert got.pop() == "..." and got == rcpts[:len(got)]
    assert (64 << 10) - 100 < len("\n".join(got)) <= 64 << 10
    assert len(site.daemon.log("^100000: too many recipients")) == 1
    line, = site.daemon.log("status=VIRUS")
    assert re.search(r"to=recipient\d{5}@example\.com, to=\.\.\., status=VIRUS:", line)


def test_action_remote_is_cleared_after_each_message(site):
    out = site.path("out")
    site.start(VirusAction="echo \"${REMOTE-unset} ${REMOTE_HELO-unset}\" >> %s" % out)
    client = site.session()
    client.cmd("XFORWARD ADDR=192.0.2.5 HELO=their.name", "250")
    client.mail(body=BAD, want="250 2.0.0 Virus")
    until(lambda: os.path.exists(out) and open(out).read(), "the first action")
    client.mail(body=BAD, want="250 2.0.0 Virus")
    until(lambda: open(out).read().count("\n") == 2, "the second action")
    assert open(out).read() == "192.0.2.5 their.name\nunset unset\n"
    client.quit()
