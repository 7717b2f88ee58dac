"""Talking to clamd: streams, answers, failures, limits."""

import contextlib
import ctypes
import os
import re
import socket
import struct
import threading

import pytest

from harness import (BAD, CLOSE, Clamd, Drip, HEADER, Hold, LARGE, REFUSED, RESET,
                     Then, bind, build, full_listener, mounting, same, turns, until)

LINE = 28       # bytes of the line before the message
BODY = b"Subject: x\r\n\r\nhello\r\n.dot\r\n"


@pytest.fixture(params=["unix", "tcp"])
def clamd(request, site):
    """The clamd of the site, on a socket of either kind."""
    site.clamd = site.new_clamd(tcp=request.param == "tcp")
    return site.clamd


# ---------------------------------------------------------------- what it gets

@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress",
    "clamsmtpd.conf.5 ClamAddress: INSTREAM")
@pytest.mark.core
def test_clamd_on_any_socket_gets_a_stream(site, clamd):
    """clamd gets the message as INSTREAM, over a unix socket and over TCP."""
    client = site.session()
    client.mail(body=BODY)
    scan, = clamd.scans
    assert clamd.commands == [b"zINSTREAM\0"]
    same(scan.mail, BODY)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: default")
@pytest.mark.parametrize("size, want", [(2000, "250"), (2001, "552 5.3.4 Message too big")])
def test_message_longer_than_a_chunk_is_too_big(site, tmp_path, size, want):
    """clamd gets no message whose length has more than 32 bits.  The limit of this
    build is 2000 bytes."""
    site.start(binary=build(str(tmp_path / "small"), CPPFLAGS="-DMAXSTREAM=2000"))
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * (size - 10) + b"\r\n", want=want)
    client.quit()
    assert len(site.clamd.commands) == (want == "250")


@pytest.mark.skipif(bool(os.environ.get("TEST_BYTES")), reason="each byte is a segment")
@pytest.mark.parametrize("size, want", [(2000, 1), (16000, 1), (30000, 1), (40000, 2)])
def test_clamd_gets_a_small_message_in_one_segment(site, size, want):
    """Command, length, message and end are one write, except with a large
    message."""
    segments = []

    class Counting(Clamd):
        def judge(self, sock, scan, *rest):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
            segments.append(struct.unpack_from("I", info, 152)[0])  # tcpi_data_segs_in
            super().judge(sock, scan, *rest)
    site.clamd = Counting()
    site.servers.append(site.clamd)
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * size + b"\r\n")
    client.quit()
    assert segments == [want]


@pytest.mark.covers("clamsmtpd.8 FILES: /tmp/clamsmtpd.XXXXXX",
    "clamsmtpd.conf.5 DebugFiles")
def test_debugfiles_keeps_every_message(site):
    """The files of a clean, a large and an infected message are there after the end
    of the daemon."""
    site.start(DebugFiles="on")
    client = site.session()
    kept = []
    for body, want in (BODY, "250 2.0.0 queued"), (LARGE, "250 2.0.0 queued"), (
            BAD, "250 2.0.0 Virus"):
        client.mail(body=body, want=want)
        name, = set(os.listdir(site.spool)) - set(kept)
        kept.append(name)
        assert re.fullmatch(r"clamsmtpd\.\w{6}", name)
        with open(os.path.join(site.spool, name), "rb") as file:
            same(file.read(), site.clamd.scans[0].first + body)
        assert os.stat(os.path.join(site.spool, name)).st_mode & 0o777 == 0o600
    client.quit()
    site.daemon.allowed.update(kept)
    site.daemon.stop()
    assert sorted(os.listdir(site.spool)) == sorted(kept)


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: line for clamd")
@pytest.mark.core
def test_scan_line_is_constant_and_never_forwarded(site, clamd):
    """Without this line some orders of headers hide an attachment from
    libclamav."""
    client = site.session()
    client.mail(body=BODY)
    client.mail(body=b"A: b\r\n\r\nother\r\n")
    first = {scan.first for scan in clamd.scans}
    assert len(first) == 1
    assert re.fullmatch(rb"Received: [ -~]+\r\n", first.pop())
    for message in site.hop.messages:
        assert b"Received:" not in message.body
    client.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: what was scanned is forwarded")
@pytest.mark.core
def test_scanned_message_is_the_forwarded_one(site, clamd):
    """PROMISE 2: this holds with all changes that the daemon makes to a message."""
    site.start(Header="")
    client = site.session()
    client.begin(b"A: b\n\n..x\r\n.\r.y\r\n\0.\n\r\0z\xff\r\n.\r\n")
    client.expect("250")
    same(clamd.scans[0].mail, site.hop.messages[0].body)
    client.quit()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65535, 65536, 65537, 1 << 20])
def test_scanned_message_of_each_size_is_the_forwarded_one(site, clamd, size):
    client = site.session()
    body = b"A: b\r\n\r\n" + b"0123456789abcde\n" * (size // 16)
    body = (body + b"x" * 20)[:max(size, 8)] + b"\r\n"
    client.envelope()
    client.data(body.replace(b"\n", b"\r\n").replace(b"\r\r", b"\r"))
    same(clamd.scans[0].mail, site.hop.messages[0].body.replace(HEADER, b""))
    client.quit()


def test_clamd_is_connected_to_when_the_message_is_complete(site, clamd):
    client = site.session()
    client.begin(BODY)
    other = site.session()
    other.quit()
    assert clamd.accepted == 0
    client.send(b".\r\n")
    client.expect("250")
    assert clamd.accepted == 1
    client.quit()


# ---------------------------------------------------------------- answers

CLEAN = [
    b"stream: OK\0", Drip(b"stream: OK\0"),
]
FOUND = [
    (b"stream: Eicar-Test FOUND\0", "Eicar-Test"),
    (b"stream: {HEX}EICAR.TEST.3.UNOFFICIAL FOUND\0",
     "{HEX}EICAR.TEST.3.UNOFFICIAL"),
    (b"stream: Eicar(44d88612fea8a8f36de82e1278abb02f:68) FOUND\0",
     "Eicar(44d88612fea8a8f36de82e1278abb02f:68)"),
    (b"stream: OK FOUND\0", "OK"),
    (b"stream: x OK FOUND\0", "x_OK"),
    (b"stream: FOUND FOUND\0", "FOUND"),
    (Drip(b"stream: A.B FOUND\0"), "A.B"),
]
ERRORS = [
    b"fd[12]: OK\0", b"fd[12]: Eicar FOUND\0", b"UNKNOWN COMMAND\0", b"stream: OK",
    b"stream: NOTOK\0", b"NOTOK\0", b"stream: OK\n", b"OK\0",
    b"stream: ok\0", b"stream: \0", b"stream:\0", b"\0", b"", b"stream: FOUND\0",
    b"stream:  FOUND\0", b"stream: OK \0", b"stream: OK extra\0",
    b"stream: Eicar: OK\0", b"stream: x OK\0", b"stream: x FOUND: OK\0",
    b"stream: Eicar found\0",
    b"stream: Eicar FOUND", b"stream: Eicar FOUN", b"stream: Some reason ERROR\0",
    b"stream: Can't create temporary directory ERROR\0",
    b"COMMAND READ TIMED OUT\n", b"COMMAND UNAVAILABLE\0", b"PONG\0",
    b"x" * (1 << 20), b"stream: " + b"x" * 100000 + b" OK\0", b"stream:OK\0",
    b"stream OK\0", b"250 ok\r\n", b"stream: OK\r\n\0",
    b"stream: OK\0stream: X FOUND\0", b"stream: OK\nstream: X FOUND\0",
    b"stream: OK\0\n",
    b"stream: X FOUND\0stream: OK\0", b"stream: " + b"x" * 5000 + b" FOUND\0",
]


@pytest.mark.core
@pytest.mark.parametrize("answer", CLEAN, ids=lambda a: repr(
    a.reply if isinstance(a, Drip) else a))
def test_answer_ok_is_clean(site, answer):
    site.clamd.verdict = answer
    client = site.session()
    client.mail(body=BODY)
    site.daemon.wait_log(r"from=a@example.com, to=b@example.com, status=CLEAN$")
    client.quit()


@pytest.mark.core
@pytest.mark.parametrize("answer, name", FOUND, ids=lambda a: str(a)[:40]
                         if isinstance(a, str) else "")
def test_answer_found_is_a_virus(site, answer, name):
    site.clamd.verdict = answer
    client = site.session()
    client.mail(want="250 2.0.0 Virus Detected; Discarded Email")
    assert site.hop.messages == []
    line, = site.daemon.wait_log("status=VIRUS")
    assert line.endswith("status=VIRUS:" + name)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: exactly OK or FOUND",
    "clamsmtpd.8 When something fails: clamd down, slow or in error",
    "clamsmtpd.conf.5 ScanFailure", "clamsmtpd.conf.5 ScanFailure: tempfail")
@pytest.mark.core
@pytest.mark.parametrize("answer", ERRORS, ids=lambda a: repr(a[:40]))
def test_answer_of_any_other_form_is_an_error(site, clamd, answer):
    """PROMISE 4: only OK and FOUND are verdicts."""
    clamd.verdict = answer
    client = site.session()
    client.mail(want="451 4.3.0 Local Error")
    assert site.hop.messages == []
    assert "DATA" not in site.hop.commands
    site.daemon.wait_log(r"status=CLAMAV-ERROR$")
    clamd.verdict = None
    client.mail()
    assert len(site.hop.messages) == 1
    client.quit()


@pytest.mark.core
@pytest.mark.parametrize("what", [CLOSE, RESET, Then(b"stream: OK", RESET)],
                         ids=["closes", "resets", "half an answer"])
def test_clamd_that_closes_is_an_error(site, clamd, what):
    clamd.verdict = what
    client = site.session()
    client.mail(want="451 4.3.0 Local Error")
    assert site.hop.messages == []
    client.quit()


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_answer_is_read_though_clamd_reads_no_further(site, unix):
    """clamd closes with most of the stream unread, which causes EPIPE or a
    reset."""
    class Full(Clamd):
        def instream(self, sock, end):
            self.send(sock, b"Can't write to temporary file. ERROR\0")
    site.clamd = Full(path=site.path("clamd.sock") if unix else None)
    site.servers.append(site.clamd)
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 3000000 + b"\r\n",
                want="451 4.3.0 Local Error")
    site.daemon.wait_log("clamd .*Can't write to temporary file. ERROR")
    assert site.hop.messages == []
    client.quit()


@pytest.mark.core
@pytest.mark.parametrize("answer, want, status", [
    (b"stream: OK\0", "451 4.3.0 Local Error", "CLAMAV-ERROR"),
    (b"stream: Evil FOUND\0", "250 2.0.0 Virus Detected", "VIRUS:Evil")])
def test_answer_before_the_whole_message_is_never_clean(site, clamd, answer, want, status):
    """PROMISE 4: an OK after a part of the message is an error.  A virus name
    counts."""
    over = Hold()

    class Early(Clamd):
        def instream(self, sock, end):
            self.get(sock, 1000)
            self.send(sock, answer)
            over.wait(self)
    site.clamd = Early(path=clamd.path and site.path("early.sock"))
    site.servers.append(site.clamd)
    client = site.session()
    size = 500_000 if os.environ.get("TEST_BYTES") else 10_000_000
    client.mail(body=b"A: b\r\n\r\n" + b"x" * size + b"\r\n", want=want)
    assert site.hop.messages == []
    site.daemon.wait_log("status=%s$" % status)
    over.go()
    client.quit()


def test_answer_ok_before_the_last_bytes_leave_is_an_error(site, faulty_build):
    """PROMISE 4: clamd answers when it has all of the message but its end."""
    over, read = Hold(), []

    class Early(Clamd):
        def drain(self, sock):
            with contextlib.suppress(BlockingIOError):
                while True:
                    read.append(len(sock.recv(65536, socket.MSG_DONTWAIT)))

        def instream(self, sock, end):
            def halted():
                self.drain(sock)
                return site.daemon.proc("State").startswith("T")
            until(halted, "the daemon halts")
            self.drain(sock)
            self.send(sock, b"stream: OK\0")
            site.daemon.resume()
            over.wait(self)
    site.clamd = Early(path=site.path("early.sock"))
    site.servers.append(site.clamd)
    site.start(binary=faulty_build, env={"FAULT": "pread:1:0:-1"})
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 40000 + b"\r\n", want="451 4.3.0 Local Error")
    assert site.hop.messages == [] and 10000 < sum(read) < 40000
    site.daemon.wait_log("clamd .*: it sent OK before the end of the message$")
    over.go()
    client.quit()


@pytest.mark.parametrize("name", [b"Evil \x1b[2J\x07\xff%s%n", b"Evil\r\n221 bye",
                                  b"Evil\n250 ok"])
def test_virus_name_with_control_characters_is_harmless(site, name):
    """PROMISE 8: control characters reach neither the log nor the reply."""
    site.clamd.verdict = b"stream: " + name + b" FOUND\0"
    site.start(Action="bounce")
    client = site.session()
    client.envelope()
    got = client.data(BODY, "")
    assert got.code == "550" or b"\n" in name and got.code == "451", got
    assert len(got.lines) == 1 and "\x1b" not in got.text
    assert not re.search(rb"[^\x20-\x7e\r\n]", got.raw)
    client.cmd("NOOP", "250")
    line, = site.daemon.wait_log(r"status=(VIRUS:Evil|CLAMAV-ERROR)")
    assert len(line.split()) == 4, "report scripts count fields"
    assert not re.search(r"[\x1b\x07]", site.daemon.text())
    client.quit()


def test_virus_name_too_long_is_cut(site):
    site.clamd.verdict = b"stream: " + b"V" * 900 + b" FOUND\0"
    site.start(Action="bounce")
    client = site.session()
    client.submit(BODY)
    got = client.reply()
    assert got.code in ("451", "550")
    assert len(got.raw) <= 512
    assert site.hop.messages == []
    client.quit()


# ---------------------------------------------------------------- failures

@pytest.mark.covers("clamsmtpd.8 DESCRIPTION: temporary error",
    "clamsmtpd.8 LOGGING: CLAMAV-ERROR", "clamsmtpd.8 When something fails: clamd down, slow or in error",
    "clamsmtpd.conf.5 ScanFailure", "clamsmtpd.conf.5 ScanFailure: tempfail")
@pytest.mark.core
def test_clamd_unreachable_is_an_error(site, clamd):
    site.start()
    clamd.down()
    client = site.session()
    client.mail(want="451 4.3.0 Local Error")
    assert site.hop.messages == []
    assert "RSET" in site.hop.commands
    site.daemon.wait_log(r"status=CLAMAV-ERROR$")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: clamd ADDRESS: ...")
@pytest.mark.parametrize("verdict, reason", [
    (None, "connect: No such file or directory$"),
    (CLOSE, "connection closed without an answer"),
    (Then(b"stream: O", CLOSE), 'unexpected answer .*O" .incomplete.'),
    (b"COMMAND READ TIMED OUT\n", 'unexpected answer "COMMAND READ TIMED OUT"'),
    (b"stream: x OK\0", 'unexpected answer .*x OK"'),
    (b"x" * (1 << 20), "answer too long"),
    (b"stream: Can't allocate memory ERROR\0", "Can't allocate memory ERROR"),
], ids=["absent", "closes", "half", "time-out", "x OK", "1 MiB", "no memory"])
def test_clamd_failure_and_its_end_are_logged_once(site, verdict, reason):
    """There is not a line for each message.  The first message after the failure
    passes."""
    site.start(level=3)
    about = "^clamd " + re.escape(site.clamd.address)
    if verdict is None:
        site.clamd.down()
    site.clamd.verdict = verdict
    client = site.session()
    for _ in range(3):
        client.mail(want="451 4.3.0 Local Error")
    line, = site.daemon.log(about)
    assert re.search(reason, line)
    if verdict is None:
        site.clamd.up()
    site.clamd.verdict = None
    client.mail()
    client.mail()
    assert len(site.hop.messages) == 2
    assert site.daemon.log(about) == [line, "clamd %s: works again"
                                      % site.clamd.address]
    client.quit()


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: clamd ADDRESS: ...")
@pytest.mark.parametrize("tcp", [True, False])
def test_clamd_that_listens_no_more_is_connection_refused(site, tcp):
    """The address is a port, or a unix socket whose path is still there."""
    clamd = site.new_clamd(tcp=tcp)
    site.start(ClamAddress=clamd.address)
    clamd.down()
    with socket.socket(socket.AF_UNIX) as stale:
        if not tcp:
            stale.bind(clamd.path)
        site.session().mail(want="451 4.3.0 Local Error")
    assert site.daemon.log("^clamd %s: connect: %s$"
                           % (re.escape(clamd.address), REFUSED))


@pytest.mark.covers("clamsmtpd.8 DIAGNOSTICS: clamd ADDRESS: ...")
def test_clamd_complaint_is_repeated_once_a_minute(site, clock):
    """While messages fail, the log has the reason near each CLAMAV-ERROR."""
    site.start(**clock.settings())
    site.clamd.down()
    client = site.session()
    for lines in 1, 2, 3:
        client.mail(want="451")
        clock.go(site.daemon, 59)
        client.mail(want="451")
        assert len(site.daemon.log("^clamd .*: connect: No such file")) == lines
        clock.go(site.daemon, 1)


def test_no_free_slot_is_reported_beside_another_complaint(site, clock):
    """A message that never had a slot gets a 451 with that reason.  The log has the
    reason once a minute, although clamd has also failed for another reason."""
    hold = Hold("OK")
    site.clamd.verdict = ["sick ERROR", hold]
    site.start(MaxScans="1", ScanTimeOut="60", **clock.settings())
    one, two, three = (site.session() for _ in range(3))
    one.mail(want="451")
    for client in one, two, three:
        client.submit(BODY)
        turns(site)
    clock.go(site.daemon, 60)
    one.expect("451 4.3.0 Local Error (clamd: no verdict within ScanTimeOut)")
    for client in two, three:
        client.expect("451 4.3.0 Local Error (clamd: no free slot within ScanTimeOut)")
    assert len(site.daemon.log("^clamd .*: no free slot within ScanTimeOut; ")) == 1
    two.submit(BODY)
    turns(site)
    clock.go(site.daemon, 60)
    two.expect("451 4.3.0 Local Error (clamd: no free slot")
    assert len(site.daemon.log("^clamd .*: no free slot within ScanTimeOut; ")) == 2
    hold.go()


@pytest.mark.parametrize("scans", [10, 2])
def test_clamd_that_answers_nobody_is_logged_once(site, clock, scans):
    """The log says once that clamd is silent, and once that other messages wait for
    a slot."""
    hold = Hold("OK")
    site.clamd.verdict = hold
    site.start(level=3, MaxScans=scans, **clock.settings())
    clients = [site.session() for _ in range(4)]
    for i in 0, 2, 1, 3:                # the waiting ones are between the others
        clients[i].submit(BODY)
        turns(site)
    clock.go(site.daemon, 180)
    for client in clients:
        client.expect("451 4.3.0 Local Error")
    hold.go()
    lines = site.daemon.log("ScanTimeOut")
    assert lines and len(lines) == len(set(lines))
    site.clamd.wait_scans(min(scans, 4))
    until(lambda: not site.clamd.busy, "clamd has answered")
    clients[0].mail()
    for client in clients:
        client.quit()


def test_clamd_restarted_under_load(site):
    """A message that got 250 was delivered, and one that got 451 was not.  After
    the restart all sessions continue."""
    site.start()
    clients = [site.session() for _ in range(8)]
    codes, threads = [], []
    over = threading.Event()

    def work(client):
        while not over.is_set():
            client.submit(BODY)
            codes.append(client.reply().code)
    for client in clients:
        threads.append(threading.Thread(target=work, args=(client,)))
        threads[-1].start()

    def wait_more(code, count):
        before = codes.count(code)
        until(lambda: codes.count(code) >= before + count,
              "%d more replies %s" % (count, code))
    try:
        wait_more("250", 20)
        site.clamd.down()
        site.clamd.hang_up()
        wait_more("451", 20)
        site.clamd.up()
        wait_more("250", 20)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {"250", "451"}
    assert len(site.hop.messages) == codes.count("250")
    for client in clients:
        client.mail()


def test_clamd_away_at_start_is_a_warning(site):
    """The daemon starts without clamd."""
    site.clamd.down()
    site.start()
    client = site.session()
    client.cmd("NOOP", "250")
    client.quit()
    assert site.daemon.log("no clamd answers") == [
        "no clamd answers, and no message can be scanned until one does: "
        "clamd %s: No such file or directory" % site.clamd.address]


def test_clamd_that_answers_at_start_is_no_warning(site):
    """One clamd of several is enough, also after SIGHUP."""
    further = site.new_clamd()
    settings = dict(Listen=site.path("in.sock"), ClamAddress=[
        "/no/such/socket", site.clamd.address, further.address])
    site.start(**settings)
    until(lambda: site.clamd.pings, "a health check")
    site.reload(**settings)
    until(lambda: site.clamd.pings == 2, "a health check")
    turns(site)
    assert not site.daemon.log("no clamd answers")
    assert (site.clamd.versions, further.pings, further.versions) == (0, 0, 0)
    site.reload(Listen=settings["Listen"], ClamAddress="/no/such/socket")
    site.daemon.wait_log("no clamd answers.*clamd /no/such/socket: No such file")


def test_clamd_silent_at_start_is_a_warning_after_five_seconds(site, clock):
    """PROMISE 5: no session waits for this clamd."""
    with full_listener() as address:
        site.start(ClamAddress=address, **clock.settings())
        turns(site)
        clock.go(site.daemon, 4)
        turns(site)
        assert not site.daemon.log("no clamd answers")
        clock.go(site.daemon, 1)
        site.daemon.wait_log("no clamd answers.*no answer to PING in time")


def test_clamd_check_at_start_ends_with_the_daemon(site):
    """A daemon that is stopped during the check logs no warning."""
    with full_listener() as address:
        site.start(ClamAddress=address)
        turns(site)
        site.daemon.stop()
        assert not site.daemon.log("no clamd answers")


@pytest.mark.covers("clamsmtpd.8 When something fails: clamd down, slow or in error",
    "clamsmtpd.conf.5 ScanFailure", "clamsmtpd.conf.5 ScanFailure: tempfail",
    "clamsmtpd.conf.5 ScanTimeOut", "clamsmtpd.conf.5 ScanTimeOut: time-out")
@pytest.mark.core
def test_scan_time_out_gives_451(site, clamd, clock):
    """The time counts from the end of the message, which took a minute to arrive."""
    hold = Hold("OK")
    clamd.verdict = [hold]
    site.start(ScanTimeOut="60", **clock.settings())
    client = site.session()
    client.begin(BODY)
    turns(site)
    clock.go(site.daemon, 60)
    client.send(b".\r\n")
    hold.reached()
    clock.go(site.daemon, 59)
    turns(site)
    assert not client.stream.more()
    clock.go(site.daemon, 1)
    client.expect("451 4.3.0 Local Error")
    assert site.hop.messages == []
    site.daemon.wait_log(r"status=CLAMAV-ERROR$")
    client.mail()
    client.quit()
    hold.go()


@pytest.mark.covers("clamsmtpd.conf.5 ScanTimeOut: range and default")
def test_scan_time_out_unset_is_time_out(site, clock):
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(TimeOut="60", **clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 60)
    client.expect("451 4.3.0")
    hold.go()


def test_verdict_after_the_time_out_is_not_used(site, clock):
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(**clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 180)
    client.expect("451")
    hold.go()
    client.cmd("NOOP", "250")
    assert site.hop.messages == []
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Not scanned")
def test_scan_failure_resets_the_next_hop_and_the_session_goes_on(site):
    site.clamd.verdict = [CLOSE]
    client = site.session()
    client.mail(want="451")
    assert site.hop.session.verbs()[-1] == "RSET"
    client.mail()
    assert len(site.hop.messages) == 1
    client.quit()


# ---------------------------------------------------------------- failover

@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: first that is alive")
@pytest.mark.core
def test_several_clamds_the_first_alive_is_used(site):
    first, second = site.new_clamd(), site.new_clamd(tcp=True)
    site.start(ClamAddress=[first.address, second.address])
    client = site.session()
    client.mail()
    assert (len(first.scans), len(second.scans)) == (1, 0)
    first.down()
    client.mail()
    client.mail()
    assert (len(first.scans), len(second.scans)) == (1, 2)
    assert len(site.hop.messages) == 3
    assert not site.daemon.log("CLAMAV-ERROR")
    client.quit()


@pytest.mark.parametrize("what", [CLOSE, RESET, b"stream: Out of memory ERROR\0"])
def test_clamd_that_fails_in_a_scan_is_replaced_by_the_next(site, what):
    first, second = site.new_clamd(), site.new_clamd()
    first.verdict = what
    site.start(ClamAddress=[first.address, second.address])
    client = site.session()
    client.mail(body=BODY)
    assert len(second.scans) == 1
    same(second.scans[0].mail, BODY)
    assert len(site.hop.messages) == 1
    client.quit()


def test_second_clamd_finds_a_virus(site):
    first, second = site.new_clamd(), site.new_clamd(tcp=True)
    first.down()
    site.start(ClamAddress=[first.address, second.address])
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    assert site.hop.messages == []
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: dead clamd")
@pytest.mark.parametrize("back", [0, 1])
def test_all_clamds_dead_is_an_error(site, clock, back):
    """While all are dead, none is skipped: the one that comes back gets the next
    message."""
    clamds = [site.new_clamd(), site.new_clamd(tcp=True)]
    site.start(ClamAddress=[clamd.address for clamd in clamds], **clock.settings())
    for clamd in clamds:
        clamd.down()
    client = site.session()
    client.mail(want="451 4.3.0 Local Error")
    clamds[back].up()
    client.mail()
    assert len(clamds[back].scans) == 1
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: first that is alive",
    "clamsmtpd.conf.5 MaxScans")
def test_clamd_that_is_full_leaves_the_scan_to_the_next(site):
    """Each of the two clamds has at most two messages, the second one none before
    the first one is full.  A fifth message waits."""
    hold = Hold("OK")
    first, second = site.new_clamd(verdict=hold), site.new_clamd(verdict=hold)
    site.start(ClamAddress=[first.address, second.address], MaxScans="2")
    clients = [site.session() for _ in range(5)]
    for client, want in zip(clients, ((1, 0), (2, 0), (2, 1), (2, 2), (2, 2))):
        client.submit(BODY)
        turns(site)
        until(lambda: (first.accepted, second.accepted) == want, "%d and %d scans" % want)
    hold.go()
    for client in clients:
        client.expect("250")
        client.quit()


def test_clamd_dead_is_skipped_while_another_is_alive(site):
    first, second = site.new_clamd(verdict=CLOSE), site.new_clamd()
    site.start(ClamAddress=[first.address, second.address])
    client = site.session()
    for _ in range(5):
        client.mail()
    assert (first.accepted, len(second.scans)) == (1, 5)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: error")
def test_clamd_that_reports_an_error_is_used_again(site):
    """A clamd that could not scan one message gets the next one."""
    first, second = site.new_clamd(), site.new_clamd()
    first.verdict = [b"stream: Heuristics limits exceeded ERROR\0"]
    site.start(ClamAddress=[first.address, second.address])
    client = site.session()
    for _ in range(3):
        client.mail()
    assert (len(first.scans), len(second.scans)) == (3, 1)
    client.quit()


def test_clamd_dying_under_load_loses_no_mail(site):
    """clamd dies with scans under way and waiting, and then refuses connections."""
    first, second = site.new_clamd(), site.new_clamd()
    hold = Hold(CLOSE)
    first.verdict = hold
    site.start(ClamAddress=[first.address, second.address], MaxScans="4")
    clients = [site.session() for _ in range(6)]
    for client in clients[:4]:
        client.submit(BODY)
    hold.reached(4)
    second.verdict = Hold("OK")
    for client in clients[4:]:
        client.submit(BODY)
    second.verdict.reached(2)
    hold.go()
    second.verdict.go()
    for client in clients:
        client.expect("250 2.0.0 queued")
        client.mail()
        client.quit()
    assert first.accepted == 4 and len(second.scans) == 12


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: dead clamd")
def test_clamd_unreachable_is_skipped_for_half_a_minute(site, clock):
    first, second = site.new_clamd(), site.new_clamd()
    site.start(ClamAddress=[first.address, second.address], **clock.settings())
    first.down()
    client = site.session()
    client.mail()
    first.up()
    clock.go(site.daemon, 29)
    client.mail()
    assert (first.accepted, len(second.scans)) == (0, 2)
    clock.go(site.daemon, 1)
    client.mail()
    assert (len(first.scans), len(second.scans)) == (1, 2)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: dead clamd")
def test_clamd_dead_is_tried_again_every_half_minute(site, clock):
    """While another clamd is alive, a dead one gets one message every half
    minute."""
    first, second = site.new_clamd(verdict=CLOSE), site.new_clamd()
    site.start(ClamAddress=[first.address, second.address], **clock.settings())
    client = site.session()
    for attempts in 1, 2, 3:
        client.mail()
        client.mail()
        clock.go(site.daemon, 29)
        client.mail()
        assert first.accepted == attempts
        clock.go(site.daemon, 1)
    first.verdict = None
    client.mail()
    client.mail()
    assert (len(first.scans), len(second.scans)) == (5, 9)
    site.daemon.wait_log("works again")
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: one scan at a time")
def test_clamd_that_timed_out_gets_one_scan_until_it_answers(site, clock):
    """One clamd is silent, and a second one works.  After half a minute the first
    gets one message, and after its verdict it is used again."""
    silent, trial = Hold("OK"), Hold("OK")
    first, second = site.new_clamd(verdict=[silent, trial]), site.new_clamd()
    site.start(ClamAddress=[first.address, second.address], MaxScans="3",
               ScanTimeOut="60", **clock.settings())
    one, two = site.session(), site.session()
    one.submit(BODY)
    silent.reached()
    clock.go(site.daemon, 60)
    one.expect("451 4.3.0 Local Error (clamd: no verdict")
    clock.go(site.daemon, 30)
    one.submit(BODY)
    trial.reached()
    two.mail()
    two.mail()
    assert (first.accepted, len(second.scans)) == (2, 2)
    silent.go()
    trial.go()
    one.expect("250")
    first.verdict = trusted = Hold("OK")
    one.submit(BODY)
    two.submit(BODY)
    trusted.reached(2)
    trusted.go()
    one.expect("250")
    two.expect("250")
    assert len(second.scans) == 2


def test_clamd_on_trial_gets_the_next_scan_when_one_is_abandoned(site, clock):
    """A scan that this clamd does not finish blocks no other message."""
    hold = Hold("OK")
    site.clamd.verdict = [hold, hold]
    site.start(MaxScans="3", ScanTimeOut="60", **clock.settings())
    one, two, three = (site.session() for _ in range(3))
    one.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 60)
    one.expect("451")
    two.submit(BODY)
    hold.reached(2)
    clock.go(site.daemon, 10)
    three.submit(BODY)
    turns(site)
    assert site.clamd.accepted == 2
    clock.go(site.daemon, 50)
    two.expect("451")
    three.expect("250")
    hold.go()


@pytest.mark.covers("clamsmtpd.conf.5 ClamAddress: dead clamd")
def test_clamd_that_timed_out_is_left_alone_for_half_a_minute(site, clock):
    """This holds while another clamd is alive."""
    hold = Hold("OK")
    first, second = site.new_clamd(verdict=[hold]), site.new_clamd()
    site.start(ClamAddress=[first.address, second.address], ScanTimeOut="60",
               **clock.settings())
    client = site.session()
    client.submit(BODY)
    hold.reached()
    clock.go(site.daemon, 60)
    client.expect("451")
    client.mail()
    clock.go(site.daemon, 29)
    client.mail()
    assert (first.accepted, len(second.scans)) == (1, 2)
    clock.go(site.daemon, 1)
    client.mail()
    assert (first.accepted, len(second.scans)) == (2, 2)
    hold.go()


def test_dead_clamd_with_a_free_slot_is_used_before_a_full_one(site, clock):
    """Both clamds have timed out.  The first one still has its scan.  The second
    one has answered since, and gets the next message."""
    at_first, at_second = Hold("OK"), Hold("OK")
    first, second = site.new_clamd(verdict=at_first), site.new_clamd()
    second.verdict = [at_second]
    site.start(ClamAddress=[first.address, second.address], MaxScans="1",
               ScanTimeOut="60", **clock.settings())
    one, two = site.session(), site.session()
    one.submit(BODY)
    at_first.reached()
    two.submit(BODY)
    at_second.reached()
    clock.go(site.daemon, 60)
    one.expect("451")
    two.expect("451")
    at_second.go()
    two.mail()
    assert (first.accepted, len(second.scans)) == (1, 2)
    at_first.go()


def test_scan_tried_again_goes_before_later_ones(site):
    """The first clamd fails a message while the second one is full.  The next slot
    of the second is for this message, before those that wait for their first
    try."""
    at_first, then, at_second = Hold("sick ERROR"), Hold("OK"), Hold("OK")
    first, second = site.new_clamd(), site.new_clamd()
    first.verdict, second.verdict = [at_first, then], [at_second]
    site.start(ClamAddress=[first.address, second.address], MaxScans="1")
    clients = [site.session() for _ in range(4)]
    for i, client in enumerate(clients):
        client.submit(b"Subject: %d\r\n\r\nx\r\n" % i)
        turns(site)
    at_first.reached()
    at_second.reached()
    at_first.go()                       # 0 fails, 2 takes its place
    then.reached()
    at_second.go()                      # 1 is done, 0 takes its place
    for i in 1, 0, 3:
        clients[i].expect("250")
    then.go()
    clients[2].expect("250")
    assert [scan.mail[9:10] for scan in second.scans] == [b"1", b"0", b"3"]


@pytest.fixture
def one_full_one_dead(site, clock):
    """The only free clamd is up, but counts as dead for half a minute.  The other one
    scans a message as long as the Hold lasts.  Returns the client of this message, the
    Hold, and a client whose message waits."""
    hold = Hold("OK")
    first, second = site.new_clamd(), site.new_clamd()
    first.verdict = ["Broken ERROR", hold]
    second.down()
    site.start(ClamAddress=[first.address, second.address], MaxScans="1",
               **clock.settings())
    running, waiting = site.session(), site.session()
    running.mail(want="451")            # the second is found dead
    second.up()
    running.submit(BODY)
    hold.reached()
    waiting.submit(BODY)
    turns(site)
    return running, hold, waiting


def test_clamd_dead_for_half_a_minute_wakes_the_loop(site, clock, one_full_one_dead):
    """The message that waits gets the clamd after half a minute, even if nothing else
    happens in the daemon."""
    running, hold, waiting = one_full_one_dead
    clock.go(site.daemon, 29)
    turns(site)
    site.daemon.rests()
    before = site.daemon.proc("voluntary_ctxt_switches")
    until(lambda: site.daemon.proc("voluntary_ctxt_switches") != before,
          "it has woken, and has no spare buffers to wake for again")
    clock.monotonic += 1                # no signal: the daemon wakes by itself
    clock.set()
    waiting.expect("250 2.0.0 queued")
    hold.go()
    running.expect("250 2.0.0 queued")


def test_waiting_scan_gets_a_clamd_that_is_no_longer_dead(
        site, clock, one_full_one_dead):
    """It gets this clamd even if no other scan ends and no other message
    arrives."""
    running, hold, waiting = one_full_one_dead
    clock.go(site.daemon, 30)
    waiting.expect("250 2.0.0 queued")
    hold.go()
    running.expect("250 2.0.0 queued")


def test_waiting_scan_lets_a_later_one_pass(site):
    """The first scan in the queue has tried the first clamd and waits for the
    second.  The scan after it may use the first clamd."""
    hold = Hold("OK")
    first, second = site.new_clamd(), site.new_clamd(verdict=hold)
    first.verdict = lambda data: "Broken ERROR" if b"bad" in data else "OK"
    site.start(ClamAddress=[first.address, second.address], MaxScans="1")
    running, waiting, good = (site.session() for _ in range(3))
    running.submit(b"A: bad\r\n\r\nx\r\n")
    hold.reached()
    waiting.submit(b"A: bad\r\n\r\nx\r\n")
    first.wait_scans(2)
    until(lambda: not first.busy, "the first clamd is free")
    turns(site)
    good.mail()
    assert second.accepted == 1
    hold.go()
    for client in (running, waiting):
        client.expect("250")
        client.quit()
    good.quit()


def copy_of_fd(daemon, fd):
    """pidfd_getfd(2), which Python does not have."""
    pidfd = os.pidfd_open(daemon.pid)
    copy = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)
    os.close(pidfd)
    if copy == -1:
        pytest.skip("pidfd_getfd: " + os.strerror(ctypes.get_errno()))
    return copy


def peer_of(sock):
    try:
        return sock.getpeername()
    except OSError:
        return None


def test_clamd_tcp_connection_has_keep_alives(site):
    """A clamd whose host has gone loses its scans within a minute.  The kernel
    sends a probe after 30 idle seconds, and three more at intervals of 10
    seconds."""
    hold = Hold("OK")
    site.clamd = site.new_clamd(tcp=True, verdict=hold)
    client = site.session()
    client.submit(BODY)
    hold.reached()
    proc, seen = "/proc/%d/fd/" % site.daemon.pid, []
    for fd in os.listdir(proc):
        if not os.readlink(proc + fd).startswith("socket:"):
            continue
        with socket.socket(fileno=copy_of_fd(site.daemon, int(fd))) as sock:
            if peer_of(sock) == (site.clamd.host, site.clamd.port):
                seen.append([sock.getsockopt(*option) for option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT))])
    assert seen == [[1, 30, 10, 3]]
    hold.go()
    client.expect("250")
    client.quit()


# ---------------------------------------------------------------- MaxScans

def test_clamd_backlog_full_is_tried_again(site):
    """EAGAIN of a unix socket means busy, not dead, and the loop continues."""
    path = site.path("clamd.sock")
    with full_listener(path):
        site.start(ClamAddress=path)
        client = site.session()
        client.submit(BODY)
        turns(site)
        assert not client.stream.more() and not site.daemon.log("clamd.*connect")
        site.daemon.rests()
        site.clamd = site.new_clamd()
        os.rename(site.clamd.address, path)     # there is none in between
        client.expect("250")
    assert len(site.hop.messages) == 1
    client.quit()


def test_clamd_connect_that_hangs_slows_nobody(site, clock):
    """PROMISE 5: a connect to clamd may take five seconds."""
    with full_listener() as address:
        site.start(ClamAddress=address, **clock.settings())
        client = site.session()
        client.submit(BODY)
        turns(site)
        clock.go(site.daemon, 4)
        turns(site)
        assert not client.stream.more()
        clock.go(site.daemon, 1)
        client.expect("451 4.3.0 Local Error")
        client.quit()


USUAL = ["clamd.sock", "clamd.ctl", "clamd"]      # in /run/clamav


@pytest.mark.covers(
    "clamsmtpd.8 FILES: /run/clamav/clamd.sock, /var/run/clamav/clamd.ctl, /var/run/clamav/clamd",
    "clamsmtpd.conf.5 ClamAddress: default")
@pytest.mark.parametrize("first", USUAL)
def test_clamaddress_unset_is_the_first_socket_that_exists(site, mounts, first):
    """The daemon looks for the sockets when it needs them, not at the start.  It then
    prefers the one that worked to one that appears later."""
    os.makedirs(site.path("run/clamav"))
    site.start(ClamAddress=None, preexec=mounting(bind(site.path("run"), "/run")))
    client = site.session()
    client.mail(want="451 4.3.0 Local Error (clamd: connect: No such file")
    later, exist = USUAL[:USUAL.index(first)], USUAL[USUAL.index(first):]
    clamds = [site.new_clamd(path=site.path("run/clamav/" + name)) for name in exist]
    client.mail()
    clamds += [site.new_clamd(path=site.path("run/clamav/" + name)) for name in later]
    client.mail()
    assert [len(clamd.scans) for clamd in clamds] == [2, 0, 0]
    clamds[0].down()
    client.mail()
    assert sum(len(clamd.scans) for clamd in clamds) == 3
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScans")
@pytest.mark.core
def test_maxscans_at_once_and_the_rest_in_order(site):
    hold = Hold("OK")
    site.clamd.verdict = hold
    site.start(MaxScans="2")
    clients = []
    for i in range(6):
        client = site.session()
        client.submit(b"Subject: %d\r\n\r\nx\r\n" % i)
        turns(site)
        clients.append(client)
    hold.reached(2)
    turns(site)
    assert site.clamd.accepted == 2 and site.clamd.most == 2
    hold.go()
    for client in clients:
        client.expect("250")
    order = [int(s.mail[9:10]) for s in site.clamd.scans]
    assert sorted(order[:2]) == [0, 1]
    assert site.clamd.most == 2
    assert sorted(order) == list(range(6))
    for client in clients:
        client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScans: wait in order")
def test_waiting_scans_begin_in_the_order_of_their_dots(site):
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(MaxScans="1")
    clients = []
    for i in range(5):
        client = site.session()
        client.submit(b"Subject: %d\r\n\r\nx\r\n" % i)
        turns(site)
        clients.append(client)
    hold.reached()
    hold.go()
    for client in clients:
        client.expect("250")
        client.quit()
    assert [int(s.mail[9:10]) for s in site.clamd.scans] == [0, 1, 2, 3, 4]


def test_waiting_scans_of_old_settings_delay_no_new_ones(site):
    """After a reload with another clamd, a new message goes to it at once, although
    older messages still wait for the old clamd."""
    hold = Hold("OK")
    site.clamd.verdict = hold
    settings = dict(Listen=site.path("in.sock"), MaxScans="1")
    site.start(**settings)
    old = [site.session() for _ in range(3)]
    for client in old:
        client.submit(BODY)
    hold.reached()
    other = site.new_clamd()
    site.reload(ClamAddress=other.address, **settings)
    new = site.session()
    new.mail(body=BODY)
    new.quit()
    assert len(other.scans) == 1
    hold.go()
    for client in old:
        client.expect("250")
        client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScans: wait in order",
    "clamsmtpd.conf.5 ScanTimeOut")
def test_waiting_scan_counts_for_the_scan_time_out(site, clock):
    hold = Hold("OK")
    site.clamd.verdict = hold
    site.start(MaxScans="1", ScanTimeOut="60", **clock.settings())
    one, two = site.session(), site.session()
    one.submit(BODY)
    two.submit(BODY)
    turns(site)
    clock.go(site.daemon, 60)
    one.expect("451 4.3.0")
    two.expect("451 4.3.0")
    hold.go()
    one.quit()
    two.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScans: given up")
@pytest.mark.parametrize("end", ["OK", CLOSE], ids=["answers", "closes"])
def test_abandoned_scan_counts_until_clamd_ends_it(site, clock, end):
    """clamd continues an abandoned scan, for instance after a reload of its
    signatures."""
    hold = Hold(end)
    site.clamd.verdict = [hold]
    site.start(MaxScans="1", ScanTimeOut="60", **clock.settings())
    one, two = site.session(), site.session()
    for client, reason in (one, "verdict"), (two, "free slot"):
        client.submit(BODY)
        turns(site)
        clock.go(site.daemon, 60)
        client.expect("451 4.3.0 Local Error (clamd: no %s within" % reason)
    hold.reached()
    two.submit(BODY)
    turns(site)
    assert site.clamd.accepted == 1
    hold.go()
    two.expect("250 2.0.0 queued")
    one.quit()
    two.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScans: given up")
def test_abandoned_scan_counts_for_ten_minutes(site, clock):
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    site.start(MaxScans="1", ScanTimeOut="3600", **clock.settings())
    one = site.session()
    one.submit(BODY)
    hold.reached()
    one.reset()
    site.hop.sessions[0].wait_end()
    clock.go(site.daemon, 300)
    two = site.session()
    two.submit(BODY)
    turns(site)
    clock.go(site.daemon, 290)
    turns(site)
    assert site.clamd.accepted == 1
    clock.go(site.daemon, 10)
    two.expect("250 2.0.0 queued")
    two.quit()
    hold.go()


@pytest.mark.parametrize("ending", ["reset", "half_close"])
def test_waiting_scan_whose_client_is_gone_is_dropped(site, clock, ending):
    """A client that closes has gone when more than 5 s have passed since its dot."""
    hold = Hold("OK")
    site.clamd.verdict = hold
    site.start(MaxScans="1", **clock.settings())
    one, two, three = site.session(), site.session(), site.session()
    one.submit(BODY)
    hold.reached()
    two.submit(BODY)
    turns(site)
    clock.go(site.daemon, 6)
    getattr(two, ending)()
    site.hop.sessions[1].wait_end()
    three.submit(BODY)
    turns(site)
    hold.go()
    one.expect("250")
    three.expect("250")
    assert len(site.hop.messages) == 2 and len(site.clamd.scans) == 2
    one.quit()
    three.quit()


def test_slow_scan_slows_nobody(site):
    """PROMISE 5: other sessions continue during a slow scan."""
    hold = Hold("OK")
    site.clamd.verdict = [hold]
    slow = site.session()
    slow.submit(BODY)
    hold.reached()
    for _ in range(5):
        client = site.session()
        client.mail()
        client.quit()
    hold.go()
    slow.expect("250")
    slow.quit()


# ---------------------------------------------------------------- ScanFailure

@pytest.mark.covers("clamsmtpd.8 LOGGING: UNSCANNED", "clamsmtpd.8 clamd is down",
    "clamsmtpd.conf.5 ScanFailure", "clamsmtpd.conf.5 ScanFailure: pass",
    "clamsmtpd.conf.5 ScanTimeOut: time-out")
@pytest.mark.core
@pytest.mark.parametrize("failure, reason", [
    ("down", b"connect: No such file or directory"),
    ("closes", b"connection closed without an answer"),
    ("error", b'unexpected answer "stream: Out of memory ERROR"'),
    ("time-out", b"no verdict within ScanTimeOut")])
def test_scanfailure_pass_forwards_unscanned_with_a_header(site, clock, failure, reason):
    hold = Hold("OK")
    if failure == "down":
        site.clamd.down()
    else:
        site.clamd.verdict = {"closes": CLOSE, "error": "Out of memory ERROR",
                              "time-out": hold}[failure]
    site.start(ScanFailure="pass", **clock.settings())
    client = site.session()
    client.submit(b"Subject: x\r\n\r\nhi\r\n")
    if failure == "time-out":
        hold.reached()
        clock.go(site.daemon, 180)
    client.expect("250")
    message, = site.hop.messages
    assert HEADER not in message.body
    same(message.body, b"Subject: x\r\nX-Virus-Unscanned: " + reason +
         b"\r\n\r\nhi\r\n")
    site.daemon.wait_log(r"status=UNSCANNED$")
    client.quit()
    hold.go()


@pytest.mark.core
def test_scanfailure_pass_still_stops_a_virus(site):
    site.start(ScanFailure="pass")
    client = site.session()
    client.mail(body=BAD, want="250 2.0.0 Virus Detected")
    assert site.hop.messages == []
    client.quit()


# ---------------------------------------------------------------- sizes

def ehlo_size(got):
    for word in got.keywords():
        if word.upper().startswith("SIZE"):
            return word
    return None


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: SIZE",
    "clamsmtpd.conf.5 MaxScanSize: SIZE", "clamsmtpd.conf.5 MaxScanSize: default")
@pytest.mark.core
@pytest.mark.parametrize("offered, limit, want", [
    ("SIZE 50000", "10000", "SIZE 9972"),
    ("SIZE 4294967297", "0", "SIZE 4294967297"), ("SIZE 5000", "4294967297", "SIZE 5000"),
    ("SIZE 5000", "10000", "SIZE 5000"), ("SIZE 9980", "10000", "SIZE 9972"),
    ("SIZE 0", "10000", "SIZE 9972"), ("SIZE", "10000", "SIZE 9972"),
    ("SIZE 50000", "0", "SIZE 50000"), ("SIZE 50000", "10K", "SIZE 10212"),
    ("SIZE 50000", "29", "SIZE 1"), ("SIZE 50000", "28", "SIZE 1"),
    ("SIZE 50000", "1", "SIZE 1"),
])
def test_maxscansize_lowers_the_size_that_is_offered(site, offered, limit, want):
    site.hop.ehlo = ["DSN", offered]
    site.start(MaxScanSize=limit)
    client = site.client()
    client.expect("220")
    assert ehlo_size(client.cmd("EHLO me", "250")) == want
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: BINARYMIME",
    "clamsmtpd.conf.5 MaxScanSize: 552")
@pytest.mark.core
def test_mail_with_a_size_above_the_limit_is_552_and_not_forwarded(site):
    site.start(MaxScanSize="1000")
    client = site.session()
    client.cmd("MAIL FROM:<a@b> SIZE=973", "552 5.3.4 Message too big (limit 972 bytes)")
    client.cmd("mail from:<a@b> BODY=8BITMIME size=99999999999999999999", "552 5.3.4")
    assert site.hop.session.verbs() == ["EHLO"]
    client.cmd("MAIL FROM:<a@b> SIZE=972", "250")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 LOGGING: OVERSIZE",
    "clamsmtpd.8 When something fails: message too large",
    "clamsmtpd.conf.5 MaxScanSize: 552")
@pytest.mark.core
@pytest.mark.parametrize("source", ["MaxScanSize", "SIZE of the next hop"])
def test_body_above_the_limit_is_552(site, source):
    if source == "MaxScanSize":
        site.start(MaxScanSize="10K")
    else:
        site.hop.ehlo = ["SIZE 10240"]
        site.start()
    client = site.session()
    body = b"A: b\r\n\r\n" + b"0123456789abcdef0123456789abcd\r\n" * 20000
    client.mail(body=body, want="552 5.3.4 Message too big")
    assert "DATA" not in site.hop.commands and site.hop.messages == []
    site.daemon.wait_log(r"status=OVERSIZE$")
    client.mail()
    assert len(site.hop.messages) == 1
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: 28 bytes")
@pytest.mark.core
@pytest.mark.parametrize("how", ["DATA", "BDAT", "BDAT in pieces"])
@pytest.mark.parametrize("failure", ["tempfail", "pass"])
def test_maxscansize_counts_the_line_before_the_message(site, how, failure):
    """clamd gets at most MaxScanSize bytes, its first line included.  A message
    that is larger by one byte is not scanned."""
    site.hop = site.new_hop(chunking=True)
    site.start(MaxScanSize="10000", ScanFailure=failure)
    client = site.session()

    def send(size, want):
        body = b"A: b\r\n\r\n" + b"x" * (size - 10) + b"\r\n"
        client.envelope()
        if how == "DATA":
            client.data(body, want)
            return
        if how != "BDAT":
            client.chunk(body[:5000])
            client.expect("250")
            body = body[5000:]
        client.chunk(body, last=True)
        client.expect(want)
    send(10000 - LINE, "250")
    scan, = site.clamd.scans
    assert len(scan.data) == 10000 and len(scan.first) == LINE
    send(10000 - LINE + 1, "552 5.3.4" if failure == "tempfail" else "250")
    assert len(site.clamd.scans) == 1
    assert len(site.hop.messages) == (1 if failure == "tempfail" else 2)
    client.quit()


def test_size_zero_or_without_a_number_is_no_limit(site):
    for offered in ("SIZE", "SIZE 0"):
        site.hop.ehlo = [offered]
        client = site.session()
        client.cmd("MAIL FROM:<a@b> SIZE=999999999", "250")
        client.cmd("RSET", "250")
        client.mail(body=b"A: b\r\n\r\n" + b"x" * 100000 + b"\r\n")
        client.quit()


def test_body_above_the_limit_is_not_stored(site):
    site.start(MaxScanSize="10K", DebugFiles="on")
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 3000000 + b"\r\n", want="552")
    client.quit()
    for name in os.listdir(site.spool):
        assert os.stat(os.path.join(site.spool, name)).st_size < 200000
        site.daemon.allowed.add(name)


@pytest.mark.covers("clamsmtpd.8 LOGGING: UNSCANNED",
    "clamsmtpd.conf.5 MaxScanSize: ScanFailure: pass")
def test_above_maxscansize_with_scanfailure_pass_is_forwarded_unscanned(site):
    site.start(MaxScanSize="10K", ScanFailure="pass")
    client = site.session()
    client.cmd("MAIL FROM:<a@example.com> SIZE=50010", "250")
    client.cmd("RCPT TO:<b@example.com>", "250")
    client.data(b"A: b\r\n\r\n" + b"x" * 50000 + b"\r\n")
    message, = site.hop.messages
    assert message.body.endswith(b"\r\n\r\n" + b"x" * 50000 + b"\r\n")
    assert HEADER not in message.body and site.clamd.scans == []
    site.daemon.wait_log(r"status=UNSCANNED$")
    client.quit()


def test_next_hops_size_with_scanfailure_pass_is_a_limit(site):
    site.hop.ehlo = ["SIZE 20000"]
    site.start(MaxScanSize="10K", ScanFailure="pass")
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 50000 + b"\r\n", want="552")
    assert site.hop.messages == []
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 MaxScanSize: StreamMaxLength")
@pytest.mark.core
@pytest.mark.parametrize("size", [200000, 3000000])
def test_clamds_own_stream_limit_is_like_maxscansize(site, size):
    """The daemon reads clamd's answer although clamd closes while it writes."""
    site.clamd = site.new_clamd(tcp=True, limit=10000)
    client = site.session()
    client.envelope()
    got = client.data(b"A: b\r\n\r\n" + b"x" * size + b"\r\n",
                      "552 5.3.4 Message too big")
    assert "limit" not in got.text, "we do not know clamd's limit"
    assert site.hop.messages == []
    site.daemon.wait_log(r"status=OVERSIZE$")
    client.mail()
    client.quit()


def test_clamds_own_stream_limit_with_scanfailure_pass_forwards(site):
    site.clamd = site.new_clamd(tcp=True, limit=10000)
    site.start(ScanFailure="pass")
    client = site.session()
    client.mail(body=b"A: b\r\n\r\n" + b"x" * 300000 + b"\r\n")
    site.daemon.wait_log(r"status=UNSCANNED$")
    client.quit()
