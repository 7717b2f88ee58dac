"""XCLIENT to the next hop, XFORWARD through us."""

import re

import pytest

from harness import BAD, CLOSE, XCLIENT, environment, has_ipv6

@pytest.fixture
def xhop(site):
    site.hop.ehlo = ["DSN", XCLIENT]
    return site.hop


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


@pytest.mark.parametrize("offer, want", [
    ("XCLIENT ADDR", r"XCLIENT ADDR=127\.0\.0\.1"),
    ("XCLIENT NAME ADDR", r"XCLIENT NAME=\[UNAVAILABLE\] ADDR=127\.0\.0\.1"),
    ("XCLIENT PORT ADDR", r"XCLIENT ADDR=127\.0\.0\.1 PORT=\d+"),
    ("xclient addr", r"XCLIENT ADDR=127\.0\.0\.1"),
])
def test_only_attributes_that_the_next_hop_lists(site, offer, want):
    site.hop.ehlo = ["DSN", offer]
    site.start(XClient="on")
    client = site.session()
    sent, = site.hop.told("XCLIENT")
    assert re.fullmatch(want, sent)
    client.quit()


def test_an_ipv6_client_is_prefixed(site, xhop):
    if not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    site.start(XClient="on", Listen="[::1]:0")
    client = site.session()
    sent, = site.hop.told("XCLIENT")
    assert re.search(r" ADDR=IPV6:::1( |$)", sent)
    client.quit()


def test_no_xclient_when_it_is_off(site, xhop):
    client = site.session()
    assert site.hop.commands == ["EHLO client.example"]
    client.quit()


def test_no_xclient_when_it_is_not_offered(site):
    site.start(XClient="on")
    client = site.session()
    assert site.hop.commands == ["EHLO client.example"]
    client.mail()
    client.quit()


def test_xclient_behind_helo(site):
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd("HELO my.name", "250 smtp.passthru")
    verbs = site.hop.session.verbs()
    assert verbs == ["HELO", "XCLIENT", "HELO"]
    client.mail()
    client.quit()


@pytest.mark.core
def test_a_later_ehlo_sends_none(site, xhop):
    site.start(XClient="on")
    client = site.session()
    client.cmd("EHLO again", "250")
    client.cmd("HELO again", "250")
    assert len(site.hop.told("XCLIENT")) == 1
    client.mail()
    client.quit()


def test_a_later_ehlo_sends_none_when_it_is_offered_only_then(site):
    """Later than the first EHLO it would wipe AUTH."""
    site.start(XClient="on")
    client = site.session()
    site.hop.ehlo = ["DSN", XCLIENT]
    client.cmd("EHLO again", "250")
    assert site.hop.told("XCLIENT") == []
    client.quit()


@pytest.mark.core
@pytest.mark.parametrize("reply", ["550 5.7.0 insufficient authorization",
                                   "501-5.5.4 a\n501 5.5.4 b", "421 4.3.2 bye"])
def test_xclient_refused_goes_on_with_the_first_reply(site, xhop, reply):
    xhop.on("XCLIENT", reply)
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    if reply.startswith("421"):
        client.line("EHLO me")
        client.reply()
        client.rest()
        return
    got = client.cmd("EHLO me", "250")
    assert "DSN" in got.keywords()
    assert site.hop.session.verbs() == ["EHLO", "XCLIENT"]
    site.daemon.wait_log("XCLIENT")
    client.mail()
    client.quit()


def test_the_second_ehlo_refused_is_what_the_client_gets(site, xhop):
    xhop.on("EHLO", [None, "550-5.7.1 not\n550 5.7.1 you"])
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    assert client.cmd("EHLO me").text == "550-5.7.1 not\n550 5.7.1 you"
    client.quit()


def test_next_hop_gone_at_xclient(site, xhop):
    xhop.on("XCLIENT", CLOSE)
    site.start(XClient="on")
    client = site.client()
    client.expect("220")
    client.cmd("EHLO me", "421")
    client.eof()


def test_pipelined_commands_wait_for_the_second_reply(site, xhop):
    site.start(XClient="on")
    client = site.client()
    client.send("EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    for want in ("220", "250", "250 2.1.0", "250 2.1.5"):
        client.expect(want)
    assert site.hop.session.verbs() == ["EHLO", "XCLIENT", "EHLO", "MAIL", "RCPT"]
    client.quit()


# ---------------------------------------------------------------- XFORWARD

def test_xforward_is_offered_and_relayed_as_it_is(site):
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
def test_xforward_feeds_remote(site, commands, remote, helo):
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
