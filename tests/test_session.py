"""Whole sessions: limits, deadlines, several messages, peers that go away."""

import fcntl
import os
import re
import signal
import socket
import struct
import termios
import threading
import time

import pytest

from harness import (BAD, CLOSE, Client, Early, Faults, HEADER, Hold, NextHop, RESET, Stream,
                     Then, VIRUS, WAIT, at_once, full_listener, has_ipv6, never, same, turns, until)

BODY = b"Subject: x\r\n\r\nhello\r\n"
SOME = b"Subject: x\r\n\r\nsome\r\n"
# 1 MB, or less if each byte is a system call.
LONG = b"Subject: x\r\n\r\n" + (b"y" * 98 + b"\r\n") * (
    2000 if os.environ.get("TEST_BYTES") else 10000)


@pytest.fixture
def narrow(site):
    """A next hop on a unix socket.  The buffer of a unix socket does not grow, so
    that LONG does not fit."""
    site.hop = site.new_hop(path=site.path("hop.sock"))
    return site.hop


# ---------------------------------------------------------------- the log

@pytest.mark.covers("clamsmtpd.8 LOGGING: line of a message",
    "clamsmtpd.8 LOGGING: CLEAN")
@pytest.mark.core
def test_log_lines_of_a_message_are_the_originals(site):
    """PROMISE 9: the lines are those of ClamSMTP 1.10."""
    site.start(level=3)
    client = site.session()
    client.mail(to=["b@example.com", "c@example.com"])
    client.mail(sender="", to="d@example.com")
    client.quit()
    site.daemon.wait_log("from=<>")
    lines = site.daemon.log("^1000")
    assert lines[:3] == [
        "100000: accepted connection from: 127.0.0.1",
        "100000: from=a@example.com, to=b@example.com, to=c@example.com, "
        "status=CLEAN",
        "100000: from=<>, to=d@example.com, status=CLEAN"]


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: session number",
    "clamsmtpd.8 LOGGING: session number", "clamsmtpd.8 LOGGING: CLEAN")
def test_log_lines_with_the_number_of_a_session_have_its_reason(site):
    """Of two sessions at the same time, the lines with the number of one have the
    address of its client, the status, and the reason for its failure."""
    site.hop.on(".", ["452 4.3.1 full"])
    site.start(level=3)
    clients = [site.session(source="127.0.0.%d" % n) for n in (2, 3)]
    for client, want in zip(clients, ("452", "250")):
        client.mail(sender=want + "@example.com", want=want)
        client.quit()
    log = "\n".join(site.daemon.log())
    by_address = re.findall(r"(?m)^(\w+): accepted connection from: 127\.0\.0\.2$", log)
    by_status = re.findall("(?m)^(.*): from=452@example.com, .*, status=CLEAN$", log)
    assert by_address == by_status == ["100000"]
    assert site.daemon.log("^100000: ") == [
        "100000: accepted connection from: 127.0.0.2",
        "100000: from=452@example.com, to=b@example.com, status=CLEAN",
        "100000: SERVER: refused the message: 452 4.3.1 full"]


@pytest.mark.covers("clamsmtpd.8 LOGGING: session number")
def test_connections_are_numbered_in_hexadecimal(site):
    for _ in range(11):
        site.session().quit()
    site.daemon.wait_log("^10000A: accepted connection from: 127.0.0.1$")


@pytest.mark.covers("clamsmtpd.8 LOGGING: escapes")
@pytest.mark.parametrize("command, want", [
    ("MAIL FROM:<a@b> SIZE=5", "from=a@b, "),
    ("MAIL FROM: <a@b>", "from=a@b, "),
    ("MAIL FROM:a@b", "from=a@b, "),
    ("mail from:<\"a b\"@c>", "from=\"a\\x20b\"@c, "),
    ("MAIL FROM:<>", "from=<>, "),
    ("MAIL FROM:<@x,@y:a@b>", "from="),
])
def test_log_has_bare_addresses(site, command, want):
    """The addresses contain no blanks either, since report scripts count fields."""
    client = site.session()
    client.cmd(command, "250")
    client.cmd("RCPT TO:<c@d> NOTIFY=NEVER", "250")
    client.data(BODY)
    line, = site.daemon.wait_log("status=")
    assert line.startswith("100000: " + want)
    assert line.endswith("to=c@d, status=CLEAN")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 LOGGING: escapes")
def test_log_is_one_harmless_line_whatever_is_in_the_addresses(site):
    """PROMISE 8: addresses with control characters leave one harmless line."""
    client = site.session()
    client.cmd(b"MAIL FROM:<a\x1b[2J\x07%s%n\xff@b>", "250")
    client.cmd(b"RCPT TO:<" + b"r" * 5000 + b"@d>", "250")
    client.data(BODY)
    line, = site.daemon.wait_log("status=CLEAN$")
    assert line == r"100000: from=a\x1B[2J\x07%s%n\xFF@b, to=..., status=CLEAN"
    assert "\x1b" not in site.daemon.text() and "\x07" not in site.daemon.text()
    client.quit()


def test_refused_recipients_are_not_in_the_log_line(site):
    site.hop.on("RCPT", lambda s, line: "550 no" if "no@" in line else None)
    client = site.session()
    client.cmd("MAIL FROM:<a@b>", "250")
    client.cmd("RCPT TO:<no@d>", "550")
    client.cmd("RCPT TO:<c@d>", "250")
    client.data(BODY)
    line, = site.daemon.wait_log("status=")
    assert line == "100000: from=a@b, to=c@d, status=CLEAN"
    client.quit()


# ---------------------------------------------------------------- several mails

@pytest.mark.core
def test_second_message_has_nothing_of_the_first(site):
    site.start(Action="pass")
    client = site.session()
    client.mail(sender="one@x", to=["two@x", "three@x"],
                body=b"First: 1\r\n\r\nEICAR" + b"z" * 5000 + b"\r\n")
    client.mail(sender="four@x", to="five@x", body=b"A: b\r\n\r\nshort\r\n")
    client.mail(sender="six@x", to="seven@x", body=b"")
    first, second, third = site.hop.messages
    assert second.mail == "MAIL FROM:<four@x>"
    assert second.rcpts == ["RCPT TO:<five@x>"]
    same(second.body, b"A: b\r\n" + HEADER + b"\r\nshort\r\n")
    same(third.body, HEADER)
    same(site.clamd.scans[1].mail, b"A: b\r\n\r\nshort\r\n")
    same(site.clamd.scans[2].mail, b"")
    site.daemon.wait_log("from=four@x, to=five@x, status=CLEAN$")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 LOGGING: CLEAN", "clamsmtpd.8 LOGGING: VIRUS:name",
    "clamsmtpd.8 LOGGING: CLAMAV-ERROR")
@pytest.mark.core
def test_verdicts_of_each_kind_in_one_session_are_logged(site):
    site.clamd.verdict = [None, VIRUS + " FOUND", b"NOTOK\0", None, CLOSE, None]
    client = site.session()
    for want in ("250 2.0.0 queued", "250 2.0.0 Virus", "451", "250 2.0.0 queued",
                 "451", "250 2.0.0 queued"):
        client.mail(want=want)
    assert len(site.hop.messages) == 3
    client.quit()
    assert [line.split("status=")[1] for line in site.daemon.log("status=")] == [
        "CLEAN", "VIRUS:" + VIRUS, "CLAMAV-ERROR", "CLEAN", "CLAMAV-ERROR", "CLEAN"]


def test_rset_forgets_the_envelope(site):
    client = site.session()
    client.envelope(sender="old@x", to="old@y")
    client.cmd("RSET", "250")
    client.mail(sender="new@x", to="new@y")
    message, = site.hop.messages
    assert message.mail == "MAIL FROM:<new@x>"
    site.daemon.wait_log("from=new@x, to=new@y, status=CLEAN$")
    client.quit()


@pytest.mark.core
def test_sessions_at_the_same_time_are_all_intact(site):
    """All 5 messages of each of 60 sessions arrive intact."""
    site.start()

    def work(n):
        client = site.session()
        for m in range(5):
            client.mail(body=b"Subject: %d.%d\r\n\r\n" % (n, m) +
                        b"%d " % n * 500 + b"\r\n")
        client.quit()
    at_once(work, 60)
    bodies = sorted(m.body for m in site.hop.messages)
    want = sorted(b"Subject: %d.%d\r\n" % (n, m) + HEADER + b"\r\n" +
                  b"%d " % n * 500 + b"\r\n" for n in range(60) for m in range(5))
    assert bodies == want


# ---------------------------------------------------------------- limits

@pytest.mark.covers("clamsmtpd.8 When something fails: MaxConnections reached",
    "clamsmtpd.conf.5 MaxConnections: 421")
@pytest.mark.core
def test_maxconnections_reached_is_421_until_a_client_leaves(site):
    site.start(MaxConnections="3")
    clients = [site.session() for _ in range(3)]
    extra = site.client()
    extra.expect("421 4.3.2 Server busy, too many connections")
    extra.eof(allow_reset=True)
    assert len(site.hop.sessions) == 3
    clients.pop().quit()

    def again():
        client = site.client()
        return client.reply().code == "220"
    until(again, "a place is free")
    for client in clients:
        client.cmd("NOOP", "250")
        client.quit()


def test_maxconnections_421_is_not_lost_to_a_reset(site):
    """Bytes that are unread at close would make the kernel send an RST."""
    site.start(MaxConnections="2")
    clients = [site.session() for _ in range(2)]
    site.daemon.pause()
    extra = site.client()
    extra.send(b"EHLO me\r\n" * 2000)
    site.daemon.resume()
    extra.expect("421 4.3.2")
    extra.eof()
    for client in clients:
        client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut")
@pytest.mark.core
def test_idle_client_gets_421_after_time_out(site, clock):
    site.start(**clock.settings())
    client = site.session()
    clock.go(site.daemon, 179)
    turns(site)
    assert not client.stream.more()
    clock.go(site.daemon, 1)
    client.expect("421 4.4.2")
    client.eof()
    site.hop.sessions[0].wait_end()


def test_command_that_never_ends_gets_421_after_time_out(site, clock):
    """PROMISE 6: TimeOut is for the whole line, not for each byte."""
    site.start(**clock.settings())
    client = site.session()
    for _ in range(2):
        client.send(b"N")
        turns(site)
        clock.go(site.daemon, 90)
    client.expect("421 4.4.2")


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut")
def test_client_silent_in_the_body_gets_421(site, clock):
    site.start(**clock.settings())
    client = site.session()
    client.begin(b"Subject: x\r\n")
    turns(site)
    clock.go(site.daemon, 180)
    client.expect("421 4.4.2")
    client.eof()
    site.hop.sessions[0].wait_end()
    assert site.hop.messages == []


LF_ALONE = ": client ends lines with LF alone"


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: CLIENT: ...")
@pytest.mark.parametrize("wire, why", [
    (b"Subject: x\n\nbody\n.\n", LF_ALONE), (b".\n", LF_ALONE), (b"\n", LF_ALONE),
    (b"Subject: x\r\n\r\nbody\r\n.\nQUIT\n", LF_ALONE),
    (b"Subject: x\n\nbody\n.\r\n", ""), (b"Subject: x\n\nbody", ""),
    (b"Subject: x\n\0", ""), (b"", ""), (b"Subject: x\r\n", ""),
])
def test_time_out_in_the_body_names_a_client_that_ends_lines_with_lf(
        site, clock, wire, why):
    """LF.LF does not end DATA, so the log says why the message never ended."""
    site.start(**clock.settings())
    client = site.session()
    client.begin(wire)
    turns(site)
    clock.go(site.daemon, 180)
    client.expect("421 4.4.2")
    line, = site.daemon.wait_log("CLIENT: network read operation timed out")
    assert line == "100000: CLIENT: network read operation timed out" + why
    assert site.hop.messages == []


@pytest.mark.parametrize("ending", ["half_close", "close", "reset"])
def test_end_of_a_client_that_ends_lines_with_lf_is_named(site, ending):
    """Most such devices close before TimeOut."""
    client = site.session()
    client.begin(b"Subject: x\n\nbody\n.\n")
    turns(site)
    getattr(client, ending)()
    line, = site.daemon.wait_log("CLIENT: gone before")
    assert line.endswith(LF_ALONE)
    site.hop.session.wait_end()
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut: slow client")
@pytest.mark.parametrize("sent", [1, 8800], ids=["a byte", "98 bytes a second"])
@pytest.mark.parametrize("how", ["DATA", "BDAT"])
def test_client_slower_than_100_bytes_a_second_gets_421(site, clock, how, sent):
    """PROMISE 6: single bytes do not keep a session open."""
    site.start(**clock.settings())
    client = site.session()
    client.envelope()
    if how == "DATA":
        client.cmd("DATA", "354")
    else:
        client.line("BDAT 100000 LAST")
    for _ in range(2):
        client.send(sent * b"x")
        turns(site)
        clock.go(site.daemon, 90)
    client.expect("421 4.4.2")
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut: slow client")
def test_client_that_is_slow_but_not_too_slow_is_waited_for(site, clock):
    """The client sends a little more than 100 bytes a second, for longer than
    TimeOut."""
    site.start(TimeOut="10", **clock.settings())
    client = site.session()
    client.begin()
    for _ in range(5):
        client.send(b"%0508d\r\n" % 0)
        turns(site)
        clock.go(site.daemon, 5)
        turns(site)
    client.send(b".\r\n")
    client.expect("250 2.0.0 queued")
    assert site.hop.messages[0].body.endswith(5 * (b"%0508d\r\n" % 0))
    client.quit()


def silent(s, line):
    return Hold()


def endless(s, line):
    """A reply of the next hop that comes in single bytes, without an end."""
    while True:
        s.hop.send(s.sock, b"2")
        time.sleep(0.01)


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut")
@pytest.mark.parametrize("answer", [silent, endless])
@pytest.mark.parametrize("verb", ["greeting", "EHLO", "MAIL", "RCPT", "DATA"])
def test_next_hop_without_a_whole_reply_gives_4xx_after_time_out(
        site, clock, verb, answer):
    """PROMISE 6: TimeOut is for the whole reply, not for each byte."""
    site.hop.on(verb, answer)
    site.start(TimeOut="300", **clock.settings())
    client = site.client()
    client.send(b"EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
    stages = ["greeting", "EHLO", "MAIL", "RCPT", "DATA"]
    replies = ["220", "250", "250", "250", "354"]
    for want in replies[:stages.index(verb) + (verb == "DATA")]:
        client.expect(want)
    if verb == "DATA":
        client.send(BODY + b".\r\n")
    if verb == "greeting":
        until(lambda: site.hop.accepted, "a connection to the next hop")
        site.client()
        site.daemon.wait_log("accepted connection", 2)      # it waits for its line
    else:
        until(lambda: verb in site.hop.session.verbs(), verb + " at the next hop")
    clock.go(site.daemon, 299)
    never(client.stream.more, "an answer before TimeOut", turns=5)
    clock.go(site.daemon, 1)
    client.expect("451 4.4.2" if verb == "DATA" else "421 4.4")
    client.eof()
    clock.go(site.daemon, 300)      # the other one's greeting may be due later


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut")
def test_next_hop_without_a_connection_gives_421_after_time_out(site, clock):
    with full_listener() as address:
        site.start(OutAddress=address, TimeOut="300", **clock.settings())
        client = site.client()
        site.daemon.wait_log("accepted connection")
        clock.go(site.daemon, 299)
        site.client()
        site.daemon.wait_log("accepted connection", 2)
        assert not client.stream.more()
        clock.go(site.daemon, 1)
        client.expect("421 4.4")
        client.eof()


@pytest.mark.covers("clamsmtpd.conf.5 TimeOut: 600 seconds")
def test_final_reply_is_awaited_for_ten_minutes(site, clock):
    """A shorter wait makes duplicates (RFC 5321 4.5.3.2.6).  The time counts from
    the dot of the client, whatever TimeOut is."""
    scan, final = Hold("OK"), Hold()
    site.clamd.verdict = [scan]
    site.hop.on(".", final)
    site.start(TimeOut="1", ScanTimeOut="600", **clock.settings())
    client = site.session()
    client.submit(BODY)
    scan.reached()
    clock.go(site.daemon, 300)
    scan.go()
    final.reached()
    clock.go(site.daemon, 290)
    never(client.stream.more, "an answer before the ten minutes", turns=5)
    clock.go(site.daemon, 10)
    client.expect("451 4.4.2")
    site.daemon.wait_log("it may have accepted the message$")
    site.daemon.wait_log("status=ERROR$")
    final.go()
    site.hop.session.wait_end()


class Hasty(NextHop):
    """A next hop that accepts a message at once and reads it later."""

    read, later = b"", Hold()

    def data(self, s):
        until(lambda: s.sock.recv(1 << 20, socket.MSG_PEEK).endswith(
            b"\r\n.\r\n"), "all has come")
        self.send(s.sock, b"250 taken\r\n")
        self.later.wait(self)
        while not self.read.endswith(b"\r\n.\r\n"):
            self.read += s.sock.recv(1 << 20)
        return b"250 taken\r\n"


def test_next_hop_never_gets_the_mail_of_another(site):
    """The pages of the spool that were sent are still in the socket's buffer."""
    def body(word):
        return b"Subject: x\r\n\r\n" + word * 5000 + b"\r\n"
    hasty = Hasty(host="127.0.0.2", port=site.hop.port)
    site.servers.append(hasty)
    site.start(OutAddress=str(site.hop.port))
    site.session(source="127.0.0.2").mail(body=body(b"mine "))
    site.session().mail(body=body(b"yours"))
    hasty.later.go()
    until(lambda: hasty.read.endswith(b"\r\n.\r\n"), "it reads")
    assert b"yours" not in hasty.read


@pytest.mark.parametrize("body", [BODY, LONG], ids=["short", "long"])
def test_final_reply_after_a_long_scan_is_awaited(site, clock, body):
    """PROMISE 1: otherwise each attempt would be delivered, and the client would
    send the message again."""
    scan, final = Hold("OK"), Hold()
    site.clamd.verdict = [scan]
    site.hop.on(".", final)
    site.start(ScanTimeOut="3600", **clock.settings())
    client = site.session()
    client.submit(body)
    scan.reached()
    clock.go(site.daemon, 700)
    scan.go()
    final.reached()
    clock.go(site.daemon, 170)
    never(client.stream.more, "an answer before TimeOut", turns=5)
    final.go()
    client.expect("250 2.0.0 queued")


def test_final_reply_that_comes_late_is_relayed(site, clock):
    hold = Hold()
    site.hop.on(".", hold)
    site.start(TimeOut="1", **clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 590)
    hold.go()
    client.expect("250 2.0.0 queued")


@pytest.mark.parametrize("by", [86400 * 365, -86400 * 365], ids=["on", "back"])
def test_wall_clock_set_changes_no_deadline(site, clock, by):
    """No deadline comes sooner or later when the wall clock is set."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(TimeOut="60", Header="X-Date: %d", **clock.settings())
    idle, client = site.session(), site.session()
    client.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 0, real=by)
    turns(site)
    assert not idle.stream.more() and not client.stream.more()
    hold.go()
    client.expect("250 2.0.0 queued")
    year = time.gmtime(time.time() + by).tm_year
    assert b" %d " % year in site.hop.messages[0].body, "the clock was set"
    clock.go(site.daemon, 60, real=-by)
    for one in idle, client:
        one.expect("421 4.4.2")


def test_client_that_stays_after_quit_is_closed_after_five_seconds(site, clock):
    site.start(**clock.settings())
    client = site.session()
    client.cmd("QUIT", "221")
    client.eof()
    clock.go(site.daemon, 5)
    site.daemon.settle()


@pytest.mark.parametrize("size", [10, 5000], ids=["short", "long"])
def test_client_that_never_reads_is_closed_at_time_out(site, clock, size):
    """PROMISE 6: the replies to this client take no more than a buffer."""
    site.hop.on("NOOP", "250 " + size * "x")
    # a unix socket's buffer does not grow
    site.start(TimeOut="100", Listen=site.path("in.sock"), **clock.settings())
    client = site.session()
    before = site.daemon.rss()
    client.sock.setblocking(False)

    def stuck():
        """The daemon reads no more of what we have sent."""
        try:
            while True:
                client.sock.send(b"NOOP\r\n" * 1000)
        except BlockingIOError:
            seen = site.hop.commands.count("NOOP")
            turns(site)
            return site.hop.commands.count("NOOP") == seen
    until(stuck, "the daemon waits for the client")
    assert site.daemon.grown(before) < 512
    site.daemon.rests()
    for _ in range(2):      # so that the client continues, and receives our last line
        clock.go(site.daemon, 100)
        turns(site)
    site.daemon.settle()


def test_clients_of_single_bytes_delay_nobody(site):
    """PROMISE 5: fifty clients send commands and bodies in single bytes."""
    over = threading.Event()
    slow = [site.session() for _ in range(50)]
    for client in slow[:25]:
        client.begin(SOME)

    def drip():
        while not over.wait(0.01):
            for client in slow:
                client.send(b"x")
    thread = threading.Thread(target=drip)
    thread.start()
    try:
        for _ in range(5):
            client = site.session()
            client.mail(body=LONG[:100000] + b"\r\n")
            client.quit()
    finally:
        over.set()
        thread.join()
    for client in slow[:25]:
        client.send(b"\r\n.\r\n")
        client.expect("250 2.0.0 queued")
    assert len(site.hop.messages) == 30


# ---------------------------------------------------------------- KeepAlives

def two_noops(site, clock):
    """The next hop gets a NOOP after 60 seconds, and another one after 60 more."""
    for count in 0, 1:
        turns(site)
        clock.go(site.daemon, 59)
        turns(site)
        assert site.hop.commands.count("NOOP") == count
        clock.go(site.daemon, 1)
        until(lambda: site.hop.commands.count("NOOP") == count + 1, "a NOOP")


@pytest.mark.covers("clamsmtpd.conf.5 KeepAlives")
@pytest.mark.core
def test_keepalives_while_the_client_is_slow_are_sent(site, clock):
    site.start(KeepAlives="60", **clock.settings())
    client = site.session()
    client.begin(SOME)
    two_noops(site, clock)
    client.send(b"end\r\n.\r\n")
    client.expect("250 2.0.0 queued")
    client.cmd("NOOP", "250 2.0.0 noop")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 KeepAlives")
@pytest.mark.core
def test_keepalives_while_clamd_is_slow_are_sent(site, clock):
    hold = Hold()
    site.clamd.verdict = [hold]
    site.start(KeepAlives="60", **clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    two_noops(site, clock)
    hold.go()
    client.expect("250 2.0.0 queued")
    client.quit()


@pytest.fixture
def noop_out(site):
    """A client whose message has its verdict while the next hop still owes the reply
    to a NOOP, and the Hold of this reply."""
    verdict, noop = Hold("OK"), Hold()
    site.clamd.verdict = [verdict]
    site.hop.on("NOOP", [noop])
    site.start(KeepAlives="1")
    client = site.session()
    client.submit(BODY)
    noop.reached()
    verdict.go()
    turns(site)
    return client, noop


def test_verdict_while_a_noop_is_out_waits_for_its_reply(site, noop_out):
    client, noop = noop_out
    assert "DATA" not in site.hop.sessions[0].verbs()
    noop.go()
    client.expect("250 2.0.0 queued")
    client.quit()


def test_client_gone_while_a_noop_is_out_sends_no_data(site, noop_out):
    """PROMISE 1: the next hop gets no DATA for a message that it will not get."""
    client, noop = noop_out
    client.reset()
    turns(site)
    noop.go()
    site.hop.sessions[0].wait_end()
    assert "DATA" not in site.hop.sessions[0].verbs()


@pytest.mark.covers("clamsmtpd.conf.5 KeepAlives: none by default")
def test_keepalives_unset_sends_none(site, clock):
    site.start(**clock.settings())
    client = site.session()
    client.begin(SOME)
    turns(site)
    clock.go(site.daemon, 179)
    turns(site)
    clock.go(site.daemon, 1)
    client.expect("421 4.4.2")
    assert "NOOP" not in site.hop.commands


@pytest.mark.parametrize("where", ["body", "chunk", "scan"])
def test_keepalive_due_within_half_a_line_uses_no_cpu(site, clock, where):
    """PROMISE 6: NOOP has to wait for the rest of the line, and the daemon sleeps
    meanwhile."""
    verdict = Hold("OK")
    site.clamd.verdict = [verdict]
    site.hop = site.new_hop(chunking=True)
    site.start(KeepAlives="10", **clock.settings())
    client = site.session()
    if where == "chunk":
        client.envelope()
        client.send(b"BDAT %d LAST\r\n" % len(BODY) + BODY[:-1])
    else:
        client.begin(BODY)
    if where == "scan":
        client.send(b".\r\n")
        verdict.reached()
    site.hop.sessions[0].sock.sendall(b"421 4.")
    turns(site)
    clock.go(site.daemon, 11)
    turns(site)
    site.daemon.rests()
    site.hop.sessions[0].sock.sendall(b"3.2 stopping\r\n")
    turns(site)
    if where != "scan":
        client.send(b"\n" if where == "chunk" else b".\r\n")
    client.expect("421 4.3.2 stopping")
    verdict.go()
    assert site.hop.messages == [] and "NOOP" not in site.hop.sessions[0].verbs()


@pytest.mark.parametrize("reply", ["421 4.4.2 timed out", "500 what", CLOSE])
def test_keepalive_that_fails_gives_the_error_at_the_dot(site, reply):
    site.hop.on("NOOP", reply)
    site.start(KeepAlives="1")
    client = site.session()
    client.begin(SOME)
    until(lambda: "NOOP" in site.hop.commands, "a NOOP")
    if reply is CLOSE:
        site.hop.session.wait_end()
    turns(site)
    assert not client.stream.more()
    client.send(b"NOOP\r\nend\r\n.\r\n")
    got = client.reply()
    assert got.code[0] == "4"
    assert site.hop.messages == []


# ---------------------------------------------------------------- draining

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: error at the dot",
    "clamsmtpd.8 When something fails: next hop lost during a message")
@pytest.mark.core
@pytest.mark.parametrize("what", ["421 4.3.2 shutting down", "close", "reset"])
def test_next_hop_lost_in_the_body_gives_the_error_at_the_dot(site, what):
    """PROMISE 1: the body is never read as commands either."""
    client = site.session()
    client.begin(SOME)
    sock = site.hop.session.sock
    if what == "close":
        sock.shutdown(2)
    elif what == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                        struct.pack("ii", 1, 0))
        sock.shutdown(2)
    else:
        sock.sendall(what.encode() + b"\r\n")
    turns(site)
    assert not client.stream.more()
    client.send(b"QUIT\r\nNOOP\r\nMAIL FROM:<x@y>\r\n" + b"z" * 100000 + b"\r\n")
    turns(site)
    assert not client.stream.more()
    client.send(b".\r\n")
    got = client.reply()
    assert got.code in ("421", "451")
    assert site.hop.messages == []
    site.daemon.wait_log(r"status=ERROR$")


def test_error_at_the_dot_is_sent_once_and_in_order(site):
    site.start(MaxScanSize="10K")
    client = site.session()
    client.begin(b"A: b\r\n\r\n" + b"x" * 50000 + b"\r\n.\r\nNOOP\r\n")
    for want in ("552", "250 2.0.0 noop"):
        client.expect(want)
    client.quit()


# ---------------------------------------------------------------- the replay

@pytest.mark.core
@pytest.mark.parametrize("reply, want", [
    ("552-5.3.4 too\n552 5.3.4 big", "552-5.3.4 too\n552 5.3.4 big"),
    ("451 4.3.0 disk full", "451 4.3.0 disk full"),
    ("250 2.0.0 thanks already", None), ("354 more", None),
    ("hello", None),
])
def test_reply_in_the_middle_of_the_replay_ends_it(site, narrow, reply, want):
    """A 4xx or 5xx is relayed as the verdict.  No other reply is, and no dot is
    sent."""
    site.hop.on("body", [Early(reply, after=1000)])
    client = site.session()
    client.submit(LONG)
    got = client.reply()
    if want:
        assert got.text == want
    else:
        assert got.code == "451"
    client.rest()
    session = site.hop.session
    session.wait_end()
    assert session.messages == [] and session.partial is not None


@pytest.mark.covers("clamsmtpd.8 DESCRIPTION: temporary error",
    "clamsmtpd.8 LOGGING: ERROR",
    "clamsmtpd.8 When something fails: next hop lost during a message")
@pytest.mark.core
@pytest.mark.parametrize("ending", [CLOSE, RESET], ids=["close", "reset"])
@pytest.mark.parametrize("after", [1, 100000])
def test_next_hop_gone_in_the_replay_is_451(site, narrow, ending, after):
    site.hop.on("body", [Early(ending, after=after)])
    client = site.session()
    client.submit(LONG)
    got = client.reply()
    assert got.code in ("451", "421")
    assert site.hop.messages == []
    site.daemon.wait_log(r"status=ERROR$")
    why, line = site.daemon.log("^100000: (SERVER: [^<>]|.*status=)")
    assert "SERVER: " in why and line.endswith("status=ERROR")


@pytest.mark.covers("clamsmtpd.8 When something fails: delivered twice")
@pytest.mark.core
@pytest.mark.parametrize("verb, ending", [
    ("DATA", CLOSE), ("DATA", RESET), (".", CLOSE), (".", RESET),
    (".", Then(b"250 2.0", CLOSE)), (".", Then(b"250-2.0.0 a\r\n", CLOSE)),
    (".", "not SMTP at all"), ("DATA", "not SMTP at all"),
])
def test_next_hop_gone_at_data_or_the_dot_is_451(site, verb, ending):
    """PROMISE 1: only a whole 2xx is an acceptance."""
    site.hop.on(verb, [ending])
    client = site.session()
    client.envelope()
    got = client.data(BODY, "4")
    assert got.code in ("451", "421")
    client.rest()
    site.daemon.wait_log(r"status=ERROR$")
    unknown = site.daemon.log("SERVER: .*: it may have accepted the message$")
    assert len(unknown) == (verb == ".")


def test_reply_421_at_data_or_the_dot_ends_the_session(site):
    for verb in ("DATA", "."):
        site.hop.on(verb, ["421-4.3.2 a\n421 4.3.2 b"])
        client = site.session()
        client.envelope()
        assert client.data(BODY, "421").text == "421-4.3.2 a\n421 4.3.2 b"
        client.eof()


def stall(hop):
    """The next hop sends 354 and reads nothing until the Hold's go()."""
    gate = Hold()
    read = hop.data

    def stalled(s):
        if s is hop.sessions[0]:
            gate.wait(hop)
        return read(s)
    hop.data = stalled
    return gate


def test_next_hop_slow_gets_the_whole_message(site, narrow):
    gate = stall(narrow)
    client = site.session()
    client.submit(LONG)
    gate.reached()
    turns(site)
    gate.go()
    client.expect("250")
    same(site.hop.messages[0].body,
         LONG.replace(b"\r\n\r\n", b"\r\n" + HEADER + b"\r\n", 1))
    client.quit()


def test_replay_that_moves_is_not_late(site, narrow, clock):
    """TimeOut is for each piece.  Here two of them take longer than TimeOut."""
    # more than goes out in one turn, into a buffer
    piece = 300_000 if os.environ.get("TEST_BYTES") else 2_000_000

    def slowly(s):
        for count in 1, 2, 3:
            while len(s.stream.ahead) < count * piece:
                s.stream.fill()
            clock.go(site.daemon, 100)
        return read(s)
    read, narrow.data = narrow.data, slowly
    site.start(**clock.settings())
    client = site.session()
    client.begin(LONG * (4 * piece // len(LONG)) + b".\r\n")
    client.expect("250 2.0.0 queued")
    assert len(site.hop.messages) == 1
    client.quit()


def test_commands_without_end_during_the_scan_use_no_cpu(site):
    """PROMISE 6: while a buffer is full, poll() is not called for it."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    client = site.session()
    client.submit(BODY)
    hold.reached()
    client.send(b"NOOP\r\n" * 20000)
    turns(site)
    site.daemon.rests()
    client.reset()
    turns(site)
    hold.go()
    site.hop.sessions[0].wait_end()
    assert site.hop.messages == []


def test_half_a_reply_in_the_replay_uses_no_cpu(site, narrow):
    """The next hop could take more bytes, but the daemon sends none."""
    said, go = threading.Event(), threading.Event()

    def half(s):
        s.stream.fill()
        s.sock.sendall(b"45")
        said.set()
        while not go.wait(0.01):
            s.stream.ahead.clear()
            while s.stream.more():
                s.stream.fill()
                s.stream.ahead.clear()
        s.sock.sendall(b"2 4.3.1 full\r\n")
        while True:
            s.stream.fill()
    narrow.data = half
    client = site.session()
    client.begin(LONG * 20 + b".\r\n")
    assert said.wait(WAIT)
    turns(site)
    site.daemon.rests()
    go.set()
    client.expect("452 4.3.1 full")
    client.rest()
    assert site.hop.messages == []


def test_half_a_reply_in_the_replay_that_never_ends_is_451(site, narrow, clock):
    """PROMISE 6: TimeOut ends the wait, and the next hop has received no dot."""
    def half(s):
        s.stream.fill()
        s.sock.sendall(b"250 2.0.0 earl")
        while True:
            s.partial = bytes(s.stream.ahead)
            s.stream.fill()
    narrow.data = half
    site.start(**clock.settings())
    client = site.session()
    client.begin(LONG * 20 + b".\r\n")
    until(lambda: narrow.session.partial, "half a reply")
    turns(site)
    clock.go(site.daemon, 179)
    turns(site)
    assert not client.stream.more()
    clock.go(site.daemon, 1)
    client.expect("451 4.4.2")
    client.rest()
    site.hop.sessions[0].wait_end()
    assert not narrow.sessions[0].partial.endswith(b"\r\n.\r\n")


class Clogged:
    """A daemon that waits to send a message, its last bytes included.  From start()
    to go() each send() fails with EAGAIN, as on a full socket."""

    def __init__(self, site, program, fault="send:1:1:11"):
        self.site = site
        self.faults = Faults(site.path("faults"), fault, on=False)
        site.start(binary=program, env=self.faults.env)

    def start(self, client, body):
        hold = Hold()
        self.site.hop.on("DATA", [hold])
        client.submit(body)
        hold.reached()
        until(lambda: self.site.daemon.proc("State").startswith("S"),
              "the daemon sleeps in poll()")
        self.faults.switch(on=True)
        hold.go()
        until(lambda: self.site.hop.sessions[0].replies[-1:] == [b"354 go ahead\r\n"],
              "the next hop says 354")
        self.read()

    def say(self, text):
        """Let the next hop send this text."""
        self.site.hop.sessions[0].sock.sendall(text)

    def read(self):
        """Wait until the daemon has read all that the next hop has sent."""
        def unread():
            return struct.unpack("i", fcntl.ioctl(
                self.site.hop.sessions[0].sock, termios.TIOCOUTQ, bytes(4)))[0]
        until(lambda: not unread(), "the daemon reads what the next hop says")

    def go(self):
        self.faults.switch(on=False)


@pytest.fixture
def clogged(site, narrow, faulty_build):
    return Clogged(site, faulty_build)


@pytest.mark.parametrize("reply, want", [
    (b"250 2.0.0 early\r\n", "451 4.4.2"), (b"354 go on\r\n", "451 4.4.2"),
    (b"250-2.0.0 a\r\n250 2.0.0 b\r\n", "451 4.4.2"), (b"hello\r\n", "451 4.4.2"),
    (b"554-5.7.1 we\r\n554 5.7.1 refuse\r\n", "554 5.7.1 refuse"),
    (b"452 4.3.1 full\r\n", "452 4.3.1 full"),
])
@pytest.mark.parametrize("body", [BODY, LONG], ids=["short", "long"])
def test_half_a_reply_before_the_last_bytes_stops_them(
        site, clogged, reply, want, body):
    """PROMISE 1: a reply that began before the dot was sent is no reply to the
    message."""
    client = site.session()
    clogged.start(client, body)
    clogged.say(reply[:-5])
    clogged.read()
    clogged.go()
    turns(site)
    session = site.hop.sessions[0]
    assert not session.partial and not session.messages
    clogged.say(reply[-5:])
    client.expect(want)
    client.rest()
    session.wait_end()
    assert not session.partial and not session.messages


def test_reply_that_is_unread_when_the_last_bytes_leave_stops_them(
        site, narrow, faulty_build):
    """Input from the client wakes the session before the reply does."""
    # The daemon halts before poll(), and not between its last check and send().
    clogged = Clogged(site, faulty_build, "send:1:1:11 poll:1:1:-1")
    client = site.session()
    clogged.start(client, BODY)
    until(lambda: site.daemon.proc("State").startswith("T"), "the daemon halts")
    clogged.say(b"250 2.0.0 early\r\n")
    client.send(b"NOOP\r\n")
    clogged.go()
    site.daemon.resume()
    client.expect("451 4.4.2")
    client.rest()
    session = site.hop.sessions[0]
    session.wait_end()
    assert not session.partial and not session.messages


def test_spool_cut_short_is_451_at_once(site):
    """If the disk returns less than was written, no partial message is
    delivered."""
    hold = Hold()
    site.hop.on("DATA", [hold])
    site.start(DebugFiles="on")
    client = site.session()
    client.submit(LONG)
    hold.reached()
    name, = os.listdir(site.spool)
    site.daemon.allowed.add(name)
    os.truncate(os.path.join(site.spool, name), 5000)
    hold.go()
    assert client.reply().code == "451"
    assert not site.daemon.log("in time")
    site.hop.session.wait_end()
    assert site.hop.messages == []


# ---------------------------------------------------------------- client gone

ENDINGS = ["reset", "close", "half_close"]
# Endings that count as gone, so many seconds after the dot, and endings after which
# the client is still served.
GONE = [("reset", 0), ("reset", 60), ("close", 6), ("half_close", 6)]
SERVED = [("close", 0), ("half_close", 0), ("half_close", 5)]


def goes(site, clock, client, ending, seconds):
    """The client ends like this after so many seconds, and the daemon has
    noticed."""
    clock.go(site.daemon, seconds)
    turns(site)
    getattr(client, ending)()
    turns(site)


def leaves(site, client, ending, hold):
    """The client ends like this.  Then the held peer continues, and the session
    ends."""
    hold.reached()
    getattr(client, ending)()
    turns(site)
    hold.go()
    site.hop.sessions[0].wait_end()


@pytest.mark.covers("clamsmtpd.8 When something fails: clamsmtpd killed")
@pytest.mark.parametrize("stage", ["body", "scan"])
def test_daemon_killed_during_a_message_delivers_nothing(site, stage):
    """PROMISE 1: the client gets no reply and keeps the message."""
    hold = Hold()
    site.clamd.verdict = hold
    client = site.session()
    client.begin(SOME)
    if stage == "scan":
        client.send(b".\r\n")
        hold.reached()
    site.daemon.stop(want=-signal.SIGKILL, number=signal.SIGKILL)
    client.eof(allow_reset=True)
    site.hop.session.wait_end()
    assert site.hop.messages == [] and "DATA" not in site.hop.session.verbs()
    hold.go()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the last bytes")
@pytest.mark.core
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("sent", [b"", b"Subject: x\r\n\r\nhalf a bo",
                                  b"Subject: x\r\n\r\nbody\r\n",
                                  b"Subject: x\r\n\r\nbody\r\n.",
                                  b"Subject: x\r\n\r\nbody\r\n.\r"])
def test_client_gone_in_the_body_delivers_nothing(site, ending, sent):
    """PROMISE 1: no final dot is sent for a client that went away before its
    dot."""
    client = site.session()
    client.begin(sent)
    getattr(client, ending)()
    site.hop.session.wait_end()
    assert site.hop.messages == [] and site.clamd.scans == []
    assert "DATA" not in site.hop.commands


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the last bytes",
    "clamsmtpd.8 DIAGNOSTICS: CLIENT: ...")
@pytest.mark.core
@pytest.mark.parametrize("ending, seconds", GONE)
@pytest.mark.parametrize("tail", [b"", b"QUI"])
def test_client_gone_during_the_scan_delivers_nothing(
        site, clock, ending, seconds, tail):
    """The client sends EOF or a reset before the scan ends."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(**clock.settings())
    client = site.session()
    client.begin(BODY + b".\r\n" + tail)
    hold.reached()
    goes(site, clock, client, ending, seconds)
    site.hop.sessions[0].wait_end()
    hold.go()
    site.daemon.wait_log("^100000: CLIENT: gone before its message was forwarded$")
    assert site.hop.messages == []
    assert "DATA" not in site.hop.sessions[0].verbs()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: early close is served")
@pytest.mark.core
@pytest.mark.parametrize("ending", ["close", "half_close"])
@pytest.mark.parametrize("tail", [b"", b"QUI"])
def test_dot_and_eof_in_one_go_is_served(site, ending, tail):
    """Printers and scripts send no QUIT and wait for no reply."""
    client = site.session()
    client.begin()
    site.daemon.pause()
    client.send(BODY + b".\r\n" + tail)
    getattr(client, ending)()
    site.daemon.resume()
    if ending == "half_close":
        client.expect("250 2.0.0 queued")
        client.eof()
    site.hop.wait_messages(1)
    site.hop.session.wait_end()
    site.daemon.wait_log("to=b@example.com, status=CLEAN$")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: early close is served")
@pytest.mark.parametrize("ending, seconds", SERVED)
@pytest.mark.parametrize("action, want", [("pass", "250 2.0.0 queued"),
                                          ("drop", "250 2.0.0 Virus"),
                                          ("bounce", "550 5.7.1 Virus")])
def test_eof_soon_after_the_dot_is_served_during_the_scan(
        site, clock, ending, seconds, action, want):
    """The message is delivered however long clamd and the next hop then take."""
    hold, final = Hold(VIRUS + " FOUND"), Hold()
    site.clamd.verdict = [hold]
    site.hop.on(".", [final])
    site.start(Action=action, **clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    goes(site, clock, client, ending, seconds)
    clock.go(site.daemon, 100)
    turns(site)
    hold.go()
    if action == "pass":
        final.reached()
        clock.go(site.daemon, 100)
        final.go()
    if ending == "half_close":
        client.expect(want)
        client.eof()
    site.daemon.wait_log("to=b@example.com, status=VIRUS:")
    site.hop.sessions[0].wait_end()
    assert len(site.hop.messages) == (action == "pass")


def test_reset_after_an_early_eof_is_gone(site):
    """A half-close does not mean that the client stays."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    client = site.session()
    client.submit(BODY)
    hold.reached()
    client.half_close()
    turns(site)
    leaves(site, client, "reset", hold)
    assert site.hop.messages == []
    assert "DATA" not in site.hop.sessions[0].verbs()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: early close is served")
@pytest.mark.core
def test_eof_after_quit_after_the_dot_is_served(site):
    hold = Hold("OK")
    site.clamd.verdict = hold
    client = site.session()
    client.begin(BODY + b".\r\nQUIT\r\n")
    client.half_close()
    hold.reached()
    turns(site)
    hold.go()
    client.expect("250 2.0.0 queued")
    client.expect("221")
    client.eof()
    assert len(site.hop.messages) == 1


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the last bytes",
    "clamsmtpd.8 THE SMTP DIALOGUE: early close is served")
@pytest.mark.core
@pytest.mark.parametrize("tail", [b"QUIT\r\n", b"NOOP\r\nQU"])
def test_late_eof_after_a_complete_command_is_served(site, clock, tail):
    """PROMISE 1: a client that has sent its next command waits for the reply to its
    message, however late its EOF comes."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(**clock.settings())
    client = site.session()
    client.begin(BODY + b".\r\n" + tail)
    hold.reached()
    goes(site, clock, client, "half_close", 60)
    hold.go()
    client.expect("250 2.0.0 queued")
    site.hop.wait_messages(1)


@pytest.mark.core
@pytest.mark.parametrize("tail, want", [
    ("X\r\n", ["500"]), ("NOOP\r\n", ["250 2.0.0 noop"]),
    ("X\r\nNOOP\r\n", ["500", "250 2.0.0 noop"]),
    ("NOOP\r\nX\r\n", ["250 2.0.0 noop", "500"]),
    ("NOOP\r\nQUIT\r\n", ["250 2.0.0 noop", "221"]),
])
def test_half_closed_client_gets_all_replies(site, tail, want):
    """A lost 250 makes a duplicate."""
    client = site.session()
    client.begin(BODY + b".\r\n" + tail.encode())
    client.half_close()
    for line in ["250 2.0.0 queued"] + want:
        client.expect(line)
    client.eof()
    assert len(site.hop.messages) == 1


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the last bytes")
@pytest.mark.core
@pytest.mark.parametrize("ending, seconds", GONE)
def test_client_gone_in_the_replay_delivers_nothing(
        site, narrow, clock, ending, seconds):
    """The next hop has stopped reading, so the dot has not been sent."""
    gate = stall(narrow)
    site.start(**clock.settings())
    client = site.session()
    client.submit(LONG)
    gate.reached()
    turns(site)
    goes(site, clock, client, ending, seconds)
    gate.go()
    site.hop.sessions[0].wait_end()
    assert site.hop.messages == []


@pytest.mark.parametrize("ending, seconds", SERVED)
def test_eof_soon_after_the_dot_is_served_in_the_replay(
        site, narrow, clock, ending, seconds):
    """This also holds for a next hop that reads slowly."""
    gate = stall(narrow)
    site.start(**clock.settings())
    client = site.session()
    client.submit(LONG)
    gate.reached()
    turns(site)
    goes(site, clock, client, ending, seconds)
    clock.go(site.daemon, 100)
    turns(site)
    gate.go()
    site.hop.wait_messages(1)
    site.hop.sessions[0].wait_end()


def test_reset_after_a_full_buffer_in_the_replay_delivers_nothing(site, narrow):
    """Commands that cannot be read yet hide the reset from poll()."""
    gate = stall(narrow)
    client = site.session()
    client.submit(LONG)
    gate.reached()
    client.send(b"NOOP\r\n" * 10000)
    turns(site)
    client.reset()
    turns(site)
    gate.go()
    site.hop.sessions[0].wait_end()
    assert site.hop.messages == []


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: reply awaited")
@pytest.mark.core
@pytest.mark.parametrize("ending", ENDINGS)
def test_client_gone_after_the_last_bytes_leaves_the_reply_awaited(site, ending):
    """The last bytes have been sent, so the daemon waits for the reply and logs
    it."""
    hold = Hold()
    site.hop.on(".", [hold])
    client = site.session()
    client.submit(BODY)
    leaves(site, client, ending, hold)
    site.daemon.wait_log(r"from=a@example.com, to=b@example.com, status=CLEAN$")
    assert len(site.hop.messages) == 1


def goes_while_data_is_out(site, clock, ending, seconds):
    """The client goes between the daemon's DATA and the 354 of the next hop."""
    hold = Hold()
    site.hop.on("DATA", [hold])
    site.start(**clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    goes(site, clock, client, ending, seconds)
    hold.go()


@pytest.mark.parametrize("ending, seconds", GONE)
def test_client_gone_while_data_is_out_delivers_nothing(
        site, clock, ending, seconds):
    """The next hop sends 354, and gets no byte of the message."""
    goes_while_data_is_out(site, clock, ending, seconds)
    site.hop.sessions[0].wait_end()
    assert site.hop.messages == [] and not site.hop.sessions[0].partial


@pytest.mark.parametrize("ending, seconds", SERVED)
def test_eof_soon_after_the_dot_is_served_while_data_is_out(
        site, clock, ending, seconds):
    """The message is sent after the next hop's 354."""
    goes_while_data_is_out(site, clock, ending, seconds)
    site.hop.wait_messages(1)
    site.hop.sessions[0].wait_end()


def test_client_gone_while_the_next_hop_does_not_accept_frees_its_place(site):
    with full_listener() as address:
        site.start(OutAddress=address)
        clients = [site.client() for _ in range(3)]
        site.daemon.wait_log("accepted connection", 3)
        for client, ending in zip(clients, ENDINGS):
            getattr(client, ending)()
        site.daemon.wait_log("CLIENT: gone before the greeting", 3)
        site.daemon.settle()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("verb", ["greeting", "EHLO", "MAIL", "RCPT"])
def test_client_gone_while_a_command_is_out_ends_the_session(site, verb, ending):
    hold = Hold()
    site.hop.on(verb, [hold])
    client = site.client()
    client.send("EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    leaves(site, client, ending, hold)
    assert site.hop.messages == []


@pytest.fixture
def ungreeted(site):
    """A client whose next hop has not sent its greeting yet."""
    hold = Hold()
    site.hop.on("greeting", hold)
    client = site.client()
    hold.reached()
    return client, hold


def frees_its_place(site, hold):
    """The daemon has ended the session, and serves the next client."""
    site.daemon.settle()
    hold.go()
    site.session().quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the greeting")
@pytest.mark.core
@pytest.mark.parametrize("sent", ["", "EHLO m"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_client_gone_before_the_greeting_frees_its_place(site, ungreeted, ending, sent):
    """EOF is enough if there is no whole command to answer."""
    client, hold = ungreeted
    client.send(sent)
    getattr(client, ending)()
    frees_its_place(site, hold)


def test_client_reset_before_the_greeting_with_commands_sent_frees_its_place(
        site, ungreeted):
    """A reset ends the session even if a whole command waits."""
    client, hold = ungreeted
    client.send("EHLO me\r\n")
    client.reset()
    frees_its_place(site, hold)


def test_client_reset_before_the_greeting_after_a_full_buffer_frees_its_place(
        site, ungreeted):
    """The daemon reads no more from the client, does not spin, and notices the
    reset."""
    client, hold = ungreeted
    client.send(b"NOOP\r\n" * 20000)
    site.daemon.rests()
    client.reset()
    frees_its_place(site, hold)


def test_client_half_closed_before_the_greeting_with_a_command_is_served(
        site, ungreeted):
    """A client may send its commands early and close its side."""
    client, hold = ungreeted
    client.send("EHLO me\r\n")
    client.half_close()
    site.daemon.rests()
    hold.go()
    client.expect("220")
    client.expect("250")
    client.eof()


def test_unix_client_gone_before_the_greeting_with_commands_does_not_spin(site):
    """poll() reports the end again and again while the daemon waits for the
    greeting."""
    hold = Hold()
    site.hop.on("greeting", hold)
    site.start(Listen=site.path("in.sock"))
    client = site.client()
    hold.reached()
    client.send(b"NOOP\r\n" * 10000)
    client.close()
    site.daemon.rests()
    hold.go()
    site.hop.session.wait_end()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: client gone before the greeting")
@pytest.mark.parametrize("verb", ["EHLO", "MAIL", "RSET"])
def test_client_reset_while_a_command_is_out_frees_its_place(site, verb):
    """The command is the daemon's own RSET, after a virus."""
    hold = Hold()
    site.hop.on(verb, [hold])
    client = site.client()
    client.send("EHLO me\r\n")
    if verb != "EHLO":
        client.expect("220")
        client.expect("250")
        if verb == "MAIL":
            client.line("MAIL FROM:<a@b>")
        else:
            client.submit(BAD)
    hold.reached()
    client.reset()
    frees_its_place(site, hold)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("state", ["command", "auth"])
def test_client_gone_after_half_a_line_of_the_next_hop_frees_its_place(
        site, state, ending):
    """The rest of the line may never come."""
    site.hop.ehlo.append("AUTH PLAIN")
    site.hop.on("NOOP", [b"250 ok\r\n42"])
    site.hop.on("AUTH", [b"334 \r\n42"])
    client = site.session()
    if state == "command":
        client.cmd("NOOP", "250")
    else:
        client.cmd("AUTH PLAIN", "334")
    site.daemon.rests()
    getattr(client, ending)()
    site.hop.session.wait_end()
    site.daemon.settle()


# ---------------------------------------------------------------- loopback

@pytest.mark.covers("clamsmtpd.8 LOOPBACK FEATURE: back to the client",
    "clamsmtpd.conf.5 ADDRESSES: default host",
    "clamsmtpd.conf.5 OutAddress: port without a host")
def test_outaddress_port_alone_leads_back_to_the_client(site):
    """The next hop is on the address from which the client connected."""
    first = site.new_hop(host="127.0.0.2")
    second = site.new_hop(host="127.0.0.3", port=first.port)
    site.start(OutAddress=str(first.port))
    for hop, address in (first, "127.0.0.2"), (second, "127.0.0.3"):
        client = site.session(source=address)
        client.mail("from@%s.example" % address)
        client.quit()
        message, = hop.messages
        assert message.mail == "MAIL FROM:<from@%s.example>" % address
        site.daemon.wait_log("accepted connection from: %s$" % address)


def test_outaddress_port_alone_leads_back_to_an_ipv6_client(site):
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    hop = site.new_hop(host="::1")
    site.start(Listen="[::1]:0", OutAddress=str(hop.port))
    client = site.session()
    client.mail()
    client.quit()
    assert len(hop.messages) == 1
    site.daemon.wait_log("accepted connection from: ::1$")


def test_outaddress_port_alone_leads_back_to_a_mapped_client(site):
    """An IPv4 client of an IPv6 listener counts as an IPv4 client."""
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    hop = site.new_hop(host="127.0.0.2")
    site.start(Listen="[::]:0", OutAddress=str(hop.port))
    port = site.daemon.address.rpartition(":")[2]
    client = site.session(address="127.0.0.1:" + port, source="127.0.0.2")
    client.mail()
    client.quit()
    assert len(hop.messages) == 1
    site.daemon.wait_log("accepted connection from: 127.0.0.2$")


def test_outaddress_port_alone_without_a_listener_gives_421(site):
    site.start(OutAddress=str(site.port()))
    client = site.client()
    client.expect("421 4.4.1")
    client.eof()


@pytest.mark.covers("clamsmtpd.8 Mail loops")
def test_loop_is_refused_with_421(site):
    """OutAddress is an address of the daemon itself."""
    port = site.port()
    site.start(Listen="127.0.0.1:%d" % port, OutAddress="127.0.0.1:%d" % port)
    client = site.client()
    client.expect("421")
    client.eof()
    site.daemon.wait_log("^100001: mail loop: ")
    assert len(site.daemon.log("accepted connection")) == 2


def test_loop_is_not_the_same_port_number(site):
    """The kernel can give one port to a client of ours and to our connection to the
    next hop, since their other ends differ."""
    IP_LOCAL_PORT_RANGE = 51             # Linux 6.3
    first = site.session()
    port = site.hop.session.sock.getpeername()[1]
    sock = socket.socket()
    sock.settimeout(WAIT)
    host, _, to = site.daemon.address.rpartition(":")
    try:
        sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE,
                        struct.pack("I", port << 16 | port))
        sock.connect((host, int(to)))
    except OSError as error:
        sock.close()
        pytest.skip("cannot choose the port: %s" % error)
    with sock:
        assert sock.getsockname()[1] == port
        assert sock.makefile("rb").readline().startswith(b"220 ")
    first.quit()


def test_outaddress_port_alone_leads_unix_clients_to_this_machine(site):
    site.start(Listen=site.path("in.sock"), OutAddress=str(site.hop.port))
    client = site.session()
    client.mail()
    client.quit()
    assert len(site.hop.messages) == 1


@pytest.mark.parametrize("name", [None, "bound.sock",
                                  "b\nclamsmtpd: x", "b\r\n\r\nX-Evil: y"])
def test_unix_client_is_local_whatever_it_is_bound_to(site, name):
    """PROMISE 8: the client chooses its own path, which could be a line of the log
    or of the header."""
    site.start(Listen=site.path("in.sock"), Header="X-From: %i")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT)
        if name:
            sock.bind(site.path(name))
        sock.connect(site.daemon.address)
        client = Client.__new__(Client)
        client.sock, client.stream = sock, Stream(sock)
        client.hello()
        client.mail(body=BODY)
        client.quit()
    assert b"\r\nX-From: local\r\n\r\n" in site.hop.messages[0].body
    assert site.daemon.log("^100000: accepted connection from: local$")
