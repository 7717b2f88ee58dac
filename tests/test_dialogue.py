"""Commands and replies, in both directions."""

import base64
import re
import socket
import threading

import pytest

from harness import CLOSE, Drip, Hold, REFUSED, RESET, Then, WAIT, stuff, turns, until

BODY = b"Subject: hello\r\n\r\nworld\r\n"


# ---------------------------------------------------------------- greeting

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: greeting")
@pytest.mark.core
def test_greeting_text_is_replaced(site):
    site.hop.on("greeting", "220 secret.example ESMTP Postfix")
    got = site.client().expect("220 smtp.passthru")
    assert "secret" not in got.text and "Postfix" not in got.text


@pytest.mark.parametrize("greeting", [
    "220-secret.example one\n220-two\n220 three",
    Drip("220-one\n220 two"),
    "220",
    b"220 only a line feed\n",
])
def test_greeting_of_any_form_is_relayed(site, greeting):
    site.hop.on("greeting", greeting)
    client = site.client()
    got = client.expect("220")
    assert "secret" not in got.text
    client.cmd("EHLO me", "250")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: greeting 4xx",
    "clamsmtpd.8 THE SMTP DIALOGUE: greeting 5xx")
@pytest.mark.parametrize("ending", ["stays", "closes"])
@pytest.mark.parametrize("greeting", [
    "421 4.3.2 come later", "450-not\n450-just\n450 yet",
])
def test_greeting_4xx_is_relayed_whole_and_ends_the_session(site, greeting, ending):
    site.hop.on("greeting", Then(greeting, CLOSE) if ending == "closes" else greeting)
    client = site.client()
    assert client.reply().text == greeting
    client.eof()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: greeting 4xx",
    "clamsmtpd.8 THE SMTP DIALOGUE: greeting 5xx",
    "clamsmtpd.8 DIAGNOSTICS: SERVER: ...")
@pytest.mark.parametrize("ending", ["stays", "closes"])
@pytest.mark.parametrize("greeting", [
    "554 5.3.2 go away", "554-no\n554-no\n554 never", "521 no mail here"])
def test_greeting_5xx_is_relayed_whole_and_leaves_503_until_quit(site, greeting, ending):
    """RFC 5321 3.1.  The next hop gets no further command."""
    site.hop.on("greeting", greeting if ending == "stays" else Then(greeting, CLOSE))
    client = site.client()
    assert client.reply().text == greeting
    for command in ("EHLO me", "HELO me", "MAIL FROM:<a@b>", "NOOP", "RSET", "HELP",
                    "DATA", "STARTTLS", "AUTH PLAIN AA=="):
        client.cmd(command, "503 5.5.1")
    client.chunk(b"QUIT\r\n", last=True)
    client.expect("503 5.5.1")
    client.cmd("FOO", "500")
    client.cmd("QUIT", "221 2.0.0")
    client.eof()
    assert site.hop.session.wait_end() == "quit" if ending == "stays" else "closed"
    assert set(site.hop.commands) <= {"QUIT"}
    site.daemon.wait_log("^100000: SERVER: refused the session: 5")
    assert not site.daemon.log("status=")


def test_greeting_5xx_and_a_client_that_goes_frees_its_place(site):
    site.hop.on("greeting", "554 5.3.2 go away")
    client = site.client()
    client.expect("554")
    client.close()
    site.daemon.settle()


@pytest.mark.parametrize("greeting", [
    CLOSE, RESET, "354 what", "hello there", b"220 half a li", "999 high",
    "220-a\n250 b",
])
def test_greeting_that_is_no_reply_gives_421(site, greeting):
    site.hop.on("greeting",
                Then(greeting, CLOSE) if isinstance(greeting, bytes) else greeting)
    client = site.client()
    client.expect("421")
    client.eof()
    client.close()
    site.hop.session.wait_end()


@pytest.mark.covers("clamsmtpd.8 When something fails: next hop down",
    "clamsmtpd.8 DIAGNOSTICS: SERVER: ...")
def test_next_hop_unreachable_gives_421(site):
    site.start()
    site.hop.down()
    client = site.client()
    client.expect("421 4.4.1")
    client.eof()
    assert site.daemon.log("^100000: SERVER: couldn't connect to: %s: %s$"
                           % (site.hop.address, REFUSED))


def test_next_hop_back_after_an_outage_is_used(site):
    site.start()
    site.hop.down()
    site.client().expect("421 4.4.1")
    site.hop.up()
    client = site.session()
    client.mail()
    client.quit()


# ---------------------------------------------------------------- EHLO

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: name in HELO and EHLO replies")
@pytest.mark.core
def test_ehlo_name_is_replaced_and_the_clients_is_passed(site):
    client = site.client()
    client.expect("220")
    got = client.cmd("EHLO my.own.name", "250")
    assert re.fullmatch(r"250[- ]smtp\.passthru( .*)?", got.lines[0])
    assert "next.hop" not in got.text
    assert site.hop.commands == ["EHLO my.own.name"]


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: name in HELO and EHLO replies")
def test_helo_name_is_replaced(site):
    client = site.client()
    client.expect("220")
    got = client.cmd("HELO me", "250 smtp.passthru")
    assert len(got.lines) == 1 and "next.hop" not in got.text


def fresh_ehlo(site):
    client = site.client()
    client.expect("220")
    return client.cmd("EHLO me", "250")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: EHLO keywords")
@pytest.mark.parametrize("keyword", [
    "SIZE 10240000", "SIZE", "8BITMIME", "DSN", "SMTPUTF8",
    "ENHANCEDSTATUSCODES", "AUTH PLAIN LOGIN", "AUTH=PLAIN LOGIN", "ETRN",
    "VRFY", "EXPN", "HELP", "XFORWARD NAME ADDR PROTO HELO SOURCE PORT IDENT",
    "DELIVERBY 120", "8bitmime", "auth plain",
])
@pytest.mark.parametrize("place", ["first", "last"])
def test_ehlo_keyword_passes(site, keyword, place):
    site.hop.ehlo = [keyword, "STARTTLS"] if place == "first" else \
        ["STARTTLS", keyword]
    assert keyword in fresh_ehlo(site).keywords()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: EHLO keywords")
@pytest.mark.parametrize("keyword", [
    "STARTTLS", "BINARYMIME", "BURL imap", "CHECKPOINT", "XCLIENT NAME ADDR",
    "XEXCH50", "X-EXPS GSSAPI", "X-ANONYMOUSTLS", "XVERP", "VERP", "TURN",
    "ATRN", "MT-PRIORITY", "FUTURERELEASE 1 2", "LIMITS RCPTMAX=1", "REQUIRETLS",
    "SIZEX 5", "AUTHX", "8BITMIMEX", "starttls", "NOSUCH=1",
])
@pytest.mark.parametrize("place", ["first", "last"])
def test_ehlo_keyword_is_removed_and_the_last_line_keeps_its_space(
        site, keyword, place):
    site.hop.ehlo = [keyword, "DSN"] if place == "first" else ["DSN", keyword]
    got = fresh_ehlo(site)
    assert sorted(got.keywords()) == ["DSN", "PIPELINING"]
    assert [l[3] for l in got.lines] == ["-"] * (len(got.lines) - 1) + [" "]


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: PIPELINING and CHUNKING")
@pytest.mark.parametrize("keywords", [
    [], ["STARTTLS"], ["PIPELINING"], ["SIZE 5", "PIPELINING"], ["pipelining"],
])
def test_pipelining_is_offered_always_and_once(site, keywords):
    site.hop.ehlo = keywords
    got = fresh_ehlo(site).keywords()
    assert [k.upper() for k in got].count("PIPELINING") == 1


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: PIPELINING and CHUNKING")
@pytest.mark.parametrize("there", [True, False])
def test_chunking_is_offered_when_the_next_hop_has_it(site, there):
    site.hop.ehlo = ["8BITMIME"] + ["CHUNKING"] * there
    assert ("CHUNKING" in fresh_ehlo(site).keywords()) == there


def test_ehlo_reply_one_byte_at_a_time(site):
    site.hop.on("EHLO", Drip("250-next.hop\n250-DSN\n250-STARTTLS\n250 SIZE 77"))
    assert sorted(fresh_ehlo(site).keywords()) == ["DSN", "PIPELINING", "SIZE 77"]


def test_ehlo_repeated_is_relayed(site):
    site.hop.on("EHLO", ["250-a\n250-DSN\n250 SIZE 5",
                         "250-a\n250-AUTH PLAIN\n250 SIZE 6"])
    client = site.client()
    client.expect("220")
    client.cmd("EHLO me", "250")
    got = client.cmd("EHLO me", "250").keywords()
    assert sorted(got) == ["AUTH PLAIN", "PIPELINING", "SIZE 6"]


def test_ehlo_refused_is_relayed_and_helo_works(site):
    site.hop.on("EHLO", "502-5.5.1 old\n502 5.5.1 server")
    client = site.client()
    client.expect("220")
    assert client.cmd("EHLO me").text == "502-5.5.1 old\n502 5.5.1 server"
    client.cmd("HELO me", "250")
    client.mail()
    client.quit()


# ---------------------------------------------------------------- verbs

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Relayed commands")
@pytest.mark.core
@pytest.mark.parametrize("command", [
    "HELO x", "EHLO y.z", "RSET", "NOOP", "NOOP with words", "VRFY <a@b>",
    "EXPN staff", "HELP", "HELP mail", "ETRN example.org", "AUTH PLAIN AGEAYg==",
    "XFORWARD NAME=a ADDR=1.2.3.4", "MAIL FROM:<>",
    "MAIL FROM:<a@b>  SIZE=7   BODY=8BITMIME RET=HDRS ENVID=x+2By",
    "mail from: <A@B>", "MaIl FrOm:<a@b> AUTH=<> SMTPUTF8",
    "noop", "rset", "vrfy A", "Help",
])
def test_command_is_passed_as_it_came(site, command):
    client = site.session()
    client.line(command)
    client.reply()
    assert site.hop.commands[1:] == [command]
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Relayed commands")
def test_rcpt_is_passed_as_it_came(site):
    command = "rCpT tO:<\"b \\\" c\"@example.com>  NOTIFY=NEVER ORCPT=rfc822;x+3Dy"
    client = site.session()
    client.cmd("MAIL FROM:<a@b>", "250")
    client.cmd(command, "250")
    assert site.hop.commands[-1] == command
    client.quit()


def refused_here(site, command, want):
    """The next hop does not receive the command, and the session continues."""
    client = site.session()
    client.cmd(command, want)
    client.cmd("NOOP", "250")
    assert site.hop.commands == ["EHLO client.example", "NOOP"]
    client.quit()


@pytest.mark.covers(
    "clamsmtpd.8 THE SMTP DIALOGUE: STARTTLS, XCLIENT and unknown commands")
@pytest.mark.parametrize("command", [
    "FOO", "XEXCH50 10 2", "TURN", "SEND FROM:<a@b>", "DATAX", "BDATX 3",
    "MAILX FROM:<a>", "", " ", "HELOO x", "QUITT", "GETX /", " GET /",
    "MAIL\x0b", "MAIL\xff", "ATRN", "BURL imap://x LAST", "STARTTLSX",
])
def test_unknown_command_is_500_and_not_forwarded(site, command):
    refused_here(site, command.encode("latin-1"), "500 5.5.1")


@pytest.mark.covers(
    "clamsmtpd.8 THE SMTP DIALOGUE: STARTTLS, XCLIENT and unknown commands")
@pytest.mark.core
@pytest.mark.parametrize("command, want", [
    ("STARTTLS", "502 5.5.1"), ("starttls", "502 5.5.1"),
    ("XCLIENT ADDR=1.2.3.4", "554 5.7.0 Insufficient authorization"),
    ("xclient NAME=x", "554 5.7.0"),
])
def test_command_starttls_or_xclient_is_refused(site, command, want):
    refused_here(site, command, want)


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Malformed commands")
@pytest.mark.core
@pytest.mark.parametrize("command", [
    b"NOOP\rDATA", b"NOOP\0DATA", b"MAIL FROM:<a@b>\rRCPT TO:<c@d>",
    b"NOOP\0", b"NOOP \r x", b"N\0OOP", b"N\rOOP",
    b"RCPT TO:<a\0b@c>",
])
def test_nul_or_bare_cr_in_a_command_is_501(site, command):
    refused_here(site, command, "501 5.5.2")


def test_command_that_ends_in_lf_is_relayed(site):
    client = site.client()
    client.expect("220")
    client.send("EHLO me\nMAIL FROM:<a@b>\nRCPT TO:<c@d>\nQUIT\n")
    for want in ("250", "250 2.1.0", "250 2.1.5", "221"):
        client.expect(want)
    client.eof()
    assert site.hop.session.raw.count(b"\r\n") == 4


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Malformed commands")
@pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["CRLF", "LF"])
def test_line_of_12_kib_passes_whatever_its_end(site, end):
    client = site.session()
    command = "NOOP " + "x" * (12 * 1024 - 5)
    client.send(command + end)
    client.expect("250")
    assert site.hop.commands[-1] == command
    client.send(command + "x" + end)
    client.expect("500 5.5.2 Line too long")
    client.quit()


def test_line_of_12_kib_whose_lf_comes_alone_passes(site):
    """The CR of such a line does not make it one byte too long."""
    client = site.session()
    command = "NOOP " + "x" * (12 * 1024 - 5)
    client.send(command + "\r")
    turns(site)
    client.send("\n")
    client.expect("250")
    assert command in site.hop.commands
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Malformed commands")
@pytest.mark.core
@pytest.mark.parametrize("size", [12 * 1024 + 10, 20000, 300000])
def test_line_longer_than_12_kib_is_500_and_not_forwarded(site, size):
    refused_here(site, "NOOP " + "x" * size, "500 5.5.2 Line too long")


def test_line_without_end_takes_no_memory(site):
    client = site.session()
    client.cmd("NOOP", "250")
    before = site.daemon.rss()
    for _ in range(50):
        client.send(b"y" * 65536)
    client.cmd("", "500 5.5.2")
    assert site.daemon.grown(before) < 2048
    client.cmd("NOOP", "250")
    client.quit()


# ---------------------------------------------------------------- not SMTP

POST = (b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:10025\r\nContent-Length: 99\r\n\r\n"
        b"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSubject: x\r\n\r\n"
        b"hi\r\n.\r\nQUIT\r\n")


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Input that ends the session",
    "clamsmtpd.8 DIAGNOSTICS: CLIENT: ...")
@pytest.mark.core
@pytest.mark.parametrize("line", [
    b"GET / HTTP/1.1\r\n", b"post /x\r\n", b"Connect a:25 HTTP/1.0\r\n", b"POST\n",
    b"GET\t/\r\n", b"GET /", b"POST /" + b"x" * 20000 + b"\r\n", POST,
    b"\x16\x03\x01", b"\x80\x2e\x01", b"\0NOOP\r\n", b"\rNOOP\r\n", b"\r\r\n",
    b"250 ok\r\n", b"{\"a\": 1}\r\n", b"\xff\xfe\r\n", b"-\r\n", b"[x\r\n",
], ids=lambda line: repr(line[:12]))
def test_line_of_no_smtp_client_ends_the_session(site, line):
    """PROMISE 10: such lines are HTTP's verbs, and lines that begin neither with a
    letter nor with a blank."""
    client = site.session()
    client.send(line)
    client.expect("554 5.5.1")
    client.eof()
    assert site.hop.session.wait_end() == "quit"
    assert site.hop.commands == ["EHLO client.example", "QUIT"]
    assert len(site.daemon.wait_log("CLIENT: does not speak SMTP")) == 1


def test_line_of_no_smtp_client_in_pieces_ends_the_session(site):
    """The first word is checked only when it is complete."""
    client = site.session()
    client.send("GE")
    turns(site)
    client.send("T")
    turns(site)
    assert not client.stream.more()
    client.send(" ")
    client.expect("554 5.5.1")
    client.eof()


def test_http_request_with_an_unknown_verb_delivers_nothing(site):
    """PROMISE 10: the DATA in its body arrives together with the text after it."""
    client = site.client()
    client.send(POST.replace(b"POST", b"PUT"))
    said = client.rest().split(b"\r\n")
    assert said[-2].startswith(b"554 5.5.0")
    site.hop.session.wait_end()
    assert site.hop.messages == [] and "DATA" not in site.hop.session.verbs()


LONG_LINE = b"NOOP " + b"x" * 13000


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: BINARYMIME",
    "clamsmtpd.8 THE SMTP DIALOGUE: 20th refused command")
@pytest.mark.core
@pytest.mark.parametrize("command, want", [
    (b"FOO", "500 5.5.1"), (b"", "500 5.5.1"), (LONG_LINE, "500 5.5.2"),
    (b"NOOP\0", "501 5.5.2"), (b"DATA x", "501 5.5.4"),
    (b"MAIL FROM:<a@b> BODY=BINARYMIME", "501 5.5.4"), (b"STARTTLS", "502"),
    (b"DATA", "503"), (b"BDAT 3\r\nabc", "503"), (b"XFORWARD ADDR=1.2.3.4", "503"),
    (b"XCLIENT ADDR=1.2.3.4", "554"),
], ids=lambda value: repr(value[:20]))
def test_twentieth_refused_command_gets_421(site, command, want):
    """PROMISE 10: a client that speaks another protocol gets no more attempts."""
    client = site.session()
    if command.startswith(b"XFORWARD"):
        client.cmd("MAIL FROM:<a@b>", "250")
    end = b"" if command.startswith(b"BDAT") else b"\r\n"
    for _ in range(19):
        client.send(command + end)
        client.expect(want)
    client.cmd("NOOP", "250")
    client.send(command + end)
    client.expect("421 4.7.0")
    client.eof()
    assert site.hop.session.wait_end() == "quit"
    assert len(site.daemon.wait_log("CLIENT: 20 commands refused")) == 1


def test_commands_that_the_next_hop_refuses_are_not_counted(site):
    site.hop.on("RCPT", lambda s, line: "550 5.1.1 no" if "no@" in line else None)
    client = site.session()
    client.cmd("MAIL FROM:<a@b>", "250")
    client.send("RCPT TO:<no@b>\r\n" * 40)
    for _ in range(40):
        client.expect("550 5.1.1")
    client.cmd("RCPT TO:<c@d>", "250")
    client.data(BODY)
    client.quit()


# ---------------------------------------------------------------- DATA

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: DATA without a recipient")
@pytest.mark.core
@pytest.mark.parametrize("before", [
    [], ["MAIL FROM:<a@b>"], ["MAIL FROM:<a@b>", "RCPT TO:<no@b>"],
    ["MAIL FROM:<a@b>", "RCPT TO:<c@b>", "RSET"],
    ["MAIL FROM:<a@b>", "RCPT TO:<c@b>", "EHLO again"],
    ["MAIL FROM:<a@b>", "RCPT TO:<c@b>", "HELO again"],
    ["MAIL FROM:<refused@b>", "RCPT TO:<c@b>"],
    ["RCPT TO:<c@b>"],
])
def test_data_without_a_recipient_is_503_and_nothing_is_sent(site, before):
    """The reply is 503 even if the next hop would send 354."""
    site.hop.on("RCPT", lambda s, line: "550 5.1.1 no" if "no@" in line else
                "250 ok" if s.mail else "503 5.5.1 MAIL first")
    site.hop.on("MAIL", lambda s, line: "550 no" if "refused" in line else None)
    client = site.session()
    for command in before:
        client.line(command)
        client.reply()
    client.cmd("DATA", "503 5.5.1")
    assert "DATA" not in site.hop.session.verbs()
    client.cmd("RSET", "250")
    client.mail()
    assert len(site.hop.messages) == 1
    client.quit()


def test_after_a_message_the_recipients_are_gone(site):
    client = site.session()
    client.mail()
    client.cmd("DATA", "503 5.5.1")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Commands answered by clamsmtpd",
    "clamsmtpd.8 THE SMTP DIALOGUE: 354")
@pytest.mark.core
def test_354_is_ours_and_data_is_sent_only_after_the_scan(site):
    hold = Hold("OK")
    site.clamd.verdict = hold
    client = site.session()
    client.envelope()
    client.cmd("DATA", "354 Start mail input; end with <CRLF>.<CRLF>")
    client.send(BODY + b".\r\n")
    hold.reached()
    assert "DATA" not in site.hop.session.verbs()
    hold.go()
    client.expect("250 2.0.0 queued as 4711")
    assert len(site.hop.messages) == 1
    client.quit()


@pytest.mark.covers("clamsmtpd.8 DESCRIPTION: 2xx after the next hop",
    "clamsmtpd.8 THE SMTP DIALOGUE: Clean")
@pytest.mark.core
@pytest.mark.parametrize("reply", [
    "250 2.0.0 taken", "250-2.0.0 taken\n250 2.0.0 as 42", "550 5.7.1 no",
    "451-4.3.0 a\n451-4.3.0 b\n451 4.3.0 c", "552 5.3.4 too big",
])
def test_final_reply_is_relayed_whole(site, reply):
    site.hop.on(".", [reply])
    client = site.session()
    client.envelope()
    assert client.data(BODY, reply[:3]).text == reply
    client.cmd("NOOP", "250 2.0.0 noop")
    client.mail()
    client.quit()
    assert len(site.hop.messages) == (2 if reply[0] == "2" else 1)


@pytest.mark.parametrize("reply", ["554 5.5.1 no valid recipients",
                                   "451-4.3.0 a\n451 4.3.0 b"])
def test_refusal_of_data_is_relayed_whole(site, reply):
    site.hop.on("DATA", [reply])
    client = site.session()
    client.envelope()
    assert client.data(BODY, reply[:3]).text == reply
    assert site.hop.messages == []
    client.cmd("RSET", "250")
    client.mail()
    client.quit()


@pytest.mark.parametrize("reply", ["250 taken already", "334 go", "220 hello"])
def test_other_replies_to_data_are_a_protocol_error(site, reply):
    site.hop.on("DATA", reply)
    client = site.session()
    client.envelope()
    client.data(BODY, "451")
    client.eof()
    assert site.hop.session.wait_end() != "quit"
    assert site.hop.messages == []


def test_reply_354_of_several_lines_is_understood(site):
    site.hop.on("DATA", "354-go\n354-on\n354 now")
    client = site.session()
    client.mail()
    client.cmd("NOOP", "250 2.0.0 noop")
    client.quit()


@pytest.mark.parametrize("reply", ["354 more", "334 more"])
def test_final_reply_3xx_is_a_protocol_error(site, reply):
    site.hop.on(".", reply)
    client = site.session()
    client.envelope()
    client.data(BODY, "4")
    client.eof()


# ---------------------------------------------------------------- replies

COMMANDS = ["MAIL FROM:<a@b>", "RCPT TO:<c@d>", "RSET", "NOOP", "VRFY x",
            "EXPN x", "HELP", "ETRN x", "HELO me", "AUTH PLAIN eA==",
            "XFORWARD ADDR=1.2.3.4", "QUIT"]


@pytest.mark.core
@pytest.mark.parametrize("command", COMMANDS)
def test_multi_line_reply_is_relayed_whole(site, command):
    """A reply passes unchanged, except for the host names in the reply to HELO."""
    verb = command.split(" ")[0]
    code = "221" if verb == "QUIT" else "250"
    reply = "%s-one\n%s-two: three\n%s four" % (code, code, code)
    site.hop.on(verb, reply)
    client = site.session()
    got = client.cmd(command, code)
    assert got.text == ("250 smtp.passthru" if verb == "HELO" else reply)
    if verb != "QUIT":
        client.cmd("NOOP")
        client.cmd("QUIT", "221")
    client.eof()


@pytest.mark.parametrize("command", COMMANDS[:-1])
@pytest.mark.parametrize("reply", ["450 4.7.1 later", "550-5.7.1 no\n550 5.7.1 never",
                                   "252 2.0.0 perhaps", "500 what"])
def test_reply_is_relayed_as_it_is(site, command, reply):
    verb = command.split(" ")[0]
    if verb == "HELO" and reply[0] == "2":
        reply = "550 no"
    site.hop.on(verb, [reply])
    client = site.session()
    assert client.cmd(command).text == reply
    client.cmd("RSET", "250")
    client.quit()


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_421_is_relayed_whole_and_ends_the_session(site, command):
    reply = "421-4.3.2 going\n421 4.3.2 down"
    site.hop.on(command.split(" ")[0], reply)
    client = site.session()
    assert client.cmd(command).text == reply
    client.eof()
    site.hop.session.wait_end()


@pytest.mark.parametrize("command", COMMANDS[:-1])
@pytest.mark.parametrize("reply", ["354 go on", "334 go on"])
def test_3xx_where_none_belongs_ends_the_session(site, command, reply):
    if command.startswith("AUTH") and reply.startswith("334"):
        reply = "354 go on"
    site.hop.on(command.split(" ")[0], reply)
    client = site.session()
    got = client.cmd(command)
    assert got.code[0] == "4", got
    client.eof()
    site.hop.session.wait_end()


@pytest.mark.parametrize("command", COMMANDS[:-1])
@pytest.mark.parametrize("ending", [CLOSE, RESET, Then(b"250-half\r\n25", CLOSE),
                                    Then("250-a\n251 b", CLOSE), "not SMTP"],
                         ids=["close", "reset", "half", "mixed", "garbage"])
def test_next_hop_gone_at_a_command_gives_421(site, command, ending):
    site.hop.on(command.split(" ")[0], ending)
    client = site.session()
    client.line(command)
    got = client.reply()
    assert got.code == "421", got
    client.eof()


def test_next_hop_gone_at_quit_ends_the_session(site):
    site.hop.on("QUIT", CLOSE)
    client = site.session()
    client.line("QUIT")
    assert client.reply().code in ("221", "421")
    client.eof()


@pytest.mark.core
@pytest.mark.parametrize("ending", ["421 4.3.2 shutting down now",
                                    "421-4.3.2 a\n421 4.3.2 b"])
def test_unexpected_421_is_relayed_and_ends_the_session(site, ending):
    client = site.session()
    site.hop.session.sock.sendall(site.hop.encode(ending))
    assert client.reply().text == ending
    client.eof()
    site.hop.session.wait_end()


def test_next_hop_closing_while_idle_gives_421(site):
    client = site.session()
    site.hop.session.sock.shutdown(1)
    client.expect("421")
    client.eof()


def test_reply_unexpected_is_not_taken_for_the_next_one(site):
    site.hop.on("MAIL", "250 ok\n250 one too many")
    client = site.session()
    client.send("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n")
    client.expect("250 ok")
    client.rest()
    site.hop.session.wait_end()
    assert "RCPT" not in site.hop.session.verbs()


@pytest.mark.parametrize("whole", [True, False], ids=["in one go", "in pieces"])
@pytest.mark.parametrize("size, fits", [(16000, True), (17000, False),
                                        (30000, False)])
def test_reply_limit_does_not_depend_on_packets(site, size, fits, whole):
    lines = (b"214-" + b"h" * 74 + b"\r\n") * (size // 80) + b"214 end\r\n"
    site.hop = site.new_hop(path=site.path("hop.sock"))   # a write is one read

    def pieces(s, line):
        try:
            for at in range(0, len(lines) - 500, 500):
                s.sock.sendall(lines[at:at + 500])
                turn.cmd("NOOP", "250")     # the daemon has read it by then
        except OSError:
            pass                            # it has given up, as it may
        finally:
            sent.set()
        return lines[at + 500:]
    sent = threading.Event()
    turn = site.session()
    site.hop.on("HELP", [lines if whole else pieces])
    client = site.session()
    client.line("HELP")
    got = client.reply()
    if fits:
        assert got.raw == lines
        client.quit()
    else:
        assert got.code == "421"
        site.daemon.wait_log("too long")
    if not whole:
        assert sent.wait(WAIT)
    turn.quit()


@pytest.mark.parametrize("reply, want", [
    (b"250 ok\n", "250 ok"), (b"250\r\n", "250"), (b"250 \r\n", "250"),
    (b"250-\r\n250 \r\n", "250"), (b"250-a\n250 b\n", "250"),
])
def test_reply_of_odd_form_is_understood(site, reply, want):
    site.hop.on("NOOP", [reply])
    client = site.session()
    client.cmd("NOOP", want)
    client.cmd("NOOP", "250 2.0.0 noop")
    client.quit()


@pytest.mark.covers("clamsmtpd.8 TRANSPARENCY: replies of the next hop")
def test_reply_with_control_characters_is_harmless(site):
    """Any byte in a reply is harmless."""
    site.hop.on("NOOP", [b"250 \x1b[2J %s%n \xff\xfe \t end\r\n"])
    client = site.session()
    client.line("NOOP")
    raw = client.stream.line()
    assert raw.startswith(b"250 ") and raw.endswith(b"end\r\n")
    client.cmd("NOOP", "250 2.0.0 noop")
    assert "\x1b" not in site.daemon.text()
    client.quit()


def test_reply_without_end_takes_no_memory(site):
    def flood(s, line):
        try:
            for _ in range(40):
                s.sock.sendall((b"250-" + b"y" * 1000 + b"\r\n") * 60)
        except OSError:
            pass                        # it has given up, as it may
        return b""
    site.hop.on("NOOP", [flood])
    client = site.session()
    client.cmd("RSET", "250")
    before = site.daemon.rss()
    client.line("NOOP")
    client.expect("421")
    assert site.daemon.grown(before) < 2048


def test_reply_line_too_long_takes_no_memory(site):
    def flood(s, line):
        try:
            s.sock.sendall(b"250 ")
            for _ in range(40):
                s.sock.sendall(b"z" * 65536)
        except OSError:
            pass
        return "\n"
    site.hop.on("NOOP", [flood])
    client = site.session()
    before = site.daemon.rss()
    client.line("NOOP")
    until(lambda: site.hop.session.over.is_set() or client.stream.more(),
          "an end of it")
    assert site.daemon.grown(before) < 2048
    client.close()


# ---------------------------------------------------------------- AUTH

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: AUTH continuation")
@pytest.mark.core
@pytest.mark.parametrize("answer", [
    "DATA", "QUIT", "STARTTLS", "RSET", "BDAT 5 LAST", "*", "",
    "MAIL FROM:<x@y>", "XCLIENT ADDR=1", "=", "GET /", "\x16\x03", base64.b64encode(b"x" * 6000).decode(),
])
def test_auth_continuation_is_relayed_unread(site, answer):
    site.hop.on("AUTH", "334 VXNlcm5hbWU6")
    site.hop.on("334", ["334 UGFzc3dvcmQ6", "235 2.7.0 welcome"])
    client = site.session()
    client.cmd("AUTH LOGIN", "334 VXNlcm5hbWU6")
    client.cmd(answer, "334 UGFzc3dvcmQ6")
    client.cmd(answer, "235 2.7.0 welcome")
    assert site.hop.commands[1:] == ["AUTH LOGIN", answer, answer]
    client.mail()
    client.quit()


def test_auth_refused_in_the_middle_leaves_no_state(site):
    site.hop.on("AUTH", "334 go")
    site.hop.on("334", "535-5.7.8 no\n535 5.7.8 never")
    client = site.session()
    client.cmd("AUTH LOGIN", "334")
    assert client.cmd("*").text == "535-5.7.8 no\n535 5.7.8 never"
    client.cmd("FOO", "500")
    client.mail()
    client.quit()


def test_auth_pipelined_in_one_packet_is_relayed(site):
    site.hop.on("AUTH", "334 a")
    site.hop.on("334", ["334 b"])
    client = site.session()
    client.send("AUTH LOGIN\r\nDATA\r\nQUIT\r\nNOOP\r\n")
    for want in ("334 a", "334 b", "235", "250 2.0.0 noop"):
        client.expect(want)
    client.quit()


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: AUTH continuation",
    "clamsmtpd.8 LOGGING: dialogue")
@pytest.mark.core
def test_auth_secrets_are_never_logged(site):
    site.hop.on("AUTH", [None, "334 VXNlcm5hbWU6"])
    site.hop.on("334", ["334 UGFzc3dvcmQ6", "235 ok"])
    client = site.session()
    client.cmd("AUTH PLAIN c2VjcmV0T05F", "235")
    client.cmd("auth login c2VjcmV0VFdP", "334")
    client.cmd("c2VjcmV0VEhSRUU", "334")
    client.cmd("c2VjcmV0Rk9VUg", "235")
    client.quit()
    site.daemon.wait_log("SERVER > QUIT")
    text = site.daemon.text()
    assert "AUTH PLAIN" in text.upper()
    for secret in ("c2VjcmV0T05F", "c2VjcmV0VFdP", "c2VjcmV0VEhSRUU",
                   "c2VjcmV0Rk9VUg"):
        assert secret not in text


@pytest.mark.parametrize("how", ["command", "continuation"])
@pytest.mark.parametrize("control", [b"\r", b"\0"])
def test_auth_secrets_in_a_bad_line_are_not_logged(site, how, control):
    site.hop.on("AUTH", "334 VXNlcm5hbWU6")
    client = site.session()
    if how == "continuation":
        client.cmd("AUTH LOGIN", "334")
        client.line(b"c2VjcmV0T05F" + control + b"x")
    else:
        client.line(b"AUTH PLAIN c2VjcmV0T05F" + control + b"x")
    client.expect("501")
    client.close()
    site.hop.session.wait_end()
    assert "c2VjcmV0T05F" not in site.daemon.text()


def test_auth_mechanism_with_control_characters_is_harmless(site):
    """PROMISE 8: the reply and the log have no control characters."""
    client = site.session()
    client.cmd(b"AUTH \x1b[2J\x7f c2VjcmV0", "235")
    for line in "CLIENT <", "SERVER >":
        assert "100000: " + line + r" AUTH \x1B[2J\x7F ***" in site.daemon.log()


@pytest.mark.parametrize("ending", ["time-out", "half_close", "reset"])
def test_auth_broken_off_gets_no_quit_as_answer(site, clock, ending):
    """After a 334 the next hop would log a QUIT as a failed login."""
    site.hop.on("AUTH", "334 VXNlcm5hbWU6")
    site.start(**clock.settings())
    client = site.session()
    client.cmd("AUTH LOGIN", "334")
    if ending == "time-out":
        clock.go(site.daemon, 180)
        client.expect("421 4.4.2")
    else:
        getattr(client, ending)()
    site.hop.session.wait_end()
    assert site.hop.commands == ["EHLO client.example", "AUTH LOGIN"]


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: input with DATA")
@pytest.mark.core
@pytest.mark.parametrize("more", [BODY + b".\r\n", b"x", b"\r\n", b"QUIT\r\n"], ids=repr)
@pytest.mark.parametrize("data", [b"DATA\r\n", b"data \n", b"DATA x\r\n"], ids=repr)
def test_input_after_data_is_554_and_ends_the_session(site, data, more):
    """PROMISE 10: DATA is the last command of a group (RFC 2920 3.1)."""
    client = site.session()
    client.send(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n" + data + more)
    for want in ("250 2.1.0", "250 2.1.5", "554 5.5.0"):
        client.expect(want)
    client.eof()
    assert site.hop.session.wait_end() == "quit"
    assert site.hop.session.verbs() == ["EHLO", "MAIL", "RCPT", "QUIT"]
    assert len(site.daemon.wait_log("CLIENT: sent input after DATA")) == 1


def test_input_after_data_that_was_not_read_is_554(site):
    """The input comes while the reply to a command is outstanding, and waits in the
    kernel."""
    hold = Hold()
    site.hop.on("RCPT", hold)
    client = site.session()
    client.send("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
    client.expect("250 2.1.0")
    hold.reached()
    client.send(BODY + b".\r\n")
    hold.go()
    client.expect("250 2.1.5")
    client.expect("554 5.5.0")
    client.eof()
    assert site.hop.messages == []


def test_input_after_data_without_a_transaction_is_554(site):
    """The lines of the body are not read as commands either."""
    client = site.session()
    client.send(b"DATA\r\nMAIL FROM:<a@b>\r\n.\r\n")
    client.expect("554 5.5.0")
    client.eof()
    assert "MAIL" not in site.hop.session.verbs()


def test_second_transaction_pipelined_after_a_body_is_taken(site):
    """The commands after the final dot are a group of their own."""
    client = site.session()
    client.begin(BODY + b".\r\n" + ENVELOPE)
    for want in ("250 2.0.0", "250", "250", "250", "354"):
        client.expect(want)
    client.send(BODY + b".\r\n")
    client.expect("250 2.0.0")
    client.quit()


def test_second_accepted_mail_forgets_the_recipients_of_the_first(site):
    """A next hop that accepts a second MAIL has begun another transaction."""
    client = site.session()
    client.envelope("first@example.com", "one@example.com")
    client.cmd("MAIL FROM:<second@example.com>", "250")
    client.cmd("DATA", "503 5.5.1")
    client.cmd("RCPT TO:<two@example.com>", "250")
    client.data(BODY)
    client.quit()
    site.daemon.wait_log("^100000: from=second@example.com, to=two@example.com, "
                         "status=CLEAN$")


# ---------------------------------------------------------------- pipelining

ENVELOPE = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nDATA\r\n"


def expect_all(client, count, body=BODY, send=None, half_close=False):
    """The replies after EHLO and an ENVELOPE.  What follows each 354 is sent in one
    piece: the body, and the next envelope or QUIT."""
    client.expect("220")
    client.expect("250")
    for number in range(count):
        client.expect("250 2.1.0")
        client.expect("250 2.1.5")
        client.expect("250 2.1.5")
        client.expect("354")
        last = number == count - 1
        (send or client.send)(stuff(body) + b".\r\n" +
                              (b"QUIT\r\n" if last else ENVELOPE))
        if last and half_close:
            client.half_close()
        client.expect("250 2.0.0 queued")
    client.expect("221")
    client.eof()


@pytest.mark.core
def test_pipelined_two_transactions_and_quit_are_answered(site):
    client = site.client()
    client.send(b"EHLO me\r\n" + ENVELOPE)
    expect_all(client, 2)
    assert len(site.hop.messages) == 2
    assert len(site.hop.messages[1].rcpts) == 2


@pytest.mark.core
def test_session_one_byte_at_a_time_is_served(site):
    client = site.client()
    client.drip(b"EHLO me\r\n" + ENVELOPE)
    expect_all(client, 2, b"Subject: x\r\n\r\n.dot\r\n..\r\n.\r\n", client.drip)
    for message in site.hop.messages:
        assert message.body.endswith(b"\r\n\r\n.dot\r\n..\r\n.\r\n")


def test_pipelined_twenty_transactions_are_answered(site):
    client = site.client()
    client.send(b"EHLO me\r\n" + ENVELOPE)
    expect_all(client, 20)
    assert len(site.hop.messages) == 20


@pytest.mark.covers("clamsmtpd.8 LOGGING: 1000 bytes")
@pytest.mark.core
def test_pipelined_thousand_recipients_are_answered_and_logged(site):
    client = site.session()
    rcpts = ["RCPT TO:<user%d@example.com>" % i for i in range(1000)]
    client.send("MAIL FROM:<a@b>\r\n" + "\r\n".join(rcpts) + "\r\nDATA\r\n")
    client.expect("250 2.1.0")
    for _ in rcpts:
        client.expect("250 2.1.5")
    client.expect("354")
    client.send(BODY + b".\r\n")
    client.expect("250 2.0.0")
    assert site.hop.messages[0].rcpts == rcpts
    client.quit()
    line, = site.daemon.wait_log("status=CLEAN")
    assert len(line) <= 1000
    assert line.startswith("100000: from=a@b, to=user0@example.com, to=user1@")
    assert re.search(r"to=user\d+@example\.com(, to=\.\.\.)?, status=CLEAN$",
                     line), line[-80:]


@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: one command at a time")
@pytest.mark.core
def test_lock_step_only_one_command_is_outstanding(site):
    """The next command waits for the last line of the reply."""
    hold = Hold("250 2.1.0 whole")

    def half(s, line):
        s.hop.send(s.sock, b"250-2.1.0 half\r\n")
        return hold
    site.hop.on("MAIL", half)
    client = site.session()
    client.send("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nNOOP\r\n")
    hold.reached()
    other = site.session()         # two turns of the loop at least
    other.cmd("NOOP", "250")
    other.cmd("NOOP", "250")
    first = site.hop.sessions[0]
    assert first.raw.endswith(b"MAIL FROM:<a@b>\r\n")
    hold.go()
    for want in ("250 2.1.0", "250 2.1.5", "250 2.0.0 noop"):
        client.expect(want)
    client.quit()


def test_session_sent_before_the_greeting_is_served(site):
    hold = Hold()
    site.hop.on("greeting", hold)
    client = site.client()
    client.send(b"EHLO me\r\n" + ENVELOPE)
    hold.go()
    expect_all(client, 1)


def test_pipelined_recipients_partly_refused_get_their_replies(site):
    site.hop.on("RCPT", lambda s, line: "550 5.1.1 no" if "no" in line else None)
    client = site.session()
    client.send("MAIL FROM:<a@b>\r\nRCPT TO:<no1@d>\r\nRCPT TO:<c@d>\r\n"
                "RCPT TO:<no2@d>\r\nDATA\r\n")
    for want in ("250", "550", "250", "550", "354"):
        client.expect(want)
    client.send(BODY + b".\r\n")
    client.expect("250")
    assert site.hop.messages[0].rcpts == ["RCPT TO:<c@d>"]
    site.daemon.wait_log(r"from=a@b, to=c@d, status=CLEAN$")
    client.quit()


def test_client_that_does_not_read_is_waited_for(site):
    """In the end this client has all replies, and other clients were served
    meanwhile."""
    count = 50
    site.hop.on("NOOP", b"250 " + b"x" * 8000 + b"\r\n")
    site.start(Listen=site.path("in.sock"))     # it holds less than that
    client = site.session()
    client.send(b"NOOP\r\n" * count)
    turns(site)
    site.session().mail()
    for _ in range(count):
        client.expect("250 x")
    client.quit()


# ---------------------------------------------------------------- endings

@pytest.mark.covers("clamsmtpd.8 THE SMTP DIALOGUE: Relayed commands")
@pytest.mark.core
def test_quit_is_relayed_and_both_sides_close(site):
    client = site.session()
    site.hop.on("QUIT", "221-2.0.0 so\n221 2.0.0 long")
    assert client.cmd("QUIT").text == "221-2.0.0 so\n221 2.0.0 long"
    client.eof()
    assert site.hop.session.wait_end() == "quit"


@pytest.mark.core
def test_eof_after_quit_is_served(site):
    client = site.client()
    client.send(b"EHLO me\r\n" + ENVELOPE)
    expect_all(client, 2, half_close=True)
    assert len(site.hop.messages) == 2


def test_eof_after_a_command_while_idle_ends_the_session(site):
    client = site.session()
    client.half_close()
    client.rest()
    site.hop.session.wait_end()
    assert site.hop.messages == []


def test_client_that_sends_without_end_is_not_read(site):
    """PROMISE 6: one command is outstanding, and the rest waits in the client's
    kernel."""
    hold = Hold()
    site.hop.on("NOOP", [hold])
    client = site.session()
    client.cmd("RSET", "250")
    before = site.daemon.rss()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    client.sock.setblocking(False)
    sent = 0
    try:
        while sent < 64 << 20:
            sent += client.sock.send(b"NOOP\r\n" * 10000)
    except BlockingIOError:
        pass
    assert sent < 64 << 20, "64 MiB of commands were taken"
    assert site.daemon.grown(before) < 1024
    hold.reached()
    client.reset()
    hold.go()
    site.hop.session.wait_end()


def test_client_gone_closes_the_next_hops_session(site):
    client = site.session()
    client.reset()
    site.hop.session.wait_end()
    assert site.hop.messages == []


def test_last_reply_is_not_lost_to_a_reset(site):
    """Bytes that are unread at close would make the kernel send an RST."""
    site.hop.on("greeting", Then("554 5.7.1 go away for good", CLOSE))
    for _ in range(20):
        client = site.client()
        try:
            client.send(b"EHLO me\r\n" * 1000)
        except OSError:
            pass
        client.expect("554 5.7.1 go away for good")
        client.close()
