"""A real Postfix before and after us, in the usual set-ups.

Its configuration is that of docs/examples, added to what any Postfix has.  Its
configuration, queue, data and log are in a private directory, and it listens on
free ports of the loopback interface.  The machine's own Postfix is left alone.
"""

import os
import re

import pytest

import harness
import real
from harness import EICAR, HEADER, VIRUS, until

pytestmark = [
    pytest.mark.postfix,
    pytest.mark.skipif(os.geteuid() != 0, reason="Postfix needs root"),
    pytest.mark.skipif(not real.find("postconf") or not real.user("postfix"),
                       reason="no Postfix installed"),
]

BODY = (b"Subject: through Postfix\r\nX-Own: yes\r\n\r\nfirst line\r\n"
        b".one dot\r\n..\r\n.\r\n\r\n\ttab and 8 bit: \xc3\xa4\xc3\xb6\r\nlast\r\n")
SICK = b"Subject: sick\r\n\r\n" + EICAR + b"\r\n"


@pytest.fixture(scope="session")
def postfix():
    """A Postfix with a filter after its queue."""
    postfix = real.Postfix()
    yield postfix
    postfix.close()


@pytest.fixture(scope="session")
def before():
    """A Postfix with a filter before its queue."""
    before = real.Postfix("postfix-before-queue")
    yield before
    before.close()


def to_postfix(site, postfix, name="smtp", source=None):
    return real.speak(site, postfix.address(name), source)


def check(message, body, header=HEADER):
    """The mail arrived as it was sent, with our header."""
    head, text = message
    wanted, _, wanted_text = real.unix(body).partition(b"\n\n")
    assert real.unix(header) in head, head
    own = head[head.index(b"\nSubject: ") + 1:]
    harness.same(own, wanted + b"\n" + real.unix(header), "the headers")
    harness.same(text, wanted_text, "the body")


# ---------------------------------------------------------------- next hop

def test_postfix_as_next_hop_delivers(site, postfix):
    """Postfix's EHLO reply, its other replies and several mails in a session
    pass."""
    site.start(OutAddress=postfix.address("other"))
    client = site.client()
    assert client.expect("220").text == "220 smtp.passthru"
    words = [k.split()[0] for k in
             client.cmd("EHLO client.example", "250").keywords()]
    for word in ("PIPELINING", "SIZE", "ETRN", "8BITMIME", "DSN", "SMTPUTF8",
                 "ENHANCEDSTATUSCODES", "CHUNKING"):
        assert word in words
    assert "XCLIENT" not in words and "STARTTLS" not in words
    for number in range(3):
        reply = client.mail(body=BODY.replace(b"through", b"nexthop%d" % number))
        assert re.match("250 2.0.0 Ok: queued as ", reply.text), reply.text
    client.cmd("MAIL FROM:<a@example.com>", "250")
    client.cmd("RCPT TO:<b@elsewhere.example>", "250")
    client.cmd("RCPT TO:<not an address>", "501 5.1.3")
    client.cmd("RSET", "250")
    client.cmd("MAIL FROM:<a@example.com> SIZE=99999999", "552")
    client.quit()
    for number in range(3):
        body = BODY.replace(b"through", b"nexthop%d" % number)
        message, = postfix.wait_delivered(b"nexthop%d Postfix" % number)
        check(message, body)


def test_postfix_as_next_hop_takes_chunks(site, postfix):
    """The client and Postfix both use BDAT."""
    site.start(OutAddress=postfix.address("other"))
    client = site.session()
    body = BODY.replace(b"through", b"chunked")
    client.envelope()
    for start in range(0, len(body), 50):
        client.chunk(body[start:start + 50])
        client.expect("250")
    client.chunk(b"", last=True)
    client.expect("250 2.0.0 Ok: ")
    client.quit()
    check(postfix.wait_delivered(b"chunked Postfix")[0], body)


@pytest.mark.parametrize("header", ["X-Virus-Scanned: yes", "Received: filter"])
def test_postfix_headers_below_mbox_lines_arrive_as_headers(site, postfix, header):
    """After DATA, Postfix reads a first line that is a From_ line as a header, and
    a later one as the end of the header section.  (Postfix 3.7 reads a second such
    line as a header, too; 3.10 does not.)"""
    site.start(OutAddress=postfix.address("other"), Header=header)
    client = site.session()
    name = b"mbox " + header[:1].encode()
    body = (b"From a@example.com  Mon Aug 22 09:45:15 2011\r\n"
            b"Subject: %s\r\nMIME-Version: 1.0\r\n\r\n<b>text</b>\r\n" % name)
    client.mail(body=body)
    client.quit()
    head, text = postfix.wait_delivered(name)[0]
    assert text == b"<b>text</b>\n"
    for line in header.encode(), b"MIME-Version: 1.0", b"X-Mailbox-Line: From a@":
        assert b"\n" + line in head, head


@pytest.mark.parametrize("mbox", [b"", b"From a@example.com\r\n"])
def test_postfix_text_that_begins_with_a_blank_arrives_as_text(site, postfix, mbox):
    """Postfix alone does the same: it separates such text from its own headers."""
    site.start(OutAddress=postfix.address("other"))
    client = site.session()
    text = b"  blank first, %d\r\nsecond line\r\n" % len(mbox)
    client.mail(body=mbox + text)
    client.quit()

    def arrived():
        return [m for m in postfix.delivered() if m[1] == real.unix(text)]
    (head, _), = until(arrived, "the text is delivered")
    assert real.unix(HEADER) in head


def test_postfix_long_mail_arrives_whole(site, postfix):
    site.start(OutAddress=postfix.address("other"))
    client = site.session()
    count = 500 if os.environ.get("TEST_BYTES") else 8000
    body = b"Subject: long\r\n\r\n" + b"".join(
        b"%d %s\r\n.%d\r\n" % (n, b"x" * (n % 900), n) for n in range(count))
    client.mail(body=body)
    client.quit()
    check(postfix.wait_delivered(b"long")[0], body)


ENDS = [b"\n.\n", b"\r.\r", b"\r.\n", b"\n.\r", b"\n.\r\n", b"\r\n.\n",
        b"\r.\r\n", b"\r\n.\r", b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\n.\r\r\n",
        b"\r\r\n.\r\r\n", b"\n\n.\n\n"]


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_postfix_is_not_smuggled(site, postfix, end):
    """Text that some servers read as the end of data smuggles no mail into Postfix,
    which on this port, for local clients, would accept several."""
    site.start(OutAddress=postfix.address("back"))
    client = site.session()
    name = b"%d" % ENDS.index(end)
    client.begin(b"Subject: outer%s\r\n\r\ntext%sMAIL FROM:<evil%s@example.com>\r\n"
                b"RCPT TO:<b@example.com>\r\nDATA\r\nSubject: smuggled%s\r\n\r\n"
                b"evil\r\n.\r\n" % (name, end, name, name))
    client.expect("250 2.0.0 Ok: queued")
    client.cmd("NOOP", "250")
    client.quit()
    assert len(postfix.wait_delivered(b"outer" + name)) == 1
    assert b"from=<evil%s@" % name not in postfix.text().encode()


# ---------------------------------------------------------------- after queue

def start(site, postfix, **settings):
    real.start_example(site, postfix.recipe, postfix.ports, **settings)


@pytest.mark.covers("clamsmtpd.8 Postfix, after the queue")
def test_after_queue_mail_is_filtered_and_delivered(open_site, postfix, real_clamd):
    start(open_site, postfix, ClamAddress=real_clamd.path)
    real.check_after_queue(open_site, real_clamd, postfix)


def test_after_queue_bytes_arrive(open_site, postfix):
    site = open_site
    start(site, postfix)
    client = to_postfix(site, postfix, source="127.0.0.5")
    body = BODY.replace(b"through", b"after")
    client.mail(body=body)
    client.quit()
    check(postfix.wait_delivered(b"after Postfix")[0], body)
    # Postfix knows our client from XFORWARD.
    postfix.wait_log(r"client=\S*\[127.0.0.1\], .*orig_client=\S*\[127.0.0.5\]")
    site.daemon.wait_log("status=CLEAN$")


def test_after_queue_long_lines_stay_whole(open_site, postfix):
    """Postfix breaks lines above 998 bytes unless the recipe says otherwise."""
    site = open_site
    start(site, postfix)
    client = to_postfix(site, postfix)
    body = (b"Subject: longline Postfix\r\nX-Own: " + b"h" * 1500 + b"\r\n\r\n" +
            b"x" * 998 + b"\r\n" + b"y" * 999 + b"\r\n" + b"z" * 5000 + b"\r\n")
    client.mail(body=body)
    client.quit()
    check(postfix.wait_delivered(b"longline Postfix")[0], body)


def test_after_queue_utf8_address_arrives(open_site, postfix):
    """An address that needs SMTPUTF8 is not bounced.  A port alone as OutAddress,
    which older guides used, leads back to Postfix."""
    site = open_site
    start(site, postfix, OutAddress=str(postfix.port["back"]))
    client = to_postfix(site, postfix)
    body = BODY.replace(b"through", b"utf8")
    client.cmd("MAIL FROM:<m\xfcller@example.com> SMTPUTF8 BODY=8BITMIME"
               .encode("utf-8"), "250")
    client.cmd("RCPT TO:<b@example.com> NOTIFY=NEVER", "250")
    client.data(body)
    client.quit()
    check(postfix.wait_delivered(b"utf8 Postfix")[0], body)


def test_after_queue_virus_is_not_delivered(open_site, postfix):
    """The VirusAction gets the client that connected to Postfix."""
    site = open_site
    out = os.path.join(site.spool, "environment")
    start(site, postfix, VirusAction=harness.finish_file("env", out))
    client = to_postfix(site, postfix, source="127.0.0.5")
    client.mail("sick@example.com", ["b@example.com", "c@example.com"], SICK)
    client.quit()
    postfix.wait_log(r"relay=127.0.0.1.*status=sent "
                     r"\(250 2.0.0 Virus Detected; Discarded Email\)")
    lines = harness.wait_file(out).decode().splitlines()
    site.daemon.allowed.add("environment")
    for line in ("REMOTE=127.0.0.5", "REMOTE_HELO=client.example",
                 "CLIENT=127.0.0.1", "SERVER=127.0.0.1", "VIRUS=" + VIRUS,
                 "SENDER=sick@example.com", "TMPDIR=" + site.spool,
                 "EMAIL=" + real.quarantined(site)):
        assert line in lines, "\n".join(lines)
    at = lines.index("RECIPIENTS=b@example.com")
    assert lines[at + 1] == "c@example.com"
    site.daemon.wait_log("from=sick@example.com, to=b@example.com, "
                         "to=c@example.com, status=VIRUS:")
    assert not [m for m in postfix.delivered() if b"Subject: sick\n" in m[0]]


def test_after_queue_many_mails_are_delivered(open_site, postfix):
    start(open_site, postfix)
    body = BODY.replace(b"through", b"many")

    def one(number):
        client = to_postfix(open_site, postfix)
        for turn in range(3):
            client.mail("%d.%d@example.com" % (number, turn), body=body)
        client.quit()

    harness.at_once(one, 8)
    for message in postfix.wait_delivered(b"many Postfix", 24):
        check(message, body)


def test_after_queue_turned_off_delivers_queued_mail(site):
    """After the steps of the manual page, mail that waits for the filter is
    delivered without it."""
    postfix = real.Postfix()
    try:
        client = to_postfix(site, postfix)
        client.mail(body=BODY)
        client.quit()
        postfix.wait_log("status=deferred .*Connection refused")
        postfix.run("postconf", "-X", "content_filter", "receive_override_options")
        postfix.run("postfix", "reload")
        message, = real.insist(lambda: postfix.run("postsuper", "-r", "ALL"),
                               postfix.delivered, "what was queued is delivered")
        assert b"X-Virus-Scanned" not in message[0]
    finally:
        postfix.close()


# ---------------------------------------------------------------- before queue

@pytest.mark.covers("clamsmtpd.8 Postfix, before the queue")
def test_before_queue_virus_is_refused_to_the_sender(open_site, before, real_clamd):
    """The sending server gets the reply to its mail, and no mail about it is
    sent."""
    site = open_site
    start(site, before, ClamAddress=real_clamd.path)
    client = to_postfix(site, before)
    client.mail(body=real.titled(b"well"))
    client.mail(body=real.titled(b"sick", real.EICAR), want="550 5.7.1 Virus "
                "Detected; Content Rejected (%s)" % real.EICAR_NAME)
    real_clamd.kill()
    client.mail(body=real.titled(b"late"), want="451 4.3.0 Local Error (clamd: ")
    real_clamd.start()
    client.mail(body=real.titled(b"late"))
    client.quit()
    for title in b"well", b"late":
        mail, = before.wait_delivered(title)
        assert mail[0].count(b"X-Virus-Scanned: ") == 1
    until(lambda: not before.queued(), "nothing is queued")
    assert not [m for m in before.arrived()
                if b"Subject: sick\n" in m or b"MAILER-DAEMON" in m]


@pytest.mark.parametrize("port", ["smtp", "other"])
def test_before_queue_bytes_arrive(open_site, before, port):
    site = open_site
    start(site, before)
    client = to_postfix(site, before, port, "127.0.0.6")
    body = BODY.replace(b"through", port.encode())
    client.mail(body=body)
    client.mail(body=SICK, want="550 5.7.1 Virus Detected; Content Rejected (%s)"
                % VIRUS)
    client.mail(body=body)
    client.quit()
    for message in before.wait_delivered(port.encode() + b" Postfix", 2):
        check(message, body)
    before.wait_log(r"client=\S*\[127.0.0.1\], .*orig_client=\S*\[127.0.0.6\]")


def test_before_queue_scan_time_out_is_below_postfix(before):
    """Postfix waits longer for us than we wait for clamd."""
    with open(real.EXAMPLES + "/postfix-before-queue/clamsmtpd.conf") as file:
        ours = int(re.search(r"^ScanTimeOut: (\d+)$", file.read(), re.M)[1])
    assert before.run("postconf", "-h", "smtpd_proxy_timeout") == "100s\n"
    assert ours < 100


# ---------------------------------------------------------------- XCLIENT

def test_xclient_names_the_client_to_postfix(site, postfix):
    """Postfix records the mail as one of our client.  It needs HELO again."""
    site.start(OutAddress=postfix.address("other"), XClient="on")
    client = site.session(source="127.0.0.7")
    body = BODY.replace(b"through", b"xclient")
    queued = client.mail(body=body).text.split()[-1]
    client.mail(body=body)
    client.quit()
    postfix.wait_log(r"%s: client=\S*\[127.0.0.7\]" % queued)
    for message in postfix.wait_delivered(b"xclient Postfix", 2):
        check(message, body)
        assert b"from client.example (unknown [127.0.0.7])" in message[0]


def test_xclient_after_helo_names_the_client(site, postfix):
    site.start(OutAddress=postfix.address("other"), XClient="on")
    client = site.client(source="127.0.0.8")
    client.expect("220 smtp.passthru")
    client.cmd("HELO old.example", "250 smtp.passthru")
    queued = client.mail(body=BODY).text.split()[-1]
    client.quit()
    postfix.wait_log(r"%s: client=\S*\[127.0.0.8\]" % queued)


def test_xclient_of_an_ipv6_client_names_it(site, postfix):
    if not harness.has_ipv6():
        pytest.skip("no IPv6 here")
    site.start(Listen="[::1]:0", OutAddress=postfix.address("other"), XClient="on")
    client = site.session()
    queued = client.mail(body=BODY).text.split()[-1]
    client.quit()
    postfix.wait_log(r"%s: client=\S*\[::1\]" % queued)


def test_xclient_not_allowed_by_postfix_delivers(site, postfix):
    """Mail is delivered even if Postfix does not offer XCLIENT."""
    site.start(OutAddress=postfix.address("back"), XClient="on")
    client = site.session(source="127.0.0.9")
    queued = client.mail(body=BODY).text.split()[-1]
    client.quit()
    postfix.wait_log(r"%s: client=\S*\[127.0.0.1\]" % queued)


# Only this host may relay, as in Postfix's default, and only these may send XCLIENT.
RELAY = """mynetworks = 127.0.0.1/32
smtpd_authorized_xclient_hosts = 127.0.0.1
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_recipient_restrictions =
"""


@pytest.fixture(scope="module")
def relay():
    """A Postfix that is an open relay for the filter's own address."""
    postfix = real.Postfix(more=RELAY)
    yield postfix
    postfix.close()


@pytest.mark.parametrize("hello, codes", [
    ([], []), (["EHLO"], ["501"]), (["HELO"], ["501"]),
    (["EHLO a.example"], ["250"]), (["HELO a.example"], ["250"])], ids=str)
def test_xclient_makes_no_open_relay(site, relay, hello, codes):
    """PROMISE 10: a stranger cannot send mail to strangers through the filter, with
    or without EHLO."""
    site.start(OutAddress=relay.address("smtp"), XClient="on")
    client = site.client(source="127.0.0.7")
    client.expect("220")
    for command, code in zip(hello, codes):
        client.cmd(command, code)
    if "250" not in codes:
        client.cmd("MAIL FROM:<a@example.org>", "503 5.5.1")
        client.cmd("RCPT TO:<stranger@elsewhere.example>", "503 5.5.1")
        client.cmd("EHLO a.example", "250")
    client.cmd("MAIL FROM:<a@example.org>", "250")
    client.cmd("RCPT TO:<stranger@elsewhere.example>", "554 5.7.1")
    client.quit()


def test_xclient_refusal_of_the_client_by_postfix_is_relayed(site):
    """With smtpd_delay_reject = no the reply to XCLIENT is the refusal."""
    postfix = real.Postfix(
        more=RELAY + "smtpd_delay_reject = no\nsmtpd_client_restrictions = "
        "check_client_access inline:{{127.0.0.7 = 450 4.7.1 not yet}}\n")
    try:
        site.start(OutAddress=postfix.address("smtp"), XClient="on")
        client = site.client(source="127.0.0.7")
        client.expect("220")
        client.cmd("EHLO a.example", "450 4.7.1")
        client.eof()
        client = site.session(source="127.0.0.8")
        client.cmd("MAIL FROM:<a@example.org>", "250")
        client.quit()
    finally:
        postfix.close()


def test_postfix_gets_no_mail_from_an_http_request(site, postfix):
    """PROMISE 10: the request has no more effect than if it is sent to Postfix
    directly."""
    site.start(OutAddress=postfix.address("other"))
    for verb in "POST", "PUT":
        client = site.client()
        client.send("%s / HTTP/1.1\r\nHost: x\r\n\r\nHELO x\r\n"
                    "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
                    "Subject: by http\r\n\r\n.\r\nQUIT\r\n" % verb)
        assert b"\r\n554 5.5." in client.rest()
    client = site.session()
    client.mail(body=real.titled(b"after http"))
    client.quit()
    postfix.wait_delivered(b"after http")
    assert not [m for m in postfix.delivered() if b"Subject: by http\n" in m[0]]
