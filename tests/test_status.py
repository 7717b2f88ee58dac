"""StatusListen with the page, /healthz and /metrics, and -C, which requests /healthz."""

import calendar
import contextlib
import functools
import os
import re
import resource
import select
import socket
import stat
import subprocess
import time

import pytest

import real
from harness import (BAD, CLOSE, Failed, GOOD, Hold, REFUSED, Server, WAIT,
                     bind, connect, full_listener, localhost, mounting, own_host,
                     reset, since, turns, until)

VERDICTS = ("clean", "virus", "unscanned", "oversize", "clamd_error", "error")
VISITORS = 8                # that are served at once


class Answer:
    """The bytes received over HTTP until the daemon closed."""

    def __init__(self, raw):
        head, blank, body = raw.partition(b"\r\n\r\n")
        assert blank, "no whole head: %r" % raw
        first, *fields = head.decode().split("\r\n")
        self.status = int(re.fullmatch(r"HTTP/1\.0 (\d{3}) [A-Za-z ]+", first)[1])
        self.fields = dict(field.split(": ", 1) for field in fields)
        self.text = body.decode()


def answer_on(sock):
    """Read an answer to its end."""
    return Answer(sock.makefile("rb").read())


def ask(address, request, half_close=False):
    with connect(address) as sock:
        sock.sendall(request)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return answer_on(sock)


def get(address, path="/", method="GET"):
    return ask(address, ("%s %s HTTP/1.0\r\n\r\n" % (method, path)).encode())


def status_on(daemon):
    """The address of the status page, from the log."""
    return daemon.wait_log("^status on ")[-1].split(" on ")[1]


def start(site, **settings):
    site.start(StatusListen="127.0.0.1:%d" % site.port(), **settings)
    return status_on(site.daemon)


def metrics(address):
    """{name with labels: value}, in order, with the names without clamsmtpd_."""
    text = get(address, "/metrics").text
    return {name: float(value) for name, value in re.findall(
        r"^clamsmtpd_(\w+(?:\{.*\})?) (\S+)$", text, re.M)}


def messages(address):
    """The message counts that are not 0."""
    got = metrics(address)
    counts = {v: got['messages_total{verdict="%s"}' % v] for v in VERDICTS}
    return {v: n for v, n in counts.items() if n}


# ---------------------------------------------------------------- the page

@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /")
@pytest.mark.core
def test_page_shows_sessions_messages_and_clamds(site, run):
    hold = Hold()
    address = start(site, MaxScans="1", MaxConnections="7")
    site.session().mail()
    site.session().mail(body=BAD)
    site.clamd.verdict = hold
    for client in (site.session(), site.session()):
        client.submit(GOOD)
    text = until(lambda: (lambda page: page if "1 waiting" in page else None)(
        get(address).text), "a scan waits")
    version = run("-v").stdout.split("\n")[0]
    assert re.match(re.escape(version) + r", up since 20\d\d-\d\d-\d\dT[\d:]+Z\n", text)
    assert re.search(r"^sessions: 4 now, 4 at most so far, 7 allowed; 4 in all, "
                     r"0 refused$", text, re.M)
    assert re.search(r"^messages: 2, 1 clean, 1 virus, ", text, re.M)
    assert re.search(r"^clamd %s: well" % re.escape(site.clamd.address), text, re.M)
    assert re.search(r"^scans: 1 running, 1 waiting$", text, re.M)
    hold.go()


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /")
def test_page_shows_the_error_of_each_clamd(site):
    """PROMISE 8: the error text of clamd cannot become HTML."""
    site.clamd.verdict = b"stream: \x1b[2J\x07 \r<b> ERROR\0"
    address = start(site, ClamAddress=["/no/such/socket", site.clamd.address])
    site.session().mail(want="451")
    text = get(address).text
    assert re.search("^clamd /no/such/socket: connect: No such file", text, re.M)
    assert re.search(r'^clamd %s: unexpected answer "stream: \\x1B\[2J\\x07 ' %
                     re.escape(site.clamd.address), text, re.M)
    assert re.fullmatch(r"[ -~\n]+", text)


@pytest.mark.covers("clamsmtpd.conf.5 StatusListen")
def test_statuslisten_unset_opens_nothing(site):
    site.start()
    assert not site.daemon.log("^status on ")


@pytest.mark.covers("clamsmtpd.conf.5 StatusListen",
    "clamsmtpd.conf.5 ADDRESSES: default port",
    "clamsmtpd.conf.5 ADDRESSES: default host")
@pytest.mark.parametrize("form, where", [
    ("PORT", "127.0.0.1:PORT"), ("HOST", "HOST:10080"),
    (localhost() + ":PORT", "127.0.0.1:PORT"), ("[::1]:PORT", "[::1]:PORT"),
])
def test_statuslisten_of_each_form_is_opened(site, form, where):
    def here(text):
        return text.replace("PORT", port).replace("HOST", own_host(80))
    port = str(site.port())
    try:
        site.start(StatusListen=here(form))
    except Failed:
        if "Cannot assign" in site.daemon.text():
            pytest.skip("no such address here")
        raise
    assert "status on " + here(where) in site.daemon.log()
    for path in "/", "/healthz", "/metrics":
        assert get(here(where), path).status == 200


@pytest.mark.core
def test_statuslisten_unix_socket_is_removed_at_the_end(site):
    path = site.path("status")
    site.start(StatusListen=path)
    site.daemon.own.add(path)           # stop() checks that it is gone
    assert status_on(site.daemon) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    assert get(path, "/healthz").text == "ok\n"


# ---------------------------------------------------------------- /healthz

@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /healthz")
@pytest.mark.core
def test_healthz_is_200_while_a_clamd_answers(site):
    address = start(site)
    answer = get(address, "/healthz")
    assert (answer.status, answer.text) == (200, "ok\n")
    assert site.clamd.pings and site.clamd.commands == []


def silent(site):
    """The address of a clamd that accepts and sends nothing, and its socket."""
    path = site.path("silent.sock")
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT)
    sock.bind(path)
    sock.listen(100)
    return path, sock


# Without ClamAddress, if none of the sockets exists.
USUAL = "/run/clamav/clamd.sock, /var/run/clamav/clamd.ctl, /var/run/clamav/clamd"

# name: (address, clamd's answer, the reason)
SICK = {
    "no socket": ("/no/such/socket", None, "No such file"),
    "nobody listens": ("127.0.0.1:PORT", None, REFUSED),
    "another word": (None, b"PANG\0", '"PANG'),
    "an error": (None, b"UNKNOWN COMMAND\0", '"UNKNOWN COMMAND'),
    "more": (None, b"PONG\0PONG\0", '"PONG\\\\x00PO'),
    "another program": (None, b"ClamAVs 1\0", '"ClamAVs 1'),
    "no end": (None, b"PONG", '"PONG"'),
    "endless": (None, b"PONG" * 1000, '"PONG'),
    "nothing": (None, b"", '""'),
    "escapes": (None, b"\x1b[2J\r\n\xff\0", r'"\\x1B\[2J\\x0D\\x0A'),
}


@pytest.fixture(params=SICK)
def sick(request, site):
    address, site.clamd.deny_all, reason = SICK[request.param]
    address = (address or site.clamd.address).replace("PORT", str(site.port()))
    return address, reason


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /healthz")
def test_healthz_is_503_with_the_reason(site, sick):
    """The reason is one line with the name of the clamd."""
    clamd, reason = sick
    answer = get(start(site, ClamAddress=clamd), "/healthz")
    assert answer.status == 503
    line, = answer.text.splitlines()
    assert re.match("clamd %s: .*(%s)" % (re.escape(clamd), reason), line), line


@pytest.mark.parametrize("there", [True, False])
def test_healthz_without_clamaddress_names_the_socket_that_exists(site, mounts, there):
    os.makedirs(site.path("run/clamav"))
    if there:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(site.path("run/clamav/clamd.ctl"))
    address = start(site, ClamAddress=None,
                    preexec=mounting(bind(site.path("run"), "/run")))
    assert get(address, "/healthz").text == {
        True: "clamd /var/run/clamav/clamd.ctl: Connection refused\n",
        False: "clamd %s: No such file or directory\n" % USUAL}[there]


def test_healthz_is_200_while_one_clamd_of_several_answers(site, sick):
    well = site.new_clamd()
    address = start(site, ClamAddress=[sick[0], well.address])
    assert get(address, "/healthz").status == 200


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /healthz")
@pytest.mark.parametrize("others", [0, 1])
def test_healthz_of_a_clamd_that_hangs_is_503_after_five_seconds(site, clock, others):
    """All clamds together have five seconds."""
    path, sock = silent(site)
    with sock:
        clamds = [path] + [site.clamd.address] * others
        address = start(site, ClamAddress=clamds, **clock.settings())
        with connect(address) as probe:
            probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            with sock.accept()[0]:              # it has asked
                if not others:
                    clock.go(site.daemon, 4)
                    turns(site)
                    assert not select.select([probe], [], [], 0)[0]
                clock.go(site.daemon, 3 if others else 1)
                answer = answer_on(probe)
    assert answer.status == (200 if others else 503)
    assert others or "no answer to PING" in answer.text


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: valid for one second")
def test_healthz_answer_is_valid_for_one_second(site, clock):
    """Within a second of a health check /healthz starts no other one."""
    address = start(site, **clock.settings())
    for seconds, checks in (1, 2), (0, 2), (1, 3):
        clock.go(site.daemon, seconds)
        turns(site)
        assert get(address, "/healthz").status == 200
        until(lambda: site.clamd.versions >= checks, "the check is over")
        turns(site)
        assert (site.clamd.pings, site.clamd.versions) == (checks, checks)


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: / asks no clamd")
@pytest.mark.parametrize("page, more", [("/", 0), ("/healthz", 1), ("/metrics", 1)])
def test_page_asks_each_clamd_or_none(site, clock, page, more):
    """A request for /healthz or /metrics sends PING and VERSION to each clamd.  A
    request for / sends nothing."""
    clamds = [site.clamd, site.new_clamd()]
    address = start(site, ClamAddress=[one.address for one in clamds], **clock.settings())
    clock.go(site.daemon, 60)
    turns(site)
    assert get(address, page).status == 200
    until(lambda: all(one.versions == 1 + more for one in clamds), "the check is over")
    turns(site)
    assert [(one.pings, one.versions, one.accepted)
            for one in clamds] == [(1 + more, 1 + more, 0)] * 2


def test_healthz_needs_only_the_first_answer(site, clock):
    """One clamd that answers is enough, and the reply does not wait for the
    others."""
    path, sock = silent(site)
    with sock:
        address = start(site, ClamAddress=[site.clamd.address, path], **clock.settings())
        with sock.accept()[0]:          # the check at the start waits for its answer
            assert get(address, "/healthz").status == 200
        sock.settimeout(0)

        def asked():
            clock.go(site.daemon, 1)
            assert get(address, "/healthz").status == 200
            with contextlib.suppress(BlockingIOError):
                return sock.accept()[0]
        with until(asked, "a new check waits for the second clamd"):
            assert get(address, "/healthz").status == 200


def test_healthz_is_200_again_after_an_outage(site):
    address = start(site)
    site.clamd.down()
    until(lambda: get(address, "/healthz").status == 503, "it is not ready")
    site.clamd.up()
    until(lambda: get(address, "/healthz").status == 200, "it is ready")


def test_healthz_needs_no_free_slot(site):
    hold = Hold()
    site.clamd.verdict = [hold]
    address = start(site, MaxScans="1")
    client = site.session()
    client.submit(GOOD)
    hold.reached()
    assert get(address, "/healthz").status == 200
    hold.go()
    client.expect("250")


def test_healthz_requests_at_once_share_one_ping(site):
    path, sock = silent(site)
    address = start(site, ClamAddress=path)
    probes = [connect(address) for _ in range(5)]
    for probe in probes:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    turns(site)
    clamd, _ = sock.accept()
    with sock, clamd:
        assert clamd.recv(100) == b"zPING\0"
        clamd.sendall(b"PONG\0")
        for probe in probes:
            with probe:
                assert answer_on(probe).status == 200
        with sock.accept()[0] as clamd:
            assert clamd.recv(100) == b"zVERSION\0"
        turns(site)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.accept()


def test_healthz_after_a_check_without_descriptors_begins_with_a_ping(site, clock):
    """A command that could not leave is not sent with the next one."""
    path, sock = silent(site)
    address = start(site, ClamAddress=path, **clock.settings())
    limit = functools.partial(resource.prlimit, site.daemon.pid, resource.RLIMIT_NOFILE)
    usual = limit()
    with sock:
        with sock.accept()[0] as clamd:
            assert clamd.recv(100) == b"zPING\0"
            limit((3, usual[1]))
            clamd.sendall(b"PONG\0")
            assert clamd.recv(100) == b""
        site.daemon.rests()
        limit(usual)
        clock.go(site.daemon, 2)
        turns(site)
        with connect(address) as probe:
            probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            with sock.accept()[0] as clamd:
                assert clamd.recv(100) == b"zPING\0"
                clamd.sendall(b"PONG\0")
                assert answer_on(probe).status == 200


def test_healthz_of_a_real_clamd_follows_it(site, real_clamd):
    for where in (real_clamd.path, real_clamd.tcp):
        address = start(site, ClamAddress=where)
        assert get(address, "/healthz").status == 200
    real_clamd.kill()
    until(lambda: get(address, "/healthz").status == 503, "it is not ready")
    real_clamd.start()
    until(lambda: get(address, "/healthz").status == 200, "it is ready")


def test_metrics_have_the_signatures_of_a_real_clamd(site, real_clamd):
    """clamd gives the time of its signatures as local time."""
    offset = time.localtime(real.SIGNATURES_AT).tm_gmtoff
    for where in (real_clamd.path, real_clamd.tcp):
        address = start(site, ClamAddress=where)
        metric = 'clamd_signatures%%s{address="%s"}' % where
        until(lambda: metric % "" in metrics(address), "clamd has sent its version")
        got = metrics(address)
        assert got[metric % ""] == real.SIGNATURES
        assert got[metric % "_timestamp_seconds"] == real.SIGNATURES_AT + offset


# ---------------------------------------------------------------- HTTP

@pytest.mark.core
@pytest.mark.parametrize("request_", [
    b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.0\n\n", b"GET /?a=b&c HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
    b"GET / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.0\r\nX: " + b"x" * 4000 + b"\r\n\r\n",
], ids=range(6))
def test_request_of_each_form_is_understood(site, request_):
    answer = ask(start(site), request_)
    assert answer.status == 200 and answer.text.startswith("clamsmtpd ")
    assert answer.fields["Content-Type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics"])
def test_request_in_pieces_then_eof_is_answered(site, path):
    """`printf ... | nc' sends such a request."""
    address = start(site)
    request = b"GET %s HTTP/1.0\r\n\r\n" % path.encode()
    assert ask(address, request, half_close=True).status == 200
    with connect(address) as sock:
        for i in range(len(request)):
            sock.sendall(request[i:i + 1])
        assert answer_on(sock).status == 200


@pytest.mark.parametrize("path, status", [
    ("/", 200), ("/metrics", 200), ("/healthz", 200), ("/x", 404)])
def test_request_head_is_get_without_a_body(site, path, status):
    address = start(site)
    head, whole = get(address, path, "HEAD"), get(address, path)
    assert head.text == "" and head.status == whole.status == status
    assert head.fields == whole.fields


def test_request_head_of_healthz_has_the_status(site):
    head = get(start(site, ClamAddress="/no/such/socket"), "/healthz", "HEAD")
    assert (head.status, head.text) == (503, "")


@pytest.mark.parametrize("path", [
    "/x", "//", "/metrics/", "/healthzz", "/health", "/HEALTHZ", "/./", "*", "",
    "/" + "x" * 3000])
def test_request_of_an_unknown_page_is_404(site, path):
    assert get(start(site), path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get", "GETS",
                                    "EHLO"])
def test_request_of_another_method_is_405(site, method):
    assert get(start(site), "/", method).status == 405


@pytest.mark.parametrize("request_", [
    b"GET /" + b"x" * 5000 + b" HTTP/1.0\r\n\r\n", b"x" * 4096,
    b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 200000 + b"\r\n"], ids=range(3))
def test_request_without_end_is_400(site, request_):
    """The daemon reads all of it, so that the answer is not lost in a reset."""
    assert ask(start(site), request_).status == 400


# ---------------------------------------------------------------- /metrics

@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
@pytest.mark.core
def test_metrics_count_messages_by_verdict(site):
    address = start(site, MaxScanSize="1000", ScanFailure="tempfail")
    assert messages(address) == {}
    client = site.session()
    client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.mail()
    client.mail(body=GOOD + b"x" * 2000 + b"\r\n", want="552")
    site.clamd.verdict = ["sick ERROR"]
    client.mail(want="451")
    site.hop.on(".", [CLOSE])
    client.mail(want="451")
    assert messages(address) == {
        "clean": 2, "virus": 1, "oversize": 1, "clamd_error": 1, "error": 1}
    assert sum(metrics(address)[name] for name in metrics(address)
               if name.startswith("messages_total")) == 6


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_count_unscanned_messages(site):
    address = start(site, MaxScanSize="1000", ScanFailure="pass")
    client = site.session()
    client.mail(body=GOOD + b"x" * 2000 + b"\r\n")
    site.clamd.verdict = ["sick ERROR"]
    client.mail()
    assert messages(address) == {"unscanned": 2}


def test_metrics_count_a_refused_message_once(site):
    site.hop.on(".", ["550 5.7.1 no"])
    address = start(site)
    client = site.session()
    client.mail(want="550")
    client.mail()
    assert messages(address) == {"clean": 2}


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_count_bytes_of_messages(site):
    address = start(site)
    client = site.session()
    client.mail(body=GOOD)
    client.mail(body=BAD, want="250 2.0.0 Virus")
    assert metrics(address)["message_bytes_total"] == len(GOOD) + len(BAD)


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_count_sessions(site):
    address = start(site, MaxConnections="2")
    first, second = site.session(), site.session()
    site.client().expect("421")
    got = metrics(address)
    assert (got["sessions"], got["sessions_total"],
            got["sessions_refused_total"]) == (2, 2, 1)
    first.quit()
    second.quit()
    until(lambda: metrics(address)["sessions"] == 0, "no session")
    assert metrics(address)["sessions_total"] == 2


def signatures(site, address):
    """After a health check, {clamd: (version of its signatures, their time)} of the
    metrics.  None means that there are none."""
    clamds = [clamd for clamd in site.servers if clamd.family == "clamd"]
    assert get(address, "/healthz").status == 200
    until(lambda: all(clamd.versions for clamd in clamds), "all have been asked")
    turns(site)
    got = metrics(address)
    return {clamd: (got.get('clamd_signatures{address="%s"}' % clamd.address),
                    got.get('clamd_signatures_timestamp_seconds{address="%s"}' % clamd.address))
            for clamd in clamds}


TIMES = ["2026-11-25 08:31:09", "2027-01-01 00:00:00", "2027-02-28 23:59:59",
         "2028-02-29 12:00:00", "2028-03-01 00:00:00", "2028-12-31 23:59:59",
         "2030-10-05 09:08:07", "2100-03-01 00:00:00"]


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: signatures",
    "clamsmtpd.8 STATUS PAGE: /", "clamsmtpd.8 STATUS PAGE: /metrics")
@pytest.mark.parametrize("text", TIMES)
def test_metrics_have_version_and_time_of_the_signatures(site, text):
    """The time that clamd gives with its version is read as UTC."""
    when = time.strptime(text, "%Y-%m-%d %H:%M:%S")
    site.clamd.version = "ClamAV 1.4.3/27800/" + time.asctime(when)
    address = start(site)
    assert signatures(site, address) == {site.clamd: (27800, calendar.timegm(when))}
    assert re.search(r"^clamd %s: well, as far as is known, signatures 27800 of %sZ$" % (
        re.escape(site.clamd.address), text.replace(" ", "T")), get(address).text, re.M)


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: signatures")
def test_metrics_have_the_signatures_of_the_request_before(site, clock):
    address = start(site, **clock.settings())
    for checks, old, new in (2, 27800, 27801), (3, 27801, 27802):
        turns(site)
        clock.go(site.daemon, 60)
        site.clamd.version = "ClamAV 1.4.3/%d/Tue Nov 25 08:31:09 2026" % new
        assert metrics(address)['clamd_signatures{address="%s"}' % site.clamd.address] == old
        until(lambda: site.clamd.versions == checks, "the check is over")


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_have_the_signatures_of_each_clamd(site, clock):
    """Each clamd has its own metrics, and a clamd that has no signatures any more
    loses them."""
    site.clamd.version = "ClamAV 1.4.3/27800/Tue Nov 25 08:31:09 2026"
    other = site.new_clamd()
    other.version = "ClamAV 1.0.9/27790/Sat Nov 15 08:31:09 2026"
    address = start(site, ClamAddress=[site.clamd.address, other.address], **clock.settings())
    assert signatures(site, address) == {site.clamd: (27800, 1795595469),
                                         other: (27790, 1794731469)}
    other.version = "ClamAV 1.0.9"
    clock.go(site.daemon, 2)
    turns(site)
    get(address, "/healthz")
    until(lambda: other.versions == 2, "both are asked")
    assert signatures(site, address) == {site.clamd: (27800, 1795595469),
                                         other: (None, None)}


@pytest.mark.parametrize("version, number", [
    ("ClamAV 1.4.3", None), ("COMMAND UNAVAILABLE", None), ("ClamAV ", None),
    ("ClamAV 1/", None), ("ClamAV 1/27800", 27800), ("ClamAV 1/27800/", 27800),
    ("ClamAV 1/-1/Tue Nov 25 08:31:09 2026", None), ("ClamAV 1/2x/", None),
    ("ClamAV 1//Tue Nov 25 08:31:09 2026", None),
    ("ClamAV 1/99999999999999999999/Tue Nov 25 08:31:09 2026", None),
    ("ClamAV 1/27800/Tue Foo 25 08:31:09 2026", 27800),
    ("ClamAV 1/27800/Tue Nov 25 08:31:09 2026 ", 27800),
    ("ClamAV 1/27800/Tue Nov 25 08:31:09 1926", 27800),
    ("ClamAV 1/27800/" + "\xff" * 24, 27800),
    ("ClamAV 1/" + "/" * 100, None), ("ClamAV \x1b[2J\r\n", None),
])
def test_signatures_that_clamd_does_not_give_have_no_metric(site, version, number):
    """An answer without signatures, or a bad one, leaves the metric out.  VERSION may
    be switched off in clamd.  PROMISE 8: no other text of the answer is shown."""
    site.clamd.version = version.encode("latin-1")
    address = start(site)
    assert signatures(site, address) == {site.clamd: (number, None)}
    for page in "/", "/metrics":
        assert re.fullmatch(r"[ -~\n]+", get(address, page).text)
        assert "1970-" not in get(address, page).text


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_lost_log_lines_are_counted(site):
    """Lines for which the log has no room are counted, whether or not the log has a
    line about them."""
    status = site.path("status.sock")
    read = site.start_on_pipe(StatusListen=status)
    client = site.session()
    client.mail()
    assert metrics(status)["log_lines_lost_total"] == 0
    client.mail(to=["%d@example.com" % n for n in range(200)])
    lost = metrics(status)["log_lines_lost_total"]
    assert lost > 50
    with open(read, "rb") as log:
        logged = 0
        while not logged:
            logged = int((re.findall(rb"(\d+) lines of the log were lost",
                                     log.readline()) or [0])[0])
    assert logged == metrics(status)["log_lines_lost_total"] >= lost


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_have_version_and_start(site, run):
    before = since()
    got = metrics(start(site))
    version = run("-v").stdout.split()[1]
    assert got['build_info{version="%s"}' % version] == 1
    assert before <= got["start_time_seconds"] <= time.time()


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_have_scans_running_and_waiting(site):
    hold = Hold()
    site.clamd.verdict = hold
    address = start(site, MaxScans="2")
    clients = [site.session() for _ in range(5)]
    for client in clients:
        client.submit(GOOD)
    until(lambda: (metrics(address)["scans_running"],
                   metrics(address)["scans_waiting"]) == (2, 3), "2 and 3 scans")
    hold.go()
    for client in clients:
        client.expect("250")
    got = metrics(address)
    assert (got["scans_running"], got["scans_waiting"]) == (0, 0)


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_have_the_health_of_each_clamd(site):
    address = start(site, ClamAddress=["/no/such/socket", site.clamd.address])
    got = metrics(address)
    assert got['clamd_up{address="%s"}' % site.clamd.address] == 1
    assert got['clamd_failures_total{address="/no/such/socket"}'] == 0
    site.session().mail()
    got = metrics(address)
    assert got['clamd_up{address="/no/such/socket"}'] == 0
    assert got['clamd_failures_total{address="/no/such/socket"}'] == 1
    assert got['clamd_up{address="%s"}' % site.clamd.address] == 1
    assert got['clamd_failures_total{address="%s"}' % site.clamd.address] == 0


def start_with_clamd_down(site, clock):
    """Start a daemon whose first clamd answers the check at the start and is down when
    a message arrives.  Returns this clamd, the address of the status page, and the
    name of the metric."""
    clamd = site.new_clamd()
    address = start(site, ClamAddress=[clamd.address, site.clamd.address],
                    **clock.settings())
    up = 'clamd_up{address="%s"}' % clamd.address
    clamd.down()
    site.session().mail()
    assert metrics(address)[up] == 0
    return clamd, address, up


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: clamd_up")
def test_metrics_clamd_is_up_again_after_a_scan(site, clock):
    clamd, address, up = start_with_clamd_down(site, clock)
    clock.go(site.daemon, 60)
    assert metrics(address)[up] == 0
    clamd.up()
    site.session().mail()
    assert metrics(address)[up] == 1


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: clamd_up")
def test_clamd_up_is_1_when_it_answers_again(site, clock):
    """A clamd that was down counts as up when it answers a health check, and gets
    the next message."""
    clamd, address, up = start_with_clamd_down(site, clock)
    clamd.up()

    def is_up():
        clock.go(site.daemon, 1)
        assert get(address, "/healthz").status == 200
        return metrics(address)[up] == 1
    until(is_up, "it is up without a message")
    assert site.daemon.log("^clamd %s: works again$" % re.escape(clamd.address))
    site.session().mail()
    assert (len(clamd.scans), len(site.clamd.scans)) == (1, 1)


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: clamd_up")
def test_clamd_up_stays_0_for_a_clamd_that_timed_out(site, clock):
    """clamd answers a health check even while all its threads hang.  Only a verdict
    shows that they work again."""
    hold = Hold()
    clamd = site.new_clamd(verdict=hold)
    address = start(site, ClamAddress=[clamd.address, site.clamd.address], ScanTimeOut="5",
                    **clock.settings())
    up = 'clamd_up{address="%s"}' % clamd.address
    client = site.session()
    client.submit(GOOD)
    hold.reached()
    clock.go(site.daemon, 6)
    client.expect("451")
    for _ in range(2):
        assert get(address, "/healthz").status == 200
        assert metrics(address)[up] == 0
        clock.go(site.daemon, 60)
    hold.go()


def test_clamaddress_given_twice_has_one_series(site):
    """A second line with the same address is a warning, not another clamd."""
    address = start(site, ClamAddress=[site.clamd.address] * 2)
    text = get(address, "/metrics").text
    names = re.findall(r"^(clamsmtpd_\S+) ", text, re.M)
    assert len(names) == len(set(names))
    assert site.daemon.log("ClamAddress: %s is set twice; one line is enough$"
                           % re.escape(site.clamd.address))
    assert get(address).text.count(site.clamd.address) == 1


def test_without_clamaddress_one_clamd_is_shown_through_outages(site, mounts):
    """The log, the metrics, the page and /healthz name the socket that is used, or
    all three if none exists.  The start and the end of each outage are logged."""
    os.makedirs(site.path("run/clamav"))
    used = "/var/run/clamav/clamd.ctl"
    address = start(site, ClamAddress=None, level=3,
                    preexec=mounting(bind(site.path("run"), "/run")))
    client = site.session()

    def shown(name, well, failures):
        got = metrics(address)
        assert {key: n for key, n in got.items() if "clamd_up" in key or
                "clamd_failures" in key} == {
            'clamd_up{address="%s"}' % name: well,
            'clamd_failures_total{address="%s"}' % name: failures}
        page, = re.findall("^clamd .*$", get(address).text, re.M)
        assert page.startswith("clamd %s: " % name)
        until(lambda: get(address, "/healthz").text == (
            "ok\n" if well else "clamd %s: No such file or directory\n" % name),
            "/healthz says so")

    client.mail(want="451")
    shown(USUAL, 0, 1)
    clamd = site.new_clamd(path=site.path("run/clamav/clamd.ctl"))
    client.mail()
    shown(used, 1, 1)
    clamd.down()
    client.mail(want="451")
    shown(USUAL, 0, 2)
    clamd.up()
    client.mail()
    shown(used, 1, 2)
    absent = "clamd %s: connect: No such file or directory" % USUAL
    well = "clamd %s: works again" % used
    assert site.daemon.log("^clamd ") == [absent, well, absent, well]


def test_without_clamaddress_a_dead_socket_gives_way_to_a_live_one(site, mounts):
    """The first socket that exists has no listener, so the second is used."""
    os.makedirs(site.path("run/clamav"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(site.path("run/clamav/clamd.sock"))
    clamd = site.new_clamd(path=site.path("run/clamav/clamd.ctl"))
    address = start(site, ClamAddress=None,
                    preexec=mounting(bind(site.path("run"), "/run")))
    site.session().mail()
    assert len(clamd.scans) == 1
    assert metrics(address)['clamd_up{address="/var/run/clamav/clamd.ctl"}'] == 1
    site.daemon.wait_log("/var/run/clamav/clamd.ctl works and is tried first")


def histogram(address):
    """[(le, count)], count, sum."""
    got = metrics(address)
    buckets = [(float(re.search('"(.*)"', name)[1]), n) for name, n in got.items()
               if name.startswith("scan_seconds_bucket")]
    return buckets, got["scan_seconds_count"], got["scan_seconds_sum"]


def test_metrics_histogram_counts_scans(site):
    address = start(site, ScanFailure="pass")
    client = site.session()
    for _ in range(3):
        client.mail()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    site.clamd.verdict = ["sick ERROR"]
    client.mail()
    buckets, count, total = histogram(address)
    limits, counts = zip(*buckets)
    assert list(limits) == sorted(set(limits)) and limits[-1] == float("inf")
    assert list(counts) == sorted(counts)
    assert counts[-1] == count == 4 and total >= 0


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_histogram_has_the_time_from_dot_to_verdict(site, clock):
    """The second message waits for the end of the first one's scan."""
    hold = Hold()
    site.clamd.verdict = [hold]
    address = start(site, MaxScans="1", **clock.settings())
    clients = [site.session() for _ in range(2)]
    for client in clients:
        client.begin(GOOD)
        turns(site)
        clock.go(site.daemon, 50)
        client.send(b".\r\n")
        turns(site)
    hold.reached()
    clock.go(site.daemon, 2)
    hold.go()
    for client in clients:
        client.expect("250")
    buckets, count, total = histogram(address)
    assert (count, total) == (2, 52 + 2)
    for limit, n in buckets:
        assert n == (limit >= 2) + (limit >= 52), (limit, n)


@pytest.fixture(scope="module")
def promtool(debian_package):
    """The path of promtool, which is a package of its own since Debian 13."""
    return (real.find("promtool") or
            debian_package("promtool", "prometheus") + "/usr/bin/promtool")


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: /metrics")
def test_metrics_are_accepted_by_promtool(site, promtool):
    """One of the labels is an address that has to be quoted."""
    address = start(site, ClamAddress=['/a"b\\c\\', site.clamd.address])
    site.session().mail()
    text = get(address, "/metrics").text
    got = subprocess.run([promtool, "check", "metrics"], input=text,
                         capture_output=True, text=True)
    assert (got.returncode, got.stdout + got.stderr) == (0, ""), text


# ---------------------------------------------------------------- hostile clients

def megabyte(sock):
    try:
        sock.sendall(b"x" * (1 << 20))
    except OSError:
        pass                # it was closed for the next client


def asks_and_goes(sock):
    sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    reset(sock)


HOSTILE = {
    "silent": lambda sock: None,
    "half a request": lambda sock: sock.sendall(b"GET / HTTP/1.0\r\nX: "),
    "never reads": lambda sock: sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n"),
    "a megabyte": megabyte,
    "reset": reset,
    "asks and is gone": asks_and_goes,
}


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: 8 clients",
    "clamsmtpd.8 STATUS PAGE: further client")
@pytest.mark.parametrize("kind", HOSTILE)
def test_status_clients_hostile_delay_nobody(site, kind):
    """PROMISES 5 and 6: sessions continue, and the number of status clients is
    limited."""
    address = start(site)
    get(address, "/metrics")            # whatever is got at the first visit
    before = site.daemon.rss()
    socks = []
    for _ in range(100):
        socks.append(connect(address))
        HOSTILE[kind](socks[-1])
    assert get(address, "/healthz").status == 200
    turns(site)             # two sessions and a health check may still be about to end
    until(lambda: site.daemon.fds() <= site.daemon.idle + VISITORS, "eight are left")
    assert site.daemon.grown(before) < 512
    site.session().mail()
    for sock in socks:
        sock.close()


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: 8 clients")
@pytest.mark.parametrize("kind", ["silent", "half a request", "never reads"])
def test_status_client_stays_ten_seconds_at_most(site, clock, kind):
    """A byte from time to time does not extend the ten seconds."""
    address = start(site, **clock.settings())
    with connect(address) as sock:
        HOSTILE[kind](sock)

        def one_more():
            if kind == "half a request":
                with contextlib.suppress(OSError):
                    sock.sendall(b"y")
            turns(site)
            return site.daemon.fds()
        for _ in range(3):
            one_more()
            clock.go(site.daemon, 3)
        until(lambda: one_more() == site.daemon.idle + 1, "it is still there")
        clock.go(site.daemon, 1)
        until(lambda: one_more() == site.daemon.idle, "it is turned out")


def test_status_crowd_in_one_turn_replaces_no_probe(site):
    """The crowd connects in the same turn as the probe, and after it."""
    address = start(site)
    site.daemon.pause()
    with connect(address) as probe:
        probe.sendall(b"GET / HTTP/1.0\r\n\r\n")
        crowd = [connect(address) for _ in range(50)]
        site.daemon.resume()
        assert answer_on(probe).status == 200
    for sock in crowd:
        sock.close()


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: 8 clients",
    "clamsmtpd.8 STATUS PAGE: further client")
def test_status_client_after_eight_replaces_the_oldest(site):
    address = start(site)
    idle = site.daemon.fds()
    socks = []
    for count in range(1, VISITORS + 1):
        socks.append(connect(address))
        until(lambda: site.daemon.fds() == idle + count, "%d clients" % count)
    assert get(address).status == 200
    assert socks.pop(0).recv(1) == b""
    for sock in socks:
        with sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert answer_on(sock).status == 200


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: further client")
def test_status_clients_of_one_turn_replace_the_oldest(site):
    """The oldest client goes, also if all have connected in the same turn."""
    address = start(site)
    site.daemon.pause()
    socks = [connect(address) for _ in range(VISITORS + 4)]
    site.daemon.resume()
    for sock in socks[:4]:
        with sock:
            assert sock.recv(1) == b""
    for sock in socks[4:]:
        with sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert answer_on(sock).status == 200


@pytest.mark.covers("clamsmtpd.8 STATUS PAGE: further client")
def test_status_crowd_replaces_no_client_that_waits_for_clamd(site):
    path, sock = silent(site)
    address = start(site, ClamAddress=path)
    with connect(address) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        clamd, _ = sock.accept()
        crowd = [connect(address) for _ in range(50)]
        turns(site)
        with sock, clamd:
            clamd.sendall(b"PONG\0")
            assert answer_on(probe).status == 200
    for one in crowd:
        one.close()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", ["inet", "unix"])
def test_status_clients_gone_while_waiting_take_no_room(site, clock, family, together):
    """PROMISE 6: poll() reports clients that have gone as long as they have a
    place.  With `together' they go in the same turn in which the probe connects."""
    path, sock = silent(site)
    status = {"inet": "127.0.0.1:%d" % site.port(), "unix": site.path("status")}[family]
    site.start(ClamAddress=path, StatusListen=status, **clock.settings())
    address = status_on(site.daemon)
    crowd = [connect(address) for _ in range(VISITORS)]
    for one in crowd:
        one.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    turns(site)
    clamd, _ = sock.accept()            # they have asked
    if together:
        site.daemon.pause()
    for one in crowd:
        reset(one)
    if not together:
        site.daemon.rests()
    with sock, clamd, connect(address) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        if together:
            site.daemon.resume()
        turns(site)
        clamd.sendall(b"PONG\0")
        assert answer_on(probe).status == 200


def test_status_clients_gone_in_one_turn_take_no_room(site):
    """These clients have sent requests that can be read, but have gone."""
    address = start(site)
    site.daemon.pause()
    for _ in range(2 * VISITORS):
        asks_and_goes(connect(address))
    with connect(address) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        site.daemon.resume()
        assert answer_on(probe).status == 200


# ---------------------------------------------------------------- SIGHUP

def listens(address):
    try:
        connect(address).close()
        return True
    except OSError:
        return False


def test_statuslisten_is_added_moved_and_removed_by_sighup(site):
    listen = site.path("in.sock")
    a, b = ("127.0.0.1:%d" % site.port() for _ in "ab")
    site.start(Listen=listen)
    site.reload(Listen=listen, StatusListen=a)
    site.session().mail()
    assert messages(a) == {"clean": 1}
    site.reload(Listen=listen, StatusListen=b)
    assert messages(b) == {"clean": 1} and not listens(a)
    site.reload(Listen=listen)
    assert not listens(b)
    site.session().mail()


def test_statuslisten_in_use_at_sighup_changes_nothing(site):
    listen = site.path("in.sock")
    address = start(site, Listen=listen)
    site.daemon.write(site.settings(Listen=listen, StatusListen=site.hop.address))
    site.daemon.send_signal(1)
    site.daemon.wait_log("^StatusListen: %s: Address" % site.hop.address)
    site.daemon.wait_log("reload failed")
    assert get(address).status == 200


def test_healthz_after_sighup_asks_the_new_clamd(site):
    listen = site.path("in.sock")
    status = "127.0.0.1:%d" % site.port()
    site.start(Listen=listen, StatusListen=status)
    assert get(status, "/healthz").status == 200
    site.reload(Listen=listen, StatusListen=status, ClamAddress="/no/such/socket")
    until(lambda: get(status, "/healthz").status == 503, "the new one is asked")
    assert "/no/such/socket" in get(status, "/metrics").text


# ---------------------------------------------------------------- -C

def silent_and(status, result):
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


def one_line_and(status, result):
    assert (result.returncode, result.stdout) == (status, "")
    line, = result.stderr.splitlines()
    return line


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -C", "clamsmtpd.8 EXIT STATUS: 0")
@pytest.mark.core
@pytest.mark.parametrize("where", ["PATH", "127.0.0.1:PORT", "PORT",
                                   localhost() + ":PORT", "0.0.0.0:PORT"])
def test_C_is_silent_with_status_0_when_healthy(site, run, where):
    where = where.replace("PORT", str(site.port("0.0.0.0"))).replace("PATH", site.path("s"))
    daemon = site.start(StatusListen=where)
    silent_and(0, run("-C", "-f", daemon.file))


def test_C_without_a_file_reads_the_environment(site, run):
    path = site.path("status")
    daemon = site.start(StatusListen=path)
    env = dict(os.environ, CLAMSMTPD_STATUSLISTEN=path, CLAMSMTPD_OUTADDRESS="25")
    silent_and(0, run("-C", "-f", "/no/such/file", env=env))
    site.clamd.down()
    assert site.clamd.address in until(
        lambda: run("-C", "-f", "/no/such/file", env=env).stderr, "it complains")
    del env["CLAMSMTPD_STATUSLISTEN"]
    one_line_and(2, run("-C", "-f", "/no/such/file", env=env))
    daemon.stop()


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -C", "clamsmtpd.8 EXIT STATUS: 1")
def test_C_prints_the_reason_with_status_1(site, run):
    daemon = site.start(StatusListen=site.path("s"), ClamAddress="/no/such/socket")
    line = one_line_and(1, run("-C", "-f", daemon.file))
    assert re.search("clamd /no/such/socket: No such file", line)


def test_C_tries_all_addresses_of_a_name(site, run, mounts):
    """The first address is dead."""
    hosts = site.path("hosts")
    with open(hosts, "w") as file:
        file.write("127.0.0.1 status.example\n127.0.0.98 status.example\n")
    port = site.port("127.0.0.98")
    site.start(StatusListen="127.0.0.98:%d" % port)
    file = site.path("conf")
    with open(file, "w") as conf:
        conf.write("OutAddress: 25\nStatusListen: status.example:%d\n" % port)
    silent_and(0, run("-C", "-f", file,
                      preexec_fn=mounting(bind(hosts, "/etc/hosts"))))


@pytest.mark.covers("clamsmtpd.8 OPTIONS: -C", "clamsmtpd.8 EXIT STATUS: 1")
@pytest.mark.parametrize("where, why", [
    ("127.0.0.1:PORT", "Connection refused"), ("PORT", "Connection refused"),
    ("/no/such/status", "No such file or directory"),
    ("no-such-status.invalid", "no address found for this name")])
def test_C_without_a_daemon_gives_the_reason(site, run, where, why):
    where = where.replace("PORT", str(site.port()))
    file = site.path("conf")
    with open(file, "w") as conf:
        conf.write("OutAddress: 25\nStatusListen: %s\n" % where)
    line = one_line_and(1, run("-C", "-f", file))
    assert where in line and why in line


class Fake(Server):
    """A server that is no clamsmtpd, at the address of StatusListen."""

    answer = b""

    def serve(self, sock):
        sock.recv(4096)
        self.send(sock, self.answer)


@pytest.mark.parametrize("answer", [
    b"", b"220 smtp.passthru\r\n", b"HTTP/1.1 500 Oops\r\n\r\n\x1b[2Jbad\r\nthings\n",
    b"HTTP/1.0 2", b"x" * 100000, b"HTTP/1.0 200 OK\r\n",
    b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 100000], ids=range(7))
def test_C_at_another_server_gives_the_reason(tmp_path, run, answer):
    file = tmp_path / "conf"
    with contextlib.closing(Fake()) as server:
        server.answer = answer
        file.write_text("OutAddress: 25\nStatusListen: %s\n" % server.address)
        line = one_line_and(1, run("-C", "-f", str(file)))
    assert re.fullmatch("[ -~]+", line)


def test_C_at_a_full_listener_gives_up(site, run):
    with full_listener(site.path("s")):
        file = site.path("conf")
        with open(file, "w") as conf:
            conf.write("OutAddress: 25\nStatusListen: %s\n" % site.path("s"))
        one_line_and(1, run("-C", "-f", file))


class Stalled(Fake):
    """A server that sends the start of a reply and then nothing, or a reset."""

    answer = b"HTTP/1.0 200 OK\r\n\r\n"
    broken = False

    def serve(self, sock):
        super().serve(sock)
        if self.broken:
            reset(sock)
        else:
            sock.recv(4096)


def stalled_at(tmp_path, run, **more):
    """The result of -C at a Stalled server with these attributes."""
    file = tmp_path / "conf"
    with contextlib.closing(Stalled()) as server:
        vars(server).update(more)
        file.write_text("OutAddress: 25\nStatusListen: %s\n" % server.address)
        return run("-C", "-f", str(file), timeout=max(WAIT, 60))


def test_C_at_a_server_that_resets_a_good_reply_is_status_1(tmp_path, run):
    assert "reset" in one_line_and(1, stalled_at(tmp_path, run, broken=True))


@pytest.mark.long
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 200 OK\r\n", Stalled.answer],
                         ids=range(3))
def test_C_at_a_server_that_stalls_is_status_1(tmp_path, run, answer):
    """A reply is whole at its EOF only."""
    assert "timed out" in one_line_and(1, stalled_at(tmp_path, run, answer=answer))


@pytest.mark.covers("clamsmtpd.8 EXIT STATUS: 2")
@pytest.mark.parametrize("text", ["", "StatusListen: x:y\n", "TimeOut: x\n"])
def test_C_without_statuslisten_is_status_2(site, run, text):
    file = site.path("conf")
    with open(file, "w") as conf:
        conf.write("OutAddress: 25\n" + text)
    one_line_and(2, run("-C", "-f", file))
