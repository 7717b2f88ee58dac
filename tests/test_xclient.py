"""XCLIENT to the next hop, and XFORWARD from the client to the next hop."""

import re

import pytest

from harness import BAD, CLOSE, Faults, Hold, XCLIENT, environment, has_ipv6

@pytest.fixture
def xhop(site):
    site.hop.ehlo = ["DSN", XCLIENT]
    return site.hop


@pytest.mark.covers("clamsmtpd.conf.5 XClient",
    "clamsmtpd.conf.5 XClient: first HELO or EHLO")
@pytest.mark.core
def test_xclient_is_sent_and_ehlo_is_repeated(site, xhop):
    xhop.on("EHLO", ["250-a\n250-DSN\n250 " + XCLIENT, "250-a\n250-SIZE 50000\n250 AUTH PLAIN"])
    site.start(XClient="on")
    client = site.client(source="127.0.0.9")
    client.expect("220")
    got = client.cmd("EHLO my.name", "250")
    assert sorted(got.keywords()) == ["AUTH PLAIN", "PIPELINING", "SIZE 50000"]
    port = client.sock.getsockname()[1]
    assert site.hop.commands == [
        "EHLO my.name",
        "XCLIENT NAME=[UNAVAILABLE] ADDR=127.0.0.9 PORT=%d" % port,
        "EHLO my.name"]
    client.cmd("NOOP", "250")
    client.mail()
    client.quit()


@pytest.mark.parametrize("hello", ["EHLO", "HELO"])
def test_xclient_after_hello_without_a_name_repeats_it(site, xhop, hello):
    """A next hop may accept EHLO without a name, which is then sent again."""
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd(hello, "250")
    assert [line.split(" ")[0] for line in site.hop.commands] == [
        hello, "XCLIENT", hello]
    client.mail()
    client.quit()


@pytest.mark.parametrize("offer, want", [
    ("XCLIENT ADDR", r"XCLIENT ADDR=127\.0\.0\.1"),
    ("XCLIENT NAME ADDR", r"XCLIENT NAME=\[UNAVAILABLE\] ADDR=127\.0\.0\.1"),
    ("XCLIENT PORT ADDR", r"XCLIENT ADDR=127\.0\.0\.1 PORT=\d+"),
    ("xclient addr", r"XCLIENT ADDR=127\.0\.0\.1"),
])
def test_xclient_has_only_attributes_that_the_next_hop_lists(site, offer, want):
    site.hop.ehlo = ["DSN", offer]
    site.start(XClient="on")
    client = site.session()
    sent, = site.hop.received("XCLIENT")
    assert re.fullmatch(want, sent)
    client.quit()


def test_xclient_address_of_an_ipv6_client_has_a_prefix(site, xhop):
    if not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    site.start(XClient="on", Listen="[::1]:0")
    client = site.session()
    sent, = site.hop.received("XCLIENT")
    assert re.search(r" ADDR=IPV6:::1( |$)", sent)
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 XClient")
def test_xclient_off_sends_none(site, xhop):
    client = site.session()
    assert site.hop.commands == ["EHLO client.example"]
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 XClient: not offered or refused")
@pytest.mark.parametrize("offer", [[], ["XCLIENT"], ["XCLIENT LOGIN PROTO"]])
def test_xclient_not_offered_is_a_warning(site, offer):
    site.hop.ehlo = ["DSN"] + offer
    site.start(XClient="on")
    client = site.session()
    assert site.hop.commands == ["EHLO client.example"]
    client.mail()
    client.quit()
    site.daemon.wait_log("^100000: SERVER: does not offer XCLIENT")


HELO_XCLIENT = "XCLIENT NAME=[UNAVAILABLE] ADDR=127.0.0.9"


def helo(site):
    """A session that has begun with HELO."""
    client = site.client(source="127.0.0.9")
    client.expect("220")
    client.cmd("HELO my.name", "250 smtp.passthru")
    return client


@pytest.mark.covers("clamsmtpd.conf.5 XClient: first HELO or EHLO")
@pytest.mark.core
def test_xclient_after_helo_has_name_and_address(site):
    """HELO lists no attributes, so the daemon sends those that most next hops
    accept."""
    site.start(XClient="on")
    client = helo(site)
    assert site.hop.commands == ["HELO my.name", HELO_XCLIENT, "HELO my.name"]
    client.mail()
    client.quit()


def test_xclient_after_helo_refused_with_501_is_sent_without_name(site):
    site.hop.on("XCLIENT", ["501 5.5.4 Bad NAME syntax"])
    site.start(XClient="on")
    client = helo(site)
    assert site.hop.commands == ["HELO my.name", HELO_XCLIENT,
                                 "XCLIENT ADDR=127.0.0.9", "HELO my.name"]
    client.mail()
    client.quit()
    assert not site.daemon.log("refused XCLIENT")


def test_xclient_after_helo_refused_with_501_twice_is_refused(site):
    site.hop.on("XCLIENT", ["501 5.5.4 no", "501 5.5.4 never"])
    site.start(XClient="on")
    client = helo(site)
    assert site.hop.session.verbs() == ["HELO", "XCLIENT", "XCLIENT"]
    site.daemon.wait_log("SERVER: refused XCLIENT: 501 5.5.4 never")
    client.mail()
    client.quit()


@pytest.mark.core
def test_xclient_refused_after_helo_is_sent_at_the_first_ehlo(site, xhop):
    """Some next hops accept XCLIENT only after EHLO.  A second HELO does not send
    it again."""
    xhop.on("XCLIENT", ["503 5.5.1 EHLO first"])
    site.start(XClient="on")
    client = helo(site)
    client.cmd("HELO my.name", "250")
    client.mail()
    client.cmd("EHLO my.name", "250")
    client.cmd("EHLO my.name", "250")
    client.mail()
    client.quit()
    verbs = [v for v in site.hop.session.verbs() if v in ("HELO", "EHLO", "XCLIENT")]
    assert verbs == ["HELO", "XCLIENT", "HELO", "EHLO", "XCLIENT", "EHLO", "EHLO"]
    assert "PORT=" in site.hop.received("XCLIENT")[1]


@pytest.mark.covers("clamsmtpd.conf.5 XClient: 503 until then")
@pytest.mark.core
@pytest.mark.parametrize("command", [
    "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "VRFY a", "EXPN a", "ETRN a",
    "AUTH PLAIN AA==", "XFORWARD ADDR=1.2.3.4", "STARTTLS", "XCLIENT ADDR=1.2.3.4",
    "BDAT 0", "TURN"])
def test_xclient_withheld_helo_gets_503(site, xhop, command):
    """PROMISE 10: without XCLIENT the next hop would take the client for the
    filter."""
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd(command, "500 5.5.1" if command == "TURN" else "503 5.5.1")
    assert site.hop.commands == []
    client.cmd("EHLO me", "250")
    client.mail()
    client.quit()


def test_xclient_withheld_helo_discards_bdat(site, xhop):
    """PROMISE 10: the octets of a chunk are not read as commands."""
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.chunk(b"NOOP\r\n" * 3, last=True)
    client.expect("503 5.5.1")
    client.cmd("HELP", "214")
    assert site.hop.commands == ["HELP"]
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 XClient: 503 until then")
def test_xclient_withheld_lets_some_commands_pass(site, xhop):
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    for command, want in ("NOOP", "250"), ("RSET", "250"), ("HELP", "214"):
        client.cmd(command, want)
    assert site.hop.commands == ["NOOP", "RSET", "HELP"]
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 XClient: first HELO or EHLO")
@pytest.mark.core
@pytest.mark.parametrize("hello", ["EHLO", "HELO"])
def test_xclient_withheld_while_hello_is_refused(site, xhop, hello):
    """PROMISE 10: the 503s last until XCLIENT is accepted."""
    xhop.on(hello, ["501 5.5.4 Syntax: %s hostname" % hello])
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd("MAIL FROM:<a@b>", "503 5.5.1")
    client.cmd(hello, "501 5.5.4")
    client.cmd("MAIL FROM:<a@b>", "503 5.5.1")
    client.cmd("EHLO me", "250")
    client.mail()
    client.quit()
    assert site.hop.session.verbs()[:5] == [hello, "EHLO", "XCLIENT", "EHLO", "MAIL"]


@pytest.mark.covers("clamsmtpd.conf.5 XClient: first HELO or EHLO")
@pytest.mark.core
def test_xclient_is_not_sent_at_a_later_ehlo(site, xhop):
    site.start(XClient="on")
    client = site.session()
    client.cmd("EHLO again", "250")
    client.cmd("HELO again", "250")
    assert len(site.hop.received("XCLIENT")) == 1
    client.mail()
    client.quit()


def test_xclient_offered_at_a_later_ehlo_is_not_sent(site):
    """After a later EHLO, XCLIENT would undo AUTH."""
    site.start(XClient="on")
    client = site.session()
    site.hop.ehlo = ["DSN", XCLIENT]
    client.cmd("EHLO again", "250")
    assert site.hop.received("XCLIENT") == []
    client.quit()


@pytest.mark.covers("clamsmtpd.conf.5 XClient: not offered or refused")
@pytest.mark.core
@pytest.mark.parametrize("reply", [
    "550 5.7.0 insufficient authorization", "501-5.5.4 a\n501 5.5.4 b",
    "500 5.5.1 what", "502 5.5.1 no", "503 5.5.1 not now", "504 5.5.4 no"])
def test_xclient_refused_goes_on_with_the_first_reply(site, xhop, reply):
    xhop.on("XCLIENT", reply)
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    got = client.cmd("EHLO me", "250")
    assert "DSN" in got.keywords()
    assert site.hop.session.verbs() == ["EHLO", "XCLIENT"]
    site.daemon.wait_log("SERVER: refused XCLIENT: " + reply[:3])
    client.cmd("EHLO me", "250")
    client.mail()
    client.quit()
    assert len(site.hop.received("XCLIENT")) == 1


@pytest.mark.covers("clamsmtpd.conf.5 XClient: other refusal")
@pytest.mark.core
@pytest.mark.parametrize("reply", [
    "450 4.7.1 Client host rejected: cannot find your hostname", "421 4.3.2 bye",
    "554-5.7.1 no\n554 5.7.1 never", "521 5.7.1 no", "551 5.7.1 x", "452 4.3.1 x"])
@pytest.mark.parametrize("hello", ["EHLO", "HELO"])
def test_xclient_answered_with_a_refusal_of_the_client_ends_the_session(
        site, xhop, reply, hello):
    """The reply is the greeting that this client would have received."""
    xhop.on("XCLIENT", reply)
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    assert client.cmd(hello + " me").text == reply
    client.eof()
    assert site.hop.session.wait_end() in ("quit", "eof")
    assert site.hop.session.verbs()[:2] == [hello, "XCLIENT"]
    assert len(site.hop.commands) == 3 - reply.startswith("421")
    site.daemon.wait_log("SERVER: refused the client: " + reply[:3])


@pytest.mark.parametrize("which", range(1, 5))
def test_xclient_without_memory_is_not_skipped(site, xhop, faulty_build, which):
    """PROMISE 10: without memory the session ends.  One allocation fails after the
    reply to EHLO, when other allocations use the kept buffers."""
    hello, greeting = Hold(), Hold()
    xhop.on("EHLO", [hello]).on("greeting", [None, greeting, greeting])
    faults = Faults(site.path("faults"), "malloc:1000000:0:12")
    site.start(XClient="on", binary=faulty_build, env=faults.env)
    client = site.client()
    client.send("EHLO me\r\nMAIL FROM:<a@b>\r\n")
    client.half_close()
    hello.reached()
    others = [site.client() for _ in range(2)]
    for other in others:
        other.send("EHLO")
    greeting.reached(2)
    site.daemon.rests()
    faults.count("malloc", 1000000 - which)
    hello.go()
    client.rest()
    verbs = site.hop.sessions[0].verbs()
    assert "MAIL" not in verbs or "XCLIENT" in verbs, verbs
    greeting.go()


def test_xclient_second_ehlo_refused_is_relayed(site, xhop):
    xhop.on("EHLO", [None, "550-5.7.1 not\n550 5.7.1 you"])
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    assert client.cmd("EHLO me").text == "550-5.7.1 not\n550 5.7.1 you"
    client.quit()


def test_xclient_with_the_next_hop_gone_gives_421(site, xhop):
    xhop.on("XCLIENT", CLOSE)
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd("EHLO me", "421")
    client.eof()


def test_xclient_makes_pipelined_commands_wait(site, xhop):
    site.start(XClient="on")
    client = site.client()
    client.send("EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    for want in ("220", "250", "250 2.1.0", "250 2.1.5"):
        client.expect(want)
    assert site.hop.session.verbs() == ["EHLO", "XCLIENT", "EHLO", "MAIL", "RCPT"]
    client.quit()


# ---------------------------------------------------------------- XFORWARD

def test_xforward_is_offered_and_relayed_unchanged(site):
    line = "XFORWARD NAME ADDR PROTO HELO SOURCE PORT"
    site.hop.ehlo = [line]
    client = site.client()
    client.expect("220")
    assert line in client.cmd("EHLO me", "250").keywords()
    client.cmd("XFORWARD NAME=spike.example ADDR=168.100.189.2 PROTO=ESMTP", "250")
    client.cmd("xforward helo=spike+2Bx source=LOCAL", "250")
    assert site.hop.commands[1:] == [
        "XFORWARD NAME=spike.example ADDR=168.100.189.2 PROTO=ESMTP",
        "xforward helo=spike+2Bx source=LOCAL"]
    client.mail()
    client.quit()


@pytest.mark.covers("clamsmtpd.8 VIRUS ACTIONS: REMOTE",
    "clamsmtpd.8 VIRUS ACTIONS: REMOTE_HELO")
@pytest.mark.parametrize("commands, remote, helo", [
    (["XFORWARD ADDR=192.0.2.5 HELO=a.b"], "192.0.2.5", "a.b"),
    (["XFORWARD NAME=x ADDR=192.0.2.5", "XFORWARD HELO=a.b"], "192.0.2.5", "a.b"),
    (["xforward addr=192.0.2.5 helo=a.b"], "192.0.2.5", "a.b"),
    (["XFORWARD ADDR=IPV6:2001:db8::1"], "2001:db8::1", None),
    (["XFORWARD HELO=a+2Bb+3D"], None, "a+b="),
    (["XFORWARD ADDR=[UNAVAILABLE] HELO=[UNAVAILABLE]"], None, None),
    (["XFORWARD ADDR=[TEMPUNAVAIL] HELO=x"], None, "x"),
    (["XFORWARD ADDR=192.0.2.5", "XFORWARD ADDR=[UNAVAILABLE]"], None, None),
    (["XFORWARD ADDR=192.0.2.5", "RSET"], None, None),
    (["XFORWARD ADDR=192.0.2.5 HELO=refused"], None, None),
    (["XFORWARD NAME=x"], None, None),
])
def test_xforward_accepted_sets_remote(site, commands, remote, helo):
    site.hop.on("XFORWARD",
                lambda s, line: "550 5.7.0 no" if "refused" in line else None)
    result = environment(site)
    client = site.session()
    for command in commands:
        client.line(command)
        client.reply()
    client.mail(body=BAD, want="250 2.0.0 Virus")
    client.quit()
    env = result()
    assert (env.get("REMOTE"), env.get("REMOTE_HELO")) == (remote, helo)
